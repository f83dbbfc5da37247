"""Pictures through the whole control plane, with an agent that a test scripts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from controlplane.ladder import Candidate, Modality, RungSpec, TargetKind, build_ladder
from controlplane.pipelines import Wish
from controlplane.pipelines._leasing import leased
from controlplane.pipelines.image import IMAGE_PHASES, OnEvent
from controlplane.vram import Demand, Granted
from rung.errors import (
    EngineFailedError,
    InvalidRequestError,
    NoTargetError,
    RungError,
    UnknownModelError,
    VramInfeasibleError,
)
from rung.types import (
    Artifact,
    ArtifactChunk,
    FailureReason,
    ImageInput,
    ImagePart,
    JobCancelled,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
    Residency,
    Routed,
    Served,
    UsageReported,
    whole_artifact,
)
from tests.fakes.artifacts import a_job
from tests.fakes.gpu_agent import GIB
from tests.fakes.studio import (
    COMFYUI,
    REASONER,
    SANA,
    Card,
    Studio,
    a_studio,
)


@pytest.fixture
async def studio() -> AsyncIterator[Studio]:
    """ComfyUI is awake and empty, the reasoner is stopped: 30 GiB are free."""
    async with a_studio() as studio:
        yield studio


def a_card(taken_gib: int) -> Card:
    """A card of which somebody else has so much."""
    card = Card((COMFYUI, REASONER))
    card.programs[1] = taken_gib * GIB
    return card


def told(log: list[JobEvent]) -> list[PhaseProgress]:
    return [event.payload for event in log if isinstance(event.payload, PhaseProgress)]


def details(log: list[JobEvent], phase: Phase) -> list[str]:
    return [each.detail for each in told(log) if each.phase is phase]


def phases(log: list[JobEvent]) -> list[Phase]:
    """The phases of the log, each once for each time that it began."""
    found = [each.phase for each in told(log)]
    return [phase for place, phase in enumerate(found) if place == 0 or found[place - 1] is not phase]


def wholes(log: list[JobEvent]) -> list[Artifact]:
    """The artifacts that the log tells to their end."""
    return [artifact for event in log if (artifact := whole_artifact(event)) is not None]


async def test_a_picture_is_told_phase_by_phase_and_stored(studio: Studio) -> None:
    log = await studio.draw(seed=42)

    assert phases(log) == list(IMAGE_PHASES)
    assert details(log, Phase.HEALTH_CHECK) == ["Checking comfyui"]
    assert details(log, Phase.VRAM_ACQUIRE)[0] == "Requesting VRAM slot (mode=quick)"
    assert details(log, Phase.VRAM_ACQUIRE)[-1] == "VRAM acquired: 31,232 MB free (mode=quick)"
    assert details(log, Phase.SAFETY_FILTER) == ["Safety: unrestricted"]
    assert details(log, Phase.PROMPT_ENHANCE) == ["Skipped (fast tier)"]
    assert details(log, Phase.MODEL_SWAP) == ["Loading sdxl"]
    assert details(log, Phase.WORKFLOW_BUILD) == ["Building lightning workflow (1024x1024, seed 42)"]
    assert details(log, Phase.QUEUED) == ["Submitted to comfyui", "loading sdxl_lightning_4step.safetensors"]
    sampled = [each for each in told(log) if each.phase is Phase.SAMPLING]
    assert [(each.step, each.total, each.percent) for each in sampled] == [
        (0, 4, 0.0),
        (1, 4, 25.0),
        (2, 4, 50.0),
        (4, 4, 100.0),
    ]
    last = told(log)[-1]
    assert (last.detail, last.percent) == ("1 image(s) generated", 100.0)
    done = log[-1].payload
    assert isinstance(done, JobDone)
    assert done.finish_reason == "stop"
    assert done.served == Served(
        requested="", target="comfyui", node="box", model="sdxl_lightning_4step.safetensors"
    )
    [artifact] = studio.rows.kept.values()
    assert any(
        isinstance(each.payload, ArtifactChunk) and each.payload.sha256 == artifact.sha256 for each in log
    )
    assert studio.leases == []
    assert studio.slots.load("comfyui") == (0, 0)


async def test_a_seed_is_chosen_told_and_used(studio: Studio) -> None:
    log = await studio.draw()

    seeds = {
        value
        for node in studio.card.graphs[0].values()
        for name, value in node["inputs"].items()
        if name == "seed"
    }
    assert len(seeds) == 1
    seed = seeds.pop()
    assert f"seed {seed})" in details(log, Phase.WORKFLOW_BUILD)[0]
    assert [each.seed for each in wholes(log)] == [seed]
    assert [each.seed for each in studio.rows.kept.values()] == [seed]


async def test_the_lease_is_held_for_the_whole_run_for_what_is_missing(studio: Studio) -> None:
    studio.card.pauses[Phase.SAMPLING] = asyncio.Event()
    job = studio.start()
    await studio.card.reached.wait()

    [lease] = studio.leases
    assert (lease.deployment_id, lease.demand.vram_bytes) == ("comfyui", 6 * GIB)
    assert studio.slots.load("comfyui") == (1, 0)
    studio.card.pauses[Phase.SAMPLING].set()
    await studio.log_of(job)

    assert studio.leases == []
    assert studio.slots.load("comfyui") == (0, 0)


async def test_a_lease_is_renewed_while_it_is_held_and_then_given_back(studio: Studio) -> None:
    view, demand = studio.fleet.view.deployments["comfyui"], Demand(vram_bytes=GIB, holder="test")
    async with leased(studio.schedulers, view, demand, a_job(), ttl_s=0.3) as lease:
        assert lease is not None
        async with asyncio.timeout(10):
            # One that has expired is not listed any more.
            while studio.leases[0].expires_s <= lease.expires_s + lease.ttl_s:
                await studio.fleet.wait_changed(1.0)

    assert studio.leases == []


async def test_a_model_that_is_loaded_is_not_loaded_again_and_needs_no_more_of_it(studio: Studio) -> None:
    await studio.draw()
    studio.card.pauses[Phase.SAMPLING] = asyncio.Event()
    job = studio.start()
    await studio.card.reached.wait()
    [lease] = studio.leases
    studio.card.pauses[Phase.SAMPLING].set()
    log = await studio.log_of(job)

    assert lease.demand.vram_bytes == GIB
    assert details(log, Phase.MODEL_SWAP) == ["sdxl is loaded"]
    assert ("free", "comfyui") not in studio.card.told


async def test_a_model_of_another_family_is_flushed_first_and_that_is_measured(studio: Studio) -> None:
    await studio.draw(tier="quality")
    log = await studio.draw(tier="ultra")

    assert studio.card.told == [("free", "comfyui")]
    assert details(log, Phase.MODEL_SWAP) == ["Loading flux: sdxl was flushed, 11.0 GiB freed"]
    assert "flushing sdxl from comfyui" in details(log, Phase.VRAM_ACQUIRE)
    assert phases(log) == list(IMAGE_PHASES)
    assert isinstance(log[-1].payload, JobDone)


async def test_a_flush_that_gives_nothing_back_does_not_stop_what_fits_all_the_same() -> None:
    card = Card((COMFYUI,))
    card.ignores_free = True
    async with a_studio(COMFYUI, card=card) as studio:
        await studio.draw()
        log = await studio.draw(tier="ultra")

    assert details(log, Phase.MODEL_SWAP) == ["Loading flux: sdxl was flushed, 0.0 GiB freed"]


async def test_others_give_way_for_a_picture_and_that_is_told_in_words() -> None:
    async with a_studio(awake=(COMFYUI, REASONER), card=a_card(4)) as studio:
        log = await studio.draw(tier="quality")

        assert studio.card.told == [("sleep", "reasoner")]
    said = details(log, Phase.VRAM_ACQUIRE)
    assert "putting reasoner to sleep" in said
    assert said[-1].endswith("(mode=standard)")
    assert phases(log) == list(IMAGE_PHASES)


async def test_own_cache_goes_before_others_give_way() -> None:
    async with a_studio(awake=(COMFYUI, REASONER)) as studio:
        await studio.draw()
        log = await studio.draw(tier="quality")

        assert studio.card.told == [("free", "comfyui")]
    assert details(log, Phase.MODEL_SWAP) == ["Loading sdxl: sdxl was flushed, 5.0 GiB freed"]


async def test_who_needs_the_memory_of_comfyui_gets_it_from_a_picture_that_waits_for_its_lease() -> None:
    async with a_studio(awake=(COMFYUI,)) as studio:
        await studio.draw(tier="ultra")
        scheduler = studio.schedulers.of_node("box")
        training = [
            event
            async for event in scheduler.acquire(
                "box/0", Demand(vram_bytes=10 * GIB, holder="training"), ttl_s=60.0, operation_id="t"
            )
        ][-1]
        # Nobody can give way: the picture waits for the training, with the slot of ComfyUI in its hand.
        job = studio.start(tier="ultra")
        await studio.until_told(job, "the lease of training ends")
        # What needs ComfyUI drained is not held up by it.
        async with asyncio.timeout(10):
            async for _ in studio.schedulers.make_awake("reasoner", priority=Priority.USER):
                pass
        assert studio.fleet.view.deployments["reasoner"].deployment.residency is Residency.AWAKE
        assert studio.card.models == {}
        assert isinstance(training, Granted)
        scheduler.release(training.lease.id)
        log = await studio.log_of(job)

        # What it reckoned with is gone, so that it asks for all, and the reasoner gives way in its turn.
        assert studio.card.told == [("free", "comfyui"), ("start", "reasoner"), ("sleep", "reasoner")]
    assert "flux was unloaded meanwhile; asking for more" in details(log, Phase.VRAM_ACQUIRE)
    assert isinstance(log[-1].payload, JobDone)
    assert phases(log) == list(IMAGE_PHASES)


async def test_a_picture_of_which_the_memory_is_not_to_be_had_fails_and_says_why() -> None:
    async with a_studio(card=a_card(28)) as studio:
        log = await studio.draw()

        assert studio.leases == []
        assert studio.slots.load("comfyui") == (0, 0)
    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert failed.reason is FailureReason.VRAM_INFEASIBLE
    assert "6.0 GiB do not fit on box/0" in failed.detail


@pytest.mark.parametrize(
    ("error", "reason", "told"),
    [
        (
            VramInfeasibleError("comfyui: ComfyUI ran out of GPU memory"),
            FailureReason.VRAM_INFEASIBLE,
            [("free", "comfyui")],
        ),
        (EngineFailedError("comfyui: node 3 failed"), FailureReason.ENGINE_ERROR, []),
    ],
)
async def test_an_engine_that_runs_out_of_memory_is_flushed_and_one_that_fails_otherwise_is_not(
    studio: Studio, error: RungError, reason: FailureReason, told: list[tuple[str, str]]
) -> None:
    studio.card.fails[Phase.SAMPLING] = error
    log = await studio.draw()

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert (failed.reason, failed.detail) == (reason, error.message)
    # Before its lease was given back.
    assert studio.card.told == told
    assert studio.leases == []
    assert studio.slots.load("comfyui") == (0, 0)


CHAIN = build_ladder(
    [RungSpec(name="pictures", modality=Modality.IMAGE, chain="pictures")], {"pictures": ["comfyui", "sana"]}
)


@pytest.fixture
async def two() -> AsyncIterator[Studio]:
    """ComfyUI draws, and Sana after it."""
    async with a_studio(COMFYUI, SANA, awake=(COMFYUI, SANA), ladder=CHAIN) as studio:
        yield studio


async def test_the_next_target_is_tried_and_named_if_nothing_was_delivered(two: Studio) -> None:
    two.card.fails[Phase.SAMPLING] = VramInfeasibleError("comfyui: ComfyUI ran out of GPU memory")
    log = await two.draw()

    served = [event.payload.served.target for event in log if isinstance(event.payload, Routed)]
    assert served == ["comfyui", "sana"]
    done = log[-1].payload
    assert isinstance(done, JobDone)
    assert done.served is not None
    assert done.served.target == "sana"
    assert ("free", "comfyui") in two.card.told
    # A route begins another attempt, which has all phases again.
    found = phases(log)
    second = len(found) - found[::-1].index(Phase.ROUTE)
    assert found[second:] == list(IMAGE_PHASES)
    assert "ComfyUI ran out of GPU memory; trying sana" in details(log, Phase.ROUTE)[-1]
    assert list(two.rows.kept) == [each.id for each in wholes(log)]
    assert len(wholes(log)) == 1


async def test_nothing_is_tried_elsewhere_once_one_of_two_pictures_was_delivered(two: Studio) -> None:
    two.card.pictures = 2
    two.card.fails[Phase.ENCODING] = EngineFailedError("comfyui: the last node failed")
    log = await two.draw(count=2)

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert failed.detail == "comfyui: the last node failed"
    assert len(two.card.agent.generations) == 1
    assert two.leases == []
    # The one that is whole can still be had, by the id that the log of the failed job names.
    assert list(two.rows.kept) == [each.id for each in wholes(log)]
    assert len(wholes(log)) == 1


async def test_sana_takes_no_lease_and_what_it_draws_can_be_drawn_again(two: Studio) -> None:
    two.card.pauses[Phase.SAMPLING] = asyncio.Event()
    job = two.start("a red cube", model="sana", seed=9)
    await two.card.reached.wait()
    assert two.leases == []
    two.card.pauses[Phase.SAMPLING].set()
    log = await two.log_of(job)

    assert phases(log) == list(IMAGE_PHASES)
    assert details(log, Phase.WORKFLOW_BUILD) == ["Skipped (no workflow; seed 9)"]
    asked = two.card.agent.generations[0].image
    assert (asked.prompt, asked.seed) == ("a red cube", 9)
    assert [each.seed for each in wholes(log)] == [9]


async def test_what_starts_from_a_picture_is_not_for_sana(two: Studio) -> None:
    log = await two.draw(
        model="sana", operation="img2img", images=(ImagePart(content_type="image/png", data=b"\x89PNG"),)
    )

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert "sana draws from words only; img2img is for ComfyUI" in failed.detail
    assert two.card.agent.generations == []


async def test_cancelling_reaches_the_engine_and_gives_everything_back(studio: Studio) -> None:
    studio.card.pauses[Phase.SAMPLING] = asyncio.Event()
    job = studio.start()
    await studio.card.reached.wait()
    job.request_cancel("test")
    log = await studio.log_of(job)
    await studio.card.agent.until(lambda: studio.card.agent.generations_cancelled == 1)

    assert log[-1].payload == JobCancelled("test")
    assert studio.leases == []
    assert studio.slots.load("comfyui") == (0, 0)


async def test_who_waits_for_memory_can_be_cancelled_too(studio: Studio) -> None:
    scheduler = studio.schedulers.of_node("box")
    async for _ in scheduler.acquire(
        "box/0", Demand(vram_bytes=28 * GIB, holder="training"), ttl_s=60.0, operation_id="t"
    ):
        pass
    job = studio.start()
    await studio.until_told(job, "the lease of training ends")
    job.request_cancel("test")
    log = await studio.log_of(job)

    assert log[-1].payload == JobCancelled("test")
    assert [lease.operation_id for lease in studio.leases] == ["t"]
    assert studio.slots.load("comfyui") == (0, 0)


async def test_an_agent_that_is_lost_ends_the_job_and_its_lease(studio: Studio) -> None:
    studio.card.pauses[Phase.SAMPLING] = asyncio.Event()
    job = studio.start()
    await studio.card.reached.wait()
    await studio.card.agent.stop()
    log = await studio.log_of(job)

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert failed.reason is FailureReason.NODE_LOST
    assert studio.leases == []
    assert studio.slots.load("comfyui") == (0, 0)


async def test_a_refused_wish_disturbs_nobody() -> None:
    async with a_studio(awake=(COMFYUI, REASONER)) as studio:
        studio.stages.refuses = "Safety: refused (test)"
        log = await studio.draw(tier="quality")

        assert studio.card.told == []
        assert studio.card.agent.generations == []
    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert (failed.reason, failed.detail) == (FailureReason.INVALID_REQUEST, "Safety: refused (test)")
    assert details(log, Phase.SAFETY_FILTER) == ["Safety: refused (test)"]


async def test_the_enhanced_prompt_is_drawn_and_its_wait_is_told(studio: Studio) -> None:
    studio.stages.adds = ", in oil"
    studio.stages.may_enhance.clear()
    job = studio.start("a cat", tier="quality")
    await studio.until_told(job, "Enhancing the prompt")
    studio.stages.may_enhance.set()
    log = await studio.log_of(job)

    assert details(log, Phase.PROMPT_ENHANCE) == ["Enhancing the prompt", "Enhanced by orchestrator"]
    texts = [node["inputs"].get("text") for node in studio.card.graphs[0].values()]
    assert "a cat, in oil" in texts
    [request] = studio.stages.requests
    assert (request.tier, request.kind) == ("quality", JobKind.IMAGE)


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ({"tier": "turbo"}, "there is no tier 'turbo'"),
        ({"operation": "paint"}, "there is no operation 'paint'"),
        ({"parameters": {"stepz": 3}}, "stepz"),
        ({"count": 0}, "count is 0"),
    ],
)
async def test_what_cannot_be_drawn_makes_no_job(studio: Studio, wanted: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidRequestError, match=words):
        studio.start(**wanted)

    assert await studio.jobs.list(page_size=10) == []


async def test_nobody_who_draws_makes_no_job() -> None:
    async with a_studio(REASONER, awake=(REASONER,)) as studio:
        with pytest.raises(UnknownModelError):
            studio.start()


async def test_an_effort_chooses_the_tier(studio: Studio) -> None:
    wish = Wish(kind=JobKind.IMAGE, model="", input=ImageInput(prompt="a cat"), effort=9)
    log = await studio.log_of(studio.pipelines.start(wish))

    assert details(log, Phase.MODEL_SWAP) == ["Loading flux"]


async def test_a_template_of_moving_pictures_makes_a_video(studio: Studio) -> None:
    job = studio.start(operation="video")
    log = await studio.log_of(job)

    assert job.kind is JobKind.VIDEO
    assert told(log)[-1].detail == "1 video(s) generated"


async def test_all_pictures_of_a_job_are_counted(studio: Studio) -> None:
    studio.card.pictures = 3
    log = await studio.draw(count=3)

    assert told(log)[-1].detail == "3 image(s) generated"
    assert len(studio.rows.kept) == 3


async def test_an_engine_that_ends_without_a_picture_has_failed(studio: Studio) -> None:
    studio.card.pictures = 0
    log = await studio.draw()

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert failed.detail == "comfyui ended without a picture"


async def test_times_are_learnt_and_then_stated(studio: Studio) -> None:
    first = await studio.draw()
    # ComfyUI was restarted: it loads the model again.
    studio.card.models.clear()
    studio.card.put(COMFYUI, Residency.AWAKE)
    second = await studio.draw()

    assert all(each.job_remaining_s is None for each in told(first) if each.phase is not Phase.DONE)
    submitted = next(each for each in told(second) if each.phase is Phase.QUEUED)
    assert submitted.job_remaining_s is not None
    assert submitted.job_remaining_s < 2.0
    assert (
        studio.estimates.expected_s("comfyui", "sampling_step:sdxl_lightning_4step.safetensors") is not None
    )


async def test_two_pictures_take_turns(studio: Studio) -> None:
    studio.card.pauses[Phase.SAMPLING] = asyncio.Event()
    first = studio.start()
    await studio.card.reached.wait()
    second = studio.start()
    await studio.until_told(second, "place 1 in the queue")
    assert len(studio.leases) == 1
    studio.card.pauses[Phase.SAMPLING].set()
    logs = [await studio.log_of(first), await studio.log_of(second)]

    assert all(isinstance(log[-1].payload, JobDone) for log in logs)
    assert phases(logs[1]) == list(IMAGE_PHASES)
    assert details(logs[1], Phase.MODEL_SWAP) == ["sdxl is loaded"]


class Painter:
    """A cloud model that draws."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ImageInput]] = []

    def model_name(self, target_id: str) -> str:
        return "gpt-image-1"

    async def generate(self, target_id: str, wanted: ImageInput, on_event: OnEvent) -> float:
        self.asked.append((target_id, wanted))
        await on_event(PhaseProgress(Phase.SAMPLING, "the provider draws"))
        await on_event(ArtifactChunk("0", "image/png", data=b"png", sha256="", size_bytes=3))
        return 0.04


class CloudOfOne:
    """One cloud model, which draws."""

    def __init__(self) -> None:
        model = Candidate(
            id="openai/gpt-image-1",
            kind=TargetKind.CLOUD,
            owned=False,
            capabilities=frozenset({"image"}),
        )
        self.candidates = {model.id: model}

    def refusal(self, target_id: str) -> str:
        return ""

    def model_name(self, target_id: str) -> str:
        return "gpt-image-1"

    async def open(self, target_id: str, body: bytes, *, stream: bool, idle_timeout_s: float) -> Any:
        raise AssertionError("nobody chats here")


async def test_a_cloud_model_draws_and_costs() -> None:
    painter = Painter()
    async with a_studio(cloud=CloudOfOne(), cloud_images=painter) as studio:
        log = await studio.draw(model="openai/gpt-image-1")

    assert phases(log) == list(IMAGE_PHASES)
    assert details(log, Phase.VRAM_ACQUIRE) == ["Skipped (cloud model)"]
    [usage] = [event.payload.usage for event in log if isinstance(event.payload, UsageReported)]
    assert usage.cost_usd == 0.04
    assert painter.asked[0][0] == "openai/gpt-image-1"


async def test_local_only_is_not_drawn_in_the_cloud() -> None:
    async with a_studio(cloud=CloudOfOne(), cloud_images=Painter()) as studio:
        with pytest.raises(NoTargetError, match="local"):
            studio.start(model="openai/gpt-image-1", policy=Policy(local_only=True))


async def test_where_nothing_is_drawn_in_the_cloud_that_is_said() -> None:
    async with a_studio(cloud=CloudOfOne()) as studio:
        log = await studio.draw(model="openai/gpt-image-1")

    failed = log[-1].payload
    assert isinstance(failed, JobFailed)
    assert "nothing drawn in the cloud" in failed.detail


async def test_a_node_without_a_gpu_draws_without_a_lease() -> None:
    card = Card((COMFYUI,))
    card.has_gpu = False
    async with a_studio(COMFYUI, card=card) as studio:
        log = await studio.draw()

    assert details(log, Phase.VRAM_ACQUIRE) == ["No VRAM to acquire: box has no GPU"]
    assert isinstance(log[-1].payload, JobDone)
