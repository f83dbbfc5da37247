"""Meshes: from a wish to a GLB that is stored, at the first target that can model it."""

from __future__ import annotations

import asyncio
import random
from contextlib import aclosing

from msgspec.structs import replace

from controlplane.artifacts import Artifacts
from controlplane.estimates import Estimates
from controlplane.jobs import LiveJob
from controlplane.ladder import Candidate, TargetKind
from controlplane.pipelines._begun import Begun
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._generation import DeliveredError, GenerationFleet, GenerationPipeline
from controlplane.pipelines._wish import Wish
from controlplane.pipelines.mesh._ports import Pictures
from rung.errors import EngineProtocolError, InvalidRequestError, RungError, UnsuitableTargetError
from rung.types import Artifact, ArtifactChunk, MeshInput, Phase, PhaseProgress, Served

#: Every engine takes seeds of so many bits.
_SEED_BITS = 32
_MIB = 1024**2


class MeshPipeline(GenerationPipeline):
    """Carries out jobs for meshes; where there are only words, a picture is drawn first.

    Args:
        fleet: the way to agents.
        engager: tries targets, and makes them ready.
        pictures: draws what is to be modelled.
        artifacts: keeps what was made.
        estimates: how long things take here.
        idle_timeout_s: longest silence of an engine.
        choose: chooses seeds.
    """

    def __init__(
        self,
        *,
        fleet: GenerationFleet,
        engager: Engager,
        pictures: Pictures,
        artifacts: Artifacts,
        estimates: Estimates,
        idle_timeout_s: float = 600.0,
        choose: random.Random | None = None,
    ) -> None:
        self._fleet = fleet
        self._engager = engager
        self._pictures = pictures
        self._artifacts = artifacts
        self._estimates = estimates
        self._idle_timeout_s = idle_timeout_s
        self._choose = choose or random.Random()  # noqa: S311 - no secret

    def prepared(self, wish: Wish) -> Wish:
        """The wish as it came.

        Raises:
            InvalidRequestError: there is nothing to model, or its seed is none.
        """
        wanted = _wanted(wish)
        if wanted.image is None and not wanted.prompt.strip():
            raise InvalidRequestError("prompt is empty; say what to model, or send a picture", param="prompt")
        if wanted.seed is not None and not 0 <= wanted.seed < 2**_SEED_BITS:
            raise InvalidRequestError(
                f"seed is {wanted.seed}; it must be 0 to 2^{_SEED_BITS} - 1", param="seed"
            )
        return wish

    async def run(self, begun: Begun) -> str:
        """See `GenerationPipeline.run`. The seed that was chosen is told, so that it can be asked for.

        Raises:
            InvalidRequestError: the picture was refused, or the mesh.
            RungError: nobody drew the one, or made the other.
        """
        job, wish = begun.job, begun.wish
        wanted = _wanted(wish)
        if wanted.seed is None:
            wanted = replace(wanted, seed=self._choose.getrandbits(_SEED_BITS))
        if wanted.image is None:
            picture = await self._pictures.make(
                wanted.prompt, job=job, policy=wish.policy, effort=wish.effort
            )
            wanted = replace(wanted, image=picture)

        async def attempt(target: Candidate) -> Artifact:
            return await self._model(job, wish, wanted, target)

        mesh = await self._engager.first(job, wish, begun.targets, attempt)
        job.progress(Phase.DONE, f"1 mesh of {mesh.size_bytes / _MIB:.1f} MiB generated", percent=100.0)
        return "stop"

    async def _model(self, job: LiveJob, wish: Wish, wanted: MeshInput, target: Candidate) -> Artifact:
        if target.kind is not TargetKind.DEPLOYMENT:
            raise UnsuitableTargetError(f"{target.id} makes no meshes", target=target.id)
        job.progress(Phase.HEALTH_CHECK, f"{target.id} is {target.state}")
        async with self._engager.slot(job, wish, target.id) as view:
            spec = view.deployment.spec
            job.routed(Served(requested=job.model, target=spec.id, node=view.node.id, model=spec.model))
            making = _Making(job, spec.id, wanted, self._estimates)
            collector = self._artifacts.collector(job, wanted.seed)
            try:
                async with collector:
                    events = self._fleet.generate_through_agent(spec.id, job.id, wanted, self._idle_timeout_s)
                    async with aclosing(events):
                        async for event in events:
                            if isinstance(event, PhaseProgress):
                                making.progress(event)
                            elif isinstance(event, ArtifactChunk):
                                making.encode(event)
                                await collector.take(event)
            except RungError as error:
                if collector.has_told:
                    raise DeliveredError(error) from error
                raise
            if not collector.artifacts:
                raise EngineProtocolError(f"{spec.id} ended without a mesh", engine=spec.id)
            return collector.artifacts[0]


class _Making:
    """Tells how an engine gets on with a mesh, and learns how long it takes."""

    def __init__(self, job: LiveJob, deployment_id: str, wanted: MeshInput, estimates: Estimates) -> None:
        self._job = job
        self._deployment_id = deployment_id
        self._seed = wanted.seed
        self._step = "mesh_textured" if wanted.texture else "mesh"
        self._estimates = estimates
        self._now_s = asyncio.get_running_loop().time
        self._began_s: float | None = None
        self._is_made = False

    def progress(self, step: PhaseProgress) -> None:
        """The engine says how far it is. What goes before its own work is not learnt."""
        left_s, detail = step.remaining_s, step.detail
        if step.phase is Phase.GENERATING:
            if self._began_s is None:
                self._began_s = self._now_s()
                detail = f"{detail}; seed {self._seed}"
            left_s = self._left_s(self._now_s() - self._began_s)
        self._job.progress(
            step.phase,
            detail,
            step=step.step,
            total=step.total,
            percent=step.percent,
            remaining_s=left_s,
            job_remaining_s=left_s if step.phase is Phase.GENERATING else None,
        )

    def encode(self, piece: ArtifactChunk) -> None:
        """The engine has made the mesh, and gives it."""
        if self._is_made:
            return
        self._is_made = True
        if self._began_s is not None:
            self._estimates.observe(self._deployment_id, self._step, self._now_s() - self._began_s)
        size = f" of {piece.size_bytes / _MIB:.1f} MiB" if piece.size_bytes else ""
        self._job.progress(Phase.ENCODING, f"storing a mesh{size}")

    def _left_s(self, passed_s: float) -> float | None:
        expected_s = self._estimates.expected_s(self._deployment_id, self._step)
        return None if expected_s is None or expected_s <= passed_s else round(expected_s - passed_s, 1)


def _wanted(wish: Wish) -> MeshInput:
    if not isinstance(wish.input, MeshInput):
        raise InvalidRequestError(f"a job of kind {wish.kind} is made from a mesh's input")
    return wish.input
