"""Reading what was said off a server's answer: events as they come, or a whole text."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec
from msgspec import Struct

from rung.errors import EngineFailedError, EngineProtocolError
from rung.service import SseSplitter, event_data

_DELTA = "transcript.text.delta"
_DONE = "transcript.text.done"


class _Event(Struct):
    """OpenAI's events have a type; older servers send one object with `text` for each segment."""

    type: str = ""
    delta: str = ""
    text: str = ""
    detail: object = None
    error: object = None


class TranscriptReader:
    """Text off a stream of events. No `[DONE]` ends it, but OpenAI's last event, where there are such.

    Args:
        what: name of the engine, for messages.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._splitter = SseSplitter()
        self._said = False
        self._ends_with_done = False
        self._done = False

    def feed(self, chunk: bytes) -> Iterator[str]:
        """The texts that a piece of the stream completes.

        Raises:
            EngineProtocolError: it is not what it should be.
            EngineFailedError: it says that the engine failed.
        """
        return self._texts(self._splitter.feed(chunk))

    def finish(self) -> Iterator[str]:
        """What was left when the stream ended.

        Raises:
            EngineProtocolError: the stream ended before its last event; or as `feed`.
        """
        yield from self._texts(self._splitter.rest())
        if self._ends_with_done and not self._done:
            raise EngineProtocolError(
                f"{self._what} ended its answer before its last event", engine=self._what
            )

    def _texts(self, events: bytes) -> Iterator[str]:
        for block in events.split(b"\n\n"):
            data = event_data(block) if block else None
            if data is None or data == b"[DONE]":
                continue
            try:
                event = msgspec.json.decode(data, type=_Event)
            except msgspec.DecodeError as error:
                raise EngineProtocolError(
                    f"{self._what} sends what is no event of a transcription: {error}", engine=self._what
                ) from error
            if event.error is not None or event.detail is not None:
                why = msgspec.json.encode(event.error if event.error is not None else event.detail).decode()
                raise EngineFailedError(f"{self._what} broke off its transcription: {why}")
            text = self._text(event)
            if text and not self._said:
                # A segment begins with the blank before its first word.
                text = text.lstrip()
            if text:
                self._said = True
                yield text

    def _text(self, event: _Event) -> str:
        if event.type == _DELTA:
            self._ends_with_done = True
            return event.delta
        if event.type == _DONE:
            self._ends_with_done = self._done = True
            # All of it once more; of a server that sent nothing before, for the first time.
            return "" if self._said else event.text
        return "" if event.type else event.text


def read_text(data: bytes, content_type: str, what: str) -> str:
    """The text of a whole answer, JSON or not. Raises EngineProtocolError."""
    if not content_type.startswith("application/json"):
        return data.decode(errors="replace").strip()
    try:
        return msgspec.json.decode(data, type=_Event).text.strip()
    except msgspec.DecodeError as error:
        raise EngineProtocolError(
            f"{what} answers with what is no transcription: {error}", engine=what
        ) from error
