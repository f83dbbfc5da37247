"""`rung image`, and `rung jobs watch` of what has phases. The client is a fake; nothing listens."""

from __future__ import annotations

import hashlib
import io
import json
import signal
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace

from rung import ArtifactFile
from rung.cli import ExitCode, main
from rung.cli._files import Output
from rung.cli._session import Connection
from rung.errors import UnknownModelError
from rung.types import (
    Artifact,
    ArtifactChunk,
    EventPayload,
    FailureReason,
    ImageInput,
    ImagePart,
    Job,
    JobAccepted,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    JobState,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
    Routed,
    Served,
)
from tests.fakes.client import FakeClient
from tests.fakes.pictures import a_png

SERVED = Served("", "comfyui", "workstation", "sdxl")
POLICY = Policy(priority=Priority.USER)


def log(*payloads: EventPayload) -> list[JobEvent]:
    return [JobEvent("job-1", place, 1.0, float(place), each) for place, each in enumerate(payloads, 1)]


def picture(artifact_id: str, data: bytes, content_type: str = "image/png") -> ArtifactChunk:
    sha256 = hashlib.sha256(data).hexdigest()
    return ArtifactChunk(artifact_id, content_type, 0, data, sha256, len(data), len(data))


def drawn(*pictures: ArtifactChunk) -> list[JobEvent]:
    return log(
        JobAccepted(JobKind.IMAGE, ""),
        Routed(SERVED),
        PhaseProgress(Phase.WORKFLOW_BUILD, "Building quality workflow (1024x1024)"),
        PhaseProgress(Phase.SAMPLING, step=1, total=2, percent=50),
        *pictures,
        JobDone("stop", SERVED),
    )


class Rung:
    """Runs the command as a shell would, in a folder of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.client = FakeClient()
        self.client.events = drawn(picture("artifact-1", a_png()))
        self.folder = folder
        self.out = ""
        self.err = ""
        self._capsys = capsys

    def __call__(self, *arguments: str) -> int:
        code = main(arguments, opening=self._open)
        self.out, self.err = self._capsys.readouterr()
        return code

    def _open(self, connection: Connection) -> FakeClient:
        return self.client

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())

    @property
    def wanted(self) -> ImageInput:
        (asked,) = [about for what, about in self.client.asked if what == "generate"]
        assert isinstance(asked[0], ImageInput)
        return asked[0]


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rung:
    for name in ("RUNG_ADDRESS", "RUNG_TOKEN", "RUNG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "pictures"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Rung(capsys, folder)


def test_a_picture_is_named_after_its_prompt_and_its_phases_are_told(rung: Rung) -> None:
    assert rung("image", "A cat, in the rain!", "--tier", "quality") == ExitCode.OK

    assert rung.out == "a-cat-in-the-rain.png\n"
    assert (rung.folder / "a-cat-in-the-rain.png").read_bytes() == a_png()
    assert rung.err.splitlines() == [
        "[  3.0s] Building quality workflow (1024x1024)",
        "[  4.0s] Sampling 50%",
        "[  6.0s] 1 image generated",
        "comfyui on workstation · 69 B · job job-1",
    ]
    assert rung.client.asked == [
        ("generate", (ImageInput(prompt="A cat, in the rain!", tier="quality"), "", None, POLICY))
    ]


def test_everything_that_can_be_asked_for_is_sent(rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_bytes(a_png(4, 4))
    (tmp_path / "mask.webp").write_bytes(b"RIFF0000WEBPVP8L")
    arguments = ["--image", str(tmp_path / "in.png"), "--mask", str(tmp_path / "mask.webp"), "--seed", "7"]
    arguments += ["--negative", "dogs", "--size", "640x512", "--param", "denoise=0.5", "-p", "style=pencil"]
    arguments += ["--count", "2", "--model", "sdxl", "--effort", "3", "--local-only", "--preview", "seen.jpg"]
    assert rung("image", "a hat", *arguments) == ExitCode.OK

    (asked,) = rung.client.asked
    assert asked[1] == (
        ImageInput(
            prompt="a hat",
            negative_prompt="dogs",
            operation="inpaint",
            width_pixels=640,
            height_pixels=512,
            seed=7,
            images=(
                ImagePart(content_type="image/png", data=a_png(4, 4)),
                ImagePart(content_type="image/webp", data=b"RIFF0000WEBPVP8L"),
            ),
            parameters={"denoise": 0.5, "style": "pencil"},
            count=2,
            previews=True,
        ),
        "sdxl",
        3,
        Policy(local_only=True, priority=Priority.USER),
    )


def test_a_picture_to_start_from_is_enough(rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "in.jpg").write_bytes(b"\xff\xd8\xff\xe0 and so on")
    assert rung("image", "-i", str(tmp_path / "in.jpg")) == ExitCode.OK
    assert (rung.wanted.operation, rung.wanted.images[0].content_type) == ("img2img", "image/jpeg")
    assert rung.files == ["image.png"]


def test_several_pictures_are_numbered_and_named_by_what_they_are(rung: Rung) -> None:
    rung.client.events = drawn(picture("artifact-1", b"one"), picture("artifact-2", b"two", "image/webp"))
    assert rung("image", "a cat", "--count", "2") == ExitCode.OK
    assert rung.files == ["a-cat-1.png", "a-cat-2.webp"]

    rung.client.events = drawn(picture("artifact-1", b"one"), picture("artifact-2", b"two"))
    assert rung("image", "a cat", "--count", "2", "-o", "cat.png") == ExitCode.OK
    assert rung.out.splitlines() == ["cat-1.png", "cat-2.png"]
    assert (rung.folder / "cat-2.png").read_bytes() == b"two"


def test_nothing_is_overwritten_unless_forced(rung: Rung) -> None:
    (rung.folder / "cat.png").write_bytes(b"precious")
    assert rung("image", "a cat", "-o", "cat.png") == ExitCode.REFUSED
    assert rung.client.asked == []
    assert "cat.png is there already; --force overwrites it" in rung.err

    (rung.folder / "a-cat.png").write_bytes(b"precious")
    assert rung("image", "a cat") == ExitCode.OK
    assert rung.out == "a-cat-2.png\n"
    rung.client.events = drawn(picture("artifact-1", a_png()))
    assert rung("image", "a cat", "-o", "cat.png", "--force") == ExitCode.OK
    assert (rung.folder / "cat.png").read_bytes() == a_png()
    assert (rung.folder / "a-cat.png").read_bytes() == b"precious"


def test_a_file_that_appears_meanwhile_is_left_alone(tmp_path: Path) -> None:
    output = Output(path=str(tmp_path / "cat.png"), words="")
    output.check(1)
    artifact = Artifact("artifact-1", "job-1", "image/png", 3, "", 1.0)
    saved = [
        output.save([ArtifactFile(artifact=artifact, data=data)], io.BytesIO())
        for data in (b"one", b"two", b"three")
    ]
    assert [(path.name, path.read_bytes()) for (path,) in saved] == [
        ("cat.png", b"one"),
        ("cat-2.png", b"two"),
        ("cat-3.png", b"three"),
    ]


def test_a_picture_goes_to_stdout_and_nothing_else_does(rung: Rung, monkeypatch: pytest.MonkeyPatch) -> None:
    stdout = io.TextIOWrapper(io.BytesIO())
    monkeypatch.setattr(sys, "stdout", stdout)
    assert rung("image", "a cat", "-o", "-") == ExitCode.OK
    assert isinstance(stdout.buffer, io.BytesIO)
    assert stdout.buffer.getvalue() == a_png()
    assert rung.files == []


def test_as_json_it_is_the_result(rung: Rung) -> None:
    rung.client.events = drawn(replace(picture("artifact-1", a_png()), seed=7))
    assert rung("image", "a cat", "--json", "-o", "cat.png") == ExitCode.OK
    result = json.loads(rung.out)
    assert (result["job_id"], result["served"]["target"]) == ("job-1", "comfyui")
    (image,) = result["images"]
    assert (image["path"], image["id"], image["size_bytes"]) == ("cat.png", "artifact-1", len(a_png()))
    assert (image["sha256"], image["seed"]) == (hashlib.sha256(a_png()).hexdigest(), 7)


def test_detached_it_prints_the_job_and_leaves(rung: Rung) -> None:
    rung.client.jobs = [
        Job(id="job-9", kind=JobKind.IMAGE, state=JobState.PENDING, model="", create_time_s=1.0)
    ]
    assert rung("image", "a cat", "--detach") == ExitCode.OK
    assert rung.out == "job-9\n"
    assert "rung jobs watch job-9" in rung.err
    assert [what for what, _ in rung.client.asked] == ["create_job"]


def test_previews_are_kept_in_a_file(rung: Rung) -> None:
    preview = ArtifactChunk("artifact-p", "image/jpeg", data=b"half a cat", preview=True)
    rung.client.events = drawn(preview, picture("artifact-1", a_png()))
    assert rung("image", "a cat", "-o", "cat.png", "--preview", "seen.jpg") == ExitCode.OK
    assert (rung.folder / "seen.jpg").read_bytes() == b"half a cat"
    assert rung.files == ["cat.png", "seen.jpg"]


def test_an_interrupt_cancels_the_job_and_says_so(rung: Rung) -> None:
    rung.client.events = rung.client.events[:3]
    rung.client.jobs = [
        Job(id="job-1", kind=JobKind.IMAGE, state=JobState.CANCELLED, model="", create_time_s=1.0)
    ]
    rung.client.interrupt = lambda: signal.raise_signal(signal.SIGINT)
    assert rung("image", "a cat") == ExitCode.INTERRUPTED
    assert ("cancel_job", "job-1") in rung.client.asked
    assert rung.err.splitlines()[-1] == "cancelled job-1"
    assert rung.files == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((), "the prompt is empty"),
        (("a cat", "--size", "large"), "is no size"),
        (("a cat", "--param", "denoise"), "NAME=VALUE"),
        (("a cat", "--mask", "rung.toml"), "give --image"),
        (("a cat", "--image", "nowhere.png"), "cannot be read"),
        (("a cat", "-o", "nowhere/cat.png"), "there is no folder nowhere"),
        (("a cat", "-o", "-", "-n", "2"), "only one file can go to stdout"),
        (("a cat", "-o", "-", "--json"), "without --json"),
    ],
)
def test_wrong_usage_is_refused_before_anything_is_drawn(
    rung: Rung, arguments: tuple[str, ...], says: str
) -> None:
    assert rung("image", *arguments) == ExitCode.USAGE
    assert says in " ".join(rung.err.replace("│", " ").split())
    assert rung.client.asked == []


def test_a_text_is_no_picture(rung: Rung, tmp_path: Path) -> None:
    (tmp_path / "in.png").write_text("a picture, honestly")
    assert rung("image", "a cat", "--image", str(tmp_path / "in.png")) == ExitCode.USAGE
    assert "PNG, JPEG or WebP" in rung.err


def test_failures_have_their_exit_codes(rung: Rung) -> None:
    rung.client.events = log(JobFailed(FailureReason.VRAM_INFEASIBLE, "a game holds 20 GB"))
    assert rung("image", "a cat") == ExitCode.FAILED
    assert "a game holds 20 GB" in rung.err
    rung.client.events = []
    rung.client.error = UnknownModelError("there is no model x", model="x")
    assert rung("image", "a cat", "-m", "x") == ExitCode.NOT_FOUND


def test_watching_a_job_that_has_phases_shows_them(rung: Rung) -> None:
    assert rung("jobs", "watch", "job-1") == ExitCode.OK
    assert rung.out.splitlines()[:2] == [
        "[  3.0s] Building quality workflow (1024x1024)",
        "[  4.0s] Sampling 50%",
    ]
    rung.client.events = log(
        JobAccepted(JobKind.IMAGE, ""), JobFailed(FailureReason.ENGINE_LOST, "ComfyUI is gone")
    )
    assert rung("jobs", "watch", "job-1") == ExitCode.FAILED
    assert "engine_lost: ComfyUI is gone" in rung.out


def test_watching_does_not_fetch_what_was_drawn(rung: Rung) -> None:
    assert rung("jobs", "watch", "job-1", "--json") == ExitCode.OK
    payloads = [json.loads(line)["payload"] for line in rung.out.splitlines()]
    pieces = [payload for payload in payloads if "artifact_id" in payload]
    assert pieces
    assert all(piece["length_bytes"] and not piece.get("data") for piece in pieces)


def test_the_log_of_such_a_job_can_still_be_had(rung: Rung) -> None:
    assert rung("jobs", "watch", "job-1", "--log") == ExitCode.OK
    assert rung.out.splitlines()[0].split() == ["1", "1.000", "s", "accepted", "image"]
