"""What a message asks, told from what was pasted into it.

Pure and bounded. Of a message at most the first and the last 2,000 characters are read, of each of the two at
most 160 lines; of what is asked, at most 600 characters from its beginning and 600 from its end.
"""

from __future__ import annotations

import re

from msgspec import Struct

_WINDOW_CHARACTERS = 2000
_WINDOW_LINES = 160
_ASK_CHARACTERS = 600

# All are matched at the start of a line whose indentation is gone; none can backtrack over more than a line.
_CODE = re.compile(
    r"def \w+\(|class \w+[(:{]|import [\w.]+(?: as \w+)?;?$|from \S+ import|async def|func \w|fn \w+[(<]"
    r"|(?:const|let|var) \w+ ?[=:]|if ?\(|for ?\(|while ?\(|#include|@\w+|</?\w+|[-+]{3} |@@|diff --git"
    r"|[+-]\S|[{}\]]|[(\[]$|\"[^\"]{1,60}\": "
)
_LOG = re.compile(
    r"\d{4}-\d\d-\d\d|\d\d:\d\d:\d\d|\[[\d :.TZ-]+\]|\[?(?:INFO|WARN|WARNING|ERROR|DEBUG|TRACE|FATAL)\b"
    r"|Traceback |File \"|at \S+\(|\w{3} +\d+ \d\d:\d\d:\d\d|[EWIF]\d{4} |\d+\.\d+\.\d+\.\d+ "
)
# Each begins with a sign that is rare in prose, so that prose is skipped fast; a span ends at the next sign.
_QUOTED = re.compile(r"[\"“„«`][^\"“”„«»`]{25,}[\"”“»`]")
_SINGLE_QUOTED = re.compile(r"'(?<!\w')[^']{25,}'(?!\w)")


class Ask(Struct, frozen=True):
    """A message, taken apart: what is asked, and how many lines of code and logs were read beside it."""

    text: str
    code_lines: int
    log_lines: int


def take_apart(message: str) -> Ask:
    """Tell the prose of a message, which asks, from fenced code, code, logs and quotations."""
    if len(message) <= 2 * _WINDOW_CHARACTERS:
        windows = [message]
    else:
        windows = [message[:_WINDOW_CHARACTERS], message[-_WINDOW_CHARACTERS:]]
    prose: list[str] = []
    code_lines = log_lines = 0
    for place, window in enumerate(windows):
        # The tail begins within a line, which is left out, and, if its fences are odd, within a fence.
        fenced = place == 1 and window.count("```") % 2 == 1
        for line in _lines(window)[place:]:
            if "```" in line:
                fenced = not fenced and line.count("```") == 1
            elif fenced or _is_code(line):
                code_lines += 1
            elif _LOG.match(line):
                log_lines += 1
            elif line and line[0] not in ">|":
                prose.append(line)
            elif not line:
                prose.append("")
    return Ask(text=_shortened("\n".join(prose)), code_lines=code_lines, log_lines=log_lines)


def _lines(window: str) -> list[str]:
    lines = window.split("\n")
    if len(lines) > _WINDOW_LINES:
        lines = lines[: _WINDOW_LINES // 2] + lines[-_WINDOW_LINES // 2 :]
    return [line.strip() for line in lines] if len(lines) > 1 else ["", window.strip()]


def _is_code(line: str) -> bool:
    return _CODE.match(line) is not None or (
        line.endswith((";", "{")) and any(sign in line for sign in "=(){}")
    )


def _shortened(prose: str) -> str:
    """The prose without its quotations; if it is long, the beginnings and ends that are likely to ask."""
    ask = _SINGLE_QUOTED.sub(" ", _QUOTED.sub(" ", prose)).strip()
    if len(ask) <= 2 * _ASK_CHARACTERS:
        return ask
    first, broken, _ = ask[:_ASK_CHARACTERS].partition("\n\n")
    _, broken_last, last = ask[-_ASK_CHARACTERS:].rpartition("\n\n")
    # A paragraph that does not end where the window does is more likely material than a question.
    return f"{first}\n{last}" if broken_last or not broken else first
