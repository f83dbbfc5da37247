"""Ollama as the fallback of vLLM, over real processes: who answers, and that callers see the same shapes."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from rung.types import JobEvent, LifecycleFailed, Residency, TokenDelta, Tool, UsageReported
from tests.integration.engine_process import free_port
from tests.integration.stack import Stack, stack

_ENVIRONMENT = {"RUNG_SIM_SPEED": "50", "RUNG_SIM_LOAD_S": "0.2"}
#: Where the one is the other's fallback they have the same public model.
_MODEL = "nemotron-8b"
_TAG = "nemotron-orchestrator:8b"
_PARAMETERS = {"type": "object", "properties": {"city": {"type": "string", "enum": ["Berlin"]}}}
_TOOLS: list[Any] = [{"type": "function", "function": {"name": "weather", "parameters": _PARAMETERS}}]


def _deployment(deployment_id: str, engine: dict[str, Any], model: str, **fields: Any) -> dict[str, Any]:
    kind = engine["kind"]
    names = {"RUNG_SIM_MODELS": engine["model"]} if kind == "ollama" else {}
    return {
        "id": deployment_id,
        "model": model,
        "context_tokens": 8192,
        "engine": engine,
        "runtime": {"kind": "process", "executable": kind, "environment": _ENVIRONMENT | names},
        "stop_grace": "2s",
        "capabilities": ["chat", "tools"],
    } | fields


def _vllm(deployment_id: str, model: str, **fields: Any) -> dict[str, Any]:
    engine = {"kind": "vllm", "model": model, "tool_call_parser": "hermes"}
    return _deployment(deployment_id, engine, model, **fields)


def _ollama(deployment_id: str, tag: str, model: str, **fields: Any) -> dict[str, Any]:
    return _deployment(deployment_id, {"kind": "ollama", "model": tag}, model, **fields)


@asynccontextmanager
async def _up(
    folder: Path, deployments: Sequence[dict[str, Any]], **more: Any
) -> AsyncIterator[tuple[Stack, openai.AsyncOpenAI]]:
    async with stack(folder, deployments, **more) as found:
        for each in deployments:
            events = [event async for event in found.client.start_deployment(each["id"])]
            assert not isinstance(events[-1].payload, LifecycleFailed), events[-1]
        async with openai.AsyncOpenAI(base_url=f"{found.http}/v1", api_key="none", max_retries=0) as client:
            yield found, client


# Shapes.


def _shape(value: Any) -> Any:
    """What a caller sees of a value that is not its content: fields and types."""
    if isinstance(value, dict):
        return {name: _shape(each) for name, each in value.items() if each is not None}
    if isinstance(value, list):
        return [_shape(each) for each in value]
    return type(value).__name__


def _choice(choice: Any) -> dict[str, Any]:
    """What OpenAI's contract says of a choice, whole or of a stream."""
    said = choice.message if hasattr(choice, "message") else choice.delta
    calls = [
        {"type": call.type, "id": bool(call.id), "function": call.function.name}
        for call in said.tool_calls or ()
    ]
    return {"index": choice.index, "finish": choice.finish_reason, "calls": calls}


async def _whole(client: openai.AsyncOpenAI, model: str, **asked: Any) -> dict[str, Any]:
    raw = await client.chat.completions.with_raw_response.create(model=model, **asked)
    answer = raw.parse()
    message = answer.choices[0].message
    assert answer.model_extra is not None
    assert answer.usage is not None
    arguments = [call.function.arguments for call in message.tool_calls or () if call.type == "function"]
    return {
        "object": answer.object,
        "id": bool(answer.id),
        "choices": [_choice(choice) for choice in answer.choices],
        "role": message.role,
        "content": bool(message.content),
        "arguments": arguments,
        "usage": {"prompt_tokens", "completion_tokens", "total_tokens"} <= answer.usage.model_fields_set,
        "rung": _shape(answer.model_extra["rung"]),
        "headers": sorted(name for name in raw.headers if name.startswith("x-rung-")),
        "type": raw.headers["content-type"].partition(";")[0],
    }


async def _streamed(
    client: openai.AsyncOpenAI, model: str, *, include_usage: bool, **asked: Any
) -> dict[str, Any]:
    raw = await client.chat.completions.with_raw_response.create(
        model=model, stream=True, stream_options={"include_usage": include_usage}, **asked
    )
    chunks = [chunk async for chunk in raw.parse()]
    choices = [choice for chunk in chunks for choice in chunk.choices]
    calls = [call for choice in choices for call in choice.delta.tool_calls or ()]
    marks = [chunk.model_extra["rung"] for chunk in chunks if "rung" in (chunk.model_extra or {})]
    return {
        "object": {chunk.object for chunk in chunks},
        "one id": len({chunk.id for chunk in chunks}),
        "role": choices[0].delta.role,
        "text": bool("".join(choice.delta.content or "" for choice in choices)),
        "finish": [choice.finish_reason for choice in choices if choice.finish_reason],
        "call": [(call.index, bool(call.id), call.function and call.function.name) for call in calls][:1],
        "arguments": "".join((call.function and call.function.arguments) or "" for call in calls),
        "usage": [
            (place == len(chunks) - 1, chunk.choices) for place, chunk in enumerate(chunks) if chunk.usage
        ],
        "rung": [_shape(mark) for mark in marks],
        "headers": sorted(name for name in raw.headers if name.startswith("x-rung-")),
        "type": raw.headers["content-type"].partition(";")[0],
    }


def _kinds(events: Sequence[JobEvent]) -> list[str]:
    """The kinds of a job's events in their order, those that repeat once."""
    kinds = [type(event.payload).__name__ for event in events]
    return [kind for place, kind in enumerate(kinds) if kind not in kinds[:place]]


async def _by_sdk(found: Stack, model: str, prompt: str, **asked: Any) -> dict[str, Any]:
    stream = found.client.chat(prompt, model=model, **asked)
    events = [event async for event in stream]
    usage = [event.payload.usage for event in events if isinstance(event.payload, UsageReported)]
    deltas = [event.payload for event in events if isinstance(event.payload, TokenDelta)]
    result = await stream.result()
    return {
        "kinds": _kinds(events),
        "usage": [(bool(each.prompt_tokens), bool(each.completion_tokens)) for each in usage],
        "reasons": any(each.reasoning for each in deltas),
        "says": any(each.content for each in deltas),
        "finish": result.finish_reason,
        "calls": [(bool(call.id), call.name, call.arguments) for call in result.tool_calls],
    }


async def test_a_caller_sees_the_same_shapes_from_ollama_as_from_vllm(tmp_path: Path) -> None:
    deployments = [
        _vllm("vllm", "nemotron-8b"),
        _ollama("ollama", _TAG, "nemotron-8b-gguf"),
    ]
    count: list[Any] = [{"role": "user", "content": "count to 12"}]
    call: list[Any] = [{"role": "user", "content": "please call the tool"}]
    tool = Tool(name="weather", description="", parameters=_PARAMETERS)
    async with _up(tmp_path, deployments) as (found, client):
        told: list[dict[str, Any]] = []
        for model in ("vllm", "ollama"):
            told.append(
                {
                    "whole": await _whole(client, model, messages=count),
                    "cut": await _whole(client, model, messages=count, max_tokens=3),
                    "tool": await _whole(client, model, messages=call, tools=_TOOLS),
                    "stream": await _streamed(client, model, include_usage=False, messages=count),
                    "stream, usage": await _streamed(client, model, include_usage=True, messages=count),
                    "stream, cut": await _streamed(
                        client, model, include_usage=True, messages=count, max_tokens=3
                    ),
                    "stream, tool": await _streamed(
                        client, model, include_usage=True, messages=call, tools=_TOOLS
                    ),
                    "sdk": await _by_sdk(found, model, "count to 12"),
                    "sdk, tool": await _by_sdk(found, model, "please call the tool", tools=[tool]),
                }
            )
            with pytest.raises(openai.APIStatusError) as refused:
                await client.chat.completions.create(model=model, messages=[])
            told[-1]["refused"] = (refused.value.status_code, _shape(refused.value.body))
    by_vllm, by_ollama = told
    for name, shape in by_vllm.items():
        assert by_ollama[name] == shape, name
    # That the two agree is worth something only if they say something.
    assert by_vllm["whole"]["content"]
    assert by_vllm["cut"]["choices"][0]["finish"] == "length"
    assert by_vllm["tool"]["arguments"] == ['{"city":"Berlin"}']
    assert by_vllm["stream, tool"]["arguments"] == '{"city":"Berlin"}'
    assert by_vllm["stream"]["usage"] == []
    assert by_vllm["stream, usage"]["usage"] == [(True, [])]
    assert by_vllm["sdk"]["usage"] == [(True, True)]


async def test_thoughts_and_embeddings_have_the_same_shapes_too(tmp_path: Path) -> None:
    embedding = {"capabilities": ["embedding"]}
    thinks = {"capabilities": ["chat", "reasoning"]}
    deployments = [
        _deployment(
            "vllm",
            {"kind": "vllm", "model": "deepseek-r1-14b", "reasoning_parser": "deepseek_r1"},
            "deepseek-r1-14b",
            **thinks,
        ),
        _ollama("ollama", "deepseek-r1:14b", "deepseek-r1-gguf", **thinks),
        _vllm("vllm-embed", "nomic-embed-text", **embedding),
        _ollama("ollama-embed", "nomic-embed-text:latest", "nomic-gguf", **embedding),
    ]
    async with _up(tmp_path, deployments) as (found, client):
        thoughts = [await _by_sdk(found, model, "count to 12") for model in ("vllm", "ollama")]
        answers = [
            await client.embeddings.create(model=model, input=["a", "b", "c"], encoding_format="float")
            for model in ("vllm-embed", "ollama-embed")
        ]
        vectors = [await found.client.embed(["a", "b"], f"{name}-embed") for name in ("vllm", "ollama")]
    assert thoughts[0] == thoughts[1]
    assert thoughts[0]["reasons"]
    shapes = [
        ([(row.index, row.object, len(row.embedding)) for row in answer.data], answer.object, answer.usage)
        for answer in answers
    ]
    assert shapes[0] == shapes[1]
    assert [index for index, _, _ in shapes[0][0]] == [0, 1, 2]
    assert vectors[0].vectors == vectors[1].vectors


# The fallback.


class _Occupied:
    """Somebody else on vLLM's port, so that it cannot be started."""

    def __init__(self, port: int) -> None:
        self._socket = socket.socket()
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind(("127.0.0.1", port))
        self._socket.listen()

    def leave(self) -> None:
        """Give the port back."""
        self._socket.close()


async def _asked(client: openai.AsyncOpenAI) -> tuple[str, dict[str, Any], Any]:
    """The text, the `rung` object and the headers of an answer of the chain."""
    messages: list[Any] = [{"role": "user", "content": "Who are you?"}]
    raw = await client.chat.completions.with_raw_response.create(model="rung/auto", messages=messages)
    answer = raw.parse()
    assert answer.model_extra is not None
    mark: dict[str, Any] = answer.model_extra["rung"]
    assert (raw.headers["x-rung-target"], raw.headers["x-rung-model"]) == (mark["target"], mark["model"])
    assert raw.headers["x-rung-requested"] == mark["requested"] == "rung/auto"
    return answer.choices[0].message.content or "", mark, raw.headers


async def test_ollama_answers_while_vllm_is_away_and_vllm_when_it_is_back(tmp_path: Path) -> None:
    port = free_port()
    deployments = [_vllm("vllm", _MODEL, port=port), _ollama("ollama", _TAG, _MODEL)]
    ladder = {
        "chains": {"chat": ["vllm", "ollama"]},
        "rungs": [{"name": "chat", "effort": "1-10", "chain": "chat"}],
    }
    async with _up(tmp_path, deployments, ladder=ladder) as (found, client):
        text, mark, _ = await _asked(client)
        assert "a simulated vLLM in the role of nemotron-8b" in text
        assert mark["target"] == "vllm"

        pid = (await found.client.get_deployment("vllm")).pid
        os.kill(pid, signal.SIGKILL)
        # At once: nobody has been told that it is gone.
        text, mark, _ = await _asked(client)
        assert "a simulated Ollama in the role of nemotron-orchestrator:8b" in text
        # The model is named as what has answered knows it.
        assert (mark["target"], mark["model"], mark["node"]) == ("ollama", _TAG, "box")

        await found.deployment("vllm", Residency.FAILED)
        occupied = _Occupied(port)
        for _ in range(3):
            text, mark, _ = await _asked(client)
            assert (mark["target"], "a simulated Ollama" in text) == ("ollama", True)
        told = found.client.chat("count to 12", model="rung/auto")
        result = await told.result()
        assert result.served is not None
        assert (result.served.target, result.text) == ("ollama", "1 2 3 4 5 6 7 8 9 10 11 12")
        last = [event async for event in found.client.start_deployment("vllm")][-1]
        assert isinstance(last.payload, LifecycleFailed)
        assert f"port {port} is already taken" in last.payload.detail

        occupied.leave()
        last = [event async for event in found.client.start_deployment("vllm")][-1]
        assert not isinstance(last.payload, LifecycleFailed), last
        # Its failed starts have opened its circuit: it is tried again once that lets a request through.
        async with asyncio.timeout(30):
            while mark["target"] != "vllm":
                text, mark, _ = await _asked(client)
        assert "a simulated vLLM" in text
        assert [(await _asked(client))[1]["target"] for _ in range(3)] == ["vllm"] * 3
