"""The effort of a request whose caller left it open: by rule, or by asking the orchestrator."""

from __future__ import annotations

import msgspec
import structlog
from msgspec import Struct
from msgspec.structs import replace

from controlplane.ladder import (
    AUTO_MODEL,
    MIN_EFFORT,
    Classification,
    ClassifiedRequest,
    classify,
    judge_request,
    read_judgement,
)
from controlplane.pipelines._asking import LadderAsk
from controlplane.pipelines._openai import offers_tools
from controlplane.pipelines._router import Judged, Router
from controlplane.pipelines._wish import Wish
from controlplane.workflows import image_effort
from rung.errors import RungError
from rung.types import ImageInput, JobKind

_log = structlog.get_logger("rung.pipelines")

#: A judge that has not answered by then is not waited for: the rule decides.
_JUDGE_TIMEOUT_S = 5.0
_SHOWN_FEATURES = 3
#: From this confidence on the rule is right about the side of `reason` as often as a judge would be: on the
#: held-out prompts, 45 times of 45 (tests/benchmarks/classifying.py). Then nobody waits for one.
_SURE = 0.9
#: Of a generation of which nothing says how much effort it is worth.
_USUAL_EFFORT = 5


class _Part(Struct):
    type: str = ""
    text: str = ""


class _Message(Struct):
    role: str = ""
    content: str | list[_Part] | None = None


class _Conversation(Struct):
    messages: list[_Message] = []
    tools: msgspec.Raw = msgspec.Raw()


_decoder = msgspec.json.Decoder(_Conversation)


def classified_request(body: bytes) -> ClassifiedRequest:
    """What the classifier looks at of a chat request; an empty one for what is none."""
    try:
        conversation = _decoder.decode(body)
    except msgspec.DecodeError:
        return ClassifiedRequest(text="")
    texts = [_text(message) for message in conversation.messages]
    last = next(
        (place for place in reversed(range(len(texts))) if conversation.messages[place].role == "user"), None
    )
    content = conversation.messages[last].content if last is not None else None
    return ClassifiedRequest(
        text=texts[last] if last is not None else "",
        messages=len(texts),
        characters=sum(map(len, texts)),
        tools=offers_tools(conversation.tools),
        images=isinstance(content, list) and any(part.type == "image_url" for part in content),
    )


def judge_by_rule(wish: Wish) -> Judged:
    """The effort by rule: of a conversation by the classifier, with the features that weighed most."""
    if isinstance(wish.input, ImageInput):
        return Judged(*image_effort(wish.input))
    if wish.input is not None:
        return Judged(_USUAL_EFFORT, "nothing says how much effort it is worth")
    return _judged(classify(classified_request(wish.body)))


def _judged(found: Classification) -> Judged:
    features = ", ".join(f"{each.name} {each.weight:+g}" for each in found.features[:_SHOWN_FEATURES])
    return Judged(found.effort, f"by rule, score {found.score:g}: {features}")


class Judge:
    """Asks the orchestrator, which is the target of the least effort, how hard a request is.

    Args:
        router: what a request leaves open.
        ask: asks the orchestrator.
    """

    def __init__(self, router: Router, ask: LadderAsk) -> None:
        self._router = router
        self._ask = ask

    async def prepare(self, wish: Wish) -> Wish:
        """The wish with an effort, if it leaves that open: by rule, or the orchestrator's if that is unsure.

        Where the request may go, its text goes to the judge, and nowhere else.
        """
        if wish.kind is not JobKind.CHAT or wish.effort is not None or not self._router.leaves_open(wish):
            return wish
        request = classified_request(wish.body)
        found = classify(request)
        ruled = _judged(found)
        # What the rule found is not to be found again on the way of the request.
        by_rule = replace(wish, effort=ruled.effort, effort_why=ruled.why)
        if found.confidence >= _SURE:
            return by_rule
        asked = replace(
            wish,
            model=AUTO_MODEL,
            effort=MIN_EFFORT,
            body=judge_request(request, model=AUTO_MODEL),
        )
        try:
            told = await self._ask.send(asked, timeout_s=_JUDGE_TIMEOUT_S)
        except RungError as error:
            _log.info("judge_failed", error=error.message)
            return by_rule
        effort = read_judgement(told.body)
        if effort is None:
            return by_rule
        return replace(wish, effort=effort, effort_why="the orchestrator judged it so")


def _text(message: _Message) -> str:
    if isinstance(message.content, str):
        return message.content
    return "\n".join(part.text for part in message.content or () if part.text)
