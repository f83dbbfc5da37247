"""The `reason` tool: how it is offered beside a caller's own tools, and how its calls are told from theirs.

Pure: requests and answers in OpenAI's shape in, the same out.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import msgspec
from msgspec import Struct

from rung.service import SseSplitter, event_data

Json: TypeAlias = dict[str, Any]

_NAME = "reason"
#: Used when a caller has a tool of the same name.
_OTHER_NAME = "rung_reason"
_DESCRIPTION = (
    "Hand the hard part of a task to a slower and stronger reasoning model, and get its answer back. "
    "Use it for mathematics, proofs, planning, debugging and analysis with several steps; not for what you "
    "can answer at once. It sees only what you write here, nothing of this conversation."
)
_PARAMETERS: Json = {
    "type": "object",
    "properties": {
        "problem": {
            "type": "string",
            "description": "The whole problem, with every fact, text and piece of code that it takes.",
        },
        "expected": {"type": "string", "description": "What a good answer looks like."},
    },
    "required": ["problem"],
}
#: Fields of a delta that a caller may want to see.
_SAYINGS = ("content", "reasoning_content", "reasoning", "refusal", "tool_calls")
_decode = msgspec.json.decode
_encode = msgspec.json.encode


class ReasonCall(Struct):
    """A call of the tool, as the orchestrator made it."""

    id: str
    arguments: str = ""

    @property
    def problem(self) -> str:
        """What is to be reasoned about; the arguments as they are if they are not what was asked for."""
        try:
            found = _decode(self.arguments)
        except msgspec.DecodeError:
            return self.arguments
        if not isinstance(found, dict) or not isinstance(found.get("problem"), str):
            return self.arguments
        expected = found.get("expected")
        problem: str = found["problem"]
        return f"{problem}\n\nExpected: {expected}" if expected else problem


class ReasonTalk:
    """A caller's conversation, which grows by each call of the tool and its result.

    Args:
        body: the caller's chat request.
    """

    def __init__(self, body: bytes) -> None:
        self._fields: Json = _decode(body)
        names = {_tool_name(tool) for tool in self._fields.get("tools") or ()}
        self.tool_name = _OTHER_NAME if _NAME in names else _NAME
        self._added: list[Json] = []

    @property
    def may_call(self) -> bool:
        """Whether the caller leaves room for a tool: one answer, and a choice of tools that allows it."""
        return self._fields.get("n") in (None, 1) and self._fields.get("tool_choice") in (
            None,
            "auto",
            "required",
        )

    def body(self, *, offer: bool) -> bytes:
        """The request to the orchestrator.

        Args:
            offer: whether the tool may be called once more.
        """
        fields = dict(self._fields)
        fields["messages"] = [*self._fields["messages"], *self._added]
        if offer:
            fields["tools"] = [*(fields.get("tools") or ()), _tool(self.tool_name)]
        return _encode(fields)

    def add(self, content: str, calls: Sequence[ReasonCall], results: Sequence[str]) -> None:
        """Note that the orchestrator said something, called the tool, and got results."""
        function = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": self.tool_name, "arguments": call.arguments},
            }
            for call in calls
        ]
        self._added.append({"role": "assistant", "content": content or None, "tool_calls": function})
        for call, result in zip(calls, results, strict=True):
            self._added.append({"role": "tool", "tool_call_id": call.id, "content": result})


def reasoner_body(problem: str) -> bytes:
    """The request to the reasoning model."""
    return _encode({"messages": [{"role": "user", "content": problem}]})


class ReasonFilter:
    """Takes calls of the tool out of the orchestrator's answers, and makes of several answers one.

    What the caller's own tools are called with passes, unless a call of ours came before it in the same
    answer: then the orchestrator will say it again once it has our result. A call of ours that comes after
    one of the caller's is dropped, for the answer goes to the caller first.

    Args:
        tool_name: name of our tool in this conversation.
    """

    def __init__(self, tool_name: str) -> None:
        self._tool_name = tool_name
        self._head: Json = {}
        self._usage: dict[str, int] = {}
        self.begin()

    def begin(self) -> None:
        """Another answer of the same conversation begins."""
        self._splitter = SseSplitter()
        self._ours: dict[int, ReasonCall] = {}
        self._passed: dict[int, int] = {}
        self._dropped: set[int] = set()
        self.content = ""

    @property
    def calls(self) -> list[ReasonCall]:
        """Calls of our tool in this answer."""
        return list(self._ours.values())

    def feed(self, chunk: bytes) -> bytes:
        """A piece of a stream of server-sent events, without what is ours.

        Raises:
            EngineProtocolError: an event grows without end.
        """
        return self._events(self._splitter.feed(chunk))

    def rest(self) -> bytes:
        """What is left when the stream has ended."""
        return self._events(self._splitter.rest())

    def whole(self, body: bytes) -> bytes:
        """An answer that came in one piece, without what is ours."""
        answer = _read(body)
        choice = _first(answer)
        if choice is None:
            return body
        message = choice.get("message")
        if isinstance(message, dict):
            self._take(message)
        self._take_usage(answer)
        return _encode(answer)

    def _events(self, events: bytes) -> bytes:
        found = []
        for event in events.split(b"\n\n"):
            data = event_data(event)
            if data is None:
                if event:
                    found.append(event)
                continue
            kept = self._event(data)
            if kept is not None:
                found.append(b"data: " + kept)
        return b"".join(event + b"\n\n" for event in found)

    def _event(self, data: bytes) -> bytes | None:
        answer = _read(data)
        if not answer or "error" in answer:
            # Not for us to judge: who reads the filtered stream does.
            return None if data == b"[DONE]" and self._ours else data
        answer |= self._head
        if not self._head:
            self._head = {key: answer[key] for key in ("id", "created", "model") if key in answer}
        self._take_usage(answer)
        choice = _first(answer)
        if choice is None:
            return None if self._ours else _encode(answer)
        found = choice.get("delta")
        delta: Json = found if isinstance(found, dict) else {}
        had_calls = bool(delta.get("tool_calls"))
        self._take(delta)
        says_something = any(delta.get(key) for key in _SAYINGS)
        if self._ours:
            # What ends this answer is not the end for the caller.
            choice["finish_reason"] = None
            return _encode(answer) if says_something else None
        if had_calls and not says_something and choice.get("finish_reason") is None:
            return None
        return _encode(answer)

    def _take(self, said: Json) -> None:
        """Take our calls out of a message or delta, and number the caller's anew."""
        content = said.get("content")
        if isinstance(content, str):
            self.content += content
        calls = said.get("tool_calls")
        if not isinstance(calls, list):
            return
        kept = []
        for place, call in enumerate(calls):
            if not isinstance(call, dict):
                continue
            index = call.get("index", place)
            if self._is_passed(index, call):
                kept.append(call | {"index": self._passed[index]} if "index" in call else call)
        if kept:
            said["tool_calls"] = kept
        else:
            del said["tool_calls"]

    def _is_passed(self, index: int, call: Json) -> bool:
        function = call.get("function") or {}
        if index in self._ours:
            self._ours[index].arguments += function.get("arguments") or ""
            return False
        if index in self._passed or index in self._dropped:
            return index in self._passed
        if function.get("name") == self._tool_name and not self._passed:
            call_id = call.get("id") or f"reason-{index}"
            self._ours[index] = ReasonCall(call_id, function.get("arguments") or "")
            return False
        if function.get("name") == self._tool_name or self._ours:
            self._dropped.add(index)
            return False
        self._passed[index] = len(self._passed)
        return True

    def _take_usage(self, answer: Json) -> None:
        """Let the usage be that of all answers so far."""
        usage = answer.get("usage")
        if not isinstance(usage, dict):
            return
        for key in ("prompt_tokens", "completion_tokens", "total_tokens"):
            if isinstance(usage.get(key), int):
                self._usage[key] = self._usage.get(key, 0) + usage[key]
        answer["usage"] = usage | self._usage


def _tool(name: str) -> Json:
    function = {"name": name, "description": _DESCRIPTION, "parameters": _PARAMETERS}
    return {"type": "function", "function": function}


def _tool_name(tool: Any) -> str:
    function = tool.get("function") if isinstance(tool, dict) else None
    return str(function.get("name", "")) if isinstance(function, dict) else ""


def _read(data: bytes) -> Json:
    """A JSON object; empty for anything else."""
    try:
        found = _decode(data)
    except msgspec.DecodeError:
        return {}
    return found if isinstance(found, dict) else {}


def _first(answer: Json) -> Json | None:
    choices = answer.get("choices")
    if isinstance(choices, list) and choices and isinstance(choices[0], dict):
        return choices[0]
    return None
