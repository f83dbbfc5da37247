"""What vLLM's HTTP routes do: one suite, held against the simulator in every run, and against a real vLLM.

`make test-engines` runs both. A fact that only the simulator knows is no fact of vLLM, and belongs to the
simulator's own tests: on a CPU no memory moves, and a wake from level 2 loses nothing.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import pytest_asyncio
from prometheus_client.parser import text_string_to_metric_families

from tests.engines.tiny_llama import CONTEXT_TOKENS
from tests.engines.vllm_server import MODEL, REAL_VLLM, vllm_server
from tests.integration.engine_process import EngineProcess

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(600)]

#: So long nothing happens that would happen if it could.
_NOTHING_S = 0.5
_PATIENCE_S = 20.0
_CHAT = "/v1/chat/completions"


@pytest_asyncio.fixture(
    scope="module",
    loop_scope="module",
    params=["simulator", pytest.param("real", marks=pytest.mark.real_vllm)],
)
async def process(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[EngineProcess]:
    real = request.param == "real"
    if real and not REAL_VLLM.exists():
        pytest.skip("there is no real vLLM; `make test-engines` installs it")
    folder: Path = tmp_path_factory.mktemp(f"vllm-{request.param}")
    async with vllm_server(folder, real=real) as running:
        yield running


@pytest_asyncio.fixture(loop_scope="module")
async def engine(process: EngineProcess) -> AsyncIterator[httpx.AsyncClient]:
    """Awake, and left awake to the next test."""
    async with httpx.AsyncClient(base_url=process.base_url, timeout=_PATIENCE_S) as client:
        yield client
    # On a connection of its own: after some failures it closes theirs.
    async with httpx.AsyncClient(base_url=process.base_url, timeout=_PATIENCE_S) as client:
        assert (await client.post("/wake_up")).status_code == 200
        assert await is_sleeping(client) is False


def wish(tokens: int, **more: object) -> dict[str, Any]:
    """A chat request whose answer is so long, whatever the model would rather say."""
    messages = [{"role": "user", "content": "hello"}]
    return {"model": MODEL, "messages": messages, "max_tokens": tokens, "ignore_eos": True, **more}


async def is_sleeping(engine: httpx.AsyncClient) -> bool:
    answer = await engine.get("/is_sleeping")
    assert answer.status_code == 200
    assert list(answer.json()) == ["is_sleeping"]
    return bool(answer.json()["is_sleeping"])


async def told(engine: httpx.AsyncClient, path: str) -> tuple[int, Any]:
    """What a POST without a body is answered."""
    answer = await engine.post(path)
    return answer.status_code, answer.json()


async def metrics(engine: httpx.AsyncClient) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """Values by name and labels."""
    answer = await engine.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


async def running(engine: httpx.AsyncClient) -> float:
    return sum((await metrics(engine))["vllm:num_requests_running"].values())


async def sleep_states(engine: httpx.AsyncClient) -> set[str]:
    """Those that hold."""
    values = (await metrics(engine))["vllm:engine_sleep_state"]
    assert {dict(labels)["sleep_state"] for labels in values} == {
        "awake",
        "weights_offloaded",
        "discard_all",
    }
    return {dict(labels)["sleep_state"] for labels, value in values.items() if value}


async def frames(answer: httpx.Response) -> list[str]:
    """The data of a stream's events."""
    lines = [line async for line in answer.aiter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    return [line.removeprefix("data: ") for line in lines]


def error_of(answer: httpx.Response) -> Mapping[str, Any]:
    """An error in vLLM's shape."""
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    # A number, where OpenAI has a word.
    assert error["code"] == answer.status_code
    return error


# Serving.


async def test_health_says_200_and_nothing_else(engine: httpx.AsyncClient) -> None:
    answer = await engine.get("/health")

    assert (answer.status_code, answer.content) == (200, b"")
    assert (await engine.get("/version")).json()["version"].startswith("0.")


async def test_it_lists_its_model_under_the_name_that_it_serves(engine: httpx.AsyncClient) -> None:
    body = (await engine.get("/v1/models")).json()

    assert body["object"] == "list"
    (row,) = body["data"]
    assert (row["id"], row["object"], row["owned_by"], row["parent"]) == (MODEL, "model", "vllm", None)
    assert row["max_model_len"] == CONTEXT_TOKENS
    assert row["root"].endswith("/model")


async def test_an_answer_comes_whole_with_its_usage(engine: httpx.AsyncClient) -> None:
    answer = await engine.post(_CHAT, json=wish(7))

    assert answer.status_code == 200
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert (body["object"], body["model"]) == ("chat.completion", MODEL)
    (choice,) = body["choices"]
    assert choice["finish_reason"] == "length"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"]
    usage = body["usage"]
    assert usage["completion_tokens"] == 7
    assert usage["total_tokens"] == usage["prompt_tokens"] + 7


async def test_a_stream_begins_with_the_role_and_ends_with_reason_usage_and_done(
    engine: httpx.AsyncClient,
) -> None:
    body = wish(7, stream=True, stream_options={"include_usage": True})
    async with engine.stream("POST", _CHAT, json=body) as answer:
        assert answer.status_code == 200
        assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
        *told_of, done = await frames(answer)

    assert done == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in told_of]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    *choices, usage = chunks
    assert [chunk["choices"][0]["finish_reason"] for chunk in choices][:-1] == [None] * (len(choices) - 1)
    assert choices[-1]["choices"][0]["finish_reason"] == "length"
    assert "".join(chunk["choices"][0]["delta"].get("content") or "" for chunk in choices)
    # The usage has a chunk of its own, without choices.
    assert usage["choices"] == []
    assert usage["usage"]["completion_tokens"] == 7


async def test_a_stream_tells_no_usage_unasked(engine: httpx.AsyncClient) -> None:
    async with engine.stream("POST", _CHAT, json=wish(2, stream=True)) as answer:
        *told_of, done = await frames(answer)

    assert done == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in told_of]
    assert all(chunk["choices"] and not chunk.get("usage") for chunk in chunks)


async def test_completions_stream_text(engine: httpx.AsyncClient) -> None:
    body = {"model": MODEL, "prompt": "hello", "max_tokens": 3, "ignore_eos": True, "stream": True}
    async with engine.stream("POST", "/v1/completions", json=body) as answer:
        *told_of, done = await frames(answer)

    assert done == "[DONE]"
    chunks = [msgspec.json.decode(data) for data in told_of]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks)
    assert chunks[-1]["choices"][0]["finish_reason"] == "length"


async def test_a_request_that_names_no_model_gets_the_one_that_there_is(engine: httpx.AsyncClient) -> None:
    body = wish(1)
    del body["model"]
    assert (await engine.post(_CHAT, json=body)).json()["model"] == MODEL


async def test_an_unknown_model_is_not_found(engine: httpx.AsyncClient) -> None:
    answer = await engine.post(_CHAT, json=wish(1) | {"model": "nope"})

    assert answer.status_code == 404
    error = error_of(answer)
    assert error["message"] == f"The model `nope` does not exist. Valid aliases: {MODEL}."
    assert (error["type"], error["param"]) == ("NotFoundError", "model")


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(b"{nonsense", id="no JSON"),
        pytest.param(b'{"model": "tiny"}', id="no messages"),
        pytest.param(b'{"model": "tiny", "messages": []}', id="empty messages"),
    ],
)
async def test_what_cannot_be_read_is_a_bad_request(engine: httpx.AsyncClient, body: bytes) -> None:
    answer = await engine.post(_CHAT, content=body, headers={"Content-Type": "application/json"})

    assert answer.status_code == 400
    assert error_of(answer)["type"] in ("Bad Request", "BadRequestError")


async def test_a_prompt_that_is_too_long_is_a_bad_request(engine: httpx.AsyncClient) -> None:
    messages = [{"role": "user", "content": "word " * CONTEXT_TOKENS}]
    answer = await engine.post(_CHAT, json=wish(1) | {"messages": messages})

    assert answer.status_code == 400
    error = error_of(answer)
    assert error["type"] == "BadRequestError"
    # Of one that cannot fit it says so without counting its tokens.
    assert error["param"] in ("input_tokens", "input_text")
    assert f"maximum context length is {CONTEXT_TOKENS} tokens" in error["message"]


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        (
            {},
            '"auto" tool choice requires --enable-auto-tool-choice and --tool-call-parser to be set',
        ),
        ({"tool_choice": "required"}, 'tool_choice="required" requires --tool-call-parser to be set'),
        (
            {"tool_choice": {"type": "function", "function": {"name": "look"}}},
            'tool_choice=function "look" requires --tool-call-parser to be set',
        ),
    ],
)
async def test_one_that_was_not_told_how_its_model_calls_tools_refuses_them(
    engine: httpx.AsyncClient, choice: dict[str, Any], said: str
) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]

    answer = await engine.post(_CHAT, json=wish(2, tools=tools, **choice))

    assert answer.status_code == 400
    assert answer.json()["error"]["message"] == said


async def test_tools_that_are_not_to_be_called_are_taken(engine: httpx.AsyncClient) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]

    answer = await engine.post(_CHAT, json=wish(2, tools=tools, tool_choice="none"))

    assert answer.status_code == 200


async def test_a_model_that_chats_has_no_route_for_embeddings(engine: httpx.AsyncClient) -> None:
    answer = await engine.post("/v1/embeddings", json={"model": MODEL, "input": "hello"})

    assert (answer.status_code, answer.json()) == (404, {"detail": "Not Found"})


async def test_other_paths_and_methods_are_refused_in_the_words_of_its_framework(
    engine: httpx.AsyncClient,
) -> None:
    absent, wrong = await engine.get("/nonsense"), await engine.post("/health")

    assert (absent.status_code, absent.json()) == (404, {"detail": "Not Found"})
    assert (wrong.status_code, wrong.json()) == (405, {"detail": "Method Not Allowed"})


async def test_a_caller_that_leaves_ends_its_request(engine: httpx.AsyncClient) -> None:
    async with engine.stream("POST", _CHAT, json=wish(CONTEXT_TOKENS - 100, stream=True)) as answer:
        # Kept: an iterator that is let go closes the stream.
        chunks = answer.aiter_raw()
        assert await anext(chunks)
        async with asyncio.timeout(_PATIENCE_S):
            while await running(engine) != 1:
                pass
    # Long before it would have had its say.
    async with asyncio.timeout(1.5):
        while await running(engine) != 0:
            pass


async def test_its_metrics_have_the_names_that_we_read(engine: httpx.AsyncClient) -> None:
    await engine.post(_CHAT, json=wish(1))
    found = await metrics(engine)

    assert {
        "vllm:num_requests_running",
        "vllm:num_requests_waiting",
        "vllm:kv_cache_usage_perc",
        "vllm:engine_sleep_state",
        "vllm:prompt_tokens_total",
        "vllm:generation_tokens_total",
        "vllm:request_success_total",
    } <= set(found)
    reasons = {dict(labels)["reason"] for labels in found["vllm:num_requests_waiting_by_reason"]}
    assert reasons == {"capacity", "deferred"}
    for values in found["vllm:num_requests_running"], found["vllm:engine_sleep_state"]:
        for labels in values:
            assert (dict(labels)["model_name"], dict(labels)["engine"]) == (MODEL, "0")
    assert "abort" in {dict(labels)["finished_reason"] for labels in found["vllm:request_success_total"]}


# Sleep.


async def test_it_sleeps_at_level_1_unless_told_otherwise(engine: httpx.AsyncClient) -> None:
    assert await is_sleeping(engine) is False
    assert await sleep_states(engine) == {"awake"}

    assert await told(engine, "/sleep") == (200, {"status": "sleeping", "level": 1})

    assert await is_sleeping(engine) is True
    assert await sleep_states(engine) == {"weights_offloaded"}


async def test_level_2_drops_the_weights(engine: httpx.AsyncClient) -> None:
    assert await told(engine, "/sleep?level=2") == (200, {"status": "sleeping", "level": 2})

    assert await sleep_states(engine) == {"discard_all"}


async def test_a_sleeper_is_healthy_and_lists_its_model(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep")

    assert (await engine.get("/health")).status_code == 200
    assert (await engine.get("/v1/models")).json()["data"][0]["id"] == MODEL


async def test_a_sleeper_that_is_told_to_sleep_deeper_says_that_it_does(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep?level=1")

    assert await told(engine, "/sleep?level=2") == (200, {"status": "sleeping", "level": 2})
    assert await is_sleeping(engine) is True


async def test_what_is_awake_is_awake_once_more(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep")

    assert await told(engine, "/wake_up") == (200, {"status": "awake", "tags": None})
    assert await told(engine, "/wake_up") == (200, {"status": "awake", "tags": None})
    assert await is_sleeping(engine) is False
    assert (await engine.post(_CHAT, json=wish(2))).status_code == 200


async def test_it_sleeps_until_all_of_it_is_awake(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep")

    weights = await told(engine, "/wake_up?tags=weights")
    assert weights == (200, {"status": "sleeping", "tags": ["weights"]})
    assert await is_sleeping(engine) is True
    rest = await told(engine, "/wake_up?tags=kv_cache")
    assert rest == (200, {"status": "awake", "tags": ["kv_cache"]})
    assert await is_sleeping(engine) is False


async def test_one_tag_that_is_awake_and_the_whole_call_is_ignored(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep")
    await engine.post("/wake_up?tags=weights")

    both = await told(engine, "/wake_up?tags=weights&tags=kv_cache")

    assert both == (200, {"status": "sleeping", "tags": ["weights", "kv_cache"]})
    assert await is_sleeping(engine) is True


async def test_an_unknown_tag_is_no_error(engine: httpx.AsyncClient) -> None:
    awake = await told(engine, "/wake_up?tags=nonsense")
    assert awake == (200, {"status": "awake", "tags": ["nonsense"]})

    await engine.post("/sleep")
    asleep = await told(engine, "/wake_up?tags=nonsense")
    assert asleep == (200, {"status": "sleeping", "tags": ["nonsense"]})
    assert await is_sleeping(engine) is True


async def test_level_0_only_pauses(engine: httpx.AsyncClient) -> None:
    assert await told(engine, "/sleep?level=0") == (200, {"status": "sleeping", "level": 0})
    assert await is_sleeping(engine) is True

    resumed = await told(engine, "/wake_up?tags=scheduling")
    assert resumed == (200, {"status": "awake", "tags": ["scheduling"]})
    assert await is_sleeping(engine) is False


@pytest.mark.parametrize("level", ["9", "abc", "-1"])
async def test_a_level_that_there_is_not_is_a_bad_request(engine: httpx.AsyncClient, level: str) -> None:
    answer = await engine.post(f"/sleep?level={level}")

    assert answer.status_code == 400
    error = error_of(answer)
    assert (error["type"], error["param"]) == ("Bad Request", "query.level")
    assert await is_sleeping(engine) is False


async def test_a_mode_that_there_is_not_is_a_bad_request(engine: httpx.AsyncClient) -> None:
    answer = await engine.post("/sleep?mode=nonsense")

    assert answer.status_code == 400
    assert error_of(answer)["param"] == "query.mode"


async def test_weights_are_reloaded_by_a_remote_call(engine: httpx.AsyncClient) -> None:
    await engine.post("/sleep?level=2")
    await engine.post("/wake_up?tags=weights")

    reloaded = await engine.post("/collective_rpc", json={"method": "reload_weights"})

    assert (reloaded.status_code, reloaded.json()) == (200, {"results": [None]})
    assert (await engine.post("/wake_up?tags=kv_cache")).json()["status"] == "awake"
    assert (await engine.post(_CHAT, json=wish(2))).status_code == 200


async def test_a_remote_call_that_there_is_not_fails(engine: httpx.AsyncClient) -> None:
    unnamed = await engine.post("/collective_rpc", json={"no": "method"})
    assert unnamed.status_code == 400
    assert error_of(unnamed)["message"] == "Missing 'method' in request body"

    unread = await engine.post("/collective_rpc", content=b"{nonsense")
    assert unread.status_code == 400
    assert error_of(unread)["message"].startswith("JSON decode error: ")

    unknown = await engine.post("/collective_rpc", json={"method": "nonsense"})
    assert unknown.status_code == 500
    assert error_of(unknown)["type"] == "InternalServerError"


async def test_a_request_to_a_sleeper_hangs_without_a_byte_until_it_is_woken(
    engine: httpx.AsyncClient,
) -> None:
    await engine.post("/sleep")
    parked = asyncio.create_task(engine.post(_CHAT, json=wish(2)))
    done, _ = await asyncio.wait({parked}, timeout=_NOTHING_S)
    assert not done
    # Nor is it counted: a sleeper's metrics say nothing of those that wait for it.
    found = await metrics(engine)
    assert sum(found["vllm:num_requests_waiting"].values()) == 0

    await engine.post("/wake_up")

    answer = await parked
    assert (answer.status_code, answer.json()["choices"][0]["finish_reason"]) == (200, "length")


async def test_a_request_that_is_given_up_while_it_sleeps_is_not_served_afterwards(
    engine: httpx.AsyncClient,
) -> None:
    await engine.post("/sleep")
    with pytest.raises(httpx.ReadTimeout):
        await engine.post(_CHAT, json=wish(CONTEXT_TOKENS - 100), timeout=_NOTHING_S)

    await engine.post("/wake_up")

    assert await running(engine) == 0


async def test_sleep_cuts_a_stream_that_runs_and_says_so(engine: httpx.AsyncClient) -> None:
    tokens = CONTEXT_TOKENS - 100
    body = wish(tokens, stream=True, stream_options={"include_usage": True})
    async with engine.stream("POST", _CHAT, json=body) as answer:
        lines = answer.aiter_lines()
        assert (await anext(lines)).startswith("data: ")
        assert (await engine.post("/sleep")).status_code == 200
        rest = [line.removeprefix("data: ") async for line in lines if line]

    *told_of, usage, done = rest
    assert done == "[DONE]"
    assert msgspec.json.decode(told_of[-1])["choices"][0]["finish_reason"] == "abort"
    assert msgspec.json.decode(usage)["usage"]["completion_tokens"] < tokens


async def test_sleep_cuts_an_answer_that_would_have_come_whole(engine: httpx.AsyncClient) -> None:
    tokens = CONTEXT_TOKENS - 100
    asked = asyncio.create_task(engine.post(_CHAT, json=wish(tokens)))
    async with asyncio.timeout(_PATIENCE_S):
        while await running(engine) != 1:
            assert not asked.done()
    await engine.post("/sleep")

    answer = await asked
    assert answer.status_code == 200
    assert answer.json()["choices"][0]["finish_reason"] == "abort"
    assert answer.json()["usage"]["completion_tokens"] < tokens
