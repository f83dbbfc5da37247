"""How many tokens a call may have, before anybody has counted them. Pure."""

from __future__ import annotations

from typing import Any

from controlplane.cloud._values import CloudModel, CloudUsage

#: An image is billed by its pixels and not by its bytes; few are more than this.
_TOKENS_OF_IMAGE = 5000
#: What providers put around tools, unseen.
_TOKENS_OF_TOOLS = 1000
#: Bytes of a token, as text goes; code has fewer, prose more.
_BYTES_PER_TOKEN = 3


def most_tokens(fields: dict[str, Any], body_bytes: int, model: CloudModel) -> CloudUsage:
    """The most that a request can cost: a token has at least one byte, and the answer has its limit.

    Images are guessed at.
    """
    image_bytes, images = _images(fields.get("messages"))
    prompt = body_bytes - image_bytes + images * _TOKENS_OF_IMAGE
    if fields.get("tools"):
        prompt += _TOKENS_OF_TOOLS
    choices = fields.get("n")
    choices = choices if isinstance(choices, int) and choices > 0 else 1
    return CloudUsage(prompt, answer_limit(fields, model) * choices)


def answer_limit(fields: dict[str, Any], model: CloudModel) -> int:
    """Most tokens of an answer: what the request says, or the model's own limit if that is less."""
    for name in ("max_completion_tokens", "max_tokens"):
        limit = fields.get(name)
        if isinstance(limit, int) and not isinstance(limit, bool) and limit > 0:
            return min(limit, model.max_output_tokens)
    return model.max_output_tokens


def likely_usage(most: CloudUsage, known: CloudUsage | None, delivered_bytes: int) -> CloudUsage:
    """What an answer that was cut has probably cost.

    Args:
        most: as it was reserved.
        known: what the provider has said of it so far.
        delivered_bytes: text that came, thoughts and calls of tools with it.
    """
    prompt = -(-most.prompt_tokens // _BYTES_PER_TOKEN)
    completion = -(-delivered_bytes // _BYTES_PER_TOKEN)
    cached = 0
    if known is not None:
        prompt, cached = known.prompt_tokens or prompt, known.cached_tokens
        completion = max(completion, known.completion_tokens)
    return CloudUsage(prompt, min(completion, most.completion_tokens), cached)


def _images(messages: Any) -> tuple[int, int]:
    """Bytes of the images in a request, and how many there are."""
    total, count = 0, 0
    for message in messages if isinstance(messages, list) else ():
        parts = message.get("content") if isinstance(message, dict) else None
        for part in parts if isinstance(parts, list) else ():
            image = part.get("image_url") if isinstance(part, dict) else None
            if image is None:
                continue
            url = image.get("url") if isinstance(image, dict) else image
            count += 1
            if isinstance(url, str) and url.startswith("data:"):
                total += len(url.encode())
    return total, count
