"""How a text is read by rules: the words in it, however they are disguised.

Pure, and linear in the length of the text. Case, accents, letters of other scripts that look Latin,
invisible characters, digits in place of letters, drawn out letters, and letters kept apart by spaces or signs
do not hide a word. A word is only ever compared as a whole: Scunthorpe, Essex and cocktails have nothing to
fear.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

from msgspec import Struct

#: Marks, and what formats without being seen: joiners, soft hyphens, directions; halves of surrogates.
_INVISIBLE = frozenset({"Mn", "Me", "Cf", "Cs"})
#: Letters of Cyrillic and Greek that look like Latin ones, and Latin ones that do not decompose.
_LOOKALIKES = str.maketrans(
    dict(zip("авекмнорстухіјѕԁһԛԝ", "abekmhopctyxijsdhqw", strict=True))
    | dict(zip("αεικνορτυχ", "aeiknoptux", strict=True))
    | dict(zip("øłđıɩɡ", "oldiig", strict=True))
    | {"æ": "ae", "œ": "oe"}
)
_FOR_LETTERS = {"0": "o", "3": "e", "4": "a", "5": "s", "7": "t", "8": "b", "9": "g", "@": "a", "$": "s"}
_AS_I = str.maketrans(_FOR_LETTERS | dict.fromkeys("1!|", "i"))
_AS_L = str.maketrans(_FOR_LETTERS | dict.fromkeys("1!|", "l"))

_WORD = re.compile(r"[^\W_]+")
_MAYBE_DISGUISED = re.compile(r"[\w@$!|]+")
#: What stands between two spaces or marks that end a part of a sentence: `nu-de`, `por*n`.
_PIECE = re.compile(r"[^\s,;:.?\"()\[\]{}]+")
_DRAWN_OUT = re.compile(r"([^\W_])\1{2,}")
#: Three single letters or more, with one sign between two of them, or with up to three.
_APART = [re.compile(rf"(?<![^\W_])(?:[^\W_][\W_]{signs}){{2,}}[^\W_](?![^\W_])") for signs in ("", "{1,3}")]


#: Letters of a word that say that it may be one of those that begin so.
BEGINNING_LETTERS = 3


class Reading(Struct, frozen=True):
    """A text as rules read it.

    Attributes:
        plain: the folded text with its punctuation, for regexes; and the same with digits read as letters.
        words: its words in each way that they can be read, as they are written first; each of the words has a
            space before and after it.
        vocabulary: each of these words once.
        beginnings: how they begin, in `BEGINNING_LETTERS`.
    """

    plain: tuple[str, ...]
    words: tuple[str, ...]
    vocabulary: frozenset[str]
    beginnings: frozenset[str]


def fold(text: str) -> str:
    """A text in lower case, without accents and what is invisible, with Latin letters for those like them."""
    # In compatible forms: without the letters of mathematics, in circles, and of full width.
    spread = unicodedata.normalize("NFKD", unicodedata.normalize("NFKC", text).casefold())
    visible = "".join(each for each in spread if unicodedata.category(each) not in _INVISIBLE)
    return visible.translate(_LOOKALIKES)


def words_of(text: str) -> list[str]:
    """The words of a folded text."""
    return _WORD.findall(text)


def read(text: str) -> Reading:
    """A text as rules read it."""
    folded = fold(text)
    plain = tuple(
        dict.fromkeys((folded, _letters_for_signs(folded, _AS_I), _letters_for_signs(folded, _AS_L)))
    )
    words = [_spaced(words_of(each)) for each in plain]
    words += [_spaced("".join(words_of(piece)) for piece in _PIECE.findall(each)) for each in plain]
    words.append(_spaced(_spelled(folded)))
    for each in tuple(words):
        if _DRAWN_OUT.search(each):
            words += [_DRAWN_OUT.sub(r"\1", each), _DRAWN_OUT.sub(r"\1\1", each)]
    vocabulary = frozenset[str]().union(*map(str.split, words))
    return Reading(
        plain=tuple(" ".join(each.split()) for each in plain),
        words=tuple(dict.fromkeys(words)),
        vocabulary=vocabulary,
        beginnings=frozenset(word[:BEGINNING_LETTERS] for word in vocabulary),
    )


def _letters_for_signs(text: str, table: dict[int, str]) -> str:
    """Digits and signs read as letters, in words that have letters, too: 455 stays a number."""

    def read_one(found: re.Match[str]) -> str:
        word = found[0]
        return word.translate(table) if any(map(str.isalpha, word)) else word

    return _MAYBE_DISGUISED.sub(read_one, text)


def _spelled(folded: str) -> Iterable[str]:
    """Rows of single letters, each as one word; also without an article before it."""
    for readable in dict.fromkeys((folded, folded.translate(_AS_I), folded.translate(_AS_L))):
        for apart in _APART:
            for row in apart.findall(readable):
                word = "".join(words_of(row))
                yield word
                if word[0] in "ai":
                    yield word[1:]


def _spaced(words: Iterable[str]) -> str:
    return f" {' '.join(words)} "
