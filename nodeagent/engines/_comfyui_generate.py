"""One generation by ComfyUI: from a graph to its files."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import AsyncGenerator, Iterator
from contextlib import aclosing
from pathlib import PurePosixPath
from typing import Any

from msgspec import Struct

from nodeagent.engines._artifact import pieces_of
from nodeagent.engines._comfyui_check import Finding, look_at, told
from nodeagent.engines._comfyui_classes import NodeClass, node_class_of
from nodeagent.engines._comfyui_failures import failure, is_well, partial_refusal, refusal, upload_refusal
from nodeagent.engines._comfyui_graph import Graph, files_read, graph_of, with_files
from nodeagent.engines._comfyui_http import ComfyUiHttp, HistoryEntry, RefusedError
from nodeagent.engines._comfyui_progress import Preview, PromptProgress, preview_of
from nodeagent.engines._comfyui_results import files_of, pieces_of_file
from nodeagent.engines._comfyui_socket import EventStream, TextEvent
from rung.codec import GenerationEvent
from rung.errors import (
    EngineFailedError,
    EngineProtocolError,
    EngineTimeoutError,
    EngineUnreachableError,
    InvalidRequestError,
    RungError,
)
from rung.types import ArtifactChunk, Phase, PhaseProgress, WorkflowInput

#: After these the history is about to be there.
_LAST_EVENTS = {"execution_success", "execution_error", "execution_interrupted"}
#: So often a prompt has to be nowhere before it is given up.
_LOOKS_BEFORE_LOST = 2


class ComfyUiPace(Struct, frozen=True, kw_only=True):
    """How often ComfyUI is asked, and how long it is waited for. Seconds.

    Attributes:
        waiting_poll_s: between looks at a prompt that waits, or of which nothing is told.
        running_poll_s: between looks at one that runs, and is told of.
        last_poll_s: between looks at one that has ended.
        last_words_s: a prompt that has ended is listened to for so long, if its last event has not come.
        silent_s: a prompt that runs and of which nothing is told for so long has a new connection.
        unreachable_s: ComfyUI may be away for so long.
        rejoin_pause_s: before the WebSocket is joined again.
        retell_s: progress is told again after so long, for those who wait for a sign of life.
        stop_patience_s: how long a cancelled prompt is waited for.
        stop_pause_s: between looks at a cancelled prompt.
    """

    waiting_poll_s: float = 1.0
    running_poll_s: float = 3.0
    last_poll_s: float = 0.1
    last_words_s: float = 0.5
    silent_s: float = 60.0
    unreachable_s: float = 5.0
    rejoin_pause_s: float = 1.0
    retell_s: float = 20.0
    stop_patience_s: float = 20.0
    stop_pause_s: float = 0.5


class NodeClasses:
    """The classes that one ComfyUI has, as far as they were asked for."""

    def __init__(self) -> None:
        self._known: dict[str, NodeClass] = {}

    async def of(self, http: ComfyUiHttp, graph: Graph) -> dict[str, NodeClass]:
        """The classes of a graph; with one that is missing, all that there are."""
        wanted = dict.fromkeys(node["class_type"] for node in graph.values())
        for name in wanted:
            if name not in self._known:
                found = await http.node_class(name)
                if found is None:
                    every = await http.node_classes()
                    self._known |= {each: node_class_of(row) for each, row in every.items()}
                    return self._known
                self._known[name] = node_class_of(found)
        return {name: self._known[name] for name in wanted}

    def forget(self) -> None:
        """Ask again: it was started anew, or files came and went."""
        self._known.clear()


class PromptRun:
    """One graph, from its check to its files.

    Args:
        http: ComfyUI's routes.
        classes: its classes of nodes.
        wanted: what to carry out.
        idle_timeout_s: longest silence of a prompt that runs.
        pace: how often it is asked.
    """

    def __init__(
        self,
        http: ComfyUiHttp,
        classes: NodeClasses,
        wanted: WorkflowInput,
        *,
        idle_timeout_s: float,
        pace: ComfyUiPace,
    ) -> None:
        self._http = http
        self._classes = classes
        self._wanted = wanted
        self._idle_timeout_s = idle_timeout_s
        self._pace = pace
        self._time_s = asyncio.get_running_loop().time
        self._graph: Graph = {}
        self._findings: tuple[Finding, ...] = ()
        self.client_id = uuid.uuid4().hex
        #: Canonical and in lower case, which newer versions insist on.
        self.prompt_id = str(uuid.uuid4())
        #: Whether ComfyUI may have it.
        self.open = False

    async def prepare(self) -> None:
        """Check the graph, and upload what it reads.

        Raises:
            InvalidRequestError: something is wrong with it; the message says what.
        """
        graph = graph_of(self._wanted.graph_json)
        files = {file.name: file for file in self._wanted.files}
        names = files_read(graph)
        for name in names:
            if name not in files:
                there = ", ".join(files) or "none"
                raise InvalidRequestError(
                    f"the workflow reads the file {name!r}, which did not come with it; there are {there}"
                )
        self._findings = await self._look(graph)
        sure = [finding for finding in self._findings if finding.sure]
        if sure:
            raise InvalidRequestError(f"{self._http.what}: the workflow cannot be carried out: {told(sure)}")
        places: dict[str, str] = {}
        for index, name in enumerate(names):
            # Names are ours: those of callers may be anything. The ending tells ComfyUI what it is.
            stored = f"{self.prompt_id}-{index}{PurePosixPath(name).suffix}"
            try:
                places[name] = await self._http.upload(files[name], stored)
            except RefusedError as refused:
                raise upload_refusal(self._http.what, name, refused.status) from None
        self._graph = with_files(graph, places)

    async def _look(self, graph: Graph) -> tuple[Finding, ...]:
        findings = look_at(graph, await self._classes.of(self._http, graph))
        if findings:
            # What is remembered may be old: of a ComfyUI before, or before a file came.
            self._classes.forget()
            findings = look_at(graph, await self._classes.of(self._http, graph))
        return findings

    async def events(self) -> AsyncGenerator[GenerationEvent, None]:
        """Carry it out, and say what happens; the end is a complete result. Raises as `generate`."""
        progress = PromptProgress(self._graph, await self._classes.of(self._http, self._graph))
        pause_s = self._pace.rejoin_pause_s
        async with EventStream(self._http, self.client_id, pause_s=pause_s) as stream:
            await self._submit()
            following = _Following(self._http, stream, progress, self.prompt_id, self._wanted, self._pace)
            async with aclosing(following.events(self._idle_timeout_s)) as found:
                async for event in found:
                    yield event
        self.open = False
        entry = following.ended
        if not is_well(entry.status):
            messages = entry.status.messages if entry.status is not None else []
            raise failure(self._http.what, self._graph, [*messages, *following.errors])
        files = files_of(entry.outputs)
        if not files:
            if following.errors:
                raise failure(self._http.what, self._graph, following.errors)
            raise EngineFailedError(f"{self._http.what}: the workflow ended, and wrote no file")
        for index, file in enumerate(files):
            pieces = pieces_of_file(self._http, str(index), file, idle_timeout_s=self._idle_timeout_s)
            async with aclosing(pieces):
                async for piece in pieces:
                    yield piece

    async def _submit(self) -> None:
        """Put it in the queue, all of it or nothing."""
        # Newer versions go by this and not by how they were started.
        extra_data: dict[str, Any] = {"preview_method": "auto" if self._wanted.previews else "none"}
        self.open = True
        try:
            answer = await self._http.submit(
                self._graph, prompt_id=self.prompt_id, client_id=self.client_id, extra_data=extra_data
            )
        except RefusedError as refused:
            self.open = False
            raise refusal(
                self._http.what, refused.status, refused.body, graph=self._graph, findings=self._findings
            ) from None
        self.prompt_id = answer.prompt_id
        partial = partial_refusal(
            self._http.what, answer.node_errors, graph=self._graph, findings=self._findings
        )
        if partial is not None:
            raise partial


class _Following:
    """A prompt in ComfyUI's hands: by its WebSocket, and by looking at history and queue."""

    def __init__(
        self,
        http: ComfyUiHttp,
        stream: EventStream,
        progress: PromptProgress,
        prompt_id: str,
        wanted: WorkflowInput,
        pace: ComfyUiPace,
    ) -> None:
        self._http = http
        self._stream = stream
        self._progress = progress
        self._prompt_id = prompt_id
        self._previews = _Previews(wanted.previews)
        self._pace = pace
        self._time_s = asyncio.get_running_loop().time
        self._entry: HistoryEntry | None = None
        self._outputs: dict[str, dict[str, Any]] = {}
        self._succeeded = self._closing = self._ended = False
        self._nowhere = 0
        self._waits = True
        #: What was told of errors: some do not end a prompt.
        self.errors: list[tuple[str, dict[str, Any]]] = []
        now_s = self._time_s()
        self._heard_s = self._answered_s = self._told_s = self._joined_s = now_s

    @property
    def ended(self) -> HistoryEntry:
        """How it ended, once `events` has."""
        assert self._entry is not None
        return self._entry

    async def events(self, idle_timeout_s: float) -> AsyncGenerator[GenerationEvent, None]:
        """What is to be told of it, until it has ended. Raises as `generate`."""
        async with aclosing(self._until_ended(idle_timeout_s)) as found:
            async for event in found:
                yield event
        until_s = self._time_s() + self._pace.last_words_s
        while not self._ended and self._stream.joined:
            last = await self._stream.next(max(until_s - self._time_s(), 0.0))
            if last is None:
                break
            for each in self._event(last):
                yield each

    async def _until_ended(self, idle_timeout_s: float) -> AsyncGenerator[GenerationEvent, None]:
        look_s = self._time_s()
        while self._entry is None:
            event = await self._stream.next(max(look_s - self._time_s(), 0.0))
            for each in self._event(event):
                self._told_s = self._time_s()
                yield each
            if event is not None and not self._closing and look_s > self._time_s():
                continue
            place = await self._look(idle_timeout_s)
            if place is not None:
                self._told_s = self._time_s()
                yield place
            look_s = self._time_s() + self._poll_s()
            again = self._sign_of_life(min(self._pace.retell_s, idle_timeout_s / 2))
            if again is not None:
                yield again
            if self._time_s() - max(self._heard_s, self._joined_s) > self._pace.silent_s and not self._waits:
                self._joined_s = self._time_s()
                await self._stream.rejoin()

    def _poll_s(self) -> float:
        if self._closing:
            return self._pace.last_poll_s
        if self._waits or not self._stream.joined:
            return self._pace.waiting_poll_s
        return self._pace.running_poll_s

    def _event(self, event: TextEvent | bytes | None) -> Iterator[GenerationEvent]:
        if isinstance(event, bytes):
            preview = preview_of(event, self._prompt_id, ours_runs=self._progress.running)
            if preview is not None:
                self._heard_s = self._time_s()
                yield from self._previews.came(preview)
            return
        if event is None or event.data.get("prompt_id") != self._prompt_id:
            return
        self._heard_s = self._time_s()
        self._waits = False
        if event.type == "executed":
            output = event.data.get("output")
            if isinstance(output, dict):
                self._outputs[str(event.data.get("node"))] = output
        self._succeeded |= event.type == "execution_success"
        if event.type in ("execution_error", "execution_interrupted"):
            self.errors.append((event.type, event.data))
        # The last one: the history is there before it.
        self._ended |= event.type == "executing" and event.data.get("node") is None
        # A node that is blocked is an error, too, and the rest goes on.
        blocked = event.data.get("exception_type") == "ExecutionBlocked"
        self._closing |= self._ended or (event.type in _LAST_EVENTS and not blocked)
        for progress in self._progress.on(event.type, event.data):
            yield progress
            if progress.phase is Phase.SAMPLING and progress.step:
                yield from self._previews.stepped()

    async def _look(self, idle_timeout_s: float) -> PhaseProgress | None:
        """Look at history and queue. Raises as `generate`."""
        try:
            self._entry = await self._http.history(self._prompt_id)
            place = None if self._entry else await self._http.place(self._prompt_id)
        except (EngineUnreachableError, EngineProtocolError, EngineTimeoutError) as error:
            self._unanswered(error, idle_timeout_s)
            return None
        now_s = self._answered_s = self._time_s()
        if place is None:
            return None
        if place.ahead is None:
            self._missing()
            return None
        self._nowhere = 0
        if self._waits:
            # Its time begins when it runs.
            self._heard_s = now_s
            self._waits = not place.running
        if now_s - self._heard_s > idle_timeout_s:
            raise EngineTimeoutError(
                f"{self._http.what}: nothing was heard of the workflow for {idle_timeout_s:g} s while it ran",
                engine=self._http.what,
            )
        return self._progress.queued(place.ahead) if self._waits else None

    def _unanswered(self, error: RungError, idle_timeout_s: float) -> None:
        away_s = self._time_s() - self._answered_s
        # One that does not answer is busy, perhaps; one that nobody can reach is gone.
        busy = isinstance(error, EngineTimeoutError)
        patience_s = idle_timeout_s if busy else min(self._pace.unreachable_s, idle_timeout_s)
        if away_s > patience_s:
            raise error

    def _missing(self) -> None:
        """It is neither in the history nor in the queue."""
        if self._succeeded:
            # Somebody clears histories; what was told is enough.
            self._entry = HistoryEntry(self._outputs)
            return
        # It may have gone from one to the other between the two looks.
        self._nowhere += 1
        if self._nowhere < _LOOKS_BEFORE_LOST:
            return
        if self.errors:
            raise failure(self._http.what, {}, self.errors)
        raise EngineFailedError(
            f"{self._http.what}: ComfyUI knows the workflow no more: it was started anew, or somebody took "
            "the workflow out of its queue"
        )

    def _sign_of_life(self, after_s: float) -> PhaseProgress | None:
        """What was told last, if that is long ago and there was a sign of life since."""
        alive_s = self._answered_s if self._waits else self._heard_s
        if alive_s < self._told_s or self._time_s() - self._told_s < after_s:
            return None
        self._told_s = self._time_s()
        return self._progress.last or PhaseProgress(phase=Phase.GENERATING, detail="ComfyUI is at work")


class _Previews:
    """At most one picture for each step that is told of."""

    def __init__(self, wanted: bool) -> None:
        self._wanted = wanted
        self._newest: Preview | None = None
        self._owed = False
        self._given = 0

    def came(self, preview: Preview) -> Iterator[ArtifactChunk]:
        """A picture: for the step that was told of, if it comes after it, or for the next."""
        if self._wanted:
            self._newest = preview
            if self._owed:
                yield from self._give()

    def stepped(self) -> Iterator[ArtifactChunk]:
        """A step was told of: some versions send its picture before, some after."""
        self._owed = self._wanted
        if self._owed:
            yield from self._give()

    def _give(self) -> Iterator[ArtifactChunk]:
        newest, self._newest = self._newest, None
        if newest is None:
            return
        self._owed = False
        self._given += 1
        yield from pieces_of(f"preview-{self._given}", newest.content_type, newest.data, preview=True)
