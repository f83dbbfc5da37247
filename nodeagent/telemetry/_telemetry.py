"""Samples of the node, once a second, for whoever wants them.

One dedicated thread looks at the GPUs; a task on the event loop adds the host's figures and hands
the whole out. A driver that hangs holds up the thread alone: host figures stay fresh, and samples say
how old the GPUs' are.
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from nodeagent.telemetry._host import HostReader
from nodeagent.telemetry._nvml import NvmlSource
from nodeagent.telemetry._owners import with_owners
from nodeagent.telemetry._source import GpuSample, GpuSource, SimulatedSource
from rung.service import host_id
from rung.types import GpuHealth, NodeStatus

_log = logging.getLogger(__name__)

#: GPU figures older than this are said to be old, and their devices' health unknown.
_STALE_AFTER_S = 5.0

#: How long start and end wait for a driver that may hang.
_PATIENCE_S = 2.0
#: A sample of after something is begun so long after it: who hears of both allows for the way of each.
_MOMENT_S = 0.15


class _Looked(Struct, frozen=True):
    """A sample of the GPUs and when it was begun and taken, by the monotonic clock."""

    sample: GpuSample
    began_s: float
    at_s: float


class _Watcher:
    """The thread that owns the GPU source. A daemon: one that hangs must not hold up the exit."""

    def __init__(self, source: GpuSource, interval_s: float, on_sample: Callable[[], None]) -> None:
        self.newest: _Looked | None = None
        self.started_s = time.monotonic()
        self._source = source
        self._interval_s = interval_s
        self._on_sample = on_sample
        self._stopping = threading.Event()
        self._due = threading.Event()
        self._thread = threading.Thread(target=self._run, name="gpu-telemetry", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def look_now(self) -> None:
        """Take the next sample at once."""
        self._due.set()

    def stop(self, patience_s: float) -> None:
        """End the thread; one that hangs in the driver is left behind. Blocks."""
        self._stopping.set()
        self._due.set()
        self._thread.join(patience_s)
        if self._thread.is_alive():
            _log.warning("the GPU driver hangs; its telemetry thread is left behind")

    def _run(self) -> None:
        while not self._stopping.is_set():
            self._due.clear()
            began_s = time.monotonic()
            sample = self._look()
            if self._stopping.is_set():
                break
            self.newest = _Looked(sample, began_s, time.monotonic())
            self._on_sample()
            self._due.wait(max(self._interval_s - (time.monotonic() - began_s), 0.0))
        self._source.close()

    def _look(self) -> GpuSample:
        try:
            return self._source.read()
        except Exception as error:  # noqa: BLE001 - a bad sample must not end telemetry
            _log.exception("GPU telemetry failed")
            return GpuSample(warnings=(f"GPU telemetry failed: {error}",))


class Telemetry:
    """Figures of the node, sampled once `interval_s`.

    With `simulated_gpus` the node is the simulated machine in that folder. `gpu_source` stands in
    for both NVML and a simulated machine.
    """

    def __init__(
        self,
        *,
        state_dir: Path,
        simulated_gpus: Path | None = None,
        agent_version: str,
        gpu_source: GpuSource | None = None,
        interval_s: float = 1.0,
        stale_after_s: float = _STALE_AFTER_S,
    ) -> None:
        self._host = HostReader(state_dir)
        self._agent_version = agent_version
        self._source = gpu_source or (SimulatedSource(simulated_gpus) if simulated_gpus else NvmlSource())
        self._interval_s = interval_s
        self._stale_after_s = stale_after_s
        self._host_id = host_id()
        self._owners: dict[int, str] = {}
        self._measured: NodeStatus | None = None
        self._status: NodeStatus | None = None
        self._sequence = 0
        #: When the GPU sample of `status` was begun, by the monotonic clock.
        self._published_began_s = 0.0
        self._published = asyncio.Event()
        self._looked = asyncio.Event()
        self._watcher: _Watcher | None = None
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    async def start(self) -> None:
        """Begin to sample. Returns with the first sample taken, or after 2 s if the driver hangs."""
        loop = asyncio.get_running_loop()

        def on_sample() -> None:
            try:
                loop.call_soon_threadsafe(self._looked.set)
            except RuntimeError:
                # The loop closed while the driver hung; nobody is left to tell.
                _log.debug("a GPU sample came after the end")

        self._watcher = _Watcher(self._source, self._interval_s, on_sample)
        self._watcher.start()
        await self._wait_for_sample(_PATIENCE_S)
        await self._publish()
        self._task = asyncio.create_task(self._run(), name="telemetry")

    @property
    def status(self) -> NodeStatus:
        """The newest sample.

        Raises:
            RuntimeError: before `start` has returned.
        """
        if self._status is None:
            raise RuntimeError("telemetry has not been started")
        return self._status

    @property
    def sample_age_s(self) -> float:
        """Time since the GPU figures of `status` began to be read; endless if they never were."""
        return time.monotonic() - self._published_began_s if self._published_began_s else math.inf

    def look_soon(self) -> None:
        """Have a sample taken in a moment, of what has just happened."""
        if self._watcher is not None:
            asyncio.get_running_loop().call_later(_MOMENT_S, self._watcher.look_now)

    async def look(self) -> NodeStatus:
        """A sample that is begun after this call; the newest that there is if the driver hangs."""
        assert self._watcher is not None
        called_s = time.monotonic()
        deadline_s = called_s + _PATIENCE_S
        while self._published_began_s < called_s and (left_s := deadline_s - time.monotonic()) > 0:
            self._watcher.look_now()
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._published.wait()
        return self.status

    def set_owners(self, owners: Mapping[int, str]) -> None:
        """Say which deployment each process is of: pids of this host, to deployment ids.

        Replaces what was said before, and holds for `status` at once. Descendants of a process, and
        members of the session that it leads, are of the same deployment.
        """
        self._owners = dict(owners)
        if self._measured is not None:
            self._status = self._attributed(self._measured)

    async def changes(self) -> AsyncGenerator[NodeStatus, None]:
        """The newest sample, then each new one. A slow reader misses samples; ends with `aclose`."""
        seen = 0
        while not self._closed:
            if self._status is not None and seen < self._sequence:
                seen = self._sequence
                yield self._status
            else:
                await self._published.wait()

    async def aclose(self) -> None:
        """End sampling. Waits at most 2 s for a driver that hangs."""
        self._closed = True
        self._wake_readers()
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
            self._task = None
        if self._watcher is not None:
            await asyncio.to_thread(self._watcher.stop, _PATIENCE_S)
            self._watcher = None

    async def _run(self) -> None:
        while True:
            # The pace is the watcher's; half as slow again if it hangs.
            await self._wait_for_sample(self._interval_s * 1.5)
            try:
                await self._publish()
            except OSError:
                _log.exception("the host's figures cannot be read")

    async def _wait_for_sample(self, timeout_s: float) -> None:
        try:
            async with asyncio.timeout(timeout_s):
                await self._looked.wait()
        except TimeoutError:
            return
        self._looked.clear()

    async def _publish(self) -> None:
        assert self._watcher is not None
        looked = self._watcher.newest
        age_s = time.monotonic() - (looked.at_s if looked else self._watcher.started_s)
        sample = looked.sample if looked else GpuSample()
        if looked is None or age_s > self._stale_after_s:
            sample = _stale(sample, age_s, never=looked is None)
        host = await asyncio.to_thread(self._host.read, sample.host_memory)
        self._measured = NodeStatus(
            sample_time_s=time.time(),
            gpus=sample.gpus,
            host=host,
            agent_version=self._agent_version,
            host_id=self._host_id,
            driver_version=sample.driver_version,
            simulated=sample.simulated,
            warnings=sample.warnings,
        )
        self._status = self._attributed(self._measured)
        self._published_began_s = looked.began_s if looked else 0.0
        self._sequence += 1
        self._wake_readers()

    def _attributed(self, status: NodeStatus) -> NodeStatus:
        return msgspec.structs.replace(status, gpus=with_owners(status.gpus, self._owners))

    def _wake_readers(self) -> None:
        """Wake those who wait now; who comes later waits for the next sample."""
        self._published.set()
        self._published = asyncio.Event()


def _stale(sample: GpuSample, age_s: float, *, never: bool) -> GpuSample:
    """The last figures of a driver that hangs: kept, but not trusted."""
    if never:
        text = f"the GPU driver has not answered since the agent started {age_s:.0f} s ago"
    else:
        text = f"the GPU driver hangs: GPU figures are {age_s:.0f} s old"
    return msgspec.structs.replace(
        sample,
        gpus=tuple(msgspec.structs.replace(gpu, health=GpuHealth.UNKNOWN) for gpu in sample.gpus),
        warnings=(*sample.warnings, text),
    )
