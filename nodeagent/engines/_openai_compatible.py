"""Any server with OpenAI's routes."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractAsyncContextManager

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    RunKind,
)
from nodeagent.engines._loading import VLLM, recognise
from nodeagent.engines._openai_relay import ask, guarded, parse_models, relay
from rung.errors import InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, OpenAiCompatibleEngine

_MODELS_PATH = "/v1/models"


class OpenAiCompatibleAdapter:
    """Speaks OpenAI's routes and recognises vLLM's output while it loads.

    Args:
        client: connections to engines.
        environment: where `api_key_env` is looked up; the agent's own.
    """

    def __init__(self, client: EngineClient, environment: Mapping[str, str] | None = None) -> None:
        self._client = client
        self._environment = os.environ if environment is None else environment

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """No options: what a generic server understands is known to its runtime's arguments alone.

        Where it should listen is told by `HOST` and `PORT`, which many servers heed; one that does not
        needs a fixed `port` in its spec and in its arguments.

        Raises:
            InvalidRequestError: it is no engine with OpenAI's routes.
        """
        engine = spec.engine.engine
        if not isinstance(engine, OpenAiCompatibleEngine):
            raise InvalidRequestError(f"{spec.id} has no OpenAI routes", deployment=spec.id)
        return CommandLine(arguments=(), environment={"HOST": listen_host, "PORT": str(listen_port)})

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. A server whose API key is configured but not set is unwell."""
        key_name = _api_key_env(spec)
        if key_name and not self._environment.get(key_name):
            return Probe(
                health=EngineHealth.UNWELL, detail=f"the agent's environment has no {key_name} (api_key_env)"
            )
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. A percentage is that of the step which `detail` names."""
        return recognise(VLLM, line.strip())

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """See `EngineAdapter.run`."""
        return relay(
            self._client,
            base_url,
            kind,
            body,
            what=spec.id,
            idle_timeout_s=idle_timeout_s,
            api_key=self._api_key(spec),
        )

    def _api_key(self, spec: DeploymentSpec) -> str:
        name = _api_key_env(spec)
        return self._environment.get(name, "") if name else ""

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        key = self._api_key(spec)
        health_path = _health_path(spec)
        answer = await ask(self._client, base_url, health_path, what=spec.id, api_key=key)
        if answer.status != 200:
            # 503 is what a server says that listens before it can answer.
            health = EngineHealth.LOADING if answer.status == 503 else EngineHealth.UNWELL
            return Probe(health=health, detail=f"{health_path} answers {answer.status}")
        if health_path != _MODELS_PATH:
            answer = await ask(self._client, base_url, _MODELS_PATH, what=spec.id, api_key=key)
        if answer.status in {401, 403}:
            return Probe(
                health=EngineHealth.UNWELL, detail=f"{_MODELS_PATH} answers {answer.status}: API key"
            )
        rows = parse_models(answer.body) or ()
        wanted = spec.engine_model_name
        served = next((row for row in rows if row.id == wanted), rows[0] if len(rows) == 1 else None)
        listed = not rows or any(row.id == wanted for row in rows)
        return Probe(
            health=EngineHealth.READY,
            detail="" if listed else f"does not list the model {wanted}",
            models=tuple(row.id for row in rows),
            context_tokens=(served.max_model_len or 0) if served is not None else 0,
        )


def _health_path(spec: DeploymentSpec) -> str:
    match spec.engine.engine:
        case OpenAiCompatibleEngine(health_path=path) if path:
            return path
        case _:
            return _MODELS_PATH


def _api_key_env(spec: DeploymentSpec) -> str:
    engine = spec.engine.engine
    return engine.api_key_env if isinstance(engine, OpenAiCompatibleEngine) else ""
