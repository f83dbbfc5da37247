"""Conversations and vectors."""

from __future__ import annotations

from google.protobuf.json_format import MessageToDict
from google.protobuf.struct_pb2 import Struct

from rung import v1
from rung.codec._generation import image_part_from_proto, image_part_to_proto
from rung.codec._job import (
    embedding_vectors_to_proto,
    served_from_proto,
    served_to_proto,
    usage_from_proto,
    usage_to_proto,
)
from rung.codec._values import whole_numbers
from rung.types import (
    ChatMessage,
    Conversation,
    EmbeddingResult,
    Embeddings,
    Tool,
    ToolCall,
)


def conversation_to_proto(value: Conversation) -> v1.Conversation:
    """Encode a conversation."""
    return v1.Conversation(
        messages=[_message_to_proto(message) for message in value.messages],
        tools=[_tool_to_proto(tool) for tool in value.tools],
        max_tokens=value.max_tokens,
        temperature=value.temperature,
        top_p=value.top_p,
        stop=value.stop,
        seed=value.seed,
    )


def conversation_from_proto(message: v1.Conversation) -> Conversation:
    """Decode a conversation. Whole numbers in the schema of a tool come as int."""
    has = message.HasField
    return Conversation(
        messages=tuple(_message_from_proto(each) for each in message.messages),
        tools=tuple(_tool_from_proto(each) for each in message.tools),
        max_tokens=message.max_tokens if has("max_tokens") else None,
        temperature=message.temperature if has("temperature") else None,
        top_p=message.top_p if has("top_p") else None,
        stop=tuple(message.stop),
        seed=message.seed if has("seed") else None,
    )


def embeddings_to_proto(value: Embeddings) -> v1.EmbedResponse:
    """Encode vectors. Components become 32-bit floats."""
    return v1.EmbedResponse(
        vectors=embedding_vectors_to_proto(EmbeddingResult(value.vectors)),
        usage=usage_to_proto(value.usage) if value.usage else None,
        served=served_to_proto(value.served) if value.served else None,
        job_id=value.job_id,
    )


def embeddings_from_proto(message: v1.EmbedResponse) -> Embeddings:
    """Decode vectors."""
    return Embeddings(
        vectors=tuple(tuple(vector.values) for vector in message.vectors),
        usage=usage_from_proto(message.usage) if message.HasField("usage") else None,
        served=served_from_proto(message.served) if message.HasField("served") else None,
        job_id=message.job_id,
    )


def _message_to_proto(value: ChatMessage) -> v1.ChatMessage:
    return v1.ChatMessage(
        role=value.role,
        content=value.content,
        images=[image_part_to_proto(image) for image in value.images],
        tool_calls=[
            v1.ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in value.tool_calls
        ],
        tool_call_id=value.tool_call_id,
    )


def _message_from_proto(message: v1.ChatMessage) -> ChatMessage:
    return ChatMessage(
        role=message.role,
        content=message.content,
        images=tuple(image_part_from_proto(image) for image in message.images),
        tool_calls=tuple(
            ToolCall(id=call.id, name=call.name, arguments=call.arguments) for call in message.tool_calls
        ),
        tool_call_id=message.tool_call_id,
    )


def _tool_to_proto(value: Tool) -> v1.Tool:
    parameters = Struct()
    parameters.update(value.parameters)
    return v1.Tool(name=value.name, description=value.description, parameters=parameters)


def _tool_from_proto(message: v1.Tool) -> Tool:
    return Tool(
        name=message.name,
        description=message.description,
        parameters={name: whole_numbers(each) for name, each in MessageToDict(message.parameters).items()},
    )
