"""Rules as an operator writes them, made into something that is matched in linear or bounded time. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable
from re import _constants as codes  # type: ignore[attr-defined]  # the parser's own names
from re import _parser as parser  # type: ignore[attr-defined]  # the only one that reads as `re` does
from typing import Any

from msgspec import Struct

from controlplane.stages._reading import BEGINNING_LETTERS, Reading, fold, words_of

#: A regex that can match in more ways than that at one place, or more characters, could take seconds.
MOST_WAYS = 1000
MOST_REGEX_CHARACTERS = 200


class RuleError(ValueError):
    """A rule cannot be used; the message says which and why."""


class Terms(Struct, frozen=True):
    """Words and phrases.

    Attributes:
        pattern: finds them in each of the `words` of a `Reading`.
        first_words: with what they begin; a text that has none of these has none of them.
        beginnings: the same of words with any ending.
    """

    pattern: re.Pattern[str]
    first_words: frozenset[str]
    beginnings: frozenset[str]

    def may_be_in(self, reading: Reading) -> bool:
        """Whether it is worth to look for them, which takes longer than this."""
        return not (
            self.first_words.isdisjoint(reading.vocabulary) and self.beginnings.isdisjoint(reading.beginnings)
        )

    def are_in(self, reading: Reading) -> bool:
        """Whether a text has one of them."""
        return self.may_be_in(reading) and any(map(self.pattern.search, reading.words))


class Matcher(Struct, frozen=True):
    """Words, phrases and regexes of one category."""

    terms: Terms
    regexes: tuple[re.Pattern[str], ...] = ()

    def matches(self, reading: Reading) -> bool:
        """Whether a text has one of them."""
        return self.terms.are_in(reading) or any(
            regex.search(each) for regex in self.regexes for each in reading.plain
        )


def compile_matcher(words: Iterable[str], regexes: Iterable[str] = ()) -> Matcher:
    """What matches any of these. Raises RuleError naming the one that cannot be used."""
    return Matcher(terms=compile_terms(words), regexes=tuple(map(compile_regex, regexes)))


def compile_terms(terms: Iterable[str]) -> Terms:
    """What finds words and phrases.

    A `*` after three letters or more stands for any ending of that word.

    Raises:
        RuleError: a term has no word, or a `*` in another place.
    """
    each_words = sorted({tuple(_words(term)) for term in terms})
    patterns = [" ".join(re.escape(word).replace(r"\*", "[^ ]*+") for word in words) for words in each_words]
    firsts = [words[0] for words in each_words]
    return Terms(
        # A term begins and ends where a word does, so that each word is looked at once by each term.
        pattern=re.compile(f"(?<= )(?:{'|'.join(patterns)})(?= )" if patterns else r"(?!)"),
        first_words=frozenset(first for first in firsts if not first.endswith("*")),
        beginnings=frozenset(first[:BEGINNING_LETTERS] for first in firsts if first.endswith("*")),
    )


def _words(term: str) -> list[str]:
    """The words of a term, with the stars that stand at their ends."""
    found: list[str] = []
    for part in fold(term).split():
        stem, star, rest = part.partition("*")
        words = words_of(stem)
        if rest or (star and (not words or len(words[-1]) < BEGINNING_LETTERS)):
            raise RuleError(
                f"{term!r}: a * stands at the end of a word, after at least {BEGINNING_LETTERS} letters"
            )
        found += words
        if star:
            found[-1] += star
    if not found:
        raise RuleError(f"{term!r} has no word in it")
    return found


def compile_regex(regex: str) -> re.Pattern[str]:
    """A regex for the `plain` of a `Reading`, which is in lower case and has no accents.

    Raises:
        RuleError: it is none, is too long, or could take too long to match.
    """
    if len(regex) > MOST_REGEX_CHARACTERS:
        raise RuleError(f"{regex[:40]!r}… is longer than {MOST_REGEX_CHARACTERS} characters")
    try:
        compiled = re.compile(regex, re.IGNORECASE)
        parsed = parser.parse(regex, re.IGNORECASE)
    except (re.error, RecursionError, OverflowError) as error:
        raise RuleError(f"{regex!r} is no regex: {error}") from None
    if parsed.getwidth()[1] > MOST_WAYS or _ways(parsed) > MOST_WAYS:
        raise RuleError(
            f"{regex!r} can match in more than {MOST_WAYS} ways at one place, which could take seconds; give "
            "its repeats a bound, such as {0,40} instead of *, and put none inside another"
        )
    return compiled


_ONE_WAY = frozenset({codes.LITERAL, codes.NOT_LITERAL, codes.ANY, codes.IN, codes.AT, codes.CATEGORY})


def _ways(pattern: Iterable[tuple[Any, Any]]) -> int:
    """In how many ways a backtracking matcher may try a pattern at one place; capped above `MOST_WAYS`.

    Raises:
        RuleError: it has something that nobody has bounded, such as a reference back or a look ahead.
    """
    ways = 1
    for code, argument in pattern:
        ways = min(ways * _ways_of(code, argument), MOST_WAYS + 1)
    return ways


def _ways_of(code: Any, argument: Any) -> int:
    if code in _ONE_WAY:
        return 1
    if code is codes.SUBPATTERN:
        return _ways(argument[-1])
    if code is codes.BRANCH:
        return sum(map(_ways, argument[1]))
    if code in (codes.MAX_REPEAT, codes.MIN_REPEAT, codes.POSSESSIVE_REPEAT):
        least, most, body = argument
        if most == codes.MAXREPEAT or most > MOST_WAYS:
            return MOST_WAYS + 1
        once, ways, total = _ways(body), 1, 0
        for times in range(most + 1):
            total += ways if times >= least else 0
            ways = min(ways * once, MOST_WAYS + 1)
        return total
    raise RuleError(f"it uses {str(code).lower().replace('_', ' ')}, which a rule may not")
