"""The part of a blocking client that has meshes made."""

from __future__ import annotations

from rung._sync_calls import SyncGenerationStream
from rung._sync_client_generation import SyncGenerationCalls
from rung.types import ImagePart, Policy


class SyncMeshCalls(SyncGenerationCalls):
    """What `MeshCalls` has, without `await`."""

    def mesh(
        self,
        prompt: str = "",
        *,
        image: ImagePart | None = None,
        seed: int | None = None,
        texture: bool = False,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> SyncGenerationStream:
        """See `AsyncClient.mesh`."""
        source = self._client.mesh(
            prompt,
            image=image,
            seed=seed,
            texture=texture,
            model=model,
            effort=effort,
            policy=policy,
            request_id=request_id,
        )
        return SyncGenerationStream(self._thread, source)
