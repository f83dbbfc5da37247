"""From how things are to how a profile wants them: which steps, and in which order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace

from controlplane.profiles import Pool, Standing, plan_return, plan_switch
from rung.errors import ConfigError, VramInfeasibleError
from rung.types import Profile, ProfileEntry, ProfileStep, Residency, ResidencyClass

GIB = 1 << 30
POOL = "box/0"
AWAKE, ASLEEP, STOPPED = Residency.AWAKE, Residency.ASLEEP, Residency.STOPPED


def a_standing(name: str, residency: Residency, gib: int = 8, **fields: object) -> Standing:
    """A sleeper that holds so much when it is awake, and 1 GiB asleep."""
    held = {AWAKE: gib * GIB, ASLEEP: GIB}.get(residency, 0)
    standing = Standing(
        deployment_id=name,
        residency=residency,
        residency_class=ResidencyClass.SLEEPABLE,
        pool_id=POOL,
        resident_bytes=held,
        awake_bytes=gib * GIB,
        asleep_bytes=GIB,
        can_sleep=True,
    )
    return replace(standing, **fields)


def a_pool(standings: list[Standing], total_gib: int = 32) -> dict[str, Pool]:
    held_bytes = sum(each.resident_bytes for each in standings)
    available_bytes = total_gib * GIB - GIB - held_bytes
    return {POOL: Pool(total_bytes=total_gib * GIB, reserve_bytes=GIB, available_bytes=available_bytes)}


def by_id(*standings: Standing) -> dict[str, Standing]:
    return {each.deployment_id: each for each in standings}


def a_profile(**wanted: Residency | tuple[Residency, float]) -> Profile:
    entries = (
        ProfileEntry(name, *each) if isinstance(each, tuple) else ProfileEntry(name, each)
        for name, each in wanted.items()
    )
    return Profile(name="wanted", entries=tuple(entries))


def planned(profile: Profile, *standings: Standing) -> list[tuple[str, Residency]]:
    steps = plan_switch(profile, by_id(*standings), a_pool(list(standings)))
    return [(step.deployment_id, step.residency) for step in steps]


def test_what_is_as_it_is_wanted_needs_no_steps() -> None:
    standings = (a_standing("a", AWAKE), a_standing("b", ASLEEP), a_standing("c", STOPPED))
    assert planned(a_profile(a=AWAKE, b=ASLEEP, c=STOPPED), *standings) == []


def test_memory_is_freed_before_it_is_taken() -> None:
    standings = (a_standing("a", STOPPED, 16), a_standing("b", AWAKE, 16), a_standing("c", AWAKE, 8))
    assert planned(a_profile(a=AWAKE, b=STOPPED, c=ASLEEP), *standings) == [
        ("b", STOPPED),
        ("c", ASLEEP),
        ("a", AWAKE),
    ]


def test_what_is_to_sleep_and_is_down_is_started_first_while_there_is_most_room() -> None:
    standings = (a_standing("a", STOPPED), a_standing("b", STOPPED), a_standing("c", AWAKE))
    assert planned(a_profile(a=AWAKE, b=ASLEEP, c=STOPPED), *standings) == [
        ("c", STOPPED),
        ("b", AWAKE),
        ("b", ASLEEP),
        ("a", AWAKE),
    ]


def test_another_share_of_the_gpu_starts_an_engine_anew() -> None:
    standing = a_standing("a", AWAKE, configured_utilization=0.25, running_utilization=0.25)
    steps = plan_switch(a_profile(a=(AWAKE, 0.5)), by_id(standing), a_pool([standing]))
    assert [(step.residency, step.detail) for step in steps] == [
        (STOPPED, "stop, to start with 50% of the GPU in place of 25% (frees 8.0 GiB)"),
        (AWAKE, "start (with 50% of the GPU)"),
    ]


def test_a_share_that_no_profile_names_is_its_own_again() -> None:
    standing = a_standing("a", AWAKE, configured_utilization=0.25, running_utilization=0.5)
    assert planned(a_profile(a=AWAKE), standing) == [("a", STOPPED), ("a", AWAKE)]
    asleep = replace(standing, residency=ASLEEP, resident_bytes=GIB)
    assert planned(a_profile(a=ASLEEP), asleep) == [("a", STOPPED), ("a", AWAKE), ("a", ASLEEP)]


def test_one_that_is_down_just_starts_with_the_other_share() -> None:
    standing = a_standing("a", STOPPED, configured_utilization=0.25)
    steps = plan_switch(a_profile(a=(AWAKE, 0.5)), by_id(standing), a_pool([standing]))
    assert [step.detail for step in steps] == ["start (with 50% of the GPU)"]


def test_what_the_profile_does_not_name_gives_way_only_if_its_memory_is_needed() -> None:
    standings = (a_standing("a", STOPPED, 16), a_standing("b", AWAKE, 12), a_standing("c", AWAKE, 10))
    assert planned(a_profile(a=AWAKE), *standings) == [("b", ASLEEP), ("a", AWAKE)]
    fits = (a_standing("a", STOPPED, 8), *standings[1:])
    assert planned(a_profile(a=AWAKE), *fits) == [("a", AWAKE)]


def test_what_gives_way_and_is_no_sleeper_stops() -> None:
    burst = a_standing("b", AWAKE, 24, residency_class=ResidencyClass.ON_DEMAND, can_sleep=False)
    assert planned(a_profile(a=AWAKE), a_standing("a", STOPPED, 16), burst) == [("b", STOPPED), ("a", AWAKE)]


def test_what_does_not_fit_whatever_gives_way_is_refused() -> None:
    # 20 GiB are nobody's: a game, say.
    standing = a_standing("a", STOPPED, 16)
    pool = {POOL: Pool(total_bytes=32 * GIB, reserve_bytes=GIB, available_bytes=11 * GIB)}
    with pytest.raises(VramInfeasibleError, match=r"does not fit box/0 now: 5\.0 GiB are held"):
        plan_switch(a_profile(a=AWAKE), by_id(standing), pool)


def test_a_sum_that_does_not_fit_is_refused_with_the_sum() -> None:
    pinned = a_standing("p", AWAKE, 10, residency_class=ResidencyClass.PINNED)
    standings = (pinned, a_standing("a", STOPPED, 16), a_standing("b", STOPPED, 8))
    with pytest.raises(ConfigError, match=r"p 10\.0 GiB \+ a 16\.0 GiB \+ b 8\.0 GiB .* 3\.0 GiB too much"):
        planned(a_profile(a=AWAKE, b=AWAKE), *standings)


@pytest.mark.parametrize("wanted", [AWAKE, ASLEEP, STOPPED])
def test_a_pinned_one_is_never_taken_down_whatever_is_wanted(wanted: Residency) -> None:
    pinned = a_standing(
        "p",
        AWAKE,
        residency_class=ResidencyClass.PINNED,
        configured_utilization=0.3,
        running_utilization=0.2,
    )
    assert planned(a_profile(p=(wanted, 0.3)), pinned) == []
    assert plan_return(a_profile(p=wanted).entries, by_id(pinned)) == ()


residencies = st.sampled_from(
    [AWAKE, ASLEEP, STOPPED, Residency.FAILED, Residency.STARTING, Residency.WAKING]
)
classes = st.sampled_from(list(ResidencyClass))
shares = st.sampled_from([0.0, 0.05, 0.1])


@st.composite
def fleets(draw: st.DrawFn) -> tuple[Profile, dict[str, Standing]]:
    names = [f"d{place}" for place in range(draw(st.integers(1, 6)))]
    standings = []
    for name in names:
        residency = draw(residencies)
        own = draw(shares)
        standing = a_standing(
            name,
            residency,
            draw(st.integers(1, 3)),
            residency_class=draw(classes),
            configured_utilization=own,
            running_utilization=draw(shares) if residency not in (STOPPED, Residency.FAILED) else 0.0,
            external=draw(st.booleans()),
        )
        standings.append(standing)
    named = draw(st.lists(st.sampled_from(names), unique=True))
    entries = tuple(
        ProfileEntry(name, draw(st.sampled_from([AWAKE, ASLEEP, STOPPED])), draw(shares)) for name in named
    )
    return Profile(name="any", entries=entries), by_id(*standings)


def after(
    standings: dict[str, Standing], steps: tuple[ProfileStep, ...], profile: Profile
) -> dict[str, Standing]:
    """How things stand once the steps were taken."""
    found = dict(standings)
    wanted = {entry.deployment_id: entry.gpu_memory_utilization for entry in profile.entries}
    for step in steps:
        was = found[step.deployment_id]
        share = was.running_utilization
        if step.residency is STOPPED:
            share = 0.0
        elif not was.runs:
            share = wanted.get(step.deployment_id, 0.0) or was.configured_utilization
        found[step.deployment_id] = replace(was, residency=step.residency, running_utilization=share)
    return found


@given(fleets())
def test_a_plan_leads_to_what_is_wanted_and_touches_nothing_that_is_pinned(
    found: tuple[Profile, dict[str, Standing]],
) -> None:
    profile, standings = found
    pool = {POOL: Pool(total_bytes=400 * GIB, reserve_bytes=GIB, available_bytes=300 * GIB)}
    steps = plan_switch(profile, standings, pool)

    assert len({(step.deployment_id, step.residency) for step in steps}) == len(steps)
    for step in steps:
        standing = standings[step.deployment_id]
        assert step.residency is AWAKE or not (standing.pinned or standing.external)
    # Once it was done, nothing is left to do.
    assert plan_switch(profile, after(standings, steps, profile), pool) == ()


@given(fleets())
def test_the_way_back_leads_to_how_things_were(found: tuple[Profile, dict[str, Standing]]) -> None:
    profile, standings = found
    pool = {POOL: Pool(total_bytes=400 * GIB, reserve_bytes=GIB, available_bytes=300 * GIB)}
    steps = plan_switch(profile, standings, pool)
    settled = {Residency.FAILED: STOPPED, Residency.STARTING: AWAKE, Residency.WAKING: AWAKE}
    before = Profile(
        name="before",
        entries=tuple(
            ProfileEntry(name, settled.get(each.residency, each.residency), each.running_utilization)
            for name, each in standings.items()
            if name in {step.deployment_id for step in steps}
        ),
    )
    there = after(standings, steps, profile)
    back = after(there, plan_return(before.entries, there), before)

    for entry in before.entries:
        standing = back[entry.deployment_id]
        if standing.pinned or standing.external:
            continue
        assert standing.residency is entry.residency or not standing.runs
        if standing.runs and entry.gpu_memory_utilization:
            assert standing.running_utilization == entry.gpu_memory_utilization
