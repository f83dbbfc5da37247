"""The effort ladder, seen at work: who answers, who reasons, and who does when somebody goes away."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from contextlib import aclosing

from rich.console import Console

from controlplane.demo._ladder_layout import CLOUD_PROVIDER, GAMING, HOME
from controlplane.demo._layout import MOST_TOKENS, SPARK, THINKER
from controlplane.demo._screen import Screen
from controlplane.demo._stage import Stage
from rung import AsyncClient, Policy
from rung.cli.views import event_line, format_duration, print_answer, print_route, show_switch
from rung.types import (
    Deployment,
    FleetSnapshot,
    JobEvent,
    NodeState,
    Phase,
    PhaseProgress,
    Priority,
    Residency,
)

_QUESTION = "Prove that there are infinitely many primes."
_LITTLE, _MUCH = 3, 8
_FLEET_TIMEOUT_S = 30.0


async def show_ladder(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    """The acts of the ladder. Raises RungError, or TimeoutError, if one of them fails."""
    with screen.act("The effort ladder: one question, two efforts"):
        await _explain(screen, client, _LITTLE)
        await _ask(screen, client, _LITTLE, max_tokens=stage.layout.most_tokens)
        screen.show("")
        await _explain(screen, client, _MUCH)
        took_s = await _ask(screen, client, _MUCH)
        screen.note(f"effort {_MUCH}", format_duration(took_s))
    with screen.act("The Spark goes away, and the chain carries on"):
        await _lose_the_spark(screen, stage, client)
    with screen.act("Nobody of ours can reason: may it leave the house?"):
        await _switch(screen, client, GAMING)
        with screen.console.status("waiting until the Spark is given up"):
            await _until(client, lambda fleet: _state_of(fleet, SPARK) is not NodeState.READY)
        await _ask(screen, client, _MUCH, local_only=True)
        screen.show("")
        screen.say(f"Without --local-only it may. {CLOUD_PROVIDER} is simulated; its prices are examples.")
        took_s = await _ask(screen, client, _MUCH)
        screen.note(f"effort {_MUCH}, with nobody of ours to reason", format_duration(took_s))
    with screen.act("All come back"):
        await _regain_the_spark(screen, stage, client)
        await _switch(screen, client, HOME)


def _command(verb: str, effort: int, *, local_only: bool = False) -> str:
    only = " --local-only" if local_only else ""
    return f"rung {verb} --effort {effort}{only} {shlex.quote(_QUESTION)}"


async def _explain(screen: Screen, client: AsyncClient, effort: int) -> None:
    screen.command(_command("route explain", effort))
    policy = Policy(priority=Priority.USER)
    print_route(screen.console, await client.explain_route(_QUESTION, effort=effort, policy=policy))
    screen.show("")


async def _ask(
    screen: Screen,
    client: AsyncClient,
    effort: int,
    *,
    local_only: bool = False,
    max_tokens: int = MOST_TOKENS,
    on_reasoning: Callable[[], Awaitable[None]] | None = None,
) -> float:
    """Ask, with all that happens meanwhile; returns how long it took, in seconds.

    Args:
        screen: for the viewer.
        client: of the control plane.
        effort: 1 to 10.
        local_only: whether it may leave hardware of ours.
        max_tokens: of the answer; the default has room for a call of a tool.
        on_reasoning: called once, as soon as somebody reasons.
    """
    screen.command(_command("chat", effort, local_only=local_only))
    policy = Policy(local_only=local_only, priority=Priority.USER)
    stream = client.chat(_QUESTION, effort=effort, max_tokens=max_tokens, policy=policy)
    async with stream:
        events = _told(screen, stream, on_reasoning)
        answer = await print_answer(events, out=screen.console, err=Console(quiet=True))
    screen.say(answer.summary())
    return answer.took_s


async def _told(
    screen: Screen, events: AsyncIterator[JobEvent], on_reasoning: Callable[[], Awaitable[None]] | None
) -> AsyncGenerator[JobEvent, None]:
    """The same events; those of progress are shown as the job's log has them, and stay to be read."""
    async for event in events:
        yield event
        if not isinstance(event.payload, PhaseProgress) or not event.sequence:
            continue
        screen.show(event_line(event))
        if on_reasoning is not None and event.payload.phase is Phase.REASONING:
            await on_reasoning()
            on_reasoning = None


async def _lose_the_spark(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    """End all that runs there without a warning, as when its plug is pulled, while it reasons."""
    lost = False

    async def lose() -> None:
        nonlocal lost
        lost = True
        found = await client.get_deployment(THINKER)
        agent_pid = await stage.kill_agent(SPARK)
        assert found.pid is not None  # it is awake
        os.kill(found.pid, signal.SIGKILL)
        screen.command(f"kill -9 {agent_pid} {found.pid}        # the Spark's agent, and the engine on it")

    took_s = await _ask(screen, client, _MUCH, on_reasoning=lose)
    screen.note(f"effort {_MUCH}, the Spark lost meanwhile", format_duration(took_s))
    if not lost:
        screen.say("This time the orchestrator did not call for it. It goes away all the same.")
        await lose()


async def _regain_the_spark(screen: Screen, stage: Stage, client: AsyncClient) -> None:
    pid = await stage.start_agent(SPARK)

    def known(fleet: FleetSnapshot) -> bool:
        return _thinker(fleet).residency is not Residency.UNKNOWN

    fleet = await _until(client, known)
    thinker = _thinker(fleet)
    why = f" ({thinker.detail})" if thinker.detail else ""
    screen.say(
        f"The Spark's agent runs again, as process {pid}: {SPARK} is {_state_of(fleet, SPARK)}, and "
        f"{THINKER} is {thinker.residency}{why}. Whoever asks for it starts it."
    )


async def _switch(screen: Screen, client: AsyncClient, profile: str) -> None:
    screen.command(f"rung profile switch {profile}")
    async with aclosing(client.switch_profile(profile)) as events:
        await show_switch(events, console=screen.console, profile=profile)


async def _until(client: AsyncClient, holds: Callable[[FleetSnapshot], bool]) -> FleetSnapshot:
    """The first snapshot of the fleet for which something holds. Raises TimeoutError."""
    async with asyncio.timeout(_FLEET_TIMEOUT_S), aclosing(client.watch_fleet()) as snapshots:
        async for snapshot in snapshots:
            if holds(snapshot):
                return snapshot
    raise AssertionError("a watch of the fleet does not end")


def _state_of(fleet: FleetSnapshot, node_id: str) -> NodeState:
    return next(node.state for node in fleet.nodes if node.id == node_id)


def _thinker(fleet: FleetSnapshot) -> Deployment:
    return next(each for each in fleet.deployments if each.spec.id == THINKER)
