"""Children of `rung up` and of the demo, as real processes: watched, stopped, swept away."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from controlplane.demo._sweeper import MARK, Sweeper, leftovers, marked_processes
from controlplane.local import Child, ChildDiedError, ServerPorts, StopRequestedError, Watch, wait_for_ports

_WAITS = "import signal; print('ready', flush=True); signal.pause()"
_STUBBORN = (
    "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('ready', flush=True)\nwhile True: signal.pause()"
)


async def start(code: str, tmp_path: Path) -> Child:
    log_path = tmp_path / "logs" / "child.log"
    return await Child.start("child", [sys.executable, "-c", code], log_path=log_path)


async def eventually(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not holds():  # noqa: ASYNC110 - another process makes it true
            await asyncio.sleep(0.01)


async def ready(child: Child) -> None:
    await eventually(lambda: child.log_tail() == ["ready"])


class TestChild:
    async def test_stops_when_told(self, tmp_path: Path) -> None:
        child = await start(_WAITS, tmp_path)
        await ready(child)
        await child.stop(10)
        assert child.exit_code == -signal.SIGTERM
        await child.stop(10)

    async def test_is_killed_when_it_does_not(self, tmp_path: Path) -> None:
        child = await start(_STUBBORN, tmp_path)
        await ready(child)
        await child.stop(0.05)
        assert child.exit_code == -signal.SIGKILL

    async def test_keeps_the_log_of_the_run_before(self, tmp_path: Path) -> None:
        await (await start("print('first')", tmp_path)).wait()
        child = await start("print('second')", tmp_path)
        assert await child.wait() == 0
        assert child.log_tail() == ["second"]
        assert child.log_path.with_name("child.log.1").read_text() == "first\n"

    async def test_has_a_session_of_its_own(self, tmp_path: Path) -> None:
        child = await start(_WAITS, tmp_path)
        try:
            assert os.getsid(child.pid) == child.pid
        finally:
            await child.stop(10)


class TestWatch:
    async def test_work_is_done_while_children_live(self, tmp_path: Path) -> None:
        child = await start(_WAITS, tmp_path)
        try:
            async with Watch() as watch:
                watch.add(child)
                assert await watch.during(asyncio.sleep(0, "done")) == "done"
        finally:
            await child.stop(10)

    async def test_a_child_that_ends_ends_the_work(self, tmp_path: Path) -> None:
        child = await start("print('last words'); raise SystemExit(3)", tmp_path)
        async with Watch() as watch:
            watch.add(child)
            with pytest.raises(ChildDiedError, match="exit code 3"):
                await watch.during(asyncio.Event().wait())
            with pytest.raises(ChildDiedError):
                await watch.until_stopped()
        assert child.log_tail() == ["last words"]

    async def test_one_that_may_end_does_not_end_the_work_and_one_that_came_meanwhile_does(
        self, tmp_path: Path
    ) -> None:
        first = await start(_WAITS, tmp_path / "first")
        came: list[Child] = []

        async def work() -> None:
            watch.remove(first)
            await first.kill()
            came.append(await start("print('last words')", tmp_path / "second"))
            watch.add(came[0])
            await asyncio.Event().wait()

        async with Watch() as watch:
            watch.add(first)
            with pytest.raises(ChildDiedError) as died:
                await watch.during(work())
        assert first.exit_code == -signal.SIGKILL
        assert died.value.child is came[0]

    @pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
    async def test_a_signal_ends_the_work_and_not_the_process(self, number: signal.Signals) -> None:
        async with Watch() as watch:
            asyncio.get_running_loop().call_soon(os.kill, os.getpid(), number)
            await watch.until_stopped()
            with pytest.raises(StopRequestedError):
                await watch.during(asyncio.Event().wait())

    async def test_errors_of_the_work_are_its_own(self) -> None:
        async def fail() -> None:
            raise ValueError("mine")

        async with Watch() as watch:
            with pytest.raises(ValueError, match="mine"):
                await watch.during(fail())


async def test_ports_of_a_killed_predecessor_are_not_believed(tmp_path: Path) -> None:
    file = tmp_path / "controlplane.json"
    file.write_text('{"grpc_port": 1, "http_port": 2, "pid": 41}')
    waiting = asyncio.create_task(wait_for_ports(tmp_path, 42))
    done, _ = await asyncio.wait({waiting}, timeout=0.2)
    assert not done
    file.write_text('{"grpc_port": 3, "http_port": 4, "pid": 42}')
    async with asyncio.timeout(10):
        ports = await waiting
    assert ports == ServerPorts(3, 4, 42)
    assert (ports.address, ports.url) == ("127.0.0.1:3", "http://127.0.0.1:4")


def orphan(folder: Path, code: str) -> psutil.Process:
    """A process that is not our child, as an engine is once its agent has gone."""
    starter = (
        "import subprocess, sys; "
        "p = subprocess.Popen([sys.executable, '-c', sys.argv[1]], stdout=subprocess.PIPE, "
        "stderr=subprocess.DEVNULL, start_new_session=True); p.stdout.readline(); print(p.pid)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", starter, code],
        env={**os.environ, MARK: str(folder)},
        capture_output=True,
        check=True,
        text=True,
    )
    return psutil.Process(int(done.stdout))


class TestSweeper:
    @pytest.mark.parametrize("code", [_WAITS, _STUBBORN], ids=["polite", "stubborn"])
    async def test_ends_orphans_and_removes_the_folder(self, tmp_path: Path, code: str) -> None:
        folder = tmp_path / "demo"
        (folder / "deep").mkdir(parents=True)
        sweeper = await Sweeper.start(folder)
        found = orphan(folder, code)
        other = orphan(tmp_path / "another", _WAITS)
        try:
            assert [process.pid for process in marked_processes(folder)] == [found.pid]
            assert leftovers(folder) == [f"process {found.pid}", str(folder)]
            await sweeper.sweep()
            assert leftovers(folder) == []
            assert other.is_running()
        finally:
            other.kill()

    async def test_a_killed_demo_is_swept_too(self, tmp_path: Path) -> None:
        folder = tmp_path / "demo"
        folder.mkdir()
        code = (
            "import asyncio, os, signal, sys; from pathlib import Path\n"
            "from controlplane.demo._sweeper import Sweeper\n"
            "async def main():\n"
            "    sweeper = await Sweeper.start(Path(sys.argv[1]))\n"
            "    os.kill(os.getpid(), signal.SIGKILL)\n"
            "asyncio.run(main())"
        )
        found = orphan(folder, _WAITS)
        killed = await asyncio.create_subprocess_exec(sys.executable, "-c", code, str(folder))
        assert await killed.wait() == -signal.SIGKILL
        await eventually(lambda: not leftovers(folder))
        assert not found.is_running()
