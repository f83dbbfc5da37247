"""GET /v1/workflows: what pictures are drawn from."""

from __future__ import annotations

from typing import Any

import msgspec
from aiohttp import web

from controlplane.workflows import Workflows
from rung.types import Workflow


class WorkflowRoutes:
    """The templates, as a form could be made of them."""

    def __init__(self, workflows: Workflows) -> None:
        self._workflows = workflows

    async def index(self, _request: web.Request) -> web.StreamResponse:
        """All by name."""
        return web.json_response(
            {"object": "list", "data": [_shown(each) for each in self._workflows.listed()]}
        )


def _shown(workflow: Workflow) -> dict[str, Any]:
    value: dict[str, Any] = msgspec.to_builtins(workflow)
    for parameter in value["parameters"]:
        # No default at all is said by leaving it out: null is one, too.
        default = parameter.pop("default_json")
        if default:
            parameter["default"] = msgspec.json.decode(default)
    return value
