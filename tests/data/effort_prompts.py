"""The labelled prompts of effort, with made-up material pasted in, and how the classifier does on them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

from controlplane.ladder import ClassifiedRequest, classify

HERE = Path(__file__).parent

_LOG = (
    "2026-11-20T03:{minute:02}:14Z INFO  worker-{n} request done status=200 duration_ms={n}",
    "2026-11-20T03:{minute:02}:15Z ERROR worker-{n} deadlock detected, transaction aborted, retry {n}",
    "2026-11-20T03:{minute:02}:15Z WARN  kernel: NVRM: Xid (PCI:0000:01:00): 79, GPU has fallen off the bus",
    "2026-11-20T03:{minute:02}:16Z DEBUG lock graph: process {n} waits for ShareLock on transaction {n}",
)
_ARTICLE = (
    "The council met on Tuesday to discuss the analysis of traffic that it had ordered in spring.",
    "According to the architect, the design of the bridge has to be proven again before work can begin.",
    "Residents asked why the strategy had changed, and whether the risks were known to the mayor.",
    "A novel method of research, developed at the university, is to be applied from January {n}.",
)


class LabelledPrompt(Struct, frozen=True, kw_only=True):
    """A request and the effort that it deserves."""

    effort: int
    text: str
    tools: bool = False
    images: bool = False
    messages: int = 1


def development() -> list[LabelledPrompt]:
    """The part on which the classifier was tuned."""
    return _read(HERE / "effort_prompts.yaml")


def held_out() -> list[LabelledPrompt]:
    """The part that was written after the classifier was fixed, and on which nothing was tuned."""
    return _read(HERE / "effort_prompts_held_out.yaml")


def pasted(kind: str, lines: int) -> str:
    """Made-up material: `log` or `article`."""
    pattern = {"log": _LOG, "article": _ARTICLE}[kind]
    return "\n".join(pattern[n % len(pattern)].format(n=n, minute=n % 60) for n in range(lines))


def _read(path: Path) -> list[LabelledPrompt]:
    by_effort: dict[int, list[str | dict[str, Any]]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [_prompt(effort, entry) for effort, entries in by_effort.items() for entry in entries]


def _prompt(effort: int, entry: str | dict[str, Any]) -> LabelledPrompt:
    fields = {"text": entry} if isinstance(entry, str) else dict(entry)
    kind, _, lines = fields.pop("paste", "").partition(" ")
    parts = [fields.pop("text"), pasted(kind, int(lines)) if kind else "", fields.pop("after", "")]
    return LabelledPrompt(effort=effort, text="\n\n".join(part for part in parts if part), **fields)


class Accuracy(Struct, frozen=True, kw_only=True):
    """How the classifier did on a part.

    Attributes:
        exact: share with the right effort.
        within_one: share at most one off.
        boundary: share on the right side of 6 against 7.
        missed: from 7 on, taken for 6 or less: of them, `reason` would be withheld.
        over: up to 6, taken for 7 or more: to them, `reason` would be offered for nothing.
        confusion: counts by labelled effort and by the classifier's, both from 1.
    """

    count: int
    exact: float
    within_one: float
    boundary: float
    missed: int
    over: int
    confusion: tuple[tuple[int, ...], ...]


def request_of(prompt: LabelledPrompt) -> ClassifiedRequest:
    """The prompt as the classifier sees it."""
    return ClassifiedRequest(
        text=prompt.text,
        messages=prompt.messages,
        characters=len(prompt.text),
        tools=prompt.tools,
        images=prompt.images,
    )


def measure(prompts: list[LabelledPrompt]) -> Accuracy:
    """Classify all of them and count."""
    pairs = [(prompt.effort, classify(request_of(prompt)).effort) for prompt in prompts]
    counts = Counter(pairs)
    count = len(pairs)
    missed = sum(label > 6 >= got for label, got in pairs)
    over = sum(got > 6 >= label for label, got in pairs)
    return Accuracy(
        count=count,
        exact=sum(label == got for label, got in pairs) / count,
        within_one=sum(abs(label - got) <= 1 for label, got in pairs) / count,
        boundary=1 - (missed + over) / count,
        missed=missed,
        over=over,
        confusion=tuple(tuple(counts[label, got] for got in range(1, 11)) for label in range(1, 11)),
    )


def report(name: str, accuracy: Accuracy) -> str:
    """The figures, and the confusion matrix, for a person."""
    lines = [
        f"{name}: {accuracy.count} prompts, exact {accuracy.exact:.1%}, "
        f"within one {accuracy.within_one:.1%}, right side of 6|7 {accuracy.boundary:.1%} "
        f"({accuracy.missed} missed, {accuracy.over} over)",
        "label \\ got " + "".join(f"{got:4}" for got in range(1, 11)),
    ]
    for label, row in enumerate(accuracy.confusion, 1):
        lines.append(f"{label:11} " + "".join(f"{number or '.':>4}" for number in row))
    return "\n".join(lines)
