"""From where an engine can be reached."""

from __future__ import annotations

import pytest

from nodeagent.supervisor._state import endpoint_at
from rung.types import Endpoint, EndpointScope

LOOPBACK, NETWORK = EndpointScope.LOOPBACK, EndpointScope.NETWORK


@pytest.mark.parametrize(
    ("base_url", "declared", "scope"),
    [
        ("http://192.168.1.7:8000", NETWORK, NETWORK),
        ("https://box.example.org", NETWORK, NETWORK),
        ("http://192.168.1.7:8000", LOOPBACK, LOOPBACK),
        ("http://127.0.0.1:8000", NETWORK, LOOPBACK),
        ("http://[::1]:8000", NETWORK, LOOPBACK),
        ("http://localhost:8000", NETWORK, LOOPBACK),
    ],
)
def test_what_listens_on_loopback_is_not_offered_to_other_machines(
    base_url: str, declared: EndpointScope, scope: EndpointScope
) -> None:
    assert endpoint_at(base_url, declared) == Endpoint(base_url, scope)
