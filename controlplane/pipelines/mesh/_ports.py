"""What the pipeline of meshes needs of others."""

from __future__ import annotations

from typing import Protocol

from controlplane.jobs import LiveJob
from rung.types import ImagePart, Policy


class Pictures(Protocol):
    """Makes the picture that a mesh is modelled after, where a caller gave none."""

    async def make(self, prompt: str, *, job: LiveJob, policy: Policy, effort: int | None) -> ImagePart:
        """One picture of one object, whole and on a plain background.

        It returns once whoever made it has given back its memory on the GPU: the engine of meshes may need
        it. Cancelled, it cancels what it began.

        Args:
            prompt: the object, in the caller's words.
            job: is told each step; the picture is for it.
            policy: where the prompt may go.
            effort: 1 to 10; None leaves it open.

        Raises:
            RungError: there is no picture.
        """
        ...
