"""Steps of a plan: carried out one at a time, told to who waits, and remembered."""

from __future__ import annotations

import asyncio

from controlplane.vram._events import Step, StepState
from controlplane.vram._gauge import Gauge
from controlplane.vram._ledger import Ledger
from controlplane.vram._obedience import Obedience
from controlplane.vram._pending import Pending
from controlplane.vram._plan import apply
from controlplane.vram._ports import Executor, SchedulerOptions
from controlplane.vram._swaps import Swaps
from rung.errors import RungError
from rung.types import ReclaimPlan, ReclaimStep


class Steps:
    """Takes steps, within their deadlines.

    Args:
        executor: carries them out.
        gauge: is told that what it measured is past.
        obedience: remembers who did as told.
        swaps: writes down whose turn is taken away.
        options: deadlines.
    """

    def __init__(
        self,
        *,
        executor: Executor,
        gauge: Gauge,
        obedience: Obedience,
        swaps: Swaps,
        options: SchedulerOptions,
    ) -> None:
        self._executor = executor
        self._gauge = gauge
        self._obedience = obedience
        self._swaps = swaps
        self._options = options

    async def take(self, pending: Pending, ledger: Ledger, outcome: ReclaimPlan) -> None:
        """Take the first step of a plan, and tell of it.

        Raises:
            RungError: it is never to be taken, or could not be written down.
        """
        step = outcome.steps[0]
        apply(ledger, step)  # refuses what must never be done, whatever the plan says
        await self._swaps.before(step, pending.demand, ledger)
        began_s = _now_s()
        after = " once its requests have ended" if step.drain else ""
        pending.wait(f"{step.deployment_id} is told to {step.action}{after}", outcome.expected_s)
        pending.tell(Step(step=step, state=StepState.BEGUN))
        freed_bytes, failure = await self.carry_out(pending.pool_id, step)
        pending.tell(
            Step(
                step=step,
                state=StepState.FAILED if failure else StepState.DONE,
                freed_bytes=freed_bytes,
                elapsed_s=_now_s() - began_s,
                detail=failure,
            )
        )

    async def carry_out(self, pool_id: str, step: ReclaimStep) -> tuple[int, str]:
        """Take a step: the bytes that it freed, and why it failed if it did."""
        limit_s = self._options.deadline_s(step.expected_s)
        freed_bytes, failure = 0, ""
        try:
            async with asyncio.timeout(limit_s):
                measured = await self._executor.carry_out(pool_id, step)
            freed_bytes = measured.freed_bytes
        except TimeoutError:
            failure = f"{step.action} of {step.deployment_id} was not over after {limit_s:.0f} s"
        except RungError as error:
            failure = error.message
        now_s = _now_s()
        self._gauge.stepped(pool_id)
        if failure:
            self._obedience.refused(step, failure, now_s)
            self._swaps.failed(step, now_s + self._options.backoff_s)
        else:
            self._obedience.carried_out(step, freed_bytes, now_s)
        return freed_bytes, failure


def _now_s() -> float:
    return asyncio.get_running_loop().time()
