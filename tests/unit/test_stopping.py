"""How the control plane ends: it drains at the first signal, and the next ones cut that short."""

from __future__ import annotations

import asyncio
import signal
import sys

import pytest

from controlplane._stopping import drain_jobs
from controlplane.jobs import Jobs
from rung.types import JobCancelled, JobKind, Policy
from tests.fakes.store import MemoryStore
from tests.fakes.virtual_time import in_virtual_time

_TELLS = """
import asyncio
from controlplane._stopping import StopSignals

async def main():
    stop = StopSignals()
    print("ready", flush=True)
    await stop.first.wait()
    print("first", flush=True)
    await stop.second.wait()
    print("second", flush=True)
    try:
        await asyncio.Event().wait()
    finally:
        # Something that does not let itself be closed.
        await asyncio.Event().wait()

asyncio.run(main())
"""


@in_virtual_time
async def test_a_drain_that_is_hurried_cancels_what_runs_and_tells_it() -> None:
    clock = asyncio.get_running_loop().time
    jobs = Jobs(MemoryStore(), monotonic_s=clock)
    job = jobs.open(kind=JobKind.CHAT, model="m", policy=Policy())
    hurry = asyncio.Event()
    began_s = clock()
    asyncio.get_running_loop().call_later(5.0, hurry.set)

    await drain_jobs(jobs, 600.0, hurry)

    assert 5.0 <= clock() - began_s < 10.0
    assert job.terminal == JobCancelled(by="drain")


@in_virtual_time
async def test_a_drain_that_nobody_hurries_lets_jobs_end() -> None:
    clock = asyncio.get_running_loop().time
    jobs = Jobs(MemoryStore(), monotonic_s=clock)
    job = jobs.open(kind=JobKind.CHAT, model="m", policy=Policy())
    began_s = clock()
    asyncio.get_running_loop().call_later(30.0, job.done, "stop")

    await drain_jobs(jobs, 600.0, asyncio.Event())

    assert clock() - began_s == pytest.approx(30.0, abs=1.0)
    assert (await jobs.get(job.id)).state.value == "done"


@pytest.mark.parametrize("last", [signal.SIGINT, signal.SIGTERM])
async def test_the_second_signal_is_another_and_the_third_ends_the_process(last: signal.Signals) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _TELLS, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        for said, number in ((b"ready", signal.SIGTERM), (b"first", signal.SIGINT), (b"second", last)):
            assert (await process.stdout.readline()).strip() == said
            process.send_signal(number)
        assert await asyncio.wait_for(process.wait(), 30) == -last
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
