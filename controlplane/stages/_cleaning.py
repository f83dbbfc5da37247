"""What a model answered when it was asked for a better prompt, made into one, or found to be none. Pure."""

from __future__ import annotations

import re

from controlplane.stages._reading import fold, words_of

_THOUGHTS = re.compile(r"<think(?:ing)?>.*?</think(?:ing)?>", re.DOTALL | re.IGNORECASE)
_END_OF_THOUGHTS = re.compile(r"</think(?:ing)?>", re.IGNORECASE)
_START_OF_THOUGHTS = re.compile(r"<think(?:ing)?>", re.IGNORECASE)
_FENCE = re.compile(r"```\w*")
#: `Here is the enhanced prompt:`, `Sure! Enhanced prompt:`, `**Prompt:**`.
_LEAD = re.compile(
    r"(?:\W*(?:sure|certainly|of course|okay|ok|absolutely)\b[^\n:]{0,20}?[!,.]?\s*)?"
    r"(?:\W*here(?:'s| is| are)\b[^\n:]{0,80}:|\W*(?:the )?(?:enhanced|improved|rewritten|revised|final|"
    r"detailed)?\s*(?:image )?prompt\W{0,3}:)[\s*_]*",
    re.IGNORECASE,
)
_QUOTES = {'"': '"', "'": "'", "“": "”", "„": "“", "«": "»", "`": "`", "*": "*"}
_REFUSAL = re.compile(
    r"\W*(?:i(?:'m| am)(?: really| very| so)? (?:sorry|unable|not able)|sorry\b"
    r"|as an? (?:ai|assistant|language)|i (?:can't|cannot|can not|won't|will not|must decline|do not|don't)\b"
    r"|(?:unfortunately|apologies|my apologies)\b|this (?:request|prompt|content) )",
    re.IGNORECASE,
)
_QUOTED = re.compile(r"[\"“«]([^\"“”«»]{1,80})[\"”»]")
_FEWEST_LETTERS = 3
_STEM_LETTERS = 4
_LEAST_KEPT = 0.6
#: Words that say nothing of what is to be seen, by their stems.
_FILLERS = frozenset(
    [
        *(
            "and",
            "crea",
            "draw",
            "for",
            "from",
            "gene",
            "give",
            "have",
            "imag",
            "into",
            "make",
            "onto",
            "over",
        ),
        *(
            "pain",
            "phot",
            "pict",
            "plea",
            "show",
            "some",
            "that",
            "the",
            "this",
            "unde",
            "very",
            "want",
            "with",
        ),
        *("your", "woul", "like", "coul"),
    ]
)
#: From here on a sign is a word, or a part of one that says something by itself.
_FIRST_IDEOGRAPH = 0x2E80


def without_thoughts(answer: str) -> str:
    """What a model says after it has thought aloud; nothing if it never came to an end."""
    said = _THOUGHTS.sub(" ", answer)
    said = _END_OF_THOUGHTS.split(said)[-1]
    return _START_OF_THOUGHTS.split(said)[0].strip()


def clean_prompt(answer: str, original: str, *, most_characters: int) -> tuple[str, str]:
    """A prompt out of a model's answer, and why there is none; one of the two is empty.

    Nobody can prove that a model did what it was told. Refused are nothing at all, a refusal, a speech, and
    what has lost what was asked for: most of the words, or something in quotation marks.
    """
    said = _FENCE.sub(" ", without_thoughts(answer)).replace("\u2019", "'").strip()
    said = _LEAD.sub("", said, count=1) if _LEAD.match(said) else said
    said = " ".join(_unquoted(said.strip()).split())
    if not said:
        return "", "nothing came of it"
    if _REFUSAL.match(said) and not _REFUSAL.match(original):
        return "", "the model declined"
    if len(said) > most_characters:
        return "", "it became too long"
    if not _keeps(original, said):
        return "", "it lost what was asked for"
    return said, ""


def _unquoted(text: str) -> str:
    while len(text) > 1 and _QUOTES.get(text[0]) == text[-1] and text[0] not in text[1:-1]:
        text = text[1:-1].strip()
    return text


def _keeps(original: str, said: str) -> bool:
    """Whether most of what the original speaks of is still there."""
    if any(quoted.casefold() not in said.casefold() for quoted in _QUOTED.findall(original)):
        return False
    wanted = _stems(original)
    return len(wanted & _stems(said)) >= _LEAST_KEPT * len(wanted)


def _stems(text: str) -> frozenset[str]:
    words = words_of(fold(text))
    # Writing without spaces has a word in each sign.
    signs = {sign for word in words for sign in word if ord(sign) >= _FIRST_IDEOGRAPH}
    stems = {word[:_STEM_LETTERS] for word in words if len(word) >= _FEWEST_LETTERS and word.isalpha()}
    return frozenset(signs or stems - _FILLERS)
