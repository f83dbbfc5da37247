"""`rung mesh`. The client is a fake; nothing listens."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from rung.cli import ExitCode, main
from rung.cli._session import Connection
from rung.errors import NoTargetError
from rung.types import (
    ArtifactChunk,
    EventPayload,
    FailureReason,
    ImagePart,
    JobAccepted,
    JobDone,
    JobEvent,
    JobFailed,
    JobKind,
    MeshInput,
    Phase,
    PhaseProgress,
    Policy,
    Priority,
    Routed,
    Served,
)
from tests.fakes.client import FakeClient
from tests.fakes.control_plane import a_job
from tests.fakes.pictures import a_png

SERVED = Served("", "mesh-1", "workstation", "hunyuan")
GLB = b"glTF" + bytes(96)
POLICY = Policy(priority=Priority.USER)
SHA256 = hashlib.sha256(GLB).hexdigest()
MESH = ArtifactChunk("artifact-1", "model/gltf-binary", 0, GLB, SHA256, len(GLB), len(GLB))


def log(*payloads: EventPayload) -> list[JobEvent]:
    return [JobEvent("job-1", place, 1.0, float(place), each) for place, each in enumerate(payloads, 1)]


MADE = log(
    JobAccepted(JobKind.MESH, ""),
    PhaseProgress(Phase.SAMPLING, "picture: drawing", step=1, total=2, percent=50),
    Routed(SERVED),
    PhaseProgress(Phase.GENERATING, "mesh-1 makes the shape; seed 7"),
    MESH,
    JobDone("stop", SERVED),
)


class Rung:
    """Runs the command as a shell would, in a folder of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.client = FakeClient()
        self.client.events = MADE
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


@pytest.fixture
def rung(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Rung:
    for name in ("RUNG_ADDRESS", "RUNG_TOKEN", "RUNG_DEBUG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    folder = tmp_path / "meshes"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return Rung(capsys, folder)


def test_a_mesh_is_written_and_its_phases_are_told(rung: Rung) -> None:
    assert rung("mesh", "a chair", "-o", "chair.glb") == ExitCode.OK

    assert rung.out == "chair.glb\n"
    assert (rung.folder / "chair.glb").read_bytes() == GLB
    assert rung.err.splitlines() == [
        "[  2.0s] picture: drawing 50%",
        "[  4.0s] mesh-1 makes the shape; seed 7",
        "[  6.0s] 1 mesh generated",
        "mesh-1 on workstation · 100 B · job job-1",
    ]
    assert rung.client.asked == [("generate", (MeshInput(prompt="a chair"), "", None, POLICY))]


def test_a_picture_is_sent_and_the_mesh_is_named_after_it(rung: Rung) -> None:
    (rung.folder / "My Chair.png").write_bytes(a_png())
    arguments = ("--image", "My Chair.png", "--texture", "--seed", "7", "-m", "hunyuan", "--local-only")
    assert rung("mesh", *arguments) == ExitCode.OK

    assert rung.out == "my-chair.glb\n"
    picture = ImagePart(content_type="image/png", data=a_png())
    ((_, asked),) = rung.client.asked
    assert asked[:3] == (MeshInput(image=picture, seed=7, texture=True), "hunyuan", None)
    assert asked[3] == Policy(local_only=True, priority=Priority.USER)


def test_as_json_it_is_told_what_came_of_it(rung: Rung) -> None:
    assert rung("mesh", "a chair", "--json", "-o", "chair.glb") == ExitCode.OK
    told = json.loads(rung.out)
    assert told["job_id"] == "job-1"
    (mesh,) = told["meshes"]
    assert (mesh["path"], mesh["sha256"]) == ("chair.glb", SHA256)


def test_what_is_there_already_is_kept_unless_forced_and_nothing_is_asked(rung: Rung) -> None:
    there = rung.folder / "chair.glb"
    there.write_bytes(b"mine")
    assert rung("mesh", "a chair", "-o", "chair.glb") == ExitCode.REFUSED
    assert (there.read_bytes(), rung.client.asked) == (b"mine", [])
    assert rung("mesh", "a chair", "-o", "chair.glb", "--force") == ExitCode.OK
    assert there.read_bytes() == GLB


def test_a_detached_mesh_is_a_job_to_come_back_to(rung: Rung) -> None:
    rung.client.jobs = [a_job("job-7")]
    assert rung("mesh", "a chair", "--detach") == ExitCode.OK
    assert rung.out == "job-7\n"
    assert "rung jobs watch job-7" in rung.err


def test_a_failure_is_told_in_one_line(rung: Rung) -> None:
    rung.client.events = log(JobFailed(FailureReason.NO_TARGET, "no picture to model: refused"))
    assert rung("mesh", "a chair") == ExitCode.FAILED
    assert "error: no picture to model: refused" in rung.err
    assert list(rung.folder.iterdir()) == []


def test_a_mesh_that_nobody_makes_is_told(rung: Rung) -> None:
    rung.client.events = []
    rung.client.error = NoTargetError("nothing can answer now")
    assert rung("mesh", "a chair") == ExitCode.FAILED
    assert "error: nothing can answer now" in rung.err


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ((), "there is nothing to model"),
        (("a chair", "--image", "x.png"), "not both"),
        (("--image", "missing.png"), "missing.png cannot be read"),
        (("a chair", "-o", "-", "--json"), "without --json"),
    ],
)
def test_wrong_usage_is_said(rung: Rung, arguments: tuple[str, ...], why: str) -> None:
    assert rung("mesh", *arguments) == ExitCode.USAGE
    assert why in rung.err
    assert rung.client.asked == []
