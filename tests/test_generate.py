"""Answers of whole sessions: the native decoder and Transformers say the same, and so do guesses, parts and repeats."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from fewbits import containers
from fewbits.containers.gguf import Gguf
from fewbits.errors import FewbitsError
from fewbits.generate import Session
from fewbits.runtime import decoder
from fewbits.text.sampling import Sampling

DRAWS = [Sampling(), Sampling(1.0, seed=7), Sampling(0.8, 20, 0.95, 0.02, 1.1, 0.1, 0.1, seed=3)]


@pytest.fixture(scope="module")
def session(tiny: Path) -> Session:
    return Session(tiny)


@pytest.fixture(scope="module")
def stories(shared) -> Path:
    return Path(shared("models/stories260k"))


def test_transformers_says_the_same(stories: Path) -> None:
    native, eager = Session(stories), Session(stories, kernel="decoded")
    assert native.native and not eager.native
    ids = native.encode("Once upon a time", raw=True)
    assert ids == eager.encode("Once upon a time", raw=True)
    one, two = (s.generate(ids, max_tokens=40, top_logprobs=2) for s in (native, eager))
    assert one.text == two.text and one.tokens == two.tokens and len(one.tokens) == 40
    assert one.logprobs and two.logprobs
    for a, b in zip(one.logprobs, two.logprobs, strict=True):
        assert a.token == b.token and a.logprob == pytest.approx(b.logprob, abs=0.02)
        assert a.top[0].token == a.token and len(a.top) == 2


@pytest.mark.parametrize("sampling", DRAWS, ids=["greedy", "plain", "chain"])
def test_guesses_change_nothing(sampling: Sampling, stories: Path) -> None:
    plain, drafted = Session(stories), Session(stories, draft=stories)
    ids = plain.encode("Lily and Tom. Lily and Tom. Lily and", raw=True)
    wanted = plain.generate(ids, max_tokens=60, sampling=sampling)
    lookup = plain.generate(ids, max_tokens=60, sampling=sampling, lookup=True)
    draft = drafted.generate(ids, max_tokens=60, sampling=sampling)
    assert wanted.tokens == lookup.tokens == draft.tokens and wanted.text == lookup.text == draft.text
    assert wanted.guessed_tokens == 0 and lookup.accepted_tokens <= lookup.guessed_tokens
    assert lookup.accepted_tokens > 0 or sampling.temperature > 0
    assert draft.accepted_tokens > 0.8 * draft.guessed_tokens > 0, "the draft is the model itself"


def test_guesses_of_transformers_change_nothing(tiny: Path) -> None:
    session = Session(tiny, kernel="decoded")
    ids = session.encode("ababababab", raw=True)
    assert session.generate(ids, max_tokens=30).tokens == session.generate(ids, max_tokens=30, lookup=True).tokens


def test_what_was_computed_is_not_computed_again(tiny: Path) -> None:
    session, fresh = Session(tiny), Session(tiny)
    ids = session.encode("hello there", raw=True)
    first = session.generate(ids, max_tokens=9)
    longer = [*ids, *first.tokens, *session.encode("more", raw=True)]
    again = session.generate(longer, max_tokens=9)
    assert first.reused_tokens == 0 and again.reused_tokens == len(ids) + len(first.tokens) - 1
    assert again.tokens == fresh.generate(longer, max_tokens=9).tokens
    assert session.generate(longer, max_tokens=9).reused_tokens == len(longer) - 1
    other = session.generate([longer[0], *longer[2:]], max_tokens=9)
    assert other.reused_tokens == 1 and other.tokens == fresh.generate([longer[0], *longer[2:]], max_tokens=9).tokens


@pytest.mark.parametrize("kernel", [None, "decoded"])
def test_an_interrupt_keeps_what_was_said(kernel: str | None, tiny: Path) -> None:
    session, said = Session(tiny, kernel), list[str]()
    ids = session.encode("hello", raw=True)
    wanted = session.generate(ids, max_tokens=20)

    def listen(piece: str) -> None:
        said.append(piece)
        if len(said) == 5:
            raise KeyboardInterrupt

    cut = session.generate(ids, max_tokens=20, on_text=listen)
    assert cut.ended == "interrupted" and cut.tokens == wanted.tokens[:5] and wanted.text.startswith(cut.text)
    again = session.generate(ids, max_tokens=20)
    assert again.tokens == wanted.tokens and again.reused_tokens == len(ids) - 1


def test_an_interrupt_between_calls(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.runtime.sequences import Sequence

    session = Session(tiny)
    ids = session.encode("hello", raw=True)
    wanted, append, calls = session.generate(ids, max_tokens=20), Sequence.append, [0]

    def stop(*arguments, **named):
        calls[0] += 1
        if calls[0] == 4:
            raise KeyboardInterrupt
        return append(*arguments, **named)

    monkeypatch.setattr(Sequence, "append", stop)
    cut = session.generate(ids, max_tokens=20)
    assert cut.ended == "interrupted" and cut.tokens == wanted.tokens[:3]
    assert session.generate(ids, max_tokens=20).tokens == wanted.tokens


def test_why_answers_end(tiny: Path, session: Session) -> None:
    ids = session.encode("hello", raw=True)
    plain = session.generate(ids, max_tokens=30)
    assert plain.ended == "length" and len(plain.tokens) == 30
    token = plain.tokens[12]
    at = plain.tokens.index(token)
    stopped = Session(tiny)
    object.__setattr__(stopped.tokenizer, "ends", frozenset([token]))
    found = stopped.generate(ids, max_tokens=30)
    assert found.ended == "stop" and found.tokens == plain.tokens[:at]
    last = plain.text[20:22]
    found = session.generate(ids, max_tokens=30, stop=[last, "never said"])
    assert found.ended == "stop string" and found.text == plain.text[:plain.text.index(last)]
    small = Session(tiny, context=len(ids) + 4)
    found = small.generate(ids, max_tokens=30)
    assert found.ended == "context" and found.tokens == plain.tokens[:4]
    forced = Sampling(bias={t: -1e9 for t in range(session.model.vocabulary) if t != 2})
    assert session.generate(ids, sampling=forced).tokens == [], "</s> at once"


def test_grammars_hold(session: Session) -> None:
    ids = session.encode("hello", raw=True)
    for seed in range(3):
        found = session.generate(ids, sampling=Sampling(1.0, seed=seed), grammar=session.grammar("regex", "[0-9]{3}x"),
                                 lookup=True)
        assert found.ended == "stop" and found.text[:3].isdecimal() and found.text[3:] == "x"


def test_streams_are_the_text(session: Session) -> None:
    pieces = list[str]()
    found = session.generate(session.encode("hello", raw=True), max_tokens=60, on_text=pieces.append)
    assert "".join(pieces) == found.text == session.tokenizer.decode(found.tokens)


def test_limits_are_said(tiny: Path) -> None:
    session = Session(tiny, context=20)
    with pytest.raises(FewbitsError, match="prompt of 20 tokens, the session's context is 20") as error:
        session.generate([5] * 20)
    assert "up to 256" in str(error.value.hint)
    with pytest.raises(FewbitsError, match="the prompt is empty"):
        session.generate([])
    with pytest.raises(FewbitsError, match="unknown type of cache 'q3'"):
        Session(tiny, cache="q3")
    with pytest.raises(FewbitsError, match="a context of 257 tokens, the model's is 256"):
        Session(tiny, context=257)
    with pytest.raises(FewbitsError, match="cache in q8_0 is the native decoder's"):
        Session(tiny, "decoded", cache="q8_0")


def test_memory_is_looked_at_before_work(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.runtime import engine

    session = Session(tiny)
    monkeypatch.setattr(engine, "available_bytes", lambda: session.model.plan.cache_bytes(40, "f16"))
    ids = session.encode("hello", raw=True)
    assert len(session.generate(ids, max_tokens=30).tokens) == 30, "room for no more than is asked for"
    with pytest.raises(FewbitsError, match="the cache of .* tokens takes"):
        session.generate(ids, max_tokens=90)


def test_models_without_a_native_decoder(tiny: Path, monkeypatch: pytest.MonkeyPatch,
                                         capsys: pytest.CaptureFixture[str]) -> None:
    wanted = Session(tiny).generate([5, 6, 7], max_tokens=9).tokens

    def refuse(*_: object) -> None:
        raise decoder.Unsupported("m: no native decoder for model type 'zorblax'")

    monkeypatch.setattr(decoder, "compile", refuse)
    session = Session(tiny)
    assert not session.native and session.generate([5, 6, 7], max_tokens=9).tokens == wanted
    assert capsys.readouterr().err == "note: m: no native decoder for model type 'zorblax'; Transformers computes\n"


def test_eager_sequences(tiny: Path) -> None:
    """Logits of parts, and after going back, are those of all at once; also where a cache cannot go back."""
    from fewbits.loading import load
    from fewbits.runtime.eager import Eager

    eager, ids = Eager(load(tiny)), list(range(5, 25))
    wanted = eager.sequence().append(ids, last_only=False)
    sequence = eager.sequence()
    for _ in range(2):
        sequence.append(ids[:7])
        sequence.append([9, 9, 9, 9])
        sequence.truncate(7)
        np.testing.assert_allclose(sequence.append(ids[7:], last_only=False), wanted[7:], atol=2e-5)
        assert len(sequence) == 20
        sequence.truncate(3)
        sequence._cached, sequence._cache = 0, None  # as after an interrupt
        sequence.truncate(0)


def test_a_gguf_file_runs_without_torch_and_transformers(tiny: Path, tmp_path: Path) -> None:
    file = containers.write(Gguf(), tmp_path / "m.gguf", containers.open(tiny)).path
    code = f"""
import sys
from fewbits.generate import Session
session = Session({str(file)!r})
answer = session.generate(session.encode("hello"), max_tokens=3, lookup=True)
assert len(answer.tokens) == 3
heavy = {{"torch", "transformers", "gguf", "rich", "llguidance", "typer", "huggingface_hub"}} & sys.modules.keys()
assert not heavy, heavy
"""
    subprocess.run([sys.executable, "-c", code], check=True)
