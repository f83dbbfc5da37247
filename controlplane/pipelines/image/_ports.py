"""What the pipeline of pictures needs of others."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Protocol

from rung.codec import GenerationEvent
from rung.types import ImageInput

#: Takes what comes of a generation, piece by piece.
OnEvent = Callable[[GenerationEvent], Awaitable[None]]


class CloudImages(Protocol):
    """Cloud models that draw."""

    def model_name(self, target_id: str) -> str:
        """The provider's own name of a model."""
        ...

    async def generate(self, target_id: str, wanted: ImageInput, on_event: OnEvent) -> float:
        """Have pictures drawn; returns what they cost in US dollars. Cancelled, it lets go of the call.

        Args:
            target_id: the cloud model.
            wanted: what to draw; its prompt is the one to send.
            on_event: told of progress, and given the pictures.

        Raises:
            EngineRejectedError: the provider refuses this wish.
            UnsuitableTargetError: it cannot do what is wanted, such as an operation of ComfyUI's.
            BudgetExhaustedError: the day's money is spent.
            UnavailableError, EngineTimeoutError: the provider is at fault.
        """
        ...
