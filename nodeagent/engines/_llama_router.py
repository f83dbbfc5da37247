"""llama.cpp's `llama-server` in router mode: many models behind one port, each a process of its own."""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager
from urllib.parse import quote

import msgspec
from msgspec import Struct

from nodeagent.engines._base import CommandLine, EngineHealth, EngineStream, LoadProgress, Probe, RunKind
from nodeagent.engines._llamacpp import context_tokens_of, decode_error
from nodeagent.engines._openai_relay import Answer, ask, guarded, relay
from nodeagent.engines._tell import tell
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec

#: The level of sleep at which weights are dropped.
_UNLOADED = 2
#: The router gives a model's process 10 s to end, and then kills it.
_UNLOAD_TIMEOUT_S = 15.0
_POLL_S = 0.1
_CALL_TIMEOUT_S = 10.0
#: A request to a model that is not loaded would load it, wherever it finds room.
_NO_AUTOLOAD = "autoload=false"


class _Status(Struct):
    value: str = ""
    failed: bool = False
    exit_code: int | None = None


class _Row(Struct):
    id: str
    status: _Status | None = None


class _Models(Struct):
    data: list[_Row]


class _Slot(Struct):
    is_processing: bool = False


class LlamaRouterAdapter:
    """Speaks to a llama-server in router mode about one of its models.

    A deployment whose model is not loaded sleeps: the router runs, and nothing holds any of its weights.
    That is level 2. One whose process ended with an error is no different, for it holds nothing and can be
    loaded again; what the router says of it is told. No request of ours has the router load a model by
    itself. A load may have it unload another model, if it was told to keep only so many.

    Args:
        client: connections to engines.
        unload_timeout_s: how long `free` waits for the model's process to be gone.
    """

    def __init__(self, client: EngineClient, *, unload_timeout_s: float = _UNLOAD_TIMEOUT_S) -> None:
        self._client = client
        self._unload_timeout_s = unload_timeout_s

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """Refuse: a router is not ours to start.

        Raises:
            InvalidRequestError: always.
        """
        raise InvalidRequestError(
            f"{spec.id}: a router is run by somebody else; its runtime must be external", deployment=spec.id
        )

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. It sleeps while its model is not loaded."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. Its output is with whoever runs it."""
        return None

    def run(
        self, base_url: str, spec: DeploymentSpec, kind: RunKind, body: bytes, *, idle_timeout_s: float
    ) -> AbstractAsyncContextManager[EngineStream]:
        """See `EngineAdapter.run`. A model that is not loaded refuses with 400, and stays as it is."""
        return relay(
            self._client,
            base_url,
            kind,
            body,
            what=spec.id,
            idle_timeout_s=idle_timeout_s,
            query=_NO_AUTOLOAD,
        )

    @property
    def frees_model(self) -> bool:
        """See `FreeControl.frees_model`: it does."""
        return True

    def sleep_levels(self, spec: DeploymentSpec) -> tuple[int, ...]:
        """See `SleepControl.sleep_levels`: 2, since nothing is kept in host memory."""
        return (_UNLOADED,)

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """See `SleepControl.requests`: slots at work; None where the router was started without them."""
        answer = await ask(self._client, base_url, _of_model("/slots", spec), what=spec.id)
        try:
            slots = msgspec.json.decode(answer.body, type=list[_Slot]) if answer.status == 200 else None
        except msgspec.DecodeError:
            slots = None
        return None if slots is None else sum(slot.is_processing for slot in slots)

    async def sleep(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Unload its model, which is all the sleep that there is; as `free`."""
        await self.free(base_url, spec)

    async def wake(self, base_url: str, spec: DeploymentSpec, level: int) -> None:
        """Load the deployment's model, and return once the router says so; `level` has no meaning here.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, the model's process ended, or it is not loaded in time.
        """
        if (await self._status(base_url, spec)).value == "sleeping":
            # Its process is there, which the router takes for loaded.
            await self.free(base_url, spec)
        if (await self._status(base_url, spec)).value not in ("loading", "loaded"):
            await self._tell(base_url, spec, "load")
        name, timeout_s = spec.engine_model_name, spec.engine.start_timeout_s
        deadline = asyncio.get_running_loop().time() + timeout_s
        while (status := await self._status(base_url, spec)).value != "loaded":
            if status.value != "loading":
                raise EngineFailedError(f"{spec.id}: {_fault(status) or f'{name} is {status.value}'}")
            if asyncio.get_running_loop().time() >= deadline:
                raise EngineFailedError(f"{spec.id}: the router has not loaded {name} in {timeout_s:g} s")
            await asyncio.sleep(_POLL_S)

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Unload the deployment's model, and return once the router says that its process is gone.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused, or the model is still there when the time is over.
        """
        if not _runs(await self._status(base_url, spec)):
            return
        await self._tell(base_url, spec, "unload")
        deadline = asyncio.get_running_loop().time() + self._unload_timeout_s
        while _runs(status := await self._status(base_url, spec)):
            if asyncio.get_running_loop().time() >= deadline:
                raise EngineFailedError(
                    f"{spec.id}: the router said that it unloads {spec.engine_model_name}, and it is "
                    f"{status.value} {self._unload_timeout_s:g} s later"
                )
            await asyncio.sleep(_POLL_S)

    async def _tell(self, base_url: str, spec: DeploymentSpec, what: str) -> None:
        path, body = f"/models/{what}", msgspec.json.encode({"model": spec.engine_model_name})
        answer = await tell(self._client, base_url, path, body, what=spec.id, timeout_s=_CALL_TIMEOUT_S)
        if answer.status != 200:
            why = decode_error(answer.body).message
            raise EngineFailedError(
                f"{spec.id}: {path} answers {answer.status}{': ' if why else ''}{why}",
                engine_status=str(answer.status),
            )

    async def _status(self, base_url: str, spec: DeploymentSpec) -> _Status:
        answer = await ask(self._client, base_url, "/models", what=spec.id)
        rows = _rows(answer)
        found = next((row.status for row in rows or () if row.id == spec.engine_model_name), None)
        if found is None:
            raise EngineProtocolError(
                f"{spec.id}: /models answers {answer.status} without a status of {spec.engine_model_name}"
            )
        return found

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        health = await ask(self._client, base_url, "/health", what=spec.id)
        if health.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"/health answers {health.status}")
        answer = await ask(self._client, base_url, "/models", what=spec.id)
        rows = _rows(answer)
        if rows is None:
            detail = f"/models answers {answer.status} with no list of models"
            return Probe(health=EngineHealth.UNWELL, detail=detail)
        wanted, names = spec.engine_model_name, tuple(row.id for row in rows)
        row = next((row for row in rows if row.id == wanted), None)
        if row is None:
            detail = f"the router has no model {wanted}; it has {', '.join(names) or 'none'}"
            return Probe(health=EngineHealth.NO_MODEL, detail=detail, models=names)
        match row.status:
            case None:
                detail = "it is no router: /models does not say which models are loaded"
                return Probe(health=EngineHealth.UNWELL, detail=detail, models=names)
            case _Status(value="loaded"):
                props = await ask(self._client, base_url, _of_model("/props", spec), what=spec.id)
                return Probe(
                    health=EngineHealth.READY, models=names, context_tokens=context_tokens_of(props.body)
                )
            case _Status(value="loading" | "downloading" as value):
                return Probe(health=EngineHealth.LOADING, detail=f"the router is {value} it", models=names)
            case status:
                detail = _fault(status) or f"its model is {status.value}"
                return Probe(health=EngineHealth.ASLEEP, detail=detail, models=names)


def _rows(answer: Answer) -> list[_Row] | None:
    try:
        return msgspec.json.decode(answer.body, type=_Models).data if answer.status == 200 else None
    except msgspec.DecodeError:
        return None


def _of_model(path: str, spec: DeploymentSpec) -> str:
    return f"{path}?model={quote(spec.engine_model_name, safe='')}&{_NO_AUTOLOAD}"


def _runs(status: _Status) -> bool:
    """Whether the model has a process, which holds memory: also one that sleeps by itself."""
    return status.value in ("loading", "loaded", "sleeping")


def _fault(status: _Status) -> str:
    """What went wrong with a model that is not loaded; empty if nothing did."""
    if not status.failed:
        return ""
    code = "" if status.exit_code is None else f" with exit code {status.exit_code}"
    return f"the process of its model ended{code}"
