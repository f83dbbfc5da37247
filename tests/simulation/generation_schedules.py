"""One random schedule of pictures: targets, faults, cancellations and readers drawn from a seed.

All of the control plane's way to a picture is real, in virtual time, and so are the encoders of each stream.
`python -m tests.simulation.generation_schedules SEED` replays one and tells what happened.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import random
import sys
import tempfile
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from controlplane.artifacts import Artifacts
from controlplane.estimates import Estimates
from controlplane.fleet import LifecycleAction, NodeSchedulers, log_alert
from controlplane.gateway._generate_stream import GenerateStreamRoutes
from controlplane.gateway._generations import Followed, Follower
from controlplane.gateway._jobs import ndjson_event, sse_event
from controlplane.jobs import Jobs
from controlplane.ladder import Modality, RungSpec, build_ladder
from controlplane.pipelines import Pipelines, Slots, Wish
from controlplane.pipelines.image import Artist, ImagePipeline, Rooms
from controlplane.simulation import VirtualTimeLoop
from controlplane.stages import Stages
from controlplane.vram import Demand, Granted
from controlplane.workflows import DEFAULT_TIERS, Workflows
from rung.errors import RungError
from rung.service import EngineClient
from rung.types import (
    TERMINAL_EVENTS,
    ImageInput,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    Policy,
    Priority,
    ReclaimGrade,
)
from tests.fakes.artifacts import MemoryRows
from tests.fakes.direct_agent import GIB, DirectFleet
from tests.fakes.simulated_pool import BrokenInvariantError
from tests.fakes.store import MemoryStore
from tests.simulation.generation_world import (
    CLOUD,
    COMFYUI,
    IDLE_TIMEOUT_S,
    REASONER,
    SANA,
    Moody,
    Painter,
    World,
)
from tests.simulation.streams import (
    Line,
    broken,
    check_log,
    check_short,
    check_stream,
    log_of,
    of_ndjson,
    of_proto,
    of_short,
    of_sse,
)

#: No job takes longer, whatever happens: each of its targets is waited for with an end.
LONGEST_JOB_S = 600.0
#: A job that was told to end does, so soon.
LONGEST_ENDING_S = 20.0
#: Where files are made durable for nothing.
_MEMORY_DISK = "/dev/shm" if os.path.isdir("/dev/shm") else None

_WORKFLOWS = Workflows()

#: What is told about a schedule: time, what happened.
Teller = Callable[[float, str], None]


class DiskLoop(VirtualTimeLoop):
    """A virtual clock with a disk: what is done in threads is done at once, and known a moment later."""

    disk_s: Callable[[], float] = staticmethod(lambda: 0.0)

    def run_in_executor(self, executor: Any, func: Any, *args: Any) -> Any:  # type: ignore[override]  # any function
        """See `asyncio`."""
        result = self.create_future()
        try:
            value, error = func(*args), None
        except Exception as caught:  # noqa: BLE001 - it is for who waits
            value, error = None, caught

        def tell() -> None:
            if result.done():
                return
            if error is not None:
                result.set_exception(error)
            else:
                result.set_result(value)

        self.call_later(self.disk_s(), tell)
        return result


class Schedule:
    """What happens, drawn from a seed."""

    def __init__(self, seed: int, folder: Path, tell: Teller | None = None) -> None:
        self._rng = rng = random.Random(seed)
        self._tell = tell
        self._loop = asyncio.get_running_loop()
        self._world = World(rng)
        self._slots = Slots()
        specs = (COMFYUI, REASONER, SANA)
        self._fleet = DirectFleet(
            self._world.agents, specs, seed, load=self._slots.load, drained=self._slots.drained
        )
        self._schedulers = NodeSchedulers(self._fleet, idle_s=lambda _: 60.0, alert=log_alert)
        self._fleet.make_awake = self._schedulers.make_awake
        self._rows = MemoryRows()
        self._folder = folder
        self._artifacts = Artifacts(folder, self._rows)
        self._jobs = Jobs(MemoryStore(), artifacts=self._artifacts, monotonic_s=self._loop.time)
        targets = rng.sample([COMFYUI.id, COMFYUI.id, SANA.id, CLOUD], rng.choice([1, 2, 3]))
        painter = Painter(self._world)
        self._pipelines = Pipelines(
            jobs=self._jobs,
            fleet=self._fleet,
            schedulers=self._schedulers,
            slots=self._slots,
            client=EngineClient(),
            registry=CollectorRegistry(),
            ladder=build_ladder(
                [RungSpec(name="pictures", modality=Modality.IMAGE, chain="pictures")],
                {"pictures": list(dict.fromkeys(targets))},
            ),
            cloud=painter,
        )
        self._pipelines.add(self._image_pipeline(painter), JobKind.IMAGE, JobKind.VIDEO)
        follower = Follower(self._jobs, self._pipelines)
        self._follower = follower
        self._routes = GenerateStreamRoutes(follower, self._artifacts)
        self._is_draining = False
        self.outcomes: Counter[str] = Counter()

    def _image_pipeline(self, painter: Painter) -> ImagePipeline:
        moody = Moody(self._rng, self._world.fault_share)
        estimates = Estimates()
        return ImagePipeline(
            router=self._pipelines.router,
            engager=self._pipelines.engager,
            artist=Artist(
                fleet=self._fleet,
                slots=self._slots,
                engager=self._pipelines.engager,
                rooms=Rooms(self._fleet, self._schedulers, estimates),
                artifacts=self._artifacts,
                estimates=estimates,
                cloud=painter,
                idle_timeout_s=IDLE_TIMEOUT_S,
            ),
            workflows=_WORKFLOWS,
            tiers=DEFAULT_TIERS,
            stages=Stages(moody, moody),
            choose=random.Random(1),
        )

    async def run(self) -> None:
        """Live through it.

        Raises:
            BrokenInvariantError: an invariant does not hold.
        """
        rng = self._rng
        await self._artifacts.start()
        await self._jobs.start()
        await self._fleet.start()
        self._schedulers.start()
        await asyncio.sleep(0.1)
        around = [asyncio.create_task(self._world.tick())]
        around += [asyncio.create_task(self._disturb()) for _ in range(rng.choice([0, 0, 1, 2, 3]))]
        if rng.random() < 0.06:
            around.append(asyncio.create_task(self._drain()))
        try:
            async with asyncio.timeout(LONGEST_JOB_S), asyncio.TaskGroup() as callers:
                for _ in range(rng.choice([1, 1, 1, 2])):
                    callers.create_task(self._caller())
        except TimeoutError:
            broken("a job never ends")
        self._check_let_go()
        for task in around:
            task.cancel()
        for ended in await asyncio.gather(*around, return_exceptions=True):
            if isinstance(ended, Exception):
                raise ended
        await self._close()
        self._check_left()

    async def _close(self) -> None:
        await self._jobs.drain(0.0)
        await self._pipelines.aclose()
        await self._schedulers.aclose()
        await self._fleet.aclose()
        await self._artifacts.aclose()
        await asyncio.sleep(0.1)

    # Who calls, and who reads.

    async def _caller(self) -> None:
        rng = self._rng
        await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 5.0)]))
        wish = Wish(
            kind=JobKind.IMAGE,
            model="",
            input=ImageInput(
                prompt="a cat", tier=rng.choice(["lightning", "quality", "ultra"]), previews=True
            ),
            policy=Policy(priority=rng.choice(list(Priority)), bridge_allowed=rng.random() < 0.2),
        )
        try:
            followed = await self._follower.begin(wish, with_previews=rng.random() < 0.5)
        except RungError as error:
            self.outcomes[error.reason] += 1
            return
        begun_s = self._loop.time()
        job_id = followed.job_id
        readers: list[Coroutine[Any, Any, list[Line]]] = [
            self._read_at_once(job_id, begun_s),
            self._read_late(job_id),
            self._read_resuming(job_id),
            self._read_stalled(job_id),
        ]
        ending = asyncio.create_task(self._end_early(followed)) if rng.random() < 0.3 else None
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(reader) for reader in readers]
            await self._read_short(followed, begun_s)
        if ending is not None:
            ending.cancel()
            await asyncio.gather(ending, return_exceptions=True)
        logs = [log_of(task.result()) for task in tasks]
        if any(log != logs[0] for log in logs):
            broken("readers do not agree on the log")
        lines = tasks[0].result()
        check_log(lines)
        await self._check_end(job_id, lines)

    async def _read_short(self, followed: Followed, begun_s: float) -> None:
        lines: list[Line] = []
        cut_s = self._rng.uniform(0.0, 30.0) if self._rng.random() < 0.08 else float("inf")
        async with followed, aclosing(self._routes.lines(followed)) as texts:
            async for text in texts:
                lines.append(of_short(self._loop.time(), text))
                self._say(text.decode().strip())
                if self._loop.time() - begun_s > cut_s:
                    # The connection is gone: leaving ends the job.
                    break
            else:
                check_short(lines, begun_s)

    async def _read_at_once(self, job_id: str, begun_s: float) -> list[Line]:
        """Over gRPC, with the data of artifacts."""
        lines: list[Line] = []
        read: dict[str, bytes] = {}
        async for event in self._jobs.watch(job_id, with_data=True):
            line = of_proto(self._loop.time(), event)
            lines.append(line)
            self._follow_data(line, read)
            if isinstance(line.payload, TERMINAL_EVENTS) and not self._is_draining:
                self._check_no_lease(job_id)
        check_stream(lines, begun_s)
        return lines

    def _follow_data(self, line: Line, read: dict[str, bytes]) -> None:
        """What comes with its data is what its hash says."""
        chunk = line.payload
        if getattr(chunk, "preview", True) or chunk is None:
            return
        artifact_id, data, sha256 = chunk.artifact_id, chunk.data, chunk.sha256  # type: ignore[union-attr]  # it is a piece
        read[artifact_id] = read.get(artifact_id, b"") + data
        if sha256 and hashlib.sha256(read[artifact_id]).hexdigest() != sha256:
            broken(f"{artifact_id} was read, and has another hash")

    async def _read_late(self, job_id: str) -> list[Line]:
        """As server-sent events, from the beginning, later."""
        await asyncio.sleep(self._rng.uniform(0.0, 40.0))
        begun_s = self._loop.time()
        lines = [of_sse(self._loop.time(), sse_event(each)) async for each in self._jobs.watch(job_id)]
        check_stream(lines, begun_s)
        return lines

    async def _read_resuming(self, job_id: str) -> list[Line]:
        """As NDJSON, over connections that break; goes on after what it had last."""
        lines: list[Line] = []
        while not (lines and isinstance(lines[-1].payload, TERMINAL_EVENTS)):
            after = max((line.sequence for line in lines), default=0)
            some = self._rng.choice([1, 5, 20, 1000])
            begun_s = self._loop.time()
            part = [
                of_ndjson(self._loop.time(), ndjson_event(event))
                async for event in self._first(self._jobs.watch(job_id, after), some)
            ]
            if part and isinstance(part[-1].payload, TERMINAL_EVENTS):
                check_stream(part, begun_s, after=after)
            lines += part
            await asyncio.sleep(self._rng.choice([0.0, 0.3, 5.0]))
        check_stream(lines, 0.0, is_timely=False)
        return lines

    async def _read_stalled(self, job_id: str) -> list[Line]:
        """As server-sent events, of which the second is read once the job has long ended."""
        events = self._jobs.watch(job_id)
        first = await anext(events)
        async for _ in self._jobs.watch(job_id):
            pass
        await asyncio.sleep(1.0)
        lines = [of_sse(0.0, sse_event(first))]
        lines += [of_sse(0.0, sse_event(event)) async for event in events]
        check_stream(lines, 0.0, is_timely=False)
        return lines

    async def _first(self, events: AsyncIterator[JobEvent], count: int) -> AsyncGenerator[JobEvent, None]:
        async for event in events:
            yield event
            count -= 1
            if not count:
                return

    # What else happens.

    async def _end_early(self, followed: Followed) -> None:
        """It is cancelled at any moment; then it ends soon."""
        rng = self._rng
        await asyncio.sleep(rng.choice([0.0, rng.uniform(0.0, 3.0), rng.uniform(0.0, 30.0)]))
        await self._jobs.cancel(followed.job_id, self._rng.choice(["caller", "operator"]))
        await asyncio.sleep(LONGEST_ENDING_S)
        if not (await self._jobs.get(followed.job_id)).state.ended:
            broken("a job that was cancelled goes on")

    async def _drain(self) -> None:
        await asyncio.sleep(self._rng.uniform(0.0, 30.0))
        self._is_draining = True
        self._say("draining")
        await self._jobs.drain(self._rng.uniform(0.0, 10.0))

    async def _disturb(self) -> None:
        rng = self._rng
        while True:
            await asyncio.sleep(rng.uniform(0.0, 20.0))
            what = rng.choice([self._lose, self._stop, self._lease, self._wake, self._revoke, self._take])
            self._say(f"{what.__name__}")
            with suppress(RungError):
                await what()

    async def _lose(self) -> None:
        self._world.lose(self._rng.choice(self._world.agents))

    async def _stop(self) -> None:
        """An operator stops or puts to sleep what may be needed."""
        name = self._rng.choice([COMFYUI.id, SANA.id, REASONER.id])
        action = LifecycleAction.SLEEP if name == REASONER.id else LifecycleAction.STOP
        operation_id = f"operator-{self._rng.getrandbits(32)}"
        async for _ in self._fleet.lifecycle(action, name, operation_id):
            pass

    async def _wake(self) -> None:
        """Somebody needs the reasoner."""
        async with aclosing(self._schedulers.make_awake(REASONER.id)) as steps:
            async for _ in steps:
                pass

    async def _lease(self) -> None:
        """Another job takes memory for a while."""
        rng = self._rng
        scheduler = self._schedulers.of_node("workstation")
        demand = Demand(
            vram_bytes=rng.randrange(GIB, 20 * GIB),
            priority=rng.choice(list(Priority)),
            max_grade=ReclaimGrade.FULL,
            holder="another",
        )
        operation_id = f"another-{rng.getrandbits(32)}"
        events = scheduler.acquire("workstation/0", demand, ttl_s=20.0, operation_id=operation_id)
        async with aclosing(events):
            async for event in events:
                if isinstance(event, Granted):
                    await asyncio.sleep(rng.uniform(0.0, 10.0))
                    scheduler.release(event.lease.id)

    async def _revoke(self) -> None:
        """A lease is lost under who holds it."""
        for scheduler in self._schedulers.all:
            for lease in scheduler.leases:
                scheduler.release(lease.id)

    async def _take(self) -> None:
        """A desktop takes memory that nobody granted."""
        self._world.workstation.outside_bytes = self._rng.randrange(6 * GIB)
        self._world.workstation.tick()

    # The invariants.

    async def _check_end(self, job_id: str, lines: list[Line]) -> None:
        if (await self._jobs.get(job_id)).last_sequence != lines[-1].sequence:
            broken("something was added after the end")
        match lines[-1].payload:
            case JobDone():
                self.outcomes["done"] += 1
                artifacts = await self._artifacts.of_job(job_id)
                if not artifacts:
                    broken("done, and nothing is stored")
                for artifact in artifacts:
                    data = (self._folder / artifact.id).read_bytes()
                    if hashlib.sha256(data).hexdigest() != artifact.sha256:
                        broken("what is stored has another hash")
                    if artifact.sha256 not in self._world.hashes:
                        broken("what is stored is not what was sent")
            case JobFailed(reason, detail):
                self.outcomes[reason.value] += 1
                if "internal error" in detail:
                    broken(detail)
            case JobCancelled(by):
                self.outcomes[by] += 1

    def _check_no_lease(self, job_id: str) -> None:
        for scheduler in self._schedulers.all:
            for lease in scheduler.leases:
                if lease.operation_id.startswith(job_id):
                    broken(f"the job has ended, and holds {lease}")

    def _check_let_go(self) -> None:
        """Nobody draws any more: no slot is held, and no engine is at work."""
        for deployment_id in (COMFYUI.id, SANA.id):
            if self._slots.load(deployment_id) != (0, 0):
                broken(f"slots of {deployment_id} that are still held: {self._slots.load(deployment_id)}")
        for agent in self._world.agents:
            if agent.generations:
                broken(f"{agent.generations} generations go on at {agent.node_id}")

    def _check_left(self) -> None:
        """Nothing is left behind."""
        left = asyncio.all_tasks() - {asyncio.current_task()}
        if left:
            broken(f"tasks that never end: {left}")
        files = set(os.listdir(self._folder))
        if files != self._rows.kept.keys():
            broken(f"files {files}, and rows {set(self._rows.kept)}")

    def _say(self, what: str) -> None:
        if self._tell is not None:
            self._tell(self._loop.time(), what)


def play(seed: int, tell: Teller | None = None) -> Schedule:
    """Live through the schedule of a seed.

    Raises:
        Exception: an invariant does not hold, or the pipeline broke.
    """

    async def run() -> Schedule:
        with tempfile.TemporaryDirectory(dir=_MEMORY_DISK) as folder:
            schedule = Schedule(seed, Path(folder) / "artifacts", tell)
            await schedule.run()
        return schedule

    disk = random.Random(seed)
    with asyncio.Runner(loop_factory=DiskLoop) as runner:
        loop = runner.get_loop()
        assert isinstance(loop, DiskLoop)
        loop.disk_s = lambda: disk.uniform(0.0, 0.01)
        return runner.run(run())


def cause_of(error: BaseException) -> BaseException:
    """The first of the errors of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    try:
        found = play(int(sys.argv[1]), tell=lambda now_s, what: print(f"{now_s - 1000:8.3f} {what}"))
    except (BrokenInvariantError, BaseExceptionGroup) as error:
        sys.exit(f"{cause_of(error)}")
    print(found.outcomes)
