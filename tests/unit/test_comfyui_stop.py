"""Stopping one prompt of a ComfyUI, in the ways of its versions, and never another one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from nodeagent.engines._comfyui_stop import stop_prompt


class Queue:
    """A ComfyUI's queue and the routes that change it; prompts are `(id, client_id)`, the first one runs."""

    def __init__(self, *prompts: tuple[str, str], has_jobs: bool = False, deaf_for: int = 0) -> None:
        self.prompts = list(prompts)
        self.runs = bool(prompts)
        self.asked: list[str] = []
        self.stopped: list[str] = []
        self._has_jobs = has_jobs
        #: So many interrupts are forgotten, as just before a prompt begins.
        self._deaf_for = deaf_for

    def routes(self) -> web.Application:
        app = web.Application()
        app.router.add_get("/queue", self._queue)
        app.router.add_post("/queue", self._delete)
        app.router.add_post("/interrupt", self._interrupt)
        if self._has_jobs:
            app.router.add_post("/api/jobs/{id}/cancel", self._cancel)
        return app

    async def _queue(self, http: web.Request) -> web.Response:
        rows: list[Any] = [[0, name, {}, {"client_id": client}, []] for name, client in self.prompts]
        split = 1 if self.runs else 0
        return web.json_response({"queue_running": rows[:split], "queue_pending": rows[split:]})

    async def _delete(self, http: web.Request) -> web.Response:
        (name,) = (await http.json())["delete"]
        self.asked.append(f"delete {name}")
        waiting = self.prompts[1:] if self.runs else self.prompts
        self.prompts = [found for found in self.prompts if found not in waiting or found[0] != name]
        return web.Response()

    async def _interrupt(self, http: web.Request) -> web.Response:
        """As old ones do: whoever runs."""
        self.asked.append("interrupt")
        self._deaf_for -= 1
        if self._deaf_for < 0:
            self.stopped.append(self.prompts.pop(0)[0])
        return web.Response()

    async def _cancel(self, http: web.Request) -> web.Response:
        self.asked.append(f"cancel {http.match_info['id']}")
        self.stopped.append(self.prompts.pop(0)[0])
        return web.json_response({"cancelled": True})


@pytest.fixture
async def stopping() -> AsyncIterator[Any]:
    servers: list[TestServer] = []

    async def stop(queue: Queue, *, patience_s: float = 10.0) -> None:
        server = TestServer(queue.routes())
        await server.start_server()
        servers.append(server)
        await stop_prompt(
            str(server.make_url("")),
            "pictures",
            prompt_id="mine",
            client_id="me",
            patience_s=patience_s,
            pause_s=0.001,
        )

    yield stop
    for server in servers:
        await server.close()


async def test_one_that_waits_is_taken_out_and_nothing_is_interrupted(stopping: Any) -> None:
    queue = Queue(("other", "a"), ("mine", "me"), ("third", "b"))
    await stopping(queue)

    assert queue.asked == ["delete mine"]
    assert [name for name, _ in queue.prompts] == ["other", "third"]


async def test_one_that_runs_is_cancelled_by_its_id_where_there_is_a_route(stopping: Any) -> None:
    queue = Queue(("mine", "me"), ("other", "a"), has_jobs=True)
    await stopping(queue)

    assert queue.asked == ["delete mine", "cancel mine"]
    assert queue.stopped == ["mine"]


async def test_one_that_runs_is_interrupted_by_older_versions(stopping: Any) -> None:
    queue = Queue(("mine", "me"), ("other", "a"))
    await stopping(queue)

    assert queue.asked == ["delete mine", "interrupt"]
    assert queue.stopped == ["mine"]


async def test_an_interrupt_that_was_forgotten_is_sent_again(stopping: Any) -> None:
    queue = Queue(("mine", "me"), ("other", "a"), deaf_for=2)
    await stopping(queue)

    assert queue.asked == ["delete mine", "interrupt", "interrupt", "interrupt"]
    assert queue.stopped == ["mine"]


@pytest.mark.parametrize("prompts", [(), (("other", "a"),), (("other", "a"), ("third", "b"))])
async def test_one_that_has_ended_leaves_the_others_alone(
    stopping: Any, prompts: tuple[tuple[str, str], ...]
) -> None:
    queue = Queue(*prompts)
    await stopping(queue)

    assert (queue.asked, queue.stopped) == (["delete mine"], [])


async def test_one_with_an_id_of_comfyuis_own_is_found_by_its_client(stopping: Any) -> None:
    queue = Queue(("other", "a"), ("17", "me"))
    await stopping(queue)

    assert queue.asked == ["delete mine", "delete 17"]
    assert [name for name, _ in queue.prompts] == ["other"]


async def test_one_that_does_not_stop_is_left_when_the_patience_is_over(stopping: Any) -> None:
    queue = Queue(("mine", "me"), deaf_for=10**9)
    await stopping(queue, patience_s=0.2)

    assert [name for name, _ in queue.prompts] == ["mine"]


async def test_a_comfyui_that_is_gone_has_nothing_to_stop() -> None:
    await stop_prompt(
        "http://127.0.0.1:9", "pictures", prompt_id="mine", client_id="me", patience_s=10.0, pause_s=0.001
    )
