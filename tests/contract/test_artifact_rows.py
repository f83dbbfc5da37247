"""What artifacts need of a store, and what is left of them after the death of the process."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from controlplane.artifacts import Artifact, Artifacts, Rows
from controlplane.jobs import Jobs
from controlplane.store import ArtifactRows, JobStore
from rung.errors import UnknownArtifactError
from rung.types import Job, JobKind, JobState
from tests.fakes.artifacts import MemoryRows

#: Takes two pieces of one artifact after another one that is whole, and waits where it is told to.
CHILD = """
import asyncio, sys
from pathlib import Path
from controlplane.artifacts import Artifacts
from controlplane.jobs import Jobs
from controlplane.store import ArtifactRows, JobStore
from rung.types import ArtifactChunk, JobKind, Policy

class Waiting(ArtifactRows):
    async def add(self, artifact):
        if artifact.size_bytes == 6:
            await wait()
        await super().add(artifact)

async def wait():
    print("here", flush=True)
    await asyncio.Event().wait()

async def main(folder, place):
    store = await JobStore.open(folder / "rung.db")
    artifacts = Artifacts(folder / "artifacts", Waiting(store))
    await artifacts.start()
    jobs = Jobs(store, artifacts=artifacts)
    job = jobs.open(kind=JobKind.IMAGE, model="m", policy=Policy())
    async with artifacts.collector(job) as collector:
        await collector.take(ArtifactChunk("0", "image/png", 0, b"whole", size_bytes=5))
        await jobs.store_now()
        await collector.take(ArtifactChunk("1", "image/png", 0, b"abc", size_bytes=6))
        if place == "half":
            await wait()
        await collector.take(ArtifactChunk("1", "image/png", 3, b"def"))

asyncio.run(main(Path(sys.argv[1]), sys.argv[2]))
"""


def artifact(number: int, job_id: str = "job-1") -> Artifact:
    return Artifact(f"artifact-{number:022x}", job_id, "image/png", 5 * number, "00", 7.5)


@pytest.fixture(params=["sqlite", "memory"])
async def rows(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Rows]:
    if request.param == "memory":
        memory = MemoryRows()
        memory.jobs = {"job-1"}
        yield memory
        return
    store = await JobStore.open(tmp_path / "rung.db")
    ended = Job(id="job-1", kind=JobKind.IMAGE, state=JobState.DONE, model="m", create_time_s=1.0)
    await store.write([ended], [])
    yield ArtifactRows(store)
    await store.aclose()


async def test_what_was_added_is_found_by_id_by_job_and_in_order(rows: Rows) -> None:
    first, second, third = artifact(1), artifact(2, "job-2"), replace(artifact(3), seed=2**63 - 1)
    for each in (third, first, second):
        await rows.add(each)

    assert await rows.get(first.id) == first
    assert await rows.get("artifact-9") is None
    assert await rows.of_job("job-1") == [first, third]
    assert await rows.all() == [first, second, third]


async def test_orphans_are_those_whose_job_is_not_stored(rows: Rows) -> None:
    for each in (artifact(1), artifact(2, "job-2"), artifact(3, "job-3")):
        await rows.add(each)

    assert await rows.orphans() == [artifact(2, "job-2"), artifact(3, "job-3")]


async def test_any_number_is_deleted_and_what_is_not_there_does_not_matter(rows: Rows) -> None:
    many = [artifact(number) for number in range(1, 600)]
    for each in many:
        await rows.add(each)
    await rows.delete([*(each.id for each in many[1:]), "artifact-9"])
    await rows.delete([])

    assert await rows.all() == many[:1]


@pytest.mark.parametrize("place", ["half", "whole, without a row"])
async def test_a_process_that_is_killed_leaves_nothing_half(tmp_path: Path, place: str) -> None:
    child = await asyncio.create_subprocess_exec(
        sys.executable,
        "-c",
        CHILD,
        str(tmp_path),
        place,
        stdout=asyncio.subprocess.PIPE,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.stdout is not None
    assert await child.stdout.readline() == b"here\n"
    assert len(list((tmp_path / "artifacts").iterdir())) == 2
    child.send_signal(signal.SIGKILL)
    await child.communicate()

    store = await JobStore.open(tmp_path / "rung.db")
    artifacts = Artifacts(tmp_path / "artifacts", ArtifactRows(store))
    await artifacts.start()
    jobs = Jobs(store, artifacts=artifacts)
    await jobs.start()
    await artifacts.expire()

    (job,) = await jobs.list(page_size=9)
    (whole,) = await artifacts.of_job(job.id)
    assert await artifacts.read(whole.id, 0, 9) == b"whole"
    assert [path.name for path in (tmp_path / "artifacts").iterdir()] == [whole.id]
    await jobs.drain(0.0)
    await store.aclose()


async def test_deleting_the_record_of_a_job_deletes_its_artifacts(tmp_path: Path) -> None:
    store = await JobStore.open(tmp_path / "rung.db")
    for number in (1, 2):
        job = Job(id=f"job-{number}", kind=JobKind.IMAGE, state=JobState.DONE, model="m", create_time_s=1.0)
        await store.write([replace(job, end_time_s=10.0 * number)], [])
    rows = ArtifactRows(store)
    artifacts = Artifacts(tmp_path / "artifacts", rows, now_s=lambda: 7.5)
    await artifacts.start()
    for number in (1, 2):
        await rows.add(artifact(number, f"job-{number}"))
        (artifacts.directory / artifact(number).id).write_bytes(bytes(5 * number))

    await store.delete_ended_before(15.0)
    await artifacts.expire()

    with pytest.raises(UnknownArtifactError):
        await artifacts.get(artifact(1).id)
    assert [path.name for path in artifacts.directory.iterdir()] == [artifact(2).id]
    await store.aclose()
