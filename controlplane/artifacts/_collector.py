"""Takes the artifacts of one attempt at a job as an engine makes them."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable
from types import TracebackType
from typing import TYPE_CHECKING

from msgspec.structs import replace

from controlplane.artifacts._files import Draft
from controlplane.jobs import LiveJob
from rung.errors import ArtifactNotStoredError, EngineProtocolError, UnavailableError
from rung.types import Artifact, ArtifactChunk

if TYPE_CHECKING:
    from controlplane.artifacts._artifacts import Artifacts

#: What a log tells of at once, and what is read at once.
PIECE_BYTES = 256 * 1024

#: Characters of a media type that are kept.
_MAX_TYPE = 128

#: Not secrets: an id tells apart, and guards nothing.
_random = random.Random()  # noqa: S311


class _Making:
    """One artifact on its way; `told_bytes` of it are in the job's log."""

    __slots__ = (
        "artifact",
        "content_type",
        "draft",
        "has_row",
        "id",
        "size_bytes",
        "told_bytes",
        "wanted_bytes",
    )

    def __init__(self, draft: Draft, artifact_id: str, content_type: str) -> None:
        self.draft = draft
        self.id = artifact_id
        self.content_type = content_type
        self.size_bytes = 0
        self.told_bytes = 0
        self.wanted_bytes = 0
        self.has_row = False
        self.artifact: Artifact | None = None


class Collector:
    """Keeps the artifacts of one attempt at a job, and tells the job of each piece.

    A piece is told once it can be read, the last one once the artifact is whole. Leaving the context
    completes artifacts of unknown size; leaving it with an error, or cancelled, discards all that are not
    whole. Not for several tasks at once.
    """

    def __init__(self, artifacts: Artifacts, job: LiveJob, seed: int | None) -> None:
        self._artifacts = artifacts
        self._job = job
        self._seed = seed
        self._ids: dict[str, str] = {}
        self._making: dict[str, _Making] = {}

    @property
    def has_told(self) -> bool:
        """Whether a piece is in the job's log, so that nobody else may begin anew; previews do not count."""
        return any(each.told_bytes or each.artifact is not None for each in self._making.values())

    @property
    def artifacts(self) -> tuple[Artifact, ...]:
        """Those that are whole, in the order in which they began."""
        return tuple(each.artifact for each in self._making.values() if each.artifact is not None)

    async def take(self, chunk: ArtifactChunk) -> None:
        """Keep a piece of any length, under an id of the fleet's; a preview is only passed on.

        The first piece may claim the size, the last one also the SHA-256; either ends the artifact once it
        is reached.

        Raises:
            EngineProtocolError: pieces are not in order, or what was claimed of them is not true.
            ArtifactNotStoredError: the disk is full, or the artifact is larger than all may be together.
        """
        own_id = self._ids.get(chunk.artifact_id) or self._ids.setdefault(chunk.artifact_id, _new_id())
        if chunk.preview:
            self._job.artifact(replace(chunk, artifact_id=own_id, length_bytes=len(chunk.data)))
            return
        making = self._making.get(own_id)
        if making is None:
            making = _Making(Draft(self._artifacts.directory, own_id), own_id, chunk.content_type[:_MAX_TYPE])
            self._making[own_id] = making
        self._check(making, chunk)
        await self._on_disk(lambda: making.draft.write(chunk.data))
        making.size_bytes += len(chunk.data)
        if chunk.sha256 or making.size_bytes == making.wanted_bytes:
            await self._complete(making, chunk.sha256)
        else:
            self._tell(making)

    def _check(self, making: _Making, chunk: ArtifactChunk) -> None:
        if making.artifact is not None:
            raise EngineProtocolError("the engine went on with an artifact that it had ended")
        if chunk.offset_bytes != making.size_bytes:
            raise EngineProtocolError(
                f"the engine sent byte {chunk.offset_bytes} of an artifact after {making.size_bytes} bytes"
            )
        if making.wanted_bytes and chunk.size_bytes and chunk.size_bytes != making.wanted_bytes:
            raise EngineProtocolError("the engine changed its mind about the size of an artifact")
        making.wanted_bytes = chunk.size_bytes or making.wanted_bytes
        end = making.size_bytes + len(chunk.data)
        if making.wanted_bytes and end > making.wanted_bytes:
            raise EngineProtocolError(
                f"the engine sent {end} bytes of an artifact of {making.wanted_bytes} bytes"
            )
        limit = self._artifacts.max_bytes
        if max(end, making.wanted_bytes) > limit:
            raise ArtifactNotStoredError(
                f"the artifact has more than {limit} bytes; artifacts.max_bytes sets the limit",
                limit_bytes=str(limit),
            )

    async def _complete(self, making: _Making, claimed_sha256: str) -> None:
        size_bytes, sha256 = making.size_bytes, making.draft.sha256
        if size_bytes == 0:
            raise EngineProtocolError("the engine made an artifact without a byte")
        if making.wanted_bytes and size_bytes != making.wanted_bytes:
            raise EngineProtocolError(
                f"the engine sent {size_bytes} bytes of an artifact of {making.wanted_bytes} bytes"
            )
        if claimed_sha256 and claimed_sha256.lower() != sha256:
            raise EngineProtocolError(
                f"the SHA-256 of an artifact is {sha256}; the engine said {claimed_sha256}"
            )
        artifact = Artifact(
            id=making.id,
            job_id=self._job.id,
            content_type=making.content_type,
            size_bytes=size_bytes,
            sha256=sha256,
            create_time_s=self._artifacts.now_s(),
            seed=self._seed,
        )
        await self._on_disk(making.draft.finish)
        making.has_row = True
        try:
            await self._artifacts.keep(artifact)
        except UnavailableError as error:
            # Not the target's fault: another one would fare no better.
            raise ArtifactNotStoredError(f"the artifact cannot be stored: {error.message}") from error
        making.artifact = artifact
        self._tell(making)

    def _tell(self, making: _Making) -> None:
        """Add what is not in the log yet, in pieces that a reader takes at once."""
        whole = making.artifact
        while True:
            length = min(PIECE_BYTES, making.size_bytes - making.told_bytes)
            end = making.told_bytes + length
            last = end == making.size_bytes
            if length or (last and whole is not None):
                self._job.artifact(
                    ArtifactChunk(
                        artifact_id=making.id,
                        content_type=making.content_type,
                        offset_bytes=making.told_bytes,
                        sha256=whole.sha256 if last and whole is not None else "",
                        size_bytes=making.wanted_bytes or (whole.size_bytes if whole is not None else 0),
                        length_bytes=length,
                        seed=whole.seed if last and whole is not None else None,
                    )
                )
            making.told_bytes = end
            if last:
                return

    async def __aenter__(self) -> Collector:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None:
                for making in self._making.values():
                    if making.artifact is None:
                        await self._complete(making, "")
        finally:
            rest = [making for making in self._making.values() if making.artifact is None]
            if rest:
                await asyncio.shield(self._artifacts.aside(self._discard(rest)))

    async def _discard(self, rest: list[_Making]) -> None:
        for making in rest:
            await self._artifacts.forget(making.draft, making.id, has_row=making.has_row)

    async def _on_disk(self, work: Callable[[], None]) -> None:
        try:
            await self._artifacts.write(work)
        except OSError as error:
            raise ArtifactNotStoredError(f"the artifact cannot be stored: {error}") from error


def _new_id() -> str:
    """An id that sorts by time."""
    return f"artifact-{time.time_ns() // 1_000_000:012x}{_random.getrandbits(40):010x}"
