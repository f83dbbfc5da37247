"""YAML and JSON Lines files into pydantic models, with errors that name file, line and field."""

from __future__ import annotations

import difflib
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, BeforeValidator, ValidationError, WithJsonSchema
from pydantic_core import ErrorDetails

from rung._sizes import parse_size
from rung.errors import ConfigError

M = TypeVar("M", bound=BaseModel)
Location = tuple[str | int, ...]

_DURATION = re.compile(r"(\d+(?:\.\d+)?)(ms|s|m|h|d)")
_DURATION_FACTORS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
_VARIABLE = re.compile(r"\$\{env:([A-Za-z_][A-Za-z0-9_]*)\}")
_MAP, _SEQ, _MERGE = (f"tag:yaml.org,2002:{kind}" for kind in ("map", "seq", "merge"))


def parse_duration(value: object) -> object:
    """Seconds from `15m`, `1h30m`, `250ms` or a number; other values are left for pydantic to refuse.

    Raises:
        ValueError: text that is not a duration.
    """
    if not isinstance(value, str):
        return value
    text = value.replace(" ", "")
    parts = _DURATION.findall(text)
    if not parts or "".join(number + unit for number, unit in parts) != text:
        raise ValueError(f"{value!r} is not a duration; write for instance 30s, 15m or 1h30m")
    return sum(float(number) * _DURATION_FACTORS[unit] for number, unit in parts)


#: Bytes, written as `12.8GiB`, `20GB` or a number.
ByteSize = Annotated[
    int, BeforeValidator(parse_size), WithJsonSchema({"type": ["integer", "string"], "examples": ["12GiB"]})
]
#: Seconds, written as `15m`, `1h30m` or a number.
DurationS = Annotated[
    float,
    BeforeValidator(parse_duration),
    WithJsonSchema({"type": ["number", "string"], "examples": ["15m"]}),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class OtherFile:
    """A kind of file that is taken for another one: the fields of its first level, and what to say of it."""

    fields: frozenset[str]
    what: str

    def is_meant(self, value: Any, model: type[BaseModel]) -> bool:
        """Whether a file that is no `model` has more of this kind's fields than of the model's."""
        if not isinstance(value, dict):
            return False
        return len(value.keys() & self.fields) > len(value.keys() & model.model_fields.keys())


def load_yaml_model(path: Path, model: type[M], *, other: OtherFile | None = None) -> M:
    """Read a file into a model. `${env:NAME}` in a text is replaced by the variable's value.

    Args:
        path: the file.
        model: the model.
        other: a kind of file that people take for this one.

    Raises:
        ConfigError: one line for each thing that is wrong, as `file:line: field: what`; one in all for a file
            of the other kind.
    """
    text = _read(path)
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.problem or error.context}") from None
    except yaml.reader.ReaderError as error:
        line = text.count("\n", 0, error.position) + 1
        raise ConfigError(f"{path}:{line}: not valid YAML: {error.reason}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from None
    reader = _Reader(path)
    value = reader.value(root, ()) if root is not None else {}
    if other is not None and other.is_meant(value, model):
        raise ConfigError(f"{path}:1: {other.what}")
    return _validated(reader, value, model)


def load_json_lines_model(path: Path, model: type[M], *, rows: str) -> M:
    """Read a file of JSON objects, one a line: the first is the model without its rows, the others are they.

    Args:
        path: the file; blank lines in it mean nothing.
        model: the model.
        rows: the field that the lines after the first one fill.

    Raises:
        ConfigError: one line for each thing that is wrong, as `file:line: field: what`.
    """
    reader = _Reader(path)
    head: dict[str, Any] | None = None
    found: list[Any] = []
    for number, line in enumerate(_read(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            raise ConfigError(f"{path}:{number}: not valid JSON: {error.msg}, column {error.colno}") from None
        if head is not None:
            reader.stands((rows, len(found)), number)
            found.append(value)
        elif isinstance(value, dict) and rows not in value:
            head = value
            for location in ((), (rows,), *((field,) for field in value)):
                reader.stands(location, number)
        else:
            raise ConfigError(f"{path}:{number}: the first line is an object without {rows}, which follow it")
    return _validated(reader, {**(head or {}), rows: found}, model)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{path}:{line}: cannot be read: it is not UTF-8") from None


def _validated(reader: _Reader, value: Any, model: type[M]) -> M:
    if reader.problems:
        raise ConfigError("\n".join(reader.problems))
    try:
        return model.model_validate(value)
    except ValidationError as error:
        problems = [reader.explain(found, model) for found in error.errors()]
        raise ConfigError("\n".join(dict.fromkeys(problems))) from None


class FieldError(ValueError):
    """A problem across fields: says which field is at fault, below the model that found it."""

    def __init__(self, location: Location, message: str) -> None:
        super().__init__(message)
        self.location = location


class _Reader:
    """Turns YAML nodes into values, and remembers on which line each of them stands."""

    def __init__(self, path: Path) -> None:
        self.problems: list[str] = []
        self._path = path
        self._lines: dict[Location, int] = {}
        self._constructor = yaml.SafeLoader("")
        self._open: list[yaml.Node] = []

    def stands(self, location: Location, line: int) -> None:
        """Remember where something stands that was not read here."""
        self._lines[location] = line

    def value(self, node: yaml.Node, location: Location) -> Any:
        line = node.start_mark.line + 1
        self._lines.setdefault(location, line)
        if isinstance(node, yaml.ScalarNode):
            value = self._scalar(node, location)
            return self._filled_in(value, location) if isinstance(value, str) else value
        if any(node is each for each in self._open):
            self.problems.append(self._line(line, location, "is a part of itself, by an alias"))
            return None
        if node.tag not in (_MAP, _SEQ):
            self.problems.append(self._line(line, location, f"the tag {node.tag} means nothing here"))
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(node, location)
            return [self.value(item, (*location, place)) for place, item in enumerate(node.value)]
        finally:
            self._open.pop()

    def _scalar(self, node: yaml.Node, location: Location) -> Any:
        try:
            return self._constructor.construct_object(node)
        except (yaml.YAMLError, ValueError, OverflowError):
            # Such as a date without such a day, or a tag of somebody's own.
            kind = node.tag.removeprefix("tag:yaml.org,2002:")
            what = f"{node.value!r} is no {kind}; put it in quotes if it is a text"
            self.problems.append(self._line(node.start_mark.line + 1, location, what))
            return None

    def _mapping(self, node: yaml.MappingNode, location: Location) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                taken = self.value(value_node, location)
                # Of several the first counts, as YAML has it; what stands here itself counts more than any.
                for mapping in reversed(taken if isinstance(taken, list) else [taken]):
                    if isinstance(mapping, dict):
                        merged |= mapping
                    else:
                        line = key_node.start_mark.line + 1
                        self.problems.append(
                            self._line(line, location, "<< takes in fields, and there are none")
                        )
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if key_node.tag == _MERGE:
                continue
            line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(self._line(line, location, "the name of a field is a text"))
                continue
            key = str(self._scalar(key_node, location))
            below = (*location, key)
            if key in found:
                self.problems.append(
                    self._line(line, below, f"is here twice; first on line {self._lines[below]}")
                )
                continue
            self._lines[below] = line
            found[key] = self.value(value_node, below)
        return merged | found

    def _filled_in(self, text: str, location: Location) -> str:
        def fill(match: re.Match[str]) -> str:
            name = match[1]
            if name not in os.environ:
                line = self._lines[location]
                self.problems.append(self._line(line, location, f"the environment has no variable {name}"))
            return os.environ.get(name, "")

        return _VARIABLE.sub(fill, text)

    def explain(self, error: ErrorDetails, model: type[BaseModel]) -> str:
        location = self._in_file(error["loc"])
        message = error["msg"].removeprefix("Value error, ")
        cause = error.get("ctx", {}).get("error")
        if isinstance(cause, FieldError):
            location = self._in_file((*error["loc"], *cause.location))
        if error["type"] == "extra_forbidden":
            message = "there is no such field" + _suggestion(str(error["loc"][-1]), error["loc"], model)
        elif error["type"] == "missing":
            message = "is missing"
        elif error["type"] == "union_tag_not_found":
            location, message = self._in_file((*error["loc"], "kind")), "is missing"
        elif error["type"] == "union_tag_invalid":
            location, message = self._in_file((*error["loc"], "kind")), _not_among(error["ctx"])
        elif error["input"] is None and error["type"].endswith("_type"):
            message = "is empty; write what it is, or leave it out"
        elif error["type"] == "string_type" and isinstance(error["input"], (dict, list)):
            message = "is to be a text"
        elif error["type"] in _PLAIN:
            message = _PLAIN[error["type"]]
        places = (location[:depth] for depth in range(len(location), -1, -1))
        # An empty file has no line at all.
        line = next((self._lines[place] for place in places if place in self._lines), 1)
        return self._line(line, location, message)

    def _in_file(self, location: Location) -> Location:
        """The place in the file: pydantic puts the tag of a union between two fields."""
        found: Location = ()
        for place, part in enumerate(location):
            if (*found, part) in self._lines or place == len(location) - 1:
                found = (*found, part)
        return found

    def _line(self, line: int, location: Location, message: str) -> str:
        field = ""
        for part in location:
            field += f"[{part}]" if isinstance(part, int) else f".{part}" if field else part
        return f"{self._path}:{line}: {field}: {message}" if field else f"{self._path}:{line}: {message}"


#: What pydantic says of Python's types, in words of YAML.
_PLAIN = {
    "model_type": "is to have fields: write them below it as `name: value`",
    "dict_type": "is to have fields: write them below it as `name: value`",
    "tuple_type": "is to be a list: begin each of its entries with `- `",
    "list_type": "is to be a list: begin each of its entries with `- `",
    "string_type": "is to be a text: put it in quotes",
}


def _not_among(context: dict[str, Any]) -> str:
    """Of a tag that a union does not have: which there are, and which was meant."""
    tag, expected = str(context["tag"]), str(context["expected_tags"]).replace("'", "")
    near = difflib.get_close_matches(tag, expected.split(", "), 1)
    return f"{tag} is none of {expected}" + (f"; did you mean {near[0]}?" if near else "")


def _suggestion(name: str, location: Location, model: type[BaseModel]) -> str:
    """The nearest name that would have been right, from all fields of the models on the way."""
    names: set[str] = set()
    pending: list[Any] = [model]
    seen: set[Any] = set()
    while pending:
        kind = pending.pop()
        if kind in seen:
            continue
        seen.add(kind)
        pending.extend(getattr(kind, "__args__", ()))
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            names.update(kind.model_fields)
            pending.extend(field.annotation for field in kind.model_fields.values())
    near = difflib.get_close_matches(name, sorted(names), 1)
    return f"; did you mean {near[0]}?" if near else ""
