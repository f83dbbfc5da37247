"""Engines with dialects that this version can see but not yet use."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    RunKind,
)
from nodeagent.engines._openai_relay import ask, guarded
from rung.errors import InvalidRequestError, NotImplementedYetError
from rung.service import EngineClient
from rung.types import DeploymentSpec


class ProbeOnlyAdapter:
    """Tells whether an engine is up, and no more.

    Args:
        client: connections to engines.
        name: what kind of engine it is, for messages.
        health_path: a route that answers 200 when the engine is ready.
    """

    def __init__(self, client: EngineClient, *, name: str, health_path: str) -> None:
        self._client = client
        self._name = name
        self._health_path = health_path

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Always raises NotImplementedYetError."""
        raise NotImplementedYetError(f"{spec.id}: this version cannot start {self._name}", deployment=spec.id)

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """Nothing is known of its output."""
        return None

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """Always raises InvalidRequestError: the engine has none of OpenAI's routes."""
        raise InvalidRequestError(f"{spec.id}: {self._name} has no route for {kind}", deployment=spec.id)

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        answer = await ask(self._client, base_url, self._health_path, what=spec.id)
        if answer.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"{self._health_path} answers {answer.status}")
        return Probe(health=EngineHealth.READY)
