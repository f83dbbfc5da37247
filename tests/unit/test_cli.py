"""The `rung` command: output, JSON shapes, exit codes. The client is a fake; nothing listens."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import msgspec
import pytest
import typer

from rung.cli import ExitCode, main
from rung.cli._failures import failure_of
from rung.cli._plugins import add_plugins
from rung.cli._session import Connection
from rung.errors import (
    BY_REASON,
    ConfigError,
    EngineFailedError,
    NotAllowedError,
    NoTargetError,
    PinnedDeploymentError,
    RungError,
    UnavailableError,
    UnknownDeploymentError,
    UnknownJobError,
    UnknownModelError,
)
from rung.types import (
    ConsideredTarget,
    FailureReason,
    Infeasible,
    Job,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Lease,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecycleProgress,
    Model,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
    ReclaimAction,
    ReclaimGrade,
    ReclaimPlan,
    ReclaimStep,
    Residency,
    Routed,
    RouteExplanation,
    Served,
    TokenDelta,
    Usage,
    UsageReported,
)
from tests.fakes.client import FakeClient
from tests.fakes.fleet import a_deployment, a_fleet
from tests.fakes.pictures import a_png

JOB = Job(
    id="job-1",
    kind=JobKind.CHAT,
    state=JobState.DONE,
    model="nemotron-8b",
    create_time_s=1_750_000_000.0,
    end_time_s=1_750_000_002.5,
    served=Served("nemotron-8b", "orchestrator", "workstation"),
    usage=Usage(10, 20),
)


def log(*payloads: Any) -> list[JobEvent]:
    return [
        JobEvent("job-1", place, 1_750_000_000.0, float(place), each)
        for place, each in enumerate(payloads, 1)
    ]


class Terminal:
    """Runs the command as a shell would."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.client = FakeClient()
        self.connection = Connection()
        self.out = ""
        self.err = ""
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        code = main(arguments, opening=self._open)
        self.out, self.err = self._capsys.readouterr()
        return code

    def _open(self, connection: Connection) -> FakeClient:
        self.connection = connection
        return self.client


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Terminal:
    for name in ("RUNG_ADDRESS", "RUNG_TOKEN", "RUNG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    return Terminal(capsys)


class TestRoot:
    def test_help_documents_the_exit_codes(self, rung: Terminal) -> None:
        assert rung("--help") == ExitCode.OK
        for words in (
            "Exit codes",
            "3 the control plane cannot be",
            "130 interrupted",
            "chat",
            "serve",
            "up",
        ):
            assert words in rung.out

    @pytest.mark.parametrize(
        "command",
        [
            ("chat",),
            ("status",),
            ("models",),
            ("doctor",),
            ("deployments",),
            ("start",),
            ("stop",),
            ("sleep",),
            ("wake",),
            ("free",),
            ("jobs", "list"),
            ("jobs", "watch"),
            ("jobs", "cancel"),
            ("serve",),
            ("up",),
            ("demo",),
            ("config", "check"),
            ("config", "schema"),
            ("config", "init"),
        ],
    )
    def test_every_help_has_an_example(self, rung: Terminal, command: tuple[str, ...]) -> None:
        assert rung(*command, "--help") == ExitCode.OK
        assert f"rung {' '.join(command)}" in rung.out.split("Example", 1)[1]

    def test_version(self, rung: Terminal) -> None:
        assert rung("--version") == ExitCode.OK
        assert rung.out.startswith("rung ")

    @pytest.mark.parametrize(
        "arguments", [(), ("bogus",), ("start",), ("chat", "--effort", "11", "x"), ("jobs",)]
    )
    def test_wrong_usage(self, rung: Terminal, arguments: tuple[str, ...]) -> None:
        assert rung(*arguments) == ExitCode.USAGE

    def test_options_come_from_the_environment_too(
        self, rung: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RUNG_ADDRESS", "spark:8151")
        monkeypatch.setenv("RUNG_TOKEN", "secret")
        rung("models")
        assert rung.connection == Connection(address="spark:8151", token="secret")
        rung("--address", "box:1", "--tls-authority", "ca.pem", "models")
        assert rung.connection.address == "box:1"
        assert rung.connection.tls is not None
        assert rung.connection.tls.authority_file == "ca.pem"


class TestFailures:
    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (UnavailableError("connection refused"), ExitCode.UNREACHABLE),
            (NoTargetError("all are down"), ExitCode.FAILED),
            (EngineFailedError("500"), ExitCode.FAILED),
            (UnknownModelError("no model x"), ExitCode.NOT_FOUND),
            (NotAllowedError("not on the list"), ExitCode.REFUSED),
            (PinnedDeploymentError("pinned"), ExitCode.REFUSED),
            (ConfigError("rung.yaml:1: x"), ExitCode.FAILED),
            (RungError("oops"), ExitCode.FAILED),
        ],
    )
    def test_exit_codes(self, rung: Terminal, error: RungError, code: ExitCode) -> None:
        rung.client.error = error
        assert rung("models") == code
        assert rung.out == ""
        assert rung.err.startswith("error: ")
        assert "Traceback" not in rung.err
        assert rung.client.closed == 1

    def test_unreachable_says_where_and_what_to_do(self, rung: Terminal) -> None:
        rung.client.error = UnavailableError("connection refused")
        rung("--address", "127.0.0.1:9", "status")
        assert rung.err.splitlines()[0] == "error: cannot reach the control plane at 127.0.0.1:9"
        assert "hint: Start one on this box with `rung up`" in rung.err

    def test_unreachable_says_why_where_that_is_known(self, rung: Terminal) -> None:
        rung.client.error = UnavailableError("the control plane …", why="name not found")
        rung("--address", "box:9", "status")
        assert rung.err.splitlines() == [
            "error: cannot reach the control plane at box:9: name not found",
            "hint: Start one on this box with `rung up`, or say where it is with --address or RUNG_ADDRESS.",
        ]

    def test_a_failed_job_is_not_an_unreachable_server(self) -> None:
        lost = UnavailableError("restarted", failure_reason=FailureReason.CONTROL_PLANE_RESTARTED.value)
        assert failure_of(lost).code is ExitCode.FAILED

    def test_every_error_has_a_code(self) -> None:
        for error in BY_REASON.values():
            assert failure_of(error("words")).code in set(ExitCode) - {ExitCode.OK, ExitCode.INTERRUPTED}

    def test_debug_shows_the_traceback(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("RUNG_DEBUG", "1")
        rung.client.error = UnknownModelError("no model x")
        with pytest.raises(UnknownModelError):
            rung("models")

    def test_interrupted(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupt(connection: Connection) -> FakeClient:
            raise KeyboardInterrupt

        assert main(["models"], opening=interrupt) == ExitCode.INTERRUPTED

    def test_a_defect_is_one_line_too(self, rung: Terminal) -> None:
        def break_down(connection: Connection) -> FakeClient:
            raise ZeroDivisionError("by zero")

        assert main(["models"], opening=break_down) == ExitCode.FAILED
        assert rung("--version") == ExitCode.OK
        assert "error: unexpected ZeroDivisionError: by zero" in rung.err


class TestStatus:
    def test_shows_fleet_and_jobs(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet()]
        rung.client.jobs = [JOB]
        assert rung("status") == ExitCode.OK
        for words in ("Simulated:", "10.0 / 31.8 GiB", "orchestrator", "qwen3-32b", "job-1"):
            assert words in rung.out

    def test_json(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet()]
        rung.client.jobs = [JOB]
        assert rung("status", "--json") == ExitCode.OK
        found = json.loads(rung.out)
        assert set(found) == {"nodes", "deployments", "profile", "jobs", "alerts"}
        assert found["nodes"][1]["status"]["gpus"][0]["memory_total_bytes"] == 32_607 * 1024**2
        assert found["deployments"][0]["residency"] == "awake"
        assert found["jobs"][0]["id"] == "job-1"

    def test_no_jobs_wanted(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet()]
        assert rung("status", "--jobs", "0") == ExitCode.OK
        assert [what for what, _ in rung.client.asked] == ["watch_fleet"]

    def test_watch_as_lines(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet(), a_fleet()]
        assert rung("status", "--watch", "--json") == ExitCode.OK
        lines = rung.out.splitlines()
        assert len(lines) == 2
        assert all(json.loads(line)["nodes"] for line in lines)

    def test_watch(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet(), a_fleet()]
        assert rung("status", "--watch") == ExitCode.OK
        assert "orchestrator" in rung.out


class TestChat:
    def answer(self, rung: Terminal) -> None:
        rung.client.events = log(
            Routed(Served("", "orchestrator", "workstation", "nemotron-8b")),
            PhaseProgress(Phase.ENGINE_START, "loading weights", percent=10.0),
            TokenDelta("Because"),
            TokenDelta(" of Rayleigh."),
            UsageReported(Usage(5, 4)),
            JobDone("stop"),
        )

    def test_the_answer_alone_goes_to_stdout(self, rung: Terminal) -> None:
        self.answer(rung)
        assert rung("chat", "Why is the sky blue?", "-m", "nemotron-8b", "-e", "7", "--local-only") == 0
        assert rung.out == "Because of Rayleigh.\n"
        assert "engine start: loading weights, 10 %" in rung.err
        assert "orchestrator on workstation (nemotron-8b) · 5 tokens in, 4 out" in rung.err
        (_, asked) = rung.client.asked[0]
        assert asked["model"] == "nemotron-8b"
        assert asked["effort"] == 7
        assert asked["policy"] == Policy(local_only=True, priority=Priority.USER)
        assert [message.content for message in asked["messages"]] == ["Why is the sky blue?"]
        assert rung.client.stream is not None
        assert rung.client.stream.closed

    def test_piped_text_comes_before_the_prompt(
        self, rung: Terminal, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.answer(rung)
        monkeypatch.setattr("sys.stdin", io.StringIO("a diff\n"))
        rung("chat", "Review this", "--system", "Be brief.")
        messages = rung.client.asked[0][1]["messages"]
        assert [(each.role, each.content) for each in messages] == [
            ("system", "Be brief."),
            ("user", "a diff\n\nReview this"),
        ]

    def test_piped_text_is_the_prompt(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        self.answer(rung)
        monkeypatch.setattr("sys.stdin", io.StringIO("Why?"))
        assert rung("chat") == ExitCode.OK
        assert rung.client.asked[0][1]["messages"][0].content == "Why?"

    def test_pictures_are_shown_with_the_prompt(self, rung: Terminal, tmp_path: Path) -> None:
        self.answer(rung)
        (tmp_path / "a.png").write_bytes(a_png())
        (tmp_path / "b.jpg").write_bytes(b"\xff\xd8\xff\xe0")
        shown = ["-i", str(tmp_path / "a.png"), "--image", str(tmp_path / "b.jpg")]
        assert rung("chat", "What differs?", *shown) == ExitCode.OK
        [message] = rung.client.asked[0][1]["messages"]
        assert message.content == "What differs?"
        assert [each.content_type for each in message.images] == ["image/png", "image/jpeg"]
        assert message.images[0].data == a_png()

    def test_a_picture_that_is_none_or_comes_without_a_prompt_is_not_sent(
        self, rung: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a.png").write_bytes(b"no picture")
        assert rung("chat", "What?", "-i", str(tmp_path / "a.png")) == ExitCode.USAGE
        assert "is no picture" in rung.err
        (tmp_path / "a.png").write_bytes(a_png())
        monkeypatch.setattr("sys.stdin", None)
        assert rung("chat", "-i", str(tmp_path / "a.png")) == ExitCode.USAGE
        assert rung.client.asked == []

    def test_nothing_to_ask(self, rung: Terminal) -> None:
        assert rung("chat") == ExitCode.USAGE
        assert rung.client.asked == []

    def test_a_failed_job(self, rung: Terminal) -> None:
        rung.client.events = log(TokenDelta("Bec"), JobFailed(FailureReason.ENGINE_LOST, "engine is gone", 3))
        assert rung("chat", "Why?") == ExitCode.FAILED
        assert rung.out == "Bec\n"
        assert rung.err.startswith("error: engine is gone")

    def test_an_unknown_model(self, rung: Terminal) -> None:
        rung.client.error = UnknownModelError("there is no model x")
        assert rung("chat", "Why?", "-m", "x") == ExitCode.NOT_FOUND
        assert "hint: `rung models` lists" in rung.err


class Typed(io.StringIO):
    """A person at the keyboard."""

    def isatty(self) -> bool:
        return True


class TestConversation:
    def test_turns_are_remembered_until_new(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", Typed("Hi\nAnd then?\n/new\nAgain\n/exit\n"))
        rung.client.events = log(TokenDelta("Hello"), JobDone("stop"))
        assert rung("chat", "--system", "Be brief.") == ExitCode.OK
        said = [[message.content for message in asked["messages"]] for _, asked in rung.client.asked]
        assert said == [
            ["Be brief.", "Hi"],
            ["Be brief.", "Hi", "Hello", "And then?"],
            ["Be brief.", "Again"],
        ]
        assert rung.client.closed == 1

    def test_a_failure_ends_the_turn_only(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", Typed("Hi\nHi again\n"))
        rung.client.error = NoTargetError("nobody can answer")
        assert rung("chat") == ExitCode.OK
        assert rung.err.count("error: nobody can answer") == 2

    def test_an_unreachable_server_ends_it(self, rung: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("sys.stdin", Typed("Hi\nHi again\n"))
        rung.client.error = UnavailableError("refused")
        assert rung("chat") == ExitCode.UNREACHABLE
        assert len(rung.client.asked) == 1


class TestModels:
    def test_table_and_json(self, rung: Terminal) -> None:
        rung.client.models = (
            Model(id="nemotron-8b", deployments=("orchestrator",), ready=True, context_tokens=16384),
        )
        assert rung("models") == ExitCode.OK
        assert "nemotron-8b  yes    orchestrator   16,384" in rung.out
        assert rung("models", "--json") == ExitCode.OK
        assert json.loads(rung.out) == [
            {
                "id": "nemotron-8b",
                "deployments": ["orchestrator"],
                "ready": True,
                "context_tokens": 16384,
                "capabilities": [],
            }
        ]

    def test_none(self, rung: Terminal) -> None:
        assert rung("models") == ExitCode.OK
        assert "there are no deployments yet" in rung.out


ROUTE = RouteExplanation(
    considered=(
        ConsideredTarget(target="orchestrator", taken=True, reason="awake", expected_wait_s=0.0, place=1),
        ConsideredTarget(target="thinker", taken=False, reason="asleep on spark", place=2),
        ConsideredTarget(target="openai/large", taken=False, reason="the request is local_only"),
    ),
    target="orchestrator",
    effort=8,
    rung="hard",
    why="it asks for a proof",
    reason=(
        ConsideredTarget(
            target="spark-qwen", taken=True, reason="awake on spark", expected_wait_s=4.0, place=1
        ),
    ),
)


class TestRoute:
    def test_shows_the_effort_the_rung_and_each_target_with_its_reason(self, rung: Terminal) -> None:
        rung.client.route = ROUTE
        assert rung("route", "explain", "Prove it", "--effort", "8", "--local-only", "-m", "rung/auto") == 0
        policy = Policy(local_only=True, priority=Priority.USER)
        assert rung.client.asked == [("explain_route", ("Prove it", "rung/auto", 8, policy))]
        assert [" ".join(line.split()) for line in rung.out.splitlines()] == [
            "effort 8: it asks for a proof",
            "rung hard",
            "TARGET WAIT WHY",
            "1 orchestrator none awake",
            "2 thinker - asleep on spark",
            "- openai/large - the request is local_only",
            "",
            "It is offered the `reason` tool, which asks:",
            "TARGET WAIT WHY",
            "1 spark-qwen 4.0 s awake on spark",
        ]

    def test_says_that_the_reason_tool_is_not_offered(self, rung: Terminal) -> None:
        rung.client.route = msgspec.structs.replace(ROUTE, effort=6, reason=())
        assert rung("route", "explain", "Hi") == ExitCode.OK
        assert "The `reason` tool is not offered." in rung.out

    def test_a_named_model_has_no_effort(self, rung: Terminal) -> None:
        rung.client.route = RouteExplanation(considered=ROUTE.considered[:1], target="orchestrator")
        assert rung("route", "explain", "--model", "nemotron-8b") == ExitCode.OK
        assert "effort" not in rung.out
        assert "reason" not in rung.out
        assert "orchestrator" in rung.out

    def test_ends_with_1_if_nobody_can_answer(self, rung: Terminal) -> None:
        rung.client.route = RouteExplanation(considered=ROUTE.considered[2:])
        assert rung("route", "explain", "Hi") == ExitCode.FAILED
        assert "nobody can answer now" in rung.out
        assert "the request is local_only" in rung.out

    def test_json(self, rung: Terminal) -> None:
        rung.client.route = ROUTE
        assert rung("route", "explain", "Prove it", "--json") == ExitCode.OK
        assert msgspec.json.decode(rung.out, type=RouteExplanation) == ROUTE

    def test_texts_of_others_cannot_take_the_terminal_over(self, rung: Terminal) -> None:
        nasty = msgspec.structs.replace(ROUTE.considered[0], reason="down \x1b[2J[red]now")
        rung.client.route = msgspec.structs.replace(ROUTE, considered=(nasty,), why="\x1b[2Jbecause")
        assert rung("route", "explain", "Hi") == ExitCode.OK
        assert "\x1b" not in rung.out
        assert "down [2J[red]now" in rung.out


class TestJobs:
    def test_list(self, rung: Terminal) -> None:
        rung.client.jobs = [JOB, msgspec.structs.replace(JOB, id="job-2")]
        assert rung("jobs", "list", "-n", "1", "--state", "done") == ExitCode.OK
        assert "job-1" in rung.out
        assert "job-2" not in rung.out
        assert rung.client.asked == [("list_jobs", (JobState.DONE,))]
        assert rung("jobs", "list", "--json") == ExitCode.OK
        assert [job["id"] for job in json.loads(rung.out)] == ["job-1", "job-2"]

    def test_watch(self, rung: Terminal) -> None:
        rung.client.events = log(TokenDelta("a"), TokenDelta("b"), JobDone("stop"))
        assert rung("jobs", "watch", "job-1", "--after", "1") == ExitCode.OK
        assert rung.out.splitlines() == [
            "    2     2.000 s  token     'b'",
            "    3     3.000 s  done      stop",
        ]

    def test_watch_as_lines_with_heartbeats(self, rung: Terminal) -> None:
        heartbeat = JobEvent("job-1", 0, 1.0, 1.0, PhaseProgress(Phase.QUEUED))
        rung.client.events = [heartbeat, *log(JobDone("stop"))]
        assert rung("jobs", "watch", "job-1", "--json") == ExitCode.OK
        first, last = (json.loads(line) for line in rung.out.splitlines())
        assert first["sequence"] == 0
        assert last["payload"] == {"event": "done", "finish_reason": "stop", "served": None}

    @pytest.mark.parametrize("end", [JobFailed(FailureReason.TIMEOUT, "late"), JobCancelled("operator")])
    def test_watch_ends_as_the_job(self, rung: Terminal, end: Any) -> None:
        rung.client.events = log(end)
        assert rung("jobs", "watch", "job-1") == ExitCode.FAILED

    def test_cancel(self, rung: Terminal) -> None:
        rung.client.jobs = [JOB, msgspec.structs.replace(JOB, id="job-2", state=JobState.RUNNING)]
        assert rung("jobs", "cancel", "job-1") == ExitCode.OK
        assert rung.out == "job-1 had ended already: done\n"
        assert rung("jobs", "cancel", "job-2") == ExitCode.OK
        assert rung.out == "job-2 is cancelled\n"

    def test_unknown(self, rung: Terminal) -> None:
        rung.client.error = UnknownJobError("there is no job x")
        assert rung("jobs", "cancel", "x") == ExitCode.NOT_FOUND


class TestDeployments:
    def operation(self, rung: Terminal, end: Any) -> None:
        progress = LifecycleProgress(Residency.STARTING, "loading weights", 50.0)
        rung.client.operation = [LifecycleEvent("op", 1, 0.5, progress), LifecycleEvent("op", 2, 4.0, end)]

    def test_list(self, rung: Terminal) -> None:
        rung.client.snapshots = [a_fleet()]
        assert rung("deployments") == ExitCode.OK
        assert "thinker" in rung.out
        assert rung("deployments", "--json") == ExitCode.OK
        assert [each["spec"]["id"] for each in json.loads(rung.out)] == ["orchestrator", "thinker"]

    @pytest.mark.parametrize(
        ("arguments", "asked"),
        [
            (("start", "x"), ("start", "x")),
            (("stop", "x", "--force"), ("stop", ("x", True))),
            (("sleep", "x", "--level", "2"), ("sleep", ("x", False, 2))),
            (("wake", "x"), ("wake", "x")),
        ],
    )
    def test_operations(self, rung: Terminal, arguments: tuple[str, ...], asked: tuple[str, Any]) -> None:
        self.operation(rung, LifecycleDone(a_deployment("x")))
        assert rung(*arguments) == ExitCode.OK
        assert rung.client.asked == [asked]
        assert rung.out.splitlines() == ["x: starting: loading weights 50 %", "x: awake after 4.0 s"]

    def test_as_lines(self, rung: Terminal) -> None:
        self.operation(rung, LifecycleDone(a_deployment("x")))
        assert rung("start", "x", "--json") == ExitCode.OK
        events = [json.loads(line)["payload"]["event"] for line in rung.out.splitlines()]
        assert events == ["progress", "done"]

    @pytest.mark.parametrize("arguments", [("start", "x"), ("start", "x", "--json")])
    def test_failure(self, rung: Terminal, arguments: tuple[str, ...]) -> None:
        self.operation(rung, LifecycleFailed(FailureReason.ENGINE_START_FAILED, "out of memory"))
        assert rung(*arguments) == ExitCode.FAILED
        assert rung.err.startswith("error: out of memory\nhint: ")

    @pytest.mark.parametrize(
        ("error", "code"),
        [
            (UnknownDeploymentError("no x"), ExitCode.NOT_FOUND),
            (PinnedDeploymentError("x is pinned"), ExitCode.REFUSED),
        ],
    )
    def test_refusals(self, rung: Terminal, error: RungError, code: ExitCode) -> None:
        rung.client.error = error
        assert rung("stop", "x") == code


class TestLeases:
    def test_a_plan_is_told_step_by_step(self, rung: Terminal) -> None:
        sleep = ReclaimStep(
            deployment_id="reasoner",
            action=ReclaimAction.SLEEP,
            level=2,
            expected_bytes=10 << 30,
            expected_s=2.0,
        )
        stop = ReclaimStep(
            deployment_id="vision",
            action=ReclaimAction.STOP,
            expected_bytes=6 << 30,
            expected_s=15.0,
            drain=True,
            drain_expected_s=10.0,
        )
        rung.client.plan = ReclaimPlan(
            grade=ReclaimGrade.STANDARD, steps=(sleep, stop), expected_free_bytes=19 << 30, expected_s=17.0
        )
        assert rung("lease", "plan", "--vram", "18GiB", "--gpu", "box/0") == ExitCode.OK
        assert rung.client.asked == [("plan_reclaim", ("box/0", 18 << 30, ReclaimGrade.FULL))]
        assert rung.out.splitlines() == [
            "18.0 GiB on box/0: grade standard, 2 steps, about 17.0 s",
            "  1. put to sleep reasoner (weights dropped): 10.0 GiB, about 2.0 s",
            "  2. stop vision: 6.0 GiB, about 15.0 s, once its requests have ended",
            "then 19.0 GiB are free",
        ]

    def test_what_is_free_needs_no_steps(self, rung: Terminal) -> None:
        rung.client.plan = ReclaimPlan(grade=ReclaimGrade.QUICK, expected_free_bytes=19 << 30)
        assert rung("lease", "plan", "--vram", "18GiB", "--gpu", "box/0") == ExitCode.OK
        assert rung.out == "18.0 GiB on box/0: free now, nobody is disturbed (grade quick)\n"

    def test_what_cannot_be_had_says_why(self, rung: Terminal) -> None:
        rung.client.plan = Infeasible(
            detail="28.0 GiB do not fit on box/0",
            missing_bytes=1,
            missing_at_full_bytes=1,
            largest_fit_bytes=5,
            remedies=("orchestrator holds 10.0 GiB: it is pinned",),
            retry_when=("the lease of train.py ends",),
        )
        line = ("lease", "plan", "--vram", "28GiB", "--gpu", "box/0", "--max-grade", "standard")
        assert rung(*line) == ExitCode.FAILED
        assert rung.client.asked[0][1][2] is ReclaimGrade.STANDARD
        assert rung.out.splitlines() == [
            "28.0 GiB do not fit on box/0",
            "  orchestrator holds 10.0 GiB: it is pinned",
            "  it fits once the lease of train.py ends",
        ]

    def test_what_is_no_size_is_wrong_usage(self, rung: Terminal) -> None:
        assert rung("lease", "plan", "--vram", "much", "--gpu", "box/0") == ExitCode.USAGE
        assert rung.client.asked == []

    LEASE = Lease(
        id="lease-1",
        gpu="box/0",
        vram_bytes=18 << 30,
        grade=ReclaimGrade.STANDARD,
        grant_time_s=1_000.0,
        expire_time_s=1_060.0,
        holder="python train.py",
    )

    def test_a_program_runs_while_its_memory_is_held(self, rung: Terminal, tmp_path: Path) -> None:
        rung.client.leases = (self.LEASE,)
        waiting = PhaseProgress(phase=Phase.VRAM_ACQUIRE, detail="putting reasoner to sleep")
        rung.client.waits = [waiting, waiting]
        written = tmp_path / "out"
        program = ("sh", "-c", f"echo $RUNG_LEASE_ID > {written}; exit 7")

        assert rung("lease", "run", "--vram", "18GiB", "--gpu", "box/0", "--", *program) == 7

        assert written.read_text() == "lease-1\n"
        asked, given_back = rung.client.asked
        holder = " ".join(program)[:80]
        assert asked == (
            "lease",
            ("box/0", 18 << 30, ReclaimGrade.FULL, Priority.USER, holder, 60.0),
        )
        assert given_back == ("given back", None)
        assert rung.err.splitlines() == [
            "putting reasoner to sleep",
            "18.0 GiB of box/0 are yours (lease-1, grade standard)",
        ]

    def test_a_program_that_is_not_there_leaves_no_lease(self, rung: Terminal) -> None:
        rung.client.leases = (self.LEASE,)

        assert rung("lease", "run", "--vram", "1GiB", "--gpu", "box/0", "--", "/no/such") != ExitCode.OK

        assert "/no/such cannot be started" in rung.err
        assert rung.client.asked[-1] == ("given back", None)

    def test_leases_are_listed_and_ended(self, rung: Terminal) -> None:
        assert rung("lease", "list") == ExitCode.OK
        assert "No leases" in rung.out
        rung.client.leases = (self.LEASE,)
        assert rung("lease", "list", "--json") == ExitCode.OK
        assert json.loads(rung.out)[0]["holder"] == "python train.py"
        assert rung("lease", "list") == ExitCode.OK
        assert "python train.py" in rung.out
        assert rung("lease", "release", "lease-1") == ExitCode.OK
        assert rung.client.asked[-1] == ("release_lease", "lease-1")


class TestPlugins:
    def run(self, entries: list[EntryPoint], *arguments: str) -> Callable[[], None]:
        app = typer.Typer(rich_markup_mode="markdown")
        app.command("other")(lambda: None)
        add_plugins(app, entries)
        return lambda: app(args=list(arguments), prog_name="rung")

    def test_a_command_whose_package_is_missing_says_so(self, capsys: pytest.CaptureFixture[str]) -> None:
        entry = EntryPoint("agent", "no_such_package.commands:agent", "rung.commands")
        with pytest.raises(SystemExit) as end:
            self.run([entry], "agent", "run", "--node-id", "x")()
        assert end.value.code == ExitCode.FAILED
        assert "needs the module no_such_package" in (error := capsys.readouterr().err)
        assert "pip install 'rung[agent]'" in error

    def test_it_is_listed(self, capsys: pytest.CaptureFixture[str]) -> None:
        entry = EntryPoint("serve", "no_such_package.commands:serve", "rung.commands")
        with pytest.raises(SystemExit):
            self.run([entry], "--help")()
        assert "rung[server]" in capsys.readouterr().out

    def test_missing_while_running(self, rung: Terminal) -> None:
        def lack(connection: Connection) -> FakeClient:
            raise ModuleNotFoundError("No module named 'x'", name="x")

        assert main(["models"], opening=lack) == ExitCode.FAILED
        rung("--version")
        assert "error: the module x is not installed" in rung.err
