"""Workers: small servers around a model that has no server of its own, in a contract of this project.

A worker has one model. All bodies are JSON but where it is said; what went wrong is `{"error": "..."}`.

| route | answer |
| --- | --- |
| `GET /health` | `{"status": "ready" | "loading" | "unloaded", "model": name, "active": requests in hand}` |
| `POST /load` | 200 once the model is loaded, also when it was before; 507: there is no room for it |
| `POST /unload` | 200 once its memory on the GPU is given back, also when it was before |
| `GET /memory` | `{"allocated_bytes", "reserved_bytes"}`, as its framework counts them |
| its work | see its adapter; 400 the request is at fault, 409 it is not loaded, 500 it failed |

503 with `Retry-After` (seconds) means that it is busy with something else, on every route that changes
something. It starts unloaded, listens at once, and takes `--host`, `--port` and `--model`. What it began it
finishes, whether or not its caller still listens.
"""

from __future__ import annotations

import asyncio
from typing import TypeVar

import msgspec
from msgspec import Struct

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    LoadProgress,
    Probe,
)
from nodeagent.engines._openai_relay import Answer, ask, guarded
from nodeagent.engines._service import NoOpenAiRoutes, require_dialect
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient, EngineReply, parse_retry_after
from rung.types import DeploymentSpec

_T = TypeVar("_T")

#: The level of sleep at which weights are dropped.
_UNLOADED = 2
_UNLOAD_TIMEOUT_S = 60.0
_BUSY = 503
#: One that is busy is asked again after this long if it does not say; within these bounds if it does.
_BUSY_PAUSE_S = 0.5
_SHORTEST_PAUSE_S = 0.1
_LONGEST_PAUSE_S = 5.0
_HEALTHS = {
    "ready": EngineHealth.READY,
    "loading": EngineHealth.LOADING,
    "unloaded": EngineHealth.ASLEEP,
}


class WorkerMemory(Struct, frozen=True, kw_only=True):
    """What a worker's framework holds on the GPU: in tensors, and with what it keeps for later ones."""

    allocated_bytes: int
    reserved_bytes: int


class _Health(Struct):
    status: str
    model: str = ""
    active: int = 0


class _Refusal(Struct):
    error: str = ""


class WorkerAdapter(NoOpenAiRoutes):
    """What the adapters of all workers share: how they start, how they are, and that they can be unloaded.

    A worker that is not loaded sleeps at level 2: it runs, and holds no weights.

    Args:
        client: connections to engines.
        dialect: the kind of worker, as the configuration has it.
    """

    def __init__(self, client: EngineClient, *, dialect: str) -> None:
        self._client = client
        self.engine_name = dialect

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """See `EngineAdapter.command_line`.

        Raises:
            InvalidRequestError: the spec is not for this kind of worker.
        """
        require_dialect(spec, self.engine_name)
        arguments = ("--host", listen_host, "--port", str(listen_port), "--model", spec.engine_model_name)
        return CommandLine(arguments=arguments, environment={"PYTHONUNBUFFERED": "1"})

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. It sleeps while its model is not loaded."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """Nothing: a worker tells by its health that it loads, and by no line."""
        return None

    @property
    def frees_model(self) -> bool:
        """See `FreeControl.frees_model`: it does."""
        return True

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """See `SleepControl.sleep_levels`: 2, since nothing is kept in host memory."""
        return (_UNLOADED,)

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """See `SleepControl.requests`."""
        return (await self._health(base_url, spec)).active

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Unload its model. See `FreeControl.free`."""
        await self._change(base_url, spec, "/unload", EngineHealth.ASLEEP, _UNLOAD_TIMEOUT_S)

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Unload its model, which is all the sleep that there is; as `free`."""
        await self.free(base_url, spec)

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Load its model; `level` has no meaning here. See `SleepControl.wake`."""
        await self._change(base_url, spec, "/load", EngineHealth.READY, spec.engine.start_timeout_s)

    async def memory(self, base_url: str, spec: DeploymentSpec) -> WorkerMemory:
        """What it holds on the GPU, as its framework counts it.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        answer = await ask(self._client, base_url, "/memory", what=spec.id)
        return _decoded(answer, WorkerMemory, f"{spec.id}: /memory")

    async def work(
        self, base_url: str, spec: DeploymentSpec, path: str, body: object, *, timeout_s: float
    ) -> Answer:
        """Have it do its work once.

        Args:
            base_url: where it listens.
            spec: the deployment.
            path: of the work.
            body: encoded as JSON.
            timeout_s: longest time until it has answered, and between two pieces of its answer.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            InvalidRequestError: the request is at fault; the message is the worker's.
            EngineFailedError: it is not loaded, it failed, or it is busy, which `busy_pause_s` tells.
        """
        async with await self._begin(base_url, spec, path, msgspec.json.encode(body), timeout_s) as reply:
            return Answer(reply.status, await reply.read())

    async def begin_when_idle(
        self, base_url: str, spec: DeploymentSpec, path: str, body: bytes, *, timeout_s: float
    ) -> EngineReply:
        """Have it do its work once; one that is busy is asked again for as long as there is.

        Returns its answer as it comes, for the caller to close. Takes and raises what `work` does, but that
        `body` is JSON already.
        """
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + timeout_s
        while True:
            try:
                return await self._begin(base_url, spec, path, body, timeout_s)
            except EngineFailedError as error:
                pause_s = busy_pause_s(error)
                if pause_s is None or loop.time() + pause_s >= deadline_s:
                    raise
                await asyncio.sleep(pause_s)

    async def _begin(
        self, base_url: str, spec: DeploymentSpec, path: str, body: bytes, timeout_s: float
    ) -> EngineReply:
        """An answer that is one. Raises as `work`."""
        url = base_url.rstrip("/") + path
        reply = await self._client.post(url, body, what=spec.id, idle_timeout_s=timeout_s)
        if reply.status == 200:
            return reply
        async with reply:
            answer = Answer(reply.status, await reply.read())
        what = f"{spec.id}: {path} answers {answer.status}{_why(answer)}"
        if answer.status in {400, 422}:
            raise InvalidRequestError(what, deployment=spec.id)
        if answer.status == _BUSY:
            raise EngineFailedError(what, engine_status=str(answer.status), retry_after=reply.retry_after)
        raise EngineFailedError(what, engine_status=str(answer.status))

    async def _change(
        self, base_url: str, spec: DeploymentSpec, path: str, wanted: EngineHealth, timeout_s: float
    ) -> None:
        """Load or unload, and make sure that it did.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, is busy all the time, or is not as it should be by now.
        """
        try:
            async with await self.begin_when_idle(base_url, spec, path, b"{}", timeout_s=timeout_s) as reply:
                await reply.read()
        except InvalidRequestError as error:
            raise EngineFailedError(error.message) from error
        found = await self._health(base_url, spec)
        if _HEALTHS.get(found.status) is not wanted:
            raise EngineFailedError(f"{spec.id}: {path} says that it is done, and /health {found.status!r}")

    async def _health(self, base_url: str, spec: DeploymentSpec) -> _Health:
        answer = await ask(self._client, base_url, "/health", what=spec.id)
        return _decoded(answer, _Health, f"{spec.id}: /health")

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        found = await self._health(base_url, spec)
        models = (found.model,) if found.model else ()
        health = _HEALTHS.get(found.status)
        if health is None:
            return Probe(health=EngineHealth.UNWELL, detail=f"its status is {found.status!r}", models=models)
        if models and found.model != spec.engine_model_name:
            detail = f"it has the model {found.model}, not {spec.engine_model_name}"
            return Probe(health=EngineHealth.UNWELL, detail=detail, models=models)
        details = {EngineHealth.ASLEEP: "its model is not loaded", EngineHealth.LOADING: "loading its model"}
        return Probe(health=health, detail=details.get(health, ""), models=models)


def busy_pause_s(error: EngineFailedError) -> float | None:
    """After how long a worker that is busy is to be asked again; None if the error is another one."""
    if error.metadata.get("engine_status") != str(_BUSY):
        return None
    # Bounded, so that what an HTTP date counts from does not matter.
    asked_s = parse_retry_after(error.metadata.get("retry_after", ""), 0.0)
    return _BUSY_PAUSE_S if asked_s is None else min(max(asked_s, _SHORTEST_PAUSE_S), _LONGEST_PAUSE_S)


def _decoded(answer: Answer, kind: type[_T], what: str) -> _T:
    if answer.status != 200:
        raise EngineProtocolError(f"{what} answers {answer.status}")
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.DecodeError as error:
        raise EngineProtocolError(f"{what} answers with what is not a worker's: {error}") from error


def _why(answer: Answer) -> str:
    try:
        why = msgspec.json.decode(answer.body, type=_Refusal).error
    except msgspec.DecodeError:
        why = ""
    return f": {why}" if why else ""
