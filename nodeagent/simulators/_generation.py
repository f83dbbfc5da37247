"""What a simulated engine says, and when: plain text that is honest about itself, token by token."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import math
import re
from collections.abc import AsyncIterator
from enum import StrEnum
from itertools import cycle, islice
from typing import Any

import msgspec
from msgspec import Struct, field

from nodeagent.simulators._settings import Pace

_TOKEN = re.compile(r"\s*\S{1,6}|\s+")
_COUNT_TO = re.compile(r"\bcount to (\d{1,6})\b", re.IGNORECASE)
_CALL_THE_TOOL = re.compile(r"\b(?:call|use) (?:the|a|your) tool\b", re.IGNORECASE)
_HARD = re.compile(r"\b(?:prove|proof|derive|debug|analy[sz]e|step by step)\b", re.IGNORECASE)
#: What a chat template adds around each message.
_TOKENS_PER_MESSAGE = 4
_TOKENS_PER_IMAGE = 256
_PICTURES = (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF", b"GIF8", b"BM")
EMBEDDING_DIMENSIONS = 64


class Message(Struct):
    """One message of a chat."""

    role: str = "user"
    content: str | list[dict[str, Any]] | None = None

    @property
    def text(self) -> str:
        """The text in it, without images and the like."""
        if isinstance(self.content, list):
            return " ".join(str(part["text"]) for part in self.content if part.get("text"))
        return self.content or ""

    @property
    def images(self) -> list[str]:
        """URLs of the pictures in it."""
        parts = [part.get("image_url") for part in self.content] if isinstance(self.content, list) else []
        return [
            str(part.get("url", "") if isinstance(part, dict) else part) for part in parts if part is not None
        ]


class ToolFunction(Struct):
    """What a tool is called and takes."""

    name: str
    parameters: dict[str, Any] = {}


class Tool(Struct):
    """A tool that the model may call."""

    function: ToolFunction


class StreamOptions(Struct):
    """What a stream should hold besides text."""

    include_usage: bool = False


class GenerationRequest(Struct):
    """What is understood of a request to the chat and completion routes; the rest is ignored."""

    model: str = ""
    messages: list[Message] = []
    prompt: str | list[str] = ""
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    stream_options: StreamOptions | None = field(default_factory=StreamOptions)
    tools: list[Tool] | None = None
    tool_choice: str | dict[str, Any] | None = None
    ignore_eos: bool = False

    @property
    def last_text(self) -> str:
        """What is to be answered."""
        if self.messages:
            return self.messages[-1].text
        return self.prompt if isinstance(self.prompt, str) else " ".join(self.prompt)

    @property
    def prompt_tokens(self) -> int:
        """Length of everything that was sent."""
        if not self.messages:
            return count_tokens(self.last_text)
        texts = sum(_TOKENS_PER_MESSAGE + count_tokens(message.text) for message in self.messages)
        return texts + _TOKENS_PER_IMAGE * len(self.images)

    @property
    def images(self) -> list[str]:
        """URLs of all pictures."""
        return [url for message in self.messages for url in message.images]


class EmbeddingRequest(Struct):
    """A request to the embedding route."""

    input: str | list[str | int | list[int]]
    model: str = ""

    @property
    def inputs(self) -> list[str]:
        """What is to be embedded, one text a vector."""
        if isinstance(self.input, str):
            return [self.input]
        if self.input and all(isinstance(item, int) for item in self.input):
            return [str(self.input)]
        return [str(item) for item in self.input]


class PieceKind(StrEnum):
    """Which part of an answer a token belongs to."""

    REASONING = "reasoning"
    CONTENT = "content"
    TOOL_NAME = "tool_name"
    TOOL_ARGUMENTS = "tool_arguments"


class Piece(Struct, frozen=True):
    """One token."""

    kind: PieceKind
    text: str


class Plan(Struct, frozen=True):
    """A whole answer, before it is spoken."""

    pieces: tuple[Piece, ...]
    prompt_tokens: int
    finish_reason: str


def tokens_of(text: str) -> list[str]:
    """Text in pieces about the size of real tokens; joined they are the text again."""
    return _TOKEN.findall(text)


def count_tokens(text: str) -> int:
    """How many tokens a text has."""
    return len(tokens_of(text))


def is_picture(url: str) -> bool:
    """Whether a data URL has something in it that begins like a picture."""
    head, _, data = url.partition(",")
    if not head.startswith("data:") or not head.endswith(";base64"):
        return False
    try:
        return base64.b64decode(data, validate=True).startswith(_PICTURES)
    except ValueError:
        return False


def plan_answer(
    request: GenerationRequest, *, engine: str, model: str, context_tokens: int, reasons: bool
) -> Plan:
    """What to answer. The same request gets the same answer.

    "count to N" is obeyed, `ignore_eos` goes on until `max_tokens`, and a tool is called if the request
    has one and says "call the tool" or demands it. A question that looks hard is handed on, as it is, to a
    tool that takes a `problem`.
    """
    prompt_tokens = request.prompt_tokens
    room = max(context_tokens - prompt_tokens, 1)
    wanted = request.max_completion_tokens or request.max_tokens
    limit = room if wanted is None or wanted < 0 else min(wanted, room)
    pieces: list[Piece] = []
    if reasons:
        pieces += [Piece(PieceKind.REASONING, token) for token in tokens_of(_thoughts(request))]
    tool = _tool_to_call(request)
    if tool is not None:
        pieces.append(Piece(PieceKind.TOOL_NAME, tool.name))
        arguments = msgspec.json.encode(_arguments_for(tool, request)).decode()
        pieces += [Piece(PieceKind.TOOL_ARGUMENTS, token) for token in tokens_of(arguments)]
    else:
        spoken = [Piece(PieceKind.CONTENT, token) for token in tokens_of(_answer(request, engine, model))]
        if request.ignore_eos:
            spoken = list(islice(cycle([*spoken, Piece(PieceKind.CONTENT, "\n")]), limit))
        pieces += spoken
    if len(pieces) > limit or request.ignore_eos:
        return Plan(tuple(pieces[:limit]), prompt_tokens, "length")
    return Plan(tuple(pieces), prompt_tokens, "stop" if tool is None else "tool_calls")


def is_reasoner(model: str) -> bool:
    """Whether a model of that name thinks aloud before it answers."""
    return "r1" in model.lower() or "reason" in model.lower()


async def paced(plan: Plan, pace: Pace) -> AsyncIterator[Piece]:
    """The tokens of a plan at their pace. The schedule is absolute: lateness does not add up."""
    loop = asyncio.get_running_loop()
    due = loop.time() + pace.first_token_delay_s(plan.prompt_tokens)
    for piece in plan.pieces:
        await asyncio.sleep(max(due - loop.time(), 0.0))
        yield piece
        due += 1.0 / pace.tokens_per_s


def embed(text: str) -> list[float]:
    """A vector of length 1 that depends on the text, and on nothing else."""
    values = []
    for index in range(EMBEDDING_DIMENSIONS):
        digest = hashlib.blake2b(f"{index}:{text}".encode(), digest_size=4).digest()
        values.append(int.from_bytes(digest) / 2**31 - 1.0)
    length = math.sqrt(sum(value * value for value in values)) or 1.0
    return [round(value / length, 6) for value in values]


def _answer(request: GenerationRequest, engine: str, model: str) -> str:
    text = request.last_text
    count = _COUNT_TO.search(text)
    if count is not None:
        return " ".join(str(number) for number in range(1, int(count.group(1)) + 1))
    if request.messages and request.messages[-1].role == "tool":
        return f"The tool answered: {_shortened(text)}. This is a simulated {engine}: I can only repeat it."
    words = text.split()
    said = f"You sent {len(words)} word{'' if len(words) == 1 else 's'}: \u201c{_shortened(text)}\u201d."
    if request.images:
        said += f" Pictures beside them: {len(request.images)}, which were not looked at."
    return (
        f"This is a simulated {engine} in the role of {model}: there are no weights behind it, and nothing "
        f"was understood. {said} What is real is the way that these words took to you, token by token, "
        "and the record that was kept of them; what is not is the GPU."
    )


def _thoughts(request: GenerationRequest) -> str:
    words = request.last_text.split() or ["nothing"]
    longest = max(words, key=len)
    return (
        f"Thinking is simulated, too. The question has {len(words)} words, the longest is "
        f"\u201c{_shortened(longest)}\u201d. A stand-in has no more to think about than that."
    )


def _shortened(text: str, limit: int = 160) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[: limit - 1] + "\u2026"


def _tool_to_call(request: GenerationRequest) -> ToolFunction | None:
    if not request.tools or request.tool_choice == "none":
        return None
    choice = request.tool_choice
    if isinstance(choice, dict):
        named = choice.get("function", {})
        wanted = named.get("name") if isinstance(named, dict) else None
        return next((tool.function for tool in request.tools if tool.function.name == wanted), None)
    if choice == "required":
        return request.tools[0].function
    if not request.messages or request.messages[-1].role != "user":
        return None
    if _CALL_THE_TOOL.search(request.last_text):
        return request.tools[0].function
    if _HARD.search(request.last_text):
        return next((tool.function for tool in request.tools if _takes_a_problem(tool.function)), None)
    return None


def _takes_a_problem(tool: ToolFunction) -> bool:
    required = tool.parameters.get("required")
    return isinstance(required, list) and "problem" in required


def _arguments_for(tool: ToolFunction, request: GenerationRequest) -> dict[str, object]:
    if _takes_a_problem(tool):
        return {"problem": request.last_text}
    properties = tool.parameters.get("properties", {})
    if not isinstance(properties, dict):
        return {}
    return {str(name): _example(schema) for name, schema in properties.items()}


def _example(schema: object) -> object:
    if not isinstance(schema, dict):
        return None
    choices = schema.get("enum")
    if isinstance(choices, list) and choices:
        return choices[0]
    examples: dict[object, object] = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
    return examples.get(schema.get("type"), "simulated")
