"""Tokens beside Transformers' AutoTokenizer and through tokenizer.json; ids that end answers; wrong files."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer as Core

from fewbits import containers
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.text.tokenizer import tokenizer

TEXTS = ["", " ", "Hello world", "  two  spaces\n\n\ttab ", "camelCase HTTPServer's don'T 1234567",
         "naïve €uro 🙂 日本語", "<|im_start|>user\nhi<|im_end|>", "<s>x</s>", "a\u00a0b\u3000c", "x" * 300]


def same_as_auto(folder: Path) -> None:
    ours, auto = tokenizer(containers.open(folder)), transformers.AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = auto(text)["input_ids"]
        assert ours.encode(text) == ids
        assert ours.encode(text, special=False) == auto(text, add_special_tokens=False)["input_ids"]
        assert ours.decode(ids) == auto.decode(ids, skip_special_tokens=True)
    assert ours.special == {k: v for k, v in auto.special_tokens_map.items() if isinstance(v, str)}
    if auto.chat_template:
        talk = [{"role": "user", "content": "Hi <|im_end|>"}]
        assert ours.encode_chat(talk) == auto.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)


def test_equals_transformers(tiny: Path) -> None:
    same_as_auto(tiny)


def test_sentencepiece_equals_transformers(shared) -> None:
    same_as_auto(shared("models/stories260k"))


@pytest.mark.parametrize("name", ["smollm2-135m", "gemma3-270m", "minilm"])
def test_models_equal_transformers(name: str, model) -> None:
    same_as_auto(model(name))


def test_tokens_that_only_tokenizer_config_has(tiny: Path, tmp_path: Path) -> None:
    """They are added; what stands around a text is tokenizer.json's business alone."""
    shutil.copytree(tiny, tmp_path / "m")
    settings = json.loads((tiny / "tokenizer_config.json").read_text())
    settings |= {"add_bos_token": True, "add_eos_token": True, "pad_token": "<pad>",
                 "added_tokens_decoder": {"300": {"content": "<extra>", "special": True}}}
    (tmp_path / "m" / "tokenizer_config.json").write_text(json.dumps(settings))
    ours = tokenizer(containers.open(tmp_path / "m"))
    auto = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    for text in ("hello", "x<extra>y<pad>"):
        assert ours.encode(text) == auto(text)["input_ids"]


# ids that end answers -------------------------------------------------------------------------------------------------
def with_tokens(tiny: Path, special: list[str], plain: list[str] = [], stops: object = None) -> Checkpoint:  # noqa: B006
    source = containers.open(tiny)
    core = Core.from_buffer(source.files["tokenizer.json"])
    core.add_special_tokens(special)
    core.add_tokens(plain)
    files = {**source.files, "tokenizer.json": core.to_str().encode(),
             "generation_config.json": json.dumps({"eos_token_id": stops}).encode()}
    return replace(source, files=files)


def ends(checkpoint: Checkpoint) -> set[str]:
    ours = tokenizer(checkpoint)
    return {ours.name(i) for i in ours.ends}


def test_what_ends_answers(tiny: Path) -> None:
    assert ends(with_tokens(tiny, [])) == {"</s>"}
    assert ends(with_tokens(tiny, [], stops=5)) == {"</s>", tokenizer(containers.open(tiny)).name(5)}
    assert ends(with_tokens(tiny, ["<|eot_id|>", "<end_of_turn>", "<tool>"], stops=[2])) == {
        "</s>", "<|eot_id|>", "<end_of_turn>"}
    assert ends(with_tokens(tiny, [], ["<eos>"])) == {"</s>"}, "a token that a text may hold ends nothing"


def test_answers_of_several_parts(tiny: Path) -> None:
    """<|end|> ends a part where other tokens end the answer."""
    assert ends(with_tokens(tiny, ["<|end|>"])) == {"</s>", "<|end|>"}
    assert ends(with_tokens(tiny, ["<|end|>", "<|return|>", "<|call|>"])) == {"</s>", "<|return|>", "<|call|>"}


# wrong files ----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("files,message,hint", [
    ({}, "no tokenizer.json in it", "AutoTokenizer"), ({"tokenizer.model": b"x"}, "no tokenizer.json", "AutoTokenizer"),
    ({"tokenizer.json": b"{"}, "tokenizer.json cannot be read", ""),
    ({"tokenizer.json": b'{"model": {"type": "Magic"}}'}, "tokenizer.json cannot be read", ""),
    ({"tokenizer.json": b"{}", "tokenizer_config.json": b"["}, "tokenizer_config.json is not JSON", ""),
    ({"tokenizer.json": b"{}", "tokenizer_config.json": b"[]"}, "tokenizer_config.json is not a JSON object", "")])
def test_wrong_files(files: dict[str, bytes], message: str, hint: str, tiny: Path) -> None:
    with pytest.raises(FewbitsError, match=message) as error:
        tokenizer(replace(containers.open(tiny), files=files))
    assert hint in (error.value.hint or "") and "\n" not in str(error.value) and str(tiny) in str(error.value)


def test_text_that_is_none(tiny: Path) -> None:
    with pytest.raises(FewbitsError, match="not valid Unicode"):
        tokenizer(containers.open(tiny)).encode("half \ud800")
