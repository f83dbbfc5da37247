"""What a caller hands in and gets back: conversations, their answers, vectors, routes."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

from rung.types._job import Served, Usage


class ImagePart(Struct, frozen=True, kw_only=True):
    """A picture in a message."""

    content_type: str
    data: bytes


class ToolCall(Struct, frozen=True, kw_only=True):
    """A complete call of a tool; `arguments` is JSON text."""

    id: str
    name: str
    arguments: str


class ChatMessage(Struct, frozen=True):
    """One turn. `role` is `system`, `user`, `assistant` or `tool`."""

    role: str
    content: str = ""
    images: tuple[ImagePart, ...] = ()
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str = ""


class Tool(Struct, frozen=True, kw_only=True):
    """A function that the model may call. `parameters` is the JSON schema of its arguments."""

    name: str
    description: str = ""
    parameters: dict[str, Any] = {}


class Conversation(Struct, frozen=True, kw_only=True):
    """A chat and how to sample from it; None leaves the engine's default."""

    messages: tuple[ChatMessage, ...]
    tools: tuple[Tool, ...] = ()
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


class ChatResult(Struct, frozen=True, kw_only=True):
    """A complete answer: the first choice, its tool calls merged."""

    job_id: str
    text: str
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
    usage: Usage | None = None
    served: Served | None = None
    finish_reason: str = ""


class Embeddings(Struct, frozen=True, kw_only=True):
    """Vectors, one an input, in order."""

    vectors: tuple[tuple[float, ...], ...]
    usage: Usage | None = None
    served: Served | None = None
    job_id: str = ""


class ConsideredTarget(Struct, frozen=True, kw_only=True):
    """A target and what was thought of it. `expected_wait_s` is None where it is not known."""

    target: str
    taken: bool
    reason: str
    expected_wait_s: float | None = None


class RouteExplanation(Struct, frozen=True, kw_only=True):
    """Who would answer a request: `target`, empty if none. `effort` 0 and no `rung` mean a named model."""

    considered: tuple[ConsideredTarget, ...]
    target: str = ""
    effort: int = 0
    rung: str = ""
