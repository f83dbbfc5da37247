"""Artifacts: collected as engines make them, kept for a while, and never half."""

from __future__ import annotations

import asyncio
import hashlib
import os
import resource
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest
from msgspec.structs import replace

from controlplane.artifacts import PIECE_BYTES, Artifact, Artifacts
from controlplane.jobs import LiveJob
from rung.errors import (
    ArtifactNotStoredError,
    EngineProtocolError,
    OutOfRangeError,
    UnavailableError,
    UnknownArtifactError,
)
from rung.types import ArtifactChunk, artifact_file_name
from tests.fakes.artifacts import MemoryRows, a_job, some_artifacts

DAY_S = 24 * 3600.0


@pytest.fixture
async def rows() -> MemoryRows:
    return MemoryRows()


@pytest.fixture
async def artifacts(rows: MemoryRows) -> AsyncIterator[Artifacts]:
    async with some_artifacts(rows=rows) as found:
        yield found


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def last(data: bytes, *, offset: int = 0, of: bytes | None = None, artifact_id: str = "0") -> ArtifactChunk:
    whole = data if of is None else of
    return ArtifactChunk(artifact_id, "image/png", offset, data, sha256(whole), len(whole))


def piece(data: bytes, *, offset: int = 0, size: int = 0, artifact_id: str = "0") -> ArtifactChunk:
    return ArtifactChunk(artifact_id, "image/png", offset, data, size_bytes=size)


def told(job: LiveJob) -> list[ArtifactChunk]:
    events = job.kept_after(0) or []
    return [event.payload for event in events if isinstance(event.payload, ArtifactChunk)]


def files(artifacts: Artifacts) -> list[str]:
    return sorted(path.name for path in artifacts.directory.iterdir())


async def kept(artifacts: Artifacts, data: bytes, job: LiveJob | None = None) -> Artifact:
    async with artifacts.collector(job or a_job()) as collector:
        await collector.take(last(data))
    return collector.artifacts[0]


async def test_what_an_engine_makes_is_kept_whole_and_told_without_its_bytes(
    artifacts: Artifacts, rows: MemoryRows
) -> None:
    job = a_job()
    async with artifacts.collector(job) as collector:
        await collector.take(piece(b"abc", size=5))
        await collector.take(last(b"de", offset=3, of=b"abcde"))
        first, second = told(job)

        assert not first.data
        assert (first.offset_bytes, first.length_bytes, first.size_bytes, first.sha256) == (0, 3, 5, "")
        assert (second.offset_bytes, second.length_bytes, second.sha256) == (3, 2, sha256(b"abcde"))
    (made,) = collector.artifacts
    assert made == Artifact(first.artifact_id, job.id, "image/png", 5, sha256(b"abcde"), 1_000_000.0)
    assert (await artifacts.get(made.id), await artifacts.of_job(job.id)) == (made, [made])
    assert await artifacts.read(made.id, 1, 100) == b"bcde"
    assert files(artifacts) == [made.id]


async def test_a_piece_of_any_length_is_told_in_pieces_that_fit_a_message(artifacts: Artifacts) -> None:
    job, data = a_job(), bytes(2 * PIECE_BYTES + 1)
    async with artifacts.collector(job) as collector:
        await collector.take(last(data))

    assert [(each.offset_bytes, each.length_bytes) for each in told(job)] == [
        (0, PIECE_BYTES),
        (PIECE_BYTES, PIECE_BYTES),
        (2 * PIECE_BYTES, 1),
    ]
    assert [bool(each.sha256) for each in told(job)] == [False, False, True]


async def test_a_stream_of_unknown_length_is_whole_when_its_engine_is_done(artifacts: Artifacts) -> None:
    job = a_job()
    async with artifacts.collector(job) as collector:
        await collector.take(piece(b"so "))
        await collector.take(piece(b"far", offset=3))
        assert await artifacts.of_job(job.id) == []

    (made,) = collector.artifacts
    end = told(job)[-1]
    assert (end.offset_bytes, end.length_bytes, end.size_bytes, end.sha256) == (6, 0, 6, sha256(b"so far"))
    assert made.sha256 == end.sha256


async def test_artifacts_may_be_made_side_by_side_and_by_several_attempts(artifacts: Artifacts) -> None:
    job = a_job()
    for _ in range(2):
        async with artifacts.collector(job) as collector:
            await collector.take(piece(b"le", artifact_id="left"))
            await collector.take(last(b"right", artifact_id="right"))
            await collector.take(last(b"ft", offset=2, of=b"left", artifact_id="left"))

    made = await artifacts.of_job(job.id)
    assert len({each.id for each in made}) == 4
    assert sorted([await artifacts.read(each.id, 0, 9) for each in made]) == [
        b"left",
        b"left",
        b"right",
        b"right",
    ]


async def test_what_is_told_can_be_read_at_once(artifacts: Artifacts) -> None:
    job = a_job()
    async with artifacts.collector(job) as collector:
        await collector.take(piece(b"half", size=8))

        assert await artifacts.read(told(job)[0].artifact_id, 0, 4) == b"half"
        with pytest.raises(UnknownArtifactError):
            await artifacts.get(told(job)[0].artifact_id)
        await collector.take(last(b"done", offset=4, of=b"halfdone"))


@pytest.mark.parametrize(
    "chunks",
    [
        pytest.param([replace(last(b"abc"), sha256=sha256(b"xyz"))], id="another SHA-256"),
        pytest.param([replace(last(b"abc"), size_bytes=4)], id="shorter than claimed with its end"),
        pytest.param([piece(b"abc", size=4)], id="shorter than claimed"),
        pytest.param([piece(b"abc", size=2)], id="longer than claimed"),
        pytest.param([piece(b"abc"), piece(b"def", offset=4)], id="with a gap"),
        pytest.param([piece(b"abc", size=9), piece(b"def", offset=3, size=8)], id="two sizes"),
        pytest.param([piece(b"", size=0)], id="empty"),
    ],
)
async def test_what_is_not_as_claimed_is_the_engines_fault_and_leaves_nothing(
    artifacts: Artifacts, rows: MemoryRows, chunks: list[ArtifactChunk]
) -> None:
    async def collect() -> None:
        async with artifacts.collector(a_job()) as collector:
            for chunk in chunks:
                await collector.take(chunk)

    with pytest.raises(EngineProtocolError):
        await collect()

    assert files(artifacts) == []
    assert rows.kept == {}


async def test_an_artifact_that_ended_does_not_go_on(artifacts: Artifacts) -> None:
    async with artifacts.collector(a_job()) as collector:
        await collector.take(last(b"abc"))
        with pytest.raises(EngineProtocolError, match="had ended"):
            await collector.take(piece(b"d", offset=3))


async def test_a_failed_attempt_keeps_what_is_whole_and_nothing_else(artifacts: Artifacts) -> None:
    async def fail() -> None:
        async with artifacts.collector(job) as collector:
            await collector.take(last(b"first", artifact_id="0"))
            await collector.take(piece(b"sec", artifact_id="1"))
            raise UnavailableError("the engine is gone")

    job = a_job()
    with pytest.raises(UnavailableError, match="gone"):
        await fail()

    (whole,) = await artifacts.of_job(job.id)
    assert files(artifacts) == [whole.id]


async def test_an_attempt_has_told_something_once_a_piece_is_in_the_log(artifacts: Artifacts) -> None:
    job = a_job()
    refused = artifacts.collector(job)
    await refused.take(replace(piece(b"blurred"), preview=True))
    with pytest.raises(EngineProtocolError, match="byte 5"):
        await refused.take(piece(b"late", offset=5, artifact_id="1"))
    assert not refused.has_told
    async with artifacts.collector(job) as taken:
        await taken.take(piece(b"in time"))
        assert taken.has_told


async def test_a_caller_that_is_cancelled_while_the_row_is_stored_leaves_nothing(
    artifacts: Artifacts, rows: MemoryRows
) -> None:
    async def collect() -> None:
        async with artifacts.collector(a_job()) as collector:
            await collector.take(last(b"abc"))

    rows.gate.clear()
    task = asyncio.create_task(collect())
    await rows.adding.wait()
    assert len(files(artifacts)) == len(rows.kept) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert files(artifacts) == []
    assert rows.kept == {}


async def test_a_full_disk_is_told_and_leaves_nothing(artifacts: Artifacts, rows: MemoryRows) -> None:
    async def collect() -> None:
        async with artifacts.collector(a_job()) as collector:
            await collector.take(piece(bytes(600_000)))
            await collector.take(last(bytes(600_000), offset=600_000, of=bytes(1_200_000)))

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, hard))
    try:
        with pytest.raises(ArtifactNotStoredError, match="File too large"):
            await collect()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    assert files(artifacts) == []
    assert rows.kept == {}


async def test_a_store_that_fails_is_no_fault_of_the_engine(artifacts: Artifacts, rows: MemoryRows) -> None:
    rows.failing = True
    with pytest.raises(ArtifactNotStoredError, match="disk is full"):
        await kept(artifacts, b"abc")

    assert files(artifacts) == []


async def test_one_larger_than_all_may_be_is_refused_by_its_first_piece() -> None:
    async with some_artifacts(max_bytes=10) as artifacts:
        with pytest.raises(ArtifactNotStoredError, match=r"artifacts\.max_bytes"):
            async with artifacts.collector(a_job()) as collector:
                await collector.take(piece(b"a", size=11))
        with pytest.raises(ArtifactNotStoredError):
            await kept(artifacts, bytes(11))
        assert files(artifacts) == []


async def test_a_preview_is_passed_on_and_only_the_newest_is_held(artifacts: Artifacts) -> None:
    job = a_job()
    async with artifacts.collector(job) as collector:
        for data in (b"blurred", b"clearer"):
            await collector.take(replace(piece(data), preview=True))

        assert [(each.data, each.length_bytes, each.preview) for each in told(job)] == [
            (b"", 7, True),
            (b"clearer", 7, True),
        ]
        await collector.take(last(b"clear"))
    job.done("stop")
    assert [each.data for each in told(job)] == [b"", b"", b""]
    assert len({each.artifact_id for each in told(job)}) == 1
    assert len(files(artifacts)) == 1


async def test_who_makes_an_artifact_does_not_wait_for_those_who_read(artifacts: Artifacts) -> None:
    stuck = artifacts.directory / ("artifact-" + "0" * 22)
    os.mkfifo(stuck)
    reading = [asyncio.create_task(artifacts.read(stuck.name, 0, 1)) for _ in range(200)]
    await asyncio.sleep(0)

    try:
        making = asyncio.create_task(kept(artifacts, b"abc"))
        await asyncio.wait({making}, timeout=20)
        assert making.done()
        assert not any(task.done() for task in reading)
    finally:
        # A pipe is no file: they end with an error once somebody has it open.
        opened = os.open(stuck, os.O_RDWR)
        results = await asyncio.gather(*reading, return_exceptions=True)
        os.close(opened)
    assert {type(result) for result in results} == {UnavailableError}


async def test_a_job_that_has_ended_is_told_nothing_more(artifacts: Artifacts) -> None:
    job = a_job()
    async with artifacts.collector(job) as collector:
        await collector.take(piece(b"abc"))
        job.cancelled("drain")
        await collector.take(piece(b"def", offset=3))

    events = job.kept_after(0) or []
    assert events[-1].payload is job.terminal


async def test_a_reader_goes_on_when_its_artifact_is_deleted(artifacts: Artifacts, rows: MemoryRows) -> None:
    data = bytes(range(256)) * 4096
    job = a_job()
    made = await kept(artifacts, data, job)
    job.done("stop")
    job.stored(job.last_sequence)
    rows.jobs = set()
    received = b""
    async with aclosing(artifacts.pieces(made.id)) as pieces:
        async for each in pieces:
            received += each
            await artifacts.expire()
            assert files(artifacts) == []

    assert received == data
    with pytest.raises(UnknownArtifactError):
        await artifacts.read(made.id, 0, 1)


async def test_what_it_was_made_with_is_told_with_the_last_piece_and_kept(artifacts: Artifacts) -> None:
    job = a_job()
    async with artifacts.collector(job, 0) as collector:
        await collector.take(piece(b"abc", size=5))
        await collector.take(last(b"de", offset=3, of=b"abcde"))

    assert [each.seed for each in told(job)] == [None, 0]
    (made,) = await artifacts.of_job(job.id)
    assert made.seed == 0
    assert [each.seed async for each in artifacts.chunks(made.id)] == [0]


async def test_an_artifact_can_be_fetched_from_any_place(artifacts: Artifacts) -> None:
    data = bytes(range(256)) * 2048
    made = await kept(artifacts, data)

    async def chunks(offset: int) -> list[ArtifactChunk]:
        return [chunk async for chunk in artifacts.chunks(made.id, offset)]

    whole, rest, end = await chunks(0), await chunks(300_000), await chunks(len(data))
    assert b"".join(chunk.data for chunk in whole) == data
    assert [chunk.sha256 for chunk in whole] == ["", made.sha256]
    assert max(len(chunk.data) for chunk in whole) == PIECE_BYTES
    assert b"".join(chunk.data for chunk in rest) == data[300_000:]
    assert [(chunk.data, chunk.sha256) for chunk in end] == [(b"", made.sha256)]
    with pytest.raises(OutOfRangeError):
        await chunks(len(data) + 1)
    (artifacts.directory / made.id).write_bytes(data[:10])
    with pytest.raises(UnavailableError, match="cut short"):
        await chunks(0)


@pytest.mark.parametrize("name", ["../rung.db", "artifact-1", "", "artifact-" + "0" * 22 + ".part"])
async def test_no_name_leads_out_of_the_directory(artifacts: Artifacts, name: str) -> None:
    (artifacts.directory.parent / "rung.db").write_bytes(b"secret")
    with pytest.raises(UnknownArtifactError):
        await artifacts.read(name, 0, 10)
    with pytest.raises(UnknownArtifactError):
        await anext(artifacts.pieces(name))


async def test_old_ones_and_those_of_deleted_jobs_go_but_none_of_a_running_job() -> None:
    rows, now_s = MemoryRows(), [0.0]
    running, deleted, stored = a_job("job-1"), a_job("job-2"), a_job("job-3")
    async with some_artifacts(rows=rows, now_s=lambda: now_s[0], retention_s=7 * DAY_S) as artifacts:
        of_running = await kept(artifacts, b"running", running)
        await kept(artifacts, b"deleted", deleted)
        await kept(artifacts, b"old", stored)
        now_s[0] = 8 * DAY_S
        of_stored = await kept(artifacts, b"young", stored)
        rows.jobs = {"job-3"}
        for job in (deleted, stored):
            job.done("stop")
        await artifacts.expire()
        assert len(rows.kept) == 4, "jobs whose end is not stored are not known to be deleted"

        for job in (deleted, stored):
            job.stored(job.last_sequence)
        await artifacts.expire()

        assert set(rows.kept) == {of_running.id, of_stored.id} == set(files(artifacts))


async def test_beyond_the_limit_the_oldest_go() -> None:
    rows = MemoryRows()
    async with some_artifacts(rows=rows, max_bytes=1000) as artifacts:
        running = await kept(artifacts, bytes(300), a_job("job-0"))
        made = []
        for number in range(1, 4):
            job = a_job(f"job-{number}")
            made.append(await kept(artifacts, bytes(300), job))
            job.done("stop")
            job.stored(job.last_sequence)
        await artifacts.aclose()

        assert set(rows.kept) == {running.id, made[1].id, made[2].id} == set(files(artifacts))


async def test_a_start_sweeps_what_is_half_and_leaves_what_is_not_ours(tmp_path: Path) -> None:
    rows = MemoryRows()
    first = Artifacts(tmp_path / "artifacts", rows)
    await first.start()
    whole, cut, lost = [await kept(first, bytes(100)) for _ in range(3)]
    (first.directory / cut.id).write_bytes(b"short")
    (first.directory / lost.id).unlink()
    (first.directory / ("artifact-" + "0" * 22)).write_bytes(b"without a row")
    (first.directory / ("artifact-" + "1" * 22 + ".part")).write_bytes(b"half")
    (first.directory / "notes.txt").write_text("not ours")

    await Artifacts(tmp_path / "artifacts", rows).start()

    assert files(first) == sorted([whole.id, "notes.txt"])
    assert set(rows.kept) == {whole.id}


async def test_a_directory_that_cannot_be_is_told_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "artifacts").write_text("a file")
    with pytest.raises(UnavailableError, match="cannot be kept"):
        await Artifacts(tmp_path / "artifacts", MemoryRows()).start()


@pytest.mark.parametrize(
    ("content_type", "name"),
    [
        ("image/png", "image-01ff.png"),
        ("audio/mpeg", "audio-01ff.mp3"),
        ("Audio/WAV; rate=24000", "audio-01ff.wav"),
        ("model/gltf-binary", "model-01ff.glb"),
        ("application/json", "artifact-01ff.json"),
        ("text/html", "artifact-01ff.bin"),
        ("../../x", "artifact-01ff.bin"),
        ("", "artifact-01ff.bin"),
    ],
)
def test_files_are_called_by_their_kind(content_type: str, name: str) -> None:
    assert artifact_file_name("artifact-01ff", content_type) == name
