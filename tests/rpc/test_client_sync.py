"""The blocking client against a scripted control plane, from threads without an event loop."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import pytest

from rung import Client
from rung.errors import JobCancelledError, UnavailableError, UnknownJobError
from rung.types import (
    FailureReason,
    FleetSnapshot,
    JobAccepted,
    JobDone,
    JobKind,
    LifecycleEvent,
    LifecycleFailed,
    Node,
    NodeState,
    TokenDelta,
)
from tests.fakes.control_plane import JOB_ID, ScriptedControlPlane, a_job, a_log

T = TypeVar("T")

ACCEPTED = JobAccepted(JobKind.CHAT, "m")


@pytest.fixture
async def server() -> AsyncIterator[ScriptedControlPlane]:
    script = ScriptedControlPlane()
    await script.start()
    yield script
    await script.stop()


async def with_client(server: ScriptedControlPlane, use: Callable[[Client], T]) -> T:
    """Use a client in a thread of its own, as a program without asyncio does."""

    def work() -> T:
        with Client(server.address) as client:
            return use(client)

    return await asyncio.to_thread(work)


async def test_a_chat_is_an_iterator(server: ScriptedControlPlane) -> None:
    server.log = a_log(ACCEPTED, TokenDelta("Hel"), TokenDelta("lo"), JobDone("stop"))

    def use(client: Client) -> None:
        stream = client.chat("hi", model="m")
        assert list(stream) == server.log
        assert stream.job_id == JOB_ID
        assert stream.result().finish_reason == "stop"
        assert client.chat("hi").text() == "Hello"
        assert client.generate_openai({"model": "m", "messages": []}).text() == "Hello"
        assert [event.sequence for event in client.watch_job(JOB_ID, 2)] == [3, 4]

    await with_client(server, use)


async def test_calls_of_every_kind(server: ScriptedControlPlane) -> None:
    server.jobs = [a_job(f"job-{number}") for number in range(3)]
    server.snapshot = FleetSnapshot((Node(id="a", address="x", state=NodeState.READY),))
    server.lifecycle = [LifecycleEvent("op", 1, 0.5, LifecycleFailed(FailureReason.INTERNAL, "no"))]

    def use(client: Client) -> None:
        assert client.address == server.address
        assert client.get_job("job-1") == server.jobs[1]
        assert client.create_job("hi") == server.jobs[0]
        assert list(client.list_jobs(page_size=2)) == server.jobs
        assert client.cancel_job("job-1").id == "job-1"
        assert client.embed("abc").vectors == ((3.0, 0.5),)
        assert client.list_models()[0].id == "m"
        assert client.explain_route(model="m").target == "d"
        assert client.list_nodes() == server.snapshot.nodes
        assert client.get_node("a") == server.snapshot.nodes[0]
        assert client.list_deployments() == ()
        assert client.drain_node("a").state is NodeState.DRAINING
        assert client.resume_node("a").state is NodeState.READY
        for operation in (
            client.start_deployment("d"),
            client.stop_deployment("d"),
            client.sleep_deployment("d"),
            client.wake_deployment("d"),
            client.free_deployment("d"),
        ):
            assert list(operation) == server.lifecycle
        with client.watch_fleet() as fleet:
            assert next(iter(fleet)) == server.snapshot

    await with_client(server, use)


async def test_errors_are_typed(server: ScriptedControlPlane) -> None:
    def use(client: Client) -> None:
        with pytest.raises(UnknownJobError):
            client.get_job("x")

    await with_client(server, use)


def test_nobody_listens() -> None:
    with Client("127.0.0.1:1") as client, pytest.raises(UnavailableError):
        client.chat("hi").text()


async def test_leaving_a_stream_cancels_the_call(server: ScriptedControlPlane) -> None:
    server.log = a_log(ACCEPTED)

    def use(client: Client) -> None:
        with client.chat("hi") as stream:
            assert next(iter(stream)).payload == ACCEPTED
        with client.watch_job(JOB_ID) as watch:
            assert next(iter(watch)).payload == ACCEPTED

    await with_client(server, use)
    await server.until(lambda: server.cancelled == 2)


async def test_closing_from_another_thread_ends_a_waiting_reader(server: ScriptedControlPlane) -> None:
    server.log = a_log(ACCEPTED)
    client = Client(server.address)
    reader = asyncio.create_task(asyncio.to_thread(client.chat("hi").result))
    await server.until(lambda: len(server.requests) == 1)
    await asyncio.to_thread(client.close)
    with pytest.raises(JobCancelledError):
        await reader
    await asyncio.to_thread(client.close)
    with pytest.raises(JobCancelledError, match="closed"):
        client.list_models()


async def test_a_client_that_is_dropped_ends_its_thread(server: ScriptedControlPlane) -> None:
    await asyncio.to_thread(lambda: Client(server.address).list_models())
    gc.collect()
    assert not [thread for thread in threading.enumerate() if thread.name == "rung-client"]
