"""The part of a blocking client that generates what is no answer to a conversation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rung._client import AsyncClient
from rung._sync_calls import LoopThread, SyncGenerationStream
from rung.types import GenerationInput, ImagePart, Policy


class SyncGenerationCalls:
    """What `GenerationCalls` has, method by method, without `await`."""

    _client: AsyncClient
    _thread: LoopThread

    def generate(
        self,
        wanted: GenerationInput,
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> SyncGenerationStream:
        """See `AsyncClient.generate`."""
        source = self._client.generate(
            wanted, model=model, effort=effort, policy=policy, request_id=request_id
        )
        return SyncGenerationStream(self._thread, source)

    def image(
        self,
        prompt: str = "",
        *,
        tier: str = "",
        operation: str = "generate",
        negative_prompt: str = "",
        width_pixels: int = 0,
        height_pixels: int = 0,
        seed: int | None = None,
        images: Sequence[ImagePart] = (),
        parameters: Mapping[str, Any] | None = None,
        count: int = 1,
        previews: bool = False,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> SyncGenerationStream:
        """See `AsyncClient.image`."""
        source = self._client.image(
            prompt,
            tier=tier,
            operation=operation,
            negative_prompt=negative_prompt,
            width_pixels=width_pixels,
            height_pixels=height_pixels,
            seed=seed,
            images=images,
            parameters=parameters,
            count=count,
            previews=previews,
            model=model,
            effort=effort,
            policy=policy,
            request_id=request_id,
        )
        return SyncGenerationStream(self._thread, source)
