"""What a pipeline is that makes something else than text or vectors, and what it is given."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Protocol

from controlplane.pipelines._begun import Begun
from controlplane.pipelines._wish import Wish
from rung.codec import GenerationEvent
from rung.errors import RungError
from rung.types import EngineInput


class GenerationPipeline(Protocol):
    """Carries out the jobs of one kind, or of several."""

    def prepared(self, wish: Wish) -> Wish:
        """The wish as it is to be begun, before there is a job; as it came if this does not say otherwise.

        Raises:
            InvalidRequestError: it asks for what there is not.
        """
        return wish

    async def run(self, begun: Begun) -> str:
        """Try the targets of a job until one gives a complete result; tells the job each step.

        It does not end the job: that is for the caller, also when this is cancelled.

        Returns:
            Why it ended, for the terminal event: `stop` where there is nothing to tell.

        Raises:
            RungError: what went wrong.
        """
        ...


class DeliveredError(Exception):
    """It went wrong after a part of the result was in the job's log: no other target may begin anew."""

    def __init__(self, error: RungError) -> None:
        super().__init__(error.message)
        self.error = error


class GenerationFleet(Protocol):
    """What such a pipeline needs of the fleet, as `controlplane.fleet.Fleet` has it."""

    def generate_through_agent(
        self, deployment_id: str, job_id: str, wanted: EngineInput, idle_timeout_s: float
    ) -> AsyncGenerator[GenerationEvent, None]:
        """One generation by an engine with a dialect of its own. Raises as `AgentClient.generate`."""
        ...
