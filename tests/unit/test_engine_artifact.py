"""A file in the pieces of a generation."""

from __future__ import annotations

import hashlib

import pytest

from nodeagent.engines._artifact import PIECE_BYTES, pieces_of


@pytest.mark.parametrize("size_bytes", [0, 1, PIECE_BYTES, PIECE_BYTES + 1, 3 * PIECE_BYTES])
def test_the_pieces_of_a_file_are_the_file_and_the_last_one_says_what_it_must_be(size_bytes: int) -> None:
    data = bytes(index % 251 for index in range(size_bytes))
    pieces = list(pieces_of("0", "image/png", data))
    assert b"".join(piece.data for piece in pieces) == data
    offset_bytes = 0
    for piece in pieces:
        assert (piece.artifact_id, piece.content_type) == ("0", "image/png")
        assert piece.offset_bytes == offset_bytes
        assert piece.length_bytes == len(piece.data) <= PIECE_BYTES
        offset_bytes += piece.length_bytes
    assert [bool(piece.sha256) for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    assert pieces[-1].sha256 == hashlib.sha256(data).hexdigest()
    assert {piece.size_bytes for piece in pieces} == {size_bytes}


def test_a_preview_is_marked_in_each_of_its_pieces() -> None:
    pieces = list(pieces_of("p", "image/jpeg", bytes(PIECE_BYTES + 1), preview=True))
    assert [piece.preview for piece in pieces] == [True, True]
