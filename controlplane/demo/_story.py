"""What the demo shows, act by act. Everything goes through the public SDK and the HTTP API."""

from __future__ import annotations

import asyncio
import json
import shlex
import time
import urllib.request
from collections.abc import Iterable
from contextlib import aclosing
from typing import Any

from rich.text import Text

from controlplane.demo._grades_act import Starting, show_grades
from controlplane.demo._ladder_act import show_ladder
from controlplane.demo._layout import (
    MOST_TOKENS,
    MOST_TOKENS_OF_REAL,
    ORCHESTRATOR,
    SPEED,
    THINKER,
    DemoOptions,
)
from controlplane.demo._screen import Screen
from controlplane.demo._stage import Stage
from controlplane.local import wait_for_nodes
from rung import AsyncClient, Policy
from rung.cli.views import (
    Answer,
    event_line,
    fleet_view,
    format_duration,
    jobs_table,
    print_answer,
    show_operation,
)
from rung.errors import UnavailableError
from rung.types import Deployment, FleetSnapshot, JobEvent, Priority, Residency, TokenDelta

_NODES_TIMEOUT_S = 30.0
_HTTP_TIMEOUT_S = 60.0
_SHOWN_REPLY = 160


def open_story(screen: Screen, options: DemoOptions) -> None:
    """Say what is real."""
    engine = "the engines on them: their words are made up on the spot, their pictures are of one colour"
    if options.gguf is not None:
        engine = (
            f"all engines but one: the orchestrator is a real llama.cpp with {options.gguf.name}, "
            "the others' words are made up on the spot, their pictures are of one colour"
        )
    screen.opening(
        "the control plane, two node agents, gRPC, HTTP and the job log. They are the programs that run a "
        "real fleet, as separate processes on this computer, on free loopback ports.",
        "two machines (a workstation with an RTX 5090 of 32 GB, a DGX Spark with 128 GB of shared memory) "
        f"and {engine}. Simulated engines work {SPEED:g} times as fast as real ones, and load in seconds. "
        "And a cloud API, on loopback as well.",
    )


async def tell(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    """All acts in turn. Raises RungError, or TimeoutError, if one of them fails."""
    with screen.act("The fleet comes up"):
        await _meet_the_fleet(screen, stage, client)
    with screen.act("An engine starts on the workstation"):
        await _start_orchestrator(screen, stage, client)
    with screen.act("A chat, token by token"):
        await _chat(
            screen,
            client,
            stage.layout.orchestrator_model,
            "What in this demo is real?",
            "chat",
            max_tokens=stage.layout.most_tokens,
        )
    for found in _answering_engines(await client.list_deployments()):
        with screen.act("An engine was found running on this computer"):
            await _use_found(screen, client, found)
    async with Starting(client) as starting:
        with screen.act("A model that is not loaded: it is started on demand"):
            screen.say(f"{THINKER} on the Spark is stopped. Asking for its model is all it takes.")
            job = await _chat(
                screen,
                client,
                stage.layout.thinker_model,
                "Why take the larger model?",
                "chat that starts a model",
            )
        await show_grades(screen, stage, client, starting)
    with screen.act("The same through the OpenAI API"):
        await _call_http(screen, stage)
    await show_ladder(screen, stage, client)
    with screen.act("What was written down"):
        await _show_jobs(screen, client, job.job_id)
    with screen.act("The fleet now"):
        screen.command("rung status")
        await _show_fleet(screen, client)


async def _meet_the_fleet(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    with screen.console.status("waiting for both agents to answer"):
        async with asyncio.timeout(_NODES_TIMEOUT_S):
            snapshot = await wait_for_nodes(client)
    for child in stage.children:
        screen.show(Text.assemble(("✓ ", "green"), f"{child.name} runs as process {child.pid}"))
    screen.note(
        f"{len(stage.children)} processes ready after", format_duration(time.monotonic() - stage.started_s)
    )
    screen.command("rung status")
    _show_snapshot(screen, snapshot)


async def _start_orchestrator(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    screen.say(f"What starts is {stage.layout.orchestrator_server}, with {stage.layout.orchestrator_model}.")
    screen.command(f"rung start {ORCHESTRATOR}")
    started_s = time.monotonic()
    async with aclosing(client.start_deployment(ORCHESTRATOR)) as events:
        await show_operation(events, console=screen.console, title=ORCHESTRATOR)
    screen.note(f"{ORCHESTRATOR} started in", format_duration(time.monotonic() - started_s))


async def _chat(
    screen: Screen,
    client: AsyncClient,
    model: str,
    question: str,
    name: str,
    *,
    max_tokens: int = MOST_TOKENS,
) -> Answer:
    screen.command(f"rung chat --model {shlex.quote(model)} {shlex.quote(question)}")
    stream = client.chat(
        question, model=model, max_tokens=max_tokens, policy=Policy(local_only=True, priority=Priority.USER)
    )
    async with stream:
        answer = await print_answer(stream, out=screen.console, err=screen.console)
    screen.say(answer.summary())
    first = format_duration(answer.first_token_s)
    rate = "" if answer.tokens_per_s is None else f", then {answer.tokens_per_s:.0f} tok/s"
    screen.note(f"{name}: first token after", f"{first}{rate}")
    return answer


def _answering_engines(deployments: Iterable[Deployment]) -> Iterable[Deployment]:
    """One chat engine that somebody else runs on this computer, if there is one."""
    usable = (
        each
        for each in deployments
        if each.adopted and each.residency is Residency.AWAKE and "chat" in each.spec.capabilities
    )
    first = next(usable, None)
    return () if first is None else (first,)


async def _use_found(screen: Screen, client: AsyncClient, found: Deployment) -> None:
    screen.say(f"{found.spec.id} serves {found.spec.model}. Somebody else runs it: it is used as it is.")
    await _chat(
        screen,
        client,
        found.spec.id,
        "Say hello in one sentence.",
        "chat with the engine found here",
        max_tokens=MOST_TOKENS_OF_REAL,
    )


async def _call_http(screen: Screen, stage: Stage) -> None:
    body = {
        "model": stage.layout.orchestrator_model,
        "messages": [{"role": "user", "content": "Count to 5"}],
        "max_tokens": 32,
    }
    url = f"{stage.ports.url}/v1/chat/completions"
    screen.command(f"curl {url} -H 'Content-Type: application/json' -d {shlex.quote(json.dumps(body))}")
    started_s = time.monotonic()
    reply = await asyncio.to_thread(_post, url, body)
    took_s = time.monotonic() - started_s
    content = str(reply["choices"][0]["message"].get("content") or "")
    shown = content if len(content) <= _SHOWN_REPLY else f"{content[:_SHOWN_REPLY]}…"
    screen.show(Text(shown))
    usage = reply.get("usage") or {}
    screen.say(
        f"HTTP 200 after {format_duration(took_s)}, {usage.get('completion_tokens', '?')} tokens. "
        f"Any OpenAI client works with base_url {stage.ports.url}/v1"
    )
    screen.note("the OpenAI request took", format_duration(took_s))


def _post(url: str, body: dict[str, Any]) -> Any:
    request = urllib.request.Request(  # noqa: S310 - our own loopback address
        url, data=json.dumps(body).encode(), headers={"Content-Type": "application/json"}
    )
    # A proxy in the environment is for the world outside.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_HTTP_TIMEOUT_S) as reply:
            return json.load(reply)
    except OSError as error:
        raise UnavailableError(f"the HTTP gateway: {error}", failure_reason="") from error


async def _show_jobs(screen: Screen, client: AsyncClient, job_id: str) -> None:
    screen.command("rung jobs list")
    async with aclosing(client.list_jobs()) as jobs:
        found = [job async for job in jobs]
    screen.show(jobs_table(found, now_s=time.time()))
    screen.show("")
    screen.command(f"rung jobs watch {job_id}")
    async with aclosing(client.watch_job(job_id)) as events:
        log = [event async for event in events]
    for line in fold_tokens(log):
        screen.show(line)
    screen.say("The log can be read at any time, and resumed after any of its numbers.")
    screen.note("jobs in the log", str(len(found)))


def fold_tokens(log: list[JobEvent]) -> list[Text]:
    """The lines of a log, with each run of tokens as its first one and how many more there are."""
    lines: list[Text] = []
    more = 0
    for event in log:
        is_token = isinstance(event.payload, TokenDelta)
        if is_token and more:
            more += 1
            continue
        if more > 1:
            lines.append(Text(f"{'':>19}{more - 1} more of these", style="dim"))
        more = 1 if is_token else 0
        lines.append(event_line(event))
    return lines


async def _show_fleet(screen: Screen, client: AsyncClient) -> None:
    async with aclosing(client.watch_fleet()) as snapshots:
        _show_snapshot(screen, await anext(snapshots))


def _show_snapshot(screen: Screen, snapshot: FleetSnapshot) -> None:
    console = screen.console
    screen.show(
        fleet_view(snapshot, now_s=time.time(), width=console.width, ascii_only=console.options.ascii_only)
    )
