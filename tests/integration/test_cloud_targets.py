"""Cloud targets against simulated APIs in processes of their own: both dialects look alike to a caller."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import pytest
import structlog
from prometheus_client import CollectorRegistry

from controlplane.cloud import CloudReply, CloudSpend, CloudTargets, Dialect, Thinking
from controlplane.pipelines._openai import AnswerReader
from controlplane.store import CloudCalls, JobStore
from rung.errors import (
    BudgetExhaustedError,
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    EngineTimeoutError,
    EngineUnreachableError,
    UnavailableError,
)
from rung.types import TokenDelta, ToolCallDelta, Usage
from tests.integration.cloud_process import KEY, CloudProcess, cloud_process, cloud_targets, provider
from tests.integration.engine_process import free_port

TOOL = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a place.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
PIXEL = "data:image/png;base64,iVBORw0KGgo="
PROVIDERS = ["openai", "deepseek", "google", "anthropic"]


def _body(text: str = "count to 5", **more: object) -> bytes:
    return msgspec.json.encode({"model": "any", "messages": [{"role": "user", "content": text}], **more})


class Heard:
    """A job that remembers what it was told."""

    def __init__(self) -> None:
        self.content = ""
        self.reasoning = ""
        self.calls: list[ToolCallDelta] = []
        self.usage: Usage | None = None

    def text(self, delta: TokenDelta) -> None:
        self.content += delta.content
        self.reasoning += delta.reasoning

    def tool_call(self, delta: ToolCallDelta) -> None:
        self.calls.append(delta)

    def consumed(self, usage: Usage) -> None:
        self.usage = usage

    @property
    def arguments(self) -> Any:
        return msgspec.json.decode("".join(call.arguments for call in self.calls))


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CloudCalls]:
    opened = await JobStore.open(tmp_path / "rung.db")
    yield CloudCalls(opened)
    await opened.aclose()


class Stage:
    """A provider in a process, and the target that leads to it."""

    def __init__(self, api: CloudProcess, targets: CloudTargets, spend: CloudSpend, name: str) -> None:
        self.api = api
        self.targets = targets
        self.spend = spend
        self.name = name
        self.id = f"{name}/chat"

    async def open(self, body: bytes, *, stream: bool = True, idle_timeout_s: float = 30.0) -> CloudReply:
        return await self.targets.open(self.id, body, stream=stream, idle_timeout_s=idle_timeout_s)

    async def hear(self, body: bytes, *, stream: bool = True) -> tuple[Heard, str, CloudReply]:
        """Read an answer as the pipelines do; also why it ended."""
        heard = Heard()
        reader = AnswerReader(heard, self.id, keep_usage=True)
        async with await self.open(body, stream=stream) as reply:
            if stream:
                async for chunk in reply.chunks():
                    reader.feed(chunk)
            else:
                reader.whole(await reply.read())
            reader.finish()
        return heard, reader.finish_reason, reply

    @property
    def spent_micro_usd(self) -> int:
        spending = self.spend.spending(self.name)
        assert spending.reserved_micro_usd == 0
        return spending.spent_micro_usd


@pytest.fixture(scope="module")
def apis() -> Iterator[Mapping[str, CloudProcess]]:
    """One process for each provider, for all tests."""
    with ExitStack() as stack:
        yield {
            name: stack.enter_context(
                cloud_process("--dialect", _dialect(name), "--provider", name, "--slow-first-byte-s", "0.3")
            )
            for name in PROVIDERS
        }


def _dialect(name: str) -> Dialect:
    return Dialect.ANTHROPIC if name == "anthropic" else Dialect.OPENAI


@pytest.fixture
async def openai(apis: Mapping[str, CloudProcess]) -> CloudProcess:
    await apis["openai"].begin()
    return apis["openai"]


@pytest.fixture(params=PROVIDERS)
async def stage(
    request: pytest.FixtureRequest, apis: Mapping[str, CloudProcess], store: CloudCalls
) -> AsyncIterator[Stage]:
    name: str = request.param
    api = apis[name]
    await api.begin()
    chosen = provider(name, api.url, dialect=_dialect(name), thinking=Thinking.BUDGET)
    async with cloud_targets(chosen, store=store) as (targets, spend):
        yield Stage(api, targets, spend, name)


@pytest.mark.parametrize("stream", [True, False])
async def test_an_answer_looks_alike_whoever_gives_it(stage: Stage, stream: bool) -> None:
    heard, finish_reason, reply = await stage.hear(_body(), stream=stream)

    assert (heard.content, finish_reason) == ("1 2 3 4 5", "stop")
    usage = heard.usage
    assert usage is not None
    assert usage.completion_tokens == 5
    assert 0 < usage.cached_tokens < usage.prompt_tokens
    fresh = usage.prompt_tokens - usage.cached_tokens
    assert stage.spent_micro_usd == -(-(fresh * 10 + usage.cached_tokens + 500) // 10)
    assert reply.cost_usd == stage.spent_micro_usd / 1e6


@pytest.mark.parametrize("stream", [True, False])
async def test_a_call_of_a_tool_looks_alike_and_its_result_goes_back(stage: Stage, stream: bool) -> None:
    heard, finish_reason, _ = await stage.hear(_body("call the tool", tools=[TOOL]), stream=stream)

    assert (finish_reason, heard.arguments) == ("tool_calls", {"city": "simulated"})
    assert heard.calls[0].name == "weather"
    call = {
        "id": heard.calls[0].id,
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city":"simulated"}'},
    }
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "call the tool"},
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "I should."},
        {"role": "tool", "tool_call_id": heard.calls[0].id, "content": "rain"},
        {"role": "user", "content": [{"type": "text", "text": "count to 2"}]},
    ]
    body = msgspec.json.encode(
        {"messages": turns, "tools": [TOOL], "tool_choice": "auto", "temperature": 1.5}
    )
    heard, finish_reason, _ = await stage.hear(body, stream=stream)

    assert (heard.content, finish_reason) == ("1 2", "stop")


async def test_an_image_a_limit_and_what_engines_alone_know_are_understood(stage: Stage) -> None:
    parts = [{"type": "text", "text": "count to 50"}, {"type": "image_url", "image_url": {"url": PIXEL}}]
    body = msgspec.json.encode(
        {
            "messages": [{"role": "user", "content": parts}],
            "max_tokens": 3,
            "effort": 8,
            "min_p": 0.1,
            "chat_template_kwargs": {"enable_thinking": False},
            "stop": "never",
        }
    )

    heard, finish_reason, _ = await stage.hear(body)

    assert (heard.content, finish_reason) == ("1 2 3", "length")


@pytest.mark.parametrize("stream", [True, False])
async def test_thoughts_come_as_reasoning_content(
    apis: Mapping[str, CloudProcess], store: CloudCalls, stream: bool
) -> None:
    api = apis["anthropic"]
    await api.begin()
    chosen = provider("anthropic", api.url, dialect=Dialect.ANTHROPIC, thinking=Thinking.BUDGET)
    async with cloud_targets(chosen, store=store) as (targets, spend):
        stage = Stage(api, targets, spend, "anthropic")
        heard, _, _ = await stage.hear(
            _body("count to 2", reasoning_effort="low", temperature=0.2), stream=stream
        )

    assert heard.content == "1 2"
    assert heard.reasoning.startswith("The question has 3 words.")


RETRY_FORMS = ["seconds", "date", "milliseconds", "retry_info", "reset"]


@pytest.mark.parametrize("form", RETRY_FORMS)
async def test_each_way_to_say_when_to_come_back_is_understood(stage: Stage, form: str) -> None:
    await stage.api.misbehave(f"rate_limit_{form}")

    with pytest.raises(EngineFailedError) as raised:
        await stage.open(_body())

    assert raised.value.metadata["failure"] == "rate_limit"
    assert 5.0 <= float(raised.value.metadata["retry_after"]) <= 8.0
    assert stage.spent_micro_usd == 0
    assert stage.targets.refusal(stage.id) == ""


async def test_without_a_word_of_when_nothing_is_made_up(stage: Stage) -> None:
    await stage.api.misbehave("rate_limit")

    with pytest.raises(EngineFailedError) as raised:
        await stage.open(_body())

    assert "retry_after" not in raised.value.metadata


@pytest.mark.parametrize("fault", ["overloaded", "http_500"])
async def test_trouble_of_theirs_passes_to_the_next_target(stage: Stage, fault: str) -> None:
    await stage.api.misbehave(fault)

    with pytest.raises(EngineFailedError) as raised:
        await stage.open(_body())

    assert raised.value.metadata["failure"] == "server"
    assert stage.targets.refusal(stage.id) == ""


@pytest.mark.parametrize(
    ("fault", "failure", "said"),
    [
        ("balance", "balance", "has no money or quota left"),
        ("quota", "balance", "has no money or quota left"),
        ("wrong_key", "key", "refuses our key"),
        ("unknown_model", "config", "has no simulated-chat"),
    ],
)
async def test_what_does_not_pass_by_itself_holds_the_target(
    stage: Stage, fault: str, failure: str, said: str
) -> None:
    await stage.api.misbehave(fault)
    with pytest.raises(EngineFailedError) as raised:
        await stage.open(_body())
    assert raised.value.metadata["failure"] == failure
    await stage.api.misbehave()

    assert said in stage.targets.refusal(stage.id)
    with pytest.raises(UnavailableError, match=said):
        await stage.open(_body())
    assert await stage.api.asked() == 1


@pytest.mark.parametrize("fault", ["refused", "refused_array"])
async def test_a_wrong_request_is_the_callers_own(stage: Stage, fault: str) -> None:
    await stage.api.misbehave(fault)

    with pytest.raises(EngineRejectedError, match=r"^The request is wrong\.$"):
        await stage.open(_body())

    assert stage.spent_micro_usd == 0


@pytest.mark.parametrize("stream", [True, False])
async def test_signs_of_life_are_no_part_of_the_answer(stage: Stage, stream: bool) -> None:
    await stage.api.misbehave("keep_alive")

    heard, finish_reason, _ = await stage.hear(_body(), stream=stream)

    assert (heard.content, finish_reason) == ("1 2 3 4 5", "stop")


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        ("cut_mid_stream", EngineProtocolError),
        ("ended_mid_stream", EngineProtocolError),
        ("malformed", (EngineProtocolError, EngineFailedError)),
        ("error_mid_stream", EngineFailedError),
    ],
)
async def test_a_stream_that_breaks_is_an_error_and_what_came_is_paid(
    stage: Stage, fault: str, error: type[Exception] | tuple[type[Exception], ...]
) -> None:
    await stage.api.misbehave(fault)

    with pytest.raises(error):
        await stage.hear(_body("count to 500"))

    assert 0 < stage.spent_micro_usd < 2000


async def test_a_cut_answer_in_one_piece_counts_in_full(stage: Stage) -> None:
    await stage.api.misbehave("cut_mid_stream")

    with pytest.raises(EngineProtocolError):
        await stage.hear(_body(max_tokens=100), stream=False)

    assert stage.spent_micro_usd > 1000


async def test_something_else_than_a_stream_is_not_relayed(stage: Stage) -> None:
    await stage.api.misbehave("not_a_stream")

    with pytest.raises(EngineProtocolError, match="answered a stream with application/json"):
        await stage.open(_body(max_tokens=100))

    assert stage.spent_micro_usd > 1000


async def test_silence_ends_and_a_caller_that_leaves_reaches_the_provider(stage: Stage) -> None:
    await stage.api.misbehave("hang")
    with pytest.raises(EngineTimeoutError):
        await stage.open(_body(), idle_timeout_s=0.05)
    waiting = asyncio.create_task(stage.open(_body()))
    async with asyncio.timeout(20):
        while await stage.api.asked() < 2:
            pass
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        while await stage.api.aborted() < 2:
            pass

    assert 0 < stage.spent_micro_usd < 200


async def test_a_caller_that_leaves_in_mid_stream_pays_for_what_came(stage: Stage) -> None:
    async with await stage.open(_body("count to 99999")) as reply:
        async for _ in reply.chunks():
            break

    assert 0 < stage.spent_micro_usd < 41000


async def test_a_slow_first_byte_is_waited_for(stage: Stage) -> None:
    await stage.api.misbehave("slow_first_byte")

    heard, _, _ = await stage.hear(_body())

    assert heard.content == "1 2 3 4 5"


async def test_a_provider_that_is_away_costs_nothing(store: CloudCalls) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    async with cloud_targets(provider("openai", url), store=store) as (targets, spend):
        with pytest.raises(EngineUnreachableError):
            await targets.open("openai/chat", _body(), stream=True, idle_timeout_s=5.0)

        assert spend.spending("openai").spent_micro_usd == 0


async def test_without_a_key_the_target_is_refused_and_nothing_is_sent(
    openai: CloudProcess, store: CloudCalls
) -> None:
    async with cloud_targets(provider("openai", openai.url), store=store, environment={}) as (targets, _):
        assert targets.refusal("openai/chat") == "no key: set OPENAI_API_KEY"
        with pytest.raises(UnavailableError, match="no key: set OPENAI_API_KEY"):
            await targets.open("openai/chat", _body(), stream=True, idle_timeout_s=5.0)

    assert await openai.asked() == 0


async def test_calls_at_the_same_time_cannot_spend_more_than_the_cap(
    openai: CloudProcess, store: CloudCalls
) -> None:
    await openai.misbehave("slow_first_byte")
    chosen = provider("openai", openai.url, cap_usd=0.1)
    async with cloud_targets(chosen, store=store) as (targets, spend):
        stage = Stage(openai, targets, spend, "openai")
        # Each could cost $0.041: there is room for two.
        answers = await asyncio.gather(*(stage.hear(_body()) for _ in range(8)), return_exceptions=True)

        refused = [each for each in answers if isinstance(each, BudgetExhaustedError)]
        assert len(refused) == 6
        assert await openai.asked() == 2
        assert "reserved by running calls" in refused[0].message
        assert "it resets at " in refused[0].message
        # What the two left over is there again.
        assert (await stage.hear(_body()))[1] == "stop"


async def test_prometheus_is_told_what_was_spent(openai: CloudProcess, store: CloudCalls) -> None:
    registry = CollectorRegistry()
    chosen = provider("openai", openai.url)
    async with cloud_targets(chosen, store=store, registry=registry) as (targets, spend):
        stage = Stage(openai, targets, spend, "openai")
        async with await stage.open(_body()) as reply:
            reserved = registry.get_sample_value("rung_cloud_reserved_usd", {"provider": "openai"})
            async for _ in reply.chunks():
                pass
            known_at_the_end = reply.cost_usd
        labels = {"provider": "openai", "model": "openai/chat"}
        spent = registry.get_sample_value("rung_cloud_spend_usd_total", labels)

    assert reserved == pytest.approx(0.041, abs=0.001)
    assert spent == reply.cost_usd == known_at_the_end > 0


@pytest.mark.parametrize("fault", ["wrong_key", "refused", "balance", "cut_mid_stream", "hang"])
async def test_the_key_is_in_no_error_and_in_no_log(stage: Stage, fault: str) -> None:
    await stage.api.misbehave(fault)
    said: list[str] = []
    with structlog.testing.capture_logs() as logs:
        try:
            async with await stage.open(_body(), idle_timeout_s=0.2) as reply:
                said += [chunk.decode() async for chunk in reply.chunks()]
        except (EngineFailedError, EngineRejectedError, EngineProtocolError, EngineTimeoutError) as error:
            said += [str(error), repr(error), str(error.metadata)]
    said += [str(logs), repr(stage.targets), repr(vars(stage.targets)), stage.targets.refusal(stage.id)]

    assert KEY not in "\n".join(said)
