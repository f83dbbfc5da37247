"""The ladder as configured: exact boundaries, and what is said of one that cannot be meant."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from controlplane.ladder import (
    MAX_EFFORT,
    MIN_EFFORT,
    REASON_EFFORT,
    Ladder,
    LadderError,
    Modality,
    RungSpec,
    build_ladder,
)
from rung.errors import InvalidRequestError

CHAINS = {"quick": ["orchestrator"], "reasoning": ["spark/qwen", "thinker", "deepseek/deepseek-chat"]}


def a_rung(
    name: str,
    first: int,
    last: int,
    *,
    modality: Modality = Modality.CHAT,
    chain: str = "quick",
    reason: str = "",
) -> RungSpec:
    return RungSpec(
        name=name, modality=modality, min_effort=first, max_effort=last, chain=chain, reason=reason
    )


def a_ladder() -> Ladder:
    return build_ladder([a_rung("easy", 1, 6), a_rung("hard", 7, 10, reason="reasoning")], CHAINS)


class TestBoundaries:
    @pytest.mark.parametrize("effort", range(MIN_EFFORT, MAX_EFFORT + 1))
    def test_the_reason_tool_is_offered_from_7_on_and_never_below(self, effort: int) -> None:
        rung = a_ladder().rung(Modality.CHAT, effort)
        assert rung is not None
        assert rung.name == ("easy" if effort <= 6 else "hard")
        assert bool(rung.reason_chain) is (effort >= 7)

    def test_7_is_where_it_begins(self) -> None:
        assert REASON_EFFORT == 7

    @pytest.mark.parametrize("effort", [-1, 0, 11])
    def test_an_effort_is_1_to_10(self, effort: int) -> None:
        with pytest.raises(InvalidRequestError, match=f"effort is {effort}; it must be 1 to 10"):
            a_ladder().rung(Modality.CHAT, effort)

    def test_a_modality_without_rungs_has_none(self) -> None:
        assert a_ladder().rung(Modality.IMAGE, 3) is None
        assert a_ladder().modalities == {Modality.CHAT}

    def test_modalities_have_rungs_of_their_own(self) -> None:
        seeing = a_rung("seeing", 1, 10, modality=Modality.VISION, chain="reasoning")
        ladder = build_ladder([a_rung("all", 1, 10), seeing], CHAINS)
        found = ladder.rung(Modality.VISION, 5)
        assert found is not None
        assert found.chain == tuple(CHAINS["reasoning"])

    @given(st.sets(st.integers(2, 10)))
    def test_any_division_of_the_efforts_gives_each_the_rung_around_it(self, starts: set[int]) -> None:
        firsts = sorted({1, *starts})
        spans = list(zip(firsts, [*(each - 1 for each in firsts[1:]), 10], strict=True))
        ladder = build_ladder([a_rung(f"r{first}", first, last) for first, last in spans], CHAINS)
        for effort in range(1, 11):
            rung = ladder.rung(Modality.CHAT, effort)
            assert rung is not None
            assert rung.min_effort <= effort <= rung.max_effort

    def test_the_order_of_the_file_does_not_matter(self) -> None:
        ladder = build_ladder([a_rung("b", 6, 10), a_rung("a", 1, 5)], CHAINS)
        assert [rung.name for rung in ladder.rungs] == ["a", "b"]


class TestChains:
    def test_another_chain_is_written_out_in_its_place(self) -> None:
        chains = {"all": ["first", "@inner", "last"], "inner": ["@deep", "middle"], "deep": ["deepest"]}
        assert build_ladder([], chains).chains["all"] == ("first", "deepest", "middle", "last")

    def test_a_target_that_comes_by_two_ways_stays_where_it_was_first(self) -> None:
        chains = {"all": ["a", "@one", "@two", "b"], "one": ["b", "c"], "two": ["c", "a", "d"]}
        assert build_ladder([], chains).chains["all"] == ("a", "b", "c", "d")

    def test_two_rungs_may_share_one(self) -> None:
        ladder = build_ladder([a_rung("a", 1, 5), a_rung("b", 6, 10)], CHAINS)
        assert {rung.chain for rung in ladder.rungs} == {("orchestrator",)}


@pytest.mark.parametrize(
    ("rungs", "path", "message"),
    [
        ([a_rung("a", 1, 5), a_rung("b", 7, 10)], ("rungs",), "no rung of chat has effort 6"),
        ([a_rung("a", 3, 8)], ("rungs",), "no rung of chat has effort 1, 2, 9, 10"),
        (
            [a_rung("a", 1, 6), a_rung("b", 6, 10)],
            ("rungs", 1, "effort"),
            "effort 6 of chat is on two rungs, a and b",
        ),
        (
            [a_rung("a", 1, 10), a_rung("b", 1, 9, modality=Modality.VISION)],
            ("rungs",),
            "no rung of vision has effort 10",
        ),
        ([a_rung("a", 0, 10)], ("rungs", 0, "effort"), "is 0; an effort is 1 to 10"),
        ([a_rung("a", 1, 11)], ("rungs", 0, "effort"), "is 11; an effort is 1 to 10"),
        ([a_rung("a", 8, 3)], ("rungs", 0, "effort"), "begins at 8 and ends at 3, before it"),
        ([a_rung("a", 1, 5), a_rung("a", 6, 10)], ("rungs", 1, "name"), "a is used twice"),
        (
            [a_rung("a", 1, 10, chain="slow")],
            ("rungs", 0, "chain"),
            "there is no chain 'slow'; chains are: quick, reasoning",
        ),
        (
            [a_rung("a", 1, 10, chain="")],
            ("rungs", 0, "chain"),
            "there is no chain ''; chains are: quick, reasoning",
        ),
        (
            [a_rung("a", 1, 6), a_rung("b", 7, 10, reason="slow")],
            ("rungs", 1, "reason"),
            "there is no chain 'slow'; chains are: quick, reasoning",
        ),
        (
            [a_rung("a", 1, 5), a_rung("b", 6, 10, reason="reasoning")],
            ("rungs", 1, "reason"),
            "the reason tool is offered from effort 7 on, and this rung begins at 6; split it there",
        ),
    ],
)
def test_rungs_that_cannot_be_meant(rungs: list[RungSpec], path: tuple[str | int, ...], message: str) -> None:
    with pytest.raises(LadderError) as refused:
        build_ladder(rungs, CHAINS)
    assert (refused.value.path, str(refused.value)) == (path, message)


@pytest.mark.parametrize(
    ("chains", "path", "message"),
    [
        ({"a": []}, ("chains", "a"), "has no targets"),
        ({"a": ["x", "y", "x"]}, ("chains", "a", 2), "x is in the chain twice"),
        ({"a": ["x", "@b"]}, ("chains", "a", 1), "there is no chain 'b'; chains are: a"),
        ({"a": ["@a"]}, ("chains", "a", 0), "the chains go round in a circle: a → a"),
        (
            {"a": ["x", "@b"], "b": ["@c"], "c": ["y", "@a"]},
            ("chains", "c", 1),
            "the chains go round in a circle: a → b → c → a",
        ),
        # The ring does not lead back to where it was entered.
        (
            {"a": ["@b"], "b": ["@c"], "c": ["@b"]},
            ("chains", "c", 0),
            "the chains go round in a circle: b → c → b",
        ),
    ],
)
def test_chains_that_cannot_be_meant(
    chains: dict[str, list[str]], path: tuple[str | int, ...], message: str
) -> None:
    with pytest.raises(LadderError) as refused:
        build_ladder([], chains)
    assert (refused.value.path, str(refused.value)) == (path, message)
