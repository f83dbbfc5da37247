"""How much effort a picture deserves, when its caller left that open: a local rule.

Pure, and it never raises. The score is the sum of the weights of the features that are present; rounded, and
kept within 1 and 10, it is the effort.

| feature | weight | present when |
| --- | --- | --- |
| a picture | 2 | always: "draw me a cat" |
| asks for detail | 2 | one word such as photorealistic, poster, intricate; 3.5 for two, 5 for more |
| has text in it | 6 | it is to say something legibly, which models below Flux cannot |
| is described at length | 1 | above 12 words; 2 above 25, 3 above 50 |
| shows what is hard to draw | 1 | hands, crowds, several figures doing something |
| is large | 2 | above 1.5 megapixels |
| is small | -1 | up to 768 by 768 |
| wants to be exact | 2 | it has to fit what is there: inpaint, outpaint, controlnet |
| excludes something | 2 | a negative prompt, which models without cfg do not see |
| may be rough | -2 | a sketch, a doodle, an icon; quick, simple |

The tiers of the efforts are in `tier_of_effort`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator

from rung.types import ImageInput

_MIN_EFFORT = 1
_MAX_EFFORT = 10
_MEGAPIXEL = 1024 * 1024
_SMALL_PIXELS = 768 * 768
_LARGE_PIXELS = 1.5 * _MEGAPIXEL
_MOST_CHARACTERS = 4000

_DETAIL = (
    r"photo[- ]?realis\w*|hyper[- ]?realis\w*|ultra[- ]?realis\w*|realistic|lifelike|fotorealis\w*|"
    r"photograph\w*|photo of|studio (?:shot|photo|light\w*)|product shot|dslr|bokeh|macro shot|"
    r"intricate\w*|(?:highly|very|finely|ultra|extremely)[- ]?detailed|detailed|detail(?:reich|liert)\w*|"
    r"elaborate|ornate|filigree|[48]k|uhd|high[- ]res\w*|masterpiece|best quality|award[- ]winning|"
    r"cinematic|volumetric|ray[- ]?trac\w*|octane|unreal engine|concept art|matte painting|"
    r"poster|plakat|billboard|book cover|album cover|wallpaper|oil painting|ölgemälde|portrait|porträt"
)
_TEXT = (
    r"\"[^\"\n]{1,120}\"|“[^”\n]{1,120}”|„[^“\n]{1,120}“|«[^»\n]{1,120}»|"
    r"(?:that|which) (?:says|reads)|saying|reading (?=['‘\"])|"  # noqa: RUF001
    r"with the (?:text|words?|title|caption|slogan|name)|lettering|typograph\w*|speech bubble|infographic\w*|"
    r"mit (?:der aufschrift|dem (?:text|wort|titel))"
)
_HARD = (
    r"hands?|fingers|crowds?|group of|holding|shaking hands|hugging|dancing|playing (?:the|a)|"
    r"two (?:people|men|women|children)|hände|menschenmenge"
)
_ROUGH = (
    r"quick\w*|rough\w*|sketch\w*|doodle\w*|scribble\w*|simple|icons?|emoji|clip ?art|stick figure|draft|"
    r"thumbnail|schnell\w*|skizze\w*|einfach\w*|strichmännchen"
)


def _terms(pattern: str) -> re.Pattern[str]:
    return re.compile(rf"(?<!\w)(?:{pattern})(?!\w)", re.IGNORECASE)


_DETAIL_TERMS, _TEXT_TERMS, _HARD_TERMS, _ROUGH_TERMS = map(_terms, (_DETAIL, _TEXT, _HARD, _ROUGH))
#: Weights of one, two, and more words that ask for detail.
_DETAIL_WEIGHTS = (2.0, 3.5, 5.0)
_EXACT = frozenset({"inpaint", "outpaint", "controlnet"})


def image_effort(wanted: ImageInput) -> tuple[int, str]:
    """The effort of a wish for a picture, 1 to 10, and why in one line. Never raises."""
    features = list(_features(wanted))
    score = 2.0 + sum(weight for weight, _ in features)
    effort = min(_MAX_EFFORT, max(_MIN_EFFORT, math.floor(score + 0.5)))
    features.sort(key=lambda feature: (-abs(feature[0]), feature[1]))
    return effort, "; ".join(why for _, why in features) or "short and plain"


def _features(wanted: ImageInput) -> Iterator[tuple[float, str]]:
    prompt = _unquoted(wanted.prompt[:_MOST_CHARACTERS].strip())
    detail = _found(_DETAIL_TERMS, prompt)
    if detail:
        weight = _DETAIL_WEIGHTS[min(len(detail), len(_DETAIL_WEIGHTS)) - 1]
        yield weight, f"asks for detail ({', '.join(detail[:3])})"
    if text := _found(_TEXT_TERMS, prompt):
        yield 6.0, f"has text in it ({text[0][:40].strip()})"
    count = len(prompt.split())
    if count > 12:
        yield (3.0 if count > 50 else 2.0 if count > 25 else 1.0), f"is described in {count} words"
    if hard := _found(_HARD_TERMS, prompt):
        yield 1.0, f"shows what is hard to draw ({', '.join(hard[:3])})"
    pixels = wanted.width_pixels * wanted.height_pixels
    if pixels > _LARGE_PIXELS:
        yield 2.0, f"is large ({wanted.width_pixels}x{wanted.height_pixels})"
    elif 0 < pixels <= _SMALL_PIXELS:
        yield -1.0, f"is small ({wanted.width_pixels}x{wanted.height_pixels})"
    if wanted.operation in _EXACT:
        yield 2.0, f"has to fit what is there ({wanted.operation})"
    if wanted.negative_prompt.strip():
        yield 2.0, "excludes something"
    if rough := _found(_ROUGH_TERMS, prompt):
        yield -2.0, f"may be rough ({', '.join(rough[:3])})"


def _found(terms: re.Pattern[str], prompt: str) -> list[str]:
    """The different terms that are in a prompt, in their order."""
    return list(dict.fromkeys(match[0].lower() for match in terms.finditer(prompt)))


def _unquoted(prompt: str) -> str:
    """A prompt that is quoted as a whole asks for no text."""
    quoted = len(prompt) > 2 and prompt[0] == prompt[-1] == '"' and prompt.count('"') == 2
    return prompt[1:-1] if quoted else prompt
