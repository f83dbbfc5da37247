"""Answers of a simulated Ollama: lines of its own routes, and its way with the frames of OpenAI's."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import msgspec
from aiohttp import web
from msgspec import Struct

from nodeagent.simulators._faults import TOKENS_BEFORE_FAULT, Fault
from nodeagent.simulators._frames import Frames
from nodeagent.simulators._generation import (
    GenerationRequest,
    Message,
    Piece,
    PieceKind,
    Plan,
    Tool,
    is_reasoner,
    plan_answer,
)
from nodeagent.simulators._http import SimulatedEngine, Timing, json_response
from nodeagent.simulators._settings import Settings, pace_of

_ERROR_TYPES = {400: "invalid_request_error", 404: "not_found_error"}
_FAILURE = "an error was encountered while running the model: simulated fault"


class Options(Struct):
    """The parameters of a generation that are understood."""

    num_predict: int | None = None


class NativeRequest(Struct):
    """A request to `/api/generate` or `/api/chat`."""

    model: str = ""
    prompt: str = ""
    messages: list[Message] = []
    stream: bool | None = None
    keep_alive: float | str | None = None
    options: Options | None = None
    tools: list[Tool] | None = None

    @property
    def empty(self) -> bool:
        """Whether it asks for no words, only for the model."""
        return not self.prompt and not self.messages


class ModelDialect:
    """The ways of Ollama with one of its models: a `Dialect`."""

    engine = "Ollama"
    event_stream_type = "text/event-stream"
    first_content: str | None = ""
    ping_interval_s: float | None = None

    def __init__(self, name: str, context_tokens: int) -> None:
        self.name = name
        self.reasons = is_reasoner(name)
        self.context_tokens = context_tokens

    def error(self, status: int, message: str) -> dict[str, Any]:
        """See `Dialect.error`."""
        kind = _ERROR_TYPES.get(status, "api_error")
        return {"error": {"message": message, "type": kind, "param": None, "code": None}}

    def refuse_generation(self, request: GenerationRequest) -> web.Response | None:
        """See `Dialect.refuse_generation`. A prompt that is too long is cut without a word."""
        if not is_embedder(self.name):
            return None
        verb = "chat" if request.messages else "generate"
        return json_response(self.error(400, f'"{request.model}" does not support {verb}'), status=400)

    def refuse_embedding(self, request: object) -> web.Response | None:
        """See `Dialect.refuse_embedding`."""
        return None

    def extras(self, timing: Timing) -> dict[str, Any]:
        """See `Dialect.extras`."""
        return {}


class ModelEngine(SimulatedEngine):
    """One model's answers, on OpenAI's routes and on Ollama's. Counters and faults are the server's."""

    def __init__(
        self, dialect: ModelDialect, *, slots: int, settings: Settings, server: SimulatedEngine
    ) -> None:
        name = dialect.name
        super().__init__(dialect, model=name, slots=slots, pace=pace_of(name, settings), settings=settings)
        self.counters = server.counters
        self.faults = server.faults

    async def generate(self, http: web.Request, *, chat: bool) -> web.StreamResponse:
        """Answer on OpenAI's routes."""
        return await self._generate(http, chat=chat)

    async def embeddings(self, http: web.Request) -> web.StreamResponse:
        """Embed on OpenAI's route."""
        return await self._embeddings(http)

    async def native(
        self, http: web.Request, asked: NativeRequest, *, chat: bool, load_s: float
    ) -> web.StreamResponse:
        """Answer on Ollama's own routes, as lines unless a whole answer is wanted."""
        self.counters.requests += 1
        if Fault.HTTP_500 in self.faults:
            return json_response({"error": _FAILURE}, status=500)
        await self._misbehave()
        request = GenerationRequest(
            model=asked.model,
            messages=asked.messages,
            prompt=asked.prompt,
            max_tokens=asked.options.num_predict if asked.options is not None else None,
            tools=asked.tools,
        )
        plan = plan_answer(
            request,
            engine=self.dialect.engine,
            model=self.model,
            context_tokens=self.dialect.context_tokens,
            reasons=self.dialect.reasons,
        )
        lines = _Lines(asked.model, chat=chat, started_s=time.monotonic(), load_s=load_s)
        async with self._counted():
            if asked.stream is False:
                pieces = [piece async for piece in self._spoken(plan)]
                return json_response({**lines.said(pieces), **lines.end(plan, len(pieces))})
            return await self._lines(http, plan, lines)

    async def _lines(self, http: web.Request, plan: Plan, lines: _Lines) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/x-ndjson"})
        response.enable_chunked_encoding()
        await response.prepare(http)
        call: list[Piece] = []
        spoken = 0
        async for piece in self._spoken(plan):
            if spoken == TOKENS_BEFORE_FAULT and await self._break_lines(http, response):
                return response
            spoken += 1
            if piece.kind in (PieceKind.TOOL_NAME, PieceKind.TOOL_ARGUMENTS):
                # A call comes in one piece.
                call.append(piece)
            else:
                await response.write(line(lines.said([piece]) | {"done": False}))
        if call:
            await response.write(line(lines.said(call) | {"done": False}))
        await response.write(line(lines.said([]) | lines.end(plan, spoken)))
        await response.write_eof()
        return response

    async def _break_lines(self, http: web.Request, response: web.StreamResponse) -> bool:
        """Do what the faults of mid-stream demand; True if that was the end."""
        if Fault.CUT_MID_STREAM in self.faults:
            if http.transport is not None:
                http.transport.abort()
            raise ConnectionResetError("simulated fault: cut in mid-stream")
        if Fault.BROKEN_SSE in self.faults:
            await response.write(b'{"model":"')
        elif Fault.ERROR_FRAME_THEN_DONE in self.faults:
            await response.write(line({"error": _FAILURE}))
        else:
            return False
        await response.write_eof()
        return True

    def _frames(self, *, chat: bool) -> Frames:
        return _OllamaFrames(self.model, chat=chat, first_content=None)


class _Lines:
    """Makes the objects of one answer on Ollama's own routes."""

    def __init__(self, model: str, *, chat: bool, started_s: float, load_s: float) -> None:
        self._model = model
        self._chat = chat
        self._started_s = started_s
        self._load_s = load_s

    def said(self, pieces: list[Piece]) -> dict[str, Any]:
        """What `pieces` say."""
        content, thinking, name, arguments = (
            "".join(piece.text for piece in pieces if piece.kind is kind)
            for kind in (
                PieceKind.CONTENT,
                PieceKind.REASONING,
                PieceKind.TOOL_NAME,
                PieceKind.TOOL_ARGUMENTS,
            )
        )
        head = {"model": self._model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}
        thought = {"thinking": thinking} if thinking else {}
        if not self._chat:
            return {**head, "response": content, **thought}
        message: dict[str, Any] = {"role": "assistant", "content": content, **thought}
        if name:
            function = {"name": name, "arguments": msgspec.json.decode(arguments or "{}")}
            message["tool_calls"] = [{"function": function}]
        return {**head, "message": message}

    def end(self, plan: Plan, spoken: int) -> dict[str, Any]:
        """Why the answer ends, and what it took."""
        total_s = time.monotonic() - self._started_s + self._load_s
        counts = {"prompt_eval_count": plan.prompt_tokens, "eval_count": spoken}
        return {
            "done": True,
            "done_reason": "length" if plan.finish_reason == "length" else "stop",
            "total_duration": nanoseconds(total_s),
            "load_duration": nanoseconds(self._load_s),
            "eval_duration": nanoseconds(total_s - self._load_s),
            **{name: count for name, count in counts.items() if count},
        }


class _OllamaFrames(Frames):
    """Every chunk names the role, and reasoning is called just that."""

    def __init__(self, model: str, *, chat: bool, first_content: str | None) -> None:
        super().__init__(model, chat=chat, first_content=first_content)
        self._head["system_fingerprint"] = "fp_ollama"

    def role(self) -> bytes:
        return b""

    def _choice(
        self,
        delta: dict[str, Any],
        finish_reason: str | None,
        *,
        text: str = "",
        extras: dict[str, Any] | None = None,
    ) -> bytes:
        said = {"role": "assistant", "content": "", **_renamed(delta)}
        return super()._choice(said, finish_reason, text=text, extras=extras)

    def _message(self, pieces: Any) -> dict[str, Any]:
        message = _renamed(super()._message(pieces))
        return message | {"content": message["content"] or ""}


def is_embedder(name: str) -> bool:
    """Whether a model of that name only embeds."""
    return "embed" in name or name.startswith("bge-")


def line(value: dict[str, Any]) -> bytes:
    """One line of a stream."""
    return msgspec.json.encode(value) + b"\n"


def nanoseconds(duration_s: float) -> int:
    """A duration as Ollama tells it."""
    return int(duration_s * 1e9)


def _renamed(said: dict[str, Any]) -> dict[str, Any]:
    return {("reasoning" if key == "reasoning_content" else key): value for key, value in said.items()}
