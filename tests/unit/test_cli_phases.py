"""How the phases of a job look: lines that stay where it is piped, one that moves on a terminal."""

from __future__ import annotations

import io
from collections.abc import AsyncIterator

from rich.console import Console

from rung.cli.views import show_phases
from rung.types import (
    ArtifactChunk,
    EventPayload,
    FailureReason,
    JobAccepted,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    Phase,
    PhaseProgress,
    Routed,
    Served,
)

SERVED = Served("", "comfyui", "workstation")
PICTURE = ArtifactChunk("a1", "image/png", sha256="0" * 64, size_bytes=5, length_bytes=5)


def progress(phase: Phase, detail: str = "", **more: float) -> PhaseProgress:
    return PhaseProgress(phase, detail, **more)  # type: ignore[arg-type]  # figures of both types


def quality(percents: tuple[int, ...] = (10, 12, 50, 90, 100)) -> list[tuple[float, EventPayload]]:
    sampling = [
        (
            12.2 + percent / 10,
            progress(Phase.SAMPLING, step=28 * percent // 100, total=28, percent=percent, remaining_s=8.0),
        )
        for percent in percents
    ]
    return [
        (0.0, JobAccepted(JobKind.IMAGE, "")),
        (0.0, progress(Phase.HEALTH_CHECK, "Checking ComfyUI status")),
        (0.1, Routed(SERVED)),
        (0.1, progress(Phase.VRAM_ACQUIRE, "Requesting VRAM slot (mode=standard)")),
        (3.2, progress(Phase.VRAM_ACQUIRE, "Sleeping reasoning model (3 s)")),
        (4.2, progress(Phase.VRAM_ACQUIRE, "Sleeping reasoning model (4 s)")),
        (8.1, progress(Phase.VRAM_ACQUIRE, "VRAM acquired: 18432MB free")),
        (12.1, progress(Phase.WORKFLOW_BUILD, "Building quality workflow (1024x1024)")),
        *sampling,
        (25.8, progress(Phase.ENCODING, "Encoding images")),
        (25.9, PICTURE),
        (25.9, progress(Phase.DONE, "1 image(s) generated", percent=100)),
        (26.0, JobDone("stop", SERVED)),
    ]


async def shown(script: list[tuple[float, EventPayload]], *, terminal: bool) -> tuple[str, JobEvent | None]:
    async def events() -> AsyncIterator[JobEvent]:
        for sequence, (elapsed_s, payload) in enumerate(script, 1):
            yield JobEvent("job-1", sequence, elapsed_s, elapsed_s, payload)

    out = io.StringIO()
    console = Console(
        file=out, force_terminal=terminal, width=100, color_system=None, legacy_windows=False, highlight=False
    )
    last = await show_phases(events(), console=console, clock=lambda: 0.0)
    return out.getvalue(), last


async def test_piped_it_is_a_line_for_each_news_and_a_tenth_of_sampling() -> None:
    text, last = await shown(quality(), terminal=False)

    assert text.splitlines() == [
        "[  0.0s] Checking ComfyUI status",
        "[  0.1s] Requesting VRAM slot (mode=standard)",
        "[  3.2s] Sleeping reasoning model",
        "[  8.1s] VRAM acquired: 18432MB free",
        "[ 12.1s] Building quality workflow (1024x1024)",
        "[ 13.2s] Sampling 10%",
        "[ 17.2s] Sampling 50%",
        "[ 21.2s] Sampling 90%",
        "[ 22.2s] Sampling 100%",
        "[ 25.8s] Encoding images",
        "[ 26.0s] 1 image generated",
    ]
    assert last is not None
    assert isinstance(last.payload, JobDone)


async def test_on_a_terminal_each_phase_is_ticked_with_how_long_it_took() -> None:
    text, _ = await shown(quality(), terminal=True)

    ticked = [line.split() for line in text.replace("\r", "\n").splitlines() if "✓" in line]
    assert [" ".join(words[1:5]) for words in ticked[:3]] == [
        "health check 0.10 s",
        "vram acquire 12.0 s",
        "workflow build 1.1 s",
    ]
    assert "VRAM acquired: 18432MB free" in text
    assert "28 of 28 steps" in text
    assert "✓ 1 image generated after 26.0 s, by comfyui on workstation" in text


async def test_a_live_line_says_how_far_it_is_and_how_much_longer() -> None:
    text, _ = await shown(quality((50,))[:-4], terminal=True)

    assert " 50 % " in text
    assert "8 s left" in text


async def test_a_phase_that_failed_has_a_cross_and_the_failure_is_returned() -> None:
    script = [*quality()[:4], (1.0, JobFailed(FailureReason.VRAM_INFEASIBLE, "a game holds 20 GB"))]
    text, last = await shown(script, terminal=True)

    assert "✗ vram acquire" in text
    assert "a game" not in text
    assert last is not None
    assert isinstance(last.payload, JobFailed)
