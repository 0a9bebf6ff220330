"""`fewbits chat MODEL`."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from fewbits.cli.answering import Options, report, show, with_options
from fewbits.cli.common import Ended, quiet_libraries
from fewbits.errors import FewbitsError


@with_options(max_tokens=512)
def command(
    model: Annotated[str, typer.Argument(help="A path in any format, or a hub id.")],
    options: Options,
) -> None:
    """Talk to a model. Ctrl-C ends an answer; an empty line or end of file ends the conversation."""
    quiet_libraries()
    session = options.session(model)
    session.check_chat()
    how = options.answering(session)
    messages = [{"role": "system", "content": options.system}] if options.system else []
    while True:
        line = ask().strip()
        if not line:
            return
        messages.append({"role": "user", "content": line})
        answer = session.generate(session.encode_chat(messages), **how, on_text=show)
        print(flush=True)
        report(answer, session.context)
        messages.append({"role": "assistant", "content": answer.text})


def ask() -> str:
    """A line from the user."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    try:
        return sys.stdin.readline()
    except UnicodeDecodeError:
        raise FewbitsError("what stands on stdin is not UTF-8 text") from None
    except KeyboardInterrupt:
        print(file=sys.stderr)
        raise Ended(130) from None
