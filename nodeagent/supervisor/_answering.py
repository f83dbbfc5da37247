"""Whether an engine that says that it is awake really answers: one token of it."""

from __future__ import annotations

import asyncio

import msgspec

from nodeagent.engines import EngineAdapter, EngineHealth, RunKind
from rung.errors import EngineFailedError, RungError
from rung.types import DeploymentSpec

#: What has only these has no tokens. One generation of it is no small question.
_TOKENLESS = frozenset({"image", "video", "speech", "transcription", "mesh", "prediction"})
#: The first request after a wake is slower than others: caches are cold, kernels are chosen anew.
ANSWER_TIMEOUT_S = 30.0
_SHOWN_CHARACTERS = 300


async def require_answer(adapter: EngineAdapter, base_url: str, spec: DeploymentSpec) -> None:
    """Ask the engine for one token; one that has none, how it is.

    It tells an engine that hangs or fails from one that works. Whether what it says makes sense is more than
    a token can tell. A refusal of the question (4xx) comes from its server and says nothing of the engine.

    Raises:
        EngineFailedError: it does not answer in time, not at all, or with a failure.
    """
    if spec.capabilities and _TOKENLESS.issuperset(spec.capabilities):
        probe = await adapter.probe(base_url, spec)
        if probe.health is not EngineHealth.READY:
            raise EngineFailedError(
                f"{spec.id} says that it is awake, but asked how it is: {probe.detail or probe.health}"
            )
        return
    kind, question = _question(spec)
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            async with adapter.run(
                base_url, spec, kind, msgspec.json.encode(question), idle_timeout_s=ANSWER_TIMEOUT_S
            ) as answer:
                said = b"".join([piece async for piece in answer.chunks()])
                status = answer.status
    except TimeoutError:
        why = f"it gave no answer within {ANSWER_TIMEOUT_S:g} s"
    except RungError as error:
        why = error.message
    else:
        if status < 500:
            return
        why = f"it answers {status}: {said.decode(errors='replace')[:_SHOWN_CHARACTERS]}"
    raise EngineFailedError(f"{spec.id} says that it is awake, but asked for one token {why}")


def _question(spec: DeploymentSpec) -> tuple[RunKind, dict[str, object]]:
    name = spec.engine_model_name
    if "embedding" in spec.capabilities and "chat" not in spec.capabilities:
        return RunKind.EMBEDDINGS, {"model": name, "input": "."}
    # Completions need no chat template, which a model may be without.
    return RunKind.COMPLETIONS, {"model": name, "prompt": ".", "max_tokens": 1, "stream": False}
