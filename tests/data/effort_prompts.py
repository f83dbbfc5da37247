"""The labelled prompts of effort: read from their files, with the made-up material pasted in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from msgspec import Struct

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
    """The part that was labelled first, and on which nothing was tuned."""
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
