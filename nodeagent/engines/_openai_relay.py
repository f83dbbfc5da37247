"""What all engines with OpenAI's routes share: fixed paths, the relay, and small questions to an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager

import msgspec
from msgspec import Struct

from nodeagent.engines._base import EngineHealth, EngineStream, Probe, RunKind
from rung.errors import EngineProtocolError, EngineTimeoutError, EngineUnreachableError
from rung.service import EngineClient

#: Where each kind of generation goes. No part of a request has a say in this.
PATHS: dict[RunKind, str] = {
    RunKind.CHAT_COMPLETIONS: "/v1/chat/completions",
    RunKind.COMPLETIONS: "/v1/completions",
    RunKind.EMBEDDINGS: "/v1/embeddings",
    RunKind.PREDICTIONS: "/predict",
}
#: The whole of a probe, however many questions it asks.
PROBE_TIMEOUT_S = 2.0
#: An answer to a probe is a few kilobytes. What sends more is not what we think it is.
_MAX_ANSWER_BYTES = 4 * 1024 * 1024


class ModelRow(Struct):
    """One row of `/v1/models`. vLLM adds `max_model_len`; others do not have it."""

    id: str
    max_model_len: int | None = None


class ModelList(Struct):
    """The answer of `/v1/models`."""

    data: list[ModelRow] = []


class Answer(Struct, frozen=True):
    """A small answer, read to its end."""

    status: int
    body: bytes


@asynccontextmanager
async def relay(
    client: EngineClient,
    base_url: str,
    kind: RunKind,
    body: bytes,
    *,
    what: str,
    idle_timeout_s: float,
    api_key: str = "",
    query: str = "",
) -> AsyncIterator[EngineStream]:
    """Carry `body`, untouched, to the route of `kind`. Leaving early drops the connection.

    `query` is the adapter's own, never a caller's.

    Raises:
        EngineUnreachableError, EngineTimeoutError: as `EngineClient.post`.
    """
    url = base_url.rstrip("/") + PATHS[kind] + (f"?{query}" if query else "")
    reply = await client.post(url, body, what=what, idle_timeout_s=idle_timeout_s, api_key=api_key)
    async with reply:
        yield reply


async def ask(client: EngineClient, base_url: str, path: str, *, what: str, api_key: str = "") -> Answer:
    """GET a small answer.

    Raises:
        EngineUnreachableError, EngineTimeoutError, EngineProtocolError: as the engine client does.
    """
    url = base_url.rstrip("/") + path
    reply = await client.get(url, what=what, timeout_s=PROBE_TIMEOUT_S, api_key=api_key)
    async with reply:
        pieces: list[bytes] = []
        size = 0
        async for piece in reply.chunks():
            size += len(piece)
            if size > _MAX_ANSWER_BYTES:
                raise EngineProtocolError(f"{what} answers {path} with more than {_MAX_ANSWER_BYTES} bytes")
            pieces.append(piece)
        return Answer(reply.status, b"".join(pieces))


async def guarded(probe: Awaitable[Probe]) -> Probe:
    """Turn what can go wrong while asking into what it says about the engine, within the time limit."""
    try:
        async with asyncio.timeout(PROBE_TIMEOUT_S):
            return await probe
    except EngineUnreachableError as error:
        if isinstance(error.__cause__, OSError) and not isinstance(error.__cause__, TimeoutError):
            return Probe(health=EngineHealth.ABSENT, detail="nothing listens")
        return Probe(health=EngineHealth.UNWELL, detail=error.message)
    except (EngineTimeoutError, TimeoutError):
        return Probe(health=EngineHealth.UNWELL, detail=f"did not answer within {PROBE_TIMEOUT_S:g} s")
    except EngineProtocolError as error:
        return Probe(health=EngineHealth.UNWELL, detail=error.message)


def parse_models(body: bytes) -> tuple[ModelRow, ...] | None:
    """The rows of `/v1/models`, or None if that is not what `body` is."""
    try:
        return tuple(msgspec.json.decode(body, type=ModelList).data)
    except msgspec.DecodeError:
        return None
