"""Generating: what is sent, and the stream of what else comes of it than an answer to a conversation."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import msgspec

from rung import codec, v1
from rung._client_artifacts import get_artifact
from rung._client_calls import Connection
from rung._client_jobs import EventStream
from rung._result import ArtifactFile, GenerationResult
from rung.errors import InvalidRequestError
from rung.types import (
    Artifact,
    ArtifactChunk,
    ChatMessage,
    Conversation,
    GenerationInput,
    ImageInput,
    ImagePart,
    JobEvent,
    Policy,
    Routed,
    Served,
    TokenDelta,
    Tool,
    Usage,
    UsageReported,
    whole_artifact,
)

Messages: TypeAlias = str | Sequence[ChatMessage]
OpenAiBody: TypeAlias = bytes | Mapping[str, Any]
#: What a request may be made from.
Content: TypeAlias = Conversation | OpenAiBody | GenerationInput


class _Receiving:
    """An artifact while its pieces come."""

    __slots__ = ("artifact", "content", "digest")

    def __init__(self) -> None:
        self.artifact: Artifact | None = None
        self.content = bytearray()
        self.digest = hashlib.sha256()

    def take(self, chunk: ArtifactChunk, event: JobEvent) -> None:
        if chunk.offset_bytes == len(self.content):
            self.content += chunk.data
            self.digest.update(chunk.data)
        self.artifact = whole_artifact(event) or self.artifact


class GenerationStream(EventStream):
    """The events of a generation, as they come; see `EventStream`. Previews are events, and no results."""

    def __init__(self, connection: Connection, request: v1.GenerateRequest) -> None:
        super().__init__(connection, request)
        self._receiving: dict[str, _Receiving] = {}
        self._text: list[str] = []
        self._usage: Usage | None = None
        self._served: Served | None = None

    async def result(self) -> GenerationResult:
        """Read to the end; what did not arrive whole with the events is fetched again.

        Raises:
            JobCancelledError: the job was cancelled, or this stream closed.
            RungError: the job failed, by the reason of its last event; or as the stream itself.
            UnknownArtifactError, ArtifactDamagedError: a file of it cannot be had.
        """
        done = await self._finish()
        whole = [each for each in self._receiving.values() if each.artifact is not None]
        return GenerationResult(
            job_id=self._job_id,
            artifacts=tuple([await self._file(each) for each in whole]),
            text="".join(self._text),
            usage=self._usage,
            served=done.served or self._served,
            finish_reason=done.finish_reason,
        )

    async def _file(self, received: _Receiving) -> ArtifactFile:
        artifact = received.artifact
        assert artifact is not None
        if received.digest.hexdigest() == artifact.sha256:
            return ArtifactFile(artifact=artifact, data=bytes(received.content))
        return ArtifactFile(artifact=artifact, data=await get_artifact(self._connection, artifact.id))

    def _take(self, event: JobEvent) -> None:
        match event.payload:
            case ArtifactChunk(preview=False) as chunk:
                self._receiving.setdefault(chunk.artifact_id, _Receiving()).take(chunk, event)
            case TokenDelta(content):
                self._text.append(content)
            case UsageReported(usage):
                self._usage = usage
            case Routed(served):
                self._served = served
            case _:
                pass


class GenerationCalls:
    """The part of a client that generates what is no answer to a conversation."""

    _connection: Connection

    def generate(
        self,
        wanted: GenerationInput,
        *,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> GenerationStream:
        """Generate pictures, speech, the text of a recording, or a mesh.

        Args:
            wanted: what to generate.
            model: a model, a deployment, or a name of the ladder; empty leaves the choice to it.
            effort: 1 to 10; None leaves it open.
            policy: where it may go and how it may be treated.
            request_id: the caller's own id; appears in logs.
        """
        request = generate_request(wanted, model, effort=effort, policy=policy, request_id=request_id)
        return GenerationStream(self._connection, request)

    def image(
        self,
        prompt: str = "",
        *,
        tier: str = "",
        operation: str = "generate",
        negative_prompt: str = "",
        width_pixels: int = 0,
        height_pixels: int = 0,
        seed: int | None = None,
        images: Sequence[ImagePart] = (),
        parameters: Mapping[str, Any] | None = None,
        count: int = 1,
        previews: bool = False,
        model: str = "",
        effort: int | None = None,
        policy: Policy = Policy(),  # noqa: B008 - frozen
        request_id: str = "",
    ) -> GenerationStream:
        """Draw: as `generate` of an `ImageInput`, whose fields say more.

        Args:
            prompt: what to draw.
            tier: `lightning`, `quality` or `ultra`; empty lets effort decide.
            operation: workflow template.
            negative_prompt: what not to draw.
            width_pixels: 0 for the tier's own.
            height_pixels: 0 for the tier's own.
            seed: None for a random one.
            images: pictures to start from: the picture itself, then its mask.
            parameters: further parameters of the template.
            count: how many pictures.
            previews: send pictures of what is there while it is sampled.
            model: as `generate`.
            effort: as `generate`.
            policy: as `generate`.
            request_id: as `generate`.
        """
        wanted = ImageInput(
            prompt=prompt,
            tier=tier,
            operation=operation,
            negative_prompt=negative_prompt,
            width_pixels=width_pixels,
            height_pixels=height_pixels,
            seed=seed,
            images=tuple(images),
            parameters=dict(parameters or {}),
            count=count,
            previews=previews,
        )
        return self.generate(wanted, model=model, effort=effort, policy=policy, request_id=request_id)


def conversation_of(
    messages: Messages, tools: Sequence[Tool], max_tokens: int | None, temperature: float | None
) -> Conversation:
    """A conversation from its turns, or from one text of the user."""
    turns = (ChatMessage("user", messages),) if isinstance(messages, str) else tuple(messages)
    return Conversation(messages=turns, tools=tuple(tools), max_tokens=max_tokens, temperature=temperature)


class _Body(msgspec.Struct):
    """What is read of an OpenAI body; the rest is the engine's."""

    model: str = ""


def generate_request(
    content: Content, model: str, *, effort: int | None, policy: Policy, request_id: str
) -> v1.GenerateRequest:
    """What is sent to have something generated. Raises InvalidRequestError for a body that is no JSON."""
    request = v1.GenerateRequest(
        request_id=request_id, model=model, effort=effort, policy=codec.policy_to_proto(policy)
    )
    match content:
        case Conversation():
            request.chat.conversation.CopyFrom(codec.conversation_to_proto(content))
        case bytes() | Mapping():
            body = content if isinstance(content, bytes) else msgspec.json.encode(content)
            request.chat.openai_json = body
            if not model:
                try:
                    request.model = msgspec.json.decode(body, type=_Body).model
                except msgspec.MsgspecError as error:
                    raise InvalidRequestError(f"the body is not an OpenAI request: {error}") from error
        case _:
            codec.write_generation_input(content, request)
    return request
