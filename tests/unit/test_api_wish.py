"""What callers send over gRPC becomes the JSON that engines read."""

from __future__ import annotations

from base64 import b64encode
from typing import Any

import msgspec
import pytest
from google.protobuf.struct_pb2 import Struct

from controlplane.api import wish_from_embed, wish_from_generate
from rung import v1
from rung.errors import InvalidRequestError
from rung.types import (
    GenerationInput,
    ImageInput,
    ImagePart,
    JobKind,
    MeshInput,
    Priority,
    SpeechInput,
    TranscriptionInput,
)
from tests.fakes.pictures import a_png

PNG = a_png()


def chat(**fields: Any) -> v1.GenerateRequest:
    conversation = v1.Conversation(**({"messages": [v1.ChatMessage(role="user", content="Hi")]} | fields))
    return v1.GenerateRequest(model="tiny", chat=v1.ChatInput(conversation=conversation))


def openai(body: bytes, model: str = "tiny") -> v1.GenerateRequest:
    return v1.GenerateRequest(model=model, chat=v1.ChatInput(openai_json=body))


def body_of(request: v1.GenerateRequest) -> dict[str, Any]:
    return msgspec.json.decode(wish_from_generate(request).body, type=dict[str, Any])


def test_a_conversation_becomes_an_openai_request_that_streams() -> None:
    schema = Struct()
    schema.update({"type": "object", "minProperties": 1, "properties": {"x": {"maximum": 0.5}}})
    call = v1.ToolCall(id="c1", name="look", arguments='{"x":1}')
    request = chat(
        messages=[
            v1.ChatMessage(role="system", content="Be brief."),
            v1.ChatMessage(
                role="user",
                content="What?",
                images=[v1.ImagePart(content_type="image/png", data=PNG)],
            ),
            v1.ChatMessage(role="assistant", tool_calls=[call]),
            v1.ChatMessage(role="tool", content="42", tool_call_id="c1"),
        ],
        tools=[v1.Tool(name="look", description="Looks.", parameters=schema)],
        max_tokens=0,
        temperature=0.5,
        stop=["END"],
        seed=7,
    )
    assert body_of(request) == {
        "model": "tiny",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {
                "role": "user",
                "content": [
                    {"type": "text", "text": "What?"},
                    {
                        "type": "image_url",
                        "image_url": {"url": f"data:image/png;base64,{b64encode(PNG).decode()}"},
                    },
                ],
            },
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [
                    {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"x":1}'}}
                ],
            },
            {"role": "tool", "content": "42", "tool_call_id": "c1"},
        ],
        "tools": [
            {
                "type": "function",
                "function": {
                    "name": "look",
                    "description": "Looks.",
                    "parameters": {
                        "type": "object",
                        "minProperties": 1,
                        "properties": {"x": {"maximum": 0.5}},
                    },
                },
            }
        ],
        "max_tokens": 0,
        "temperature": 0.5,
        "stop": ["END"],
        "seed": 7,
    }


def test_openai_json_is_passed_on_as_it_is_but_for_model_and_stream() -> None:
    text = b'{"messages":[ {"role":"user","content":"\\u00e9"} ],"top_k":1e2,"model":"x","stream":false}'
    wish = wish_from_generate(openai(text))
    assert b'"messages":[ {"role":"user","content":"\\u00e9"} ]' in wish.body
    assert b'"top_k":1e2' in wish.body
    body = msgspec.json.decode(wish.body)
    assert (body["model"], body["stream"], wish.model) == ("tiny", True, "tiny")


def test_the_model_may_be_named_in_the_json_only() -> None:
    wish = wish_from_generate(openai(b'{"messages":[],"model":"inside"}', model=""))
    assert wish.model == "inside"
    assert msgspec.json.decode(wish.body)["model"] == "inside"


def test_the_rest_of_a_wish() -> None:
    request = chat()
    request.effort = 7
    request.request_id = "mine"
    request.policy.CopyFrom(v1.Policy(local_only=True, priority=v1.PRIORITY_USER))
    wish = wish_from_generate(request)
    assert (wish.kind, wish.model, wish.effort, wish.request_id) == (JobKind.CHAT, "tiny", 7, "mine")
    assert (wish.policy.local_only, wish.policy.priority) == (True, Priority.USER)
    assert wish_from_generate(chat()).effort is None


def with_effort(effort: int) -> v1.GenerateRequest:
    request = chat()
    request.effort = effort
    return request


def image(data: bytes) -> v1.ImagePart:
    return v1.ImagePart(content_type="image/jpeg", data=data)


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        (v1.GenerateRequest(model="tiny"), "no input"),
        (v1.GenerateRequest(chat=v1.ChatInput()), "chat is empty"),
        (with_effort(0), "effort is 0"),
        (with_effort(11), "effort is 11"),
        (chat(messages=[]), "no messages"),
        (chat(messages=[v1.ChatMessage(role="robot")]), "'robot'"),
        (chat(messages=[v1.ChatMessage(role="tool", content="x")]), "tool_call_id"),
        (
            chat(messages=[v1.ChatMessage(role="user", images=[v1.ImagePart(content_type="text/html")])]),
            "'text/html'",
        ),
        (
            chat(messages=[v1.ChatMessage(role="user", images=[image(PNG), image(b"<svg/>")])]),
            r"^messages\[0\].images\[1\] is not an image; send a PNG, JPEG or WebP file",
        ),
        (
            v1.GenerateRequest(image=v1.ImageInput(prompt="x", images=[image(PNG), image(a_png(9000, 1))])),
            r"^image.images\[1\] is 9000x1 pixels; each side must be 1 to 8192",
        ),
        (v1.GenerateRequest(mesh=v1.MeshInput(image=image(b""))), "^mesh.image is empty"),
        (openai(b"[1]"), "not a JSON object"),
        (openai(b'{"messages":'), "not a JSON object"),
        (openai(b"\xff"), "not a JSON object"),
        (openai(b"{}"), "no `messages`"),
        (openai(b'{"messages":[],"model":3}', model=""), "not a text"),
    ],
)
def test_malformed_requests_say_what_is_wrong(request_: v1.GenerateRequest, said: str) -> None:
    with pytest.raises(InvalidRequestError, match=said):
        wish_from_generate(request_)


@pytest.mark.parametrize(
    ("request_", "kind", "wanted"),
    [
        (
            v1.GenerateRequest(image=v1.ImageInput(prompt="a cat")),
            JobKind.IMAGE,
            ImageInput(prompt="a cat"),
        ),
        (
            v1.GenerateRequest(image=v1.ImageInput(prompt="a cat", images=[image(PNG)])),
            JobKind.IMAGE,
            # What it is counts, not what it is said to be.
            ImageInput(prompt="a cat", images=(ImagePart(content_type="image/png", data=PNG),)),
        ),
        (v1.GenerateRequest(speech=v1.SpeechInput(text="Hi")), JobKind.SPEECH, SpeechInput(text="Hi")),
        (
            v1.GenerateRequest(transcription=v1.TranscriptionInput(audio=b"RIFF", language="de")),
            JobKind.TRANSCRIPTION,
            TranscriptionInput(audio=b"RIFF", language="de"),
        ),
        (v1.GenerateRequest(mesh=v1.MeshInput(prompt="a chair")), JobKind.MESH, MeshInput(prompt="a chair")),
    ],
)
def test_other_inputs_make_jobs_of_their_own_kinds(
    request_: v1.GenerateRequest, kind: JobKind, wanted: GenerationInput
) -> None:
    wish = wish_from_generate(request_)
    assert (wish.kind, wish.input, wish.body) == (kind, wanted, b"")


def test_texts_to_embed() -> None:
    wish = wish_from_embed(v1.EmbedRequest(model="embed", inputs=["a", "b"]))
    assert wish.kind is JobKind.EMBEDDING
    assert msgspec.json.decode(wish.body) == {
        "model": "embed",
        "input": ["a", "b"],
        "encoding_format": "float",
    }
    with pytest.raises(InvalidRequestError, match="inputs are missing"):
        wish_from_embed(v1.EmbedRequest(model="embed"))


def test_texts_are_embedded_by_whoever_can_where_no_model_is_named() -> None:
    assert wish_from_embed(v1.EmbedRequest(inputs=["a"])).model == ""
