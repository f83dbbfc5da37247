"""Sleep mode of a simulated vLLM: its development routes, and the memory that they move."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import msgspec
from aiohttp import web
from msgspec import Struct

from nodeagent.simulators._faults import Fault
from nodeagent.simulators._http import SimulatedEngine, json_response
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory
from nodeagent.simulators._settings import Settings

_WEIGHTS, _KV_CACHE = "weights", "kv_cache"
_TAGS = frozenset({_WEIGHTS, _KV_CACHE})
_LEVELS = (0, 1, 2)
_MODES = ("abort", "wait", "keep")
#: Bytes a second from the GPU to host memory, back, and from the disk's page cache, at life's speed.
_OFFLOAD_RATE = 12e9
_ONLOAD_RATE = 8e9
_RELOAD_RATE = 5e9
#: The part that a sleep which frees too little leaves behind.
_LEFT_BEHIND = 0.8
_POLL_S = 0.01


class Parts(Struct, frozen=True, kw_only=True):
    """What the memory of an engine that is awake consists of, in bytes."""

    weights: int
    kv_cache: int
    overhead: int


class _RemoteCall(Struct):
    method: str


class _BadQueryError(Exception):
    """A parameter of a query that vLLM's framework refuses before vLLM sees it."""

    def __init__(self, param: str, why: str) -> None:
        super().__init__(f"{{'loc': '{param}', 'msg': '{why}'}}")
        self.param = param


class SleepMode:
    """Puts a simulated engine to sleep and wakes it, as vLLM's development routes do.

    Args:
        engine: whose requests are broken off, and wait until it is awake.
        settings: speed, and how slow a slow wake is.
        memory: what moves; None on a machine without GPUs.
        enabled: started with `--enable-sleep-mode`. Without, it claims to sleep and gives nothing back.
        die: ends the process, with these last words.
    """

    def __init__(
        self,
        engine: SimulatedEngine,
        settings: Settings,
        memory: GpuMemory | None,
        *,
        enabled: bool,
        die: Callable[[str], None],
    ) -> None:
        self.parts = Parts(weights=0, kv_cache=0, overhead=0)
        self._engine = engine
        self._settings = settings
        self._memory = memory
        self._enabled = enabled
        self._die = die
        self._asleep: frozenset[str] = frozenset()
        self._level = 0
        self._paused = False
        self._weights_lost = False
        self._left_behind = 0
        self._one_at_a_time = asyncio.Lock()

    def add_routes(self, app: web.Application) -> None:
        """The routes that there are only with `VLLM_SERVER_DEV_MODE=1`."""
        app.router.add_post("/sleep", self._sleep)
        app.router.add_post("/wake_up", self._wake_up)
        app.router.add_get("/is_sleeping", self._is_sleeping)
        app.router.add_post("/collective_rpc", self._collective_rpc)

    @property
    def state(self) -> str:
        """As the metrics have it."""
        if not self.sleeping:
            return "awake"
        return "discard_all" if self._level == 2 else "weights_offloaded"

    @property
    def sleeping(self) -> bool:
        """Whether something still sleeps, or all is paused."""
        return self._paused or bool(self._asleep)

    async def _is_sleeping(self, http: web.Request) -> web.Response:
        return json_response({"is_sleeping": self.sleeping})

    async def _sleep(self, http: web.Request) -> web.Response:
        try:
            level = _level_of(http.query.get("level", "1"))
            mode = _mode_of(http.query.get("mode", "abort"))
        except _BadQueryError as error:
            return _bad_request(f"1 validation error:\n  {error}", param=error.param)
        async with self._one_at_a_time:
            busy = self._engine.counters.active > 0
            if busy and Fault.CRASH_WHEN_SLEPT_BUSY in self._engine.faults:
                return self._fatal("CUDA error: an illegal memory access was encountered")
            self._engine.awake.clear()
            if mode == "abort":
                self._engine.abort_running()
            while self._engine.counters.active:  # noqa: ASYNC110 - counted for tests, not signalled
                await asyncio.sleep(_POLL_S)
            if level == 0:
                self._paused = True
            elif not self._asleep:
                refused = await self._fall_asleep(level)
                if refused is not None:
                    return refused
            # One that sleeps already does not sleep deeper, and says that it does.
            return json_response({"status": "sleeping", "level": level})

    async def _fall_asleep(self, level: int) -> web.Response | None:
        weights = self.parts.weights if self._enabled else 0
        if level == 1:
            try:
                self._hold_host(weights)
            except SimulatedOutOfMemory as error:
                return self._fatal(f"RuntimeError: CUDA error: out of memory (pinned host memory; {error})")
            await self._takes(weights / _OFFLOAD_RATE)
        self._asleep, self._level = _TAGS, level
        self._weights_lost = level == 2
        everything = self.parts.weights + self.parts.kv_cache
        if not self._enabled:
            self._left_behind = everything
        elif Fault.SLEEP_FREES_LITTLE in self._engine.faults:
            self._left_behind = int(everything * _LEFT_BEHIND)
        else:
            self._left_behind = 0
        self._hold()
        return None

    async def _wake_up(self, http: web.Request) -> web.Response:
        wanted = http.query.getall("tags", [])
        async with self._one_at_a_time:
            if Fault.SLOW_WAKE in self._engine.faults:
                await asyncio.sleep(self._settings.slow_wake_s)
            self._paused = False
            # Of the scheduler, which runs again once all is awake.
            tags = frozenset(wanted) - {"scheduling"} if wanted else self._asleep
            # One tag that is not asleep, and the whole call is ignored.
            if tags and tags <= self._asleep:
                if _WEIGHTS in tags and self._level == 1 and self._enabled:
                    await self._takes(self.parts.weights / _ONLOAD_RATE)
                before = self._asleep
                self._asleep -= tags
                try:
                    self._hold()
                except SimulatedOutOfMemory as error:
                    self._asleep = before
                    return self._fatal(f"torch.OutOfMemoryError: CUDA out of memory. ({error})")
                if _WEIGHTS in tags:
                    self._hold_host(0)
            self._engine.garbled = self._weights_lost
            if not self.sleeping:
                self._engine.awake.set()
            status = "sleeping" if self.sleeping else "awake"
            return json_response({"status": status, "tags": wanted or None})

    async def _collective_rpc(self, http: web.Request) -> web.Response:
        try:
            call = msgspec.json.decode(await http.read(), type=_RemoteCall)
        except msgspec.ValidationError:
            return _bad_request("Missing 'method' in request body", param=None)
        except msgspec.DecodeError as error:
            return _bad_request(f"JSON decode error: {error}", param=None)
        if call.method != "reload_weights":
            return self._engine.failure(
                500, f"Call to collective_rpc method failed: no attribute '{call.method}'"
            )
        async with self._one_at_a_time:
            if _WEIGHTS in self._asleep:
                return self._fatal("CUDA error: an illegal memory access was encountered")
            await self._takes(self.parts.weights / _RELOAD_RATE)
            self._weights_lost = self._engine.garbled = False
            return json_response({"results": [None]})

    def _fatal(self, last_words: str) -> web.Response:
        """The engine is dead; its server says so once, and ends."""
        self._die(last_words)
        return self._engine.failure(
            500, "EngineCore encountered an issue. See stack trace for the root cause."
        )

    def _hold(self) -> None:
        """Hold what is awake, and what stays in any case."""
        if self._memory is None:
            return
        awake = 0 if _WEIGHTS in self._asleep else self.parts.weights
        awake += 0 if _KV_CACHE in self._asleep else self.parts.kv_cache
        self._memory.hold(self.parts.overhead + max(awake, self._left_behind if self._asleep else 0))

    def _hold_host(self, memory_bytes: int) -> None:
        if self._memory is not None:
            self._memory.hold_host(memory_bytes)

    async def _takes(self, duration_s: float) -> None:
        await asyncio.sleep(duration_s / self._settings.speed)


def _bad_request(message: str, *, param: str | None) -> web.Response:
    """What vLLM's framework says of a request that it does not pass on: its type has a space."""
    error = {"message": message, "type": "Bad Request", "param": param, "code": 400}
    return json_response({"error": error}, status=400)


def _level_of(text: str) -> int:
    try:
        level = int(text)
    except ValueError:
        raise _BadQueryError("query.level", "Input should be a valid integer") from None
    if level not in _LEVELS:
        raise _BadQueryError("query.level", "Input should be from 0 to 2")
    return level


def _mode_of(text: str) -> str:
    if text not in _MODES:
        raise _BadQueryError("query.mode", "Input should be abort, wait or keep")
    return text
