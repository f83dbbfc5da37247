"""What a simulated engine says to a question, and when it calls a tool instead."""

from __future__ import annotations

import msgspec
import pytest

from nodeagent.simulators._generation import GenerationRequest, PieceKind, Plan, plan_answer

_REASON = {
    "type": "function",
    "function": {
        "name": "reason",
        "parameters": {
            "type": "object",
            "properties": {"problem": {"type": "string"}, "expected": {"type": "string"}},
            "required": ["problem"],
        },
    },
}
_WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}},
}
_HARD = "Prove that there are infinitely many primes."


def plan(messages: list[dict[str, object]], *tools: object) -> Plan:
    request = msgspec.convert({"messages": messages, "tools": list(tools)}, GenerationRequest)
    return plan_answer(request, engine="vLLM", model="m", context_tokens=4096, reasons=False)


def asked(text: str) -> list[dict[str, object]]:
    return [{"role": "user", "content": text}]


def said(answer: Plan, kind: PieceKind) -> str:
    return "".join(piece.text for piece in answer.pieces if piece.kind is kind)


def test_a_hard_question_is_handed_on_as_it_is_to_the_tool_that_takes_a_problem() -> None:
    answer = plan(asked(_HARD), _WEATHER, _REASON)
    assert said(answer, PieceKind.TOOL_NAME) == "reason"
    assert msgspec.json.decode(said(answer, PieceKind.TOOL_ARGUMENTS)) == {"problem": _HARD}
    # In fragments, as a real one streams them.
    assert len([piece for piece in answer.pieces if piece.kind is PieceKind.TOOL_ARGUMENTS]) > 2
    assert answer.finish_reason == "tool_calls"


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        pytest.param(asked("Which colour has the sky?"), [_REASON], id="it is easy"),
        pytest.param(asked(_HARD), [_WEATHER], id="no tool takes a problem"),
        pytest.param(asked(_HARD), [], id="there is no tool"),
    ],
)
def test_otherwise_it_answers_by_itself(messages: list[dict[str, object]], tools: list[object]) -> None:
    answer = plan(messages, *tools)
    assert said(answer, PieceKind.TOOL_NAME) == ""
    assert "This is a simulated vLLM" in said(answer, PieceKind.CONTENT)


def test_what_a_tool_answered_is_what_it_finishes_with() -> None:
    result: dict[str, object] = {"role": "tool", "tool_call_id": "1"}
    result["content"] = "Suppose that there were a last one."
    called: dict[str, object] = {"role": "assistant", "content": None}
    answer = plan([*asked(_HARD), called, result], _REASON)
    assert said(answer, PieceKind.TOOL_NAME) == ""
    assert "Suppose that there were a last one." in said(answer, PieceKind.CONTENT)
