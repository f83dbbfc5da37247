"""How well and how fast the effort of a request is guessed.

The accuracy is on both labelled parts: the one that the classifier was tuned on, and the one that it was not.
The time is of requests of one size each, among them such as make careless regular expressions slow:

- prompts: the labelled ones as they are;
- log, article: an instruction and 100 KB of pasted material;
- code: an instruction and 100 KB of code in a fence;
- one-line: 100 KB without a line break;
- lines: 100 KB of line breaks;
- quotes, spaces, words: 100 KB of opening quotes, of blanks, of the lexicon's own words.

    python -m tests.benchmarks.classifying [--count N]
"""

from __future__ import annotations

import argparse
import gc
import time
from collections.abc import Sequence

from controlplane.ladder import ClassifiedRequest, classify
from tests.data.effort_prompts import development, held_out, measure, pasted, report, request_of

SIZE = 100_000


def cases() -> dict[str, list[ClassifiedRequest]]:
    """Family -> its requests."""

    def of(text: str) -> list[ClassifiedRequest]:
        return [ClassifiedRequest(text=text, messages=12, characters=len(text), tools=True)]

    ask = "Find the root cause of this and say how to prevent it, step by step."
    code = "    if lock.acquire(timeout=3):  # may deadlock\n"
    words = (
        "prove the race condition, derive a novel distributed theorem; why does my design crash sometimes? "
    )
    return {
        "prompts": [request_of(prompt) for prompt in (*development(), *held_out())],
        "log": of(f"{ask}\n\n{pasted('log', 1400)[:SIZE]}\n\n{ask}"),
        "article": of(f"{ask}\n\n{pasted('article', 1200)[:SIZE]}"),
        "code": of(f"{ask}\n```python\n{code * (SIZE // len(code))}```"),
        "one-line": of("abc def, " * (SIZE // 9)),
        "lines": of("\n" * SIZE),
        "quotes": of("„" * SIZE),
        "spaces": of(" " * SIZE + "x"),
        "words": of(words * (SIZE // len(words))),
    }


def main() -> None:
    """Print the tables."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--count", type=int, default=2000, help="requests of each family")
    chosen = options.parse_args()
    for name, part in (("development", development()), ("held out", held_out())):
        print(report(name, measure(part)), end="\n\n")
    print(f"classifying, {chosen.count} requests a family")
    print(f"{'family':<12} {'p50 µs':>8} {'p99 µs':>8} {'max µs':>8}")
    everything: list[float] = []
    for name, requests in cases().items():
        taken = times(requests, chosen.count)
        everything += taken
        row(name, taken)
    row("all", everything)


def times(requests: Sequence[ClassifiedRequest], count: int) -> list[float]:
    """µs of CPU of so many classifications, the requests taken in turn."""
    gc.collect()
    taken = []
    for place in range(count):
        request = requests[place % len(requests)]
        begun = time.thread_time()
        classify(request)
        taken.append((time.thread_time() - begun) * 1e6)
    return taken


def row(name: str, taken: list[float]) -> None:
    """One line of the table."""
    taken = sorted(taken)
    at_99 = taken[min(len(taken) - 1, len(taken) * 99 // 100)]
    print(f"{name:<12} {taken[len(taken) // 2]:8.0f} {at_99:8.0f} {taken[-1]:8.0f}")


if __name__ == "__main__":
    main()
