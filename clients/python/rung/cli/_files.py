"""Files that commands read and write: pictures to start from, and where results go."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import typer
from msgspec import Struct

from rung import ArtifactFile
from rung.errors import FailedPreconditionError
from rung.types import ImagePart, artifact_file_name

STDOUT = "-"
_LONGEST_NAME = 48
_MAGIC = ((b"\x89PNG\r\n\x1a\n", "image/png"), (b"\xff\xd8\xff", "image/jpeg"))


def read_picture(path: Path) -> ImagePart:
    """A picture from a file.

    Raises:
        typer.BadParameter: there is no such file, or it is no PNG, JPEG or WebP.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise typer.BadParameter(f"{path} cannot be read: {error.strerror}") from None
    for magic, content_type in _MAGIC:
        if data.startswith(magic):
            return ImagePart(content_type=content_type, data=data)
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return ImagePart(content_type="image/webp", data=data)
    raise typer.BadParameter(f"{path} is no picture; give a PNG, JPEG or WebP file")


class Output(Struct, frozen=True, kw_only=True):
    """Where the files of a result go.

    Attributes:
        path: `-` for stdout, a file, or a folder; empty for the folder we are in.
        words: what files are named after that get no name.
        force: overwrite what is there.
    """

    path: str
    words: str
    force: bool = False

    @property
    def is_stdout(self) -> bool:
        """Whether files go to stdout."""
        return self.path == STDOUT

    def check(self, count: int) -> None:
        """Refuse before anything is made what could not be kept afterwards.

        Raises:
            FailedPreconditionError: a file is there already.
            typer.BadParameter: the folder is not there, or several files would go to stdout.
        """
        if self.is_stdout:
            if count > 1:
                raise typer.BadParameter("only one file can go to stdout")
            return
        target = Path(self.path)
        if not self.path or target.is_dir():
            return
        if not target.parent.is_dir():
            raise typer.BadParameter(f"there is no folder {target.parent}")
        for stem in _numbered(target.stem, count):
            each = target.with_stem(stem)
            if each.exists() and not self.force:
                raise FailedPreconditionError(f"{each} is there already; --force overwrites it")

    def save(self, files: Sequence[ArtifactFile], stdout: BinaryIO) -> list[Path]:
        """Write the files; returns where they are.

        A file that appeared in the meantime is not overwritten: another name is found.

        Raises:
            OSError: they cannot be written.
        """
        if self.is_stdout:
            for file in files:
                stdout.write(file.data)
            stdout.flush()
            return []
        target = Path(self.path)
        if not self.path or target.is_dir():
            stems = _numbered(_name_of(self.words), len(files))
            targets = [target / f"{stem}{_suffix(file)}" for stem, file in zip(stems, files, strict=True)]
        else:
            targets = [target.with_stem(stem) for stem in _numbered(target.stem, len(files))]
        return [self._write(each, file.data) for each, file in zip(targets, files, strict=True)]

    def _write(self, path: Path, data: bytes) -> Path:
        if self.force:
            path.write_bytes(data)
            return path
        free, number = path, 1
        while True:
            try:
                with free.open("xb") as file:
                    file.write(data)
            except FileExistsError:
                number += 1
                free = path.with_stem(f"{path.stem}-{number}")
            else:
                return free


def _numbered(stem: str, count: int) -> list[str]:
    """`cat` for one file; `cat-1`, `cat-2` … for several."""
    return [stem] if count == 1 else [f"{stem}-{number}" for number in range(1, count + 1)]


def _name_of(words: str) -> str:
    name = re.sub(r"\W+", "-", words.lower()).strip("-")
    if len(name) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME + 1].rpartition("-")[0] or name[:_LONGEST_NAME]
    return name or "result"


def _suffix(file: ArtifactFile) -> str:
    return Path(artifact_file_name(file.artifact.id, file.artifact.content_type)).suffix
