"""What a simulated Ollama has loaded: which models, how much of each on the GPU, and until when."""

from __future__ import annotations

import asyncio
import math
import re
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

from msgspec import Struct

from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory
from nodeagent.simulators._process import say
from nodeagent.simulators._settings import Settings, billions_of, load_time_s, weight_bytes_of

_LOAD_STEPS = 20
_LAYERS = 33
#: Bytes a token in the KV cache of an 8B model at f16, and what other types make of it.
_KV_BYTES_OF_8B = 131_072
_KV_TYPES = {"f16": 1.0, "q8_0": 0.53, "q4_0": 0.28}
_GRAPH_BYTES = 300 * 1024**2
#: How long a runner takes to end, for which it is still listed.
_UNLOAD_S = 0.5
#: A duration as Go writes it.
_DURATION = re.compile(r"([+-]?)((?:\d+(?:\.\d+)?(?:ns|us|µs|ms|s|m|h))+)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


class RunnerFailedError(Exception):
    """A model could not be loaded. The message is Ollama's."""


class Limits(Struct, frozen=True, kw_only=True):
    """What `ollama serve` is told by its environment. `keep_alive_s` may be infinite."""

    max_loaded: int = 3
    parallel: int = 1
    max_queue: int = 512
    context_tokens: int = 4096
    kv_cache_type: str = "f16"
    keep_alive_s: float = 300.0


class Runner:
    """A loaded model. `vram_bytes` of its `size_bytes` are on the GPU, the rest the CPU has."""

    def __init__(self, name: str, size_bytes: int, vram_bytes: int, keep_alive_s: float) -> None:
        self.name = name
        self.size_bytes = size_bytes
        self.vram_bytes = vram_bytes
        self.keep_alive_s = keep_alive_s
        self.in_use = 0
        self.used_at_s = time.monotonic()
        self.expires_at_s = math.inf
        self.expiry: asyncio.TimerHandle | None = None
        self.leaving: asyncio.Task[None] | None = None


class Runners:
    """Loads models as they are asked for, and lets go of the least recently used where room is wanted.

    A model that does not fit alone is split: what the GPU has no room for is left to the CPU.
    """

    def __init__(
        self, *, memory: GpuMemory | None, settings: Settings, faults: Faults, limits: Limits
    ) -> None:
        self._memory = memory
        self._settings = settings
        self._faults = faults
        self._limits = limits
        self._loaded: dict[str, Runner] = {}
        self._loading_bytes = 0
        self._one_at_a_time = asyncio.Lock()
        self._changed = asyncio.Event()

    def loaded(self) -> list[Runner]:
        """What is loaded, also what is on its way out; the newest first, as Ollama lists it."""
        return sorted(self._loaded.values(), key=lambda runner: -runner.used_at_s)

    @asynccontextmanager
    async def use(self, name: str, keep_alive_s: float | None) -> AsyncIterator[Runner]:
        """The model's runner, loaded if it is not; kept `keep_alive_s` after its last use.

        Raises:
            RunnerFailedError: it cannot be loaded.
        """
        runner = await self._acquire(name)
        runner.in_use += 1
        runner.used_at_s = time.monotonic()
        runner.expires_at_s = math.inf
        runner.keep_alive_s = self._limits.keep_alive_s if keep_alive_s is None else keep_alive_s
        if runner.expiry is not None:
            runner.expiry.cancel()
        try:
            yield runner
        finally:
            runner.in_use -= 1
            runner.used_at_s = time.monotonic()
            if runner.in_use == 0:
                self._idle(runner)

    def unload(self, name: str) -> None:
        """Let a model go as soon as nobody uses it. What is not loaded is no error."""
        runner = self._loaded.get(name)
        if runner is None or Fault.FREE_IGNORED in self._faults:
            return
        runner.keep_alive_s = 0.0
        if runner.in_use == 0:
            self._leave(runner)

    async def _acquire(self, name: str) -> Runner:
        while True:
            runner = self._loaded.get(name)
            if runner is not None and runner.leaving is None:
                return runner
            async with self._one_at_a_time:
                runner = self._loaded.get(name)
                if runner is None:
                    await self._load(name)
                elif runner.leaving is not None:
                    await asyncio.shield(runner.leaving)

    async def _load(self, name: str) -> None:
        size = self._size_of(name)
        while len(self._loaded) >= self._limits.max_loaded:
            await self._evict_one()
        while self._loaded and size > self._free_bytes():
            await self._evict_one()
        layers = min(_LAYERS * self._free_bytes() // size, _LAYERS)
        vram = size * layers // _LAYERS
        say("llama_model_loader: loaded meta data with 29 key-value pairs and 291 tensors")
        say(f"load_tensors: offloaded {layers}/{_LAYERS} layers to GPU")
        took_s = load_time_s(name, self._settings)
        try:
            for step in range(1, _LOAD_STEPS + 1):
                await asyncio.sleep(took_s / _LOAD_STEPS)
                if Fault.DIE_WHILE_LOADING in self._faults and step >= _LOAD_STEPS // 2:
                    raise RunnerFailedError("llama runner process has terminated: exit status 2")
                self._hold(vram * step // _LOAD_STEPS)
            await self._faults.wait_until_off(Fault.NEVER_READY)
        except SimulatedOutOfMemory as error:
            self._hold(0)
            # Ollama then no longer trusts what it knows of the GPU, and begins anew.
            for runner in self._loaded.values():
                runner.keep_alive_s = 0.0
                if runner.in_use == 0:
                    self._leave(runner)
            raise RunnerFailedError(
                f"llama runner process has terminated: cudaMalloc failed: out of memory ({error})"
            ) from error
        except BaseException:
            # Also a caller that leaves: Ollama then gives up the load.
            self._hold(0)
            raise
        self._loading_bytes = 0
        self._loaded[name] = Runner(name, size, vram, self._limits.keep_alive_s)
        say(f'level=INFO source=server.go:1 msg="llama runner started in {took_s:.2f} seconds"')

    async def _evict_one(self) -> None:
        """Let go of the model that was not used for longest; if all are in use, wait until one is not."""
        leaving = [runner.leaving for runner in self._loaded.values() if runner.leaving is not None]
        idle = [runner for runner in self._loaded.values() if runner.in_use == 0]
        if leaving:
            await asyncio.shield(leaving[0])
        elif idle:
            await asyncio.shield(self._leave(min(idle, key=lambda runner: runner.used_at_s)))
        else:
            self._changed.clear()
            await self._changed.wait()

    def _idle(self, runner: Runner) -> None:
        self._changed.set()
        if runner.keep_alive_s <= 0:
            self._leave(runner)
        elif math.isfinite(runner.keep_alive_s):
            runner.expires_at_s = time.time() + runner.keep_alive_s
            loop = asyncio.get_running_loop()
            runner.expiry = loop.call_later(runner.keep_alive_s, self._leave, runner)

    def _leave(self, runner: Runner) -> asyncio.Task[None]:
        if runner.leaving is None:
            runner.leaving = asyncio.create_task(self._end(runner))
        return runner.leaving

    async def _end(self, runner: Runner) -> None:
        await asyncio.sleep(_UNLOAD_S / self._settings.speed)
        del self._loaded[runner.name]
        self._hold(self._loading_bytes)

    def _hold(self, loading_bytes: int) -> None:
        """Hold what is loaded, and so much of what is being loaded."""
        if self._memory is not None:
            self._memory.hold(sum(runner.vram_bytes for runner in self._loaded.values()) + loading_bytes)
        self._loading_bytes = loading_bytes

    def _free_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.free_bytes()

    def _size_of(self, name: str) -> int:
        if self._settings.vram_bytes is not None:
            return self._settings.vram_bytes
        each = _KV_BYTES_OF_8B * billions_of(name) / 8 * _KV_TYPES[self._limits.kv_cache_type]
        kv_bytes = int(each * self._limits.context_tokens * self._limits.parallel)
        return weight_bytes_of(name, default_bytes_per_weight=0.6) + kv_bytes + _GRAPH_BYTES


def seconds_of(keep_alive: float | str) -> float:
    """A keep-alive in seconds: a number, or a duration such as `1h30m`; negative is for ever.

    Raises:
        ValueError: it is neither.
    """
    if isinstance(keep_alive, str):
        found = _DURATION.fullmatch(keep_alive)
        if found is None:
            raise ValueError(f'time: invalid duration "{keep_alive}"')
        sign = -1.0 if found.group(1) == "-" else 1.0
        parts = re.findall(r"([\d.]+)(\D+)", found.group(2))
        keep_alive = sign * sum(float(number) * _UNITS[unit] for number, unit in parts)
    return math.inf if keep_alive < 0 else float(keep_alive)


def limits_from(environment: Mapping[str, str]) -> Limits:
    """Read Ollama's own variables.

    Raises:
        ValueError: one of them makes no sense.
    """
    kept = environment.get("OLLAMA_KEEP_ALIVE") or "5m"
    kind = environment.get("OLLAMA_KV_CACHE_TYPE") or "f16"
    if kind not in _KV_TYPES:
        raise ValueError(f"OLLAMA_KV_CACHE_TYPE {kind!r} is not one of {', '.join(_KV_TYPES)}")
    return Limits(
        max_loaded=int(environment.get("OLLAMA_MAX_LOADED_MODELS") or 3),
        parallel=int(environment.get("OLLAMA_NUM_PARALLEL") or 1),
        max_queue=int(environment.get("OLLAMA_MAX_QUEUE") or 512),
        context_tokens=int(environment.get("OLLAMA_CONTEXT_LENGTH") or 4096),
        kv_cache_type=kind,
        keep_alive_s=seconds_of(float(kept) if re.fullmatch(r"-?\d+", kept) else kept),
    )
