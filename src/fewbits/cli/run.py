"""`fewbits run MODEL "prompt"`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbits.cli.answering import Options, report, show, with_options
from fewbits.cli.common import Ended, emit, quiet_libraries
from fewbits.errors import FewbitsError


@with_options()
def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    prompt: Annotated[str, typer.Argument(help="What to say to it; - reads it from stdin.")],
    options: Options,
    raw: Annotated[bool, typer.Option("--raw", help="Continue the text; no chat template.")] = False,
    logprobs: Annotated[int | None, typer.Option(
        min=0, max=100, help="Log-probabilities of tokens, and of so many likely ones; with --json.")] = None,
    json: Annotated[bool, typer.Option("--json", help="The result as JSON.")] = False,
) -> None:
    """Generate text: an answer where the model has a chat template, else a continuation."""
    if logprobs is not None and not json:
        raise FewbitsError("--logprobs are part of the result as JSON", "add --json")
    quiet_libraries()
    session = options.session(model)
    ids = session.encode(_stdin() if prompt == "-" else prompt, raw, options.system)
    answer = session.generate(ids, **options.answering(session), top_logprobs=logprobs, on_text=None if json else show)
    if json:
        emit(answer.to_json())
    else:
        print(flush=True)
    report(answer, session.context)
    if answer.ended == "interrupted":
        raise Ended(130)


def _stdin() -> str:
    try:
        return sys.stdin.read().removesuffix("\n")
    except UnicodeDecodeError:
        raise FewbitsError("the prompt on stdin is not UTF-8 text") from None
