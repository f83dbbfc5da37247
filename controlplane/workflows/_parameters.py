"""Values of parameters: whether they are what the parameter takes. Pure."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping
from math import isfinite
from typing import Any

from controlplane.workflows._template import Parameter, ParameterType
from rung.errors import InvalidRequestError

_MAX_TEXT_CHARACTERS = 20_000
_MAX_LORAS = 8
_MAX_LORA_STRENGTH = 10.0


def check_value(parameter: Parameter, value: object) -> Any:
    """A value as a graph takes it: integers are `int`, also where the caller wrote `4.0`.

    Raises:
        InvalidRequestError: it is not what the parameter takes; the message names the parameter.
    """
    match parameter.type:
        case ParameterType.INTEGER:
            return _integer(parameter, value)
        case ParameterType.NUMBER:
            return _number(parameter, value)
        case ParameterType.TEXT:
            if isinstance(value, str) and len(value) <= _MAX_TEXT_CHARACTERS:
                return value
            raise _refused(parameter, value, f"a text of up to {_MAX_TEXT_CHARACTERS} characters")
        case ParameterType.CHOICE:
            if value in parameter.choices:
                return value
            raise _refused(parameter, value, f"one of {', '.join(parameter.choices)}")
        case ParameterType.BOOLEAN:
            if isinstance(value, bool):
                return value
            raise _refused(parameter, value, "true or false")
        case ParameterType.LORAS:
            return _loras(parameter, value)


def unknown_parameter(operation: str, name: str, known: Collection[str]) -> str:
    """What to say of a name that no parameter has."""
    near = difflib.get_close_matches(name, known, 1)
    guess = f"; did you mean {near[0]}?" if near else "."
    takes = f"It takes {', '.join(sorted(known)) or 'none'}"
    return f"{operation} has no parameter {name!r}{guess} {takes}"


def _integer(parameter: Parameter, value: object) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _refused(parameter, value, "an integer")
    if not _within(parameter, value) or value % parameter.multiple_of:
        raise _refused(parameter, value, f"an integer{_range(parameter)}")
    return value


def _number(parameter: Parameter, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool) or not isfinite(value):
        raise _refused(parameter, value, "a number")
    if not _within(parameter, value):
        raise _refused(parameter, value, f"a number{_range(parameter)}")
    return value


def _within(parameter: Parameter, value: float) -> bool:
    least, most = parameter.minimum, parameter.maximum
    return (least is None or value >= least) and (most is None or value <= most)


def _range(parameter: Parameter) -> str:
    words = ""
    if parameter.minimum is not None:
        words += f" from {parameter.minimum:g}"
    if parameter.maximum is not None:
        words += f" up to {parameter.maximum:g}"
    if parameter.multiple_of > 1:
        words += f", a multiple of {parameter.multiple_of}"
    return words


def _loras(parameter: Parameter, value: object) -> list[dict[str, Any]]:
    form = f'a list of up to {_MAX_LORAS}, each {{"name": file, "strength": number}}'
    if not isinstance(value, list | tuple) or len(value) > _MAX_LORAS:
        raise _refused(parameter, value, form)
    return [_lora(parameter, each, form) for each in value]


def _lora(parameter: Parameter, value: object, form: str) -> dict[str, Any]:
    if not isinstance(value, Mapping) or value.keys() - {"name", "strength"}:
        raise _refused(parameter, value, form)
    name, strength = value.get("name"), value.get("strength", 1.0)
    if not isinstance(name, str) or not name:
        raise _refused(parameter, value, form)
    if not isinstance(strength, int | float) or isinstance(strength, bool):
        raise _refused(parameter, value, form)
    if not abs(strength) <= _MAX_LORA_STRENGTH:
        raise InvalidRequestError(
            f"{parameter.name}: strength of {name} is {strength}; it must be -{_MAX_LORA_STRENGTH:g} to "
            f"{_MAX_LORA_STRENGTH:g}"
        )
    return {"name": name, "strength": strength}


def _refused(parameter: Parameter, value: object, wanted: str) -> InvalidRequestError:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    return InvalidRequestError(f"{parameter.name} is {shown}; it must be {wanted}")
