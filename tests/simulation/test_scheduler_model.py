"""Whatever happens on a node, in whatever order, the scheduler agrees with a plain reference of it.

Hypothesis chooses what happens next and, where the two disagree, finds the shortest story that shows it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from controlplane.simulation import VirtualTimeLoop
from rung.types import Priority, ReclaimGrade
from tests.fakes.simulated_pool import GIB, Fault
from tests.simulation.model import Shape, World

MIB = 1 << 20
SHARES = st.sampled_from([0.1, 0.5, 1.0])
CHOICES = st.integers(0, 99)


class AnyStory(RuleBasedStateMachine):
    """One node, from its start until everybody has let go."""

    def __init__(self) -> None:
        super().__init__()
        self._loop = asyncio.Runner(loop_factory=VirtualTimeLoop)
        self.world: World | None = None

    @initialize(
        shape=st.builds(
            Shape,
            sizes_gib=st.lists(st.integers(3, 13), min_size=2, max_size=4).map(tuple),
            pinned_gib=st.integers(4, 8),
            shrinkable=st.booleans(),
            slot=st.booleans(),
            fresh=st.booleans(),
        )
    )
    def begins(self, shape: Shape) -> None:
        async def begin() -> World:
            return World(shape)

        self.world = self._loop.run(begin())

    @property
    def here(self) -> World:
        assert self.world is not None
        return self.world

    def happens(self, what: Coroutine[Any, Any, None]) -> None:
        """Something happens, and then the scheduler must agree with the reference."""

        async def happen() -> None:
            await what
            await self.here.check()

        self._loop.run(happen())

    def _one_of(self, names: list[str], choice: int) -> str:
        return names[choice % len(names)]

    # Who asks.

    @rule(
        vram_mib=st.integers(512, 6 * 1024) | st.integers(10 * 1024, 20 * 1024),
        priority=st.sampled_from(list(Priority)),
        grade=st.sampled_from(
            [ReclaimGrade.FULL, ReclaimGrade.STANDARD, ReclaimGrade.FULL, ReclaimGrade.QUICK]
        ),
        ttl_s=st.sampled_from([3.0, 30.0, 200.0]),
        cache=st.sampled_from([False, False, True]),
    )
    def asks(self, vram_mib: int, priority: Priority, grade: ReclaimGrade, ttl_s: float, cache: bool) -> None:
        self.happens(self.here.asks(vram_mib * MIB, priority, grade, ttl_s, "cache" if cache else ""))

    @rule(vram_gib=st.integers(20, 27), ttl_s=st.sampled_from([3.0, 30.0]))
    def asks_for_nearly_all(self, vram_gib: int, ttl_s: float) -> None:
        self.happens(self.here.asks(vram_gib * GIB, Priority.USER, ReclaimGrade.FULL, ttl_s, ""))

    @rule(choice=CHOICES, priority=st.sampled_from(list(Priority)))
    def needs(self, choice: int, priority: Priority) -> None:
        name = self._one_of([each.name for each in self.here.models], choice)
        self.happens(self.here.needs(name, priority))

    @precondition(lambda self: self.here.waiting())
    @rule(choice=CHOICES)
    def loses_patience(self, choice: int) -> None:
        waiting = self.here.waiting()
        self.happens(self.here.leaves(waiting[choice % len(waiting)]))

    # Who holds.

    @precondition(lambda self: self.here.held)
    @rule(choice=CHOICES, share=SHARES)
    def takes(self, choice: int, share: float) -> None:
        self.happens(self.here.takes(self._one_of(list(self.here.held), choice), share))

    @precondition(lambda self: self.here.held)
    @rule(choice=CHOICES)
    def renews(self, choice: int) -> None:
        self.happens(self.here.renews(self._one_of(list(self.here.held), choice)))

    @precondition(lambda self: self.here.held)
    @rule(choice=CHOICES)
    def asks_again(self, choice: int) -> None:
        self.happens(self.here.asks_again(self._one_of(list(self.here.held), choice)))

    @precondition(lambda self: self.here.held)
    @rule(choice=CHOICES, times=st.integers(1, 3))
    def stays(self, choice: int, times: int) -> None:
        self.happens(self.here.stays(self._one_of(list(self.here.held), choice), times))

    @precondition(lambda self: self.here.held)
    @rule(choice=CHOICES, share=SHARES, prompt=st.booleans())
    def takes_and_releases(self, choice: int, share: float, prompt: bool) -> None:
        async def take_and_release() -> None:
            lease_id = self._one_of(list(self.here.held), choice)
            await self.here.takes(lease_id, share)
            await self.here.releases(lease_id, prompt=prompt)

        self.happens(take_and_release())

    @precondition(lambda self: bool(set(self.here.pool.held_bytes) - set(self.here.held)))
    @rule()
    def programs_without_a_lease_end(self) -> None:
        self.happens(self.here.programs_end())

    # What time brings.

    @rule(seconds=st.sampled_from([0.1, 0.5, 1.0, 2.5]))
    def a_moment_passes(self, seconds: float) -> None:
        self.happens(self.here.passes(seconds))

    @rule(seconds=st.sampled_from([6.0, 15.0, 120.0]))
    def a_while_passes(self, seconds: float) -> None:
        self.happens(self.here.passes(seconds))

    @rule(share=SHARES)
    def a_game_takes_memory(self, share: float) -> None:
        self.happens(self.here.plays(share))

    @rule()
    def the_game_ends(self) -> None:
        self.happens(self.here.plays(0.0))

    @rule(choice=CHOICES, requests=st.integers(0, 2))
    def is_used(self, choice: int, requests: int) -> None:
        name = self._one_of([each.name for each in self.here.models], choice)
        self.happens(self.here.is_used(name, requests))

    # What goes wrong.

    @rule(choice=CHOICES, fault=st.sampled_from([each for each in Fault if each is not Fault.NONE]))
    def an_engine_misbehaves(self, choice: int, fault: Fault) -> None:
        self.happens(self.here.goes_wrong(self._one_of(list(self.here.pool.engines), choice), fault))

    @precondition(lambda self: self.here.settled())
    @rule(choice=CHOICES)
    def an_engine_dies(self, choice: int) -> None:
        self.happens(self.here.dies(self._one_of(self.here.settled(), choice)))

    @precondition(lambda self: self.here.settled())
    @rule(choice=CHOICES)
    def an_operator_forces_one_down(self, choice: int) -> None:
        self.happens(self.here.is_forced_down(self._one_of(self.here.settled(), choice)))

    @precondition(lambda self: not self.here.fresh)
    @rule(seconds=st.sampled_from([1.0, 4.0, 12.0]), stale=st.booleans())
    def telemetry_stops(self, seconds: float, stale: bool) -> None:
        self.happens(self.here.telemetry_stops(seconds, stale=stale))

    def teardown(self) -> None:
        with self._loop:
            if self.world is not None:  # an example may end before it begins
                try:
                    self._loop.run(self.world.ends())
                finally:
                    self._loop.run(self.world.close())


AnyStory.TestCase.settings = settings(
    max_examples=100,
    stateful_step_count=40,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestAnyStory = AnyStory.TestCase
