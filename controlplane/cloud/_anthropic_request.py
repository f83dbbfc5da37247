"""From OpenAI's chat request to Anthropic's Messages. Pure.

What has no counterpart is left out where that does no harm (seed, penalties, logprobs), and refused where
the answer would not be what was asked for (several choices, audio).
"""

from __future__ import annotations

import re
from typing import Any

import msgspec

from controlplane.cloud._estimate import answer_limit
from controlplane.cloud._values import CloudModel, Thinking
from rung.errors import InvalidRequestError, UnsuitableTargetError

_DATA_URL = re.compile(r"data:([\w.+-]+/[\w.+-]+)(?:;[\w=.+-]+)*;base64,(.*)", re.DOTALL)
#: Tokens to think with, by `reasoning_effort`; the least that the API takes is 1,024.
_THINKING_TOKENS = {"minimal": 1024, "low": 2048, "medium": 8192, "high": 16384}
_LEAST_THINKING_TOKENS = 1024
#: What has to be left of the answer's limit when the thinking is done.
_LEAST_ANSWER_TOKENS = 512
_EFFORTS = {"minimal": "low", "low": "low", "medium": "medium", "high": "high"}


def anthropic_body(fields: dict[str, Any], model: CloudModel, *, stream: bool) -> bytes:
    """The body for `/v1/messages`.

    Args:
        fields: of an OpenAI chat request, with at least one message.
        model: the target.
        stream: whether the answer comes in events.

    Raises:
        InvalidRequestError: the request contradicts itself or OpenAI's own rules.
        UnsuitableTargetError: it wants something that this dialect cannot say; another target may.
    """
    if (fields.get("n") or 1) != 1:
        raise UnsuitableTargetError(f"{model.id} gives one choice, and the request wants {fields['n']}")
    system, messages = _conversation(fields["messages"], model.id)
    wanted: dict[str, Any] = {
        "model": model.model,
        "max_tokens": answer_limit(fields, model),
        "messages": messages,
        "stream": stream,
    }
    system += _format_instructions(fields.get("response_format"))
    if system:
        wanted["system"] = "\n\n".join(system)
    wanted |= _tools(fields)
    wanted |= _sampling(fields)
    user = fields.get("user")
    if isinstance(user, str) and user:
        wanted["metadata"] = {"user_id": user}
    if thinking := _thinking(fields, model, wanted["max_tokens"]):
        wanted |= thinking
        # It takes no other than its own while it thinks.
        for name in ("temperature", "top_p", "top_k"):
            wanted.pop(name, None)
    return msgspec.json.encode(
        {name: value for name, value in wanted.items() if name not in model.drop_fields}
    )


# Messages ------------------------------------------------------------------------------------------


def _conversation(found: list[Any], what: str) -> tuple[list[str], list[dict[str, Any]]]:
    """The system's texts, and the turns: neighbours of one role become one, as the API wants them."""
    system: list[str] = []
    turns: list[dict[str, Any]] = []
    for place, message in enumerate(found):
        if not isinstance(message, dict):
            raise InvalidRequestError(f"messages[{place}] is not an object")
        role = message.get("role")
        if role in ("system", "developer"):
            if text := _text_of(message.get("content")):
                system.append(text)
            continue
        if role == "user":
            speaker, blocks = "user", _user_blocks(message.get("content"), place, what)
        elif role == "assistant":
            speaker, blocks = "assistant", _assistant_blocks(message, place)
        elif role == "tool":
            speaker, blocks = "user", [_tool_result(message, place, what)]
        else:
            raise InvalidRequestError(f"messages[{place}].role is {role!r}")
        if not blocks:
            continue
        if turns and turns[-1]["role"] == speaker:
            turns[-1]["content"] += blocks
        else:
            turns.append({"role": speaker, "content": blocks})
    if not turns:
        raise InvalidRequestError("messages has nothing to answer: all of it is empty, or the system's")
    _end_cleanly(turns)
    return system, turns


def _end_cleanly(turns: list[dict[str, Any]]) -> None:
    """An answer that is begun for the model must not end with a blank, or the API refuses it."""
    last = turns[-1]
    if last["role"] == "assistant" and last["content"][-1]["type"] == "text":
        last["content"][-1]["text"] = last["content"][-1]["text"].rstrip()
        if not last["content"][-1]["text"]:
            last["content"].pop()
            if not last["content"]:
                turns.pop()


def _user_blocks(content: Any, place: int, what: str) -> list[dict[str, Any]]:
    if content is None or isinstance(content, str):
        return [{"type": "text", "text": content}] if content else []
    if not isinstance(content, list):
        raise InvalidRequestError(f"messages[{place}].content is neither a text nor a list of parts")
    blocks = []
    for at, part in enumerate(content):
        where = f"messages[{place}].content[{at}]"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            if part.get("text"):
                blocks.append({"type": "text", "text": str(part["text"])})
        elif kind == "image_url":
            image = part.get("image_url")
            blocks.append(_image(image.get("url") if isinstance(image, dict) else image, where))
        elif kind == "file":
            blocks.append(_document(part.get("file"), where, what))
        elif kind == "input_audio":
            raise UnsuitableTargetError(f"{what} takes no audio")
        else:
            raise InvalidRequestError(f"{where}.type is {kind!r}")
    return blocks


def _image(url: Any, where: str) -> dict[str, Any]:
    if not isinstance(url, str):
        raise InvalidRequestError(f"{where}.image_url.url is missing")
    if match := _DATA_URL.fullmatch(url):
        source = {"type": "base64", "media_type": match[1], "data": match[2]}
    elif url.startswith(("https://", "http://")):
        source = {"type": "url", "url": url}
    else:
        raise InvalidRequestError(f"{where}.image_url.url is neither an http URL nor a base64 data URL")
    return {"type": "image", "source": source}


def _document(file: Any, where: str, what: str) -> dict[str, Any]:
    data = file.get("file_data") if isinstance(file, dict) else None
    if not isinstance(data, str):
        raise UnsuitableTargetError(f"{what} takes files by their contents only, and {where} has none")
    match = _DATA_URL.fullmatch(data)
    if match is None or match[1] != "application/pdf":
        raise UnsuitableTargetError(f"{what} takes files that are PDF, as a base64 data URL")
    block: dict[str, Any] = {
        "type": "document",
        "source": {"type": "base64", "media_type": match[1], "data": match[2]},
    }
    if file.get("filename"):
        block["title"] = str(file["filename"])
    return block


def _assistant_blocks(message: dict[str, Any], place: int) -> list[dict[str, Any]]:
    """What the model said before. Its thoughts are not among it: they cannot be given back unsigned."""
    text = _text_of(message.get("content"))
    blocks: list[dict[str, Any]] = [{"type": "text", "text": text}] if text else []
    for at, call in enumerate(message.get("tool_calls") or ()):
        where = f"messages[{place}].tool_calls[{at}]"
        function = call.get("function") if isinstance(call, dict) else None
        if not isinstance(function, dict) or not function.get("name"):
            raise InvalidRequestError(f"{where} has no function with a name")
        blocks.append(
            {
                "type": "tool_use",
                "id": str(call.get("id") or ""),
                "name": str(function["name"]),
                "input": _arguments(function.get("arguments"), where),
            }
        )
    return blocks


def _arguments(text: Any, where: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        return msgspec.json.decode(text, type=dict[str, Any])
    except (msgspec.DecodeError, TypeError):
        raise InvalidRequestError(f"{where}.function.arguments is not a JSON object") from None


def _tool_result(message: dict[str, Any], place: int, what: str) -> dict[str, Any]:
    identity = message.get("tool_call_id")
    if not identity:
        raise InvalidRequestError(f"messages[{place}].tool_call_id is missing")
    block: dict[str, Any] = {"type": "tool_result", "tool_use_id": str(identity)}
    content = message.get("content")
    if isinstance(content, str):
        if content:
            block["content"] = content
    elif blocks := _user_blocks(content, place, what):
        block["content"] = blocks
    return block


def _text_of(content: Any) -> str:
    """The text of a content, in whichever of its forms."""
    if isinstance(content, str):
        return content
    parts = content if isinstance(content, list) else ()
    return "".join(
        str(part.get("text") or part.get("refusal") or "") for part in parts if isinstance(part, dict)
    )


# Everything else -------------------------------------------------------------------------------------


def _tools(fields: dict[str, Any]) -> dict[str, Any]:
    tools = []
    for place, tool in enumerate(fields.get("tools") or ()):
        function = tool.get("function") if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not function.get("name"):
            raise InvalidRequestError(f"tools[{place}] has no function with a name")
        made = {
            "name": str(function["name"]),
            "input_schema": function.get("parameters") or {"type": "object", "properties": {}},
        }
        if function.get("description"):
            made["description"] = str(function["description"])
        tools.append(made)
    if not tools:
        return {}
    choice = _tool_choice(fields.get("tool_choice"))
    if fields.get("parallel_tool_calls") is False and choice.get("type") != "none":
        choice = {"type": "auto", **choice, "disable_parallel_tool_use": True}
    return {"tools": tools, "tool_choice": choice} if choice else {"tools": tools}


def _tool_choice(choice: Any) -> dict[str, Any]:
    """Empty where the request leaves it to the model."""
    if choice is None:
        return {}
    named = {"auto": "auto", "none": "none", "required": "any"}
    if isinstance(choice, str) and choice in named:
        return {"type": named[choice]}
    function = choice.get("function") if isinstance(choice, dict) else None
    if isinstance(function, dict) and function.get("name"):
        return {"type": "tool", "name": str(function["name"])}
    raise InvalidRequestError(f"tool_choice is {choice!r}")


def _sampling(fields: dict[str, Any]) -> dict[str, Any]:
    wanted: dict[str, Any] = {}
    temperature, top_p = fields.get("temperature"), fields.get("top_p")
    if isinstance(temperature, int | float):
        # OpenAI's goes to 2.
        wanted["temperature"] = min(temperature, 1.0)
    elif isinstance(top_p, int | float):
        # Newer models refuse both at once.
        wanted["top_p"] = top_p
    if isinstance(fields.get("top_k"), int) and fields["top_k"] > 0:
        wanted["top_k"] = fields["top_k"]
    stop = fields.get("stop")
    stops = [stop] if isinstance(stop, str) else stop if isinstance(stop, list) else []
    # A blank one is refused.
    if stops := [each for each in stops if isinstance(each, str) and each.strip()]:
        wanted["stop_sequences"] = stops
    return wanted


def _format_instructions(wanted: Any) -> list[str]:
    """There is no field for it: the model is told."""
    kind = wanted.get("type") if isinstance(wanted, dict) else None
    if kind == "json_object":
        return ["Answer with one JSON object and nothing else: no explanation and no code fence."]
    if kind == "json_schema":
        described = wanted.get("json_schema")
        schema = described.get("schema") if isinstance(described, dict) else None
        return [
            "Answer with one JSON value and nothing else: no explanation and no code fence. It must be valid "
            f"under this JSON schema:\n{msgspec.json.encode(schema or {}).decode()}"
        ]
    return []


def _thinking(fields: dict[str, Any], model: CloudModel, max_tokens: int) -> dict[str, Any]:
    """How to think, if the request asks for it and the model can be told."""
    effort = fields.get("reasoning_effort")
    if not isinstance(effort, str) or effort not in _THINKING_TOKENS or model.thinking is Thinking.OFF:
        return {}
    last = fields["messages"][-1]
    forced = fields.get("tool_choice") not in (None, "auto", "none")
    if forced or (isinstance(last, dict) and last.get("role") in ("tool", "assistant")):
        # A turn that thought before it called a tool has to be continued with its signed thoughts, which
        # OpenAI's shape does not carry; and who thinks cannot be made to call a tool.
        return {}
    if model.thinking is Thinking.ADAPTIVE:
        return {"thinking": {"type": "adaptive"}, "output_config": {"effort": _EFFORTS[effort]}}
    budget = min(_THINKING_TOKENS[effort], max_tokens - _LEAST_ANSWER_TOKENS)
    if budget < _LEAST_THINKING_TOKENS:
        return {}
    return {"thinking": {"type": "enabled", "budget_tokens": budget}}
