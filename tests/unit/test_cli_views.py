"""How values look on a terminal, and that their texts cannot take it over."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from rich.console import Console, RenderableType

from rung.cli.views import (
    VramShare,
    bar_cells,
    deployments_table,
    event_line,
    fleet_view,
    format_age,
    format_bytes,
    format_duration,
    format_part,
    jobs_table,
    print_answer,
    printable,
    residency_text,
    show_operation,
    vram_bar,
    vram_legend,
    vram_shares,
)
from rung.errors import (
    EngineStartFailedError,
    EngineUnreachableError,
    JobCancelledError,
    UnavailableError,
)
from rung.types import (
    EventPayload,
    ExternalRuntime,
    FailureReason,
    FleetSnapshot,
    GpuProcess,
    Job,
    JobAccepted,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    LifecycleDone,
    LifecycleEvent,
    LifecycleFailed,
    LifecyclePayload,
    LifecycleProgress,
    NodeState,
    Phase,
    PhaseProgress,
    Residency,
    ResidencyClass,
    Routed,
    Served,
    TokenDelta,
    Usage,
    UsageReported,
)
from tests.fakes.fleet import GIB, a_deployment, a_fleet, a_gpu, a_node

NOW_S = 1_750_000_000.0


def shown(thing: RenderableType, *, width: int = 120) -> str:
    """What is on a terminal without colours."""
    console = Console(file=io.StringIO(), width=width, highlight=False)
    console.print(thing)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


class TestWords:
    @pytest.mark.parametrize(
        ("size_bytes", "words"),
        [
            (None, "-"),
            (0, "0 B"),
            (1023, "1023 B"),
            (5 * 1024, "5 KiB"),
            (32_607 * 1024**2, "31.8 GiB"),
            (2 * 1024**4, "2.0 TiB"),
        ],
    )
    def test_bytes(self, size_bytes: int | None, words: str) -> None:
        assert format_bytes(size_bytes) == words

    def test_a_part_is_in_the_unit_of_the_whole(self) -> None:
        assert format_part(512 * 1024**2, 32 * GIB) == "0.5 / 32.0 GiB"

    @pytest.mark.parametrize(
        ("duration_s", "words"),
        [
            (None, "-"),
            (0.2, "0.20 s"),
            (7.06, "7.1 s"),
            (200, "3 min 20 s"),
            (18_120, "5 h 02 min"),
            (183_600, "2 d 3 h"),
        ],
    )
    def test_durations(self, duration_s: float | None, words: str) -> None:
        assert format_duration(duration_s) == words

    @pytest.mark.parametrize(
        ("age_s", "words"),
        [(-5, "just now"), (1, "just now"), (12, "12 s ago"), (180, "3 min ago"), (90_000, "1 d ago")],
    )
    def test_ages(self, age_s: float, words: str) -> None:
        assert format_age(NOW_S - age_s, NOW_S) == words

    def test_control_characters_do_not_reach_the_terminal(self) -> None:
        said = printable("a\x1b[2Jb\x07\r\n\tc\u202e\u200dd")
        assert said == "a[2Jb\n\tc\u200dd"


class TestVramBar:
    def test_processes_say_who_holds_what(self) -> None:
        held = (GpuProcess(1, 6 * GIB, "a"), GpuProcess(2, 2 * GIB, "a"), GpuProcess(3, GIB, ""))
        gpu = a_gpu(used_bytes=10 * GIB, processes=held)
        assert vram_shares(gpu, ()) == (VramShare("a", 8 * GIB), VramShare("", 2 * GIB))

    def test_without_processes_a_deployment_says_it_of_the_only_gpu(self) -> None:
        gpu = a_gpu(used_bytes=10 * GIB, unified=True)
        own = [a_deployment("b", vram_bytes=7 * GIB), a_deployment("c", vram_bytes=None)]
        assert vram_shares(gpu, own) == (VramShare("b", 7 * GIB), VramShare("", 3 * GIB))
        assert vram_shares(gpu, own, gpu_count=2) == (VramShare("", 10 * GIB),)

    def test_shares_never_exceed_what_is_used(self) -> None:
        gpu = a_gpu(used_bytes=5 * GIB)
        own = [a_deployment("a", vram_bytes=4 * GIB), a_deployment("b", vram_bytes=4 * GIB)]
        assert vram_shares(gpu, own) == (VramShare("a", 4 * GIB), VramShare("b", GIB))

    def test_a_bar(self) -> None:
        gpu = a_gpu(used_bytes=10 * GIB, total_bytes=20 * GIB, processes=(GpuProcess(1, 8 * GIB, "a"),))
        shares = vram_shares(gpu, ())
        assert vram_bar(gpu, shares, width=20).plain == "████████▒▒░░░░░░░░░░ 10.0 / 20.0 GiB"
        ascii_bar = vram_bar(gpu, shares, width=20, ascii_only=True).plain
        assert ascii_bar == "########++.......... 10.0 / 20.0 GiB"
        assert vram_legend(shares).plain == "█ a 8.0 GiB  ▒ others 2.0 GiB"

    def test_a_small_share_is_seen(self) -> None:
        shares = (VramShare("a", 1), VramShare("b", 1), VramShare("", 98))
        assert bar_cells(shares, 100, 10) == (1, 1, 8)

    def test_nothing_to_show(self) -> None:
        assert bar_cells((), 100, 10) == ()
        assert bar_cells((VramShare("a", 5),), 0, 10) == (0,)

    @given(
        sizes=st.lists(st.integers(min_value=1, max_value=1000), max_size=12),
        free=st.integers(min_value=0, max_value=5000),
        width=st.integers(min_value=1, max_value=80),
    )
    def test_cells_fit_and_are_nearly_right(self, sizes: list[int], free: int, width: int) -> None:
        shares = [VramShare(str(place), size) for place, size in enumerate(sizes)]
        total = sum(sizes) + free
        cells = bar_cells(shares, total, width)
        assert sum(cells) <= width
        assert all(count >= 0 for count in cells)
        if len(shares) <= width:
            assert all(count >= 1 for count in cells)
        if sizes:
            exact = width * sum(sizes) / total
            assert abs(sum(cells) - exact) <= max(1, len(sizes))


class TestFleetView:
    def test_says_what_is_simulated_and_shows_all(self) -> None:
        text = shown(fleet_view(a_fleet(), now_s=NOW_S))
        assert text.startswith("Simulated: the GPUs of spark, workstation are not real.")
        assert "workstation  ready  simulated  127.0.0.1:8152" in text
        assert "GPU 0  NVIDIA GB10  memory shared with the host" in text
        assert "10.0 / 31.8 GiB  42 % busy  61 °C  210 W" in text
        assert "█ orchestrator 9.0 GiB  ▒ others 1.0 GiB" in text
        assert "host: RAM 16.0 / 64.0 GiB, 16 CPUs at 7 %, 500.0 GiB disk free" in text
        assert "llama-server, process" in text
        assert "openai compatible, process" in text

    def test_a_node_that_is_away(self) -> None:
        node = a_node("box", state=NodeState.UNREACHABLE, simulated=False)
        text = shown(fleet_view(FleetSnapshot(nodes=(node,)), now_s=NOW_S))
        assert "box  unreachable" in text
        assert "Simulated" not in text
        assert "no GPU" in text

    def test_an_empty_fleet_says_what_to_do(self) -> None:
        text = shown(fleet_view(FleetSnapshot(), now_s=NOW_S))
        assert "`rung up` runs one on this box" in text

    def test_loading_and_failure_are_explained(self) -> None:
        starting = a_deployment("a", residency=Residency.STARTING, load_percent=40.0)
        failed = a_deployment("b", residency=Residency.FAILED, detail="out of memory")
        text = shown(fleet_view(FleetSnapshot(deployments=(starting, failed)), now_s=NOW_S), width=160)
        assert "starting 40 %" in text
        assert "failed: out of memory" in text

    def test_one_that_keeps_its_weights_on_the_gpu_is_shrunk_and_not_asleep(self) -> None:
        asleep = a_deployment(residency=Residency.ASLEEP)
        growing = a_deployment(residency=Residency.WAKING)
        shown_as = [
            residency_text(each).plain
            for each in (replace(asleep, shrunk=True), replace(growing, shrunk=True), asleep)
        ]
        assert shown_as == ["shrunk", "waking", "asleep"]

    @pytest.mark.parametrize(
        ("residency_class", "words"),
        [
            (ResidencyClass.ON_DEMAND, "external"),
            (ResidencyClass.SLEEPABLE, "external"),
            (ResidencyClass.PINNED, "pinned"),
            (ResidencyClass.CACHE, "cache"),
        ],
    )
    def test_what_nobody_here_may_stop_is_not_said_to_be_on_demand(
        self, residency_class: ResidencyClass, words: str
    ) -> None:
        ours = a_deployment("ours")
        engine = replace(ours.spec.engine, runtime=ExternalRuntime(base_url="http://127.0.0.1:8000"))
        spec = replace(ours.spec, id="theirs", engine=engine, residency_class=residency_class)
        table = shown(deployments_table([replace(ours, spec=spec)]), width=160)
        header, row = table.splitlines()[:2]
        column = header.index("CLASS")
        assert row[column:].split()[0] == words

    def test_texts_are_not_markup(self) -> None:
        odd = a_deployment("[red]x[/red]")
        assert "[red]x[/red]" in shown(fleet_view(FleetSnapshot(deployments=(odd,)), now_s=NOW_S), width=160)


def log(*payloads: EventPayload) -> list[JobEvent]:
    return [JobEvent("job-1", place, NOW_S, place / 10, payload) for place, payload in enumerate(payloads, 1)]


class TestJobs:
    def test_a_table(self) -> None:
        job = Job(
            id="job-1",
            kind=JobKind.CHAT,
            state=JobState.FAILED,
            model="nemotron-8b",
            create_time_s=NOW_S - 65,
            end_time_s=NOW_S - 60,
            failure_reason=FailureReason.ENGINE_LOST,
            served=Served("nemotron-8b", "orchestrator", "workstation"),
            usage=Usage(10, 20),
        )
        text = shown(jobs_table([job], now_s=NOW_S), width=160)
        for part in ("failed: engine_lost", "orchestrator on workstation", "1 min ago", "5.0 s", "20"):
            assert part in text

    def test_event_lines(self) -> None:
        progress = PhaseProgress(Phase.ENGINE_START, "loading weights", percent=40.0, remaining_s=3.0)
        lines = [event_line(event).plain for event in log(progress, TokenDelta("Hi\n"))]
        assert lines[0] == "    1     0.100 s  progress  engine start: loading weights, 40 %, 3 s left"
        assert lines[1] == "    2     0.200 s  token     'Hi\\n'"


class Clock:
    """Moves on by a tenth of a second whenever it is read."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.1
        return self.now_s


async def stream(events: Sequence[JobEvent]) -> AsyncIterator[JobEvent]:
    for event in events:
        yield event


def consoles() -> tuple[Console, io.StringIO, Console, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    return Console(file=out, width=80), out, Console(file=err, width=80), err


class TestPrintAnswer:
    async def test_text_to_one_stream_and_the_rest_to_the_other(self) -> None:
        out, out_text, err, err_text = consoles()
        events = log(
            JobAccepted(JobKind.CHAT, "m"),
            Routed(Served("m", "thinker", "spark", "qwen3-32b")),
            PhaseProgress(Phase.ENGINE_START, "loading weights", percent=10.0),
            PhaseProgress(Phase.ENGINE_START, "loading weights", percent=20.0),
            TokenDelta(reasoning="Hm."),
            TokenDelta("Hello"),
            PhaseProgress(Phase.GENERATING, "still at it"),
            TokenDelta(" [b]world[/b]"),
            UsageReported(Usage(7, 3)),
            JobDone("stop"),
        )
        answer = await print_answer(stream(events), out=out, err=err, clock=Clock())
        assert out_text.getvalue() == "Hello [b]world[/b]\n"
        assert err_text.getvalue() == "engine start: loading weights, 10 %\nHm.\n\n"
        assert answer.text == "Hello [b]world[/b]"
        assert answer.first_token_s == pytest.approx(0.1)
        assert answer.tokens_per_s == pytest.approx(2 / 0.2)
        assert answer.summary() == (
            "thinker on spark (qwen3-32b) · 7 tokens in, 3 out · first after 0.10 s · 10.0 tok/s · job job-1"
        )

    async def test_reasoning_is_told_and_its_tokens_are_no_rate(self) -> None:
        out, _, err, err_text = consoles()
        events = log(
            PhaseProgress(Phase.ROUTE, "effort 8"),
            PhaseProgress(Phase.REASONING, "thinker is reasoning"),
            TokenDelta("So "),
            TokenDelta("it is."),
            # The call of the tool is among them.
            UsageReported(Usage(7, 60)),
            JobDone("stop"),
        )
        answer = await print_answer(stream(events), out=out, err=err, clock=Clock())
        assert err_text.getvalue() == "reasoning: thinker is reasoning\n"
        assert answer.tokens_per_s is None

    async def test_failure_after_a_part_ends_the_line(self) -> None:
        out, out_text, err, _ = consoles()
        events = log(TokenDelta("Hel"), JobFailed(FailureReason.ENGINE_LOST, "the engine is gone", 3))
        with pytest.raises(EngineUnreachableError, match="the engine is gone"):
            await print_answer(stream(events), out=out, err=err)
        assert out_text.getvalue() == "Hel\n"

    async def test_cancelled(self) -> None:
        out, _, err, _ = consoles()
        with pytest.raises(JobCancelledError, match="operator"):
            await print_answer(stream(log(JobCancelled("operator"))), out=out, err=err)

    async def test_a_stream_that_just_ends_is_a_failure(self) -> None:
        out, _, err, _ = consoles()
        with pytest.raises(UnavailableError):
            await print_answer(stream(log(TokenDelta("Hel"))), out=out, err=err)

    async def test_a_terminal_gets_no_escape_sequences_of_the_model(self) -> None:
        _, _, err, _ = consoles()
        text = io.StringIO()
        out = Console(file=text, force_terminal=True)
        await print_answer(stream(log(TokenDelta("a\x1b[2J"), JobDone())), out=out, err=err)
        assert text.getvalue() == "a[2J\n"


def operation(*payloads: LifecyclePayload) -> list[LifecycleEvent]:
    return [LifecycleEvent("op", place, place / 2, payload) for place, payload in enumerate(payloads, 1)]


async def lifecycle(events: Sequence[LifecycleEvent]) -> AsyncIterator[LifecycleEvent]:
    for event in events:
        yield event


class TestShowOperation:
    async def test_news_as_lines_where_there_is_no_terminal(self) -> None:
        out, text, _, _ = consoles()
        loading = [
            LifecycleProgress(Residency.STARTING, "loading weights", percent, 9.0 - percent)
            for percent in (1.0, 2.0, 30.0)
        ]
        events = operation(*loading, LifecycleDone(a_deployment()))
        result = await show_operation(lifecycle(events), console=out, title="orchestrator")
        assert result.spec.id == "orchestrator"
        assert text.getvalue().splitlines() == [
            "orchestrator: starting: loading weights 0 %",
            "orchestrator: starting: loading weights 30 %",
            "orchestrator: awake after 2.0 s",
        ]

    async def test_a_bar_on_a_terminal(self) -> None:
        text = io.StringIO()
        console = Console(file=text, width=120, force_terminal=True)
        events = operation(
            LifecycleProgress(Residency.STARTING, "loading", 40.0), LifecycleDone(a_deployment())
        )
        await show_operation(lifecycle(events), console=console, title="orchestrator")
        assert "awake after 1.0 s" in text.getvalue()

    async def test_failure(self) -> None:
        out, _, _, _ = consoles()
        failed = LifecycleFailed(FailureReason.ENGINE_START_FAILED, "cudaMalloc failed: out of memory")
        with pytest.raises(EngineStartFailedError, match="out of memory"):
            await show_operation(lifecycle(operation(failed)), console=out, title="x")
