"""How much effort a chat request deserves, when its caller left that open: a local heuristic.

Pure, bounded (see `_ask` for how much of a message is read), and it never raises. The score is the sum of the
weights of the features that are present; rounded, and kept within 1 and 10, it is the effort. Words count
only in what is asked, not in what is pasted; the terms that show a feature are in `_lexicon`.

| feature | weight | present when |
| --- | --- | --- |
| a pleasantry | 1 | it is nothing but a greeting, thanks or a nod; then nothing else counts |
| a request | 4 | always otherwise |
| needs thought | 2 | there are kinds of hard work (below): times 1 for one, 1.4 for two, 1.5 for more |
| tells a situation | 2.5 | above 14 words that order no ordinary work; less where hard work was found |
| goes beyond what is known | 1.75 | new theories, open problems; times 1.5 if two terms show it, 2 if more |
| proves | 0.75 | a proof is wanted, or a statement refuted |
| uses higher mathematics | 0.5 | theorems, integrals, estimators, groups; graded likewise |
| is of system size | 0.5 | whole systems, years, failure modes; graded likewise |
| is a deep subject | 0.25 | concurrency, memory, security, consistency, law; graded likewise |
| has images | 0.75 | there is a picture to look at |
| asks for something made | 0.5 | write, create, build |
| asks for a worked exercise | 0.5 | solve, calculate |
| has several parts | 0.5 | a plan, a table, tests, a budget; graded likewise |
| has formulas | 0.5 | mathematical notation; times 2 for six and more |
| has code pasted | 0.5 | three lines or more of code |
| tools are offered | 0.5 | the caller offers tools |
| asks for a longer text | 0.25 | an essay, a story, a report |
| asks for a picture | 0.25 | draw, an image of |
| is about code | 0.25 | languages, formats, functions, scripts |
| is long | 0.25 | more than 20 words ask; times 2 above 35 |
| names several things | 0.25 | three clauses or more; times 2 for six and more |
| has a log pasted | 0.25 | three lines or more of a log or a stack trace |
| has much to read | 0.25 | the conversation has more than 20,000 characters |
| continues a conversation | 0.75 | up to four words, after at least three messages |
| asks what something is | -0.25 | a definition in up to 14 words; what it is about then does not count |
| changes a given text | -0.25 | translate, summarise, correct; the given text does not count |
| asks for an everyday text | -0.25 | a mail, a recipe, a verse, a short comparison |
| is short | -0.75 | up to four words, no hard work; times 0.7 up to eight |
| wants little | -0.75 | short, brief, in one sentence |
| is a sum | -1 | digits and signs |
| is known how to do | -1 | no hard work: times what is above 6.25, so that it stays below 7 |
| asks for a fact | -1.5 | who, when, how many, in up to 14 words, without hard work |

The kinds of hard work are: goes beyond what is known, proves, uses higher mathematics, is of system size, is
a deep subject, looks for a cause, tells a symptom, restructures, weighs options, analyses, designs. A single
term of mathematics, system size, a deep subject, a symptom or a design is a hint and counts as half a kind: a
deep word alone does not make a deep request.

It reads words and shapes. It cannot see how hard a question is whose words are plain, or what a short answer
continues; a language that the lexicon lacks is judged by its shape. Its confidence is low for those.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterable, Sequence

from msgspec import Struct

from controlplane.ladder._ask import Ask, take_apart
from controlplane.ladder._ladder import MAX_EFFORT, MIN_EFFORT, REASON_EFFORT
from controlplane.ladder._lexicon import FILLERS, PLEASANTRIES, TERMS

WEIGHTS: dict[str, float] = {
    "a pleasantry": 1.0,
    "a request": 4.0,
    "needs thought": 2.0,
    "goes beyond what is known": 1.75,
    "proves": 0.75,
    "uses higher mathematics": 0.5,
    "is of system size": 0.5,
    "is a deep subject": 0.25,
    "has images": 0.75,
    "tells a situation": 2.5,
    "asks for something made": 0.5,
    "asks for a worked exercise": 0.5,
    "has several parts": 0.5,
    "has formulas": 0.5,
    "tools are offered": 0.5,
    "asks for a longer text": 0.25,
    "is about code": 0.25,
    "is long": 0.25,
    "names several things": 0.25,
    "has code pasted": 0.5,
    "has a log pasted": 0.25,
    "has much to read": 0.25,
    "continues a conversation": 0.75,
    "asks what something is": -0.25,
    "is short": -0.75,
    "wants little": -0.75,
    "changes a given text": -0.25,
    "asks for an everyday text": -0.25,
    "asks for a picture": 0.25,
    "is a sum": -1.0,
    "is known how to do": -1.0,
    "asks for a fact": -1.5,
}

#: The kinds of hard work.
_HARD = (
    "goes beyond what is known",
    "proves",
    "uses higher mathematics",
    "is of system size",
    "is a deep subject",
    "looks for a cause",
    "tells a symptom",
    "restructures",
    "weighs options",
    "analyses",
    "designs",
)
#: Kinds that a single term only hints at: a deep word alone does not make a deep request.
_HINTS = frozenset(
    {"uses higher mathematics", "is of system size", "is a deep subject", "tells a symptom", "designs"}
)
#: What a question for a definition may be about without being a task.
_SUBJECTS = frozenset(_HARD) - {"looks for a cause", "proves"} | {"is about code", "has several parts"}
_GRADED = frozenset(
    {
        "goes beyond what is known",
        "uses higher mathematics",
        "is of system size",
        "is a deep subject",
        "has several parts",
    }
)
#: Ordinary work: what asks for it does not tell a situation.
_ORDINARY = frozenset(
    {
        "changes a given text",
        "asks for an everyday text",
        "asks for something made",
        "asks for a longer text",
        "asks for a picture",
        "asks for a worked exercise",
        "has several parts",
        "asks for a fact",
        "wants little",
    }
)
#: Features that no word shows.
_SHAPES = frozenset(
    {
        "a request",
        "tells a situation",
        "is long",
        "names several things",
        "has code pasted",
        "has a log pasted",
        "has much to read",
        "tools are offered",
        "has images",
    }
)
#: Features whose terms count only among the first words.
_OPENINGS = frozenset({"asks for a fact", "changes a given text"})

_OPENING_WORDS = 7
_INSTRUCTION_CHARACTERS = 150
_SHORT_WORDS = 14
_FEW_WORDS = 4
_BRIEF_WORDS = 8
_MANY_WORDS = 20
_MOST_WORDS = 400
_MUCH_CHARACTERS = 20_000
_BOUNDARY = REASON_EFFORT - 0.5
_MOST_WITHOUT_THOUGHT = REASON_EFFORT - 0.75
#: The confidence where no word says anything, and only the shape was judged.
_SHAPE_CONFIDENCE = 0.6

_WORD = re.compile(r"[^\W_]+")
_MARKS = re.compile("[\u0300-\u036f]")
_SIGNS = "∑∏∫√≤≥≠∀∃∈⊂→\u211d\u2124"
# Begins with signs that are rare in prose, so that prose is skipped fast.
_FORMULA = re.compile(
    rf"[\\^_({_SIGNS}](?:(?<=\\)[a-zA-Z]{{2,}}|(?<=\w\^)[\w{{(-]|(?<=\w_)\{{"
    rf"|(?<=\b[a-zA-Z]\()[a-z](?:, ?[a-z])*\)|(?<=[{_SIGNS}]))"
)
_SUM = re.compile(r"[\d .,%°+\-*/\u00d7÷^x=?]{3,60}$")
_ITEM = re.compile(r"\n(?:[-*•]|\d{1,2}[.)])\s")
_AND = frozenset({"and", "und", "et", "y", "e", "en"})

#: Feature -> how much of it there is, and what shows it.
_Present = dict[str, tuple[float, str]]


class ClassifiedRequest(Struct, frozen=True, kw_only=True):
    """What of a chat request is cheap to have.

    Attributes:
        text: of the last user message.
        messages: how many the conversation has.
        characters: of all messages together.
        tools: whether the caller offers tools.
        images: whether the last user message has any.
    """

    text: str
    messages: int = 1
    characters: int = 0
    tools: bool = False
    images: bool = False


class Feature(Struct, frozen=True):
    """Something that decided: its name, what it added to the score, and what of the request shows it."""

    name: str
    weight: float
    evidence: str = ""


class Classification(Struct, frozen=True, kw_only=True):
    """An effort, 1 to 10, and why.

    Attributes:
        features: heaviest first; their weights add up to the score.
        score: before it was rounded and kept within 1 and 10.
        confidence: that the request is on its side of the boundary between 6 and 7; 0.6 and less is a guess.
    """

    effort: int
    score: float
    features: tuple[Feature, ...]
    confidence: float


def classify(request: ClassifiedRequest) -> Classification:
    """The effort of a request, and why. Never raises."""
    features = tuple(
        sorted(
            (
                Feature(name, round(WEIGHTS[name] * amount, 3), evidence)
                for name, (amount, evidence) in _present(request).items()
            ),
            key=lambda feature: (-abs(feature.weight), feature.name),
        )
    )
    score = round(sum(feature.weight for feature in features), 3)
    return Classification(
        effort=min(MAX_EFFORT, max(MIN_EFFORT, math.floor(score + 0.5))),
        score=score,
        features=features,
        confidence=_confidence(score, features),
    )


def _confidence(score: float, features: Sequence[Feature]) -> float:
    """About how often a score so far from the boundary was right while half of the lexicon was hidden."""
    confidence = round(1 / (1 + math.exp(-0.6 - 0.8 * abs(score - _BOUNDARY))), 2)
    if all(feature.name in _SHAPES for feature in features):
        return min(confidence, _SHAPE_CONFIDENCE)
    return confidence


def _present(request: ClassifiedRequest) -> _Present:
    ask = take_apart(request.text)
    words = _words(_instruction(ask.text))
    pasted = ask.code_lines > 0 or ask.log_lines > 0
    if not request.images and not pasted and _is_pleasantry(words):
        return {"a pleasantry": (1.0, " ".join(words)[:60])}
    count = len(words)
    said = _said(words)
    present: _Present = {"a request": (1.0, ""), **said, **_shape(request, ask, words)}
    plain = not (_ORDINARY & said.keys() or request.tools or request.images)
    thought = said.get("needs thought", (0.0, ""))[0]
    if count > _SHORT_WORDS and plain and thought <= 1:
        # Where nothing else tells, a long account that orders no ordinary work mostly is a problem.
        amount = (1.0 if count > _MANY_WORDS else 0.8) if not thought else 0.4 if thought < 1 else 0.2
        present["tells a situation"] = (amount, f"{count} words that order no ordinary work")
    if not thought and count <= _BRIEF_WORDS and not pasted:
        present["is short"] = (1.0 if count <= _FEW_WORDS else 0.7, f"{count} words")
        if count <= _FEW_WORDS and request.messages > 3:
            present["continues a conversation"] = (1.0, f"{request.messages} messages")
    if not thought and "tells a situation" not in present:
        excess = sum(WEIGHTS[name] * amount for name, (amount, _) in present.items()) - _MOST_WITHOUT_THOUGHT
        if excess > 0:
            present["is known how to do"] = (excess, "nothing in it needs thought")
    return present


def _said(words: list[str]) -> _Present:
    """The features that are words."""
    found = _INDEX.find(words)
    opening = f" {' '.join(words[:_OPENING_WORDS])} "
    for name in _OPENINGS & found.keys():
        if not any(f" {term}" in opening for term in found[name]):
            del found[name]
    if "asks what something is" in found:
        if len(words) > _SHORT_WORDS or "looks for a cause" in found or "proves" in found:
            del found["asks what something is"]
        else:
            for name in _SUBJECTS & found.keys():
                del found[name]
    hard = [name for name in _HARD if name in found]
    if hard or len(words) > _SHORT_WORDS:
        found.pop("asks for a fact", None)
    present: _Present = {}
    if hard:
        evidence = "; ".join(f"{name}: {', '.join(found[name][:3])}" for name in hard)
        kinds = sum(0.5 if name in _HINTS and len(found[name]) == 1 else 1.0 for name in hard)
        present["needs thought"] = (_thought(kinds), evidence)
    for name in (WEIGHTS.keys() | _ORDINARY) & found.keys():
        amount = (1.0, 1.5, 2.0)[min(3, len(found[name])) - 1] if name in _GRADED else 1.0
        present[name] = (amount, ", ".join(found[name][:4]))
    return present


def _thought(kinds: float) -> float:
    """How much of "needs thought" so many kinds of hard work are; a hint is half a kind."""
    return (0.6, 1.0, 1.2, 1.4)[int(kinds * 2) - 1] if kinds <= 2 else 1.5


def _shape(request: ClassifiedRequest, ask: Ask, words: list[str]) -> _Present:
    """The features that are not words."""
    shape: _Present = {}
    if _SUM.match(ask.text):
        shape["is a sum"] = (1.0, ask.text[:40])
    if len(words) > _MANY_WORDS:
        shape["is long"] = (1.0 if len(words) <= 35 else 2.0, f"{len(words)} words")
    joints = ask.text.count(",") + ask.text.count(";") + len(_ITEM.findall(ask.text))
    if (clauses := joints + sum(word in _AND for word in words)) >= 3:
        shape["names several things"] = (1.0 if clauses < 6 else 2.0, f"{clauses} clauses")
    if formulas := _FORMULA.findall(ask.text):
        shape["has formulas"] = (1.0 if len(formulas) < 6 else 2.0, ", ".join(formulas[:3]))
    if ask.code_lines >= 3:
        shape["has code pasted"] = (1.0, f"{ask.code_lines} lines of what was read")
    if ask.log_lines >= 3:
        shape["has a log pasted"] = (1.0, f"{ask.log_lines} lines of what was read")
    if request.characters > _MUCH_CHARACTERS:
        shape["has much to read"] = (1.0, f"{request.characters} characters")
    if request.tools:
        shape["tools are offered"] = (1.0, "")
    if request.images:
        shape["has images"] = (1.0, "")
    return shape


def _is_pleasantry(words: list[str]) -> bool:
    if len(words) > 10:
        return False
    if not words or " ".join(words) in _PLEASANTRIES:
        return True
    known = all(word in _PLEASANTRIES or word in _FILLERS for word in words)
    return known and any(word in _PLEASANTRIES for word in words)


def _instruction(ask: str) -> str:
    """What is asked, without the text that it asks to change, which stands before or behind it."""
    lines = [line for line in ask.split("\n") if line]
    for line in {**dict.fromkeys(lines[:1]), **dict.fromkeys(lines[-1:])}:
        instruction, colon, _ = line.partition(":")
        if (colon or len(lines) > 1) and "changes a given text" in _INDEX.find(
            _words(instruction[:_INSTRUCTION_CHARACTERS])[:12]
        ):
            return instruction
    return ask


def _words(text: str) -> list[str]:
    """Lower case and without accents, as the lexicon is written."""
    text = text.casefold()
    if not text.isascii():
        text = _MARKS.sub("", unicodedata.normalize("NFD", text))
    return _WORD.findall(text)[:_MOST_WORDS]


def _terms(text: str) -> Iterable[str]:
    return (" ".join(term.split()) for term in text.split(","))


class _Index:
    """The lexicon, looked up word by word: its cost grows with the request and not with the lexicon."""

    def __init__(self, terms: dict[str, str]) -> None:
        self._words: dict[str, list[str]] = {}
        self._stems: dict[str, list[tuple[str, str]]] = {}
        self._phrases: dict[str, list[tuple[str, str, str]]] = {}
        for feature, listed in terms.items():
            for term in _terms(listed):
                first, _, rest = term.partition(" ")
                if rest:
                    sought = f" {term[:-1]}" if term.endswith("*") else f" {term} "
                    self._phrases.setdefault(first, []).append((sought, term.rstrip("*"), feature))
                elif term.endswith("*"):
                    self._stems.setdefault(term[:3], []).append((term[:-1], feature))
                else:
                    self._words.setdefault(term, []).append(feature)

    def find(self, words: list[str]) -> dict[str, list[str]]:
        """Feature -> the terms that show it, in the order of the text, each once."""
        text = f" {' '.join(words)} "
        found: dict[str, list[str]] = {}
        for word in dict.fromkeys(words):
            for feature in self._words.get(word, ()):
                found.setdefault(feature, []).append(word)
            for stem, feature in self._stems.get(word[:3], ()):
                if word.startswith(stem):
                    found.setdefault(feature, []).append(word)
            for sought, term, feature in self._phrases.get(word, ()):
                if sought in text:
                    found.setdefault(feature, []).append(term)
        return found


_INDEX = _Index(TERMS)
_PLEASANTRIES = frozenset(_terms(PLEASANTRIES))
_FILLERS = frozenset(_terms(FILLERS))
