"""The one rule that no policy lifts: nothing sexual about minors. Pure.

It is small and means what it refuses: someone who is named as a minor, and something that is sexual without a
doubt. `girl` and `boy` alone say no age, and `sex` alone is a word of schools and of statistics.
"""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Iterator

from controlplane.stages._matching import compile_terms
from controlplane.stages._reading import Reading, read
from rung.types import JobKind

CATEGORY = "sexual content about minors"

_ALONE = ("lolicon*", "shotacon*", "child porn*", "kiddie porn*", "kid porn*", "teen porn*", "jailbait")
_MINOR = (
    *("child", "children", "kid", "kids", "toddler*", "infant", "infants", "newborn*", "a baby", "the baby"),
    *("babies", "baby boy", "minors", "juvenile*", "underage*", "under age", "under aged", "preteen*"),
    "pre teen*",
    *("tween", "tweens", "teen", "teens", "teenage*", "adolescent*", "prepubescent*", "pubescent"),
    *("schoolgirl*", "school girl*", "schoolboy*", "school boy*", "little girl*", "little boy*"),
    *("young girl*", "young boy*", "small girl*", "small boy*", "loli", "lolis", "shota", "shotas"),
)
_SEXUAL = (
    *("porn*", "hentai", "nsfw", "xxx", "nude", "nudes", "nudity", "naked", "undressed", "undressing"),
    *("topless", "erotic*", "orgasm*", "masturbat*", "blowjob*", "blow job*", "fellatio", "cunnilingus"),
    *("genital*", "penis", "penises", "vagina*", "cumshot*", "lewd*", "sexy", "seductive*", "having sex"),
    *("sex scene*", "sex act*", "sexual act*", "sexual pose*", "sexually explicit", "sexually suggestive"),
    *("lingerie", "fetish*", "bdsm", "upskirt*", "spread legs", "spreading legs"),
)
#: Where these stand, the word that is sexual is not meant so.
_HARMLESS = ("naked eye", "naked eyes", "naked mole", "naked truth", "no nudity", "no nsfw", "not nsfw")
#: In a negative prompt these say the same as `naked` in a prompt.
_NOT_WORN = ("clothes", "clothing", "clothed", "fully clothed", "dressed")

_NUMBERS = (
    *("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve"),
    *("thirteen", "fourteen", "fifteen", "sixteen", "seventeen"),
)
_UNDER_18 = rf"(?:\d|1[0-7]|{'|'.join(_NUMBERS)})"
_YEARS = r"(?:years?|yrs?|yr|y)"
#: Of a text's words; whisky, trees and houses may be as old as they like.
_AGE = re.compile(
    rf"(?<= )(?:{_UNDER_18} ?{_YEARS} (?:old|olds|o)|{_UNDER_18} ?yo|aged? {_UNDER_18})(?= )"
    r"(?! (?:single |malt |scotch )?(?:whisk|scotch|malt|wine|rum|port|cheese|car|tree|house|build|dog|cat))"
)
#: Words between the two in a text that is no description of one picture.
_MOST_BETWEEN = 25
_PICTURES = frozenset({JobKind.IMAGE, JobKind.VIDEO, JobKind.MESH})

_alone = compile_terms(_ALONE)
_minor = compile_terms(_MINOR)
_sexual = compile_terms(_SEXUAL)
_harmless = compile_terms(_HARMLESS)
_not_worn = compile_terms(_NOT_WORN)


def about_minors(kind: JobKind, prompt: Reading, negative_prompt: str) -> bool:
    """Whether a wish is sexual and about minors.

    In a prompt for a picture the two may be anywhere; in a text for speech and the like, near each other.
    """
    if _alone.are_in(prompt):
        return True
    cleared = prompt.words
    if _harmless.may_be_in(prompt):
        cleared = tuple(_harmless.pattern.sub("-", words) for words in cleared)
    sexual = _sexual.may_be_in(prompt) and any(map(_sexual.pattern.search, cleared))
    if kind not in _PICTURES:
        return sexual and any(map(_near, cleared))
    sexual = sexual or (bool(negative_prompt) and _not_worn.are_in(read(negative_prompt)))
    return sexual and any(_minor.pattern.search(each) or _AGE.search(each) for each in cleared)


def _near(words: str) -> bool:
    """Whether somebody who is named a minor and something sexual are near each other."""
    minors = sorted(place for rule in (_minor.pattern, _AGE) for place in _places(rule, words))
    for sexual in _places(_sexual.pattern, words):
        after = bisect_left(minors, sexual)
        if any(abs(minor - sexual) <= _MOST_BETWEEN for minor in minors[max(0, after - 1) : after + 1]):
            return True
    return False


def _places(rule: re.Pattern[str], words: str) -> Iterator[int]:
    """Which words a rule finds, counted from the first one."""
    counted = count = 0
    for found in rule.finditer(words):
        count += words.count(" ", counted, found.start())
        counted = found.start()
        yield count
