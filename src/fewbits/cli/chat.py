"""`fewbits chat MODEL`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbits.cli.common import log, quiet_libraries


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    system: Annotated[str | None, typer.Option(help="What the model should be.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 512,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    kernel: Annotated[str | None, typer.Option(help="native, decoded (exact) or decode (exact, small).")] = None,
) -> None:
    """Talk to a model; an empty line or end of file ends it."""
    from fewbits.generate import Session

    quiet_libraries()
    session = Session(model, kernel=kernel)
    messages = [{"role": "system", "content": system}] if system else []
    session.check_chat()
    while True:
        if sys.stdin.isatty():
            log.print("> ", end="")
        line = sys.stdin.readline().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = session.generate(session.encode_chat(messages), max_tokens=max_tokens, temperature=temperature,
                                  seed=seed, on_text=lambda piece: print(piece, end="", flush=True))
        print()
        messages.append({"role": "assistant", "content": answer.text})
