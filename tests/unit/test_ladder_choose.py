"""Who answers, who would be next, and why the others would not."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice
from typing import Any, ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.ladder import (
    Candidate,
    Chain,
    Demand,
    Group,
    Passing,
    TargetKind,
    chain_of,
    choose,
    explain,
    refusals,
)
from rung.types import Priority

Loads = dict[str, tuple[int, int]]


def ours(
    name: str,
    *,
    rank: int = 0,
    slots: int = 4,
    refusal: str = "",
    context_tokens: int = 0,
    known: bool = True,
    wait_s: float | None = None,
) -> Candidate:
    return Candidate(
        id=name,
        kind=TargetKind.DEPLOYMENT,
        owned=True,
        rank=rank,
        slots=slots,
        refusal=refusal,
        known=known,
        expected_wait_s=wait_s,
        state="awake on box",
        capabilities=frozenset({"chat"}),
        context_tokens=context_tokens,
    )


def cloud(name: str, *, capabilities: Sequence[str] = ("chat", "vision"), price: float = 2.5) -> Candidate:
    return Candidate(
        id=name,
        kind=TargetKind.CLOUD,
        owned=False,
        state="a cloud model",
        capabilities=frozenset(capabilities),
        usd_per_million_tokens=price,
    )


class Moment:
    """How loaded targets are and which failed, at one moment; `asked` are those that somebody looked at."""

    def __init__(self, loads: Loads | None = None, failed: dict[str, str] | None = None) -> None:
        self.loads = loads or {}
        self.failed = failed or {}
        self.asked: list[str] = []

    def passing(self, groups: Sequence[Group]) -> Passing:
        slots = {candidate.id: candidate.slots for group in groups for candidate in group}
        pressure = {
            name: sum(load) / slots[name]
            for name, load in self.loads.items()
            if slots.get(name) and sum(load)
        }
        return Passing(
            load=lambda target_id: self.loads.get(target_id, (0, 0)),
            pressure=pressure,
            full={name for name, each in pressure.items() if each >= 1.0},
            left_alone=lambda: set(list(self.failed)[::2]),
            allows=lambda target_id: not self._refusal(target_id),
            refusal=self._refusal,
        )

    def _refusal(self, target_id: str) -> str:
        self.asked.append(target_id)
        return self.failed.get(target_id, "")


def order(groups: Sequence[Group], demand: Demand | None = None, moment: Moment | None = None) -> list[str]:
    demand, moment = demand or Demand(), moment or Moment()
    return [each.id for each in choose(chain_of(groups, demand), demand, moment.passing(groups))]


USER = Demand(priority=Priority.USER)
FULL = (4, 0)


class TestOrder:
    def test_a_chain_is_tried_in_its_order_however_near_each_is(self) -> None:
        assert order([[ours("z", rank=3)], [ours("a")], [cloud("m")]]) == ["z", "a", "m"]

    def test_of_one_entry_the_nearest_to_answering_then_the_idlest_then_the_first(self) -> None:
        group = [ours("asleep", rank=3), ours("half"), ours("first"), ours("waking", rank=1), ours("second")]
        moment = Moment({"half": (2, 0)})
        assert order([group], moment=moment) == ["first", "second", "half", "waking", "asleep"]

    def test_load_is_by_slot_and_not_by_request(self) -> None:
        group = [ours("small", slots=2), ours("large", slots=16)]
        assert order([group], moment=Moment({"small": (1, 0), "large": (4, 0)})) == ["large", "small"]

    def test_of_full_ones_the_shortest_queue(self) -> None:
        group = [ours("a"), ours("b"), ours("c")]
        moment = Moment({"a": (4, 9), "b": (4, 1), "c": (4, 3)})
        assert order([group], moment=moment) == ["b", "c", "a"]

    def test_a_target_that_two_entries_stand_for_is_tried_once(self) -> None:
        assert order([[ours("a")], [ours("b"), ours("a")], [ours("b")]]) == ["a", "b"]


class TestGivingWay:
    @pytest.mark.parametrize("priority", list(Priority))
    def test_a_full_one_gives_way_to_a_later_free_one_of_ours(self, priority: Priority) -> None:
        demand = Demand(priority=priority)
        assert order([[ours("a")], [ours("b")]], demand, Moment({"a": FULL})) == ["b", "a"]

    def test_a_queue_alone_makes_it_full(self) -> None:
        assert order([[ours("a")], [ours("b")]], moment=Moment({"a": (3, 1)})) == ["b", "a"]

    def test_one_slot_that_is_left_is_enough(self) -> None:
        assert order([[ours("a")], [ours("b")]], moment=Moment({"a": (3, 0)})) == ["a", "b"]

    def test_a_user_is_sent_to_one_that_costs_money(self) -> None:
        assert order([[ours("a")], [cloud("m")]], USER, Moment({"a": FULL})) == ["m", "a"]

    @pytest.mark.parametrize("priority", [Priority.AGENT, Priority.BACKGROUND])
    def test_others_wait_for_what_is_ours(self, priority: Priority) -> None:
        demand = Demand(priority=priority)
        groups = [[ours("a")], [cloud("m")], [ours("b")]]
        assert order(groups, demand, Moment({"a": FULL})) == ["b", "a", "m"]
        assert order(groups, demand, Moment({"a": FULL, "b": FULL})) == ["a", "b", "m"]

    def test_nobody_waits_for_one_that_comes_after_or_cannot_answer_at_all(self) -> None:
        assert order([[cloud("m")], [ours("a")]], moment=Moment({"a": FULL})) == ["m", "a"]
        failed = Moment({"a": FULL}, {"a": "it failed"})
        assert order([[ours("a")], [cloud("m")]], moment=failed) == ["m"]
        short = [[ours("a", context_tokens=10)], [cloud("m")]]
        assert order(short, Demand(context_tokens=99), Moment({"a": FULL})) == ["m"]

    @pytest.mark.parametrize("priority", list(Priority))
    def test_a_full_one_gives_way_to_none_that_would_have_to_be_woken(self, priority: Priority) -> None:
        demand, moment = Demand(priority=priority), Moment({"a": FULL})
        assert order([[ours("a")], [ours("b", rank=3)]], demand, moment) == ["a", "b"]
        assert order([[ours("a"), ours("b", rank=1)]], demand, moment) == ["a", "b"]
        later = [[ours("a")], [ours("b", rank=3)], [ours("c")], [ours("d", rank=5)]]
        assert order(later, demand, moment) == ["c", "a", "b", "d"]

    def test_of_two_alike_nobody_waits_for_the_full_one(self) -> None:
        rented = [replace(ours(name), kind=TargetKind.BURST, owned=False) for name in ("a", "b")]
        assert order([rented], moment=Moment({"a": FULL})) == ["b", "a"]

    def test_one_that_sleeps_keeps_its_place_before_the_full_one(self) -> None:
        groups = [[ours("asleep", rank=3)], [ours("a")], [ours("b")]]
        assert order(groups, moment=Moment({"a": FULL})) == ["asleep", "b", "a"]

    def test_one_that_sleeps_is_as_good_as_any_where_the_full_one_cannot_answer_at_all(self) -> None:
        groups = [[ours("a")], [ours("b", rank=3)], [ours("c")]]
        assert order(groups, moment=Moment({"a": FULL}, {"a": "it failed"})) == ["b", "c"]

    def test_a_user_moves_on_to_what_is_ready_even_if_it_costs_money(self) -> None:
        groups = [[ours("a")], [ours("asleep", rank=3)], [cloud("m")]]
        assert order(groups, USER, Moment({"a": FULL})) == ["m", "a", "asleep"]
        assert order(groups, Demand(), Moment({"a": FULL})) == ["a", "asleep", "m"]

    def test_one_of_which_nothing_is_known_counts_as_busy(self) -> None:
        groups = [[ours("old", known=False, rank=9)], [ours("asleep", rank=3)], [ours("b")]]
        assert order(groups) == ["b", "old", "asleep"]
        assert order([[ours("old", known=False, rank=9)], [cloud("m")]]) == ["old", "m"]
        assert order([[ours("old", known=False, rank=9)], [cloud("m")]], USER) == ["m", "old"]
        assert order([[ours("old", known=False, rank=9), ours("b", rank=3)]]) == ["b", "old"]

    def test_what_takes_as_many_as_come_is_never_full(self) -> None:
        assert order([[cloud("m")], [cloud("n")]], moment=Moment({"m": (900, 0)})) == ["m", "n"]


class TestPreferringWhatIsAwake:
    SEES = Demand(prefers_awake=True)
    GROUPS: ClassVar[Any] = [[ours("asleep", rank=3)], [ours("awake")], [cloud("m")]]

    def test_a_later_one_of_ours_that_is_awake_comes_before_one_that_would_be_started(self) -> None:
        assert order(self.GROUPS, self.SEES) == ["awake", "asleep", "m"]
        assert order(self.GROUPS) == ["asleep", "awake", "m"]

    def test_one_that_costs_money_keeps_its_place(self) -> None:
        assert order([self.GROUPS[0], [cloud("m")]], self.SEES) == ["asleep", "m"]

    def test_of_several_that_are_awake_the_order_of_the_chain_holds(self) -> None:
        groups = [[ours("first")], *self.GROUPS]
        assert order(groups, self.SEES) == ["first", "awake", "asleep", "m"]

    def test_one_that_is_full_or_failed_is_not_preferred(self) -> None:
        assert order(self.GROUPS, self.SEES, Moment({"awake": FULL})) == ["asleep", "awake", "m"]
        assert order(self.GROUPS, self.SEES, Moment(failed={"awake": "it failed"})) == ["asleep", "m"]

    def test_it_is_explained_in_the_order_in_which_they_are_tried(self) -> None:
        passing = Moment().passing(self.GROUPS)
        explained = explain(chain_of(self.GROUPS, self.SEES), self.SEES, passing)
        assert [each.target for each in explained if each.taken] == ["awake"]


class TestRefusals:
    CASES: ClassVar[Any] = (
        ([[ours("a", refusal="its node box is unreachable")]], Demand(), {}, "its node box is unreachable"),
        (
            [[cloud("a")]],
            Demand(local_only=True),
            {},
            "the request is local_only, and this is not hardware of ours",
        ),
        (
            [[ours("a")]],
            Demand(capabilities=frozenset({"vision", "tools", "chat"})),
            {},
            "it cannot do tools, vision",
        ),
        (
            [[ours("a", context_tokens=8192)]],
            Demand(context_tokens=8193),
            {},
            "the request is about 8,193 tokens long, and its context has 8,192",
        ),
        ([[ours("a")]], Demand(), {"a": "it failed (HTTP 503)"}, "it failed (HTTP 503)"),
    )

    @pytest.mark.parametrize(("groups", "demand", "failed", "why"), CASES)
    def test_who_cannot_answer_is_not_tried_and_told_why(
        self, groups: list[Group], demand: Demand, failed: dict[str, str], why: str
    ) -> None:
        moment = Moment(failed=failed)
        assert order([*groups, [ours("b")]], Demand(), moment)[-1] == "b"
        chain, passing = chain_of(groups, demand), moment.passing(groups)
        assert list(choose(chain, demand, passing)) == []
        assert refusals(chain, demand, passing) == f"a: {why}"
        (considered,) = explain(chain, demand, passing)
        assert (considered.target, considered.taken, considered.reason) == ("a", False, why)

    def test_what_fits_exactly_or_is_not_known_is_tried(self) -> None:
        groups = [[ours("exact", context_tokens=8192)], [ours("unknown")]]
        assert order(groups, Demand(context_tokens=8192)) == ["exact", "unknown"]

    def test_all_are_named_in_one_line(self) -> None:
        groups = [[ours("a", refusal="gone")], [ours("b", refusal="drained"), ours("a", refusal="gone")]]
        chain = chain_of(groups, Demand())
        assert refusals(chain, Demand(), Moment().passing(groups)) == "a: gone; b: drained"


class TestExplain:
    def test_everybody_is_there_in_the_order_of_trying_with_what_was_thought_of_it(self) -> None:
        groups = [
            [ours("down", refusal="its node box is unreachable")],
            [ours("full")],
            [cloud("m")],
            [ours("asleep", rank=3, wait_s=6.0), ours("free")],
            [ours("stopped", rank=5), ours("old", rank=9, known=False, wait_s=3.0)],
        ]
        found = explain(chain_of(groups, Demand()), Demand(), Moment({"full": (4, 2)}).passing(groups))
        assert [(each.target, each.taken, each.expected_wait_s) for each in found] == [
            ("free", True, 0.0),
            ("full", False, None),
            ("asleep", False, 6.0),
            ("stopped", False, None),
            ("old", False, None),
            ("m", False, 0.0),
            ("down", False, None),
        ]
        assert [each.place for each in found] == [1, 2, 3, 4, 5, 6, 0]
        said = {each.target: each.reason for each in found}
        assert said["full"] == "awake on box, 4 of 4 slots taken, 2 waiting"
        assert said["m"] == (
            "a cloud model, $2.5 per million tokens; it costs money, and agent requests wait for what is "
            "busy before it"
        )
        assert said["asleep"] == (
            "awake on box, 0 of 4 slots taken, 0 waiting; it is not ready, and requests rather wait for what "
            "is busy before it"
        )
        assert said["down"] == "its node box is unreachable"

    def test_for_a_user_money_is_no_reason_to_wait(self) -> None:
        groups = [[ours("full")], [cloud("m")]]
        found = explain(chain_of(groups, USER), USER, Moment({"full": FULL}).passing(groups))
        assert (found[0].target, found[0].reason) == ("m", "a cloud model, $2.5 per million tokens")


class TestLaziness:
    def test_those_after_a_free_one_are_not_looked_at(self) -> None:
        groups = [[ours(f"t{place}")] for place in range(1000)]
        moment = Moment({"t0": FULL})
        chain = chain_of(groups, Demand())
        first = next(choose(chain, Demand(), moment.passing(groups)))
        assert first.id == "t1"
        assert moment.asked == ["t1"]

    def test_of_a_thousand_that_sleep_after_a_full_one_none_is_looked_at(self) -> None:
        groups = [[ours("t0")], *([ours(f"t{place}", rank=3)] for place in range(1, 1000)), [ours("ready")]]
        moment = Moment({"t0": FULL})
        chain = chain_of(groups, Demand())
        assert next(choose(chain, Demand(), moment.passing(groups))).id == "ready"
        assert moment.asked == ["t0", "ready"]

    def test_of_a_thousand_alike_one_is_looked_at(self) -> None:
        groups = [[ours(f"t{place}") for place in range(1000)]]
        moment = Moment({f"t{place}": (3, 0) for place in range(1000) if place != 500} | {"t500": (1, 0)})
        chain = chain_of(groups, Demand())
        assert next(choose(chain, Demand(), moment.passing(groups))).id == "t500"
        assert moment.asked == ["t500"]

    def test_what_changed_while_the_first_was_tried_counts_for_the_next(self) -> None:
        groups = [[ours("a")], [ours("b")], [ours("c")]]
        moment = Moment()
        targets = choose(chain_of(groups, Demand()), Demand(), moment.passing(groups))
        assert next(targets).id == "a"
        moment.failed["b"] = "it failed"
        assert [each.id for each in targets] == ["c"]


# Any chain at any moment.

NAMES = [f"t{place}" for place in range(8)]


@st.composite
def candidates(draw: st.DrawFn, name: str) -> Candidate:
    return Candidate(
        id=name,
        kind=draw(st.sampled_from(TargetKind)),
        owned=draw(st.booleans()),
        refusal=draw(st.sampled_from(["", "", "", "gone"])),
        rank=draw(st.integers(0, 3)),
        known=draw(st.sampled_from([True, True, True, False])),
        slots=draw(st.sampled_from([0, 1, 4])),
        capabilities=frozenset(draw(st.sets(st.sampled_from(["chat", "tools"])))),
        context_tokens=draw(st.sampled_from([0, 100, 1000])),
    )


@st.composite
def chains(draw: st.DrawFn) -> list[list[Candidate]]:
    """Entries that may stand for the same candidates."""
    known = {name: draw(candidates(name)) for name in NAMES}
    names = st.lists(st.sampled_from(NAMES), max_size=5, unique=True)
    return [[known[name] for name in group] for group in draw(st.lists(names, max_size=5))]


demands = st.builds(
    Demand,
    capabilities=st.sampled_from([frozenset(), frozenset({"tools"})]),
    context_tokens=st.sampled_from([0, 100, 500]),
    local_only=st.booleans(),
    priority=st.sampled_from(Priority),
)
moments = st.builds(
    Moment,
    st.dictionaries(st.sampled_from(NAMES), st.tuples(st.integers(0, 4), st.integers(0, 2))),
    st.dictionaries(st.sampled_from(NAMES), st.just("it failed")),
)


@settings(max_examples=60)
@given(chains(), demands, moments)
def test_each_candidate_is_tried_once_or_has_a_reason(
    groups: list[list[Candidate]], demand: Demand, moment: Moment
) -> None:
    chain, passing = chain_of(groups, demand), moment.passing(groups)
    known = {each.id: each for group in groups for each in group}
    tried = [each.id for each in choose(chain, demand, passing)]
    assert len(tried) == len(set(tried))
    found = explain(chain, demand, passing)
    assert [each.target for each in found[: len(tried)]] == tried
    assert sorted(each.target for each in found) == sorted(known)
    assert [each.target for each in found if each.taken] == tried[:1]
    for each in found[len(tried) :]:
        candidate = known[each.target]
        able = (
            not candidate.refusal
            and (candidate.owned or not demand.local_only)
            and demand.capabilities <= candidate.capabilities
            and not 0 < candidate.context_tokens < demand.context_tokens
            and candidate.id not in moment.failed
        )
        assert not able
        assert each.reason


@settings(max_examples=60)
@given(chains(), demands, moments)
def test_the_first_is_as_rules_say_when_they_are_read_one_by_one(
    groups: list[list[Candidate]], demand: Demand, moment: Moment
) -> None:
    """The plain reading of the rules, with a look at every target."""
    chain, passing = chain_of(groups, demand), moment.passing(groups)
    tried = list(choose(chain, demand, passing))
    busy = [each for each in tried if each.id in passing.full or not each.known]

    def turn(candidate: Candidate) -> int:
        """1 for those that are free, 2 for those that are busy or would be woken, 3 for what costs money."""
        if candidate in busy:
            return 2
        if not any(_tier(groups, each) < _tier(groups, candidate) for each in busy):
            return 1
        if not candidate.owned and demand.priority is not Priority.USER:
            return 3
        return 2 if candidate.rank else 1

    assert [turn(each) for each in tried] == sorted(turn(each) for each in tried)
    for one, other in zip(tried, islice(tried, 1, None), strict=False):
        if turn(one) == turn(other) and (turn(one) < 3 or (one.rank == 0) is (other.rank == 0)):
            assert _key(chain, groups, one, passing) <= _key(chain, groups, other, passing)


@settings(max_examples=60)
@given(chains(), demands, moments)
def test_local_only_never_leaves_hardware_of_ours(
    groups: list[list[Candidate]], demand: Demand, moment: Moment
) -> None:
    local = Demand(
        capabilities=demand.capabilities,
        context_tokens=demand.context_tokens,
        priority=demand.priority,
        local_only=True,
    )
    tried = choose(chain_of(groups, local), local, moment.passing(groups))
    assert all(each.owned for each in tried)


def _key(
    chain: Chain, groups: Sequence[Group], candidate: Candidate, passing: Passing
) -> tuple[int, int, float, int]:
    entry, rank = _tier(groups, candidate)
    return entry, rank, passing.pressure.get(candidate.id, 0.0), chain.ids.index(candidate.id)


def _tier(groups: Sequence[Group], candidate: Candidate) -> tuple[int, int]:
    """Its entry, which is the first that stands for it, and how near it is to answering."""
    return next(place for place, group in enumerate(groups) if candidate in group), candidate.rank
