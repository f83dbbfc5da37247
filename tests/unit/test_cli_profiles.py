"""`rung profile`: output, JSON shapes, exit codes. The client is a fake; nothing listens."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator, Sequence

import pytest
from rich.console import Console

from rung.cli import ExitCode, main
from rung.cli._session import Connection
from rung.cli.views import fleet_view, show_switch
from rung.errors import EngineStartFailedError, UnavailableError, UnknownProfileError
from rung.types import (
    FailureReason,
    FleetSnapshot,
    Profile,
    ProfileDone,
    ProfileEntry,
    ProfileEvent,
    ProfileFailed,
    ProfileList,
    ProfilePayload,
    ProfilePlan,
    ProfileStep,
    Residency,
)
from tests.fakes.client import FakeClient

AWAKE, ASLEEP, STOPPED = Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED
DEV = Profile(
    name="dev",
    description="all that is local",
    entries=(ProfileEntry("orchestrator", AWAKE), ProfileEntry("reasoner", AWAKE, 0.4)),
)
GAMING = Profile(name="gaming", entries=(ProfileEntry("reasoner", STOPPED),), hold=True)
STOP = ProfileStep("reasoner", STOPPED, "stop (frees 11.1 GiB)", 5.0)
START = ProfileStep("images", AWAKE, "start", 45.0)


def events(*payloads: ProfilePayload) -> list[ProfileEvent]:
    return [ProfileEvent("o", place, float(place), each) for place, each in enumerate(payloads, 1)]


class Terminal:
    """Runs the command as a shell would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.client = FakeClient()
        self.client.profiles = ProfileList(profiles=(DEV, GAMING), current="dev")
        self.out = ""
        self.err = ""
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        code = main(arguments, opening=self._open)
        self.out, self.err = self._capsys.readouterr()
        return code

    def _open(self, _: Connection) -> FakeClient:
        return self.client


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    monkeypatch.setenv("COLUMNS", "160")
    return Terminal(capsys)


def test_the_list_says_which_is_current(rung: Terminal) -> None:
    assert rung("profile", "list") == ExitCode.OK
    head, dev, gaming = rung.out.splitlines()
    assert head.split() == ["PROFILE", "CURRENT", "AWAKE", "ASLEEP", "STOPPED", "HOLDS", "DESCRIPTION"]
    assert dev.split() == [
        *("dev", "yes", "orchestrator,", "reasoner", "all", "that", "is", "local"),
    ]
    assert gaming.split() == ["gaming", "reasoner", "yes"]

    assert rung("profile", "list", "--json") == ExitCode.OK
    found = json.loads(rung.out)
    assert found["current"] == "dev"
    assert found["profiles"][1]["hold"] is True


@pytest.mark.parametrize(
    ("listed", "said"),
    [
        (ProfileList(profiles=(DEV,)), "No profile is current: none was applied yet"),
        (ProfileList(profiles=(DEV,), detail="it was cut short"), "No profile is current: it was cut short"),
        (ProfileList(profiles=(DEV,), switching_to="dev"), "switching"),
        (ProfileList(profiles=()), "No profiles. Add some to rung.yaml."),
    ],
)
def test_the_list_says_why_none_is_current(rung: Terminal, listed: ProfileList, said: str) -> None:
    rung.client.profiles = listed
    assert rung("profile", "list") == ExitCode.OK
    assert said in rung.out


def test_show(rung: Terminal) -> None:
    assert rung("profile", "show", "dev") == ExitCode.OK
    lines = rung.out.splitlines()
    assert lines[0] == "dev  current  all that is local"
    assert lines[2].split() == ["orchestrator", "awake", "its", "own"]
    assert lines[3].split() == ["reasoner", "awake", "40%"]
    assert rung("profile", "show", "gaming") == ExitCode.OK
    assert "not woken by requests" in rung.out
    assert rung("profile", "show", "gamin") == ExitCode.NOT_FOUND
    assert "`rung profile list` shows them" in rung.err


def test_a_dry_run_tells_the_steps(rung: Terminal) -> None:
    rung.client.switch = events(ProfilePlan((STOP, START)))
    assert rung("profile", "switch", "creative", "--dry-run") == ExitCode.OK
    assert rung.client.asked == [("switch_profile", ("creative", True))]
    assert rung.out.splitlines() == [
        "creative: 2 steps",
        "  1. reasoner to stopped: stop (frees 11.1 GiB), about 5.0 s",
        "  2. images to awake: start, about 45.0 s",
    ]
    rung.client.switch = events(ProfilePlan(()))
    assert rung("profile", "switch", "creative", "--dry-run") == ExitCode.OK
    assert rung.out.splitlines() == ["creative: nothing to do, all is as it wants it"]


def test_a_switch_is_followed_in_lines(rung: Terminal) -> None:
    rung.client.switch = events(
        ProfilePlan((STOP,)),
        STOP,
        ProfileStep("reasoner", STOPPED, "stopping (3 s)", 2.0),
        ProfileStep("reasoner", STOPPED, "stopping (4 s)", 1.0),
        ProfileStep("reasoner", STOPPED, "stopped, 11.1 GiB freed", None, True),
        ProfileDone("gaming"),
    )
    assert rung("profile", "switch", "gaming") == ExitCode.OK
    assert rung.out.splitlines() == [
        "gaming: 1 step",
        "  1. reasoner to stopped: stop (frees 11.1 GiB), about 5.0 s",
        "reasoner to stopped: stop (frees 11.1 GiB)",
        "reasoner to stopped: stopping",
        "reasoner to stopped: stopped, 11.1 GiB freed, done",
        "gaming is current after 6.0 s",
    ]


def test_one_that_fails_ends_with_what_is_back(rung: Terminal) -> None:
    detail = "the switch to creative failed: images to awake: exit code 1; dev is back"
    rung.client.switch = events(
        ProfilePlan((STOP, START)),
        ProfilePlan((ProfileStep("reasoner", AWAKE, "start"),), going_back=True),
        ProfileFailed(FailureReason.ENGINE_START_FAILED, detail, "dev"),
    )
    assert rung("profile", "switch", "creative") == ExitCode.FAILED
    assert "a step failed; going back: 1 step" in rung.out
    assert f"error: {detail}" in rung.err


def test_each_event_is_a_line_of_json_if_so_wished(rung: Terminal) -> None:
    rung.client.switch = events(ProfilePlan((STOP,)), STOP, ProfileDone("gaming"))
    assert rung("profile", "switch", "gaming", "--json") == ExitCode.OK
    found = [json.loads(line)["payload"] for line in rung.out.splitlines()]
    assert [each["event"] for each in found] == ["plan", "step", "done"]
    assert found[1]["residency"] == "stopped"


def test_a_profile_that_is_not_there(rung: Terminal) -> None:
    rung.client.error = UnknownProfileError("there is no profile 'x'; profiles are: dev", profile="x")
    assert rung("profile", "switch", "x") == ExitCode.NOT_FOUND


async def stream(payloads: Sequence[ProfilePayload]) -> AsyncIterator[ProfileEvent]:
    for event in events(*payloads):
        yield event


async def test_on_a_terminal_all_steps_stay_in_sight() -> None:
    file = io.StringIO()
    console = Console(file=file, width=100, force_terminal=True, color_system=None)
    payloads = (
        ProfilePlan((STOP, START)),
        ProfileStep("reasoner", STOPPED, "stopped, 11.1 GiB freed", None, True),
        ProfileStep("images", AWAKE, "loading \x1b[2Jweights", 12.0),
        ProfileStep("images", AWAKE, "awake, holds 19.0 GiB", None, True),
        ProfileDone("creative"),
    )
    await show_switch(stream(payloads), console=console, profile="creative")
    shown = file.getvalue()
    last = shown.rsplit("creative is current after 5.0 s", 1)[1]
    assert "✓ reasoner stopped stopped, 11.1 GiB freed" in last
    assert "✓ images   awake   awake, holds 19.0 GiB" in last
    assert "12 s left" in shown
    assert "\x1b[2Jweights" not in shown


async def test_a_stream_that_fails_or_breaks_is_an_error() -> None:
    console = Console(file=io.StringIO(), width=100, force_terminal=True)
    failed = ProfileFailed(FailureReason.ENGINE_START_FAILED, "it did not start; dev is back", "dev")
    with pytest.raises(EngineStartFailedError, match="dev is back"):
        await show_switch(stream([ProfilePlan((START,)), failed]), console=console, profile="x")
    with pytest.raises(UnavailableError, match="ended before its last event"):
        await show_switch(stream([ProfilePlan((START,))]), console=console, profile="x")


def test_the_status_of_the_fleet_names_the_profile() -> None:
    console = Console(file=io.StringIO(), width=100)
    console.print(fleet_view(FleetSnapshot(profile="creative"), now_s=0.0))
    assert isinstance(console.file, io.StringIO)
    assert "profile creative" in console.file.getvalue()
