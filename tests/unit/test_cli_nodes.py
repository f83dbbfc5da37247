"""`rung drain` and `rung resume`, with a fake of the client."""

from __future__ import annotations

import json
from typing import Any

import pytest

from rung.cli import ExitCode, main
from rung.errors import UnknownNodeError
from rung.types import Node, NodeState
from tests.fakes.client import FakeClient


class NodeClient(FakeClient):
    """Answers with a node in a state."""

    def __init__(self, state: NodeState, detail: str = "") -> None:
        super().__init__()
        self.state = state
        self.detail = detail
        self.told: list[tuple[str, str]] = []

    async def drain_node(self, node_id: str, *, operation_id: str = "") -> Node:
        return self._answer("drain", node_id)

    async def resume_node(self, node_id: str, *, operation_id: str = "") -> Node:
        return self._answer("resume", node_id)

    def _answer(self, action: str, node_id: str) -> Node:
        if node_id == "nope":
            raise UnknownNodeError("there is no node nope")
        self.told.append((action, node_id))
        return Node(id=node_id, address="127.0.0.1:1", state=self.state, detail=self.detail)


def run(client: NodeClient, *arguments: str) -> int:
    opening: Any = lambda connection: client  # noqa: E731
    return main(arguments, opening=opening)


def test_a_node_is_drained_and_what_is_left_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    client = NodeClient(NodeState.DRAINING, "3 requests are left to finish")

    assert run(client, "drain", "workstation") == ExitCode.OK
    assert client.told == [("drain", "workstation")]
    assert capsys.readouterr().out == "workstation is draining: 3 requests are left to finish\n"


def test_a_node_is_taken_back(capsys: pytest.CaptureFixture[str]) -> None:
    client = NodeClient(NodeState.READY)

    assert run(client, "resume", "workstation", "--json") == ExitCode.OK
    assert client.told == [("resume", "workstation")]
    assert json.loads(capsys.readouterr().out)["state"] == "ready"


def test_one_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(NodeClient(NodeState.READY), "drain", "nope") == ExitCode.NOT_FOUND
    assert "there is no node nope" in capsys.readouterr().err
