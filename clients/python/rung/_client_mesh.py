"""Meshes: what a client has for them."""

from __future__ import annotations

from rung._client_generation import GenerationCalls, GenerationStream
from rung.types import ImagePart, MeshInput, Policy


class MeshCalls(GenerationCalls):
    """The part of a client that has meshes made."""

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
    ) -> GenerationStream:
        """Have a mesh made, as a GLB: of a picture, or of words by way of a picture that is drawn first.

        Args:
            prompt: what to model; not used where there is a picture.
            image: picture to model, best with a plain or transparent background.
            seed: None for a random one.
            texture: paint it, too.
            model: as `generate`.
            effort: 1 to 10, of the picture that is drawn; None leaves it open.
            policy: as `generate`.
            request_id: as `generate`.
        """
        wanted = MeshInput(prompt=prompt, image=image, seed=seed, texture=texture)
        return self.generate(wanted, model=model, effort=effort, policy=policy, request_id=request_id)
