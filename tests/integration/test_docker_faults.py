"""What the Docker runtime does when Docker is away, breaks off, or does not do as it is told."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from nodeagent.runtimes import AllowList, DockerEngineRuntime, LaunchPlan, RunningEngine, RuntimeProgress
from rung.errors import EngineStartFailedError, UnavailableError
from rung.types import DockerRuntime
from tests.fakes.docker_daemon import CONTAINER_ID, IMAGE, DockerDaemon

#: The Docker SDK leaves it to the garbage collector to close a socket that could not be connected.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")

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
