"""What the agent remembers of its engines, so that a restart disturbs none of them."""

from __future__ import annotations

import fcntl
import hashlib
import os
from pathlib import Path
from typing import IO

import msgspec
import structlog
from msgspec import Struct

from nodeagent.runtimes import RunningEngine
from rung.errors import FailedPreconditionError
from rung.types import DeploymentSpec, Residency, ResidencyClass

_log = structlog.get_logger("rung.agent")

#: Times that are kept to tell how long the next load, sleep or wake will take.
KEPT_TIMES = 5


class EngineRecord(Struct, frozen=True, kw_only=True):
    """One deployment as the agent last left it.

    `residency_class` is what holds for the engine that runs: a later spec does not unpin it. With
    residency STARTING and no PID in `running`, the agent was about to start it. `last_run` is the
    engine that ran before, whose output can still be read. `sleep_level` is that of an engine that
    sleeps, falls asleep or wakes; with one of these residencies the agent may have left it half-way.
    `shrunk` stands in its place where only the KV cache is given up. `kv_cache_bytes` is what the engine
    said of that when it loaded. `transition_times_s` has what earlier sleeps and wakes took, by what they
    were ("sleep 1", "wake 2", …).
    """

    spec: DeploymentSpec
    residency: Residency
    residency_class: ResidencyClass
    generation: int
    running: RunningEngine | None = None
    last_run: RunningEngine | None = None
    load_times_s: tuple[float, ...] = ()
    adopted: bool = False
    sleep_level: int = 0
    shrunk: bool = False
    kv_cache_bytes: int | None = None
    transition_times_s: dict[str, tuple[float, ...]] = {}


class Records:
    """Files in the agent's state folder, each replaced in one step.

    Raises:
        FailedPreconditionError: another agent uses the folder.
    """

    def __init__(self, state_dir: Path) -> None:
        self._engines = state_dir / "engines"
        #: A record could not be read: what carries our mark may be its engine, and pinned.
        self.unreadable = False
        self._epoch = state_dir / "epoch"
        self._engines.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = _lock(state_dir)

    def load(self) -> list[EngineRecord]:
        """All records. One that cannot be read is set aside and reported, never acted upon."""
        found: list[EngineRecord] = []
        for path in sorted(self._engines.glob("*.json")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=EngineRecord))
            except (OSError, msgspec.DecodeError) as error:
                self.unreadable = True
                _log.error("record_unreadable", path=str(path), error=str(error))
                path.replace(path.with_suffix(".unreadable"))
        return found

    def save(self, record: EngineRecord) -> None:
        """Store a record; it is on disk when this returns."""
        _replace(self._path(record.spec.id), msgspec.json.encode(record))

    def delete(self, deployment_id: str) -> None:
        """Forget a deployment; it is off the disk when this returns."""
        path = self._path(deployment_id)
        path.unlink(missing_ok=True)
        _sync_folder(path.parent)

    def load_epoch(self) -> int:
        """The highest epoch that was seen; 0 before the first."""
        try:
            return int(self._epoch.read_text())
        except (FileNotFoundError, ValueError):
            return 0

    def save_epoch(self, epoch: int) -> None:
        """Store the highest epoch."""
        _replace(self._epoch, str(epoch).encode())

    def close(self) -> None:
        """Let go of the folder."""
        self._lock.close()

    def _path(self, deployment_id: str) -> Path:
        # An id may have a slash (one that discovery gave, say); a file name may not.
        return self._engines / f"{deployment_id.replace('/', '%2F')}.json"


def spec_hash(spec: DeploymentSpec) -> str:
    """Changes when the engine would have to be started anew for a spec to hold."""
    relevant = msgspec.json.encode(
        (spec.engine.engine, spec.engine.runtime, spec.engine.port, spec.engine.gpus)
    )
    return hashlib.sha256(relevant).hexdigest()[:16]


def _replace(path: Path, data: bytes) -> None:
    partial = path.with_name(f"{path.name}.part")
    with partial.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Bring a folder's names to disk: without this a crash of the machine may undo a rename."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _lock(state_dir: Path) -> IO[str]:
    file = open(state_dir / "agent.lock", "a+", encoding="ascii")  # noqa: SIM115 - held until the end
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise FailedPreconditionError(
            f"another agent uses {state_dir}; stop it, or give this one another state_dir"
        ) from None
    return file
