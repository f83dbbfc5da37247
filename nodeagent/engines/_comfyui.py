"""ComfyUI: a queue of graphs, and a cache of models that it gives back when asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import TypeVar

import msgspec
from msgspec import Struct

from nodeagent.engines._base import (
    CommandLine,
    EngineHealth,
    Generation,
    LoadProgress,
    Probe,
)
from nodeagent.engines._comfyui_generate import ComfyUiPace, NodeClasses, PromptRun
from nodeagent.engines._comfyui_http import ComfyUiHttp
from nodeagent.engines._comfyui_stop import stop_prompt
from nodeagent.engines._loading import milestone, recognise
from nodeagent.engines._openai_relay import Answer, ask, guarded
from nodeagent.engines._service import NoOpenAiRoutes
from nodeagent.engines._tell import tell
from rung.codec import GenerationEvent
from rung.errors import EngineFailedError, EngineProtocolError, InvalidRequestError
from rung.service import EngineClient
from rung.types import ComfyUiEngine, DeploymentSpec, WorkflowInput

_T = TypeVar("_T")
_GIB = 1024**3
_FREE_TIMEOUT_S = 10.0
_FREE = msgspec.json.encode({"unload_models": True, "free_memory": True})

_MILESTONES = (
    milestone(r"Total VRAM (?P<size>[\d.]+ MB)", "found a GPU with {size}"),
    milestone(r"Import times for custom nodes", "custom nodes imported"),
    milestone(r"To see the GUI go to:? \S+", "ready"),
)


class ComfyUiDevice(Struct, frozen=True, kw_only=True):
    """A device as `/system_stats` has it, in bytes.

    ComfyUI counts what PyTorch keeps cached as free; no other process can have that.
    """

    name: str = ""
    type: str = ""
    index: int | None = None
    vram_total_bytes: int = msgspec.field(name="vram_total", default=0)
    vram_free_bytes: int = msgspec.field(name="vram_free", default=0)
    torch_total_bytes: int = msgspec.field(name="torch_vram_total", default=0)
    torch_free_bytes: int = msgspec.field(name="torch_vram_free", default=0)

    @property
    def free_for_others_bytes(self) -> int:
        """What other processes can take."""
        return max(self.vram_free_bytes - self.torch_free_bytes, 0)


class ComfyUiQueue(Struct, frozen=True, kw_only=True):
    """How many prompts run, and how many wait."""

    running: int
    pending: int

    @property
    def busy(self) -> bool:
        """Whether there is anything to wait for."""
        return self.running + self.pending > 0


class _SystemStats(Struct):
    devices: list[ComfyUiDevice]


class _Queue(Struct):
    # Whole graphs, which are not looked at.
    queue_running: list[msgspec.Raw]
    queue_pending: list[msgspec.Raw]


class ComfyUiAdapter(NoOpenAiRoutes):
    """Starts ComfyUI, tells how it is, carries graphs to it, and has it give back its memory.

    Arguments are those of `main.py`: that the executable is a Python with this script is for the agent's
    allow-list, or the image's entry point, to say.

    Args:
        client: connections to engines.
        pace: how often a generation is looked at.
    """

    engine_name = "ComfyUI"

    def __init__(self, client: EngineClient, *, pace: ComfyUiPace | None = None) -> None:
        self._client = client
        self._pace = pace or ComfyUiPace()
        #: What was learnt of the ComfyUI that listens at a URL.
        self._classes = ("", NodeClasses())
        self._stopping: set[asyncio.Task[None]] = set()

    def command_line(self, spec: DeploymentSpec, *, listen_host: str, listen_port: int) -> CommandLine:
        """See `EngineAdapter.command_line`.

        Raises:
            InvalidRequestError: the spec is not for ComfyUI.
        """
        engine = spec.engine.engine
        if not isinstance(engine, ComfyUiEngine):
            raise InvalidRequestError(f"{spec.id} is not a ComfyUI deployment", deployment=spec.id)
        # Its cheapest previews cost a multiplication a step, and only this makes older versions send any.
        arguments = ["--listen", listen_host, "--port", str(listen_port), "--preview-method", "auto"]
        if engine.reserve_vram_bytes:
            # What it calls GB is GiB.
            arguments += ["--reserve-vram", f"{engine.reserve_vram_bytes / _GIB:.3f}"]
        # Without it its output, which tells how far loading is, would come when it is too late.
        return CommandLine(arguments=tuple(arguments), environment={"PYTHONUNBUFFERED": "1"})

    async def probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        """See `EngineAdapter.probe`. Its port opens only when it is ready."""
        return await guarded(self._probe(base_url, spec))

    def load_progress(self, line: str) -> LoadProgress | None:
        """See `EngineAdapter.load_progress`. Importing nodes has no percentage."""
        return recognise(_MILESTONES, line.strip())

    async def generate(
        self, base_url: str, spec: DeploymentSpec, generation: Generation
    ) -> AsyncGenerator[GenerationEvent, None]:
        """See `GenerateControl.generate`: a graph, in ComfyUI's API format.

        A graph waits in ComfyUI's queue for as long as ComfyUI answers; the idle timeout is for one that
        runs, and of which nothing is told.
        """
        wanted = generation.input
        if not isinstance(wanted, WorkflowInput):
            raise InvalidRequestError(
                f"{spec.id}: ComfyUI carries out workflows, and this is none", deployment=spec.id
            )
        async with ComfyUiHttp(base_url, spec.id) as http:
            run = PromptRun(
                http,
                self._classes_at(base_url),
                wanted,
                idle_timeout_s=generation.idle_timeout_s,
                pace=self._pace,
            )
            try:
                await run.prepare()
                async with aclosing(run.events()) as events:
                    async for event in events:
                        yield event
            finally:
                if run.open:
                    await self._stop(base_url, spec, run)

    def _classes_at(self, base_url: str) -> NodeClasses:
        if self._classes[0] != base_url:
            self._classes = (base_url, NodeClasses())
        return self._classes[1]

    async def _stop(self, base_url: str, spec: DeploymentSpec, run: PromptRun) -> None:
        """Have ComfyUI give up a prompt; it is seen to also if who waits for this is gone."""
        stopping = asyncio.create_task(
            stop_prompt(
                base_url,
                spec.id,
                prompt_id=run.prompt_id,
                client_id=run.client_id,
                patience_s=self._pace.stop_patience_s,
                pause_s=self._pace.stop_pause_s,
            )
        )
        self._stopping.add(stopping)
        stopping.add_done_callback(self._stopping.discard)
        await asyncio.shield(stopping)

    async def free(self, base_url: str, spec: DeploymentSpec) -> None:
        """Ask for the memory of its models. It takes note at once and acts when no prompt runs.

        Drain it first: while a prompt runs this changes nothing for the one who waits for memory, and
        afterwards it takes the models from whoever comes next.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
            EngineFailedError: it refused.
        """
        answer = await tell(self._client, base_url, "/free", _FREE, what=spec.id, timeout_s=_FREE_TIMEOUT_S)
        if answer.status != 200:
            raise EngineFailedError(
                f"{spec.id}: /free answers {answer.status}", engine_status=str(answer.status)
            )

    @property
    def frees_model(self) -> bool:
        """See `FreeControl.frees_model`: it loads again what a prompt needs, and is awake all the while."""
        return False

    async def requests(self, base_url: str, spec: DeploymentSpec) -> int | None:
        """See `FreeControl.requests`: the prompts that run and those that wait."""
        found = await self.queue(base_url, spec)
        return found.running + found.pending

    async def queue(self, base_url: str, spec: DeploymentSpec) -> ComfyUiQueue:
        """What it has to do.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        answer = await ask(self._client, base_url, "/queue", what=spec.id)
        found = _decoded(answer, _Queue, f"{spec.id}: /queue")
        return ComfyUiQueue(running=len(found.queue_running), pending=len(found.queue_pending))

    async def devices(self, base_url: str, spec: DeploymentSpec) -> tuple[ComfyUiDevice, ...]:
        """Its devices and their memory, as it sees them.

        Raises:
            EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
        """
        answer = await ask(self._client, base_url, "/system_stats", what=spec.id)
        return tuple(_decoded(answer, _SystemStats, f"{spec.id}: /system_stats").devices)

    async def _probe(self, base_url: str, spec: DeploymentSpec) -> Probe:
        answer = await ask(self._client, base_url, "/system_stats", what=spec.id)
        if answer.status != 200:
            return Probe(health=EngineHealth.UNWELL, detail=f"/system_stats answers {answer.status}")
        _decoded(answer, _SystemStats, "/system_stats")
        return Probe(health=EngineHealth.READY)


def _decoded(answer: Answer, kind: type[_T], what: str) -> _T:
    if answer.status != 200:
        raise EngineProtocolError(f"{what} answers {answer.status}")
    try:
        return msgspec.json.decode(answer.body, type=kind)
    except msgspec.DecodeError as error:
        raise EngineProtocolError(f"{what} answers with what is not ComfyUI's: {error}") from error
