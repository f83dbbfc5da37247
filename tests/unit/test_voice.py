"""Voice slots, formats by engine, and the configuration of both."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from controlplane.config import Config, load_config
from controlplane.ladder import Candidate, TargetKind
from controlplane.pipelines.speech import VoiceSlots
from controlplane.pipelines.speech._able import able
from controlplane.vram import PlacedDeployment, ReclaimGrade
from rung.errors import InvalidRequestError, VramInfeasibleError
from rung.types import (
    Engine,
    OpenAiCompatibleEngine,
    Residency,
    ServiceEngine,
    SpeechInput,
    TranscriptionInput,
)
from tests.fakes.scheduled_node import Node, everything, node_of, pinned, sleeper
from tests.fakes.simulated_pool import SimulatedPool
from tests.fakes.virtual_time import in_virtual_time

# Slots.


class Room:
    """Voice generations that end when a test says so."""

    def __init__(self, slots: VoiceSlots) -> None:
        self.slots = slots
        self.told: list[str] = []
        self.tasks: list[asyncio.Task[None]] = []
        self.running: list[str] = []
        self.gates: dict[str, asyncio.Event] = {}

    async def enter(self, name: str, node: str = "box") -> asyncio.Task[None]:
        """Begin one, and give it time to get in."""
        gate = asyncio.Event()

        async def generate() -> None:
            async with self.slots.held(node, lambda words: self.told.append(f"{name}: {words}")):
                self.running.append(name)
                try:
                    await gate.wait()
                finally:
                    self.running.remove(name)

        task = asyncio.create_task(generate(), name=name)
        self.tasks.append(task)
        self.gates[name] = gate
        await asyncio.sleep(0.1)
        return task

    async def end(self, name: str) -> None:
        """Let one finish."""
        self.gates[name].set()
        await asyncio.sleep(2.0)


@in_virtual_time
async def test_two_at_once_on_a_node_and_who_waits_is_told_when_the_place_moves() -> None:
    room = Room(VoiceSlots())
    for name in ("a", "b", "c", "d"):
        await room.enter(name)
    await room.enter("elsewhere", node="spark")
    assert room.running == ["a", "b", "elsewhere"]
    assert room.slots.load("box") == (2, 2)
    assert room.told == [
        "c: waiting for one of 2 voice slots of box; place 1 in the queue",
        "d: waiting for one of 2 voice slots of box; place 2 in the queue",
    ]

    await room.end("a")
    assert room.running == ["b", "elsewhere", "c"]
    assert room.told[2:] == ["d: waiting for one of 2 voice slots of box; place 1 in the queue"]
    for name in ("b", "c", "d", "elsewhere"):
        await room.end(name)
    await asyncio.gather(*room.tasks)
    assert room.slots.load("box") == (0, 0)


@in_virtual_time
async def test_who_leaves_the_queue_holds_nobody_up() -> None:
    room = Room(VoiceSlots(1))
    await room.enter("a")
    leaving = await room.enter("b")
    await room.enter("c")
    leaving.cancel()
    await room.end("a")
    assert room.running == ["c"]
    assert room.told[0] == "b: waiting for the voice slot of box; place 1 in the queue"
    await room.end("c")
    await asyncio.gather(*room.tasks, return_exceptions=True)


@in_virtual_time
async def test_a_node_may_have_another_number() -> None:
    room = Room(VoiceSlots(1, {"spark": 3}))
    for name in ("a", "b", "c", "d"):
        await room.enter(name, node="spark")
    assert room.running == ["a", "b", "c"]
    for name in ("a", "b", "c", "d"):
        await room.end(name)


# Formats.


def candidate(name: str, kind: TargetKind = TargetKind.DEPLOYMENT) -> Candidate:
    return Candidate(id=name, kind=kind, owned=kind is TargetKind.DEPLOYMENT)


ENGINES: dict[str, Engine] = {
    "piper": ServiceEngine(dialect="piper"),
    "xtts": ServiceEngine(dialect="xtts"),
    "speaches": ServiceEngine(dialect="speaches"),
    "sana": ServiceEngine(dialect="sana"),
    "chat": OpenAiCompatibleEngine(),
}


@pytest.mark.parametrize(
    ("form", "found"),
    [("wav", ["piper", "speaches"]), ("mp3", ["speaches"]), ("flac", ["speaches"])],
)
def test_speech_goes_to_those_who_make_its_format(form: str, found: list[str]) -> None:
    targets = [candidate("piper"), candidate("chat"), candidate("speaches"), candidate("gone")]
    wanted = SpeechInput(text="hm", format=form)
    assert [each.id for each in able(targets, wanted, ENGINES.get)] == found


def test_only_speaches_writes_down() -> None:
    targets = [candidate("piper"), candidate("speaches")]
    wanted = TranscriptionInput(audio=b"x", format="srt")
    assert [each.id for each in able(targets, wanted, ENGINES.get)] == ["speaches"]


def test_a_format_that_nobody_makes_is_refused_with_what_each_makes() -> None:
    targets = [candidate("piper"), candidate("xtts"), candidate("whisper-1", TargetKind.CLOUD)]
    with pytest.raises(
        InvalidRequestError,
        match="nobody here makes the format ogg: piper makes wav; xtts makes wav; "
        "whisper-1 makes none that is known here",
    ):
        able(targets, SpeechInput(text="hm", format="ogg"), ENGINES.get)


# Configuration.


def configured(**more: object) -> Config:
    return Config.model_validate({"nodes": [{"id": "box", "address": "127.0.0.1:1"}], **more})


def test_voice_is_bounded_without_a_word_of_configuration() -> None:
    voice = configured().voice
    assert (voice.slots, voice.nodes) == (2, {})
    assert voice.max_grades() == {
        "speech": ReclaimGrade.STANDARD,
        "transcription": ReclaimGrade.STANDARD,
    }
    assert configured(voice={"max_grade": "quick"}).voice.max_grades()["speech"] is ReclaimGrade.QUICK


@pytest.mark.parametrize(
    ("voice", "complaint"),
    [
        ({"slots": 0}, "greater than or equal to 1"),
        ({"nodes": {"spark": 1}}, "there is no node spark; nodes are: box"),
        ({"max_grade": "most"}, "'quick', 'standard' or 'full'"),
    ],
)
def test_what_makes_no_sense_of_voice_is_refused(voice: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValidationError, match=complaint):
        configured(voice=voice)


@pytest.mark.parametrize(
    ("kind", "capabilities", "complaint"),
    [
        ("piper", ["chat"], r"write \[speech\]"),
        ("xtts", ["speech", "chat"], r"write \[speech\]"),
        ("speaches", ["speech", "transcription"], r"write \[speech\] or \[transcription\]"),
    ],
)
def test_a_model_of_an_engine_of_voice_has_one_capability(
    kind: str, capabilities: Sequence[str], complaint: str
) -> None:
    deployment = {
        "id": "d",
        "node": "box",
        "model": "m",
        "engine": {"kind": kind},
        "runtime": {"kind": "external", "base_url": "http://127.0.0.1:9"},
    }
    configured(deployments=[deployment | {"capabilities": ["speech"]}])
    with pytest.raises(ValidationError, match=complaint):
        configured(deployments=[deployment | {"capabilities": capabilities}])


def test_the_example_of_speech_can_be_loaded() -> None:
    example = Path(__file__).parents[2] / "deploy" / "rung.speech.yaml"
    piper, whisper = load_config(example).deployment_specs()
    assert (piper.capabilities, whisper.capabilities) == (("speech",), ("transcription",))


# What may give way.


class GradedPool(SimulatedPool):
    """Disturbs nobody more than that to raise `whisper`."""

    grade = ReclaimGrade.FULL

    def deployments(self) -> Sequence[PlacedDeployment]:
        return [
            replace(each, max_grade=self.grade if each.deployment_id == "whisper" else each.max_grade)
            for each in super().deployments()
        ]


def graded(grade: ReclaimGrade) -> GradedPool:
    pool = GradedPool((pinned(), sleeper(), sleeper("whisper", 14, residency=Residency.STOPPED)))
    pool.grade = grade
    return pool


async def raised(node: Node) -> None:
    await everything(node.scheduler.raise_deployment("whisper"))


@in_virtual_time
async def test_a_model_that_may_disturb_nobody_is_not_raised_over_others() -> None:
    async with node_of(pool=graded(ReclaimGrade.QUICK)) as node:
        with pytest.raises(VramInfeasibleError):
            await raised(node)
        assert node.residency("reasoner") is Residency.AWAKE
        assert node.steps() == []


@in_virtual_time
async def test_at_grade_standard_a_sleeper_gives_way_to_it() -> None:
    async with node_of(pool=graded(ReclaimGrade.STANDARD)) as node:
        await raised(node)
        assert node.residency("reasoner") is Residency.ASLEEP
        assert node.residency("whisper") is Residency.AWAKE
