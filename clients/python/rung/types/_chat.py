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
    """A target and what was thought of it.

    Attributes:
        target: which.
        taken: whether it would answer.
        reason: why it is where it is, or is passed over.
        expected_wait_s: time before it could begin; None if that is not known.
        place: in the order of trying, from 1; 0 if it is passed over.
    """

    target: str
    taken: bool
    reason: str
    expected_wait_s: float | None = None
    place: int = 0


class RouteExplanation(Struct, frozen=True, kw_only=True):
    """Who would answer a request: `target`, empty if none. `effort` 0 and no `rung` mean a named model.

    Attributes:
        considered: those that would be tried, in that order, then the others.
        target: who would answer; empty if nobody can.
        effort: 1 to 10; 0 where a model or a chain was named.
        rung: rung of the effort; empty where none was looked for.
        why: how the effort or the chain was found, for a person; empty where a model was named.
        reason: targets behind the `reason` tool, as `considered`; empty if the tool is not offered.
    """

    considered: tuple[ConsideredTarget, ...]
    target: str = ""
    effort: int = 0
    rung: str = ""
    why: str = ""
    reason: tuple[ConsideredTarget, ...] = ()
