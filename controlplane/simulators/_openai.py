"""OpenAI's dialect, as the simulated API speaks it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from controlplane.simulators._answers import Answer, answer_to
from controlplane.simulators._faults import Refusal, error_body

_HEAD = {"id": "chatcmpl-simulated", "created": 1_700_000_000}
#: What the strict ones know; any other field is an error.
_KNOWN = frozenset(
    {
        *("frequency_penalty", "logit_bias", "logprobs", "max_completion_tokens", "max_tokens", "messages"),
        *("metadata", "model", "n", "parallel_tool_calls", "presence_penalty", "reasoning_effort"),
        *(
            "response_format",
            "seed",
            "stop",
            "stream",
            "stream_options",
            "temperature",
            "tool_choice",
            "tools",
        ),
        *("top_logprobs", "top_p", "user"),
    }
)
_STRICT = frozenset({"openai", "google"})


class OpenAiDialect:
    """Chat completions."""

    path = "/chat/completions"
    anthropic = False

    def __init__(self, provider: str) -> None:
        self._provider = provider

    def key_of(self, headers: Any) -> str:
        """The key in a request."""
        return str(headers.get("Authorization", "")).removeprefix("Bearer ")

    def check(self, fields: dict[str, Any], headers: Any) -> Refusal | None:
        """What is wrong with a request."""
        wrong = ""
        strange = fields.keys() - _KNOWN if self._provider in _STRICT else set()
        if strange:
            wrong = f"Unrecognized request argument supplied: {min(strange)}"
        elif not isinstance(fields.get("messages"), list) or not fields["messages"]:
            wrong = "messages must not be empty"
        elif self._provider == "openai" and "max_tokens" in fields:
            wrong = "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        elif self._provider in _STRICT and any("reasoning_content" in each for each in fields["messages"]):
            wrong = "Unknown parameter: 'messages[].reasoning_content'."
        if not wrong:
            return None
        refused = error_body(False, "invalid_request_error", wrong)
        return Refusal(400, [refused] if self._provider == "google" else refused)

    def answer(self, fields: dict[str, Any], body_bytes: int) -> Answer:
        """What to say."""
        tools = [tool["function"] for tool in fields.get("tools") or () if tool.get("type") == "function"]
        limit = fields.get("max_completion_tokens") or fields.get("max_tokens") or 4096
        return answer_to(
            _last_text(fields["messages"]),
            provider=self._provider,
            model=fields.get("model", ""),
            body_bytes=body_bytes,
            tool=tools[0] if tools else None,
            limit=limit,
        )

    def frames(self, fields: dict[str, Any], answer: Answer) -> Iterator[bytes]:
        """The answer as a stream."""
        yield self._chunk(fields, {"role": "assistant", "content": ""})
        for token in answer.thoughts:
            yield self._chunk(fields, {"reasoning_content": token})
        for token in answer.text:
            yield self._chunk(fields, {"content": token})
        if answer.tool:
            function = {"name": answer.tool, "arguments": ""}
            call = {"index": 0, "id": "call_simulated", "type": "function", "function": function}
            yield self._chunk(fields, {"tool_calls": [call]})
            for fragment in answer.arguments:
                yield self._chunk(fields, {"tool_calls": [{"index": 0, "function": {"arguments": fragment}}]})
        yield self._chunk(fields, {}, _finish_reason(answer))
        if (fields.get("stream_options") or {}).get("include_usage"):
            head = {**_HEAD, "object": "chat.completion.chunk", "model": fields.get("model")}
            yield _frame({**head, "choices": [], "usage": _usage(answer)})
        yield b"data: [DONE]\n\n"

    def error_frame(self) -> bytes:
        """A failure in mid-stream."""
        return _frame(error_body(False, "server_error", "The server had an error (simulated)."))

    def whole(self, fields: dict[str, Any], answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        message: dict[str, Any] = {"role": "assistant", "content": "".join(answer.text) or None}
        if answer.thoughts:
            message["reasoning_content"] = "".join(answer.thoughts)
        if answer.tool:
            function = {"name": answer.tool, "arguments": "".join(answer.arguments)}
            message["tool_calls"] = [{"id": "call_simulated", "type": "function", "function": function}]
        choice = {"index": 0, "message": message, "finish_reason": _finish_reason(answer)}
        head = {**_HEAD, "object": "chat.completion", "model": fields.get("model")}
        return {**head, "choices": [choice], "usage": _usage(answer)}

    def _chunk(self, fields: dict[str, Any], delta: dict[str, Any], finish: str | None = None) -> bytes:
        head = {**_HEAD, "object": "chat.completion.chunk", "model": fields.get("model")}
        return _frame({**head, "choices": [{"index": 0, "delta": delta, "finish_reason": finish}]})


def _usage(answer: Answer) -> dict[str, Any]:
    prompt, completion = answer.prompt_tokens, answer.completion_tokens
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": prompt // 2},
    }


def _finish_reason(answer: Answer) -> str:
    return "length" if answer.cut else "tool_calls" if answer.tool else "stop"


def _last_text(messages: list[dict[str, Any]]) -> str:
    content = messages[-1].get("content") or ""
    if isinstance(content, str):
        return content
    return " ".join(part.get("text", "") for part in content)


def _frame(value: Any) -> bytes:
    return b"data: " + msgspec.json.encode(value) + b"\n\n"
