"""Requests beyond the usual limit: what goes straight to an engine goes through an agent as well."""

from __future__ import annotations

import io
import json
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest

from rung.errors import RequestTooLargeError
from tests.fakes.engine_server import EngineServer
from tests.integration.stack import Stack, stack

MIB = 1024**2
JSON = {"Content-Type": "application/json"}
LARGE = "x" * (20 * MIB)


@pytest.fixture
async def engine() -> AsyncIterator[EngineServer]:
    async with EngineServer() as engine:
        yield engine


@pytest.fixture(params=[True, False], ids=["direct", "through the agent"])
async def box(tmp_path: Path, engine: EngineServer, request: pytest.FixtureRequest) -> AsyncIterator[Stack]:
    deployment = {
        "id": "writer",
        "model": "tiny",
        "engine": {"kind": "openai_compatible", "health_path": "/health"},
        "runtime": {"kind": "external", "base_url": engine.url},
    }
    server = {"direct_relay": request.param, "max_request_bytes": "32MiB"}
    async with stack(tmp_path, [deployment], server=server) as found:
        yield found


async def test_one_of_twenty_mebibytes_arrives_and_one_beyond_the_limit_is_told_the_limit(
    box: Stack, engine: EngineServer
) -> None:
    messages = [{"role": "user", "content": LARGE}]
    wish = io.BytesIO(json.dumps({"model": "tiny", "messages": messages}).encode())
    url = f"{box.http}/v1/chat/completions"
    async with aiohttp.ClientSession() as http, http.post(url, data=wish, headers=JSON) as response:
        assert response.status == 200, await response.text()
    assert (await box.client.chat(LARGE, model="tiny").result()).text
    assert [body["messages"] == messages for body in engine.bodies] == [True, True]

    with pytest.raises(RequestTooLargeError, match=r"a message of 41,\d{3},\d{3} bytes is more than the 33,"):
        await box.client.chat(LARGE + LARGE, model="tiny").result()
    assert len(engine.bodies) == 2
