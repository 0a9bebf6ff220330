"""The pieces and scores of a SentencePiece model file (`tokenizer.model`), a protocol buffer."""

from __future__ import annotations

import struct
from collections.abc import Iterator

from fewbits.errors import FewbitsError


def scores(raw: bytes) -> dict[str, float]:
    """Score of every piece: ModelProto.pieces (field 1), each with its text (field 1) and score (field 2).

    Raises:
        FewbitsError: not such a file, or not a BPE model.
    """
    try:
        found: dict[str, float] = {}
        for number, value in _fields(raw):
            if number == 1 and isinstance(value, bytes):
                piece = dict(_fields(value))
                text, score = piece[1], piece.get(2, b"\0\0\0\0")
                found[bytes(text).decode()] = struct.unpack("<f", bytes(score))[0]
            elif number == 2 and isinstance(value, bytes) and dict(_fields(value)).get(3, 1) != 2:
                raise FewbitsError("tokenizer.model is not a BPE model; GGUF takes BPE here")
        return found
    except (IndexError, KeyError, TypeError, struct.error, UnicodeDecodeError) as error:
        raise FewbitsError(f"tokenizer.model is not a SentencePiece model ({error})") from None


def pieces(raw: bytes) -> list[str]:
    """The text of every piece, of any kind of model, in the order of their ids.

    Raises:
        FewbitsError: not such a file.
    """
    try:
        return [bytes(dict(_fields(value))[1]).decode() for number, value in _fields(raw)
                if number == 1 and isinstance(value, bytes)]
    except (IndexError, KeyError, TypeError, UnicodeDecodeError) as error:
        raise FewbitsError(f"not a SentencePiece model ({error})") from None


def _fields(raw: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Field number and value: an integer (wire type 0) or bytes (1: eight, 2: counted, 5: four)."""
    at = 0
    while at < len(raw):
        tag, at = _varint(raw, at)
        kind = tag & 7
        if kind == 0:
            number, at = _varint(raw, at)
            yield tag >> 3, number
            continue
        if kind == 2:
            size, at = _varint(raw, at)
        else:
            size = {1: 8, 5: 4}[kind]
        if at + size > len(raw):
            raise IndexError("cut short")
        yield tag >> 3, raw[at:at + size]
        at += size


def _varint(raw: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        value |= (raw[at] & 0x7F) << shift
        at += 1
        if raw[at - 1] < 0x80:
            return value, at
        shift += 7
