"""Circuits: when a target is left alone, for how long, and who tries it again."""

from __future__ import annotations

import math

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from controlplane.ladder import CircuitOptions, Circuits, CircuitState

OPTIONS = CircuitOptions(failures=3, first_open_s=2.0, longest_open_s=60.0, longest_retry_after_s=600.0)
#: The clock of a machine that has run for a while.
NOW_S = 1000.0


def circuits(jitter: float = 1.0) -> Circuits:
    return Circuits(jitter=lambda: jitter, options=OPTIONS)


def opened(now_s: float = NOW_S, jitter: float = 1.0) -> Circuits:
    """The circuit of `a` has just opened."""
    found = circuits(jitter)
    for _ in range(OPTIONS.failures):
        found.failed("a", now_s, "HTTP 503")
    return found


def open_for_s(found: Circuits, now_s: float) -> float:
    """How long `a` is left alone from now on, to a hundredth of a second."""
    hundredths = next(each for each in range(10_000_000) if found.allows("a", now_s + each / 100))
    return hundredths / 100


class TestOpening:
    def test_it_opens_with_the_third_failure_in_a_row(self) -> None:
        found = circuits()
        for _ in range(2):
            found.failed("a", NOW_S, "HTTP 503")
            assert found.state("a", NOW_S) is CircuitState.CLOSED
            assert found.allows("a", NOW_S)
        found.failed("a", NOW_S, "HTTP 503")
        assert found.state("a", NOW_S) is CircuitState.OPEN
        assert found.refusal("a", NOW_S) == "it failed (HTTP 503); it is tried again in 2 s"

    def test_an_answer_in_between_begins_the_count_anew(self) -> None:
        found = circuits()
        for _ in range(10):
            found.failed("a", NOW_S, "x")
            found.failed("a", NOW_S, "x")
            found.succeeded("a")
        assert found.allows("a", NOW_S)

    def test_others_are_not_concerned(self) -> None:
        found = opened()
        assert found.refusal("b", NOW_S) == ""
        assert found.state("b", NOW_S) is CircuitState.CLOSED

    def test_nothing_is_remembered_of_those_that_answer(self) -> None:
        found = opened()
        assert found
        found.succeeded("a")
        found.succeeded("never-failed")
        assert not found

    def test_an_engine_that_breaks_each_answer_off_opens_it_too(self) -> None:
        found = circuits()
        for _ in range(3):
            found.begin("a", NOW_S)
            found.answers("a")
            found.failed("a", NOW_S, "cut in mid-answer")
        assert not found.allows("a", NOW_S)

    def test_requests_that_were_under_way_when_it_opened_do_not_prolong_it(self) -> None:
        found = opened()
        for _ in range(20):
            found.failed("a", NOW_S + 1.0, "HTTP 503")
        assert found.allows("a", NOW_S + 2.0)


class TestBackoff:
    def test_each_failed_probe_doubles_it_up_to_the_bound(self) -> None:
        found, now_s, waits = opened(), NOW_S, []
        for _ in range(8):
            wait_s = open_for_s(found, now_s)
            waits.append(wait_s)
            now_s += wait_s
            found.begin("a", now_s)
            found.failed("a", now_s, "still down")
        assert waits == [2.0, 4.0, 8.0, 16.0, 32.0, 60.0, 60.0, 60.0]

    def test_after_an_answer_it_begins_small_again(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 2.0)
        found.failed("a", NOW_S + 2.0, "x")
        found.begin("a", NOW_S + 6.0)
        found.succeeded("a")
        for _ in range(3):
            found.failed("a", NOW_S + 7.0, "x")
        assert open_for_s(found, NOW_S + 7.0) == 2.0

    @pytest.mark.parametrize("jitter", [0.75, 1.25])
    def test_jitter_is_a_factor_of_the_time_and_of_nothing_else(self, jitter: float) -> None:
        assert open_for_s(opened(jitter=jitter), NOW_S) == 2.0 * jitter
        asked = circuits(jitter)
        asked.failed("a", NOW_S, "HTTP 429", retry_after_s=8.0)
        assert open_for_s(asked, NOW_S) == 8.0


class TestRetryAfter:
    def test_one_failure_that_names_a_time_is_enough(self) -> None:
        found = circuits()
        found.failed("a", NOW_S, "HTTP 429", retry_after_s=30.0)
        assert open_for_s(found, NOW_S) == 30.0

    def test_it_may_be_longer_than_our_own_bound_but_not_endless(self) -> None:
        for asked_s in (1e9, math.inf):
            found = circuits()
            found.failed("a", NOW_S, "HTTP 429", retry_after_s=asked_s)
            assert open_for_s(found, NOW_S) == OPTIONS.longest_retry_after_s

    def test_a_later_shorter_one_does_not_shorten_it(self) -> None:
        found = circuits()
        found.failed("a", NOW_S, "HTTP 429", retry_after_s=30.0)
        found.failed("a", NOW_S + 1.0, "HTTP 429", retry_after_s=5.0)
        assert open_for_s(found, NOW_S) == 30.0

    @pytest.mark.parametrize("asked_s", [0.0, -5.0, math.nan])
    def test_no_time_at_all_is_a_failure_as_any_other(self, asked_s: float) -> None:
        found = circuits()
        for _ in range(2):
            found.failed("a", NOW_S, "HTTP 503", retry_after_s=asked_s)
            assert found.allows("a", NOW_S)
        found.failed("a", NOW_S, "HTTP 503", retry_after_s=asked_s)
        assert open_for_s(found, NOW_S) == 2.0


class TestProbe:
    def test_exactly_one_request_tries_it_again(self) -> None:
        found = opened()
        now_s = NOW_S + 2.0
        assert found.state("a", now_s) is CircuitState.HALF_OPEN
        assert found.allows("a", now_s)
        found.begin("a", now_s)
        assert not found.allows("a", now_s + 500.0)
        assert found.refusal("a", now_s) == "it failed (HTTP 503); one request is trying it again"

    def test_others_come_back_as_soon_as_it_begins_to_answer(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 2.0)
        found.answers("a")
        assert found.allows("a", NOW_S + 2.0)
        assert found.state("a", NOW_S + 2.0) is CircuitState.CLOSED

    def test_a_probe_that_is_cut_in_mid_answer_opens_it_for_longer(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 2.0)
        found.answers("a")
        found.failed("a", NOW_S + 3.0, "cut")
        assert open_for_s(found, NOW_S + 3.0) == 4.0

    def test_a_probe_that_fails_is_enough_also_where_one_failure_had_opened_it(self) -> None:
        found = circuits()
        found.failed("a", NOW_S, "HTTP 429", retry_after_s=5.0)
        found.begin("a", NOW_S + 5.0)
        found.failed("a", NOW_S + 5.0, "HTTP 500")
        assert open_for_s(found, NOW_S + 5.0) == 2.0

    def test_one_whose_caller_left_tells_nothing_and_the_next_may_try(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 2.0)
        found.abandoned("a")
        assert found.allows("a", NOW_S + 2.0)
        assert found.state("a", NOW_S + 2.0) is CircuitState.HALF_OPEN

    def test_a_request_that_goes_there_regardless_while_it_is_open_is_no_probe(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 1.0)
        assert found.allows("a", NOW_S + 2.0)

    def test_success_lets_everybody_in(self) -> None:
        found = opened()
        found.begin("a", NOW_S + 2.0)
        found.succeeded("a")
        assert found.allows("a", NOW_S + 2.0)
        assert not found


class CircuitMachine(RuleBasedStateMachine):
    """One target through any history of requests, beside what must hold of it.

    Requests are sent as the engager sends them: begun only where they are allowed, and ended in one way.
    """

    def __init__(self) -> None:
        super().__init__()
        self.circuits = circuits()
        self.now_s = NOW_S
        self.running = 0
        self.probing = False
        #: Since the last whole answer.
        self.failures = 0
        self.left_alone_until_s = 0.0

    @rule(seconds=st.integers(0, 90))
    def time_passes(self, seconds: int) -> None:
        self.now_s += seconds

    @rule()
    def a_request_comes(self) -> None:
        if not self.circuits.allows("a", self.now_s):
            return
        assert not self.probing, "a second probe"
        assert self.now_s >= self.left_alone_until_s, "what the target asked for was not honoured"
        self.probing = self.circuits.state("a", self.now_s) is CircuitState.HALF_OPEN
        self.circuits.begin("a", self.now_s)
        self.running += 1

    @rule()
    def one_succeeds(self) -> None:
        if self.running:
            self.running -= 1
            self.circuits.succeeded("a")
            self.probing, self.failures, self.left_alone_until_s = False, 0, 0.0
            assert self.circuits.allows("a", self.now_s)

    @rule(retry_after_s=st.none() | st.integers(0, 2000))
    def one_fails(self, retry_after_s: int | None) -> None:
        if not self.running:
            return
        self.running -= 1
        self.failures += 1
        self.circuits.failed("a", self.now_s, "x", retry_after_s=retry_after_s)
        if retry_after_s:
            asked_s = min(retry_after_s, OPTIONS.longest_retry_after_s)
            self.left_alone_until_s = max(self.left_alone_until_s, self.now_s + asked_s)
            assert not self.circuits.allows("a", self.now_s)
        elif self.probing or self.failures >= OPTIONS.failures:
            assert not self.circuits.allows("a", self.now_s)
        self.probing = False

    @rule()
    def the_caller_of_the_only_one_leaves(self) -> None:
        if self.running == 1:
            self.running = 0
            self.circuits.abandoned("a")
            self.probing = False

    @invariant()
    def a_word_is_said_whenever_it_is_refused(self) -> None:
        assert bool(self.circuits.refusal("a", self.now_s)) is not self.circuits.allows("a", self.now_s)

    @invariant()
    def it_comes_back_within_the_bound(self) -> None:
        if not self.probing:
            until_s = max(self.left_alone_until_s, self.now_s + OPTIONS.longest_open_s)
            assert self.circuits.allows("a", until_s)

    @invariant()
    def it_is_closed_after_a_whole_answer(self) -> None:
        if not self.failures and not self.probing:
            assert self.circuits.state("a", self.now_s) is CircuitState.CLOSED


TestAnyHistory = CircuitMachine.TestCase
TestAnyHistory.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
