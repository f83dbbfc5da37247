"""Users' templates in a folder: `NAME.json`, and `NAME.yaml` beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from controlplane.workflows._read import user_template
from controlplane.workflows._template import Template

_MAX_FILE_BYTES = 8 * 1024**2
_SIDECAR_SUFFIXES = (".yaml", ".yml")


class Problem(Struct, frozen=True):
    """A file of a user that is no template, and why."""

    file: str
    what: str

    def __str__(self) -> str:
        """As compilers do it."""
        return f"{self.file}: {self.what}"


def read_folder(folder: Path) -> tuple[tuple[Template, ...], tuple[Problem, ...]]:
    """The templates of a folder by name, and what is wrong with other files there. Never raises."""
    try:
        files = sorted(file for file in folder.iterdir() if file.suffix == ".json")
    except OSError as error:
        return (), (Problem(str(folder), f"cannot be read: {error.strerror}"),)
    templates, problems = [], []
    for file in files:
        try:
            templates.append(read_file(file))
        except ValueError as error:
            problems.append(Problem(str(file), str(error)))
    return tuple(templates), tuple(problems)


def read_file(file: Path) -> Template:
    """One template, with the sidecar beside it.

    Raises:
        ValueError: what is wrong; the text does not name the file.
    """
    graph = _json(_text(file))
    sidecar = next(
        (each for suffix in _SIDECAR_SUFFIXES if (each := file.with_suffix(suffix)).exists()), None
    )
    if sidecar is None:
        return user_template(file.stem, graph)
    try:
        return user_template(file.stem, graph, _yaml(_text(sidecar)))
    except yaml.YAMLError as error:
        raise ValueError(f"{sidecar.name} is no YAML: {_one_line(str(error))}") from None


def _text(file: Path) -> str:
    try:
        if file.stat().st_size > _MAX_FILE_BYTES:
            raise ValueError(f"is larger than {_MAX_FILE_BYTES // 1024**2} MiB")
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError("is no text in UTF-8") from None
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _json(text: str) -> object:
    try:
        value: object = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"is no JSON: {error}") from None
    return value


def _yaml(text: str) -> object:
    value: Any = yaml.safe_load(text)
    # An empty file says nothing.
    return {} if value is None else value


def _one_line(text: str) -> str:
    return " ".join(text.split())
