"""What a caller asks for: a model by name, an effort, a chain, or that we decide.

Pure.
"""

from __future__ import annotations

from collections.abc import Container
from enum import StrEnum

from msgspec import Struct

from controlplane.ladder._ladder import MAX_EFFORT, MIN_EFFORT, check_effort
from rung.errors import InvalidRequestError

#: Names of models that are ours begin so.
OWN_PREFIX = "rung/"
#: Leaves the choice to us, as an empty name does.
AUTO_MODEL = "rung/auto"

_MOST_DIGITS = 3

#: OpenAI's `reasoning_effort`, as an effort of the ladder. From `high` on it is 7 or more.
REASONING_EFFORTS = {"none": 1, "minimal": 2, "low": 4, "medium": 6, "high": 8, "xhigh": 10}


class Asked(StrEnum):
    """What a request names."""

    MODEL = "model"
    CHAIN = "chain"
    EFFORT = "effort"


class Asking(Struct, frozen=True):
    """What a request asks for.

    Attributes:
        what: whether `name` is a model, or a chain of the ladder, or nothing was named.
        name: of the model or chain.
        effort: 1 to 10; None if the caller left it open, or named a model or chain without one.
    """

    what: Asked
    name: str = ""
    effort: int | None = None


def read_asking(
    model: str, effort: int | None, reasoning_effort: str | None, chains: Container[str]
) -> Asking:
    """What the fields of a request ask for.

    `rung/7` gives an effort, `rung/reasoning` a chain, `rung/auto` or nothing leaves it to us; any other
    name is a model, and is never replaced. An effort in the name or in `effort` wins over OpenAI's
    `reasoning_effort`.

    Raises:
        InvalidRequestError: an effort that is not 1 to 10, two that differ, or a name of ours that is
            neither.
    """
    if effort is not None:
        check_effort(effort)
    if model and not model.startswith(OWN_PREFIX):
        return Asking(Asked.MODEL, model, effort)
    name = model.removeprefix(OWN_PREFIX)
    if name.isdecimal() and len(name) <= _MOST_DIGITS:
        named = check_effort(int(name))
        if effort not in (None, named):
            raise InvalidRequestError(f"the model {model} and effort {effort} contradict each other")
        return Asking(Asked.EFFORT, effort=named)
    if name and model != AUTO_MODEL:
        if name in chains:
            return Asking(Asked.CHAIN, name, effort)
        raise InvalidRequestError(
            f"there is no model {model!r}; of ours are {AUTO_MODEL}, {OWN_PREFIX}{MIN_EFFORT} to "
            f"{OWN_PREFIX}{MAX_EFFORT}, and {OWN_PREFIX} with the name of a chain"
        )
    if effort is None and reasoning_effort is not None:
        effort = REASONING_EFFORTS.get(reasoning_effort)
        if effort is None:
            known = ", ".join(REASONING_EFFORTS)
            raise InvalidRequestError(f"reasoning_effort is {reasoning_effort!r}; it must be one of {known}")
    return Asking(Asked.EFFORT, effort=effort)
