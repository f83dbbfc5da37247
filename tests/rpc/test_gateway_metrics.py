"""What the gateway tells Prometheus of its requests, and what it says of a port that is taken."""

from __future__ import annotations

import asyncio
import errno
import re
from collections.abc import AsyncIterator

import pytest
from prometheus_client import CollectorRegistry

from controlplane.gateway import Gateway
from controlplane.workflows import Workflows
from rung.service import cannot_listen
from tests.fakes.gateway import Plane, a_plane


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with a_plane() as made:
        yield made


async def _counted(plane: Plane) -> dict[tuple[str, str, str], float]:
    """Requests by route, method and status."""
    async with plane.http.get(f"{plane.url}/metrics") as response:
        text = await response.text()
    line = re.compile(r'rung_http_requests_total\{method="(.*?)",route="(.*?)",status="(.*?)"\} (\S+)')
    return {(route, method, status): float(value) for method, route, status, value in line.findall(text)}


async def _ask(plane: Plane, method: str, path: str) -> None:
    async with plane.http.request(method, plane.url + path) as response:
        await response.read()


async def test_requests_are_counted_by_the_pattern_of_their_route_and_never_by_their_path(
    plane: Plane,
) -> None:
    for job in ("one", "two", "three"):
        await _ask(plane, "GET", f"/v1/jobs/{job}")
    await _ask(plane, "GET", "/v1/models/some/where")
    await _ask(plane, "GET", "/healthz")
    await _ask(plane, "GET", "/nowhere")
    await _ask(plane, "GET", "/elsewhere")
    await _ask(plane, "GET", "/v1/chat/completions")
    await _ask(plane, "PROPFIND", "/healthz")

    counted = await _counted(plane)

    assert counted == {
        ("/v1/jobs/{id}", "GET", "404"): 3.0,
        ("/v1/models/{model}", "GET", "404"): 1.0,
        ("/healthz", "GET", "200"): 1.0,
        ("unmatched", "GET", "404"): 2.0,
        ("unmatched", "GET", "405"): 1.0,
        ("unmatched", "other", "405"): 1.0,
    }
    # The one before is counted as well, now that it has been answered.
    assert (await _counted(plane))["/metrics", "GET", "200"] == 1.0


async def test_how_long_a_request_took_is_counted_with_its_stream(plane: Plane) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=body) as response:
        assert b"[DONE]" in await response.read()
    async with plane.http.get(f"{plane.url}/metrics") as response:
        text = await response.text()
    counted = 'rung_http_request_seconds_count{method="POST",route="/v1/chat/completions"} 1.0'
    assert counted in text


async def test_a_caller_that_goes_away_is_counted_as_gone(plane: Plane) -> None:
    plane.engine.answer = plane.engine.endless
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    async with plane.http.post(f"{plane.url}/v1/chat/completions", json=body) as response:
        await response.content.readany()
        response.close()

    async with asyncio.timeout(10):
        while ("/v1/chat/completions", "POST", "499") not in await _counted(plane):
            pass


async def test_a_port_that_is_taken_is_said_with_what_to_do(plane: Plane) -> None:
    gateway = Gateway(
        host="127.0.0.1",
        port=plane.gateway.port,
        max_request_bytes=1024,
        fleet=plane.fleet,
        jobs=plane.jobs,
        pipelines=plane.pipelines,
        artifacts=plane.artifacts,
        workflows=Workflows(),
        registry=CollectorRegistry(),
    )
    with pytest.raises(OSError, match="cannot listen") as refused:
        await gateway.start()
    await gateway.aclose()

    assert str(refused.value) == (
        f"the HTTP gateway cannot listen on 127.0.0.1:{plane.gateway.port}: Address already in use; "
        "stop what listens there, or choose another port"
    )


def test_a_port_that_may_not_be_had_is_not_said_to_be_taken() -> None:
    refused = cannot_listen("the agent", "::1", 80, PermissionError(errno.EACCES, "whatever"))
    assert str(refused) == "the agent cannot listen on [::1]:80: Permission denied; choose another port"
