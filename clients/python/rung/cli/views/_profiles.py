"""Profiles, and switches between them."""

from __future__ import annotations

from collections.abc import AsyncIterable

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from rung._failure import error_of_failure
from rung.cli.views._fleet import plain_table
from rung.cli.views._words import format_duration, format_left, printable, without_time
from rung.errors import UnavailableError
from rung.types import (
    Profile,
    ProfileDone,
    ProfileEvent,
    ProfileFailed,
    ProfileList,
    ProfilePlan,
    ProfileStep,
    Residency,
)


def profiles_view(found: ProfileList) -> RenderableType:
    """All profiles and which is current, or a sentence when there are none."""
    if not found.profiles:
        return Text("No profiles. Add some to rung.yaml.", style="dim")
    table = plain_table("PROFILE", "CURRENT", "AWAKE", "ASLEEP", "STOPPED", "HOLDS", "DESCRIPTION")
    for profile in found.profiles:
        current = ""
        if profile.name == found.current:
            current = "yes"
        elif profile.name == found.switching_to:
            current = "switching"
        table.add_row(
            Text(profile.name, style="bold"),
            Text(current, style="green" if current == "yes" else "yellow"),
            *(_names(profile, each) for each in (Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED)),
            "yes" if profile.hold else "",
            Text(printable(profile.description)),
        )
    if found.current or found.switching_to:
        return Group(table, Text(printable(found.detail), "yellow")) if found.detail else table
    why = f": {printable(found.detail)}" if found.detail else ": none was applied yet"
    return Group(table, Text(f"No profile is current{why}", "yellow"))


def print_profile(console: Console, profile: Profile, *, current: bool) -> None:
    """What a profile wants."""
    head = Text(profile.name, style="bold")
    if current:
        head.append("  current", style="green")
    if profile.description:
        head.append(f"  {printable(profile.description)}", style="dim")
    console.print(head)
    table = plain_table("DEPLOYMENT", "RESIDENCY", "SHARE OF THE GPU", right=("SHARE OF THE GPU",))
    for entry in profile.entries:
        share = f"{entry.gpu_memory_utilization:.0%}" if entry.gpu_memory_utilization else "its own"
        down = entry.residency is not Residency.AWAKE
        table.add_row(Text(entry.deployment_id), entry.residency.value, "-" if down else share)
    console.print(table)
    if profile.hold:
        console.print(Text("While it is current, what is asleep or stopped is not woken by requests."))


def print_switch_plan(console: Console, plan: ProfilePlan, *, profile: str) -> None:
    """What a switch would do."""
    if not plan.steps:
        console.print(Text(f"{profile}: nothing to do, all is as it wants it"))
        return
    console.print(Text(f"{profile}: {_count(len(plan.steps))}"))
    for place, step in enumerate(plan.steps, 1):
        took = f", about {format_duration(step.expected_s)}" if step.expected_s is not None else ""
        console.print(Text(f"  {place}. {_title(step)}: {printable(step.detail)}{took}"))


async def show_switch(events: AsyncIterable[ProfileEvent], *, console: Console, profile: str) -> None:
    """Follow a switch to its end: all steps on a terminal, a line per news elsewhere.

    Raises:
        RungError: the switch failed, by its reason; or the stream did.
    """
    display = _LiveDisplay(console) if console.is_terminal else _LineDisplay(console)
    with display:
        async for event in events:
            match event.payload:
                case ProfilePlan() as plan:
                    display.plan(plan, profile)
                case ProfileStep() as step:
                    display.step(step)
                case ProfileDone():
                    display.end(f"{profile} is current after {format_duration(event.elapsed_s)}")
                    return
                case ProfileFailed() as failed:
                    raise error_of_failure(failed)
    raise UnavailableError(f"the stream of the switch to {profile} ended before its last event")


class _LineDisplay:
    """A line whenever there is something new."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._last = ""

    def __enter__(self) -> _LineDisplay:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def plan(self, plan: ProfilePlan, profile: str) -> None:
        if plan.going_back:
            self._console.print(Text(f"a step failed; going back: {_count(len(plan.steps))}"))
        else:
            print_switch_plan(self._console, plan, profile=profile)

    def step(self, step: ProfileStep) -> None:
        words = f"{_title(step)}: {printable(without_time(step.detail))}"
        words += ", done" if step.done else ""
        if words != self._last:
            self._last = words
            self._console.print(Text(words))

    def end(self, words: str) -> None:
        self._console.print(Text(words))


class _LiveDisplay:
    """All steps of the plan, each with how far it is."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, transient=False, refresh_per_second=8)
        self._head = ""
        self._steps: dict[tuple[str, Residency], ProfileStep] = {}
        self._now: tuple[str, Residency] | None = None
        self._ok, self._next = ("ok", "-") if console.options.ascii_only else ("✓", "·")

    def __enter__(self) -> _LiveDisplay:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        # A spinner that stays behind says that something goes on.
        self._now = None
        self._show()
        self._live.stop()

    def plan(self, plan: ProfilePlan, profile: str) -> None:
        if plan.going_back:
            self._console.print(self._rendered())
        self._head = "a step failed; going back" if plan.going_back else f"switching to {profile}"
        self._steps = {(step.deployment_id, step.residency): step for step in plan.steps}
        self._now = None
        self._show()

    def step(self, step: ProfileStep) -> None:
        key = (step.deployment_id, step.residency)
        self._steps[key] = step
        self._now = None if step.done else key
        self._show()

    def end(self, words: str) -> None:
        self._head = words
        self._now = None
        self._show()

    def _show(self) -> None:
        self._live.update(self._rendered(), refresh=True)

    def _rendered(self) -> RenderableType:
        table = Table.grid(padding=(0, 1))
        for key, step in self._steps.items():
            mark: RenderableType = Text(self._next, "dim")
            if step.done:
                mark = Text(self._ok, "green")
            elif key == self._now:
                mark = Spinner("line")
            words = printable(step.detail)
            if key == self._now and step.expected_s is not None:
                words += f", {format_left(step.expected_s)}"
            table.add_row(mark, Text(step.deployment_id, "bold"), Text(step.residency.value), Text(words))
        return Group(Text(self._head), table)


def _title(step: ProfileStep) -> str:
    return f"{printable(step.deployment_id)} to {step.residency.value}"


def _names(profile: Profile, residency: Residency) -> Text:
    names = (entry.deployment_id for entry in profile.entries if entry.residency is residency)
    return Text(printable(", ".join(names)))


def _count(steps: int) -> str:
    return f"{steps} step{'' if steps == 1 else 's'}"
