"""From Anthropic's answers and streams to OpenAI's. Pure, and incremental: a state machine over events."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from controlplane.cloud._failure import error_text
from controlplane.cloud._values import CloudUsage
from rung.errors import EngineProtocolError
from rung.service import SseSplitter, event_data

_FINISH_REASONS = {
    "end_turn": "stop",
    "stop_sequence": "stop",
    "pause_turn": "stop",
    "max_tokens": "length",
    "model_context_window_exceeded": "length",
    "tool_use": "tool_calls",
    "refusal": "content_filter",
}
_DONE = b"data: [DONE]\n\n"


class _Usage(Struct):
    input_tokens: int | None = None
    output_tokens: int | None = None
    cache_read_input_tokens: int | None = None
    cache_creation_input_tokens: int | None = None


class _Block(Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    id: str = ""
    name: str = ""
    input: Any = None


class _Message(Struct):
    id: str = ""
    model: str = ""
    content: list[_Block] = []
    stop_reason: str | None = None
    usage: _Usage | None = None
    type: str = ""
    error: Any = None


class _Delta(Struct):
    type: str = ""
    text: str = ""
    thinking: str = ""
    partial_json: str = ""
    stop_reason: str | None = None


class _Event(Struct):
    type: str = ""
    index: int = 0
    message: _Message | None = None
    content_block: _Block | None = None
    delta: _Delta | None = None
    usage: _Usage | None = None
    error: Any = None


_event_decoder = msgspec.json.Decoder(_Event)
_message_decoder = msgspec.json.Decoder(_Message)
_encode = msgspec.json.encode


class _ToolCall:
    """A call that is being told."""

    __slots__ = ("index", "input", "told")

    def __init__(self, index: int, given: Any) -> None:
        self.index = index
        self.input = given
        self.told = False


class AnthropicAnswer:
    """One answer, from the first piece to the last.

    Args:
        what: name of the target, for messages.
        model: the provider's name of the model, until the answer says.
        created_s: Unix time that the answer carries.
    """

    def __init__(self, what: str, model: str, *, created_s: int) -> None:
        self.usage: CloudUsage | None = None
        self.final = False
        self.delivered_bytes = 0
        self._what = what
        self._splitter = SseSplitter()
        self._head: dict[str, Any] = {
            "id": "",
            "object": "chat.completion.chunk",
            "created": created_s,
            "model": model,
        }
        self._counted = _Usage(0, 0, 0, 0)
        self._calls: dict[int, _ToolCall] = {}
        self._began = False
        self._ended = False

    # A stream ----------------------------------------------------------------------------------------

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of the stream; returns OpenAI's events for it.

        An error of the provider, or what is no stream of Messages, becomes an error event, and nothing
        comes after it.

        Raises:
            EngineProtocolError: an event grows without end.
        """
        return self._events(self._splitter.feed(chunk))

    def finish(self) -> bytes:
        """The stream has ended; returns what is still to be passed on. One that was cut has no `[DONE]`."""
        return self._events(self._splitter.rest())

    def _events(self, whole: bytes) -> bytes:
        pieces: list[bytes] = []
        for text in whole.split(b"\n\n"):
            data = event_data(text)
            if not data or self._ended:
                continue
            try:
                event = _event_decoder.decode(data)
            except msgspec.DecodeError as error:
                pieces.append(self._failed(f"{self._what} sent an event that is not understood: {error}"))
                continue
            pieces += self._event(event)
        return b"".join(pieces)

    def _event(self, event: _Event) -> list[bytes]:
        match event.type:
            case "message_start":
                return self._begin(event.message or _Message())
            case "content_block_start":
                return self._begin_block(event.index, event.content_block or _Block())
            case "content_block_delta":
                return self._delta(event.index, event.delta or _Delta())
            case "content_block_stop":
                return self._end_block(event.index)
            case "message_delta":
                return self._end_message(event)
            case "message_stop":
                return self._stop()
            case "error":
                return [self._failed(error_text(event.error))]
        # `ping`, and what will be thought of later.
        return []

    def _begin(self, message: _Message) -> list[bytes]:
        self._head["id"] = _answer_id(message.id)
        self._head["model"] = message.model or self._head["model"]
        self._count(message.usage)
        return self._role()

    def _role(self) -> list[bytes]:
        if self._began:
            return []
        self._began = True
        return [self._chunk({"role": "assistant", "content": ""})]

    def _begin_block(self, place: int, block: _Block) -> list[bytes]:
        pieces = self._role()
        if block.type == "tool_use":
            call = self._calls[place] = _ToolCall(len(self._calls), block.input)
            function = {"name": block.name, "arguments": ""}
            told = {"index": call.index, "id": block.id, "type": "function", "function": function}
            return [*pieces, self._chunk({"tool_calls": [told]})]
        return [*pieces, *self._say("content", block.text), *self._say("reasoning_content", block.thinking)]

    def _delta(self, place: int, delta: _Delta) -> list[bytes]:
        match delta.type:
            case "text_delta":
                return self._say("content", delta.text)
            case "thinking_delta":
                return self._say("reasoning_content", delta.thinking)
            case "input_json_delta" if place in self._calls and delta.partial_json:
                return self._argue(self._calls[place], delta.partial_json)
        # Signatures and citations have no place in OpenAI's shape.
        return []

    def _end_block(self, place: int) -> list[bytes]:
        call = self._calls.get(place)
        if call is None or call.told:
            return []
        # No fragment came: what takes no arguments still has to be called with an object.
        return self._argue(call, _encode(call.input or {}).decode())

    def _end_message(self, event: _Event) -> list[bytes]:
        self._count(event.usage)
        reason = event.delta.stop_reason if event.delta else None
        if reason is None:
            return []
        self.final = True
        return [*self._role(), self._chunk({}, _FINISH_REASONS.get(reason, "stop"))]

    def _stop(self) -> list[bytes]:
        self._ended = True
        usage = {**self._head, "choices": [], "usage": self._openai_usage()}
        return [b"data: " + _encode(usage) + b"\n\n", _DONE]

    def _failed(self, message: str) -> bytes:
        self._ended = True
        return b"data: " + _encode({"error": {"message": message, "type": "provider_error"}}) + b"\n\n"

    def _say(self, field: str, text: str) -> list[bytes]:
        if not text:
            return []
        self.delivered_bytes += len(text.encode())
        return [self._chunk({field: text})]

    def _argue(self, call: _ToolCall, fragment: str) -> list[bytes]:
        call.told = True
        self.delivered_bytes += len(fragment.encode())
        return [self._chunk({"tool_calls": [{"index": call.index, "function": {"arguments": fragment}}]})]

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "finish_reason": finish_reason}
        return b"data: " + _encode({**self._head, "choices": [choice]}) + b"\n\n"

    # An answer in one piece --------------------------------------------------------------------------

    def whole(self, body: bytes) -> bytes:
        """The answer as OpenAI's JSON. Raises EngineProtocolError: it is none."""
        try:
            message = _message_decoder.decode(body)
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{self._what} sent an answer that is not understood: {error}", engine=self._what
            ) from None
        if message.type != "message":
            raise EngineProtocolError(
                f"{self._what} sent no message: {error_text(message.error)}", engine=self._what
            )
        self._count(message.usage)
        self.final = message.usage is not None
        choice = {
            "index": 0,
            "message": _openai_message(message.content),
            "finish_reason": _FINISH_REASONS.get(message.stop_reason or "", "stop"),
        }
        return _encode(
            {
                **self._head,
                "id": _answer_id(message.id),
                "object": "chat.completion",
                "model": message.model or self._head["model"],
                "choices": [choice],
                "usage": self._openai_usage(),
            }
        )

    # Usage -------------------------------------------------------------------------------------------

    def _count(self, usage: _Usage | None) -> None:
        """Take figures over: each is the sum so far, and what is left out has not changed."""
        if usage is None:
            return
        counted = self._counted
        for name in _Usage.__struct_fields__:
            value = getattr(usage, name)
            if value is not None:
                setattr(counted, name, value)
        cached = counted.cache_read_input_tokens or 0
        prompt = (counted.input_tokens or 0) + cached + (counted.cache_creation_input_tokens or 0)
        self.usage = CloudUsage(prompt, counted.output_tokens or 0, cached)

    def _openai_usage(self) -> dict[str, Any]:
        usage = self.usage or CloudUsage()
        return {
            "prompt_tokens": usage.prompt_tokens,
            "completion_tokens": usage.completion_tokens,
            "total_tokens": usage.prompt_tokens + usage.completion_tokens,
            "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        }


def _openai_message(blocks: list[_Block]) -> dict[str, Any]:
    text = "".join(block.text for block in blocks if block.type == "text")
    thoughts = "".join(block.thinking for block in blocks if block.type == "thinking")
    calls = [
        {
            "id": block.id,
            "type": "function",
            "function": {"name": block.name, "arguments": _encode(block.input or {}).decode()},
        }
        for block in blocks
        if block.type == "tool_use"
    ]
    message: dict[str, Any] = {"role": "assistant", "content": text if text or not calls else None}
    if thoughts:
        message["reasoning_content"] = thoughts
    if calls:
        message["tool_calls"] = calls
    return message


def _answer_id(identity: str) -> str:
    return f"chatcmpl-{identity.removeprefix('msg_')}" if identity else ""
