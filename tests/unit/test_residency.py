"""The state machine of a deployment: its table, and what it refuses."""

from __future__ import annotations

import pytest

from nodeagent.supervisor import EDGES, require_edge
from rung.types import Residency

WITH_EDGES = [each for each in Residency if each is not Residency.UNKNOWN]


def test_every_residency_of_an_agent_has_its_edges() -> None:
    assert set(EDGES) == set(WITH_EDGES)
    assert all(Residency.UNKNOWN not in following for following in EDGES.values())


@pytest.mark.parametrize("current", WITH_EDGES)
@pytest.mark.parametrize("following", list(Residency))
def test_only_the_table_permits_a_move(current: Residency, following: Residency) -> None:
    if following is current or following in EDGES[current]:
        require_edge(current, following)
    else:
        with pytest.raises(ValueError, match="does not go from"):
            require_edge(current, following)


def test_whatever_runs_can_be_lost() -> None:
    running = [each for each in WITH_EDGES if each not in (Residency.STOPPED, Residency.FAILED)]

    assert all(Residency.FAILED in EDGES[each] for each in running)
