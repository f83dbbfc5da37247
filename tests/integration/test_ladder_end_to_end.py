"""The effort ladder over real processes: two agents, simulated engines and cloud API, both clients."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import yaml
from msgspec import Struct

import rung
from rung.errors import NoTargetError
from rung.types import (
    JobEvent,
    LifecycleFailed,
    NodeState,
    Phase,
    PhaseProgress,
    Policy,
    ProfileDone,
    Residency,
    Routed,
    Served,
    TokenDelta,
)
from tests.integration.cloud_process import KEY, CloudProcess, cloud_process
from tests.integration.stack import SIMULATORS, RungProcess, engine_pids

_HARD = "Prove that there are infinitely many primes."
_MESSAGES: list[Any] = [{"role": "user", "content": _HARD}]
_LOCAL_ONLY = Policy(local_only=True)
_REFUSED = "deepseek/reasoner: the request is local_only, and this is not hardware of ours"


def _engine(deployment_id: str, node: str, model: str, **fields: Any) -> dict[str, Any]:
    environment = {"RUNG_SIM_SPEED": "20", "RUNG_SIM_LOAD_S": "0.2"}
    return {
        "id": deployment_id,
        "node": node,
        "model": model,
        "engine": {"kind": "llamacpp", "model_path": f"/models/{model}-q4.gguf"},
        "runtime": {"kind": "process", "executable": "llama-server", "environment": environment},
        "stop_grace": "2s",
    } | fields


def _config(folder: Path, ports: dict[str, int], cloud_url: str) -> dict[str, Any]:
    key = folder / "cloud.key"
    key.touch(mode=0o600)
    key.write_text(KEY)
    model = {
        "id": "reasoner",
        "model": "deepseek-reasoner",
        "max_output_tokens": 1000,
        "usd_per_million_prompt_tokens": 1.0,
        "usd_per_million_completion_tokens": 2.0,
    }
    tools = {"capabilities": ["chat", "tools"]}
    return {
        "server": {"grpc_port": 0, "http_port": 0, "state_dir": str(folder / "plane"), "drain": "2s"},
        "nodes": [{"id": name, "address": f"127.0.0.1:{port}"} for name, port in ports.items()],
        "deployments": [
            _engine("orchestrator", "workstation", "nemotron-8b", residency_class="pinned", **tools),
            _engine("reasoner", "workstation", "phi4-14b"),
            _engine("thinker", "spark", "qwen3-27b"),
        ],
        "profiles": [
            {
                "name": "gaming",
                "deployments": [{"deployment": "orchestrator", "residency": "awake"}],
                "others": "stopped",
                "hold": True,
            }
        ],
        "cloud": [
            {"id": "deepseek", "base_url": cloud_url, "api_key_file": str(key), "models": [model]},
        ],
        "ladder": {
            "chains": {
                "chat": ["orchestrator"],
                "reasoning": ["spark/qwen3-27b", "workstation/phi4-14b", "deepseek/reasoner"],
            },
            "rungs": [
                {"name": "chat", "effort": "1-6", "chain": "chat"},
                {
                    "name": "reasoning",
                    "effort": "7-10",
                    "chain": "chat",
                    "capabilities": ["tools"],
                    "reason": "reasoning",
                },
            ],
        },
    }


class Told(Struct, frozen=True):
    """What a caller was told: the text, who answered, who reasoned, and the lines of progress."""

    text: str
    served: Served | None
    reasoners: list[str]
    lines: list[str]


class Household:
    """The fleet, and its two kinds of clients."""

    def __init__(self, agents: dict[str, RungProcess], plane: RungProcess, cloud: CloudProcess) -> None:
        self.agents = agents
        self.cloud = cloud
        self.url = f"http://127.0.0.1:{plane.ready['http_port']}/v1"
        self.sdk = rung.AsyncClient(f"127.0.0.1:{plane.ready['grpc_port']}")
        self.openai = openai.AsyncOpenAI(base_url=self.url, api_key="none", max_retries=0)

    async def over_grpc(self, policy: Policy = Policy(), **asked: Any) -> Told:  # noqa: B008 - frozen
        """Ask with the SDK."""
        stream = self.sdk.chat(_HARD, policy=policy, **asked)
        events = [event async for event in stream]
        return _told(events, (await stream.result()).served)

    async def over_http(self, **asked: Any) -> tuple[str, dict[str, Any], Any]:
        """Ask with OpenAI's client: the text, the `rung` object, and the headers."""
        raw = await self.openai.chat.completions.with_raw_response.create(messages=_MESSAGES, **asked)
        answer = raw.parse()
        assert answer.model_extra is not None
        return answer.choices[0].message.content or "", answer.model_extra["rung"], raw.headers

    async def over_http_stream(self, **asked: Any) -> tuple[str, dict[str, Any], Any]:
        """The same as a stream; its last frame has the `rung` object, and no other has."""
        raw = await self.openai.chat.completions.with_raw_response.create(
            messages=_MESSAGES, stream=True, **asked
        )
        chunks = [chunk async for chunk in raw.parse()]
        marks = [chunk.model_extra["rung"] for chunk in chunks if "rung" in (chunk.model_extra or {})]
        assert len(marks) == 1
        text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
        return text, marks[0], raw.headers

    async def asked(self, deployment_id: str) -> int:
        """How many requests came to an engine."""
        endpoint = (await self.sdk.get_deployment(deployment_id)).endpoint
        assert endpoint is not None
        async with (
            aiohttp.ClientSession() as http,
            http.get(f"{endpoint.base_url}/sim/state") as response,
        ):
            return int((await response.json())["requests"])

    async def lose_the_spark(self) -> None:
        """Kill its agent, and the engine there."""
        thinker = await self.sdk.get_deployment("thinker")
        assert thinker.pid is not None
        await self.agents["spark"].end(signal.SIGKILL)
        os.kill(thinker.pid, signal.SIGKILL)


def _told(events: list[JobEvent], served: Served | None) -> Told:
    progress = [event.payload for event in events if isinstance(event.payload, PhaseProgress)]
    reasoning = re.compile(r"(\S+) is reasoning$")
    reasoners = [
        found[1]
        for each in progress
        if each.phase is Phase.REASONING and (found := reasoning.match(each.detail))
    ]
    routed = [event.payload.served for event in events if isinstance(event.payload, Routed)]
    assert routed[-1] == served
    text = "".join(event.payload.content for event in events if isinstance(event.payload, TokenDelta))
    return Told(text, served, reasoners, [each.detail for each in progress])


@pytest.fixture
async def household(tmp_path: Path) -> AsyncIterator[Household]:
    async with AsyncExitStack() as stack:
        cloud = stack.enter_context(cloud_process("--provider", "deepseek"))
        agents: dict[str, RungProcess] = {}
        for name in ("workstation", "spark"):
            agents[name] = await stack.enter_async_context(_agent(tmp_path, name))
        ports = {name: agent.ready["port"] for name, agent in agents.items()}
        file = tmp_path / "rung.yaml"
        file.write_text(yaml.safe_dump(_config(tmp_path, ports, cloud.url)))
        plane = RungProcess(
            ["serve", "--config", str(file)],
            tmp_path / "plane" / "controlplane.json",
            tmp_path / "plane.log",
        )
        await plane.start()
        stack.push_async_callback(plane.end, signal.SIGTERM)
        found = Household(agents, plane, cloud)
        stack.push_async_callback(found.sdk.aclose)
        stack.push_async_callback(found.openai.close)
        for name in ("orchestrator", "reasoner", "thinker"):
            last = [event async for event in found.sdk.start_deployment(name)][-1]
            assert not isinstance(last.payload, LifecycleFailed), last
        yield found


@asynccontextmanager
async def _agent(folder: Path, name: str) -> AsyncIterator[RungProcess]:
    home = folder / name
    home.mkdir()
    state, file = home / "agent", home / "agent.yaml"
    config = {"node_id": name, "port": 0, "state_dir": str(state), "executables": SIMULATORS}
    file.write_text(yaml.safe_dump(config))
    process = RungProcess(["agent", "run", "--config", str(file)], state / "agent.json", home / "agent.log")
    await process.start()
    try:
        yield process
    finally:
        await process.end(signal.SIGTERM)
        for pid in engine_pids(home):
            os.kill(pid, signal.SIGKILL)


def _check_headers(headers: Any, mark: dict[str, Any], *, requested: str) -> None:
    """That the headers and the `rung` object say the same of an answer of the orchestrator's."""
    served = {"requested": requested, "target": "orchestrator", "node": "workstation", "model": mark["model"]}
    assert {name: headers[f"x-rung-{name}"] for name in served} == served
    assert {name: mark[name] for name in served} == served
    assert headers["x-rung-job"] == mark["job"]
    assert (headers["x-rung-effort"], headers["x-rung-rung"]) == (str(mark["effort"]), mark["rung"])


async def test_little_effort_is_the_orchestrators_and_much_is_reasoned_about_on_the_spark(
    household: Household,
) -> None:
    text, mark, headers = await household.over_http(model="rung/auto", extra_body={"effort": 3})
    assert "a simulated llama-server in the role of nemotron-8b" in text
    _check_headers(headers, mark, requested="rung/auto")
    assert (mark["effort"], mark["rung"]) == (3, "chat")
    assert "reasoned_by" not in mark
    told = await household.over_grpc(effort=3)
    assert "a simulated llama-server in the role of nemotron-8b" in told.text
    assert told.served == Served("", "orchestrator", "workstation", "nemotron-8b")
    assert told.reasoners == []
    # The boundary: 6 is never offered the tool.
    _, mark, _ = await household.over_http(model="rung/6")
    assert "reasoned_by" not in mark
    assert await household.asked("thinker") == 0

    text, mark, headers = await household.over_http(model="rung/7")
    assert "The tool answered: This is a simulated llama-server in the role of qwen3-27b" in text
    _check_headers(headers, mark, requested="rung/7")
    assert (mark["effort"], mark["rung"], mark["reasoned_by"]) == (7, "reasoning", ["thinker"])
    text, mark, headers = await household.over_http_stream(model="rung/auto", reasoning_effort="high")
    assert "The tool answered: This is a simulated llama-server in the role of qwen3-27b" in text
    _check_headers(headers, mark, requested="rung/auto")
    assert (mark["effort"], mark["rung"], mark["reasoned_by"]) == (8, "reasoning", ["thinker"])
    told = await household.over_grpc(effort=8)
    assert "The tool answered: This is a simulated llama-server in the role of qwen3-27b" in told.text
    assert told.served == Served("", "orchestrator", "workstation", "nemotron-8b")
    assert told.reasoners == ["thinker"]
    assert await household.asked("thinker") == 3
    assert await household.cloud.asked() == 0


async def test_the_chain_carries_on_as_its_targets_go_away_and_local_only_never_leaves_the_house(
    household: Household,
) -> None:
    await household.lose_the_spark()
    # At once: nobody has been told that it is gone.
    told = await household.over_grpc(effort=8)
    assert told.reasoners == ["thinker", "reasoner"]
    assert any("thinker" in line and line.endswith("; trying reasoner") for line in told.lines)
    assert "in the role of phi4-14b" in told.text
    text, mark, headers = await household.over_http_stream(model="rung/8")
    _check_headers(headers, mark, requested="rung/8")
    assert mark["reasoned_by"] == ["reasoner"]
    assert "in the role of phi4-14b" in text
    assert await household.cloud.asked() == 0

    switch = [event.payload async for event in household.sdk.switch_profile("gaming")]
    assert isinstance(switch[-1], ProfileDone)
    assert (await household.sdk.get_deployment("reasoner")).residency is Residency.STOPPED
    # Nobody of ours is left: the orchestrator says so, and the cloud hears nothing of it.
    told = await household.over_grpc(_LOCAL_ONLY, effort=8)
    assert told.reasoners in ([], ["thinker"])
    assert any("no reasoner answered" in line for line in told.lines)
    assert "No reasoner can answer now" in told.text
    local_only = {"X-Rung-Local-Only": "true"}
    text, mark, headers = await household.over_http(model="rung/8", extra_headers=local_only)
    _check_headers(headers, mark, requested="rung/8")
    assert "reasoned_by" not in mark
    assert "No reasoner can answer now" in text
    await _spark_given_up(household)
    with pytest.raises(NoTargetError, match=re.escape(_REFUSED)):
        await household.over_grpc(_LOCAL_ONLY, model="rung/reasoning")
    with pytest.raises(openai.InternalServerError, match=re.escape(_REFUSED)) as refused:
        await household.over_http(model="rung/reasoning", extra_headers=local_only)
    assert refused.value.status_code == 503
    assert await household.cloud.asked() == 0

    told = await household.over_grpc(effort=8)
    assert told.reasoners == ["deepseek/reasoner"]
    assert "a simulated deepseek in the role of deepseek-reasoner" in told.text
    assert told.served == Served("", "orchestrator", "workstation", "nemotron-8b")
    assert any(re.fullmatch(r"reason: deepseek/reasoner cost \$0\.000\d{3}", line) for line in told.lines)
    text, mark, headers = await household.over_http_stream(model="rung/8")
    _check_headers(headers, mark, requested="rung/8")
    assert mark["reasoned_by"] == ["deepseek/reasoner"]
    # Asked for by its chain, the cloud answers itself, and says so.
    text, mark, headers = await household.over_http(model="rung/reasoning")
    assert (mark["target"], mark["model"]) == ("deepseek/reasoner", "deepseek-reasoner")
    assert (headers["x-rung-target"], headers["x-rung-model"]) == ("deepseek/reasoner", "deepseek-reasoner")
    assert (headers["x-rung-requested"], headers["x-rung-node"]) == ("rung/reasoning", "")
    assert await household.cloud.asked() == 3


async def _spark_given_up(household: Household) -> None:
    """Return once the fleet counts the Spark as gone."""
    async for fleet in household.sdk.watch_fleet():
        if any(node.id == "spark" and node.state is not NodeState.READY for node in fleet.nodes):
            return
