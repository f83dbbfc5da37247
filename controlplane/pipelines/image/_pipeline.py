"""Pictures and videos: from a wish to what is stored, by the first target that can draw it."""

from __future__ import annotations

import random
from collections.abc import Mapping

from msgspec.structs import replace

from controlplane.ladder import Candidate
from controlplane.pipelines._begun import Begun
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._generation import GenerationPipeline
from controlplane.pipelines._router import Router
from controlplane.pipelines._wish import Wish
from controlplane.pipelines.image._artist import Artist, Drawn
from controlplane.pipelines.image._picture import Picture
from controlplane.pipelines.image._staging import StagesPort, Staging
from controlplane.stages import StageRequest
from controlplane.workflows import Tier, Workflows, build, find_tier, image_effort, tier_of_effort
from rung.errors import InvalidRequestError
from rung.types import ImageInput, JobKind, Phase

#: Of seeds that are chosen here; every engine takes those.
_SEED_BITS = 32


class ImagePipeline(GenerationPipeline):
    """Carries out jobs for pictures and videos.

    Args:
        router: who may draw.
        engager: tries one after the other.
        artist: has one of them draw.
        workflows: templates of graphs.
        tiers: by name.
        stages: what a wish passes first.
        choose: chooses seeds.
    """

    def __init__(
        self,
        *,
        router: Router,
        engager: Engager,
        artist: Artist,
        workflows: Workflows,
        tiers: Mapping[str, Tier],
        stages: StagesPort,
        choose: random.Random | None = None,
    ) -> None:
        self._router = router
        self._engager = engager
        self._artist = artist
        self._workflows = workflows
        self._tiers = tiers
        self._stages = stages
        self._choose = choose or random.Random()  # noqa: S311 - no secret

    def prepared(self, wish: Wish) -> Wish:
        """The wish with its tier, as a picture or a video.

        Raises:
            InvalidRequestError: no such operation, tier or parameter, or it cannot be drawn so.
            UnknownModelError: there is no model of that name, or none that draws.
        """
        wanted = _wanted(wish)
        template = self._workflows.get(wanted.operation)
        wish = replace(wish, kind=JobKind.VIDEO if template.video else JobKind.IMAGE)
        if not wanted.tier:
            effort = self._router.route(wish).effort or wish.effort or image_effort(wanted)[0]
            wanted = replace(wanted, tier=tier_of_effort(effort))
        build(template, wanted, find_tier(self._tiers, wanted.tier), wanted.seed or 0)
        return replace(wish, input=wanted)

    async def run(self, begun: Begun) -> str:
        """See `GenerationPipeline.run`.

        Raises:
            InvalidRequestError: the safety filter refuses it, or the engine does.
            RungError: nobody drew it.
        """
        wish, wanted = begun.wish, _wanted(begun.wish)
        if wanted.seed is None:
            # It is told, so that the picture can be made again.
            wanted = replace(wanted, seed=self._choose.getrandbits(_SEED_BITS))
        picture = Picture(
            wish=wish,
            wanted=wanted,
            template=self._workflows.get(wanted.operation),
            tier=find_tier(self._tiers, wanted.tier).of(wanted.operation),
        )
        request = StageRequest(
            kind=wish.kind,
            prompt=wanted.prompt,
            negative_prompt=wanted.negative_prompt,
            tier=wanted.tier,
            priority=wish.policy.priority,
            local_only=wish.policy.local_only,
        )
        async with Staging(self._stages, request) as staging:

            async def attempt(target: Candidate) -> Drawn:
                return await self._artist.draw(begun.job, picture, staging, target)

            drawn = await self._engager.first(begun.job, wish, begun.targets, attempt)
        what = "video" if wish.kind is JobKind.VIDEO else "image"
        drawn.telling.tell(Phase.DONE, f"{drawn.count} {what}(s) generated", percent=100.0)
        return "stop"


def _wanted(wish: Wish) -> ImageInput:
    if not isinstance(wish.input, ImageInput):
        raise InvalidRequestError(f"a job of the kind {wish.kind} needs an image input")
    return wish.input
