"""The part of a simulated engine that all dialects share: routes, streams, counters, faults."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import msgspec
from aiohttp import web
from aiohttp.typedefs import Middleware
from msgspec import Struct

from nodeagent.simulators._faults import TOKENS_BEFORE_FAULT, Fault, Faults, parse_faults
from nodeagent.simulators._frames import DONE, Frames, frame, usage_of
from nodeagent.simulators._generation import (
    EmbeddingRequest,
    GenerationRequest,
    Piece,
    Plan,
    count_tokens,
    embed,
    paced,
    plan_answer,
)
from nodeagent.simulators._settings import Pace, Settings

_MAX_BODY_BYTES = 64 * 1024 * 1024
#: How a real engine reports what it cannot put into words.
_INTERNAL_ERROR = "Internal server error (simulated fault)"


class Timing(Struct, frozen=True):
    """How long an answer took."""

    prompt_tokens: int
    completion_tokens: int
    prompt_s: float
    generation_s: float


class Dialect(Protocol):
    """Where engines with OpenAI's routes differ."""

    #: What it calls itself in an answer.
    engine: str
    event_stream_type: str
    #: What stands beside the role in the first chunk.
    first_content: str | None
    #: Pause between comments that keep a stream alive; None for none.
    ping_interval_s: float | None
    reasons: bool
    context_tokens: int

    def error(self, status: int, message: str) -> dict[str, Any]:
        """The body of an error."""
        ...

    def refuse_generation(self, request: GenerationRequest) -> web.Response | None:
        """Why the request cannot be served, or None."""
        ...

    def refuse_embedding(self, request: EmbeddingRequest) -> web.Response | None:
        """Why the request cannot be served, or None."""
        ...

    def extras(self, timing: Timing) -> dict[str, Any]:
        """What goes beside the choices of the last chunk."""
        ...


class Counters(Struct):
    """What a simulated engine did, for tests that want to know whether a cancel reached it."""

    active: int = 0
    waiting: int = 0
    requests: int = 0
    completed: int = 0
    aborted: int = 0
    prompt_tokens: int = 0
    tokens_generated: int = 0


class SimulatedEngine:
    """Serves generations in a dialect.

    Args:
        dialect: the engine's ways.
        model: the name that it answers by.
        slots: requests served at once; others wait.
        pace: how fast.
        settings: speed and faults.
    """

    def __init__(self, dialect: Dialect, *, model: str, slots: int, pace: Pace, settings: Settings) -> None:
        self.dialect = dialect
        self.model = model
        self.slots = slots
        self.ready = False
        #: Closed while the engine sleeps: requests wait for it, and are not told.
        self.awake = asyncio.Event()
        self.awake.set()
        #: Without its weights it answers as fast as ever.
        self.garbled = False
        self.counters = Counters()
        self.faults = Faults(settings.faults)
        self._pace = pace
        self._settings = settings
        self._free_slots = asyncio.Semaphore(slots)
        self._aborts = 0

    def application(self, middlewares: Sequence[Middleware]) -> web.Application:
        """An application with the shared routes; the dialect adds its own."""
        app = web.Application(client_max_size=_MAX_BODY_BYTES, middlewares=list(middlewares))
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/completions", self._complete)
        app.router.add_post("/v1/embeddings", self._embeddings)
        app.router.add_get("/sim/state", self._state)
        app.router.add_post("/sim/faults", self._switch_faults)
        return app

    def failure(self, status: int, message: str) -> web.Response:
        """An error in the dialect's shape."""
        return json_response(self.dialect.error(status, message), status=status)

    def abort_running(self) -> None:
        """End all answers that are under way with what they have by then, as `abort`."""
        self._aborts += 1

    async def _chat(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, chat=True)

    async def _complete(self, http: web.Request) -> web.StreamResponse:
        return await self._generate(http, chat=False)

    async def _generate(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        self.counters.requests += 1
        try:
            request = msgspec.json.decode(await http.read(), type=GenerationRequest)
        except msgspec.DecodeError as error:
            return self.failure(400, str(error))
        if chat and not request.messages:
            return self.failure(400, "messages must not be empty")
        refused = self.dialect.refuse_generation(request) or await self._misbehave()
        if refused is not None:
            return refused
        plan = plan_answer(
            request,
            engine=self.dialect.engine,
            model=self.model,
            context_tokens=self.dialect.context_tokens,
            reasons=self.dialect.reasons and chat,
        )
        frames = self._frames(chat=chat)
        async with self._counted():
            if request.stream:
                options = request.stream_options
                include_usage = options is not None and options.include_usage
                return await self._stream(http, plan, frames, include_usage=include_usage)
            return await self._whole(plan, frames)

    def _frames(self, *, chat: bool) -> Frames:
        return Frames(self.model, chat=chat, first_content=self.dialect.first_content)

    async def _misbehave(self) -> web.Response | None:
        if Fault.HTTP_500 in self.faults:
            return self.failure(500, _INTERNAL_ERROR)
        if Fault.HANG in self.faults:
            async with self._counted():
                await asyncio.Event().wait()
        if Fault.SLOW_FIRST_BYTE in self.faults:
            await asyncio.sleep(self._settings.slow_first_byte_s)
        return None

    @asynccontextmanager
    async def _counted(self) -> AsyncIterator[None]:
        """A slot for one generation. A caller that leaves shows as cancellation, or as a failed write."""
        counters = self.counters
        waiting = True
        counters.waiting += 1
        try:
            async with self._free_slots:
                await self.awake.wait()
                waiting = False
                counters.waiting -= 1
                counters.active += 1
                try:
                    yield
                finally:
                    counters.active -= 1
        except (asyncio.CancelledError, ConnectionError):
            counters.aborted += 1
            raise
        finally:
            if waiting:
                counters.waiting -= 1
        counters.completed += 1

    async def _spoken(self, plan: Plan) -> AsyncIterator[Piece]:
        self.counters.prompt_tokens += plan.prompt_tokens
        aborts = self._aborts
        async for piece in paced(plan, self._pace):
            if self._aborts > aborts:
                return
            self.counters.tokens_generated += 1
            yield Piece(piece.kind, "!") if self.garbled else piece

    async def _whole(self, plan: Plan, frames: Frames) -> web.Response:
        started = time.monotonic()
        aborts = self._aborts
        pieces = [piece async for piece in self._spoken(plan)]
        finish_reason = "abort" if self._aborts > aborts else plan.finish_reason
        usage = usage_of(plan.prompt_tokens, len(pieces))
        extras = self.dialect.extras(self._timing(plan, len(pieces), started))
        return json_response(frames.whole(pieces, finish_reason, usage, extras))

    async def _stream(
        self, http: web.Request, plan: Plan, frames: Frames, *, include_usage: bool
    ) -> web.StreamResponse:
        response = web.StreamResponse(
            headers={"Content-Type": self.dialect.event_stream_type, "Cache-Control": "no-cache"}
        )
        response.enable_chunked_encoding()
        await response.prepare(http)
        started = time.monotonic()
        pings = asyncio.create_task(self._ping(response))
        try:
            spoken, aborts = 0, self._aborts
            async for piece in self._spoken(plan):
                if spoken == 0:
                    await response.write(frames.role())
                if spoken == TOKENS_BEFORE_FAULT and await self._break(http, response, frames.piece(piece)):
                    return response
                await response.write(frames.piece(piece))
                spoken += 1
            extras = self.dialect.extras(self._timing(plan, spoken, started))
            finish_reason = "abort" if self._aborts > aborts else plan.finish_reason
            await response.write(frames.last(finish_reason, {} if include_usage else extras))
            if include_usage:
                await response.write(frames.usage(usage_of(plan.prompt_tokens, spoken), extras))
            await response.write(DONE)
        finally:
            pings.cancel()
        await response.write_eof()
        return response

    async def _break(self, http: web.Request, response: web.StreamResponse, next_frame: bytes) -> bool:
        """Do what the faults of mid-stream demand; True if that was the end."""
        if Fault.CUT_MID_STREAM in self.faults:
            await response.write(next_frame[: len(next_frame) // 2])
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError("simulated fault: cut in mid-stream")
        if Fault.BROKEN_SSE in self.faults:
            await response.write(next_frame[: len(next_frame) // 2] + b"\n\n")
            await response.write_eof()
            return True
        if Fault.ERROR_FRAME_THEN_DONE in self.faults:
            await response.write(frame(self.dialect.error(500, _INTERNAL_ERROR)) + DONE)
            await response.write_eof()
            return True
        return False

    async def _ping(self, response: web.StreamResponse) -> None:
        interval_s = self.dialect.ping_interval_s
        # Who left is noticed by the stream itself.
        with suppress(ConnectionError):
            while interval_s is not None:
                await asyncio.sleep(interval_s)
                await response.write(b": ping\n\n")

    def _timing(self, plan: Plan, completion_tokens: int, started: float) -> Timing:
        prompt_s = self._pace.first_token_delay_s(plan.prompt_tokens)
        generation_s = max(time.monotonic() - started - prompt_s, 1e-6)
        return Timing(plan.prompt_tokens, completion_tokens, prompt_s, generation_s)

    async def _embeddings(self, http: web.Request) -> web.StreamResponse:
        self.counters.requests += 1
        try:
            request = msgspec.json.decode(await http.read(), type=EmbeddingRequest)
        except msgspec.DecodeError as error:
            return self.failure(400, str(error))
        refused = self.dialect.refuse_embedding(request) or await self._misbehave()
        if refused is not None:
            return refused
        async with self._counted():
            tokens = sum(count_tokens(text) for text in request.inputs)
            self.counters.prompt_tokens += tokens
            await asyncio.sleep(self._pace.first_token_delay_s(tokens))
            rows = [
                {"index": index, "object": "embedding", "embedding": embed(text)}
                for index, text in enumerate(request.inputs)
            ]
            usage = {"prompt_tokens": tokens, "total_tokens": tokens}
            return json_response({"object": "list", "data": rows, "model": self.model, "usage": usage})

    async def _state(self, http: web.Request) -> web.Response:
        state = {"simulated": True, "engine": self.dialect.engine, "model": self.model, "ready": self.ready}
        return json_response(
            {**state, **msgspec.structs.asdict(self.counters), "faults": self.faults.names()}
        )

    async def _switch_faults(self, http: web.Request) -> web.Response:
        try:
            wanted = msgspec.json.decode(await http.read(), type=dict[str, list[str]])
            self.faults.switch_to(parse_faults(wanted.get("faults", [])))
        except ValueError as error:
            return json_response({"error": str(error)}, status=400)
        return json_response({"faults": self.faults.names()})


def json_response(body: object, *, status: int = 200) -> web.Response:
    """A JSON answer."""
    return web.Response(body=msgspec.json.encode(body), status=status, content_type="application/json")
