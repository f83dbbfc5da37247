"""What a simulated cloud model says: honest about itself, and the same for the same request."""

from __future__ import annotations

import re
from typing import Any

import msgspec
from msgspec import Struct

_TOKEN = re.compile(r"\s*\S{1,6}|\s+")
_COUNT_TO = re.compile(r"\bcount to (\d{1,5})\b", re.IGNORECASE)
_CALL_THE_TOOL = re.compile(r"\b(?:call|use) (?:the|a|your) tool\b", re.IGNORECASE)


class Answer(Struct, frozen=True):
    """A whole answer, before it is told.

    Attributes:
        thoughts: what comes before it, in tokens.
        text: in tokens.
        tool: name of the tool that is called instead; empty for none.
        arguments: of the call, in fragments of JSON.
        prompt_tokens: length of the request.
        cut: whether the limit of the request cut it short.
    """

    thoughts: tuple[str, ...]
    text: tuple[str, ...]
    tool: str
    arguments: tuple[str, ...]
    prompt_tokens: int
    cut: bool

    @property
    def completion_tokens(self) -> int:
        """How many tokens it has."""
        return len(self.thoughts) + len(self.text) + len(self.arguments)


def tokens_of(text: str) -> tuple[str, ...]:
    """Text in pieces about the size of real tokens; joined they are the text again."""
    return tuple(_TOKEN.findall(text))


def answer_to(
    text: str, *, provider: str, model: str, body_bytes: int, tool: dict[str, Any] | None, limit: int
) -> Answer:
    """What to answer.

    "count to N" is obeyed, and a tool is called if there is one and the text says "call the tool".

    Args:
        text: what the user said last.
        provider: what the simulator plays.
        model: likewise.
        body_bytes: length of the request.
        tool: the name and `parameters` of the tool that may be called.
        limit: most tokens of the answer.
    """
    thoughts: tuple[str, ...] = ()
    if "reason" in model or "think" in model:
        thoughts = tokens_of(f"The question has {len(text.split())} words. Thinking is simulated, too. ")
    name = ""
    arguments: tuple[str, ...] = ()
    said: tuple[str, ...] = ()
    if tool is not None and _CALL_THE_TOOL.search(text):
        name = str(tool["name"])
        arguments = tokens_of(msgspec.json.encode(_arguments(tool.get("parameters") or {})).decode())
    elif counting := _COUNT_TO.search(text):
        said = tokens_of(" ".join(str(number) for number in range(1, int(counting[1]) + 1)))
    else:
        said = tokens_of(f"This is a simulated {provider} in the role of {model}; nothing was understood.")
    cut = len(thoughts) + len(said) > limit
    if cut:
        said = said[: max(0, limit - len(thoughts))]
    return Answer(thoughts[:limit], said, name, arguments, max(1, body_bytes // 4), cut)


def _arguments(schema: dict[str, Any]) -> dict[str, Any]:
    examples: dict[str, Any] = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    properties = schema.get("properties") or {}
    return {name: examples.get(each.get("type"), "simulated") for name, each in properties.items()}
