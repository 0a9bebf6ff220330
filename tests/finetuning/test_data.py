"""What is learnt of texts, pairs and chats, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from fewbits.errors import FewbitsError
from fewbits.finetuning.data import IGNORED, Data, Example, examples, split

CHATML = ("{% if messages[0].role == 'nobody' %}{{ raise_exception('who?') }}{% endif %}"
          "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}</s>\n{% endfor %}"
          "{% if add_generation_prompt %}<|assistant|>{% endif %}")


@pytest.fixture(scope="module")
def tokenizer(tiny: Path) -> Any:
    found = transformers.AutoTokenizer.from_pretrained(tiny)
    found.chat_template = CHATML
    return found


def lines(path: Path, *rows: dict[str, Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def learnt(tokenizer: Any, example: Example) -> str:
    """The text of what is learnt."""
    return str(tokenizer.decode(example.labels[example.labels != IGNORED]))


def test_texts_are_joined_and_cut(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("abcdefghij" * 10)
    found = examples(path, tokenizer, length=32)
    assert [len(e.input_ids) for e in found] == [32, 32, 32], "the last four tokens fill no sequence"
    assert tokenizer.decode(torch.cat([e.input_ids for e in found])) == ("abcdefghij" * 10)[:96]
    assert all(torch.equal(e.input_ids, e.labels) for e in found)
    assert found.description == f"{path}, 3 examples, 96 tokens" and found.notes == ()
    rows = lines(tmp_path / "a.jsonl", {"text": "abc"}, {"text": "de"})
    (only,) = examples(rows, tokenizer, length=32)
    assert tokenizer.decode(only.input_ids) == "abc</s>de", "shorter than a sequence, and all there is"


def test_of_pairs_the_answer_is_learnt(tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "2+2=", "completion": "4"}, {"prompt": "x", "completion": "yz"})
    first, second = examples(path, tokenizer, length=32)
    assert tokenizer.decode(first.input_ids) == "2+2=4</s>" and learnt(tokenizer, first) == "4</s>"
    assert learnt(tokenizer, second) == "yz</s>"


def test_instructions_go_through_the_chat_template(tokenizer: Any, tiny: Path, tmp_path: Path) -> None:
    row = {"instruction": "Add.", "input": "2 2", "output": "4"}
    path = lines(tmp_path / "a.jsonl", row)
    (example,) = examples(path, tokenizer, length=64)
    assert tokenizer.decode(example.input_ids) == "<|user|>Add.\n\n2 2</s>\n<|assistant|>4</s>\n"
    assert learnt(tokenizer, example) == "4</s>\n"
    bare = transformers.AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    (example,) = examples(path, bare, length=64)
    assert bare.decode(example.input_ids) == "Add.\n\n2 2\n\n4</s>" and learnt(bare, example) == "4</s>"
    whole = tmp_path / "a.json"
    whole.write_text(json.dumps([row]))
    assert torch.equal(examples(whole, bare, length=64)[0].labels, example.labels)


@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_of_chats_the_assistants_turns_are_learnt(form: str, tokenizer: Any, tmp_path: Path) -> None:
    said = [("user", "hi"), ("assistant", "hello"), ("user", "hi"), ("assistant", "again hi")]
    names = {"user": "human", "assistant": "gpt"}
    turns = [{"role": r, "content": c} if form == "messages" else {"from": names[r], "value": c} for r, c in said]
    (example,) = examples(lines(tmp_path / "a.jsonl", {form: turns}), tokenizer, length=128)
    assert tokenizer.decode(example.input_ids).startswith("<|user|>hi</s>\n<|assistant|>hello</s>\n<|user|>")
    assert learnt(tokenizer, example) == "hello</s>\nagain hi</s>\n"


def test_a_first_turn_of_the_assistant_is_learnt_without_what_stands_before(tokenizer: Any, tmp_path: Path) -> None:
    turns = [{"role": "assistant", "content": "Welcome"}, {"role": "user", "content": "hi"}]
    (example,) = examples(lines(tmp_path / "a.jsonl", {"messages": turns}), tokenizer, length=128)
    assert learnt(tokenizer, example) == "Welcome</s>\n"


def test_what_is_too_long_is_cut_and_said(tokenizer: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", {"prompt": "abcdef", "completion": "ghijkl"},
                 {"prompt": "abcdefghijkl", "completion": "m"})
    found = examples(path, tokenizer, length=8)
    assert [learnt(tokenizer, e) for e in found] == ["gh"]
    assert found.notes == (f"{path}: 2 examples cut to 8 tokens",
                           f"{path}: 1 example left out: nothing in them is learnt")


def test_a_data_set_of_the_hub(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load(name: str, split: str, streaming: bool) -> Any:
        assert streaming
        if name == "who/gone":
            raise ConnectionError("no route\nto the hub")
        return ({"prompt": f"{name} {split}", "completion": str(i)} for i in range(10 ** 9))

    monkeypatch.setattr(datasets, "load_dataset", load)
    found = examples("who/what:test", tokenizer, length=64, most=3)
    assert [learnt(tokenizer, e) for e in found] == ["0</s>", "1</s>", "2</s>"]
    assert tokenizer.decode(found[0].input_ids).startswith("who/what test")
    with pytest.raises(FewbitsError, match="^who/gone: no such file, and no data set that can be read: no route$"):
        examples("who/gone", tokenizer, length=64)


@pytest.mark.parametrize(("content", "message"), [
    ('{"a": 1, "b": 2}\n', "at byte 0: no text to learn from: it holds a, b$"),
    ('{"prompt": "x", "completion": ["y"]}\n', "prompt and completion are to be strings"),
    ('{"messages": []}\n', "no text, messages or conversations in it"),
    ("[1]\n", "no JSON object"), ("", "no text to learn from in it"), ('{"text": ""}\n', "no text to learn from in it"),
    ('{"messages": [{"role": "user", "content": "hi"}]}\n', "no text to learn from in it"),
    ('{"messages": [{"role": "nobody", "content": "hi"}]}\n', "at byte 0: the model's chat template refuses it: who")])
def test_nothing_to_learn_from(content: str, message: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(content)
    with pytest.raises(FewbitsError, match=message) as error:
        examples(path, tokenizer, length=32)
    assert "\n" not in str(error.value)


def test_other_files_that_cannot_be_read(tokenizer: Any, tiny: Path, tmp_path: Path) -> None:
    for name, content, message in (("a.json", "{", "no JSON"), ("a.json", '{"text": "x"}', "a list of objects"),
                                   ("a.txt", "", "no text to learn from"), ("a.txt", "a", "no text to learn from")):
        (tmp_path / name).write_text(content)
        with pytest.raises(FewbitsError, match=message):
            examples(tmp_path / name, tokenizer, length=32)
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    with pytest.raises(FewbitsError, match="not UTF-8 at byte 2"):
        examples(tmp_path / "b.txt", tokenizer, length=32)
    with pytest.raises(FewbitsError, match="no such file"):
        examples(tmp_path / "none.txt", tokenizer, length=32)
    bare = transformers.AutoTokenizer.from_pretrained(tiny)
    bare.chat_template = None
    chat = lines(tmp_path / "c.jsonl", {"messages": [{"role": "assistant", "content": "x"}]})
    with pytest.raises(FewbitsError, match="the model has no chat template"):
        examples(chat, bare, length=32)


def test_examples_are_held_out_evenly() -> None:
    data = Data(tuple(Example(torch.tensor([i]), torch.tensor([i])) for i in range(100)), "numbers")
    learn, held = split(data, 0.05, 16)
    assert [int(e.input_ids) for e in held] == [10, 30, 50, 70, 90] and len(learn) == 95
    assert [len(split(data, share, most)[1]) for share, most in ((0.0, 16), (0.001, 16), (0.5, 16))] == [0, 1, 16]
    assert len(split(Data(data.examples[:2], ""), 0.05, 16)[1]) == 0
