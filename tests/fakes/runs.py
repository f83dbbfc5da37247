"""A caller of an agent's `Run` stream that speaks the protocol itself, for one generation."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import grpc.aio

from rung import v1
from rung.codec import run_error_from_proto
from rung.transport import error_from_rpc


def a_run(deployment_id: str = "chat-1", body: bytes = b"{}") -> v1.RunBegin:
    return v1.RunBegin(
        job_id="job-1", deployment_id=deployment_id, kind=v1.RUN_KIND_CHAT_COMPLETIONS, body=body
    )


def instructed(*instructions: v1.RunInstruction) -> v1.RunRequest:
    return v1.RunRequest(instructions=instructions)


async def run_messages(stub: Any, begin: v1.RunBegin) -> AsyncIterator[v1.RunResponse]:
    """The messages of one generation, up to the one with its last event; all of it is taken as it comes."""
    call = stub.Run()
    try:
        await call.write(instructed(v1.RunInstruction(run_id=1, begin=begin)))
        async for response in call:
            yield response
            taken = sum(len(event.data) for event in response.events)
            if any(event.HasField("end") or event.HasField("error") for event in response.events):
                return
            if taken:
                await call.write(instructed(v1.RunInstruction(run_id=1, credit_bytes=taken)))
    except grpc.aio.AioRpcError as failure:
        raise error_from_rpc(failure) from failure
    finally:
        call.cancel()


async def run_events(stub: Any, begin: v1.RunBegin) -> AsyncIterator[v1.RunEvent]:
    """What happens to one generation, but for its end. Raises what it failed with."""
    async for response in run_messages(stub, begin):
        for event in response.events:
            if event.HasField("error"):
                raise run_error_from_proto(event.error)
            if not event.HasField("end"):
                yield event


async def answer_of(stub: Any, begin: v1.RunBegin) -> bytes:
    """The whole answer. Raises what it failed with."""
    return b"".join([event.data async for event in run_events(stub, begin)])
