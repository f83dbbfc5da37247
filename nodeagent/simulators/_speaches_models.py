"""Models of a simulated speaches: which are on its disk, and which are in memory, with its bugs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from nodeagent.simulators._faults import Fault, Faults
from nodeagent.simulators._memory import GpuMemory, SimulatedOutOfMemory
from nodeagent.simulators._process import say
from nodeagent.simulators._settings import Settings

#: Weights by what is in a model's name; the first that fits counts.
_WEIGHT_BYTES = (
    ("large", 3_100_000_000),
    ("medium", 1_600_000_000),
    ("small", 600_000_000),
    ("kokoro", 400_000_000),
    ("", 200_000_000),
)
_LOAD_BYTES_PER_S = 1e9
_KOKORO_VOICES = (("af_heart", "en-us"), ("am_adam", "en-us"), ("bf_emma", "en-gb"), ("ff_siwis", "fr-fr"))


class ModelFailedError(Exception):
    """A model cannot be had or used; the status and the text are speaches'."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Loaded:
    """A model that was asked for; `held` is not before it is loaded."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.users = 0
        self.held = False
        self.lock = asyncio.Lock()
        self.expiry: asyncio.TimerHandle | None = None


class SpeachesModels:
    """What is loaded, and what is only said to be.

    Args:
        on_disk: names of models that need not be fetched.
        ttl_s: by task, how long an idle model stays; -1 for ever, 0 not at all.
        settings: speed and sizes.
        faults: what goes wrong.
        memory: the GPU; None for the CPU.
    """

    def __init__(
        self,
        on_disk: Sequence[str],
        *,
        ttl_s: dict[str, float],
        settings: Settings,
        faults: Faults,
        memory: GpuMemory | None,
    ) -> None:
        self.on_disk = list(on_disk)
        self._ttl_s = ttl_s
        self._settings = settings
        self._faults = faults
        self._memory = memory
        #: What is listed: from the moment that it is asked for, until it is told to go.
        self.listed: dict[str, _Loaded] = {}
        #: What has memory, listed or not.
        self._holding: list[_Loaded] = []

    def rows(self, task: str = "") -> list[dict[str, Any]]:
        """The rows of `/v1/models`."""
        return [_row(name) for name in self.on_disk if task in ("", task_of(name))]

    def require(self, name: str, task: str) -> None:
        """Raises ModelFailedError if a model is not on the disk, or does something else."""
        if name not in self.on_disk:
            raise ModelFailedError(
                404,
                f"Model '{name}' is not installed locally. You can download the model using "
                "`POST /v1/models`",
            )
        if task_of(name) != task:
            raise ModelFailedError(
                404, f"Model '{name}' is not supported. If you think this is a mistake, please open an issue."
            )

    @asynccontextmanager
    async def use(self, name: str) -> AsyncIterator[None]:
        """Hold a model for a request; loads it first if it is not there. Raises ModelFailedError."""
        loaded = self.listed.setdefault(name, _Loaded(name))
        async with loaded.lock:
            if not loaded.held:
                await self._load(loaded)
            loaded.users += 1
            if loaded.expiry is not None:
                loaded.expiry.cancel()
        try:
            yield
        finally:
            loaded.users -= 1
            self._idle(loaded)

    def unload(self, name: str) -> None:
        """What `DELETE /api/ps` does: it is off the list in any case. Raises ModelFailedError."""
        loaded = self.listed.pop(name, None)
        if loaded is None:
            raise ModelFailedError(404, f"Model {name} not found")
        if not loaded.held:
            raise ModelFailedError(409, f"Model {name} is not loaded. self.ref_count=0")
        if loaded.users:
            raise ModelFailedError(409, f"Model {name} is still in use. self.ref_count={loaded.users}")
        self._let_go(loaded)

    async def _load(self, loaded: _Loaded) -> None:
        weight_bytes = self._weight_bytes(loaded.name)
        say(f"DEBUG:speaches: Loading model {loaded.name}")
        started_s = time.monotonic()
        load_s = self._settings.load_s
        if load_s is None:
            load_s = (0.5 + weight_bytes / _LOAD_BYTES_PER_S) / self._settings.speed
        await asyncio.sleep(load_s)
        await self._faults.wait_until_off(Fault.NEVER_READY)
        self._holding.append(loaded)
        try:
            self._measure()
        except SimulatedOutOfMemory as error:
            # It stays on the list.
            self._holding.remove(loaded)
            raise ModelFailedError(500, f"CUDA failed with error out of memory: {error}") from error
        loaded.held = True
        say(f"INFO:speaches: Model {loaded.name} loaded in {time.monotonic() - started_s:.2f}s")

    def _idle(self, loaded: _Loaded) -> None:
        if loaded.users:
            return
        if self.listed.get(loaded.name) is not loaded:
            # Nobody knows it any more: it goes with its last request.
            self._let_go(loaded)
            return
        ttl_s = self._ttl_s[task_of(loaded.name)]
        if ttl_s == 0:
            self._expire(loaded)
        elif ttl_s > 0:
            loaded.expiry = asyncio.get_running_loop().call_later(ttl_s, self._expire, loaded)

    def _expire(self, loaded: _Loaded) -> None:
        if self.listed.get(loaded.name) is loaded and not loaded.users:
            del self.listed[loaded.name]
            self._let_go(loaded)

    def _let_go(self, loaded: _Loaded) -> None:
        if loaded.held and Fault.FREE_IGNORED not in self._faults:
            loaded.held = False
            self._holding.remove(loaded)
            self._measure()
            say(f"INFO:speaches: Model {loaded.name} unloaded")

    def _measure(self) -> None:
        if self._memory is not None:
            self._memory.hold(sum(self._weight_bytes(each.name) for each in self._holding))

    def _weight_bytes(self, name: str) -> int:
        if self._settings.vram_bytes is not None:
            return self._settings.vram_bytes
        return next(size_bytes for part, size_bytes in _WEIGHT_BYTES if part in name.lower())


def task_of(name: str) -> str:
    """What a model is for, by its name."""
    return "automatic-speech-recognition" if "whisper" in name.lower() else "text-to-speech"


def voices_of(name: str) -> list[dict[str, str]]:
    """The voices of a model that speaks."""
    if "kokoro" in name.lower():
        return [{"name": each, "language": language, "id": each} for each, language in _KOKORO_VOICES]
    # Such as `speaches-ai/piper-en_US-amy-low`.
    parts = name.rpartition("/")[2].split("-")
    voice, language = (parts[2], parts[1].partition("_")[0]) if len(parts) == 4 else (parts[-1], "en")
    return [{"name": voice, "language": language, "id": voice}]


def _row(name: str) -> dict[str, Any]:
    task = task_of(name)
    row: dict[str, Any] = {
        "id": name,
        "created": 1_760_000_000,
        "object": "model",
        "owned_by": name.partition("/")[0],
        "language": [],
        "task": task,
    }
    return row | ({"sample_rate": 22050, "voices": voices_of(name)} if task == "text-to-speech" else {})
