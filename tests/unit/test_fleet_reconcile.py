"""What is to be started, decided from plain values."""

from __future__ import annotations

import pytest
from msgspec.structs import replace

from controlplane.fleet import build_view
from controlplane.fleet._reconcile import StartRecord, after_start, decide
from rung.types import Node, NodeState, Residency, ResidencyClass
from tests.fakes.agent_server import a_deployment, a_spec, a_status


def starts(
    *,
    residency: Residency = Residency.STOPPED,
    state: NodeState = NodeState.READY,
    keep_running: bool = True,
    external: bool = False,
    pinned: bool = False,
    busy: bool = False,
    held: bool = False,
) -> bool:
    spec = a_spec(
        keep_running=keep_running,
        external=external,
        residency_class=ResidencyClass.PINNED if pinned else ResidencyClass.ON_DEMAND,
    )
    node = Node(id="box", address="x", state=state, status=a_status(), last_seen_time_s=1.0)
    view = build_view({"box": node}, [spec], {"box": {spec.id: a_deployment(spec, residency)}}, "host-1")
    decision = decide(view, {}, {spec.id} if busy else (), {spec.id} if held else (), 0.0)
    return decision.start == (spec.id,)


@pytest.mark.parametrize("residency", list(Residency))
def test_only_what_is_stopped_or_failed_is_started(residency: Residency) -> None:
    assert starts(residency=residency) is (residency in (Residency.STOPPED, Residency.FAILED))


@pytest.mark.parametrize("state", list(NodeState))
def test_only_on_a_ready_node(state: NodeState) -> None:
    assert starts(state=state) is (state is NodeState.READY)


def test_what_is_left_alone() -> None:
    assert starts(pinned=True), "a pinned deployment that is to run is started like any other"
    assert not starts(keep_running=False)
    assert not starts(busy=True)
    assert not starts(held=True)


@pytest.mark.parametrize("residency", list(Residency))
def test_an_agent_is_told_of_an_engine_of_somebody_else_once(residency: Residency) -> None:
    told = starts(external=True, keep_running=False, residency=residency)

    assert told is (residency is Residency.STOPPED)


def test_failed_starts_are_backed_off_from_ten_seconds_to_five_minutes() -> None:
    record: StartRecord | None = None
    waits = []
    now_s = 0.0
    for _ in range(8):
        record = after_start(record, succeeded=False, now_s=now_s)
        waits.append(record.earliest_next_s - now_s)
        now_s = record.earliest_next_s
    assert waits == [10.0, 20.0, 40.0, 80.0, 160.0, 300.0, 300.0, 300.0]


def test_a_good_run_resets_the_backoff_and_a_crash_soon_after_a_start_does_not() -> None:
    failing = after_start(after_start(None, succeeded=False, now_s=0.0), succeeded=False, now_s=10.0)
    good = after_start(failing, succeeded=True, now_s=30.0)
    assert good.earliest_next_s > 30.0, "it may crash at once"
    assert after_start(good, succeeded=True, now_s=200.0).failures == 0

    first = after_start(None, succeeded=True, now_s=0.0)
    assert first.earliest_next_s == 0.0, "one crash is met with a start at once"
    second = after_start(first, succeeded=True, now_s=5.0)
    third = after_start(second, succeeded=True, now_s=20.0)
    assert [second.earliest_next_s, third.earliest_next_s] == [15.0, 40.0]


def test_what_waits_is_looked_at_when_its_time_comes() -> None:
    spec = a_spec(keep_running=True)
    node = Node(id="box", address="x", state=NodeState.READY, status=a_status(), last_seen_time_s=1.0)
    view = build_view({"box": node}, [spec], {}, "host-1")
    records = {spec.id: StartRecord(succeeded=False, ended_s=100.0, failures=2)}
    early = decide(view, records, (), (), 101.0)
    assert (early.start, early.next_look_s) == ((), 120.0)
    assert decide(view, records, (), (), 120.0).start == (spec.id,)
    assert replace(records[spec.id], failures=0).earliest_next_s == 100.0
