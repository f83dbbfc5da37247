"""vLLM: started from its spec, and put to sleep and woken through its development routes."""

from __future__ import annotations

import re
from contextlib import AbstractAsyncContextManager

import msgspec
from msgspec import Struct
from prometheus_client.parser import text_string_to_metric_families

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    EngineStream,
    LoadProgress,
    Probe,
    RunKind,
)
from nodeagent.engines._loading import VLLM, recognise
from nodeagent.engines._mounts import seen_by_engine
from nodeagent.engines._openai_relay import ask, guarded, parse_models, relay
from nodeagent.engines._tell import tell
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, DockerRuntime, VllmEngine

#: Level 1 keeps the weights in host memory, level 2 drops them and reads them again.
_SLEEP_LEVELS = (1, 2)
#: Copying weights to host memory or back takes seconds, a busy machine or a cold disk much longer. Giving
#: up does not end it in the engine, so that patience is the lesser evil.
_COPY_TIMEOUT_S = 120.0
_RELOAD_TIMEOUT_S = 600.0
#: Requests that run, and those that wait for a place.
_REQUESTS = frozenset({"vllm:num_requests_running", "vllm:num_requests_waiting"})
_SHOWN_CHARACTERS = 300
_KV_CACHE = re.compile(r"Available KV cache memory: ([\d.]+) GiB")
_GIB = 1 << 30


class _Sleeping(Struct):
    is_sleeping: bool


class VllmAdapter:
    """Speaks to vLLM. Command lines hold the options of `vllm serve`.

    Its development routes (sleep, wake, remote calls) ask for no API key: an engine that has them must be
    reachable by the agent alone, which is why it listens on loopback.
    """

    def __init__(self, client: EngineClient) -> None:
        self._client = client

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """`serve MODEL` and options; in a container the options only follow MODEL: its image serves already.

        Raises:
            InvalidRequestError: the spec is not for vLLM, or has no model.
        """
        engine = _engine(spec)
        if not engine.model:
            raise InvalidRequestError(f"{spec.id}: vLLM needs a model", deployment=spec.id)
        runtime = spec.engine.runtime
        arguments = [] if isinstance(runtime, DockerRuntime) else ["serve"]
        # A name of a hub, or a folder of the node.
        model = engine.model
        arguments.append(seen_by_engine(model, runtime) if model.startswith("/") else model)
        arguments += ["--host", listen_host, "--port", str(listen_port)]
        arguments += ["--served-model-name", spec.engine_model_name]
        if engine.gpu_memory_utilization:
            arguments += ["--gpu-memory-utilization", f"{engine.gpu_memory_utilization:g}"]
        if engine.kv_cache_memory_bytes:
            arguments += ["--kv-cache-memory-bytes", str(engine.kv_cache_memory_bytes)]
        if engine.max_model_len_tokens:
            arguments += ["--max-model-len", str(engine.max_model_len_tokens)]
        if engine.max_num_seqs:
            arguments += ["--max-num-seqs", str(engine.max_num_seqs)]
        if engine.kv_cache_dtype:
            arguments += ["--kv-cache-dtype", engine.kv_cache_dtype]
        if engine.tool_call_parser:
            arguments += ["--enable-auto-tool-choice", "--tool-call-parser", engine.tool_call_parser]
        if engine.reasoning_parser:
            arguments += ["--reasoning-parser", engine.reasoning_parser]
        # Unasked, it reports its use over the internet.
        environment = {"VLLM_NO_USAGE_STATS": "1"}
        if engine.sleep_mode:
            arguments.append("--enable-sleep-mode")
            environment["VLLM_SERVER_DEV_MODE"] = "1"
        return CommandLine(arguments=tuple(arguments), environment=environment)

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. A percentage is that of the step which `detail` names."""
        return recognise(VLLM, line.strip())

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """See `EngineAdapter.run`."""
        return relay(self._client, base_url, kind, body, what=spec.id, idle_timeout_s=idle_timeout_s)

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """See `SleepControl.sleep_levels`."""
        return _SLEEP_LEVELS if _engine(spec).sleep_mode else ()

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """See `SleepControl.requests`; read off its metrics."""
        answer = await ask(self._client, base_url, "/metrics", what=spec.id)
        if answer.status != 200:
            return None
        try:
            families = list(text_string_to_metric_families(answer.body.decode()))
        except ValueError as error:
            raise EngineProtocolError(f"{spec.id} tells metrics that are none: {error}") from error
        values = [
            sample.value for family in families for sample in family.samples if sample.name in _REQUESTS
        ]
        return int(sum(values)) if values else None

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """See `SleepControl.sleep`."""
        await self._post(base_url, f"/sleep?level={level}", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._require(base_url, spec, asleep=True)

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """See `SleepControl.wake`.

        From level 2 its memory comes back empty: woken at once, it would answer, and answer garbage. So the
        weights are read again before there is a KV cache to answer with. What is awake already ignores
        being woken.
        """
        if level == 1:
            await self._post(base_url, "/wake_up", spec, timeout_s=_COPY_TIMEOUT_S)
        else:
            await self._post(base_url, "/wake_up?tags=weights", spec, timeout_s=_COPY_TIMEOUT_S)
            reload = msgspec.json.encode({"method": "reload_weights"})
            await self._post(base_url, "/collective_rpc", spec, reload, timeout_s=_RELOAD_TIMEOUT_S)
            await self._post(base_url, "/wake_up?tags=kv_cache", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._require(base_url, spec, asleep=False)

    def kv_cache_bytes(self, line: str) -> int | None:
        """See `ShrinkControl.kv_cache_bytes`."""
        found = _KV_CACHE.search(line)
        return None if found is None else int(float(found[1]) * _GIB)

    async def shrink(self, base_url: str, spec: DeploymentSpec) -> None:
        """See `ShrinkControl.shrink`: it sleeps, and its weights alone are woken.

        There is no call that gives up the KV cache and keeps the weights.
        """
        await self._post(base_url, "/sleep?level=1", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._post(base_url, "/wake_up?tags=weights", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._require(base_url, spec, asleep=True)

    async def grow(self, base_url: str, spec: DeploymentSpec) -> None:
        """See `ShrinkControl.grow`.

        The weights first, by their name: a call to wake what is awake already is ignored, and one to wake
        everything would map the weights a second time.
        """
        await self._post(base_url, "/wake_up?tags=weights", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._post(base_url, "/wake_up?tags=kv_cache", spec, timeout_s=_COPY_TIMEOUT_S)
        await self._require(base_url, spec, asleep=False)

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        answer = await ask(self._client, base_url, "/health", what=spec.id)
        if answer.status != 200:
            # 503 is what a server says that listens before it can answer.
            health = EngineHealth.LOADING if answer.status == 503 else EngineHealth.UNWELL
            return Probe(health=health, detail=f"/health answers {answer.status}")
        # Its health says nothing of its sleep, in which a request hangs.
        if await self._sleeps(base_url, spec):
            return Probe(health=EngineHealth.ASLEEP, detail="it sleeps")
        answer = await ask(self._client, base_url, "/v1/models", what=spec.id)
        if answer.status in {401, 403}:
            return Probe(health=EngineHealth.UNWELL, detail=f"/v1/models answers {answer.status}: API key")
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

    async def _sleeps(self, base_url: str, spec: DeploymentSpec) -> bool:
        answer = await ask(self._client, base_url, "/is_sleeping", what=spec.id)
        if answer.status != 200:
            # Without its development routes it cannot sleep.
            return False
        try:
            return msgspec.json.decode(answer.body, type=_Sleeping).is_sleeping
        except msgspec.DecodeError as error:
            raise EngineProtocolError(f"{spec.id} does not tell whether it sleeps: {error}") from error

    async def _require(self, base_url: str, spec: DeploymentSpec, *, asleep: bool) -> None:
        if await self._sleeps(base_url, spec) is not asleep:
            state = "awake" if asleep else "asleep"
            raise EngineFailedError(f"{spec.id} took the call, and says that it is still {state}")

    async def _post(
        self, base_url: str, path: str, spec: DeploymentSpec, body: bytes = b"", *, timeout_s: float
    ) -> None:
        answer = await tell(self._client, base_url, path, body, what=spec.id, timeout_s=timeout_s)
        if answer.status != 200:
            said = answer.body.decode(errors="replace").strip()[:_SHOWN_CHARACTERS]
            raise EngineFailedError(
                f"{spec.id} answers {path} with {answer.status}{': ' if said else ''}{said}",
                engine_status=str(answer.status),
            )


def _engine(spec: DeploymentSpec) -> VllmEngine:
    engine = spec.engine.engine
    if not isinstance(engine, VllmEngine):
        raise InvalidRequestError(f"{spec.id} is not a vLLM deployment", deployment=spec.id)
    return engine
