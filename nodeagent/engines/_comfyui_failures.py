"""What ComfyUI says of a graph that it refuses, or that fails, in words for a person. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from nodeagent.engines._comfyui_check import Finding, told
from nodeagent.engines._comfyui_graph import Graph, named
from nodeagent.engines._comfyui_http import HistoryStatus
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineRejectedError,
    RungError,
    VramInfeasibleError,
)

_LONGEST_TEXT = 600
_OUT_OF_MEMORY = ("outofmemory", "out of memory")


def refusal(
    what: str, status: int, body: bytes, *, graph: Graph, findings: tuple[Finding, ...] = ()
) -> RungError:
    """The error for a graph that `/prompt` did not take.

    Args:
        what: name of the deployment.
        status: HTTP status.
        body: what it says, in whatever shape.
        graph: what was refused.
        findings: what we found ourselves, which says more than ComfyUI does.
    """
    try:
        answer = msgspec.json.decode(body)
    except msgspec.DecodeError:
        answer = None
    engine_status = str(status)
    if status != 400 or not isinstance(answer, dict):
        said = _short(body.decode(errors="replace"))
        text = f"{what}: ComfyUI answers {status} to the workflow{': ' if said else ''}{said}"
        failure = EngineFailedError if status >= 500 else EngineProtocolError
        return failure(text, engine_status=engine_status)
    theirs = tuple(_node_errors(answer.get("node_errors"), graph, findings))
    if not theirs:
        theirs = findings or (Finding(node_id="", what=_error_text(answer.get("error"))),)
    return EngineRejectedError(
        f"{what}: ComfyUI refuses the workflow: {told(theirs)}", engine_status=engine_status
    )


def partial_refusal(
    what: str, node_errors: object, *, graph: Graph, findings: tuple[Finding, ...]
) -> RungError | None:
    """The error for a graph of which `/prompt` would carry out a part only; None if it takes all of it."""
    if not node_errors:
        return None
    theirs = tuple(_node_errors(node_errors, graph, findings))
    why = told(theirs) if theirs else _short(str(node_errors))
    return EngineRejectedError(
        f"{what}: ComfyUI would leave out a part of the workflow: {why}", engine_status="200"
    )


def upload_refusal(what: str, name: str, status: int) -> RungError:
    """The error for a file that was not taken."""
    too_large = "it is larger than ComfyUI's --max-upload-size"
    why = too_large if status == 413 else f"ComfyUI answers {status}"
    return EngineRejectedError(
        f"{what}: the file {name} cannot be uploaded: {why}", engine_status=str(status)
    )


def failure(what: str, graph: Graph, messages: Iterable[Any]) -> RungError:
    """The error for a prompt that did not end well, from the events told of it, each with its data."""
    for event, data in _events(messages):
        node_id = str(data.get("node_id", ""))
        where = named(node_id, graph.get(node_id, {"class_type": data.get("node_type", "?")}))
        if event == "execution_interrupted":
            return EngineFailedError(
                f"{what}: the workflow was interrupted in ComfyUI at {where}, by somebody else"
            )
        if event != "execution_error":
            continue
        kind = str(data.get("exception_type", ""))
        said = _short(str(data.get("exception_message", "")))
        if any(mark in f"{kind} {said}".lower() for mark in _OUT_OF_MEMORY):
            return VramInfeasibleError(
                f"{what}: ComfyUI ran out of GPU memory at {where}: fewer pixels, a smaller batch or a "
                f"smaller model need less ({said or kind})",
                node_id=node_id,
            )
        return EngineFailedError(f"{what}: {where} failed: {kind}: {said}", node_id=node_id)
    return EngineFailedError(f"{what}: the workflow failed, and ComfyUI does not say why")


def _events(messages: Iterable[Any]) -> Iterator[tuple[object, Mapping[str, Any]]]:
    for message in messages:
        if isinstance(message, list | tuple) and len(message) == 2 and isinstance(message[1], dict):
            yield message[0], message[1]


def is_well(status: HistoryStatus | None) -> bool:
    """Whether a prompt with this history was carried out. Old versions write none for those that failed."""
    return status is None or status.status_str != "error"


def _node_errors(told_of: object, graph: Graph, findings: tuple[Finding, ...]) -> Iterator[Finding]:
    """Theirs, with our words where we have any for the same input."""
    if not isinstance(told_of, dict):
        return
    ours = {(finding.node_id, finding.input_name): finding for finding in findings}
    for node_id, entry in told_of.items():
        errors = entry.get("errors") if isinstance(entry, dict) else None
        where = named(node_id, graph.get(node_id, {}))
        for error in errors if isinstance(errors, list) else ():
            extra = error.get("extra_info") if isinstance(error, dict) else None
            name = str(extra.get("input_name", "")) if isinstance(extra, dict) else ""
            found = ours.get((node_id, name))
            text = f"{where}: {f'the input {name}: ' if name else ''}{_error_text(error)}"
            yield found or Finding(node_id=node_id, input_name=name, what=text)


def _error_text(error: object) -> str:
    """One error, in whatever shape."""
    if not isinstance(error, dict):
        return _short(str(error))
    message, details = str(error.get("message", "")), str(error.get("details", ""))
    parts = [part for part in (message, details) if part]
    return _short(": ".join(dict.fromkeys(parts)) or str(error.get("type", "")))


def _short(text: str) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= _LONGEST_TEXT else flat[:_LONGEST_TEXT] + "…"
