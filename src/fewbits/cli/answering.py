"""The options of `run` and `chat`: how answers are drawn, what form they have, how fast they come."""

from __future__ import annotations

import functools
import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from fewbits.errors import FewbitsError

if TYPE_CHECKING:
    from fewbits.generate import Answer, Session
    from fewbits.text.sampling import Sampling

DRAWING, FORM, SPEED = "How tokens are drawn", "The form of the answer", "Speed and memory"


def _option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


@dataclass
class Options:
    """What the command line says of an answer."""

    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 128
    system: Annotated[str | None, typer.Option(help="What the model should be.")] = None
    temperature: Annotated[float, _option(DRAWING, "0 takes the most likely token.", min=0.0)] = 0.0
    top_k: Annotated[int, _option(DRAWING, "Draw among so many of the most likely, 0: all.", min=0)] = 0
    top_p: Annotated[float, _option(DRAWING, "Draw among the most likely that have this probability together.")] = 1.0
    min_p: Annotated[float, _option(DRAWING, "Draw among those with this part of the largest probability.")] = 0.0
    repetition_penalty: Annotated[float, _option(DRAWING, "Above 1 makes tokens less likely that occurred.")] = 1.0
    frequency_penalty: Annotated[float, _option(DRAWING, "Taken from a logit for every time it occurred.")] = 0.0
    presence_penalty: Annotated[float, _option(DRAWING, "Taken from a logit if it occurred.")] = 0.0
    penalty_window: Annotated[int, _option(DRAWING, "Tokens that penalties look back, -1: all.", min=-1)] = 64
    logit_bias: Annotated[list[str], _option(DRAWING, "TOKEN=VALUE, an id or its text; may be repeated.")] = field(
        default_factory=list)
    seed: Annotated[int, _option(DRAWING, "Same seed, same text.")] = 0
    stop: Annotated[list[str], _option(FORM, "Text that ends the answer; may be repeated.")] = field(
        default_factory=list)
    json_schema: Annotated[str | None, _option(FORM, "A schema that the answer follows: a file, or JSON.")] = None
    regex: Annotated[str | None, _option(FORM, "A regular expression that the answer matches.")] = None
    grammar: Annotated[Path | None, _option(FORM, "A file with a grammar, Lark or GBNF.")] = None
    context: Annotated[int | None, _option(SPEED, "Most tokens; default: the model's.", min=1)] = None
    cache: Annotated[str, _option(SPEED, "Type of kept keys and values: f16, q8_0 or q4_0.")] = "f16"
    draft: Annotated[str | None, _option(SPEED, "A smaller model that guesses ahead; same text.")] = None
    lookup: Annotated[bool, _option(SPEED, "Guess ahead from the text itself; same text.", "--lookup")] = False
    threads: Annotated[int | None, _option(SPEED, "Threads; default: one for every core.", min=1)] = None
    device: Annotated[str, _option(SPEED, "cpu, cuda, cuda:1; auto: the GPU if there is one.")] = "auto"
    kernel: Annotated[str | None, _option(SPEED, "Compute with Transformers and these products: native, decoded "
                                                 "(exact), decode (exact, small).")] = None

    def session(self, model: str) -> Session:
        """The model, opened."""
        if self.threads:  # before anything reads it
            os.environ["OMP_NUM_THREADS"] = str(self.threads)
            if "torch" in sys.modules:
                sys.modules["torch"].set_num_threads(self.threads)
        if self.kernel and self.cache != "f16":
            raise FewbitsError("--cache is the native decoder's, --kernel Transformers'", "give one of the two")
        if self.draft and self.lookup:
            raise FewbitsError("--draft and --lookup both guess ahead", "give one of the two")
        if sum(bool(form) for form in (self.json_schema, self.regex, self.grammar)) > 1:
            raise FewbitsError("more than one form for the answer", "give one of --json-schema, --regex, --grammar")
        from fewbits import containers, hub
        from fewbits.runtime import engine, weights

        checkpoint = containers.open(hub.locate(model))
        if self.kernel is None and engine.device(self.device) is None:
            weights.expect(checkpoint)  # imports go on meanwhile
        from fewbits.generate import Session

        return Session(checkpoint, kernel=self.kernel, context=self.context, cache=self.cache, draft=self.draft,
                       device=self.device)

    def answering(self, session: Session) -> dict[str, Any]:
        """What `Session.generate` wants beside the tokens."""
        return {"max_tokens": self.max_tokens, "sampling": self._sampling(session), "stop": self.stop,
                "grammar": self._grammar(session), "lookup": self.lookup}

    def _sampling(self, session: Session) -> Sampling:
        from fewbits.text.sampling import Sampling

        return Sampling(self.temperature, self.top_k, self.top_p, self.min_p, self.repetition_penalty,
                        self.frequency_penalty, self.presence_penalty, self.penalty_window,
                        dict(_bias(text, session) for text in self.logit_bias), self.seed)

    def _grammar(self, session: Session) -> Any:
        if self.regex is not None:
            return session.grammar("regex", self.regex)
        if self.json_schema is not None:
            inline = self.json_schema.lstrip().startswith(("{", "true", "false"))
            return session.grammar("json-schema", self.json_schema if inline else _read(Path(self.json_schema)))
        if self.grammar is not None:
            text = _read(self.grammar)
            return session.grammar("gbnf" if "::=" in text else "lark", text)
        return None


def _bias(text: str, session: Session) -> tuple[int, float]:
    token, _, value = text.rpartition("=")
    try:
        number = float(value)
    except ValueError:
        raise FewbitsError(f"--logit-bias {text!r} is no TOKEN=VALUE", "for example --logit-bias 42=-5") from None
    if token.isdecimal():
        return int(token), number
    ids = session.tokenizer.encode(token, special=False)
    if len(ids) != 1:
        raise FewbitsError(f"--logit-bias: {token!r} is {len(ids)} tokens", "give the ids of single ones")
    return ids[0], number


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise FewbitsError(f"{path}: is not UTF-8 text") from None


def with_options(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command the options above; it gets them as its argument `options`."""
    def change(command: Callable[..., None]) -> Callable[..., None]:
        hints, names = get_type_hints(Options, include_extras=True), {f.name for f in fields(Options)}
        own = inspect.signature(command, eval_str=True).parameters.values()
        shared = [inspect.Parameter(f.name, inspect.Parameter.KEYWORD_ONLY, annotation=hints[f.name],
                                    default=defaults.get(f.name, f.default if f.default is not MISSING else []))
                  for f in fields(Options)]

        @functools.wraps(command)
        def run(**given: Any) -> None:
            options = Options(**{name: given.pop(name) for name in names})
            command(**given, options=options)

        parameters = [p for p in own if p.name != "options"] + shared
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        del run.__wrapped__
        return run

    return change


def show(piece: str) -> None:
    """A piece of an answer, on stdout at once."""
    if piece:
        sys.stdout.write(piece)
        sys.stdout.flush()


def report(answer: Answer, context: int) -> None:
    """Speed, for someone at a terminal; for everyone, that the context is full."""
    if answer.ended == "context":
        print(f"note: the context of {context} tokens is full", file=sys.stderr)
    if not sys.stderr.isatty():
        return
    prompt = f"prompt: {answer.prompt_tokens} tokens"
    if answer.reused_tokens:
        prompt += f", {answer.reused_tokens} of them known"
    said = f"answer: {len(answer.tokens)} tokens, {answer.answer_rate:.1f} a second"
    if answer.guessed_tokens:
        said += f", {answer.accepted_tokens} of {answer.guessed_tokens} guesses right"
    print(f"{prompt}, {answer.prompt_rate:.1f} a second; {said}; ended by: {answer.ended}", file=sys.stderr)
