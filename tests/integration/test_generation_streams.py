"""The streams of pictures by real processes: never silent, times that are known, a crowd in nobody's way."""

from __future__ import annotations

from pathlib import Path

import pytest

from controlplane.pipelines.image import IMAGE_PHASES
from tests.integration.watching import bring_up, phases_of, predictions, three_ways, watched_by, workstation

#: The longest silence that is allowed, by whatever way a job is watched.
LONGEST_GAP_S = 1.5
_MIB = 1 << 20
#: What 200 watchers may add to the memory of the control plane: a connection with its buffers each.
_CROWD_BYTES = 200 * _MIB // 2


@pytest.mark.timeout(120)
async def test_a_cold_ultra_picture_is_never_silent_and_the_next_knows_how_long_it_takes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async with workstation(tmp_path) as box:
        first = await three_ways(box, request_id="first", tier="ultra")
        # It takes its memory back, so that the next is as cold.
        await bring_up(box, "reasoner")
        second = await three_ways(box, request_id="second", tier="ultra")

    for heard in (*first, *second):
        assert phases_of(heard)[:-1] == [phase.value for phase in IMAGE_PHASES][:-1], heard.lines
        assert heard.longest_gap_s < LONGEST_GAP_S
    assert any("putting reasoner to sleep" in line.get("detail", "") for line in first[0].lines)
    of_job, of_sampling = predictions(second[0])
    assert of_job is not None
    assert of_sampling is not None
    # Wide: what else the machine does is not ours to say.
    assert of_job.relative_error < 0.5
    assert of_sampling.relative_error < 0.5
    with capsys.disabled():
        gaps = "; ".join(
            f"{name} {max(one.longest_gap_s, two.longest_gap_s):.2f} s"
            for name, one, two in zip(("gRPC", "NDJSON", "SSE"), first, second, strict=True)
        )
        print(
            f"\nlongest silence: {gaps}; said to remain of {of_job.took_s:.1f} s: {of_job.said_s:.1f} s, of "
            f"{of_sampling.took_s:.1f} s when sampling began: {of_sampling.said_s:.1f} s"
        )


@pytest.mark.timeout(120)
async def test_two_hundred_watchers_of_whom_ten_read_nothing_hold_up_nobody(tmp_path: Path) -> None:
    async with workstation(tmp_path, speed=4, load_s=0.2) as box:
        wanted = {"tier": "lightning", "parameters": {"steps": 60}, "previews": True}
        await watched_by(box, 1, 0, **wanted)
        crowd = await watched_by(box, 190, 10, **wanted)

    # Each has the whole log, also who began to read when all was over; the job did not wait for them.
    assert set(crowd.counts) == {crowd.events}
    assert set(crowd.late_counts) == {crowd.events}
    assert crowd.grew_bytes < _CROWD_BYTES
