"""Jobs that speak and jobs that hear, at the first target that can."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Protocol

from controlplane.artifacts import Artifacts, Collector
from controlplane.estimates import Estimates
from controlplane.fleet import FleetView
from controlplane.jobs import LiveJob
from controlplane.ladder import Candidate
from controlplane.pipelines._begun import Begun
from controlplane.pipelines._engage import Engager
from controlplane.pipelines._generation import DeliveredError, GenerationFleet, GenerationPipeline
from controlplane.pipelines._wish import Wish
from controlplane.pipelines.speech._able import able
from controlplane.pipelines.speech._voice_slots import VoiceSlots
from rung.codec import GenerationEvent
from rung.errors import EngineProtocolError, InvalidRequestError, RungError
from rung.types import (
    ArtifactChunk,
    Engine,
    Phase,
    PhaseProgress,
    Served,
    SpeechInput,
    TokenDelta,
    TranscriptionInput,
)

#: OpenAI's bounds.
_MOST_CHARACTERS = 4096
_SPEEDS = (0.25, 4.0)


class VoiceFleet(GenerationFleet, Protocol):
    """What the pipeline needs of the fleet, as `controlplane.fleet.Fleet` has it."""

    @property
    def view(self) -> FleetView:
        """The snapshot; another object whenever something changed."""
        ...


class VoicePipeline(GenerationPipeline):
    """Carries out jobs for speech and for transcriptions; what comes is passed on as it comes.

    A target's slot is taken first and the node's voice slot then: whoever waits for a model to load keeps
    nobody from speaking.

    Args:
        fleet: the deployments, and the way to their agents.
        engager: tries targets, and makes them ready.
        artifacts: keeps what was made.
        estimates: how long things take here.
        voice_slots: bound what a node does at once.
        idle_timeout_s: longest silence of an engine.
    """

    def __init__(
        self,
        *,
        fleet: VoiceFleet,
        engager: Engager,
        artifacts: Artifacts,
        estimates: Estimates,
        voice_slots: VoiceSlots,
        idle_timeout_s: float = 600.0,
    ) -> None:
        self._fleet = fleet
        self._engager = engager
        self._artifacts = artifacts
        self._estimates = estimates
        self._voice_slots = voice_slots
        self._idle_timeout_s = idle_timeout_s

    def prepared(self, wish: Wish) -> Wish:
        """The wish as it came.

        Raises:
            InvalidRequestError: there is nothing to say or to hear, or too much of it, or it is too fast.
        """
        wanted = _wanted(wish)
        if isinstance(wanted, SpeechInput):
            _check_speech(wanted)
        elif not wanted.audio:
            raise InvalidRequestError("the audio file is empty", param="file")
        return wish

    async def run(self, begun: Begun) -> str:
        """See `GenerationPipeline.run`.

        Raises:
            InvalidRequestError: no target makes that format; or the engine refused it, such as for its voice.
            RungError: nobody could.
        """
        job, wish = begun.job, begun.wish
        wanted = _wanted(wish)
        targets = able(begun.targets, wanted, self._engine_of)

        async def attempt(target: Candidate) -> _Made:
            return await self._attempt(job, wish, wanted, target)

        made = await self._engager.first(job, wish, iter(targets), attempt)
        job.progress(Phase.DONE, made.summary(wanted), percent=100.0)
        return "stop"

    def _engine_of(self, deployment_id: str) -> Engine | None:
        found = self._fleet.view.deployments.get(deployment_id)
        return None if found is None else found.deployment.spec.engine.engine

    async def _attempt(
        self, job: LiveJob, wish: Wish, wanted: SpeechInput | TranscriptionInput, target: Candidate
    ) -> _Made:
        job.progress(Phase.HEALTH_CHECK, f"{target.id} is {target.state}")
        async with self._engager.slot(job, wish, target.id) as view:
            spec, node_id = view.deployment.spec, view.node.id

            def waits(words: str) -> None:
                job.progress(Phase.QUEUED, words)

            async with self._voice_slots.held(node_id, waits):
                job.routed(
                    Served(requested=job.model, target=spec.id, node=node_id, model=spec.engine_model_name)
                )
                made = _Made(job, spec.id, wanted, self._estimates)
                collector = self._artifacts.collector(job)
                try:
                    async with collector:
                        await self._generate(job, spec.id, wanted, made, collector)
                except RungError as error:
                    if made.has_said or collector.has_told:
                        raise DeliveredError(error) from error
                    raise
                if _is_file(wanted) and not collector.artifacts:
                    raise EngineProtocolError(f"{spec.id} ended without a result", engine=spec.id)
                made.ended()
                return made

    async def _generate(
        self,
        job: LiveJob,
        deployment_id: str,
        wanted: SpeechInput | TranscriptionInput,
        made: _Made,
        collector: Collector,
    ) -> None:
        events = self._fleet.generate_through_agent(deployment_id, job.id, wanted, self._idle_timeout_s)
        async with aclosing(events):
            async for event in events:
                made.take(event)
                if isinstance(event, ArtifactChunk):
                    await collector.take(event)


class _Made:
    """What an engine gives of one job; tells the job, and learns how long it takes.

    Attributes:
        has_said: whether text of it is in the job's log.
    """

    def __init__(
        self,
        job: LiveJob,
        deployment_id: str,
        wanted: SpeechInput | TranscriptionInput,
        estimates: Estimates,
    ) -> None:
        self._job = job
        self._deployment_id = deployment_id
        self._estimates = estimates
        if isinstance(wanted, SpeechInput):
            self._step, self._units = "speech", float(len(wanted.text))
        else:
            # So many bytes are another time in another format.
            self._step, self._units = f"transcription of {wanted.content_type}", float(len(wanted.audio))
        self._now_s = asyncio.get_running_loop().time
        self._began_s = self._now_s()
        self._size_bytes = 0
        self.has_said = False

    def take(self, event: GenerationEvent) -> None:
        """Tell the job of an event; files are for the collector to tell of."""
        match event:
            case PhaseProgress():
                left_s = self._left_s()
                self._job.progress(
                    event.phase,
                    event.detail,
                    step=event.step,
                    total=event.total,
                    percent=event.percent,
                    remaining_s=left_s if event.remaining_s is None else event.remaining_s,
                    job_remaining_s=left_s,
                )
            case TokenDelta():
                self.has_said = True
                self._job.text(event)
            case ArtifactChunk():
                self._size_bytes += len(event.data)

    def ended(self) -> None:
        """It is whole: this is how long it takes."""
        passed_s = self._now_s() - self._began_s
        self._estimates.observe(self._deployment_id, self._step, passed_s, self._units)

    def summary(self, wanted: SpeechInput | TranscriptionInput) -> str:
        """One line for a person."""
        if isinstance(wanted, SpeechInput):
            return (
                f"said {len(wanted.text)} characters in {self._size_bytes / 1024:.0f} KiB of {wanted.format}"
            )
        if _is_file(wanted):
            return f"transcribed to {self._size_bytes / 1024:.1f} KiB of {wanted.format}"
        return f"transcribed to {self._job.delivered_characters} characters"

    def _left_s(self) -> float | None:
        expected_s = self._estimates.expected_s(self._deployment_id, self._step, self._units)
        passed_s = self._now_s() - self._began_s
        return None if expected_s is None or expected_s <= passed_s else round(expected_s - passed_s, 1)


def _is_file(wanted: SpeechInput | TranscriptionInput) -> bool:
    """Whether the result is a file, and not text."""
    return isinstance(wanted, SpeechInput) or wanted.format != "text"


def _wanted(wish: Wish) -> SpeechInput | TranscriptionInput:
    if not isinstance(wish.input, SpeechInput | TranscriptionInput):
        raise InvalidRequestError(f"a job of kind {wish.kind} is made from text or audio")
    return wish.input


def _check_speech(wanted: SpeechInput) -> None:
    if not wanted.text.strip():
        raise InvalidRequestError("input is empty; say what is to be said", param="input")
    if len(wanted.text) > _MOST_CHARACTERS:
        raise InvalidRequestError(
            f"input has {len(wanted.text)} characters; one request may have {_MOST_CHARACTERS}, so send a "
            "longer text in parts",
            param="input",
        )
    least, most = _SPEEDS
    if not least <= wanted.speed <= most:
        raise InvalidRequestError(f"speed is {wanted.speed:g}; it must be {least} to {most:g}", param="speed")
