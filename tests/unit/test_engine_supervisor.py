"""What an agent makes of its engines when things go wrong, and what it remembers of them."""

from __future__ import annotations

import asyncio
import os
import socket
import stat
from pathlib import Path

import pytest
from msgspec.structs import replace
from structlog.testing import capture_logs

from nodeagent.engines import EngineHealth
from nodeagent.supervisor import EngineRecord, Records
from rung.errors import (
    AlreadyExistsError,
    EngineStartFailedError,
    FailedPreconditionError,
    InvalidRequestError,
    NotAllowedError,
    RungError,
    UnavailableError,
    UnknownDeploymentError,
)
from rung.types import (
    DeploymentSpec,
    DockerRuntime,
    FailureReason,
    LifecycleFailed,
    Residency,
    ResidencyClass,
)
from tests.fakes.agent_server import a_spec
from tests.fakes.engines import AnAgent, ScriptedRuntime, an_agent, done, events_of, failed, told
from tests.fakes.virtual_time import in_virtual_time


def on_port(spec: DeploymentSpec, port: int) -> DeploymentSpec:
    return replace(spec, engine=replace(spec.engine, port=port))


def in_docker(spec: DeploymentSpec) -> DeploymentSpec:
    return replace(spec, engine=replace(spec.engine, runtime=DockerRuntime(image="engine:1")))


async def failed_stop(agent: AnAgent) -> None:
    agent.runtime.stop_error = EngineStartFailedError("it does not end")
    await failed(agent.stop("chat-1"))
    agent.runtime.stop_error = None


async def log_of(agent: AnAgent) -> list[str]:
    engine = agent.supervisor.engine("chat-1")
    return [line async for line in engine.log(tail_lines=100, follow=False)]


# What is refused changes nothing


REFUSALS: list[RungError] = [NotAllowedError("not on the list"), InvalidRequestError("no such thing")]


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda each: type(each).__name__)
@in_virtual_time
async def test_a_refused_start_of_an_unknown_deployment_leaves_it_unknown(
    tmp_path: Path, refusal: RungError
) -> None:
    async with an_agent(tmp_path) as agent:
        agent.runtime.check_error = refusal

        with pytest.raises(type(refusal)):
            await events_of(agent.start(a_spec()))

        assert agent.supervisor.deployments == ()
        assert agent.record("chat-1") is None
        assert agent.runtime.starts == []


@pytest.mark.parametrize("refusal", REFUSALS, ids=lambda each: type(each).__name__)
@in_virtual_time
async def test_a_refused_start_leaves_a_stopped_deployment_as_it_was(
    tmp_path: Path, refusal: RungError
) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        before = (await done(agent.stop("chat-1"))).deployment
        record = agent.record("chat-1")
        agent.docker.check_error = refusal

        with pytest.raises(type(refusal)):
            await events_of(agent.start(in_docker(a_spec(model="other"))))

        assert agent.supervisor.engine("chat-1").deployment is before
        assert (before.residency, before.failure_reason) == (Residency.STOPPED, None)
        assert agent.record("chat-1") == record
        assert agent.supervisor.engine("chat-1").runtime is agent.runtime


@in_virtual_time
async def test_a_refused_start_leaves_a_failed_deployment_its_reason(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.ends(1)
        await asyncio.sleep(0.1)
        before = agent.supervisor.engine("chat-1").deployment
        assert before.failure_reason is FailureReason.ENGINE_LOST
        agent.adapter.command_error = InvalidRequestError("no such option")

        with pytest.raises(InvalidRequestError):
            await events_of(agent.start(a_spec()))

        assert agent.supervisor.engine("chat-1").deployment == before


@in_virtual_time
async def test_a_repeated_start_repeats_its_events_and_changes_nothing(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        first = await events_of(agent.start(a_spec(), "the-start"))
        before = (await done(agent.stop("chat-1"))).deployment

        # The same id with another spec: it is known, so the spec is not even looked at.
        again = await events_of(agent.start(in_docker(a_spec()), "the-start"))

        assert again == first
        engine = agent.supervisor.engine("chat-1")
        assert engine.runtime is agent.runtime
        assert engine.deployment is before
        assert (len(agent.runtime.starts), len(agent.docker.starts)) == (1, 0)


@in_virtual_time
async def test_an_id_of_another_operation_changes_nothing(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec(), "the-start"))
        await done(agent.stop("chat-1"))

        with pytest.raises(AlreadyExistsError):
            agent.start(in_docker(a_spec("chat-2")), "the-start")

        assert [each.spec.id for each in agent.supervisor.deployments] == ["chat-1"]


@in_virtual_time
async def test_the_runtime_changes_only_when_an_engine_is_started_with_it(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        agent.runtime.may_stop.clear()
        stop = agent.stop("chat-1")
        await told(stop, "stopping the engine")
        start = agent.start(in_docker(a_spec()))
        await told(start, "waiting for the stop")
        assert agent.supervisor.engine("chat-1").runtime is agent.runtime
        agent.runtime.may_stop.set()

        started = (await done(start)).deployment

        assert agent.supervisor.engine("chat-1").runtime is agent.docker
        assert (started.pid, started.container_id) == (0, "container-501")
        assert agent.runtime.stopped == [1]


# Ports


@in_virtual_time
async def test_a_port_that_is_taken_is_refused_before_the_start(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        async with an_agent(tmp_path) as agent:
            outcome = await failed(agent.start(on_port(a_spec(), port)))

            assert outcome.reason is FailureReason.ENGINE_START_FAILED
            assert outcome.detail.startswith(f"port {port} is already taken on this node; stop what listens")
            assert agent.runtime.starts == []
            deployment = agent.supervisor.engine("chat-1").deployment
            assert (deployment.residency, deployment.detail) == (Residency.FAILED, outcome.detail)

    async with an_agent(tmp_path) as agent:
        await done(agent.start(on_port(a_spec(), port)))
        assert agent.runtime.starts[0].port == port


@in_virtual_time
async def test_connections_that_an_earlier_engine_has_closed_do_not_hold_its_port(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as earlier:
        port = earlier.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as caller:
            accepted, _ = earlier.accept()
            # The side that closes first keeps the connection in TIME_WAIT.
            accepted.close()
            assert caller.recv(1) == b""

    async with an_agent(tmp_path) as agent:
        await done(agent.start(on_port(a_spec(), port)))


# The last words of an engine


@in_virtual_time
async def test_a_failed_start_tells_the_last_lines_of_an_engine_that_ended(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.LOADING
        agent.runtime.output = [*(f"line {number}" for number in range(9)), "", "  CUDA error  ", ""]
        start = agent.start(a_spec())
        await told(start, "waiting for the engine")
        agent.runtime.ends(1)

        outcome = await failed(start)

        assert outcome.detail == (
            "chat-1 ended with exit code 1 while it was loading; its last words: "
            "line 5 | line 6 | line 7 | line 8 | CUDA error"
        )
        assert agent.supervisor.engine("chat-1").deployment.detail == outcome.detail


@in_virtual_time
async def test_a_start_that_takes_too_long_tells_the_last_lines_too(tmp_path: Path) -> None:
    spec = a_spec()
    spec = replace(spec, engine=replace(spec.engine, start_timeout_s=5.0))
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.LOADING
        agent.runtime.output = ["loading", "x" * 5000]

        outcome = await failed(agent.start(spec))

        assert outcome.detail.startswith("chat-1 was not ready within 5 s; its last words: xxx")
        assert 1000 <= len(outcome.detail) < 1100
        assert agent.runtime.stopped == [1]


@in_virtual_time
async def test_the_log_of_the_last_engine_can_be_read_after_its_end_and_after_a_restart(
    tmp_path: Path,
) -> None:
    async with an_agent(tmp_path) as agent:
        agent.adapter.health = EngineHealth.LOADING
        agent.runtime.output = ["no such model"]
        start = agent.start(a_spec())
        await told(start, "waiting for the engine")
        agent.runtime.ends(1)
        await failed(start)

        assert await log_of(agent) == ["no such model"]
        assert agent.runtime.logs_of[-1].pid == 101

    async with an_agent(tmp_path, runtime=agent.runtime) as successor:
        assert await log_of(successor) == ["no such model"]


@in_virtual_time
async def test_there_is_no_log_before_the_first_engine_nor_of_another_runtime(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        agent.runtime.output = ["of a process"]
        agent.docker.output = ["of a container"]
        agent.docker.start_error = EngineStartFailedError("no image")
        agent.runtime.may_start.clear()
        start = agent.start(a_spec())
        await told(start, "starting engine")
        assert await log_of(agent) == []
        agent.runtime.may_start.set()
        await done(start)
        await done(agent.stop("chat-1"))
        assert await log_of(agent) == ["of a process"]

        await failed(agent.start(in_docker(a_spec())))

        assert await log_of(agent) == []


# Stops that fail, and forgetting


@in_virtual_time
async def test_a_stop_that_fails_is_told_and_can_be_repeated(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await failed_stop(agent)

        deployment = agent.supervisor.engine("chat-1").deployment
        assert deployment.residency is Residency.FAILED
        assert deployment.detail == "it could not be stopped: it does not end"
        with pytest.raises(FailedPreconditionError, match="still runs"):
            await events_of(agent.start(a_spec()))
        assert len(agent.runtime.starts) == 1

        assert (await done(agent.stop("chat-1"))).deployment.residency is Residency.STOPPED


@in_virtual_time
async def test_a_stop_that_failed_is_tried_again_by_the_next_agent(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await failed_stop(agent)

    async with an_agent(tmp_path, runtime=agent.runtime) as successor:
        assert (await done(successor.stop("chat-1"))).deployment.residency is Residency.STOPPED
    assert not agent.runtime.runs(1)


@in_virtual_time
async def test_an_engine_that_runs_is_not_forgotten(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))

        with pytest.raises(FailedPreconditionError, match="stop it first"):
            await agent.forget("chat-1")

        assert agent.record("chat-1") is not None
        assert agent.supervisor.engine("chat-1").residency is Residency.AWAKE


@in_virtual_time
async def test_an_engine_that_may_still_run_is_not_forgotten(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await failed_stop(agent)

        with pytest.raises(FailedPreconditionError, match="still runs"):
            await agent.forget("chat-1")
        agent.runtime.find_error = UnavailableError("Docker is away")
        with pytest.raises(UnavailableError, match="Docker is away"):
            await agent.forget("chat-1")
        assert agent.record("chat-1") is not None

        agent.runtime.find_error = None
        agent.runtime.ends(1)
        await agent.forget("chat-1")
        assert agent.record("chat-1") is None
        with pytest.raises(UnknownDeploymentError):
            agent.supervisor.engine("chat-1")


@in_virtual_time
async def test_a_start_whose_turn_comes_before_that_of_a_removal_wins(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await done(agent.stop("chat-1"))
        start = agent.start(a_spec())

        with pytest.raises(FailedPreconditionError, match="stop it first"):
            await agent.forget("chat-1")

        assert (await done(start)).deployment.residency is Residency.AWAKE


# Runtimes that are away


@in_virtual_time
async def test_owners_are_told_of_the_runtimes_that_are_there(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
        await done(agent.start(in_docker(a_spec("chat-2"))))
        assert await agent.supervisor.owners() == {101: "chat-1", 501: "chat-2"}

        agent.docker.pids_error = UnavailableError("Docker is away")
        with capture_logs() as logs:
            for _ in range(3):
                assert await agent.supervisor.owners() == {101: "chat-1"}
        assert [(each["deployment"], each["error"]) for each in logs] == [("chat-2", "Docker is away")]

        agent.docker.pids_error = None
        assert await agent.supervisor.owners() == {101: "chat-1", 501: "chat-2"}


@in_virtual_time
async def test_an_engine_whose_runtime_is_away_at_the_start_is_taken_back_later(tmp_path: Path) -> None:
    async with an_agent(tmp_path) as agent:
        await done(agent.start(a_spec()))
    runtime = agent.runtime
    runtime.find_error = UnavailableError("Docker is away")

    async with an_agent(tmp_path, runtime=runtime) as successor:
        engine = successor.supervisor.engine("chat-1")
        assert (engine.residency, engine.deployment.detail) == (
            Residency.FAILED,
            "it may still run: Docker is away",
        )
        assert (await failed(successor.start(a_spec()))).detail == "Docker is away"
        runtime.find_error = None
        await asyncio.sleep(3.0)

        assert engine.residency is Residency.AWAKE
        assert len(runtime.starts) == 1


# Records


def a_record(deployment_id: str = "chat-1") -> EngineRecord:
    return EngineRecord(
        spec=a_spec(deployment_id),
        residency=Residency.STOPPED,
        residency_class=ResidencyClass.ON_DEMAND,
        generation=1,
    )


def test_a_record_and_its_removal_are_on_disk_when_the_call_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(tmp_path)
    synced: list[list[str]] = []
    fsync = os.fsync

    def note(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            synced.append(sorted(os.listdir(descriptor)))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", note)
    records.save(a_record())
    records.delete("chat-1")
    records.close()

    # The folder is brought to disk once the file has its name, and once it has gone.
    assert synced == [["chat-1.json"], []]


def test_a_second_agent_on_the_same_state_is_refused(tmp_path: Path) -> None:
    records = Records(tmp_path)
    with pytest.raises(FailedPreconditionError, match="another agent uses"):
        Records(tmp_path)
    records.close()

    Records(tmp_path).close()


def test_a_record_of_a_version_before_can_be_read(tmp_path: Path) -> None:
    records = Records(tmp_path)
    records.save(a_record())
    file = tmp_path / "engines" / "chat-1.json"
    file.write_text(file.read_text().replace('"last_run":null,', ""))
    assert "last_run" not in file.read_text()

    assert records.load() == [a_record()]
    records.close()


@in_virtual_time
async def test_a_start_that_cannot_be_launched_is_told_with_its_reason(tmp_path: Path) -> None:
    runtime = ScriptedRuntime(start_error=EngineStartFailedError("no such file"))
    async with an_agent(tmp_path, runtime=runtime) as agent:
        outcome = await failed(agent.start(a_spec()))

        assert outcome == LifecycleFailed(FailureReason.ENGINE_START_FAILED, "no such file")
        assert agent.supervisor.engine("chat-1").residency is Residency.FAILED
