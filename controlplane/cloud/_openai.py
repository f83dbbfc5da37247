"""OpenAI's dialect: requests made fit for who is stricter than an engine, answers read as they pass. Pure."""

from __future__ import annotations

from typing import Any

import msgspec
from msgspec import Struct

from controlplane.cloud._estimate import answer_limit
from controlplane.cloud._failure import error_text
from controlplane.cloud._values import CloudModel, CloudUsage
from rung.errors import EngineProtocolError, InvalidRequestError
from rung.service import SseSplitter, event_data


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


#: What clients may send to Rung and nobody else knows.
_OURS = frozenset({"effort", "rung"})
#: Fields of a chat request that OpenAI and those who copy it know. Engines have more, and ignore what they
#: do not know; these refuse it.
_STANDARD = _names(
    "audio frequency_penalty function_call functions logit_bias logprobs max_completion_tokens max_tokens "
    "messages metadata modalities model n parallel_tool_calls prediction presence_penalty prompt_cache_key "
    "reasoning_effort response_format safety_identifier seed service_tier stop store stream stream_options "
    "temperature tool_choice tools top_logprobs top_p user verbosity web_search_options"
)


class Quirks(Struct, frozen=True, kw_only=True):
    """Where a provider differs from others.

    Attributes:
        fields: those that it knows; None if it takes any.
        limit_field: what it calls the limit of an answer; empty for whatever the caller wrote.
        takes_thoughts: whether earlier turns keep their `reasoning_content`, which some demand and others
            refuse.
    """

    fields: frozenset[str] | None = None
    limit_field: str = ""
    takes_thoughts: bool = False


_QUIRKS = {
    "openai": Quirks(fields=_STANDARD, limit_field="max_completion_tokens"),
    "deepseek": Quirks(
        fields=_names(
            "frequency_penalty logprobs max_tokens messages model presence_penalty response_format stop "
            "stream stream_options temperature thinking tool_choice tools top_logprobs top_p"
        ),
        limit_field="max_tokens",
        takes_thoughts=True,
    ),
    "google": Quirks(
        fields=_names(
            "extra_body frequency_penalty max_tokens messages modalities model n parallel_tool_calls "
            "presence_penalty reasoning_effort response_format seed stop stream stream_options temperature "
            "tool_choice tools top_p user"
        ),
        limit_field="max_tokens",
    ),
}
_NO_QUIRKS = Quirks(takes_thoughts=True)


def quirks_of(provider: str) -> Quirks:
    """Where a provider differs, by its id; an unknown one is taken at its word."""
    return _QUIRKS.get(provider, _NO_QUIRKS)


def request_fields(body: bytes) -> dict[str, Any]:
    """The fields of a chat request. Raises InvalidRequestError: it is none."""
    try:
        fields = msgspec.json.decode(body, type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not a chat request: {error}") from None
    if not isinstance(fields.get("messages"), list) or not fields["messages"]:
        raise InvalidRequestError("messages must be a list with at least one message")
    return fields


def openai_body(fields: dict[str, Any], model: CloudModel, *, stream: bool, quirks: Quirks) -> bytes:
    """The body for the provider. A limit of the answer is always in it: what is reserved depends on it."""
    known = fields.keys() - _OURS if quirks.fields is None else fields.keys() & quirks.fields
    wanted = {name: value for name, value in fields.items() if name in known - model.drop_fields}
    written = "max_tokens" if "max_completion_tokens" not in fields else "max_completion_tokens"
    for name in ("max_tokens", "max_completion_tokens"):
        wanted.pop(name, None)
    wanted[quirks.limit_field or written] = answer_limit(fields, model)
    if "reasoning" not in model.capabilities:
        wanted.pop("reasoning_effort", None)
    if not quirks.takes_thoughts or "reasoning_content" in model.drop_fields:
        wanted["messages"] = [_without_thoughts(message) for message in fields["messages"]]
    wanted["model"] = model.model
    wanted["stream"] = stream
    wanted.pop("stream_options", None)
    if stream:
        wanted["stream_options"] = {"include_usage": True}
    return msgspec.json.encode(wanted)


def _without_thoughts(message: Any) -> Any:
    if not isinstance(message, dict) or not message.keys() & {"reasoning_content", "reasoning"}:
        return message
    return {name: value for name, value in message.items() if name not in ("reasoning_content", "reasoning")}


class _Details(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    total_tokens: int | None = None
    prompt_tokens_details: _Details | None = None
    prompt_cache_hit_tokens: int | None = None

    def value(self) -> CloudUsage:
        prompt, completion = self.prompt_tokens or 0, self.completion_tokens or 0
        details = self.prompt_tokens_details
        cached = (details.cached_tokens if details else None) or self.prompt_cache_hit_tokens or 0
        # Gemini leaves its thoughts out of the completion, and has them in the total and on the bill.
        return CloudUsage(prompt, max(completion, (self.total_tokens or 0) - prompt), cached)


class _Function(Struct):
    arguments: str | None = None


class _Call(Struct):
    function: _Function | None = None


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[_Call] | None = None

    def size_bytes(self) -> int:
        calls = sum(
            len(call.function.arguments or "") for call in self.tool_calls or () if call.function is not None
        )
        return len((self.content or "").encode()) + len((self.reasoning_content or "").encode()) + calls


class _Choice(Struct):
    delta: _Delta | None = None


class _Chunk(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None


_chunk_decoder = msgspec.json.Decoder(_Chunk)


class OpenAiAnswer:
    """Passes an answer on as it is, and notes what it costs.

    Only Gemini's errors, which come in an array, are put into the shape that others use.
    """

    def __init__(self, what: str) -> None:
        self.usage: CloudUsage | None = None
        self.final = False
        self.delivered_bytes = 0
        self._what = what
        self._splitter = SseSplitter()

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of a stream; returns what to pass on. Raises EngineProtocolError: it has no end."""
        return self._events(self._splitter.feed(chunk))

    def finish(self) -> bytes:
        """The stream has ended; returns what was held back."""
        return self._events(self._splitter.rest())

    def whole(self, body: bytes) -> bytes:
        """Take an answer in one piece. Raises EngineProtocolError: it is not JSON, or an error."""
        stripped = body.strip()
        try:
            if stripped.startswith(b"["):
                raise EngineProtocolError(
                    f"{self._what} sent an error for an answer: {error_text(msgspec.json.decode(stripped))}",
                    engine=self._what,
                )
            self._read(stripped)
        except msgspec.ValidationError:
            pass
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{self._what} sent an answer that is not JSON: {error}", engine=self._what
            ) from None
        return stripped

    def _events(self, whole: bytes) -> bytes:
        events = whole.split(b"\n\n") if whole else []
        changed = False
        for place, event in enumerate(events):
            data = event_data(event)
            if not data or data == b"[DONE]":
                continue
            if data.startswith(b"["):
                events[place] = _error_event(data)
                changed = True
                continue
            try:
                self._read(data)
            except msgspec.DecodeError:
                # Whoever reads the stream after us says so, with the job's name.
                continue
        return b"\n\n".join(events) if changed else whole

    def _read(self, data: bytes) -> None:
        chunk = _chunk_decoder.decode(data)
        if chunk.usage is not None:
            self.usage = chunk.usage.value()
            self.final = True
        for choice in chunk.choices:
            if choice.delta is not None:
                self.delivered_bytes += choice.delta.size_bytes()


def _error_event(data: bytes) -> bytes:
    try:
        message = error_text(msgspec.json.decode(data))
    except msgspec.DecodeError:
        return b"data: " + data
    return b"data: " + msgspec.json.encode({"error": {"message": message, "type": "provider_error"}})
