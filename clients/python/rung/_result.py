"""What a generation comes to: its files, and what was said of them."""

from __future__ import annotations

import os
from pathlib import Path

from msgspec import Struct

from rung.types import Artifact, Served, Usage, artifact_file_name


class ArtifactFile(Struct, frozen=True, kw_only=True):
    """An artifact, whole, with what is in it; its SHA-256 was checked."""

    artifact: Artifact
    data: bytes

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file; returns its path.

        Args:
            path: file to make or replace, or a folder to put one into, under a name of its kind.

        Raises:
            OSError: the file cannot be written.
        """
        target = Path(path)
        if target.is_dir():
            target /= artifact_file_name(self.artifact.id, self.artifact.content_type)
        target.write_bytes(self.data)
        return target


class GenerationResult(Struct, frozen=True, kw_only=True):
    """A complete generation: the files that it made, in order, and its text where it made one."""

    job_id: str
    artifacts: tuple[ArtifactFile, ...] = ()
    text: str = ""
    usage: Usage | None = None
    served: Served | None = None
    finish_reason: str = ""

    @property
    def images(self) -> tuple[ArtifactFile, ...]:
        """Those of the files that are pictures that do not move."""
        return tuple(each for each in self.artifacts if each.artifact.content_type.startswith("image/"))
