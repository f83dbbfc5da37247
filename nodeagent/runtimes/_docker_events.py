"""What the Docker Engine tells of containers as it happens: one stream for all who wait for an end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from typing import Any, TypeAlias

import docker

from nodeagent.runtimes._docker_state import Heard
from rung.errors import RungError, UnavailableError

Event: TypeAlias = dict[str, Any]
#: Makes a stream of what a blocking iterator gives. It raises UnavailableError when it breaks off.
OpenStream: TypeAlias = Callable[
    [Callable[[docker.DockerClient], Iterator[Event]]], AsyncGenerator[Event, None]
]

_KINDS = ("start", "die", "destroy", "kill", "oom", "health_status")
#: A container that nothing is heard of is looked at this often: a daemon drops what overruns its buffer.
_LOOK_INTERVAL_S = 30.0


class Listener:
    """What is heard of one container while somebody waits for it."""

    def __init__(self) -> None:
        self.heard = Heard()
        self._news = asyncio.Event()
        self._broken = ""

    async def news(self) -> None:
        """Return when something was heard, or when it is time to look in any case.

        Raises:
            UnavailableError: the stream has broken off; who still waits listens anew.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(_LOOK_INTERVAL_S):
                await self._news.wait()
        self._news.clear()
        if self._broken:
            raise UnavailableError(self._broken)

    def tell(self, event: Event) -> None:
        """Note an event of this container."""
        self.heard.note(event)
        self._news.set()

    def break_off(self, why: str) -> None:
        """There will be no more."""
        self._broken = why
        self._news.set()


class ContainerEvents:
    """Reads the daemon's events from when somebody first listens until it is closed, or the daemon ends.

    An event wakes those who wait, and says what no state of a container does: by whom it was ended.
    Whether it runs is for them to look up, so that one that comes twice, or late, does no harm.
    """

    def __init__(self, label: str, open_stream: OpenStream) -> None:
        """Of containers that carry `label`, which is `name=value`."""
        self._label = label
        self._open_stream = open_stream
        self._listeners: dict[str, list[Listener]] = {}
        self._reading: asyncio.Task[None] | None = None

    @contextmanager
    def listening(self, container_id: str) -> Iterator[Listener]:
        """Listen for a container: what happens to it after this was called is heard."""
        listener = Listener()
        listeners = self._listeners.setdefault(container_id, [])
        listeners.append(listener)
        if self._reading is None or self._reading.done():
            self._reading = asyncio.create_task(self._read(), name="docker-events")
        try:
            yield listener
        finally:
            listeners.remove(listener)
            if not listeners:
                del self._listeners[container_id]

    async def aclose(self) -> None:
        """Read no more."""
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _read(self) -> None:
        why = "the Docker Engine has ended its stream of events"
        try:
            async with aclosing(self._open_stream(self._subscribe)) as events:
                async for event in events:
                    for listener in self._listeners.get((event.get("Actor") or {}).get("ID", ""), ()):
                        listener.tell(event)
        except RungError as error:
            why = error.message
        for listeners in self._listeners.values():
            for listener in listeners:
                listener.break_off(why)

    def _subscribe(self, client: docker.DockerClient) -> Iterator[Event]:
        filters = {"type": "container", "label": self._label, "event": list(_KINDS)}
        # From the beginning of time: the daemon first repeats its last 256 events, and with them those
        # that happened while this was on its way to it.
        return client.api.events(since=1, filters=filters, decode=True)
