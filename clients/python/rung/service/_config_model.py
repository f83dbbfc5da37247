"""What the configurations of both servers share: their sections, their log, their published schema."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class ConfigModel(BaseModel):
    """A section: nothing unknown in it, nothing changes, fields go by their names or by their aliases.

    The docstring below a field is its description in the published schema.
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_by_name=True,
        validate_by_alias=True,
        use_attribute_docstrings=True,
    )


class LogConfig(ConfigModel):
    """Logs."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """Least that is logged; `info` by default."""
    form: Literal["auto", "json", "console"] = "auto"
    """`auto` by default: colours on a terminal, JSON lines elsewhere."""


def published_schema(model: type[BaseModel], *, name: str, title: str) -> dict[str, Any]:
    """The JSON schema of a file, for editors.

    Args:
        model: what the file is read into.
        name: what the schema is known by, as `urn:rung:<name>`.
        title: what the file is, in words.
    """
    head = {"$schema": "https://json-schema.org/draft/2020-12/schema", "$id": f"urn:rung:{name}"}
    schema = head | model.model_json_schema(by_alias=True) | {"title": title}
    _join_lines(schema)
    return schema


def _join_lines(part: Any) -> None:
    """Make one line of each description: a docstring has as many as the source has room for."""
    if isinstance(part, list):
        for each in part:
            _join_lines(each)
    elif isinstance(part, dict):
        for name, value in part.items():
            if name == "description" and isinstance(value, str):
                part[name] = " ".join(value.split())
            else:
                _join_lines(value)
