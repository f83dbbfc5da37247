"""Images and a reasoner that cannot fit together on one card, and how much is disturbed for each image."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import aclosing
from typing import Any, Self

import aiohttp
from msgspec import Struct
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
    vram_bar,
    vram_legend,
    vram_shares,
    wait_words,
)
from rung.errors import UnavailableError
from rung.types import Deployment, FleetSnapshot, PhaseProgress, Priority, ReclaimPlan, Residency

_GPU = f"{WORKSTATION}/0"
_BAR_WIDTH = 48
_LABEL_WIDTH = 9
_FLEET_TIMEOUT_S = 30.0
_IMAGE_TIMEOUT_S = 30.0
_POLL_S = 0.05
#: Why it waits is told if that lasts.
_WORTH_TELLING_S = 0.2


class Tier(Struct, frozen=True):
    """A kind of image: the checkpoint that paints it, and the memory that this takes."""

    name: str
    vram_bytes: int

    @property
    def checkpoint(self) -> str:
        """As ComfyUI knows it."""
        return f"{self.name}.safetensors"


LIGHTNING = Tier("lightning", 6 << 30)
QUALITY = Tier("quality", 12 << 30)
ULTRA = Tier("ultra", 20 << 30)


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
            f"{COMFYUI} paints images of three sizes, each under a lease of memory. Its grade says who is "
            f"disturbed: quick, nobody; standard, {REASONER}, which may sleep; full, caches too, and "
            f"{ORCHESTRATOR}, which is pinned, and can lose its KV cache at most."
        )
        await _show_card(screen, client, "before")
        await _paint(screen, client, QUALITY)
        await _ask_the_reasoner(screen, stage, client)
        await _paint(screen, client, LIGHTNING)
        at_its_least = await _paint(screen, client, ULTRA)
        if orchestrator.spec.shrinkable:
            await _follow_the_orchestrator(screen, client, orchestrator, at_its_least)
        else:
            screen.say(f"{ORCHESTRATOR} is real this time: it holds nothing of the simulated card.")


async def _paint(screen: Screen, client: AsyncClient, tier: Tier) -> Deployment:
    """Have an image painted: wait for the memory, send the prompt, give the memory back.

    Returns what the orchestrator was just before that.
    """
    screen.show("")
    size = format_bytes(tier.vram_bytes)
    screen.show(Text(f"An image with {tier.checkpoint}: a lease of {size} for {COMFYUI}", style="bold"))
    waiting = Waiting(screen, time.monotonic)
    leased = client.lease(
        _GPU,
        tier.vram_bytes,
        deployment_id=COMFYUI,
        holder=f"{tier.name} image",
        priority=Priority.USER,
        on_wait=waiting.hear,
    )
    async with leased as holding:
        grade = holding.lease.grade.value
        waiting.granted(grade)
        screen.note(f"room for {tier.name}, {size}", f"{format_duration(waiting.elapsed_s)}, grade {grade}")
        if waiting.disturbs:
            # A grant is of what was measured after the last step.
            await _show_card(screen, client, "room made", time_s=0.0)
        began_s = time.monotonic()
        found = await client.get_deployment(COMFYUI)
        assert found.endpoint is not None  # it is awake
        await _generate(found.endpoint.base_url, tier.checkpoint)
        took = format_duration(time.monotonic() - began_s)
        await _show_card(screen, client, f"painted\nin {took}")
        return await client.get_deployment(ORCHESTRATOR)


class Waiting:
    """Says what is heard while a lease is waited for, and when: plans, reasons, and each step at its end."""

    def __init__(self, screen: Screen, clock: Callable[[], float]) -> None:
        self._screen = screen
        self._clock = clock
        self._start_s = clock()
        self._heard: dict[str, float] = {}
        self._held_back = ""
        self.disturbs = False

    @property
    def elapsed_s(self) -> float:
        """Since it was asked for."""
        return self._clock() - self._start_s

    def hear(self, news: PhaseProgress | ReclaimPlan) -> None:
        """Say it, unless it was said before."""
        if isinstance(news, ReclaimPlan):
            self._flush()
            self.disturbs = True
            self._say(self.elapsed_s, wait_words(news))
        elif news.detail not in self._heard:
            doing, _, outcome = news.detail.partition(": ")
            took = ""
            if outcome and doing in self._heard:
                took = f" in {format_duration(self.elapsed_s - self._heard[doing])}"
                self._held_back = "" if self._held_back == doing else self._held_back
            self._flush()
            self._heard[news.detail] = self.elapsed_s
            if outcome:
                self._say(self.elapsed_s, f"{news.detail}{took}")
            else:
                # Its end, if that is next, says it too.
                self._held_back = news.detail

    def granted(self, grade: str) -> None:
        """Say that it is had."""
        self._flush()
        nobody = "" if self.disturbs else ", nobody was disturbed"
        self._say(self.elapsed_s, Text.assemble("granted, grade ", (grade.upper(), "bold green"), nobody))

    def _flush(self) -> None:
        since_s = self._heard.get(self._held_back, self.elapsed_s)
        if self.elapsed_s - since_s > _WORTH_TELLING_S:
            self._say(since_s, self._held_back)
        self._held_back = ""

    def _say(self, at_s: float, words: str | Text) -> None:
        _show_labelled(self._screen, format_duration(at_s), words)


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


async def _generate(base_url: str, checkpoint: str) -> None:
    """Send ComfyUI a prompt, and wait until the image is there. Raises UnavailableError, TimeoutError."""
    try:
        # Nothing of the environment: a proxy there is for the world outside.
        async with (
            asyncio.timeout(_IMAGE_TIMEOUT_S),
            aiohttp.ClientSession(base_url, trust_env=False) as http,
        ):
            async with http.post("/prompt", json={"prompt": _workflow(checkpoint)}) as response:
                response.raise_for_status()
                prompt_id = (await response.json())["prompt_id"]
            history: dict[str, Any] = {}
            while prompt_id not in history:
                await asyncio.sleep(_POLL_S)
                async with http.get(f"/history/{prompt_id}") as response:
                    response.raise_for_status()
                    history = await response.json()
    except aiohttp.ClientError as error:
        raise UnavailableError(f"{COMFYUI}: {error}", failure_reason="") from error
    status = history[prompt_id]["status"]
    if not status["completed"]:
        raise UnavailableError(f"{COMFYUI} has not painted: {status}", failure_reason="")


def _workflow(checkpoint: str) -> dict[str, Any]:
    """ComfyUI's graph of one picture."""
    sampler = {
        "seed": 1,
        "steps": 4,
        "cfg": 7.0,
        "sampler_name": "euler",
        "scheduler": "normal",
        "denoise": 1.0,
    }
    links = {"model": ["4", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}
    size = {"width": 1024, "height": 1024, "batch_size": 1}
    return {
        "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": checkpoint}},
        "5": {"class_type": "EmptyLatentImage", "inputs": size},
        "6": {
            "class_type": "CLIPTextEncode",
            "inputs": {"text": "a ladder against the sky", "clip": ["4", 1]},
        },
        "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "", "clip": ["4", 1]}},
        "3": {"class_type": "KSampler", "inputs": sampler | links},
        "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
        "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0], "filename_prefix": "demo"}},
    }
