"""The one worker of a simulated ComfyUI: its queue, what it executes, and what it remembers of that."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from nodeagent.simulators._comfyui_graph import Graph, execution_order, loaded_by, sampled_steps, signature
from nodeagent.simulators._comfyui_models import ModelCache
from nodeagent.simulators._comfyui_nodes import Link, NodeKind
from nodeagent.simulators._comfyui_pictures import Picture, is_picture, picture_of, png
from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._http import Counters
from nodeagent.simulators._memory import SimulatedOutOfMemory
from nodeagent.simulators._process import LoadFailedError, say
from nodeagent.simulators._settings import Settings, load_time_s

_HISTORY_ITEMS = 10_000
_GIB = 1024**3
#: Life's speed of a step on a picture of a megapixel, and of other nodes.
_STEP_S = 0.12
_NODE_S = 0.1
#: Sampling a megapixel takes so much beside the weights.
_WORK_BYTES_PER_MEGAPIXEL = _GIB
_PREVIEW = Picture(width_pixels=64, height_pixels=64, colour=0x808080)
#: What a model takes of which nothing is known.
_OTHER_MODEL_BYTES = 4 * _GIB
_MOVING = {"SaveAnimatedWEBP": ".webp", "SaveWEBM": ".webm"}
#: So long after a prompt PyTorch gives back what it keeps, if nothing comes.
_EMPTY_CACHE_S = 10.0


class Item(Struct, frozen=True):
    """A prompt in the queue; `outputs` are the nodes to execute, with what they need."""

    number: float
    prompt_id: str
    graph: Graph
    extra_data: dict[str, Any]
    outputs: tuple[str, ...]

    @property
    def client_id(self) -> str | None:
        """Who is told of it."""
        found = self.extra_data.get("client_id")
        return found if isinstance(found, str) else None

    def row(self) -> list[Any]:
        """As `/queue` and `/history` have it."""
        return [self.number, self.prompt_id, self.graph, self.extra_data, list(self.outputs)]


class Send(Protocol):
    """Tells clients of something: one, or all."""

    def __call__(self, event: str, data: Mapping[str, Any], client_id: str | None) -> Awaitable[None]:
        """Send it; to a client that is not connected it goes nowhere."""
        ...


class SendPreview(Protocol):
    """Tells a client of a picture of what is there."""

    def __call__(
        self, picture: bytes, place: Mapping[str, Any], client_id: str | None, *, first: bool
    ) -> Awaitable[None]:
        """Send it, `first` to those that want to know whose it is: they get it before the step's progress."""
        ...


class _InterruptedError(Exception):
    """The prompt is not to go on."""


class _NodeError(Exception):
    """A node failed; `kind` is the type of what it raised."""

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(message)
        self.kind = kind


class Execution:
    """Executes one prompt at a time, the lowest number first.

    Args:
        models: the memory.
        checkpoints: their sizes in bytes, by name.
        settings: speed and faults.
        faults: those that are on.
        counters: what it did.
        send: tells clients.
        send_preview: tells clients of previews.
        kinds: the classes of nodes.
        files: what was uploaded, and what is written, by folder and by name in it.
        previews: send them, unless a prompt says otherwise.
    """

    def __init__(
        self,
        *,
        models: ModelCache,
        checkpoints: Mapping[str, int],
        settings: Settings,
        faults: Faults,
        counters: Counters,
        send: Send,
        send_preview: SendPreview,
        kinds: Mapping[str, NodeKind],
        files: Mapping[str, dict[str, bytes]],
        previews: bool,
    ) -> None:
        self._send_preview = send_preview
        self._kinds = kinds
        self._files = files
        self._previews = previews
        self._models = models
        self._checkpoints = checkpoints
        self._settings = settings
        self._faults = faults
        self._counters = counters
        self._send = send
        self._wake = asyncio.Event()
        self._unload_models = False
        self._free_memory = False
        self._interrupted = False
        #: Results of the last prompt's nodes by signature, with what its outputs showed.
        self._results: dict[str, dict[str, Any] | None] = {}
        self._saved = 0
        self.running: Item | None = None
        #: The node that is being executed.
        self.node: str | None = None
        self.pending: list[Item] = []
        self.history: dict[str, dict[str, Any]] = {}

    @property
    def remaining(self) -> int:
        """How many prompts run and wait."""
        return len(self.pending) + (self.running is not None)

    async def submit(self, item: Item) -> None:
        """Put a prompt in the queue."""
        self.pending.append(item)
        self.pending.sort(key=lambda each: each.number)
        self._counters.requests += 1
        self._wake.set()
        await self._tell_status()

    async def drop(self, wanted: set[str] | None) -> None:
        """Take prompts that wait out of the queue, all if none are named. Nothing remains of them."""
        kept = [] if wanted is None else [item for item in self.pending if item.prompt_id not in wanted]
        if wanted is None or len(kept) < len(self.pending):
            self.pending = kept
            await self._tell_status()

    def interrupt(self, prompt_id: str | None) -> None:
        """Have the running prompt stop at its next step; only that one, if it is named."""
        if prompt_id is None or (self.running is not None and self.running.prompt_id == prompt_id):
            self._interrupted = True

    def free(self, *, unload_models: bool, free_memory: bool) -> None:
        """Take note that memory is to be given back: at once if nothing runs, else after it."""
        if Fault.FREE_IGNORED in self._faults:
            return
        self._unload_models |= unload_models or free_memory
        self._free_memory |= free_memory
        self._wake.set()

    async def run_for_ever(self) -> None:
        """Work.

        Raises:
            LoadFailedError: it died of too little memory, as it was told to.
        """
        while True:
            self._give_back()
            self._wake.clear()
            if self.pending:
                await self._execute(self.pending.pop(0))
            else:
                await self._wait()

    async def _wait(self) -> None:
        idle_s = _EMPTY_CACHE_S / self._settings.speed if self._models.cached_bytes else None
        try:
            async with asyncio.timeout(idle_s):
                await self._wake.wait()
        except TimeoutError:
            self._models.empty_cache()

    def _give_back(self) -> None:
        if self._free_memory:
            self._results.clear()
        if self._unload_models:
            self._models.unload_all()
        self._unload_models = self._free_memory = False

    async def _execute(self, item: Item) -> None:
        self.running = item
        self._interrupted = False
        self._counters.active += 1
        started_s = time.monotonic()
        run = _Run(item, self._send)
        status = "error"
        try:
            await self._nodes(run)
            await run.message("execution_success", {})
            status = "success"
            self._counters.completed += 1
            say(f"Prompt executed in {time.monotonic() - started_s:.2f} seconds")
        except _InterruptedError:
            self._counters.aborted += 1
            await run.message("execution_interrupted", run.place(), broadcast=True)
            say("Processing interrupted")
        except SimulatedOutOfMemory as error:
            await self._out_of_memory(run, error)
        except _NodeError as error:
            await self._failed(run, error.kind, str(error))
        finally:
            self._counters.active -= 1
            self.running = self.node = None
        self.history[item.prompt_id] = {
            "prompt": item.row(),
            "outputs": run.outputs,
            "status": {
                "status_str": status,
                "completed": status == "success",
                "messages": run.messages,
            },
            "meta": run.meta,
        }
        for oldest in list(self.history)[:-_HISTORY_ITEMS]:
            del self.history[oldest]
        await self._tell_status()
        # Only now: who waits for this one finds the history.
        await run.tell("executing", {"node": None})

    async def _nodes(self, run: _Run) -> None:
        item = run.item
        await run.message("execution_start", {})
        order = execution_order(item.graph, item.outputs)
        signatures = {node_id: signature(item.graph, node_id) for node_id in order}
        known = {node_id for node_id in order if signatures[node_id] in self._results}
        results = {signatures[node_id]: self._results[signatures[node_id]] for node_id in known}
        self._results = results
        await run.message(
            "execution_cached", {"nodes": [node_id for node_id in item.graph if node_id in known]}
        )
        for node_id in order:
            sign = signatures[node_id]
            if node_id not in known:
                if self._interrupted:
                    raise _InterruptedError
                run.node = self.node = node_id
                await run.tell("executing", {"node": node_id, "display_node": node_id})
                await run.progress(0, 1, "running")
                results[sign] = await self._node(run, node_id)
                await run.progress(1, 1, "finished")
                run.executed.append(node_id)
            shown = results[sign]
            if shown is not None:
                run.show(node_id, shown)
                await run.tell("executed", {"node": node_id, "display_node": node_id, "output": shown})

    async def _node(self, run: _Run, node_id: str) -> dict[str, Any] | None:
        graph = run.item.graph
        node = graph[node_id]
        inputs = node["inputs"]
        for name, wanted in self._kinds[node["class_type"]].inputs.items():
            # Nobody has looked at this before.
            if isinstance(wanted, Link) and not isinstance(inputs.get(name, []), list):
                found = type(inputs[name]).__name__
                raise _NodeError("AttributeError", f"'{found}' object has no attribute 'shape'")
        picture = picture_of(graph, node_id, self._files["input"])
        match node["class_type"]:
            case "LoadImage" | "LoadImageMask" if not is_picture(self._files["input"][inputs["image"]]):
                raise _NodeError(
                    "PIL.UnidentifiedImageError", f"cannot identify image file {inputs['image']}"
                )
            case "CheckpointLoaderSimple":
                await asyncio.sleep(load_time_s(inputs["ckpt_name"], self._settings))
            case "KSampler" | "KSamplerAdvanced" | "SamplerCustom":
                await self._sample(run, node_id, picture)
            case "SaveImage":
                return self._written(inputs["filename_prefix"], "output", picture)
            case "PreviewImage":
                return self._written("ComfyUI_temp", "temp", picture)
            case "SaveAnimatedWEBP" | "SaveWEBM" as moving:
                whole = msgspec.structs.replace(picture, count=1)
                shown = self._written(inputs["filename_prefix"], "output", whole, suffix=_MOVING[moving])
                return {**shown, "animated": [True]}
            case _:
                await asyncio.sleep(_NODE_S / self._settings.speed)
        return None

    async def _sample(self, run: _Run, node_id: str, picture: Picture) -> None:
        graph = run.item.graph
        name = loaded_by(graph, node_id)
        megapixels = picture.megapixels
        self._models.load(name, self._checkpoints.get(name, _OTHER_MODEL_BYTES))
        self._models.work(int(_WORK_BYTES_PER_MEGAPIXEL * megapixels))
        try:
            await self._faults.wait_until_off(Fault.HANG)
            steps = sampled_steps(graph, node_id)
            shown = png(_PREVIEW) if self._shows_previews(run.item) else b""
            for step in range(1, steps + 1):
                if self._interrupted:
                    raise _InterruptedError
                await asyncio.sleep(_STEP_S * megapixels / self._settings.speed)
                await run.progress(step, steps, "running")
                await self._preview(run, shown, first=True)
                await run.step(step, steps)
                await self._preview(run, shown, first=False)
        finally:
            self._models.rest()

    async def _out_of_memory(self, run: _Run, error: SimulatedOutOfMemory) -> None:
        text = f"Allocation on device 0 would exceed allowed memory. (out of memory) {error}"
        if Fault.OUT_OF_MEMORY_KILLS in self._faults:
            say(f"CUDA error: out of memory ({error})")
            raise LoadFailedError from error
        self._models.unload_all()
        await self._failed(run, "torch.OutOfMemoryError", text)
        say("Got an OOM, unloading all loaded models.")

    async def _failed(self, run: _Run, kind: str, text: str) -> None:
        say(f"!!! Exception during processing !!! {text}")
        details = {
            "exception_message": f"{text}\n",
            "exception_type": kind,
            "traceback": [],
            "current_inputs": {},
            "current_outputs": list(run.executed),
        }
        await run.message("execution_error", {**run.place(), **details})

    def _shows_previews(self, item: Item) -> bool:
        wanted = item.extra_data.get("preview_method", "default")
        return self._previews if wanted == "default" else wanted != "none"

    async def _preview(self, run: _Run, picture: bytes, *, first: bool) -> None:
        if picture:
            place = {"node_id": run.node, "display_node_id": run.node, "prompt_id": run.item.prompt_id}
            await self._send_preview(picture, place, run.item.client_id, first=first)

    def _written(self, prefix: str, kind: str, picture: Picture, *, suffix: str = ".png") -> dict[str, Any]:
        """Pictures in a folder, as an output node shows them; a prefix may begin with folders."""
        subfolder, _, name = prefix.rpartition("/")
        rows = []
        for _ in range(picture.count):
            self._saved += 1
            filename = f"{name}_{self._saved:05d}_{suffix}"
            self._files[kind][f"{subfolder}/{filename}" if subfolder else filename] = png(picture)
            rows.append({"filename": filename, "subfolder": subfolder, "type": kind})
        return {"images": rows}

    async def _tell_status(self) -> None:
        status = {"exec_info": {"queue_remaining": self.remaining}}
        await self._send("status", {"status": status}, None)


class _Run:
    """One prompt being executed: where it is, and whom to tell."""

    def __init__(self, item: Item, send: Send) -> None:
        self.item = item
        self.node = ""
        self.executed: list[str] = []
        self.outputs: dict[str, Any] = {}
        self.meta: dict[str, Any] = {}
        self.messages: list[list[Any]] = []
        self._send = send
        self._progress: dict[str, dict[str, Any]] = {}

    def place(self) -> dict[str, Any]:
        """Where it ended."""
        node_type = self.item.graph[self.node]["class_type"] if self.node else ""
        return {"node_id": self.node, "node_type": node_type, "executed": list(self.executed)}

    def show(self, node_id: str, output: dict[str, Any]) -> None:
        """Remember what an output node shows."""
        self.outputs[node_id] = output
        self.meta[node_id] = {
            "node_id": node_id,
            "display_node": node_id,
            "parent_node": None,
            "real_node_id": node_id,
        }

    async def tell(self, event: str, data: Mapping[str, Any]) -> None:
        """Tell the client that submitted it; without one, nobody."""
        if self.item.client_id is not None:
            await self._send(event, {**data, "prompt_id": self.item.prompt_id}, self.item.client_id)

    async def message(self, event: str, data: Mapping[str, Any], *, broadcast: bool = False) -> None:
        """Tell the client, and remember it for the history."""
        whole = {**data, "prompt_id": self.item.prompt_id, "timestamp": int(time.time() * 1000)}
        self.messages.append([event, whole])
        if self.item.client_id is not None or broadcast:
            await self._send(event, whole, self.item.client_id)

    async def step(self, value: int, maximum: int) -> None:
        """Tell of a step of the sampler: the client, or all without one."""
        data = {"value": value, "max": maximum, "prompt_id": self.item.prompt_id, "node": self.node}
        await self._send("progress", data, self.item.client_id)

    async def progress(self, value: int, maximum: int, state: str) -> None:
        """Tell how far all nodes are: the client, or all without one."""
        self._progress[self.node] = {
            "value": value,
            "max": maximum,
            "state": state,
            "node_id": self.node,
            "prompt_id": self.item.prompt_id,
            "display_node_id": self.node,
            "parent_node_id": None,
            "real_node_id": self.node,
        }
        data = {"prompt_id": self.item.prompt_id, "nodes": self._progress}
        await self._send("progress_state", data, self.item.client_id)
