"""Answers in the shapes of OpenAI's routes, as chunks of a stream and as whole bodies."""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from typing import Any

import msgspec

from nodeagent.simulators._generation import Piece, PieceKind

DONE = b"data: [DONE]\n\n"


def frame(value: dict[str, Any]) -> bytes:
    """One event of a stream."""
    return b"data: " + msgspec.json.encode(value) + b"\n\n"


def usage_of(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """What was consumed."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Frames:
    """Makes the chunks of one answer. `first_content` is what an engine puts beside the role."""

    def __init__(self, model: str, *, chat: bool, first_content: str | None) -> None:
        self._chat = chat
        self._first_content = first_content
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": model,
        }
        self._call_id = f"call_{uuid.uuid4().hex[:24]}"

    def role(self) -> bytes:
        """The chunk before the first token; completions have none."""
        if not self._chat:
            return b""
        return self._choice({"role": "assistant", "content": self._first_content}, None)

    def piece(self, piece: Piece) -> bytes:
        """The chunk of one token."""
        if not self._chat:
            return self._choice({}, None, text=piece.text)
        match piece.kind:
            case PieceKind.CONTENT:
                return self._choice({"content": piece.text}, None)
            case PieceKind.REASONING:
                return self._choice({"reasoning_content": piece.text}, None)
            case PieceKind.TOOL_NAME:
                function = {"name": piece.text, "arguments": ""}
                call = {"index": 0, "id": self._call_id, "type": "function", "function": function}
                return self._choice({"tool_calls": [call]}, None)
            case PieceKind.TOOL_ARGUMENTS:
                call = {"index": 0, "function": {"arguments": piece.text}}
                return self._choice({"tool_calls": [call]}, None)

    def last(self, finish_reason: str, extras: dict[str, Any]) -> bytes:
        """The chunk that says why the answer ends; `extras` go beside its choices."""
        return self._choice({}, finish_reason, extras=extras)

    def usage(self, usage: dict[str, int], extras: dict[str, Any]) -> bytes:
        """The chunk of the usage, which has no choices."""
        return frame({**self._head, "choices": [], "usage": usage, **extras})

    def _choice(
        self,
        delta: dict[str, Any],
        finish_reason: str | None,
        *,
        text: str = "",
        extras: dict[str, Any] | None = None,
    ) -> bytes:
        said: dict[str, Any] = {"delta": delta} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        return frame({**self._head, "choices": [choice], **(extras or {})})

    def whole(
        self, pieces: Sequence[Piece], finish_reason: str, usage: dict[str, int], extras: dict[str, Any]
    ) -> dict[str, Any]:
        """The body of an answer that is not streamed."""
        said: dict[str, Any] = {"text": _joined(pieces, PieceKind.CONTENT)}
        if self._chat:
            said = {"message": self._message(pieces)}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish_reason}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": usage, **extras}

    def _message(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": _joined(pieces, PieceKind.CONTENT) or None}
        reasoning = _joined(pieces, PieceKind.REASONING)
        if reasoning:
            message["reasoning_content"] = reasoning
        name = _joined(pieces, PieceKind.TOOL_NAME)
        if name:
            function = {"name": name, "arguments": _joined(pieces, PieceKind.TOOL_ARGUMENTS)}
            message["tool_calls"] = [{"id": self._call_id, "type": "function", "function": function}]
        return message


def _joined(pieces: Sequence[Piece], kind: PieceKind) -> str:
    return "".join(piece.text for piece in pieces if piece.kind is kind)
