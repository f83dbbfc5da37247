"""Simulated cloud APIs as processes, and targets that lead to them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import aiohttp
from prometheus_client import CollectorRegistry

from controlplane.cloud import (
    CloudModel,
    CloudProvider,
    CloudSpend,
    CloudTargets,
    Dialect,
    ModelPrices,
    SpendStore,
    Thinking,
)
from rung.service import EngineClient

KEY = "sk-simulated-0123456789abcdef"


class CloudProcess:
    """A running simulator; `asked` and `aborted` count from `begin` on."""

    def __init__(self, url: str) -> None:
        self.url = url
        self._before: dict[str, int] = {"requests": 0, "aborted": 0}

    async def begin(self) -> None:
        """Be as new: no faults, and nothing asked."""
        await self.misbehave()
        self._before = await self._state()

    async def asked(self) -> int:
        """How many requests came."""
        return int((await self._state())["requests"]) - self._before["requests"]

    async def aborted(self) -> int:
        """How many were broken off by the caller."""
        return int((await self._state())["aborted"]) - self._before["aborted"]

    async def _state(self) -> dict[str, Any]:
        async with aiohttp.ClientSession() as session, session.get(f"{self.url}/sim/state") as response:
            found: dict[str, Any] = await response.json()
            return found

    async def misbehave(self, *faults: str) -> None:
        """Switch its faults."""
        async with aiohttp.ClientSession() as session:
            body = {"faults": list(faults)}
            async with session.post(f"{self.url}/sim/faults", json=body) as response:
                assert response.status == 200, await response.text()


@contextmanager
def cloud_process(*arguments: str) -> Iterator[CloudProcess]:
    """Run a simulator on a free port, with `KEY` for its key, as fast as it can."""
    module = [sys.executable, "-m", "controlplane.simulators.cloud"]
    with subprocess.Popen(
        [*module, "--api-key", KEY, "--tokens-per-s", "0", *arguments], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        try:
            yield CloudProcess(process.stdout.readline().removeprefix("listening on ").strip())
        finally:
            process.terminate()


def provider(
    name: str,
    url: str,
    *,
    dialect: Dialect = Dialect.OPENAI,
    cap_usd: float = 5.0,
    thinking: Thinking = Thinking.OFF,
) -> CloudProvider:
    """A provider with one model `chat`, at $1, $0.1 from the cache and $10 for a million tokens."""
    model = CloudModel(
        id=f"{name}/chat",
        provider=name,
        model="simulated-chat",
        aliases=(f"{name}-chat",),
        capabilities=("chat", "tools", "vision", "reasoning"),
        context_tokens=65536,
        max_output_tokens=4096,
        prices=ModelPrices(prompt_usd=1.0, completion_usd=10.0, cached_usd=0.1),
        thinking=thinking,
    )
    return CloudProvider(
        id=name,
        dialect=dialect,
        base_url=url,
        api_key_env=f"{name.upper()}_API_KEY",
        api_key_file=None,
        daily_cap_usd=cap_usd,
        models=(model,),
    )


@asynccontextmanager
async def cloud_targets(
    *providers: CloudProvider,
    store: SpendStore,
    environment: Mapping[str, str] | None = None,
    registry: CollectorRegistry | None = None,
) -> AsyncIterator[tuple[CloudTargets, CloudSpend]]:
    """Targets with a client of their own; the right key for each provider unless an environment is given."""
    client = EngineClient()
    spend = await CloudSpend.open(providers, store)
    keys = {each.api_key_env: KEY for each in providers} if environment is None else environment
    try:
        yield (
            CloudTargets(providers, client, spend, registry or CollectorRegistry(), environment=keys),
            spend,
        )
    finally:
        await spend.aclose()
        await client.aclose()
