"""`fewbits run MODEL "prompt"`."""

from __future__ import annotations

from typing import Annotated

import typer

from fewbits.cli.common import emit, quiet_libraries


def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it.")],
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    kernel: Annotated[str | None, typer.Option(help="native, decoded (exact) or decode (exact, small).")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Generate text: an answer where the model has a chat template, else a continuation."""
    from fewbits.generate import Session

    quiet_libraries()
    session = Session(model, kernel=kernel)
    ids = session.encode(prompt, raw=raw)
    answer = session.generate(ids, max_tokens=max_tokens, temperature=temperature, seed=seed,
                              on_text=None if json else lambda piece: print(piece, end="", flush=True))
    if json:
        emit(answer.to_json())
    else:
        print()
