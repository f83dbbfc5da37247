"""OpenAI's shapes: the little of a request that routing needs, and what an answer says."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, Protocol

import msgspec
from msgspec import Struct

from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    InvalidRequestError,
    RungError,
)
from rung.service import SseSplitter, event_data
from rung.types import TokenDelta, ToolCallDelta, Usage

#: Statuses with which an engine blames the request. Others are the engine's trouble, not the caller's.
_CALLERS_FAULT = frozenset({400, 404, 405, 409, 413, 415, 422})


class _StreamOptions(Struct):
    include_usage: bool = False


class RequestHead(Struct):
    """The fields of an OpenAI request that decide where it goes; the rest is not looked at."""

    model: str = ""
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    effort: int | None = None
    reasoning_effort: str | None = None
    tools: msgspec.Raw = msgspec.Raw()

    @property
    def wants_usage(self) -> bool:
        """Whether the caller asked for a usage chunk in its stream."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def has_tools(self) -> bool:
        """Whether the caller offers tools of its own."""
        return offers_tools(self.tools)


class _Function(Struct):
    name: str | None = None
    arguments: str | None = None


class _ToolCall(Struct):
    index: int | None = None
    id: str | None = None
    function: _Function | None = None


class _Delta(Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[_ToolCall] | None = None


class _Choice(Struct):
    index: int = 0
    delta: _Delta | None = None
    message: _Delta | None = None
    finish_reason: str | None = None


class _TokenDetails(Struct):
    cached_tokens: int | None = None


class _Usage(Struct):
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    prompt_tokens_details: _TokenDetails | None = None

    def value(self) -> Usage:
        details = self.prompt_tokens_details
        return Usage(
            prompt_tokens=self.prompt_tokens or 0,
            completion_tokens=self.completion_tokens or 0,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
        )


class _Embedding(Struct):
    embedding: list[float]
    index: int = 0


class _Answer(Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


class _EmbeddingAnswer(Struct):
    data: list[_Embedding]
    usage: _Usage | None = None


_DATA_URL = re.compile(rb'"data:[^"]*"')
_PICTURE = re.compile(rb'"image_url"\s*:')

_head_decoder = msgspec.json.Decoder(RequestHead)
_answer_decoder = msgspec.json.Decoder(_Answer)
_answers_decoder = msgspec.json.Decoder(list[_Answer])
_embedding_decoder = msgspec.json.Decoder(_EmbeddingAnswer)
_fields_decoder = msgspec.json.Decoder(dict[str, msgspec.Raw])
_encode = msgspec.json.encode


def read_head(body: bytes) -> RequestHead:
    """What of a request decides where it goes. Raises InvalidRequestError naming what is wrong."""
    try:
        return _head_decoder.decode(body)
    except msgspec.ValidationError as error:
        raise InvalidRequestError(f"the request body is not valid: {error}") from None
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"the request body is not JSON: {error}") from None


def offers_tools(tools: msgspec.Raw) -> bool:
    """Whether the field `tools` of a request, as it stands there, offers any."""
    return bytes(tools).strip() not in (b"", b"null", b"[]")


def has_images(body: bytes) -> bool:
    """Whether a chat request shows a picture."""
    # A look at the bytes: a text that speaks of the field costs a better target, and nothing else.
    return b'"image_url"' in body


def count_images(body: bytes) -> int:
    """How many pictures a chat request shows."""
    return sum(1 for _ in _PICTURE.finditer(body))


def picture_bytes(body: bytes) -> int:
    """Size of the pictures that a chat request carries in itself, as text."""
    return sum(len(each.group()) for each in _DATA_URL.finditer(body))


def engine_body(body: bytes, *, model: str, stream: bool | None) -> bytes:
    """The body for the engine: its own name of the model, and, for a stream, usage at its end.

    `effort` is for us alone. All other fields stay as they are, byte for byte. `stream` None leaves the
    caller's choice out (embeddings).
    """
    fields = _fields_decoder.decode(body)
    fields.pop("effort", None)
    fields["model"] = msgspec.Raw(_encode(model))
    if stream is not None:
        fields["stream"] = msgspec.Raw(b"true" if stream else b"false")
        if stream:
            fields["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
        else:
            fields.pop("stream_options", None)
    return _encode(fields)


def check_status(status: int, body: bytes, retry_after: str, what: str) -> None:
    """Raise what an engine's status means; nothing for a success.

    Raises:
        EngineRejectedError: the request is at fault, with the engine's status, message and code.
        EngineFailedError: the engine is.
    """
    if status < 400:
        return
    message, code = _error_text(body)
    metadata = {"engine": what, "engine_status": str(status)}
    if retry_after:
        metadata["retry_after"] = retry_after
    if status in _CALLERS_FAULT:
        if code:
            metadata["engine_code"] = code
        raise EngineRejectedError(message or f"{what} refused the request with HTTP {status}", **metadata)
    raise EngineFailedError(
        f"{what} answered HTTP {status}" + (f": {message}" if message else ""), **metadata
    )


def _error_text(body: bytes) -> tuple[str, str]:
    """Message and code of an error body: OpenAI's, older vLLM's, Ollama's or FastAPI's shape, or text."""
    try:
        found = msgspec.json.decode(body)
    except msgspec.DecodeError:
        return body[:500].decode("utf-8", "replace").strip(), ""
    if isinstance(found, dict):
        error = found.get("error", found)
        if isinstance(error, dict):
            message = error.get("message") or error.get("detail") or ""
            return str(message)[:2000], str(error.get("type") or error.get("code") or "")
        return str(error)[:2000], ""
    return str(found)[:500], ""


class AnswerEvents(Protocol):
    """Takes what an answer says."""

    def text(self, delta: TokenDelta) -> None:
        """Text to append."""
        ...

    def tool_call(self, delta: ToolCallDelta) -> None:
        """A part of a tool call."""
        ...

    def consumed(self, usage: Usage) -> None:
        """What the answer took."""
        ...


class AnswerReader:
    """Reads an answer into a job's events, and says which bytes of a stream to pass on.

    Only whole events are passed on, so that an engine that breaks in mid-event never leaves half of
    one with the caller; `[DONE]` is held back until it is known that the answer is complete. Text that
    comes in one piece is one event of the job, however many tokens it has.

    Args:
        job: takes the events.
        what: name of the engine, for messages.
        keep_usage: whether the caller wants the chunk with the usage.
        mark: makes the JSON that the last chunk has as `rung`, once it is there.
    """

    __slots__ = ("_failure", "_finish_reason", "_job", "_keep_usage", "_mark", "_splitter", "_text", "_what")

    def __init__(
        self, job: AnswerEvents, what: str, *, keep_usage: bool, mark: Callable[[], bytes] | None = None
    ) -> None:
        self._job = job
        self._mark = mark
        self._text: TokenDelta | None = None
        self._what = what
        self._keep_usage = keep_usage
        self._splitter = SseSplitter()
        self._finish_reason: str | None = None
        self._failure: RungError | None = None

    def feed(self, chunk: bytes) -> bytes:
        """Take a piece of the engine's stream; returns what to pass on of it.

        After something that is not a stream of OpenAI's chunks, or an error, `failed` is set, and
        `finish` raises it.

        Raises:
            EngineProtocolError: an event grows without end.
        """
        return self._events(self._splitter.feed(chunk))

    def finish(self) -> bytes:
        """The stream has ended: what is still to be passed on, or the failure that it ended with.

        Raises:
            EngineFailedError: the engine said that it failed.
            EngineProtocolError: it ended without a finish reason, so the answer is cut.
        """
        left = self._events(self._splitter.rest())
        if self._failure is not None:
            raise self._failure
        if self._finish_reason is None:
            raise EngineProtocolError(
                f"{self._what} ended its stream in mid-answer, without a finish reason", engine=self._what
            )
        return left

    @property
    def failed(self) -> bool:
        """Whether nothing more of the stream is of use."""
        return self._ended_badly()

    @property
    def finish_reason(self) -> str:
        """Why the engine stopped."""
        return self._finish_reason or ""

    def whole(self, body: bytes) -> None:
        """Take an answer that came in one piece. Raises as `feed` and `finish`."""
        answer = self._decode(body)
        if answer is None or not answer.choices:
            raise EngineProtocolError(f"{self._what} sent an answer without choices", engine=self._what)
        self._take(answer)
        self._put_text()

    def _events(self, whole: bytes) -> bytes:
        if not whole or self._ended_badly():
            return b""
        try:
            return whole if self._take_deltas(whole) else self._each_event(whole)
        finally:
            self._put_text()

    def _take_deltas(self, whole: bytes) -> bool:
        """Take a piece of nothing but deltas, decoded at once; False, with nothing taken, for any other."""
        if not whole.startswith(b"data: {"):
            return False
        data = whole[6:-2].split(b"\n\ndata: ")
        try:
            answers = _answers_decoder.decode(b"[%b]" % b",".join(data))
        except msgspec.DecodeError:
            return False
        if len(answers) != len(data) or not all(map(_only_deltas, answers)):
            return False
        for answer in answers:
            self._take(answer)
        return True

    def _each_event(self, whole: bytes) -> bytes:
        events = whole.split(b"\n\n")
        changed = False
        for place, event in enumerate(events):
            if not event:
                continue
            data = event_data(event)
            if data is None:
                continue
            unfinished = self._finish_reason is None
            if data != b"[DONE]" and self._take_data(data):
                if unfinished and self._finish_reason is not None and self._mark is not None:
                    events[place] = b"data: " + marked(data, self._mark())
                    changed = True
                continue
            events[place] = b""
            changed = True
            if self._ended_badly():
                del events[place:]
                break
        if not changed:
            return whole
        return b"".join(event + b"\n\n" for event in events if event)

    def _ended_badly(self) -> bool:
        return self._failure is not None

    def _take_data(self, data: bytes) -> bool:
        try:
            return self._take(self._decode(data))
        except EngineProtocolError as error:
            self._failure = error
            return False

    def _decode(self, data: bytes) -> _Answer | None:
        """An answer or a chunk; None for JSON of another shape, which is passed on and not understood."""
        try:
            return _answer_decoder.decode(data)
        except msgspec.ValidationError:
            return None
        except msgspec.DecodeError as error:
            raise EngineProtocolError(
                f"{self._what} sent something that is not JSON: {error}", engine=self._what
            ) from None

    def _take(self, answer: _Answer | None) -> bool:
        """Note what a chunk says; False if it is not to be passed on."""
        if answer is None:
            return True
        if answer.error is not None:
            message, _ = _error_text(_encode({"error": answer.error}))
            self._failure = EngineFailedError(
                f"{self._what} failed in mid-answer: {message}", engine=self._what
            )
            return False
        for choice in answer.choices:
            delta = choice.delta or choice.message
            if delta is not None:
                self._take_delta(choice.index, delta)
            if choice.finish_reason is not None:
                self._finish_reason = choice.finish_reason
        if answer.usage is not None:
            self._put_text()
            self._job.consumed(answer.usage.value())
            return bool(answer.choices) or self._keep_usage
        return True

    def _take_delta(self, choice: int, delta: _Delta) -> None:
        reasoning = delta.reasoning_content or delta.reasoning or ""
        if delta.content or reasoning:
            self._add_text(delta.content or "", reasoning, choice)
        for place, call in enumerate(delta.tool_calls or ()):
            self._put_text()
            function = call.function or _Function()
            self._job.tool_call(
                ToolCallDelta(
                    index=place if call.index is None else call.index,
                    id=call.id or "",
                    name=function.name or "",
                    arguments=function.arguments or "",
                    choice=choice,
                )
            )

    def _add_text(self, content: str, reasoning: str, choice: int) -> None:
        text = self._text
        if text is not None:
            # Joined, unless that would say that the reasoning of a later token came before an earlier answer.
            if text.choice == choice and not (text.content and reasoning):
                content, reasoning = text.content + content, text.reasoning + reasoning
            else:
                self._put_text()
        self._text = TokenDelta(content, reasoning, choice)

    def _put_text(self) -> None:
        text, self._text = self._text, None
        if text is not None:
            self._job.text(text)


def _only_deltas(answer: _Answer) -> bool:
    return (
        answer.error is None
        and answer.usage is None
        and all(choice.finish_reason is None for choice in answer.choices)
    )


def marked(answer: bytes, mark: bytes) -> bytes:
    """A JSON object with one more field, `rung`; anything else as it is."""
    answer = answer.rstrip()
    if not answer.endswith(b"}") or len(answer) < 3:
        return answer
    return b'%b,"rung":%b}' % (answer[:-1], mark)


def read_embeddings(body: bytes, what: str) -> tuple[tuple[tuple[float, ...], ...], Usage | None]:
    """Vectors in the order of the inputs, and usage. Raises EngineProtocolError."""
    try:
        answer = _embedding_decoder.decode(body)
    except msgspec.DecodeError as error:
        raise EngineProtocolError(
            f"{what} sent embeddings that are not understood: {error}", engine=what
        ) from None
    ordered = sorted(answer.data, key=lambda each: each.index)
    return tuple(tuple(each.embedding) for each in ordered), answer.usage.value() if answer.usage else None


class _UsageOnly(Struct):
    usage: _Usage | None = None


_usage_decoder = msgspec.json.Decoder(_UsageOnly)


def read_usage(body: bytes) -> Usage | None:
    """The usage of an answer, if it says; vectors and texts are skipped over, not decoded."""
    try:
        usage = _usage_decoder.decode(body).usage
    except msgspec.DecodeError:
        return None
    return usage.value() if usage else None
