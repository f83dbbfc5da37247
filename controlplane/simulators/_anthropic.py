"""Anthropic's Messages, as the simulated API speaks them: as strict as the real one where that matters."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import msgspec

from controlplane.simulators._answers import Answer, answer_to
from controlplane.simulators._faults import Refusal, error_body

_KNOWN = frozenset(
    {
        *(
            "max_tokens",
            "messages",
            "metadata",
            "model",
            "output_config",
            "stop_sequences",
            "stream",
            "system",
        ),
        *("temperature", "thinking", "tool_choice", "tools", "top_k", "top_p"),
    }
)


class AnthropicDialect:
    """Messages."""

    path = "/messages"
    anthropic = True

    def key_of(self, headers: Any) -> str:
        """The key in a request."""
        return str(headers.get("x-api-key", ""))

    def check(self, fields: dict[str, Any], headers: Any) -> Refusal | None:
        """What is wrong with a request."""
        wrong = _wrong(fields)
        if headers.get("anthropic-version") != "2023-06-01":
            wrong = "anthropic-version: header is required"
        return Refusal(400, error_body(True, "invalid_request_error", wrong)) if wrong else None

    def answer(self, fields: dict[str, Any], body_bytes: int) -> Answer:
        """What to say."""
        tools = fields.get("tools") or ()
        tool = {"name": tools[0]["name"], "parameters": tools[0]["input_schema"]} if tools else None
        if (fields.get("tool_choice") or {}).get("type") == "none":
            tool = None
        last = fields["messages"][-1]["content"]
        text = last if isinstance(last, str) else " ".join(block.get("text", "") for block in last)
        model = fields["model"] + ("-thinking" if "thinking" in fields else "")
        return answer_to(
            text,
            provider="anthropic",
            model=model,
            body_bytes=body_bytes,
            tool=tool,
            limit=fields["max_tokens"],
        )

    def frames(self, fields: dict[str, Any], answer: Answer) -> Iterator[bytes]:
        """The answer as a stream."""
        started = {**self._head(fields), "content": [], "stop_reason": None, "usage": _usage(answer, 1)}
        yield _event("message_start", message=started)
        yield _event("ping")
        for place, (block, deltas) in enumerate(_blocks(answer)):
            yield _event("content_block_start", index=place, content_block=block)
            for delta in deltas:
                yield _event("content_block_delta", index=place, delta=delta)
            yield _event("content_block_stop", index=place)
        delta = {"stop_reason": _stop_reason(answer), "stop_sequence": None}
        yield _event("message_delta", delta=delta, usage={"output_tokens": answer.completion_tokens})
        yield _event("message_stop")

    def error_frame(self) -> bytes:
        """A failure in mid-stream."""
        return _event("error", error={"type": "overloaded_error", "message": "Overloaded (simulated)"})

    def whole(self, fields: dict[str, Any], answer: Answer) -> dict[str, Any]:
        """The answer in one piece."""
        content = []
        for block, deltas in _blocks(answer):
            if block["type"] == "tool_use":
                block["input"] = msgspec.json.decode("".join(answer.arguments))
            for name in ("text", "thinking"):
                if name in block:
                    block[name] = "".join(delta.get(name, "") for delta in deltas)
            content.append(block)
        return {
            **self._head(fields),
            "content": content,
            "stop_reason": _stop_reason(answer),
            "stop_sequence": None,
            "usage": _usage(answer, answer.completion_tokens),
        }

    def _head(self, fields: dict[str, Any]) -> dict[str, Any]:
        return {"id": "msg_simulated", "type": "message", "role": "assistant", "model": fields["model"]}


def _blocks(answer: Answer) -> Iterator[tuple[dict[str, Any], list[dict[str, Any]]]]:
    """Each block as it begins, and what is added to it."""
    if answer.thoughts:
        thoughts = [{"type": "thinking_delta", "thinking": token} for token in answer.thoughts]
        signature = {"type": "signature_delta", "signature": "c2ltdWxhdGVk"}
        yield {"type": "thinking", "thinking": "", "signature": ""}, [*thoughts, signature]
    if answer.text:
        yield {"type": "text", "text": ""}, [{"type": "text_delta", "text": token} for token in answer.text]
    if answer.tool:
        block = {"type": "tool_use", "id": "toolu_simulated", "name": answer.tool, "input": {}}
        yield block, [{"type": "input_json_delta", "partial_json": each} for each in ("", *answer.arguments)]


def _usage(answer: Answer, output_tokens: int) -> dict[str, int]:
    cached = answer.prompt_tokens // 2
    return {
        "input_tokens": answer.prompt_tokens - cached,
        "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": 0,
        "output_tokens": output_tokens,
    }


def _stop_reason(answer: Answer) -> str:
    return "max_tokens" if answer.cut else "tool_use" if answer.tool else "end_turn"


def _wrong(fields: dict[str, Any]) -> str:
    if strange := fields.keys() - _KNOWN:
        return f"{min(strange)}: Extra inputs are not permitted"
    if not isinstance(fields.get("max_tokens"), int):
        return "max_tokens: Field required"
    if not fields.get("messages"):
        return "messages: at least one message is required"
    if "temperature" in fields and not 0 <= fields["temperature"] <= 1:
        return "temperature: range: 0..1"
    calls: set[str] = set()
    for place, message in enumerate(fields["messages"]):
        if message.get("role") not in ("user", "assistant"):
            return f"messages.{place}.role: unexpected value"
        blocks = message.get("content")
        if not blocks:
            return f"messages.{place}: all messages must have non-empty content"
        results = {block["tool_use_id"] for block in blocks if block.get("type") == "tool_result"}
        if results - calls:
            return f"messages.{place}: unexpected tool_use_id: {min(results - calls)}"
        if calls - results:
            return f"messages.{place}: tool_use without tool_result: {min(calls - results)}"
        if any(block.get("type") == "text" and not block["text"].strip() for block in blocks):
            return f"messages.{place}: text content blocks must contain non-whitespace text"
        calls = {block["id"] for block in blocks if block.get("type") == "tool_use"}
    return ""


def _event(kind: str, **fields: Any) -> bytes:
    data = msgspec.json.encode({"type": kind, **fields})
    return b"event: %b\ndata: %b\n\n" % (kind.encode(), data)
