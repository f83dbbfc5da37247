"""The log of a job over HTTP: where a reader resumes, and how it is told that there is nothing more."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator

import pytest

from rung.types import JobKind, Policy, TokenDelta
from tests.fakes.gateway import Plane, a_plane

SSE = {"Accept": "text/event-stream"}


@pytest.fixture
async def plane() -> AsyncIterator[Plane]:
    async with a_plane() as plane:
        yield plane


@pytest.fixture
async def url(plane: Plane) -> str:
    """The log of a job that has ended, with seven events."""
    job = plane.jobs.open(kind=JobKind.CHAT, model="tiny", policy=Policy())
    for word in ("a", "b", "c", "d", "e"):
        job.text(TokenDelta(word))
    job.done("stop")
    return f"{plane.url}/v1/jobs/{job.id}/events"


async def ids(plane: Plane, url: str, **headers: str) -> list[int]:
    """The ids of the server-sent events that a reader gets."""
    async with plane.http.get(url, headers=SSE | headers) as response:
        assert response.status == 200
        text = await response.text()
    return [int(line.removeprefix("id: ")) for line in text.splitlines() if line.startswith("id: ")]


async def test_a_reconnecting_reader_gets_nothing_twice_although_its_url_says_where_it_began(
    plane: Plane, url: str
) -> None:
    assert await ids(plane, f"{url}?after=2") == [3, 4, 5, 6, 7]
    assert await ids(plane, f"{url}?after=2", **{"Last-Event-ID": "5"}) == [6, 7]


async def test_what_it_saw_last_counts_also_where_that_is_before_the_place_in_its_url(
    plane: Plane, url: str
) -> None:
    assert await ids(plane, f"{url}?after=5", **{"Last-Event-ID": "4"}) == [5, 6, 7]


async def test_an_empty_header_is_none(plane: Plane, url: str) -> None:
    assert await ids(plane, f"{url}?after=5", **{"Last-Event-ID": ""}) == [6, 7]


@pytest.mark.parametrize("accept", ["text/event-stream", "application/x-ndjson"])
async def test_a_reader_that_has_the_terminal_event_is_told_that_nothing_comes(
    plane: Plane, url: str, accept: str
) -> None:
    headers = {"Accept": accept, "Last-Event-ID": "7"}
    async with plane.http.get(f"{url}?after=2", headers=headers) as response:
        assert (response.status, await response.read()) == (204, b"")


async def test_so_it_is_once_the_job_is_only_in_the_store(plane: Plane, url: str) -> None:
    await plane.jobs.store_now()
    async with plane.http.get(url, headers=SSE | {"Last-Event-ID": "7"}) as response:
        assert response.status == 204


@pytest.mark.parametrize(
    ("query", "headers", "name"),
    [
        ("?after=2", {"Last-Event-ID": "seven"}, "Last-Event-ID is 'seven'"),
        ("", {"Last-Event-ID": "-1"}, "Last-Event-ID is '-1'"),
        ("?after=two", {}, "after is 'two'"),
    ],
)
async def test_a_wrong_place_is_reported_by_the_name_that_it_came_under(
    plane: Plane, url: str, query: str, headers: dict[str, str], name: str
) -> None:
    async with plane.http.get(url + query, headers=SSE | headers) as response:
        assert response.status == 400
        assert (await response.json())["error"]["message"].startswith(name)


async def test_a_place_beyond_the_end_is_refused(plane: Plane, url: str) -> None:
    async with plane.http.get(url, headers=SSE | {"Last-Event-ID": "8"}) as response:
        assert response.status == 416
        assert json.loads(await response.read())["error"]["rung"]["reason"] == "OUT_OF_RANGE"
