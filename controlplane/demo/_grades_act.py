"""Images and a reasoner that cannot fit together on one card, and how much is disturbed for each image."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Self

from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from controlplane.demo._layout import COMFYUI, ORCHESTRATOR, REASONER, WORKSTATION
from controlplane.demo._screen import Screen
from controlplane.demo._stage import Stage
from rung import AsyncClient, Policy
from rung.cli.views import (
    format_bytes,
    format_duration,
    print_answer,
    residency_text,
    show_operation,
    show_phases,
    vram_bar,
    vram_legend,
    vram_shares,
)
from rung.types import Deployment, FleetSnapshot, JobEvent, Phase, PhaseProgress, Priority, Residency

_BAR_WIDTH = 48
_LABEL_WIDTH = 9
_FLEET_TIMEOUT_S = 30.0
_PROMPT = "a ladder against the evening sky"
#: Prompts differ, or ComfyUI would have the picture already.
_SEEDS = {"lightning": 1, "quality": 2, "ultra": 3}


class Starting:
    """What the act needs, on its way up while something else is shown. Leaving gives up what is not there."""

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._tasks: dict[str, asyncio.Task[float]] = {}

    async def __aenter__(self) -> Self:
        for deployment_id in (REASONER, COMFYUI):
            self._tasks[deployment_id] = asyncio.create_task(self._start(deployment_id))
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def show(self, screen: Screen) -> None:
        """Wait until all are awake, and say how long it took. Raises RungError."""
        for deployment_id, task in self._tasks.items():
            screen.command(f"rung start {deployment_id}        # meanwhile, in another terminal")
            with screen.console.status(f"waiting for {deployment_id}"):
                took = format_duration(await task)
            screen.show(Text(f"{deployment_id}: awake after {took}"))

    async def _start(self, deployment_id: str) -> float:
        began_s = time.monotonic()
        async with aclosing(self._client.start_deployment(deployment_id)) as events:
            await show_operation(events, console=Console(quiet=True), title=deployment_id)
        return time.monotonic() - began_s


async def show_grades(screen: Screen, stage: Stage, client: AsyncClient, starting: Starting) -> None:
    """The act of making room. Raises RungError, or TimeoutError, if it fails."""
    with screen.act("Images and models take turns on one card"):
        await starting.show(screen)
        orchestrator = await client.get_deployment(ORCHESTRATOR)
        screen.say(
            f"{COMFYUI} paints images of three tiers, each under a lease of memory. Its grade says who is "
            f"disturbed: quick, nobody; standard, {REASONER}, which may sleep; full, caches too, and "
            f"{ORCHESTRATOR}, which is pinned, and can lose its KV cache at most. Every phase is told as it "
            "happens, and none is silent for a second."
        )
        await _show_card(screen, client, "before")
        await _paint(screen, client, "quality")
        await _ask_the_reasoner(screen, stage, client)
        await _paint(screen, client, "lightning")
        at_its_least = await _paint(screen, client, "ultra")
        if orchestrator.spec.shrinkable:
            await _follow_the_orchestrator(screen, client, orchestrator, at_its_least)
        else:
            screen.say(f"{ORCHESTRATOR} is real this time: it holds nothing of the simulated card.")


async def _paint(screen: Screen, client: AsyncClient, tier: str) -> Deployment:
    """Have an image painted, with its phases on the screen.

    Returns what the orchestrator was meanwhile.
    """
    screen.show("")
    screen.command(f"rung image '{_PROMPT}' --tier {tier}")
    policy = Policy(local_only=True, priority=Priority.USER)
    watching = _Watching(client)
    began_s = time.monotonic()
    async with client.image(_PROMPT, tier=tier, seed=_SEEDS[tier], policy=policy) as stream:
        await show_phases(watching.over(stream), console=screen.console)
        result = await stream.result()
    took = format_duration(time.monotonic() - began_s)
    picture = result.images[0].artifact
    screen.say(
        f"{picture.content_type} of {format_bytes(picture.size_bytes)}, sha256 {picture.sha256[:12]}…, kept "
        f"at /v1/artifacts/{picture.id}"
    )
    screen.note(f"{tier} image, and the longest silence meanwhile", f"{took}, {watching.gap_words}")
    await _show_card(screen, client, f"painted\nin {took}")
    assert watching.orchestrator is not None  # each image is sampled
    return watching.orchestrator


class _Watching:
    """Looks at the orchestrator while an image is sampled, and how long nothing was said.

    Attributes:
        orchestrator: as it was when sampling began.
    """

    def __init__(self, client: AsyncClient) -> None:
        self._client = client
        self._gap_s = 0.0
        self.orchestrator: Deployment | None = None

    @property
    def gap_words(self) -> str:
        """The longest time between two events."""
        return format_duration(self._gap_s)

    async def over(self, events: AsyncIterator[JobEvent]) -> AsyncIterator[JobEvent]:
        """The same events."""
        last_s = time.monotonic()
        async for event in events:
            self._gap_s = max(self._gap_s, time.monotonic() - last_s)
            payload = event.payload
            if isinstance(payload, PhaseProgress) and payload.phase is Phase.SAMPLING:
                self.orchestrator = self.orchestrator or await self._client.get_deployment(ORCHESTRATOR)
            yield event
            last_s = time.monotonic()


async def _ask_the_reasoner(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    model = stage.layout.reasoner_model
    question = "Count to 3"
    screen.show("")
    screen.show(
        Text(f"Whoever asks for {REASONER} wakes it, and {COMFYUI} gives way in its turn", style="bold")
    )
    screen.command(f"rung chat --model {model} '{question}'")
    policy = Policy(local_only=True, priority=Priority.USER)
    async with client.chat(question, model=model, policy=policy) as stream:
        answer = await print_answer(stream, out=screen.console, err=screen.console)
    screen.say(answer.summary())
    screen.note(f"{REASONER}, woken by a chat: first token after", format_duration(answer.first_token_s))
    await _show_card(screen, client, "woken")


async def _follow_the_orchestrator(
    screen: Screen, client: AsyncClient, before: Deployment, shrunk: Deployment
) -> None:
    """Until it is as it was, which nobody has to ask for."""
    ended_s = time.monotonic()
    screen.show("")
    screen.show(Text("The image is painted, and its lease has ended", style="bold"))
    grown = _deployment(await _until(client, 0.0, ORCHESTRATOR), ORCHESTRATOR)
    words = Text.assemble(f"{ORCHESTRATOR} was ", residency_text(shrunk), " and is ", residency_text(grown))
    if grown.pid == before.pid:
        words.append(f"; it is process {grown.pid}, as it was all the time")
    _show_labelled(screen, format_duration(time.monotonic() - ended_s), words)
    await _show_card(screen, client, "after")


async def _show_card(screen: Screen, client: AsyncClient, label: str, *, time_s: float | None = None) -> None:
    """The memory of the workstation's card, as measured after a time; from now on by default."""
    snapshot = await _until(client, time.time() if time_s is None else time_s)
    status = next(node.status for node in snapshot.nodes if node.id == WORKSTATION)
    assert status is not None  # it was waited for
    gpu = status.gpus[0]
    shares = vram_shares(gpu, [each for each in snapshot.deployments if each.spec.node_id == WORKSTATION])
    ascii_only = screen.console.options.ascii_only
    bar = vram_bar(gpu, shares, width=_BAR_WIDTH, ascii_only=ascii_only)
    _show_labelled(screen, label, bar, vram_legend(shares, ascii_only=ascii_only))


def _show_labelled(screen: Screen, label: str, *lines: str | Text) -> None:
    """Lines beside a label."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=_LABEL_WIDTH, justify="right", style="dim")
    table.add_column()
    table.add_row(label, Group(*lines))
    screen.show(table)


async def _until(client: AsyncClient, time_s: float, awake: str = "") -> FleetSnapshot:
    """The fleet, with the workstation measured after a time and a deployment awake. Raises TimeoutError."""
    async with asyncio.timeout(_FLEET_TIMEOUT_S), aclosing(client.watch_fleet()) as snapshots:
        async for snapshot in snapshots:
            status = next(node.status for node in snapshot.nodes if node.id == WORKSTATION)
            if status is None or status.sample_time_s < time_s:
                continue
            if not awake or _deployment(snapshot, awake).residency is Residency.AWAKE:
                return snapshot
    raise AssertionError("a watch of the fleet does not end")


def _deployment(snapshot: FleetSnapshot, deployment_id: str) -> Deployment:
    return next(each for each in snapshot.deployments if each.spec.id == deployment_id)
