"""Embeddings by every way in, on both ways to an engine: the same vectors."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest

import rung
from nodeagent.simulators._generation import embed
from rung.errors import EngineFailedError, UnknownModelError
from rung.types import JobKind, JobState
from tests.integration.stack import stack

TEXTS = ["a cat", "the rain"]


def embedder(**environment: str) -> dict[str, Any]:
    return {
        "id": "embed-1",
        "model": "nomic",
        "engine": {"kind": "llamacpp", "model_path": "/models/nomic.gguf", "embedding": True},
        "runtime": {
            "kind": "process",
            "executable": "llama-server",
            "environment": {"RUNG_SIM_SPEED": "20", "RUNG_SIM_LOAD_S": "0.2", **environment},
        },
        "capabilities": ["embedding"],
        "slots": 1,
        "stop_grace": "2s",
    }


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the agent"])
async def test_gateway_and_clients_give_what_the_engine_gave(tmp_path: Path, direct: bool) -> None:
    wanted = [pytest.approx(embed(text), abs=1e-6) for text in TEXTS]
    async with stack(tmp_path, [embedder()], server={"direct_relay": direct}) as found:
        asked = await found.client.embed(TEXTS, "nomic")
        left_open = await found.client.embed(TEXTS)
        address = f"127.0.0.1:{found.plane.ready['grpc_port']}"

        def embed_synchronously() -> rung.Embeddings:
            with rung.Client(address) as client:
                return client.embed(TEXTS, "nomic")

        synchronous = await asyncio.to_thread(embed_synchronously)
        async with openai.AsyncOpenAI(base_url=f"{found.http}/v1", api_key="none", max_retries=0) as client:
            over_http = [
                await client.embeddings.create(model="nomic", input=TEXTS),
                await client.embeddings.create(model="nomic", input=TEXTS, encoding_format="float"),
            ]
            with pytest.raises(openai.NotFoundError):
                await client.embeddings.create(model="nope", input=TEXTS)
        with pytest.raises(UnknownModelError):
            await found.client.embed(TEXTS, "nope")
        jobs = [job async for job in found.client.list_jobs()]

    assert asked.usage is not None
    prompt_tokens = asked.usage.prompt_tokens
    assert prompt_tokens > 0
    for each in (asked, left_open, synchronous):
        assert [list(vector) for vector in each.vectors] == wanted
        assert each.served is not None
        assert (each.served.target, each.served.node) == ("embed-1", "box")
        assert each.usage == asked.usage
    for answer in over_http:
        assert [row.embedding for row in answer.data] == wanted
        assert [row.index for row in answer.data] == [0, 1]
        assert answer.usage.prompt_tokens == prompt_tokens
    assert {asked.job_id, left_open.job_id, synchronous.job_id} < {job.id for job in jobs}
    assert [(job.kind, job.state) for job in jobs] == [(JobKind.EMBEDDING, JobState.DONE)] * 5


@pytest.mark.parametrize("direct", [True, False], ids=["direct", "through the agent"])
async def test_an_engine_that_fails_is_a_typed_error_on_both_ways(tmp_path: Path, direct: bool) -> None:
    faulty = embedder(RUNG_SIM_FAULTS="http_500")
    async with stack(tmp_path, [faulty], server={"direct_relay": direct}) as found:
        for _ in range(2):
            # The only slot is free again.
            with pytest.raises(EngineFailedError):
                await found.client.embed(TEXTS, "nomic")
        async with openai.AsyncOpenAI(base_url=f"{found.http}/v1", api_key="none", max_retries=0) as client:
            with pytest.raises(openai.InternalServerError) as failed:
                await client.embeddings.create(model="nomic", input=TEXTS)
    assert (failed.value.status_code, failed.value.type) == (502, "server_error")
