"""What callers send over gRPC, as wishes."""

from __future__ import annotations

import base64
from typing import Any, TypeAlias

import msgspec

from controlplane.pipelines import GENERATION_KINDS, Wish, looked_into, picture_of
from rung import codec, v1
from rung.errors import InvalidRequestError
from rung.types import ChatMessage, Conversation, ImagePart, JobKind, PredictionTask, Tool

_ROLES = frozenset({"system", "developer", "user", "assistant", "tool"})

Json: TypeAlias = dict[str, Any]


def wish_from_generate(request: v1.GenerateRequest) -> Wish:
    """The wish of a `GenerateRequest`.

    Raises:
        InvalidRequestError: something is missing or malformed.
    """
    model, body, kind = request.model, b"", JobKind.CHAT
    wanted = codec.read_generation_input(request)
    if wanted is not None:
        kind = GENERATION_KINDS[type(wanted)]
        wanted = looked_into(wanted, request.WhichOneof("input") or "input")
    elif request.HasField("chat"):
        model, body = _chat_body(model, request.chat)
    else:
        raise InvalidRequestError(
            "the request has no input; set one of chat, image, speech, transcription, mesh"
        )
    return Wish(
        kind=kind,
        model=model,
        body=body,
        input=wanted,
        policy=codec.policy_from_proto(request.policy),
        effort=_effort(request),
        request_id=request.request_id,
    )


def wish_from_embed(request: v1.EmbedRequest) -> Wish:
    """The wish of an `EmbedRequest`. Raises InvalidRequestError."""
    if not request.inputs:
        raise InvalidRequestError("inputs are missing; give at least one text")
    return Wish(
        kind=JobKind.EMBEDDING,
        model=request.model,
        body=msgspec.json.encode(
            {"model": request.model, "input": list(request.inputs), "encoding_format": "float"}
        ),
        policy=codec.policy_from_proto(request.policy),
        request_id=request.request_id,
    )


def task_from_predict(request: v1.PredictRequest) -> PredictionTask:
    """The task of a `PredictRequest`. Raises InvalidRequestError: it has none."""
    task = codec.read_prediction_task(request)
    if task is None:
        raise InvalidRequestError("the request has no task; set one of classify, regress, forecast")
    return task


def _effort(request: v1.GenerateRequest) -> int | None:
    if not request.HasField("effort"):
        return None
    if not 1 <= request.effort <= 10:
        raise InvalidRequestError(f"effort is {request.effort}; it must be 1 to 10, or unset")
    return request.effort


def _chat_body(model: str, chat: v1.ChatInput) -> tuple[str, bytes]:
    """The model that is asked for, and the body of an OpenAI chat-completions request that streams."""
    match chat.WhichOneof("form"):
        case "openai_json":
            return _openai_body(model, chat.openai_json)
        case "conversation":
            body = _conversation(codec.conversation_from_proto(chat.conversation))
            body["model"] = model
            body["stream"] = True
            body["stream_options"] = {"include_usage": True}
            return model, msgspec.json.encode(body)
        case _:
            raise InvalidRequestError("chat is empty; set `conversation` or `openai_json`")


def _openai_body(model: str, text: bytes) -> tuple[str, bytes]:
    try:
        # The values stay text: they are passed on as they are.
        fields = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    except msgspec.DecodeError as error:
        raise InvalidRequestError(f"openai_json is not a JSON object: {error}") from error
    if "messages" not in fields:
        raise InvalidRequestError("openai_json has no `messages`")
    if not model and "model" in fields:
        try:
            model = msgspec.json.decode(fields["model"], type=str)
        except msgspec.DecodeError as error:
            raise InvalidRequestError("`model` in openai_json is not a text") from error
    fields["model"] = msgspec.Raw(msgspec.json.encode(model))
    fields["stream"] = msgspec.Raw(b"true")
    fields["stream_options"] = msgspec.Raw(b'{"include_usage":true}')
    return model, msgspec.json.encode(fields)


def _conversation(conversation: Conversation) -> Json:
    if not conversation.messages:
        raise InvalidRequestError("the conversation has no messages")
    body: Json = {
        "messages": [_message(index, message) for index, message in enumerate(conversation.messages)]
    }
    if conversation.tools:
        body["tools"] = [_tool(tool) for tool in conversation.tools]
    if conversation.stop:
        body["stop"] = conversation.stop
    sampling = {
        "max_tokens": conversation.max_tokens,
        "temperature": conversation.temperature,
        "top_p": conversation.top_p,
        "seed": conversation.seed,
    }
    return body | {name: value for name, value in sampling.items() if value is not None}


def _message(index: int, message: ChatMessage) -> Json:
    if message.role not in _ROLES:
        raise InvalidRequestError(
            f"messages[{index}].role is {message.role!r}; it must be one of {', '.join(sorted(_ROLES))}"
        )
    turn: Json = {"role": message.role, "content": message.content}
    if message.images:
        parts: list[Json] = [{"type": "text", "text": message.content}] if message.content else []
        parts.extend(
            _image(f"messages[{index}].images[{place}]", image) for place, image in enumerate(message.images)
        )
        turn["content"] = parts
    if message.tool_calls:
        turn["content"] = message.content or None
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.tool_calls
        ]
    if message.role == "tool":
        if not message.tool_call_id:
            raise InvalidRequestError(f"messages[{index}] is a tool's answer without tool_call_id")
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _image(name: str, image: ImagePart) -> Json:
    if not image.content_type.startswith("image/"):
        raise InvalidRequestError(f"{name} is of type {image.content_type!r}; it must be image/…")
    picture = picture_of(image.data, name)
    data = base64.b64encode(picture.data).decode()
    return {"type": "image_url", "image_url": {"url": f"data:{picture.content_type};base64,{data}"}}


def _tool(tool: Tool) -> Json:
    function: Json = {"name": tool.name, "parameters": tool.parameters}
    if tool.description:
        function["description"] = tool.description
    return {"type": "function", "function": function}
