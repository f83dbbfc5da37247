"""The doctor's look at the control plane, its gateway and its nodes."""

from __future__ import annotations

import asyncio
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress

from rung import AsyncClient
from rung.cli._doctor_check import Check, CheckStatus
from rung.cli._failures import is_unreachable
from rung.errors import RungError
from rung.types import Node, NodeState

_TIMEOUT_S = 5.0
_AGENT_PORT = 8152


async def check_control_plane(client: AsyncClient, address: str) -> list[Check]:
    """Whether the control plane answers; then one check for each of its nodes."""
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            nodes = await client.list_nodes()
    except TimeoutError:
        return [_no_plane(f"{address} accepts connections and says nothing", answers=True)]
    except RungError as error:
        if not is_unreachable(error):
            return [_plane(CheckStatus.FAIL, f"{address}: {error.message}", "")]
        listens = await _listens(address)
        what = "something listens, but it is no control plane" if listens else "nothing listens"
        return [_no_plane(f"{address}: {what}", answers=listens), await check_local_agent()]
    plane = _plane(
        CheckStatus.OK, f"{address} answers, {len(nodes)} node{'' if len(nodes) == 1 else 's'}", ""
    )
    return [plane, *check_nodes(nodes)]


def check_nodes(nodes: Sequence[Node]) -> list[Check]:
    """One check for each node."""
    if not nodes:
        hint = "Add nodes to rung.yaml, or use `rung up`, which runs one on this box."
        return [Check(name="Nodes", status=CheckStatus.WARN, detail="there are none", hint=hint)]
    return [_check_node(node) for node in nodes]


async def check_local_agent(port: int = _AGENT_PORT) -> Check:
    """Whether an agent seems to run on this box."""
    name = "Agent"
    if await _listens(f"127.0.0.1:{port}"):
        return Check(name=name, status=CheckStatus.OK, detail=f"something listens on 127.0.0.1:{port}")
    return Check(
        name=name,
        status=CheckStatus.WARN,
        detail=f"none on 127.0.0.1:{port}",
        hint="`rung agent run` starts one; `rung up` starts one together with a control plane.",
    )


def check_http(url: str) -> Check:
    """Whether the HTTP gateway answers. Blocks for some seconds at most."""
    name = "HTTP gateway"
    request = urllib.request.Request(f"{url}/v1/models")  # noqa: S310 - the user's own option
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_TIMEOUT_S) as reply:
            reply.read(1)
        return Check(name=name, status=CheckStatus.OK, detail=f"{url} answers")
    except urllib.error.HTTPError as error:
        with error:
            detail = f"{url} answers {error.code} to /v1/models"
        return Check(name=name, status=CheckStatus.FAIL, detail=detail, hint="Is that Rung's HTTP port?")
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        return Check(
            name=name,
            status=CheckStatus.WARN,
            detail=f"{url} does not answer ({reason})",
            hint="It comes with the control plane: `rung up` or `rung serve`.",
        )


def _check_node(node: Node) -> Check:
    name = f"Node {node.id}"
    detail = f"{node.address} is {node.state.value}"
    if node.detail:
        detail += f": {node.detail}"
    if node.state is NodeState.UNREACHABLE:
        hint = f"Start its agent there with `rung agent run`, and check the way to {node.address}."
        return Check(name=name, status=CheckStatus.FAIL, detail=detail, hint=hint)
    status = node.status
    warnings = status.warnings if status is not None else ()
    if node.state is not NodeState.READY:
        return Check(name=name, status=CheckStatus.WARN, detail=detail)
    if status is not None:
        detail += f", {len(status.gpus)} GPU{'' if len(status.gpus) == 1 else 's'}"
        detail += " (simulated)" if status.simulated else ""
    if warnings:
        return Check(name=name, status=CheckStatus.WARN, detail=detail, hint="; ".join(warnings))
    return Check(name=name, status=CheckStatus.OK, detail=detail)


def _plane(status: CheckStatus, detail: str, hint: str) -> Check:
    return Check(name="Control plane", status=status, detail=detail, hint=hint)


def _no_plane(detail: str, *, answers: bool) -> Check:
    if answers:
        return _plane(CheckStatus.FAIL, detail, "Another program has the port: give --address, or move it.")
    # None is needed to be a client of another box, or before the first start.
    return _plane(CheckStatus.WARN, detail, "Start one with `rung up`, or say where it is with --address.")


async def _listens(address: str) -> bool:
    host, _, port = address.rpartition(":")
    try:
        async with asyncio.timeout(_TIMEOUT_S):
            _, writer = await asyncio.open_connection(host.strip("[]") or "127.0.0.1", int(port))
    except (OSError, ValueError):
        return False
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return True
