"""The templates that there are: those of the package, and users' own from a folder."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

import msgspec
from msgspec import Struct

from controlplane.workflows._template import Template
from rung.errors import InvalidRequestError
from rung.types import Workflow


class Problem(Struct, frozen=True):
    """A file of a user that is no template, and why."""

    file: str
    what: str


class Workflows:
    """Templates by name.

    Args:
        own: users' templates; one with the name of a built-in one takes its place.
        problems: files that are none.
    """

    def __init__(self, own: Iterable[Template] = (), problems: Iterable[Problem] = ()) -> None:
        self._templates: Mapping[str, Template] = built_in() | {each.name: each for each in own}
        self.problems = tuple(problems)

    def get(self, name: str) -> Template:
        """A template.

        Raises:
            InvalidRequestError: there is none of this name; the message lists those that there are.
        """
        template = self._templates.get(name)
        if template is None:
            near = difflib.get_close_matches(name, self._templates, 1)
            guess = f"; did you mean {near[0]}?" if near else ""
            known = ", ".join(sorted(self._templates))
            raise InvalidRequestError(f"there is no operation {name!r}{guess} Operations are: {known}")
        return template

    def listed(self) -> tuple[Workflow, ...]:
        """All as callers see them, by name."""
        return tuple(self._templates[name].listed() for name in sorted(self._templates))


def built_in() -> dict[str, Template]:
    """The templates of the package, by name."""
    files = resources.files("controlplane.workflows") / "templates"
    found: dict[str, Template] = {}
    for file in sorted(files.iterdir(), key=lambda each: each.name):
        name = file.name.removesuffix(".json")
        value: dict[str, Any] = msgspec.json.decode(file.read_bytes())
        found[name] = msgspec.convert(value | {"name": name}, Template)
    return found
