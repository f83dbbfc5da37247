"""The one rule that no policy lifts: nothing sexual about minors. Pure.

It is small and means what it refuses: someone who is named as a minor, and something that is sexual without a
doubt. `girl` and `boy` alone say no age, and `sex` alone is a word of schools and of statistics.
"""

from __future__ import annotations

import re

from controlplane.stages._matching import compile_words
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

_alone = compile_words(_ALONE)
_minor = compile_words(_MINOR)
_sexual = compile_words(_SEXUAL)
_harmless = compile_words(_HARMLESS)
_not_worn = compile_words(_NOT_WORN)


def about_minors(kind: JobKind, prompt: Reading, negative_prompt: str) -> bool:
    """Whether a wish is sexual and about minors.

    In a prompt for a picture the two may be anywhere; in a text for speech and the like, near each other.
    """
    if any(map(_alone.search, prompt.words)):
        return True
    cleared = [_harmless.sub("-", words) for words in prompt.words]
    if kind in _PICTURES:
        named = any(_minor.search(each) or _AGE.search(each) for each in cleared)
        if not named:
            return False
        return any(map(_sexual.search, cleared)) or any(map(_not_worn.search, read(negative_prompt).words))
    return any(map(_near, cleared))


def _near(words: str) -> bool:
    """Whether somebody who is named a minor and something sexual are near each other."""
    sexual = [words.count(" ", 0, found.start()) for found in _sexual.finditer(words)]
    if not sexual:
        return False
    minors = [words.count(" ", 0, found.start()) for rule in (_minor, _AGE) for found in rule.finditer(words)]
    return any(abs(one - other) <= _MOST_BETWEEN for one in sexual for other in minors)
