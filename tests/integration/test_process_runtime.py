"""Engines as processes: small real ones, started, found again, and ended with all they started."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from msgspec.structs import replace

from nodeagent.runtimes import (
    AllowedExecutable,
    AllowList,
    LaunchPlan,
    ProcessEngineRuntime,
    RunningEngine,
    RuntimeProgress,
    _log_file,
    _proc,
)
from rung.errors import EngineStartFailedError, NotAllowedError
from rung.types import DockerRuntime, Mount, ProcessRuntime

PYTHON = AllowedExecutable(path=sys.executable, arguments_prefix=("-u", "-c"))
SLEEPS = "print('up'); import time; time.sleep(600)"
IGNORES = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(600)"
#: Starts a grandchild in a session of its own, and prints its id.
ESCAPES = (
    "import subprocess, sys, time;"
    "p = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'], start_new_session=True);"
    "print(p.pid); time.sleep(600)"
)


def _runtime(folder: Path) -> ProcessEngineRuntime:
    return ProcessEngineRuntime(AllowList(executables={"python": PYTHON}), folder, "box")


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[ProcessEngineRuntime]:
    made = _runtime(tmp_path)
    yield made
    for stray in await made.strays(frozenset()):
        await made.stop(stray, 0.0)
    await made.aclose()


def _plan(script: str, executable: str = "python") -> LaunchPlan:
    return LaunchPlan(
        deployment_id="engine",
        generation=1,
        spec_hash="x",
        runtime=ProcessRuntime(executable=executable),
        arguments=(script,),
        environment={},
        port=1,
        listen_port=1,
    )


def _quiet(_: RuntimeProgress) -> None:
    return


async def _first_line(runtime: ProcessEngineRuntime, record: RunningEngine) -> str:
    async with asyncio.timeout(10):
        async for line in runtime.log(record, tail_lines=10, follow=True):
            return line
    raise AssertionError("the engine ended without a word")


async def test_an_engine_is_started_found_and_stopped(runtime: ProcessEngineRuntime) -> None:
    record = await runtime.start(_plan(SLEEPS), _quiet)
    assert await _first_line(runtime, record) == "up"
    assert await runtime.find(record)
    assert record.pid in await runtime.pids(record)
    assert os.getsid(record.pid) == record.pid

    await runtime.stop(record, 5.0)

    assert not await runtime.find(record)
    assert (await runtime.wait(record)).exit_code == -signal.SIGTERM


async def test_one_that_ignores_a_polite_request_is_killed(runtime: ProcessEngineRuntime) -> None:
    record = await runtime.start(_plan(IGNORES), _quiet)
    await _first_line(runtime, record)

    await runtime.stop(record, 0.1)

    ended = await runtime.wait(record)
    assert (ended.exit_code, ended.log_tail) == (-signal.SIGKILL, ("up",))
    assert "SIGKILL" in ended.detail


async def test_what_left_the_session_is_ended_too(runtime: ProcessEngineRuntime) -> None:
    record = await runtime.start(_plan(ESCAPES), _quiet)
    escaped = int(await _first_line(runtime, record))

    await runtime.stop(record, 5.0)

    assert _proc.start_time_ticks(escaped) is None


async def test_an_exit_is_told_with_its_code_and_last_words(runtime: ProcessEngineRuntime) -> None:
    record = await runtime.start(_plan("import sys; print('no model'); sys.exit(3)"), _quiet)

    ended = await asyncio.wait_for(runtime.wait(record), 10)

    assert (ended.exit_code, ended.log_tail) == (3, ("no model",))


async def test_another_process_is_not_taken_for_the_engine(runtime: ProcessEngineRuntime) -> None:
    record = await runtime.start(_plan(SLEEPS), _quiet)
    forged = replace(record, start_time_ticks=record.start_time_ticks + 1, deployment_id="other")
    before_boot = replace(record, boot_id="another", deployment_id="other")

    for stranger in (forged, before_boot):
        assert not await runtime.find(stranger)
        await runtime.stop(stranger, 0.0)

    assert await runtime.find(record)


_AGENT = """
import asyncio, sys
from pathlib import Path
import msgspec
from tests.integration.test_process_runtime import SLEEPS, _plan, _quiet, _runtime
async def main():
    record = await _runtime(Path(sys.argv[1])).start(_plan(SLEEPS), _quiet)
    print(msgspec.json.encode(record).decode(), flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""


async def test_an_engine_outlives_its_agent_and_is_taken_over(
    runtime: ProcessEngineRuntime, tmp_path: Path
) -> None:
    import msgspec

    agent = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _AGENT, str(tmp_path), stdout=asyncio.subprocess.PIPE
    )
    assert agent.stdout is not None
    record = msgspec.json.decode(await agent.stdout.readline(), type=RunningEngine)
    agent.kill()
    await agent.wait()

    assert await runtime.find(record)
    strays = await runtime.strays(frozenset())
    assert [(stray.deployment_id, stray.pid) for stray in strays] == [("engine", record.pid)]
    assert await runtime.strays(frozenset({"engine"})) == ()
    stranger = _runtime(tmp_path / "another")
    assert await stranger.strays(frozenset()) == (), "another agent of the same name leaves it alone"
    await stranger.aclose()
    waiting = asyncio.ensure_future(runtime.wait(record))
    await runtime.stop(record, 5.0)
    assert (await asyncio.wait_for(waiting, 10)).exit_code in (None, -signal.SIGTERM)


#: Leaves a grandchild behind, as an engine that crashes does, and says what becomes of it.
_ORPHAN = """
import os, signal, subprocess
from pathlib import Path
from nodeagent.runtimes import _proc
_proc.become_subreaper()
left = ["sh", "-c", "sleep 600 >/dev/null 2>&1 & echo $!"]
orphan = int(subprocess.run(left, capture_output=True, text=True, check=True).stdout)
def parent():
    return int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])
assert parent() == os.getpid(), "it came to us, and not to init"
_proc.reap_orphans(())
assert _proc.start_time_ticks(orphan) is not None, "one that runs is left to run"
os.kill(orphan, signal.SIGKILL)
os.waitid(os.P_PID, orphan, os.WEXITED | os.WNOWAIT)
_proc.reap_orphans((orphan,))
assert parent() == os.getpid(), "an engine is reaped by whoever waits for it"
_proc.reap_orphans(())
assert not Path(f"/proc/{orphan}").exists(), "nothing is left of it"
"""


async def test_what_an_engine_leaves_behind_comes_to_the_agent_and_is_reaped() -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", _ORPHAN, stderr=asyncio.subprocess.PIPE
    )
    _, said = await process.communicate()

    assert process.returncode == 0, said.decode()


async def test_what_is_not_there_cannot_be_started(tmp_path: Path) -> None:
    allow = AllowList(executables={"python": AllowedExecutable(path=str(tmp_path / "none"))})
    runtime = ProcessEngineRuntime(allow, tmp_path, "box")

    with pytest.raises(EngineStartFailedError, match="cannot be started"):
        await runtime.start(_plan(SLEEPS), _quiet)
    await runtime.aclose()


async def test_what_is_not_on_the_list_is_not_started(runtime: ProcessEngineRuntime) -> None:
    with pytest.raises(NotAllowedError, match="`executables`"):
        await runtime.start(_plan(SLEEPS, executable="bash"), _quiet)
    for more in (ProcessRuntime(executable="python", arguments=("x",)),):
        with pytest.raises(NotAllowedError, match="allow_arguments"):
            await runtime.start(replace(_plan(SLEEPS), runtime=more), _quiet)


def test_images_and_mounts_are_checked_behind_links(tmp_path: Path) -> None:
    models = tmp_path / "models"
    models.mkdir()
    (models / "way-out").symlink_to("/etc")
    allow = AllowList(images=("engine:*",), mount_folders=(models,))

    allow.check_docker(DockerRuntime(image="engine:1", mounts=(Mount(source=str(models), target="/m"),)))
    with pytest.raises(NotAllowedError, match="`images`"):
        allow.check_docker(DockerRuntime(image="other:1"))
    leak = Mount(source=str(models / "way-out"), target="/m")
    with pytest.raises(NotAllowedError, match="`mount_folders`"):
        allow.check_docker(DockerRuntime(image="engine:1", mounts=(leak,)))


def test_output_is_bounded_and_goes_on(tmp_path: Path) -> None:
    path = tmp_path / "engine.log"
    with path.open("ab") as engine:
        for number in range(6):
            engine.write(b"%d" % number * 1000)
            engine.flush()
            _log_file.rotate(path, max_bytes=500)
        engine.write(b"end\n")

    assert sorted(each.name for each in tmp_path.iterdir()) == [
        "engine.log",
        "engine.log.1",
        "engine.log.2",
        "engine.log.3",
    ]
    assert _log_file.tail(path, 1) == ["end"]
    assert path.with_name("engine.log.1").stat().st_size == 500
