"""The templates that there are: those of the package, and users' own."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import resources
from pathlib import Path

from controlplane.workflows._folder import Problem, read_folder
from controlplane.workflows._read import built_in_template
from controlplane.workflows._template import Template
from rung.errors import InvalidRequestError
from rung.types import Workflow


class Workflows:
    """Templates by name.

    Args:
        own: users' templates; one with the name of a built-in one takes its place.
        problems: files that are none.
    """

    def __init__(self, own: Iterable[Template] = (), problems: Iterable[Problem] = ()) -> None:
        self._templates: Mapping[str, Template] = built_in() | {each.name: each for each in own}
        self.problems = tuple(problems)

    @classmethod
    def of_folder(cls, folder: Path | None) -> Workflows:
        """The built-in templates and those of a folder. Never raises; see `problems`."""
        return cls() if folder is None else cls(*read_folder(folder))

    def get(self, name: str) -> Template:
        """A template.

        Raises:
            InvalidRequestError: there is none of this name; the message lists those that there are.
        """
        template = self._templates.get(name)
        if template is None:
            near = difflib.get_close_matches(name, self._templates, 1)
            guess = f"; did you mean {near[0]}?" if near else "."
            known = ", ".join(sorted(self._templates))
            raise InvalidRequestError(f"there is no operation {name!r}{guess} Operations are: {known}")
        return template

    def listed(self) -> tuple[Workflow, ...]:
        """All as callers see them, by name."""
        return tuple(self._templates[name].listed() for name in sorted(self._templates))


@cache
def _built_in() -> tuple[Template, ...]:
    files = resources.files("controlplane.workflows") / "templates"
    return tuple(
        built_in_template(file.name.removesuffix(".json"), file.read_bytes())
        for file in files.iterdir()
        if file.name.endswith(".json")
    )


def built_in() -> dict[str, Template]:
    """The templates of the package, by name."""
    return {template.name: template for template in _built_in()}
