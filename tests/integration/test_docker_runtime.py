"""Engines in containers of a real Docker Engine: started, found again, and ended."""

from __future__ import annotations

import asyncio
import socket
import sys
import threading
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import docker
import docker.errors
import msgspec
import pytest
from docker.models.containers import Container
from msgspec.structs import replace

from nodeagent.runtimes import AllowList, DockerEngineRuntime, LaunchPlan, RunningEngine, RuntimeProgress
from rung.errors import EngineStartFailedError, NotAllowedError
from rung.types import DockerRuntime, Mount
from tests.fakes.image_registry import ImageRegistry
from tests.integration.docker_engine import (
    CHECKED_IMAGE,
    IMAGE,
    build_checked_image,
    build_empty_image,
    python_runtime,
    require_docker,
)
from tests.integration.engine_process import free_port

pytestmark = pytest.mark.docker

#: A name of its own for each run: the daemon is shared by all who test on this machine.
NODE = f"test-{uuid.uuid4().hex[:8]}"
#: Says `up`; told to by SIGUSR1 says `no model` and ends with 3, by SIGUSR2 takes a GiB of memory; SIGTERM
#: leaves a trace, and ends it.
ENGINE = """
import signal, sys
from pathlib import Path
def fail(*_):
    print('no model')
    sys.exit(3)
def stop(*_):
    Path('/out/asked').touch()
    if 'stubborn' not in sys.argv:
        sys.exit(0)
signal.signal(signal.SIGUSR1, fail)
signal.signal(signal.SIGUSR2, lambda *_: bytearray(b'x') * 2**30)
signal.signal(signal.SIGTERM, stop)
print('loading\\nalmost\\nup')
while True:
    signal.pause()
"""


@pytest.fixture
def client() -> Iterator[docker.DockerClient]:
    found = require_docker()
    build_empty_image(found)
    yield found
    found.close()


def _runtime(folder: Path, node_id: str = NODE) -> DockerEngineRuntime:
    allow = AllowList(images=(IMAGE, CHECKED_IMAGE, "127.0.0.1:*/engine:*"), mount_folders=(Path("/"),))
    return DockerEngineRuntime(allow, folder, node_id, gpus_available=False)


@pytest.fixture
async def runtime(client: docker.DockerClient, tmp_path: Path) -> AsyncIterator[DockerEngineRuntime]:
    made = _runtime(tmp_path)
    yield made
    await made.aclose()
    # Another, for a test may have closed this one.
    sweeper = _runtime(tmp_path)
    for stray in await sweeper.strays(frozenset()):
        await sweeper.stop(stray, 0.0)
    await sweeper.aclose()


@pytest.fixture
def plan(tmp_path: Path) -> LaunchPlan:
    out = tmp_path / "out"
    out.mkdir()
    python = msgspec.convert(python_runtime(), DockerRuntime)
    return LaunchPlan(
        deployment_id="engine",
        generation=4,
        spec_hash="abc",
        runtime=replace(
            python,
            command=(sys.executable, "-u", "-c", ENGINE),
            mounts=(*python.mounts, Mount(source=str(out), target="/out", writable=True)),
        ),
        arguments=(),
        environment={},
        port=free_port(),
        listen_port=8000,
    )


class Told:
    """What a start said, and what waits for it to say something."""

    def __init__(self) -> None:
        self.said: list[RuntimeProgress] = []
        self.halfway = asyncio.Event()

    def __call__(self, progress: RuntimeProgress) -> None:
        self.said.append(progress)
        if 0.0 < (progress.percent or 0.0) < 100.0:
            self.halfway.set()


async def _until_up(runtime: DockerEngineRuntime, record: RunningEngine) -> None:
    async with asyncio.timeout(20):
        async for line in runtime.log(record, tail_lines=10, follow=True):
            if line == "up":
                return
    raise AssertionError("the engine ended before it was up")


async def _container(client: docker.DockerClient, record: RunningEngine) -> Container:
    return await asyncio.to_thread(client.containers.get, record.container_id)


async def test_an_engine_is_started_found_and_stopped(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient, tmp_path: Path
) -> None:
    told = Told()
    record = await runtime.start(plan, told)
    await _until_up(runtime, record)

    assert [each.detail for each in told.said] == [f"starting a container of {IMAGE}"]
    assert record.base_url == f"http://127.0.0.1:{plan.port}"
    assert await runtime.find(record)
    assert record.pid in await runtime.pids(record)
    labels = (await _container(client, record)).labels
    assert labels["rung.node"] == NODE
    assert labels["rung.owner"].startswith(f"{NODE}@")
    assert {name: labels[f"rung.{name}"] for name in ("deployment", "generation", "spec-hash")} == {
        "deployment": "engine",
        "generation": "4",
        "spec-hash": "abc",
    }

    await runtime.stop(record, 10.0)

    assert (tmp_path / "out" / "asked").exists(), "it was asked politely"
    assert not await runtime.find(record)
    with pytest.raises(docker.errors.NotFound):
        await _container(client, record)
    await runtime.stop(record, 0.0)


async def test_one_that_ignores_a_polite_request_is_killed(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient, tmp_path: Path
) -> None:
    record = await runtime.start(replace(plan, arguments=("stubborn",)), Told())
    await _until_up(runtime, record)

    await runtime.stop(record, 0.1)

    assert (tmp_path / "out" / "asked").exists(), "it was asked politely first"
    with pytest.raises(docker.errors.NotFound):
        await _container(client, record)


async def test_an_agent_that_comes_back_knows_its_engine_and_hears_of_its_end(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient, tmp_path: Path
) -> None:
    record = await runtime.start(plan, Told())
    await _until_up(runtime, record)
    await runtime.aclose()

    again = _runtime(tmp_path)
    assert await again.find(record)
    assert not await again.find(replace(record, container_id="0" * 64))
    waiting = asyncio.ensure_future(again.wait(record))
    (await _container(client, record)).kill("SIGUSR1")
    ended = await asyncio.wait_for(waiting, 20)

    assert ended.exit_code == 3
    assert ended.detail == "ended with exit code 3 after SIGUSR1 was sent through Docker"
    assert ended.log_tail == ("loading", "almost", "up", "no model")
    assert not await again.find(record)
    # Not removed: it is there to be looked at until its next start, or until it is stopped.
    assert [stray.container_id for stray in await again.strays(frozenset())] == [record.container_id]
    await again.stop(record, 0.0)
    assert (await again.wait(record)).detail == "was removed"
    await again.aclose()


async def test_an_engine_that_takes_too_much_memory_is_said_to_be_killed_for_it(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient
) -> None:
    record = await runtime.start(plan, Told())
    await _until_up(runtime, record)
    container = await _container(client, record)
    await asyncio.to_thread(container.update, mem_limit="64m", memswap_limit="64m")

    waiting = asyncio.ensure_future(runtime.wait(record))
    await asyncio.to_thread(container.kill, "SIGUSR2")
    ended = await asyncio.wait_for(waiting, 20)

    assert ended.exit_code == -9
    assert ended.detail == "was killed by the kernel: out of memory (limit 64 MiB)"
    assert ended.log_tail == ("loading", "almost", "up")


@pytest.mark.parametrize(
    ("end", "code", "detail"),
    [
        (Container.stop, 0, "ended with exit code 0 after SIGTERM was sent through Docker"),
        (Container.kill, -9, "was ended by SIGKILL, which was sent through Docker"),
        (
            lambda container: container.remove(force=True),
            -9,
            "was ended by SIGKILL, which was sent through Docker",
        ),
    ],
    ids=["stop", "kill", "remove"],
)
async def test_an_engine_that_somebody_ends_with_docker_is_said_to_be_ended_so(
    runtime: DockerEngineRuntime,
    plan: LaunchPlan,
    client: docker.DockerClient,
    end: Callable[[Container], None],
    code: int,
    detail: str,
) -> None:
    record = await runtime.start(plan, Told())
    await _until_up(runtime, record)
    waiting = asyncio.ensure_future(runtime.wait(record))
    await asyncio.to_thread(end, await _container(client, record))
    ended = await asyncio.wait_for(waiting, 20)

    assert ended.exit_code == code
    # One that is removed may be looked at before it is gone, or after.
    assert ended.detail.removesuffix(", and was removed") == detail


async def test_a_healthcheck_of_the_image_is_heard_of(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient, tmp_path: Path
) -> None:
    assert isinstance(plan.runtime, DockerRuntime)
    image = build_checked_image(client)
    record = await runtime.start(replace(plan, runtime=replace(plan.runtime, image=image)), Told())
    waiting = asyncio.ensure_future(runtime.wait(record))
    async with asyncio.timeout(20):
        while not runtime.complaint(record):  # noqa: ASYNC110 - Docker brings it about
            await asyncio.sleep(0.02)
        assert runtime.complaint(record) == "its HEALTHCHECK fails: no model yet"
        (tmp_path / "out" / "well").touch()
        while runtime.complaint(record):  # noqa: ASYNC110 - as above
            await asyncio.sleep(0.02)
    assert not waiting.done()
    await runtime.stop(record, 0.0)
    await asyncio.wait_for(waiting, 20)


async def test_output_can_be_looked_at_and_followed_to_its_end(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient
) -> None:
    record = await runtime.start(plan, Told())
    await _until_up(runtime, record)

    assert [line async for line in runtime.log(record, tail_lines=2, follow=False)] == ["almost", "up"]
    followed: list[str] = []
    async with asyncio.timeout(20):
        async for line in runtime.log(record, tail_lines=1, follow=True):
            followed.append(line)
            if line == "up":
                (await _container(client, record)).kill("SIGUSR1")
    assert followed == ["up", "no model"]


async def test_strays_are_marked_by_this_agent_and_not_known(
    runtime: DockerEngineRuntime, plan: LaunchPlan, tmp_path: Path
) -> None:
    record = await runtime.start(plan, Told())
    other = replace(plan, deployment_id="other", port=free_port())
    # The same name, another state folder: another agent.
    neighbour = _runtime(tmp_path / "neighbour")
    foreign = await neighbour.start(other, Told())

    (stray,) = await runtime.strays(frozenset())
    assert (stray.deployment_id, stray.generation, stray.spec_hash) == ("engine", 4, "abc")
    assert stray.container_id == record.container_id
    assert await runtime.strays(frozenset({"engine"})) == ()
    with pytest.raises(EngineStartFailedError, match="this agent did not make"):
        await runtime.start(other, Told())
    assert await neighbour.find(foreign)

    await neighbour.stop(foreign, 0.0)
    await neighbour.aclose()


async def test_what_an_earlier_start_left_is_replaced(runtime: DockerEngineRuntime, plan: LaunchPlan) -> None:
    before = await runtime.start(plan, Told())
    after = await runtime.start(plan, Told())

    assert not await runtime.find(before)
    assert await runtime.find(after)


async def test_an_image_that_is_not_on_the_list_is_refused(
    runtime: DockerEngineRuntime, plan: LaunchPlan
) -> None:
    told = Told()
    with pytest.raises(NotAllowedError, match="`images`"):
        await runtime.start(replace(plan, runtime=DockerRuntime(image="elsewhere/engine:1")), told)

    assert told.said == []
    assert await runtime.strays(frozenset()) == ()


async def test_a_port_that_is_taken_leaves_no_container(
    runtime: DockerEngineRuntime, plan: LaunchPlan
) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", plan.port))
        taken.listen()
        with pytest.raises(EngineStartFailedError, match=f"cannot be started: .*{plan.port}"):
            await runtime.start(plan, Told())

    assert await runtime.strays(frozenset()) == ()


@pytest.fixture
async def registry() -> AsyncIterator[ImageRegistry]:
    async with ImageRegistry() as found:
        yield found


async def test_an_image_that_is_not_there_is_pulled(
    runtime: DockerEngineRuntime, plan: LaunchPlan, client: docker.DockerClient, registry: ImageRegistry
) -> None:
    assert isinstance(plan.runtime, DockerRuntime)
    told = Told()
    starting = asyncio.ensure_future(
        runtime.start(replace(plan, runtime=replace(plan.runtime, image=registry.image)), told)
    )
    try:
        await asyncio.wait_for(told.halfway.wait(), 30)
        registry.release.set()
        record = await asyncio.wait_for(starting, 30)
        await _until_up(runtime, record)
        assert told.said[0].detail == f"pulling {registry.image}: Pulling from engine"
        assert told.said[-1].detail == f"starting a container of {registry.image}"
        await runtime.stop(record, 0.0)
    finally:
        client.images.remove(registry.image, force=True)


async def test_a_pull_that_is_called_off_goes_no_further(
    runtime: DockerEngineRuntime, client: docker.DockerClient, registry: ImageRegistry, plan: LaunchPlan
) -> None:
    told = Told()
    starting = asyncio.ensure_future(
        runtime.start(replace(plan, runtime=DockerRuntime(image=registry.image)), told)
    )
    await asyncio.wait_for(told.halfway.wait(), 30)

    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    # The registry, which is in the middle of the layer and would go on for long, sees Docker leave.
    await asyncio.wait_for(registry.broken_off.wait(), 30)
    for thread in threading.enumerate():
        if thread.name == "docker-stream":
            await asyncio.to_thread(thread.join, 10)
            assert not thread.is_alive()
    assert await runtime.strays(frozenset()) == ()
    with pytest.raises(docker.errors.ImageNotFound):
        client.images.get(registry.image)


@pytest.mark.parametrize("tag", ["none", "latest"])
async def test_an_image_that_cannot_be_pulled_is_a_failed_start(
    runtime: DockerEngineRuntime, plan: LaunchPlan, registry: ImageRegistry, tag: str
) -> None:
    image = registry.image.removesuffix(":1") + f":{tag}"
    with pytest.raises(EngineStartFailedError) as failed:
        await runtime.start(replace(plan, runtime=DockerRuntime(image=image)), Told())

    assert failed.value.message.startswith(f"the image {image} cannot be pulled: ")
    assert "manifest unknown" in failed.value.message
    assert await runtime.strays(frozenset()) == ()
