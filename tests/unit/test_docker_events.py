"""Listening for what happens to a container, whatever the daemon leaves out."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from typing import Any

import docker
import pytest

from nodeagent.runtimes._docker_events import ContainerEvents
from rung.errors import UnavailableError
from tests.fakes.virtual_time import in_virtual_time

Subscribe = Callable[[docker.DockerClient], Iterator[dict[str, Any]]]


async def silent(_: Subscribe) -> AsyncGenerator[dict[str, Any], None]:
    await asyncio.Event().wait()
    yield {}


async def away(_: Subscribe) -> AsyncGenerator[dict[str, Any], None]:
    answer: dict[str, Any] | None = None
    if answer is None:
        raise UnavailableError("no Docker Engine answers")
    yield answer


async def odd(_: Subscribe) -> AsyncGenerator[dict[str, Any], None]:
    yield {}
    yield {"Action": "die", "Actor": None}
    yield {"Action": "die", "Actor": {"ID": "other", "Attributes": {"exitCode": "1"}}}
    yield {"Action": "die", "Actor": {"ID": "mine", "Attributes": {"exitCode": "2"}}}
    await asyncio.Event().wait()


@in_virtual_time
async def test_one_of_which_nothing_is_heard_is_looked_at_all_the_same() -> None:
    events = ContainerEvents("a=b", silent)
    began_s = asyncio.get_running_loop().time()
    with events.listening("mine") as listener:
        for _ in range(2):
            await listener.news()
    await events.aclose()

    assert asyncio.get_running_loop().time() - began_s == pytest.approx(60.0)


@in_virtual_time
async def test_a_daemon_that_is_away_is_told_to_each_who_listens_and_asked_again_by_the_next() -> None:
    events = ContainerEvents("a=b", away)
    with events.listening("mine") as one, events.listening("other") as another:
        for listener in (one, another):
            with pytest.raises(UnavailableError, match="no Docker Engine answers"):
                await listener.news()
    with events.listening("mine") as listener, pytest.raises(UnavailableError):
        await listener.news()
    await events.aclose()


@in_virtual_time
async def test_only_what_is_told_of_its_own_container_is_news() -> None:
    events = ContainerEvents("a=b", odd)
    with events.listening("mine") as listener:
        await listener.news()
        assert listener.heard.exit_code == 2
    await events.aclose()
