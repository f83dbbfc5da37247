"""Generations through an agent: many over one stream, on real gRPC, against a scripted agent."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc.aio
import pytest

from controlplane.fleet import AgentClient, AgentRun
from controlplane.fleet import _agent_runs as agent_runs
from rung import v1
from rung.codec import RUN_WINDOW_BYTES
from rung.errors import (
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    NodeUnreachableError,
    NotAwakeError,
    NotImplementedYetError,
    RungError,
)
from rung.transport import ChannelOptions, error_from_rpc, open_channel
from rung.types import JobKind
from tests.fakes.agent_server import ScriptedAgent
from tests.fakes.runs import a_run, instructed

HEAD = v1.RunHead(status_code=200, content_type="text/event-stream")


@pytest.fixture
async def agent() -> AsyncIterator[ScriptedAgent]:
    agent = ScriptedAgent()
    await agent.start()
    yield agent
    await agent.stop()


@pytest.fixture
async def client(agent: ScriptedAgent) -> AsyncIterator[AgentClient]:
    client = AgentClient("box", agent.address)
    yield client
    await client.aclose()


def through(client: AgentClient, body: bytes = b"{}", *, idle_timeout_s: float = 30.0) -> AgentRun:
    return client.run("chat-1", job_id="job-1", kind=JobKind.CHAT, body=body, idle_timeout_s=idle_timeout_s)


async def echoes(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
    yield HEAD
    yield begin.body


async def hangs(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
    yield HEAD
    yield b"half"
    await asyncio.Event().wait()


async def test_an_answer_comes_through_the_agent_as_it_is(agent: ScriptedAgent, client: AgentClient) -> None:
    async def answers(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        yield v1.RunHead(status_code=429, content_type="text/event-stream", retry_after="3")
        for number in range(50):
            yield b"%d;" % number

    agent.run_script = answers
    async with through(client, idle_timeout_s=30.5) as reply:
        assert (reply.status, reply.content_type, reply.retry_after) == (429, "text/event-stream", "3")
        assert await reply.read() == b"".join(b"%d;" % number for number in range(50))
    begin = agent.runs[0]
    assert (begin.job_id, begin.deployment_id, begin.body) == ("job-1", "chat-1", b"{}")
    assert begin.kind == v1.RUN_KIND_CHAT_COMPLETIONS
    assert begin.idle_timeout.seconds + begin.idle_timeout.nanos / 1e9 == 30.5


async def test_many_generations_share_one_stream_and_none_is_mistaken_for_another(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    agent.run_script = echoes

    async def asks(number: int) -> bytes:
        async with through(client, b"%d" % number) as reply:
            return await reply.read()

    for _ in range(3):
        assert await asyncio.gather(*map(asks, range(200))) == [b"%d" % number for number in range(200)]
    assert len(agent.runs) == 600
    assert agent.run_streams == 1


async def test_a_large_request_has_a_stream_of_its_own(agent: ScriptedAgent, client: AgentClient) -> None:
    agent.run_script = echoes
    large = bytes(range(256)) * 4096
    async with through(client) as shared:
        async with through(client, large) as reply:
            assert await reply.read() == large
        assert agent.run_streams == 2
        assert await shared.read() == b"{}"
    async with through(client) as reply:
        assert await reply.read() == b"{}"
    assert agent.run_streams == 2


async def test_who_takes_nothing_makes_its_engine_wait_and_nobody_else(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    piece, pieces = b"x" * 1024, 4096
    given = 0

    async def endless(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        nonlocal given
        yield HEAD
        if begin.body == b"short":
            yield b"answer"
            return
        for _ in range(pieces):
            given += 1
            yield piece

    agent.run_script = endless
    async with through(client) as slow:
        for _ in range(20):
            async with through(client, b"short") as reply:
                assert await reply.read() == b"answer"
        # One piece more than fits is in the hands of who waits.
        assert given == RUN_WINDOW_BYTES // len(piece) + 1
        assert await slow.read() == piece * pieces
    assert given == pieces


async def test_leaving_early_cancels_the_generation_and_no_other(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    agent.run_script = hangs
    async with through(client) as stays:
        assert await anext(stays.chunks()) == b"half"
        async with through(client) as leaves:
            assert await anext(leaves.chunks()) == b"half"
        await agent.until(lambda: agent.runs_cancelled == 1)
        agent.run_script = echoes
        async with through(client) as reply:
            assert await reply.read() == b"{}"
        assert agent.runs_cancelled == 1
    await agent.until(lambda: agent.runs_cancelled == 2)


async def test_a_caller_that_gives_up_waiting_for_the_head_cancels_too(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    async def silent(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        await asyncio.Event().wait()
        yield HEAD

    agent.run_script = silent
    entering = asyncio.ensure_future(through(client).__aenter__())
    await agent.until(lambda: len(agent.runs) == 1)
    entering.cancel()
    await agent.until(lambda: agent.runs_cancelled == 1)


@pytest.mark.parametrize(
    "error",
    [
        EngineTimeoutError("it broke", engine="chat-1"),
        EngineUnreachableError("it broke", engine="chat-1"),
        EngineProtocolError("it broke", engine="chat-1"),
    ],
    ids=lambda error: error.reason,
)
async def test_an_engine_that_breaks_off(agent: ScriptedAgent, client: AgentClient, error: RungError) -> None:
    async def breaks(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        yield HEAD
        yield b"half"
        raise error

    agent.run_script = breaks
    async with through(client) as reply:
        chunks = reply.chunks()
        assert await anext(chunks) == b"half"
        with pytest.raises(type(error), match="it broke") as raised:
            await anext(chunks)
        assert raised.value.metadata == {"engine": "chat-1"}


async def test_errors_before_the_head(agent: ScriptedAgent, client: AgentClient) -> None:
    async def says_nothing(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        for nothing in list[bytes]():
            yield nothing

    async def refuses(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        async for nothing in says_nothing(begin):
            yield nothing
        raise NotAwakeError("chat-1 is asleep")

    async def is_defective(begin: v1.RunBegin) -> AsyncIterator[v1.RunHead | bytes]:
        async for nothing in says_nothing(begin):
            yield nothing
        raise KeyError("secret")

    async def enters() -> None:
        async with through(client):
            raise AssertionError("it has a head")

    agent.run_script = refuses
    with pytest.raises(NotAwakeError, match="asleep"):
        await enters()
    agent.run_script = says_nothing
    with pytest.raises(EngineProtocolError, match="before its head"):
        await enters()
    agent.run_script = is_defective
    with pytest.raises(RungError, match=r"^internal error"):
        await enters()
    with pytest.raises(NotImplementedYetError):
        client.run("chat-1", job_id="job-1", kind=JobKind.IMAGE, body=b"{}", idle_timeout_s=30)
    assert agent.run_streams == 1
    await agent.stop()
    with pytest.raises(NodeUnreachableError):
        await enters()


async def test_an_agent_lost_in_mid_answer_fails_all_it_had_and_the_next_finds_it_again(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    agent.run_script = hangs
    async with through(client) as one, through(client) as other:
        answers = one.chunks(), other.chunks()
        for chunks in answers:
            assert await anext(chunks) == b"half"
        stopping = asyncio.create_task(agent.stop())
        for chunks in answers:
            with pytest.raises(NodeUnreachableError):
                await anext(chunks)
        await stopping
    await agent.start()
    agent.run_script = echoes
    async with asyncio.timeout(10):
        while True:
            try:
                async with through(client) as reply:
                    assert await reply.read() == b"{}"
                return
            except NodeUnreachableError:
                # gRPC looks for the agent again in its own time.
                await asyncio.sleep(0.05)


async def test_a_channel_that_is_closed_ends_what_runs_on_it(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    agent.run_script = hangs
    async with through(client) as reply:
        chunks = reply.chunks()
        assert await anext(chunks) == b"half"
        await client.aclose()
        with pytest.raises(NodeUnreachableError, match="closed"):
            await anext(chunks)
    await agent.until(lambda: agent.runs_cancelled == 1)


async def test_a_channel_that_is_retired_closes_with_its_last_generation(
    agent: ScriptedAgent, client: AgentClient
) -> None:
    agent.run_script = echoes
    async with through(client) as reply:
        client.retire()
        assert await reply.read() == b"{}"
        assert not client.is_closed
    await client.aclose()
    assert client.is_closed


async def test_an_agent_that_says_nothing_is_given_up(
    agent: ScriptedAgent, client: AgentClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent_runs, "AGENT_MARGIN_S", 0.1)
    agent.run_script = hangs
    async with through(client, idle_timeout_s=0.1) as reply:
        with pytest.raises(EngineTimeoutError):
            await reply.read()
    await agent.until(lambda: agent.runs_cancelled == 1)


@pytest.mark.parametrize(
    "instruction",
    [
        v1.RunInstruction(run_id=1, begin=a_run()),
        v1.RunInstruction(run_id=2, cancel=v1.RunCancel()),
        v1.RunInstruction(run_id=1),
    ],
    ids=["a number twice", "a number to come", "nothing that is known"],
)
async def test_instructions_that_make_no_sense_end_the_stream(
    agent: ScriptedAgent, instruction: v1.RunInstruction
) -> None:
    agent.run_script = hangs
    async with open_channel(ChannelOptions(address=agent.address)) as channel:
        call: Any = v1.NodeAgentServiceStub(channel).Run()
        await call.write(instructed(v1.RunInstruction(run_id=1, begin=a_run())))
        await agent.until(lambda: len(agent.runs) == 1)
        await call.write(instructed(instruction))
        with pytest.raises(grpc.aio.AioRpcError) as failure:
            async for _ in call:
                pass
    assert isinstance(error_from_rpc(failure.value), InvalidRequestError)
    await agent.until(lambda: agent.runs_cancelled == 1)
