"""What the Docker runtime does when Docker is away, breaks off, or does not do as it is told."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

from nodeagent.runtimes import (
    AllowList,
    DockerEngineRuntime,
    EngineExit,
    LaunchPlan,
    RunningEngine,
    RuntimeProgress,
)
from rung.errors import EngineStartFailedError, UnavailableError
from rung.types import DockerRuntime
from tests.fakes.docker_daemon import CONTAINER_ID, IMAGE, DockerDaemon
from tests.integration.docker_engine import require_docker

#: The Docker SDK leaves it to the garbage collector to close a socket that could not be connected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

Waiting: TypeAlias = Awaitable["asyncio.Future[EngineExit]"]

PLAN = LaunchPlan(
    deployment_id="engine",
    generation=1,
    spec_hash="x",
    runtime=DockerRuntime(image=IMAGE),
    arguments=(),
    environment={},
    port=8000,
    listen_port=8000,
)
RECORD = RunningEngine(
    deployment_id="engine", generation=1, spec_hash="x", base_url="", container_id=CONTAINER_ID
)


@pytest.fixture(autouse=True)
def _collect_sockets() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
async def runtime(tmp_path: Path) -> AsyncIterator[DockerEngineRuntime]:
    made = DockerEngineRuntime(AllowList(images=(IMAGE,)), tmp_path, "box", gpus_available=False)
    yield made
    await made.aclose()


@pytest.fixture
async def daemon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[DockerDaemon]:
    async with DockerDaemon(tmp_path) as found:
        monkeypatch.setenv("DOCKER_HOST", found.host)
        yield found


def _quiet(_: RuntimeProgress) -> None:
    return


async def test_a_docker_that_is_away_is_told_with_what_to_do(
    runtime: DockerEngineRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    host = f"unix://{tmp_path / 'none.sock'}"
    monkeypatch.setenv("DOCKER_HOST", host)

    for asking in (
        runtime.start(PLAN, _quiet),
        runtime.find(RECORD),
        runtime.wait(RECORD),
        runtime.stop(RECORD, 0.0),
        runtime.pids(RECORD),
        anext(runtime.log(RECORD, tail_lines=1, follow=True)),
    ):
        with pytest.raises(UnavailableError) as away:
            await asking
        assert away.value.message == (
            f"no Docker Engine answers at {host} (No such file or directory); "
            "start it (systemctl start docker), or set DOCKER_HOST for the agent"
        )
    assert await runtime.strays(frozenset()) == ()


async def test_a_docker_that_comes_back_is_used_again(
    runtime: DockerEngineRuntime, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DOCKER_HOST", DockerDaemon(tmp_path).host)
    with pytest.raises(UnavailableError):
        await runtime.find(RECORD)

    for _ in range(2):
        async with DockerDaemon(tmp_path) as daemon:
            daemon.labels, daemon.running = {}, True
            assert await runtime.find(RECORD)
        with pytest.raises(UnavailableError, match="no Docker Engine answers"):
            await runtime.find(RECORD)


async def test_a_container_that_does_not_end_is_not_said_to_be_stopped(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    daemon.labels, daemon.running, daemon.deaf_to_kill = {}, True, True

    with pytest.raises(
        UnavailableError, match=r"0123456789ab of engine does not end \(it did not exit in time\)"
    ):
        await runtime.stop(RECORD, 0.1)

    assert daemon.calls == ["stop", "kill", "wait"], "politely, then by force, and never removed unseen"


async def test_a_container_that_ends_only_by_force_is_removed(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    daemon.labels, daemon.running, daemon.deaf_to_kill = {}, True, True

    def give_in(call: str) -> None:
        daemon.deaf_to_kill = call != "kill"

    daemon.on_call = give_in
    await runtime.stop(RECORD, 0.1)

    assert daemon.calls == ["stop", "kill", "wait", "remove"]


async def test_a_pull_that_docker_breaks_off_is_a_failed_start(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    daemon.without_image = True
    told: list[RuntimeProgress] = []

    with pytest.raises(UnavailableError, match="no Docker Engine answers"):
        await asyncio.wait_for(runtime.start(PLAN, told.append), 10)

    assert [each.detail for each in told] == [f"pulling {IMAGE}: Pulling from engine"]
    assert daemon.calls == []


async def test_a_port_that_docker_does_not_publish_fails_the_start(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    daemon.without_bridge = True

    with pytest.raises(EngineStartFailedError, match="no bridge network"):
        await runtime.start(PLAN, _quiet)

    assert daemon.calls == ["create", "start", "remove"]


async def test_a_start_that_is_called_off_again_and_again_leaves_no_container(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    starting = asyncio.ensure_future(runtime.start(PLAN, _quiet))

    def call_off(_: str) -> None:
        starting.cancel()

    daemon.on_call = call_off

    with pytest.raises(asyncio.CancelledError):
        await starting

    assert daemon.calls == ["create", "start", "remove"]
    assert daemon.labels is None


@pytest.fixture
def waits(runtime: DockerEngineRuntime, daemon: DockerDaemon) -> Callable[[], Waiting]:
    """Waits for a container that runs; each returns once it has looked at it and its events are read."""
    daemon.labels, daemon.running = {}, True

    async def wait() -> asyncio.Future[EngineExit]:
        daemon.inspected.clear()
        waiting = asyncio.ensure_future(runtime.wait(RECORD))
        await asyncio.wait_for(daemon.reading.wait(), 10)
        await asyncio.wait_for(daemon.inspected.wait(), 10)
        return waiting

    return wait


async def test_all_who_wait_for_an_end_share_one_stream_which_is_left_with_the_runtime(
    runtime: DockerEngineRuntime, daemon: DockerDaemon, waits: Callable[[], Waiting]
) -> None:
    both = [await waits(), await waits()]
    daemon.running = False
    daemon.state = {"ExitCode": 137, "OOMKilled": True, "StartedAt": "then"}
    await daemon.tell("die", exitCode="137")

    for waiting in both:
        ended = await asyncio.wait_for(waiting, 10)
        assert ended.exit_code == -9
        assert ended.detail.startswith("was killed by the kernel: out of memory")
    assert daemon.calls == ["events"]
    await runtime.aclose()
    await asyncio.wait_for(daemon.deserted.wait(), 10)


async def test_a_stream_of_events_that_breaks_off_is_told_and_read_anew(
    daemon: DockerDaemon, waits: Callable[[], Waiting]
) -> None:
    waiting = await waits()
    daemon.break_off()
    with pytest.raises(UnavailableError, match="has ended its stream of events"):
        await asyncio.wait_for(waiting, 10)
    await asyncio.wait_for(daemon.deserted.wait(), 10)

    waiting = await waits()
    # Each is heard before the container is looked at for the next: it is gone with the last of them.
    for action, attributes in (("kill", {"signal": "9"}), ("die", {"exitCode": "137"})):
        daemon.inspected.clear()
        await daemon.tell(action, **attributes)
        await asyncio.wait_for(daemon.inspected.wait(), 10)
    daemon.labels = None
    await daemon.tell("destroy")
    ended = await asyncio.wait_for(waiting, 10)

    assert ended.detail == "was ended by SIGKILL, which was sent through Docker, and was removed"


async def test_an_end_before_its_events_are_read_is_heard_of(
    runtime: DockerEngineRuntime, daemon: DockerDaemon
) -> None:
    daemon.labels, daemon.running = {}, True
    daemon.may_subscribe.clear()
    waiting = asyncio.ensure_future(runtime.wait(RECORD))
    await asyncio.wait_for(daemon.inspected.wait(), 10)
    daemon.running = False
    await daemon.tell("die", exitCode="0")
    assert daemon.readers == []
    daemon.may_subscribe.set()

    assert (await asyncio.wait_for(waiting, 10)).detail == "ended with exit code 0"


async def test_an_engine_that_somebody_starts_anew_has_ended(
    daemon: DockerDaemon, waits: Callable[[], Waiting]
) -> None:
    waiting = await waits()
    daemon.state["StartedAt"] = "now"
    await daemon.tell("start")

    assert (await asyncio.wait_for(waiting, 10)).detail == "was started anew through Docker"


async def test_an_engine_that_goes_on_is_waited_for_whatever_is_told_of_it(
    runtime: DockerEngineRuntime, daemon: DockerDaemon, waits: Callable[[], Waiting]
) -> None:
    waiting = await waits()
    unwell = ("unhealthy", "its HEALTHCHECK fails: no model")
    for status, complaint in (unwell, ("healthy", ""), unwell):
        daemon.state["Health"] = {"Status": status, "Log": [{"Output": "no model"}]}
        daemon.inspected.clear()
        await daemon.tell(f"health_status: {status}")
        await asyncio.wait_for(daemon.inspected.wait(), 10)
        # The next is told after it was looked at; by then the answer to the one before was read.
        daemon.inspected.clear()
        await daemon.tell("kill", signal="10")
        await asyncio.wait_for(daemon.inspected.wait(), 10)
        assert runtime.complaint(RECORD) == complaint
    daemon.running = False
    await daemon.tell("die", exitCode="0")

    assert (await asyncio.wait_for(waiting, 10)).detail == (
        "ended with exit code 0 after SIGUSR1 was sent through Docker"
    )
    assert runtime.complaint(RECORD) == "", "it is no more"


@pytest.mark.parametrize(("required", "raised"), [("1", pytest.fail.Exception), ("", pytest.skip.Exception)])
async def test_an_engine_without_a_bridge_fails_the_tests_where_one_is_required(
    daemon: DockerDaemon, monkeypatch: pytest.MonkeyPatch, required: str, raised: type[BaseException]
) -> None:
    monkeypatch.setenv("RUNG_REQUIRE_DOCKER", required)
    (await asyncio.to_thread(require_docker)).close()
    daemon.without_bridge = True

    with pytest.raises(raised, match="no bridge network"):
        await asyncio.to_thread(require_docker)
