"""Tokens to text as they come: whole characters only, nothing that a stop string may still take back."""

from __future__ import annotations

from collections.abc import Sequence

from fewbits.text.tokenizer import Tokenizer

BROKEN = "\N{REPLACEMENT CHARACTER}"
MOST_WAITING = 16  # tokens that wait for the rest of a character, which has four bytes


class Stream:
    """The text of an answer. `push` takes a token and returns what is certain by now; `flush` returns the rest.

    What was returned, put together, is `text`, and what decoding all tokens at once gives, up to a stop string.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._tokenizer, self._stops = tokenizer, [s for s in stops if s]
        self._tokens: list[int] = []  # the last ones: they say how the next one joins them
        self._whole = 0  # of them were there when the text was whole
        self._known = 0  # characters of their text that were taken
        self._held = ""  # taken, and perhaps the beginning of a stop string
        self.text = ""
        self.stopped: str | None = None  # the stop string that ended it

    def push(self, token: int) -> str:
        self._tokens.append(token)
        text = self._tokenizer.decode(self._tokens)
        certain = text.rstrip(BROKEN)
        waits = len(self._tokens) - self._whole
        if certain != text and waits >= MOST_WAITING:
            certain = text
        piece = self._take(certain)
        if certain == text and text:  # special tokens have no text, and do not say how the next ones join
            self._tokens = self._tokens[self._whole:]
            self._whole = len(self._tokens)
            self._known = len(self._tokenizer.decode(self._tokens))
        return piece

    def flush(self) -> str:
        if self.stopped is not None:
            return ""
        piece = self._take(self._tokenizer.decode(self._tokens)) + self._held
        self.text += self._held
        self._held = ""
        return piece

    def _take(self, text: str) -> str:
        """What of the known text can be shown."""
        self._held += text[self._known:]
        self._known = max(self._known, len(text))
        found = [(at, stop) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            at, self.stopped = min(found)
            piece, self._held = self._held[:at], ""
        else:
            keep = max((n for stop in self._stops for n in range(1, len(stop)) if self._held.endswith(stop[:n])),
                       default=0)
            piece, self._held = self._held[:len(self._held) - keep], self._held[len(self._held) - keep:]
        self.text += piece
        return piece
