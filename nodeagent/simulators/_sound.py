"""Sound that simulated engines make and hear: a hum for each word, with what was said written beside it."""

from __future__ import annotations

import hashlib
import struct
from array import array
from collections.abc import Iterator

from msgspec import Struct

RATE_HZ = 22_050
_SECONDS_OF_CHARACTER = 0.06
_LOUDNESS = 6_000
_WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "while", "machines", "hum")
#: The name of a chunk of a WAV file in which nothing else looks.
_TEXT_CHUNK = b"said"
_STREAMED = 0xFFFFFFFF


class Segment(Struct, frozen=True):
    """What was said within a time, in seconds from the start."""

    start_s: float
    end_s: float
    text: str


def spoken_s(text: str, speed: float = 1.0) -> float:
    """How long it takes to say a text."""
    return max(1, len(text)) * _SECONDS_OF_CHARACTER / speed


def hum(text: str, speed: float = 1.0) -> Iterator[bytes]:
    """A text as samples of 16 bits, a piece for each word; never silence."""
    for word in text.split() or ["."]:
        count = int(RATE_HZ * spoken_s(word + " ", speed))
        period = 40 + sum(word.encode()) % 120
        yield array(
            "h", [_LOUDNESS if place % period < period // 2 else -_LOUDNESS for place in range(count)]
        ).tobytes()


def wav_head(text: str, samples_bytes: int | None = None, rate_hz: int = RATE_HZ) -> bytes:
    """The start of a WAV file, up to its samples; None where nobody knows yet how many there are."""
    said = text.encode() + b"\0" * (len(text.encode()) % 2)
    note = _TEXT_CHUNK + struct.pack("<I", len(text.encode())) + said
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, rate_hz, rate_hz * 2, 2, 16)
    size_bytes = _STREAMED if samples_bytes is None else samples_bytes
    whole_bytes = _STREAMED if samples_bytes is None else 4 + len(form) + len(note) + 8 + samples_bytes
    return (
        struct.pack("<4sI4s", b"RIFF", whole_bytes, b"WAVE")
        + form
        + note
        + struct.pack("<4sI", b"data", size_bytes)
    )


def wav(text: str, speed: float = 1.0, *, note: str | None = None) -> bytes:
    """A text as a WAV file; `note` is what is written beside the hum, if not the text."""
    samples = b"".join(hum(text, speed))
    return wav_head(text if note is None else note, len(samples)) + samples


def silence(seconds: float = 1.0) -> bytes:
    """A WAV file without a sound."""
    samples = bytes(int(RATE_HZ * seconds) * 2)
    return wav_head("", len(samples)) + samples


def heard(audio: bytes) -> str:
    """What is said in a file: what a simulated engine wrote into it, else words that its bytes choose."""
    place = 12
    if audio[:4] == b"RIFF" and audio[8:12] == b"WAVE":
        while place + 8 <= len(audio):
            name, size_bytes = (
                audio[place : place + 4],
                int.from_bytes(audio[place + 4 : place + 8], "little"),
            )
            if name == _TEXT_CHUNK:
                return audio[place + 8 : place + 8 + size_bytes].decode(errors="replace")
            if name == b"data":
                break
            place += 8 + size_bytes + size_bytes % 2
    digest = hashlib.sha256(audio).digest()
    return " ".join(_WORDS[byte % len(_WORDS)] for byte in digest[:12])


def segments_of(text: str, words: int = 4) -> list[Segment]:
    """A text in segments, as faster-whisper gives them: each with the blank before its first word."""
    found, start_s, every = [], 0.0, text.split()
    for place in range(0, len(every), words):
        part = " " + " ".join(every[place : place + words])
        found.append(Segment(start_s, start_s + spoken_s(part), part))
        start_s += spoken_s(part)
    return found
