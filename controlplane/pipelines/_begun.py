"""A job that was accepted, and what is known of its way."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from controlplane.jobs import LiveJob
from controlplane.ladder import Candidate
from controlplane.pipelines._router import Route
from controlplane.pipelines._wish import Wish

_encode = msgspec.json.Encoder().encode


class Begun:
    """A job that was accepted: its wish, its route, and who may answer it, best first.

    `reasoned_by` has the targets that the `reason` tool was answered by.
    """

    __slots__ = ("job", "reasoned_by", "route", "targets", "wish")

    def __init__(self, job: LiveJob, wish: Wish, route: Route, targets: Iterator[Candidate]) -> None:
        self.job = job
        self.wish = wish
        self.route = route
        self.targets = targets
        self.reasoned_by: list[str] = []

    def mark(self) -> bytes:
        """Who was asked and who answered, as the JSON that an answer has under `rung`."""
        job, route = self.job, self.route
        served = job.served
        mark: dict[str, object] = {"job": job.id, "requested": job.model}
        if served is not None:
            mark |= {"target": served.target, "node": served.node, "model": served.model}
        if route.rung:
            mark |= {"effort": route.effort, "rung": route.rung}
        if self.reasoned_by:
            mark["reasoned_by"] = self.reasoned_by
        if job.usage is not None and job.usage.cost_usd:
            mark["cost_usd"] = job.usage.cost_usd
        return _encode(mark)
