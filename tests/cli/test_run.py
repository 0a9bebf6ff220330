"""`fewbits run` and `fewbits chat` as a user types them; what starts how fast."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from fewbits.cli import answering
from tests.cli.conftest import Run


def ran(fewbits: Run, *arguments: object, stdin: str = "") -> dict:  # noqa: F811
    code, out, err = fewbits("run", *arguments, "--json", stdin=stdin)
    assert code == 0, err
    found: dict = json.loads(out)
    return found


def test_options_reach_the_sampler(fewbits: Run, tiny: Path) -> None:  # noqa: F811
    plain = ran(fewbits, tiny, "hello", "--raw", "--max-tokens", 12)
    assert plain["ended"] == "length" and plain["answer_tokens_per_second"] > 0
    first = plain["tokens"][0]
    for option, value in (("--logit-bias", f"{first}=-100"), ("--presence-penalty", 50), ("--frequency-penalty", 50),
                          ("--temperature", 3), ("--repetition-penalty", 50)):
        assert ran(fewbits, tiny, "hello", "--raw", "--max-tokens", 12, option, value)["tokens"] != plain["tokens"]
    drawn = ("--raw", "--max-tokens", 12, "--temperature", 2)
    one = ran(fewbits, tiny, "hello", *drawn, "--seed", 5)
    assert one["tokens"] == ran(fewbits, tiny, "hello", *drawn, "--seed", 5)["tokens"]
    assert one["tokens"] != ran(fewbits, tiny, "hello", *drawn, "--seed", 6)["tokens"]
    for option, value in (("--top-k", 1), ("--top-p", 1e-6), ("--min-p", 1)):
        assert ran(fewbits, tiny, "hello", *drawn, option, value)["tokens"] == plain["tokens"]
    stopped = ran(fewbits, tiny, "hello", "--raw", "--max-tokens", 12, "--stop", plain["text"][2:4])
    assert stopped["ended"] == "stop string" and len(stopped["text"]) <= 2


def test_guesses_and_caches(fewbits: Run, tiny: Path) -> None:  # noqa: F811
    arguments = (tiny, "ababab", "--raw", "--max-tokens", 20)
    plain = ran(fewbits, *arguments)
    assert ran(fewbits, *arguments, "--lookup")["tokens"] == plain["tokens"]
    drafted = ran(fewbits, *arguments, "--draft", tiny)
    assert drafted["tokens"] == plain["tokens"] and drafted["accepted_tokens"] <= drafted["guessed_tokens"]
    assert len(ran(fewbits, *arguments, "--cache", "q8_0", "--threads", 1)["tokens"]) == 20
    os.environ.pop("OMP_NUM_THREADS")


def test_forms(fewbits: Run, tiny: Path, tmp_path: Path) -> None:  # noqa: F811
    drawn = (tiny, "hello", "--temperature", 1)
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"],
              "additionalProperties": False}
    (tmp_path / "s.json").write_text(json.dumps(schema))
    for given in (json.dumps(schema), tmp_path / "s.json"):
        found = ran(fewbits, *drawn, "--max-tokens", 200, "--json-schema", given)
        assert found["ended"] == "stop" and type(json.loads(found["text"])["a"]) is bool
    assert re.fullmatch("(th|in)x", ran(fewbits, *drawn, "--regex", "(th|in)x")["text"])
    for text in ('root ::= "yes" | "no"', 'start: "yes" | "no"'):
        (tmp_path / "grammar").write_text(text)
        assert ran(fewbits, *drawn, "--grammar", tmp_path / "grammar")["text"] in ("yes", "no")


def test_prompts(fewbits: Run, tiny: Path) -> None:  # noqa: F811
    said = ran(fewbits, tiny, "hi there", "--max-tokens", 4)
    assert ran(fewbits, tiny, "-", "--max-tokens", 4, stdin="hi there\n")["tokens"] == said["tokens"]
    with_system = ran(fewbits, tiny, "hi there", "--system", "Be nice.", "--max-tokens", 4)
    assert with_system["prompt_tokens"] > said["prompt_tokens"]


def test_log_probabilities(fewbits: Run, tiny: Path) -> None:  # noqa: F811
    found = ran(fewbits, tiny, "hello", "--raw", "--max-tokens", 3, "--logprobs", 4)
    assert [one["token"] for one in found["logprobs"]] == found["tokens"]
    for one in found["logprobs"]:
        assert len(one["top"]) == 4 and one["top"][0]["token"] == one["token"]
        assert all(-20 < likely["logprob"] < 0 for likely in one["top"])


@pytest.mark.parametrize("arguments,error,hint", [
    (("--logprobs", 2), "--logprobs are part of the result as JSON", "--json"),
    (("--logit-bias", "x"), "'x' is no TOKEN=VALUE", "42=-5"), (("--logit-bias", "xyz=1"), "'xyz' is 3 tokens", "ids"),
    (("--logit-bias", "9999=1"), "token 9999, of a vocabulary of", ""), (("--top-p", "2"), "top-p 2.0", "above 0"),
    (("--context", "9999"), "a context of 9999 tokens, the model's is 256", ""),
    (("--cache", "q3"), "unknown type of cache 'q3'", "q8_0"),
    (("--cache", "q8_0", "--kernel", "native"), "--cache is the native decoder's", "one of"),
    (("--regex", "[0-9"), "regex: ", ""), (("--json-schema", "{"), "json-schema: ", ""),
    (("--json-schema", "{tmp}/none.json"), "none.json: No such file", ""),
    (("--regex", "a", "--json-schema", "{}"), "more than one form", "--json-schema"),
    (("--draft", "{tmp}/none"), "no such file or directory", ""),
    (("--lookup", "--draft", "x"), "--draft and --lookup", "one of"),
    (("--raw", "--system", "x"), "a system prompt needs a chat template", ""),
    (("--context", "3"), "prompt of", "context of up to 256"),
])
def test_errors_are_one_line_and_a_hint(arguments: tuple, error: str, hint: str, fewbits: Run, tiny: Path,  # noqa: F811
                                        tmp_path: Path) -> None:
    code, out, err = fewbits("run", tiny, "hello", *(str(a).replace("{tmp}", str(tmp_path)) for a in arguments))
    assert code == 1 and out == "" and error in err and hint in err
    assert "Traceback" not in err and len(err.strip().splitlines()) <= 2


def test_interrupts_end_with_what_was_said(fewbits: Run, tiny: Path,  # noqa: F811
                                           monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def show(piece: str) -> None:
        print(piece, end="")
        said.append(piece)
        if len(said) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr("fewbits.cli.run.show", show)
    code, out, err = fewbits("run", tiny, "hello", "--raw")
    assert code == 130 and out == "".join(said) + "\n" and err == ""
    said.clear()
    monkeypatch.setattr("fewbits.cli.chat.show", show)
    code, out, _ = fewbits("chat", tiny, "--max-tokens", 5, stdin="hello\nagain\n\n")
    assert code == 0 and out.count("\n") >= 2, "the conversation goes on"


def test_speed_is_said_at_a_terminal(tiny: Path, capsys: pytest.CaptureFixture[str],
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    from fewbits.generate import Session

    session = Session(tiny, context=30)
    answer = session.generate(session.encode("ababab", raw=True), lookup=True)
    capsys.readouterr()
    answering.report(answer, 30)
    assert capsys.readouterr().err == "note: the context of 30 tokens is full\n"
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    answering.report(replace(answer, guessed_tokens=10, accepted_tokens=7), 30)
    assert re.search(r"prompt: 6 tokens, [\d.]+ a second; answer: 24 tokens, [\d.]+ a second, 7 of 10 guesses "
                     r"right; ended by: context\n", capsys.readouterr().err)


def test_help_imports_nothing_heavy() -> None:
    code = ("import sys, fewbits.cli; fewbits.cli.application(); fewbits.cli.application('run');"
            "heavy = {'numpy', 'torch', 'transformers', 'gguf', 'tokenizers', 'jinja2'} & sys.modules.keys();"
            "assert not heavy, heavy")
    subprocess.run([sys.executable, "-c", code], check=True)
