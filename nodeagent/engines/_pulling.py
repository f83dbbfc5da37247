"""Having Ollama fetch a model: what its lines say, how far it is, and what to do when it breaks off."""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from nodeagent.engines._base import PullProgress
from rung.errors import EngineFailedError, EngineTimeoutError, UnavailableError
from rung.service import EngineClient

#: Ollama says nothing while it verifies what it has fetched, which takes minutes for the largest.
_SILENCE_TIMEOUT_S = 900.0
_TELL_INTERVAL_S = 0.5
#: The rate is that of so long; what brings nothing for so long stands still.
_RATE_WINDOW_S = 5.0
_MAX_LINE_BYTES = 64 * 1024
#: Attempts in a row that bring not one byte, before it is given up.
_FRUITLESS_ATTEMPTS = 5
_LONGEST_PAUSE_S = 15.0
_GB = 1e9
_MB = 1e6

_UNKNOWN = re.compile(r"file does not exist|manifest unknown|not found|invalid model name", re.IGNORECASE)
_DISK_FULL = re.compile(r"no space left on device|disk quota exceeded", re.IGNORECASE)
_UNREACHABLE = re.compile(
    r"no such host|dial tcp|connection re|i/o timeout|network is unreachable|no route to host"
    r"|TLS handshake|server misbehaving|context deadline exceeded|unexpected EOF|max retries exceeded"
    r"|: 50[0234]\b",
    re.IGNORECASE,
)


class _Line(Struct):
    status: str = ""
    digest: str = ""
    total: int = 0
    #: Absent for 0.
    completed: int = 0
    error: str = ""


class _BrokenOffError(Exception):
    """A pull has ended before its time, and may be asked for again."""


class PullCount:
    """How far a pull is. What is left is known for the layers that Ollama has named so far.

    Args:
        model: its name.
        now_s: when it begins; as all times here, of one clock that never goes back.
    """

    def __init__(self, model: str, now_s: float) -> None:
        self._model = model
        self._layers: dict[str, tuple[int, int]] = {}
        self._status = ""
        self._samples: deque[tuple[float, int]] = deque()
        self._moved_s = now_s

    @property
    def completed_bytes(self) -> int:
        """What is there already, also from earlier attempts."""
        return sum(completed for _, completed in self._layers.values())

    @property
    def total_bytes(self) -> int:
        """The size of all layers that are known of."""
        return sum(total for total, _ in self._layers.values())

    def take(
        self, status: str, now_s: float, *, digest: str = "", total: int = 0, completed: int = 0
    ) -> None:
        """Note what a line said."""
        self._status = status
        if not digest or total <= 0:
            return
        before = self._layers.get(digest, (total, 0))[1]
        # The first line of a layer counts nothing, whatever an earlier attempt has left of it.
        self._layers[digest] = (total, min(completed, total) or before)
        if before == 0 and completed > 0:
            # What was left comes in one leap, and says nothing of the rate.
            self._samples.clear()
        if completed > before:
            self._moved_s = now_s
        self._samples.append((now_s, self.completed_bytes))

    def again(self) -> None:
        """A new attempt begins: the rate of the one before says nothing of it."""
        self._samples.clear()

    def progress(self, now_s: float) -> PullProgress:
        """How far it is now."""
        total, completed = self.total_bytes, self.completed_bytes
        if total == 0 or not self._status.startswith("pulling "):
            return PullProgress(f"pulling {self._model}: {self._status or 'asking for it'}")
        rate = self._bytes_per_s(now_s)
        detail = f"pulling {self._model}: {completed / _GB:.2f} of {total / _GB:.2f} GB"
        if rate > 0:
            detail += f", {rate / _MB:.1f} MB/s"
        elif completed < total and now_s - self._moved_s >= _RATE_WINDOW_S:
            detail += f", nothing for {now_s - self._moved_s:.0f} s"
        remaining_s = (total - completed) / rate if rate > 0 else None
        return PullProgress(detail, 100.0 * completed / total, remaining_s)

    def _bytes_per_s(self, now_s: float) -> float:
        samples = self._samples
        while len(samples) > 1 and samples[1][0] <= now_s - _RATE_WINDOW_S:
            samples.popleft()
        if not samples or now_s - samples[0][0] < _TELL_INTERVAL_S:
            return 0.0
        return max(samples[-1][1] - samples[0][1], 0) / (now_s - samples[0][0])


class ModelPull:
    """Has one Ollama fetch one model, and goes on where it broke off.

    Args:
        client: connections to engines.
        base_url: where it listens.
        model: the name.
        what: the deployment, for messages.
        tell: is told how far it is, at once and at least once a second.
        free_bytes: room for models on the disk; None where that is not known.
        pause_s: after the first attempt that breaks off; later ones pause longer.
    """

    def __init__(
        self,
        client: EngineClient,
        base_url: str,
        model: str,
        *,
        what: str,
        tell: Callable[[PullProgress], None],
        free_bytes: Callable[[], int | None],
        pause_s: float,
    ) -> None:
        self._client = client
        self._url = base_url.rstrip("/") + "/api/pull"
        self._model = model
        self._what = what
        self._tell = tell
        self._free_bytes = free_bytes
        self._pause_s = pause_s
        self._loop = asyncio.get_running_loop()
        self._count = PullCount(model, self._loop.time())
        self._trouble = ""

    async def run(self) -> None:
        """Return once Ollama has the model. Cancelled, Ollama stops too, and keeps what it has fetched.

        Raises:
            EngineFailedError: there is no such model, no room for it, or no way to the registry.
        """
        telling = asyncio.create_task(self._keep_telling(), name=f"pull-{self._what}")
        try:
            await self._until_there()
        finally:
            telling.cancel()
            await asyncio.gather(telling, return_exceptions=True)

    async def _until_there(self) -> None:
        fruitless, best = 0, 0
        while True:
            self._count.again()
            try:
                await self._attempt()
                return
            except EngineFailedError:
                raise
            except (_BrokenOffError, UnavailableError, EngineTimeoutError) as error:
                # Ollama verifies what it keeps, so whatever broke off is asked for again.
                completed = self._count.completed_bytes
                fruitless = 1 if completed > best else fruitless + 1
                best = max(best, completed)
                if fruitless >= _FRUITLESS_ATTEMPTS:
                    raise EngineFailedError(
                        f"{self._what}: {error}, {fruitless} times in a row; what was fetched is kept, and "
                        "the next start goes on from there"
                    ) from error
                self._trouble = f"{error}; trying again ({fruitless} of {_FRUITLESS_ATTEMPTS - 1})"
            await asyncio.sleep(min(self._pause_s * 2 ** (fruitless - 1), _LONGEST_PAUSE_S))

    async def _attempt(self) -> None:
        body = msgspec.json.encode({"model": self._model, "stream": True})
        reply = await self._client.post(self._url, body, what=self._what, idle_timeout_s=_SILENCE_TIMEOUT_S)
        async with reply:
            if reply.status != 200:
                said = await reply.read()
                with suppress(msgspec.DecodeError):
                    said = msgspec.json.decode(said, type=_Line).error.encode() or said
                self._refused(said.decode(errors="replace").strip() or f"HTTP {reply.status}")
            rest = b""
            async for piece in reply.chunks():
                *lines, rest = (rest + piece).split(b"\n")
                if len(rest) > _MAX_LINE_BYTES:
                    raise EngineFailedError(f"{self._what}: /api/pull answers with no lines")
                for line in lines:
                    if line.strip() and self._take(line):
                        return
            if rest.strip() and self._take(rest):
                return
        raise _BrokenOffError("Ollama ended the pull before it was done")

    def _take(self, line: bytes) -> bool:
        """Note a line; True for the last of a pull that went well."""
        try:
            said = msgspec.json.decode(line, type=_Line)
        except msgspec.DecodeError as error:
            raise _BrokenOffError("Ollama sent a line that is not understood") from error
        if said.error:
            self._refused(said.error)
        self._trouble = ""
        self._count.take(
            said.status, self._loop.time(), digest=said.digest, total=said.total, completed=said.completed
        )
        if said.completed:
            # Not before: the first line of a layer counts nothing of what an earlier attempt has left.
            self._require_room()
        return said.status == "success"

    def _require_room(self) -> None:
        free = self._free_bytes()
        needed = self._count.total_bytes - self._count.completed_bytes
        if free is not None and needed > free:
            raise EngineFailedError(
                f"{self._what}: {self._model} needs {needed / _GB:.1f} GB more on the disk for models, where "
                f"{free / _GB:.1f} GB are free; make room, or set OLLAMA_MODELS to a larger disk"
            )

    def _refused(self, said: str) -> None:
        """An error of Ollama's, whatever the status it came with."""
        if _DISK_FULL.search(said):
            raise EngineFailedError(f"{self._what}: the disk for models is full ({said})")
        if _UNREACHABLE.search(said):
            raise _BrokenOffError(f"the registry of {self._model} cannot be reached ({said})")
        if _UNKNOWN.search(said):
            raise EngineFailedError(
                f"{self._what}: the registry has no model {self._model} ({said}); "
                "https://ollama.com/library lists what there is"
            )
        raise EngineFailedError(f"{self._what}: Ollama cannot pull {self._model}: {said}")

    async def _keep_telling(self) -> None:
        while True:
            found = self._count.progress(self._loop.time())
            self._tell(PullProgress(f"{found.detail}; {self._trouble}") if self._trouble else found)
            await asyncio.sleep(_TELL_INTERVAL_S)


def free_for_models(environment: Mapping[str, str]) -> int | None:
    """Room on the disk where an `ollama serve` with this environment has its models, in bytes.

    None if that place is not known.
    """
    home = environment.get("HOME")
    place = environment.get("OLLAMA_MODELS") or (f"{home}/.ollama/models" if home else "")
    if not place:
        return None
    folder = Path(place)
    # It makes the folder when it needs it.
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None
