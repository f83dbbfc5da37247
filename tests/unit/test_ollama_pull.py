"""Having Ollama pull a model: what is told, what is tried again, and what is said when it fails."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer
from msgspec.structs import replace

from nodeagent.engines import EngineHealth, OllamaAdapter, PullControl, PullProgress
from nodeagent.engines._pulling import ModelPull, PullCount, free_for_models
from rung.errors import EngineFailedError, InvalidRequestError
from rung.service import EngineClient
from rung.types import DeploymentSpec, EngineSpec, ExternalRuntime, OllamaEngine, ProcessRuntime

SPEC = DeploymentSpec(
    id="thinker",
    node_id="n1",
    model="qwen3:8b",
    engine=EngineSpec(engine=OllamaEngine(model="qwen3:8b"), runtime=ProcessRuntime(executable="ollama")),
)
_BIG, _SMALL = "sha256:" + "a" * 64, "sha256:" + "b" * 64
_MANIFEST: dict[str, Any] = {"status": "pulling manifest"}
_SUCCESS: dict[str, Any] = {"status": "success"}
_REGISTRY = 'pull model manifest: Get "https://registry.ollama.ai/v2/": dial tcp: no such host'


def layer(completed: int = 0, total: int = 5_000_000_000, digest: str = _BIG) -> dict[str, Any]:
    """A line about a layer, as Ollama has it: what is 0 is left out."""
    said = {"status": f"pulling {digest[7:19]}", "digest": digest, "total": total}
    return {**said, "completed": completed} if completed else said


class Registry:
    """An Ollama that pulls as it was told, one list of lines for each attempt, the last for ever."""

    def __init__(self, *attempts: Sequence[dict[str, Any]], status: int = 200, hang: bool = False) -> None:
        self.attempts = list(attempts)
        self.status = status
        self.hang = hang
        self.has_it = False
        self.asked: list[dict[str, Any]] = []
        self.left = asyncio.Event()
        app = web.Application()
        app.router.add_post("/api/pull", self._pull)
        app.router.add_get("/api/tags", self._tags)
        app.router.add_get("/api/ps", self._ps)
        self._server = TestServer(app, handler_cancellation=True)

    async def __aenter__(self) -> str:
        await self._server.start_server()
        return str(self._server.make_url("")).rstrip("/")

    async def __aexit__(self, *_: object) -> None:
        await self._server.close()

    async def _tags(self, http: web.Request) -> web.Response:
        return web.json_response({"models": [{"name": "qwen3:8b"}] if self.has_it else []})

    async def _ps(self, http: web.Request) -> web.Response:
        return web.json_response({"models": []})

    async def _pull(self, http: web.Request) -> web.StreamResponse:
        self.asked.append(await http.json())
        lines = self.attempts.pop(0) if len(self.attempts) > 1 else self.attempts[0]
        response = web.StreamResponse(status=self.status, headers={"Content-Type": "application/x-ndjson"})
        await response.prepare(http)
        for line in lines:
            self.has_it = self.has_it or line == _SUCCESS
            await response.write(msgspec.json.encode(line) + b"\n")
        try:
            if self.hang:
                await asyncio.Event().wait()
        except asyncio.CancelledError:
            self.left.set()
            raise
        return response


@pytest.fixture
async def adapter() -> AsyncIterator[OllamaAdapter]:
    client = EngineClient()
    yield OllamaAdapter(client, pull_pause_s=0.0)
    await client.aclose()


def nobody(_: PullProgress) -> None:
    """Told, and not looked at."""


async def pulled(
    adapter: OllamaAdapter,
    registry: Registry,
    spec: DeploymentSpec = SPEC,
) -> None:
    async with registry as url:
        await adapter.pull(url, spec, nobody, environment={})


# How far it is.


def test_what_is_there_is_told_in_bytes_with_the_rate_and_what_is_left() -> None:
    count = PullCount("qwen3:8b", 0.0)
    assert count.progress(0.0) == PullProgress("pulling qwen3:8b: asking for it")
    count.take("pulling manifest", 0.1)
    assert count.progress(0.1) == PullProgress("pulling qwen3:8b: pulling manifest")
    count.take("pulling aaa", 0.2, digest=_BIG, total=5_000_000_000)
    # Nothing is known of the rate, and so nothing is said of the time.
    assert count.progress(0.2) == PullProgress("pulling qwen3:8b: 0.00 of 5.00 GB", 0.0)
    count.take("pulling aaa", 1.0, digest=_BIG, total=5_000_000_000, completed=100_000_000)
    count.take("pulling aaa", 3.0, digest=_BIG, total=5_000_000_000, completed=1_100_000_000)
    found = count.progress(3.0)
    assert found.detail == "pulling qwen3:8b: 1.10 of 5.00 GB, 500.0 MB/s"
    assert found.percent == pytest.approx(22.0)
    assert found.remaining_s == pytest.approx(3.9 / 0.5)


def test_layers_side_by_side_are_added_up() -> None:
    count = PullCount("m", 0.0)
    count.take("pulling aaa", 0.0, digest=_BIG, total=900, completed=300)
    count.take("pulling bbb", 0.0, digest=_SMALL, total=100)
    count.take("pulling bbb", 0.0, digest=_SMALL, total=100, completed=100)
    assert (count.completed_bytes, count.total_bytes) == (400, 1000)
    assert count.progress(0.0).percent == 40.0


def test_what_an_earlier_attempt_has_left_is_no_rate() -> None:
    count = PullCount("m", 0.0)
    count.take("pulling aaa", 0.0, digest=_BIG, total=5_000_000_000)
    count.take("pulling aaa", 0.1, digest=_BIG, total=5_000_000_000, completed=4_000_000_000)
    count.take("pulling aaa", 1.1, digest=_BIG, total=5_000_000_000, completed=4_010_000_000)
    assert "10.0 MB/s" in count.progress(1.1).detail
    # A new attempt counts from nothing at first: what is on the disk is not gone.
    count.again()
    count.take("pulling aaa", 1.2, digest=_BIG, total=5_000_000_000)
    assert count.completed_bytes == 4_010_000_000


def test_one_that_stands_still_says_so_and_promises_nothing() -> None:
    count = PullCount("m", 0.0)
    count.take("pulling aaa", 0.0, digest=_BIG, total=2_000_000_000, completed=1)
    count.take("pulling aaa", 1.0, digest=_BIG, total=2_000_000_000, completed=1_000_000_000)
    for second in range(2, 12):
        count.take("pulling aaa", float(second), digest=_BIG, total=2_000_000_000, completed=1_000_000_000)
    found = count.progress(11.0)
    assert found == PullProgress("pulling m: 1.00 of 2.00 GB, nothing for 10 s", 50.0, None)


def test_what_follows_the_download_has_no_percentage() -> None:
    count = PullCount("m", 0.0)
    count.take("pulling aaa", 0.0, digest=_BIG, total=10, completed=10)
    count.take("verifying sha256 digest", 1.0)
    assert count.progress(2.0) == PullProgress("pulling m: verifying sha256 digest")


# A pull.


async def test_it_is_asked_for_as_a_stream_and_is_there_in_the_end(adapter: OllamaAdapter) -> None:
    assert isinstance(adapter, PullControl)
    registry = Registry([_MANIFEST, layer(), layer(5_000_000_000), _SUCCESS])
    told: list[PullProgress] = []
    async with registry as url:
        before = await adapter.probe(url, SPEC)
        await adapter.pull(url, SPEC, told.append, environment={})
        after = await adapter.probe(url, SPEC)
    assert (before.health, after.health) == (EngineHealth.NO_MODEL, EngineHealth.ASLEEP)
    assert registry.asked == [{"model": "qwen3:8b", "stream": True}]
    assert told[0] == PullProgress("pulling qwen3:8b: asking for it")


async def test_one_that_breaks_off_is_asked_for_again(adapter: OllamaAdapter) -> None:
    cut = [_MANIFEST, layer(), layer(1000)]
    registry = Registry(cut, [_MANIFEST], [_MANIFEST, layer(2000), {"error": _REGISTRY}], [_SUCCESS])
    await pulled(adapter, registry)
    assert len(registry.asked) == 4


async def test_one_that_brings_nothing_five_times_is_given_up(adapter: OllamaAdapter) -> None:
    registry = Registry([_MANIFEST, layer(), layer(1000)])
    with pytest.raises(EngineFailedError, match="5 times in a row; what was fetched is kept"):
        await pulled(adapter, registry)
    # The first brought something.
    assert len(registry.asked) == 5


async def test_a_registry_that_is_away_is_named(adapter: OllamaAdapter) -> None:
    with pytest.raises(EngineFailedError, match=r"registry of qwen3:8b cannot be reached .* no such host"):
        await pulled(adapter, Registry([_MANIFEST, {"error": _REGISTRY}]))


@pytest.mark.parametrize(
    ("status", "error", "said"),
    [
        (200, "pull model manifest: file does not exist", "the registry has no model qwen3:8b"),
        (400, "invalid model name", "the registry has no model qwen3:8b"),
        (200, "write /models/x-partial: no space left on device", "the disk for models is full"),
        (500, "digest mismatch, file must be downloaded again", "Ollama cannot pull qwen3:8b: digest mism"),
    ],
)
async def test_an_error_is_told_once_and_in_words(
    adapter: OllamaAdapter, status: int, error: str, said: str
) -> None:
    registry = Registry([{"error": error}], status=status)
    with pytest.raises(EngineFailedError, match=f"^thinker: {said}"):
        await pulled(adapter, registry)
    assert len(registry.asked) == 1


async def test_a_disk_that_is_too_small_ends_it_before_it_is_full() -> None:
    client = EngineClient()

    async def pull_from(registry: Registry) -> None:
        async with registry as url:
            pull = ModelPull(
                client,
                url,
                "qwen3:8b",
                what="thinker",
                tell=nobody,
                free_bytes=lambda: 4_000_000_000,
                pause_s=0.0,
            )
            await pull.run()

    too_large = Registry([_MANIFEST, layer(), layer(500_000_000)], hang=True)
    with pytest.raises(EngineFailedError, match=r"needs 4\.5 GB more on the disk .* 4\.0 GB are free"):
        await pull_from(too_large)
    await too_large.left.wait()
    # With 1.5 GB there from an earlier attempt, the rest has room.
    await pull_from(Registry([layer(), layer(1_500_000_000), _SUCCESS]))
    await client.aclose()


def test_the_disk_is_that_of_the_engines_own_environment(tmp_path: Path) -> None:
    room = shutil.disk_usage(tmp_path).total
    for environment in ({"OLLAMA_MODELS": str(tmp_path / "not" / "yet")}, {"HOME": str(tmp_path)}):
        found = free_for_models(environment)
        assert found is not None
        assert 0 < found <= room
    assert free_for_models({}) is None


async def test_one_that_is_called_off_ends_in_ollama(adapter: OllamaAdapter) -> None:
    registry = Registry([_MANIFEST, layer(), layer(1000)], hang=True)
    begun = asyncio.Event()

    def tell(found: PullProgress) -> None:
        if found.percent is not None:
            begun.set()

    async with registry as url:
        task = asyncio.create_task(adapter.pull(url, SPEC, tell, environment={}))
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        await registry.left.wait()


async def test_a_success_that_the_list_does_not_show_is_none(adapter: OllamaAdapter) -> None:
    registry = Registry([{"status": "success", "digest": ""}])
    with pytest.raises(EngineFailedError, match="says that it pulled qwen3:8b, and does not list it"):
        await pulled(adapter, registry)


@pytest.mark.parametrize("model", ["kimi-k2:1t-cloud", "kimi:cloud"])
async def test_what_runs_on_ollamas_servers_is_not_pulled(adapter: OllamaAdapter, model: str) -> None:
    spec = replace(SPEC, engine=replace(SPEC.engine, engine=OllamaEngine(model=model)))
    registry = Registry([_SUCCESS])
    with pytest.raises(InvalidRequestError, match="runs on Ollama's servers, not on this node"):
        await pulled(adapter, registry, spec)
    assert registry.asked == []


@pytest.mark.parametrize(
    ("pull", "external", "does"),
    [(None, False, True), (None, True, False), (True, True, True), (False, False, False)],
)
async def test_an_ollama_of_ours_pulls_unless_it_was_said(
    adapter: OllamaAdapter, pull: bool | None, external: bool, does: bool
) -> None:
    runtime = ExternalRuntime(base_url="http://127.0.0.1:1") if external else SPEC.engine.runtime
    engine = replace(SPEC.engine, engine=OllamaEngine(model="m", pull=pull), runtime=runtime)
    assert adapter.pulls(replace(SPEC, engine=engine)) is does
