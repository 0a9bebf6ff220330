"""Text sources: windows, files, data sets by name, other inputs, and what is refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file

from fewbits import containers
from fewbits.calibration import documents, sources
from fewbits.calibration.documents import spread
from fewbits.calibration.sources import Calibration, calibration, frame
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.runtime.build import tokenizer_of

BOS, EOS = 1, 2  # of the tiny model's tokenizer


@pytest.fixture(scope="module")
def plain(tiny: Path) -> Checkpoint:
    """The tiny model, whose tokenizer adds nothing to a text."""
    return containers.open(tiny)


def ids(batches: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    return torch.cat([b["input_ids"] for b in batches])


def texts(source: Checkpoint, found: Calibration) -> list[str]:
    return [str(tokenizer_of(source).decode(b["input_ids"][0])) for b in found.batches]


# windows ------------------------------------------------------------------------------------------------------------
def test_windows_without_a_seed_are_spread_evenly():
    assert spread(100, 5, 10, 0) == [0, 20, 40, 60, 80]
    assert spread(29, 5, 10, 0) == [0, 10]


def test_windows_with_a_seed_stay_in_their_shares_and_fit():
    seen = set()
    for seed in range(1, 60):
        starts = spread(107, 5, 10, seed)
        shift = starts[0] % 10
        assert shift <= 7 and all((s - shift) // 20 == i for i, s in enumerate(starts))
        assert starts[-1] + 10 <= 107 and starts == spread(107, 5, 10, seed)
        seen.add(tuple(starts))
    assert len(seen) > 50


def test_a_text_file_gives_its_own_windows(plain: Checkpoint, english: Path):
    found = calibration(english, plain, samples=4, length=32, seed=0)
    whole = tokenizer_of(plain)(english.read_text(), verbose=False)["input_ids"]
    windows = len(whole) // 32
    assert ids(found.batches).tolist() == [whole[i * windows // 4 * 32:][:32] for i in range(4)]
    assert found.tokens == 128 and found.notes == ()
    assert found.description == f"{english}, 4 x 32 tokens, seed 0"


def test_the_seed_chooses_the_windows(plain: Checkpoint, english: Path):
    digests = [calibration(str(english), plain, samples=4, length=32, seed=s).digest() for s in (0, 1, 2, 1)]
    assert len(set(digests)) == 3 and digests[1] == digests[3]


@pytest.fixture(scope="module")
def framed(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """The tiny model with a tokenizer that begins every text with BOS."""
    return with_frame(tiny, tmp_path_factory.mktemp("bos") / "m", "<s> $A", [("<s>", BOS)])


def with_frame(tiny: Path, out: Path, single: str, specials: list[tuple[str, int]]) -> Checkpoint:
    from tokenizers.processors import TemplateProcessing

    shutil.copytree(tiny, out)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=single, special_tokens=specials)
    tokenizer.save_pretrained(out)
    return containers.open(out)


def jsonl(path: Path, lines: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_every_window_begins_with_bos_where_the_tokenizer_puts_it(framed: Checkpoint, english: Path):
    found = ids(calibration(english, framed, samples=4, length=32).batches)
    whole = tokenizer_of(framed)(english.read_text(), add_special_tokens=False, verbose=False)["input_ids"]
    windows = len(whole) // 31
    assert found.tolist() == [[BOS] + whole[i * windows // 4 * 31:][:31] for i in range(4)]


def test_windows_of_an_encoder_are_framed_on_both_sides(tiny: Path, tmp_path: Path, english: Path):
    """As BERT's [CLS] … [SEP]: tokens 1 and 2 here."""
    source = with_frame(tiny, tmp_path / "m", "<s> $A </s>", [("<s>", BOS), ("</s>", EOS)])
    assert frame(tokenizer_of(source)) == ([BOS], [EOS])
    found = ids(calibration(english, source, samples=3, length=16).batches)
    assert found[:, 0].tolist() == [BOS] * 3 and found[:, -1].tolist() == [EOS] * 3
    assert not bool(torch.isin(found[:, 1:-1], torch.tensor([BOS, EOS])).any())
    lines = jsonl(tmp_path / "d.jsonl", [{"text": "a" * 5}, {"text": "b" * 7}])
    assert texts(source, calibration(lines, source, samples=1, length=15)) == ["<s>aaaaa</s>bbbbbbb</s>"]


# documents ----------------------------------------------------------------------------------------------------------
def test_documents_are_joined_by_eos_and_bos(plain: Checkpoint, framed: Checkpoint, tmp_path: Path):
    lines = jsonl(tmp_path / "d.jsonl", [{"text": "ab"}, {"text": ""}, {"text": "cd"}, {"text": "xy"}])
    assert texts(plain, calibration(lines, plain, samples=1, length=8)) == ["ab</s>cd</s>xy"]
    assert texts(framed, calibration(lines, framed, samples=1, length=11)) == ["<s>ab</s><s>cd</s><s>xy"]


def test_chats_go_through_the_models_template(plain: Checkpoint, tmp_path: Path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    said = "user: hi\nassistant: yo\n"
    length = 2 * len(tokenizer_of(plain)(said)["input_ids"])
    shared = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "yo"}]
    for name, line in {"m": {"messages": turns}, "c": {"conversations": turns}, "s": {"conversations": shared}}.items():
        found = calibration(jsonl(tmp_path / f"{name}.jsonl", [line, line]), plain, samples=1, length=length)
        assert texts(plain, found) == [2 * said], name


def test_a_template_that_begins_with_bos_does_not_double_it(framed: Checkpoint, tmp_path: Path):
    shutil.copytree(framed.path, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(framed.path)
    tokenizer.chat_template = "<s>{% for m in messages %}{{ m.content }}{% endfor %}</s>"
    tokenizer.save_pretrained(tmp_path / "m")
    source = containers.open(tmp_path / "m")
    line = {"messages": [{"role": "user", "content": "ab"}]}
    found = calibration(jsonl(tmp_path / "d.jsonl", [line, line]), source, samples=1, length=8)
    assert texts(source, found) == ["<s>ab</s><s>ab</s>"]


@pytest.mark.parametrize(("line", "says"), [
    ('{"text": 3}', "text is int, where a string"), ("[1]", "no JSON object"), ("nonsense", "no JSON object"),
    ("[" * 100_000, "no JSON object"), ('{"messages": []}', "text is NoneType")])
def test_a_bad_line_is_named(plain: Checkpoint, tmp_path: Path, line: str, says: str):
    path = tmp_path / "d.jsonl"
    path.write_text('{"text": "ab"}\n' + line + "\n")
    with pytest.raises(FewbitsError, match=f"d.jsonl: at byte 15: {says}"):
        calibration(path, plain, samples=1, length=4)


@pytest.mark.parametrize(("line", "says"), [
    ({"prompt": "a"}, "no text, messages or conversations"), ({"messages": ["a"]}, "no text, messages or"),
    ({"messages": [{"role": "user", "content": "a"}]}, "chat template refuses it: no user here")])
def test_a_bad_chat_is_named(tiny: Path, tmp_path: Path, line: dict[str, object], says: str):
    shutil.copytree(tiny, tmp_path / "m")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    tokenizer.chat_template = "{{ raise_exception('no user here') }}"
    tokenizer.save_pretrained(tmp_path / "m")
    with pytest.raises(FewbitsError, match=f"at byte 0: .*{says}"):
        calibration(jsonl(tmp_path / "d.jsonl", [line]), containers.open(tmp_path / "m"), samples=1, length=4)


def test_chats_need_a_template(tiny: Path, tmp_path: Path):
    shutil.copytree(tiny, tmp_path / "m", ignore=shutil.ignore_patterns("chat_template*"))
    source = containers.open(tmp_path / "m")
    chats = jsonl(tmp_path / "d.jsonl", [{"messages": [{"role": "user", "content": "a"}]}])
    with pytest.raises(FewbitsError, match="no chat template in it"):
        calibration(chats, source, samples=1, length=4)


# large files --------------------------------------------------------------------------------------------------------
def numbered(path: Path, megabytes: int, line: Callable[[int], str]) -> Path:
    with path.open("w") as file:
        for i in range(megabytes * (1 << 20) // len(line(0))):
            file.write(line(i))
    return path


def test_of_a_large_text_only_some_places_are_read(plain: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "LEAST_READ", 1 << 12)
    path = numbered(tmp_path / "large.txt", 8, lambda i: f"é {i:08}\n")
    size = path.stat().st_size
    read: list[int] = []
    excerpts = sources.excerpts

    def counted(*arguments: Any) -> list[str]:
        found = list(excerpts(*arguments))
        read.extend(map(len, found))
        return found

    monkeypatch.setattr(sources, "excerpts", counted)
    found = calibration(path, plain, samples=8, length=64)
    assert 1 << 12 < sum(read) <= 8 * 64 * 16 < size / 500
    numbers = [int(max(re.findall(r"\d+", t), key=len)) for t in texts(plain, found)]
    lines = size // 12
    assert all(abs(n - i * lines / 8) < lines / 100 for i, n in enumerate(numbers)), numbers
    assert found.digest() != calibration(path, plain, samples=8, length=64, seed=1).digest()


def test_of_a_large_jsonl_whole_lines_are_read_and_none_twice(tmp_path: Path):
    path = numbered(tmp_path / "large.jsonl", 1, lambda i: json.dumps({"text": f"{i:08}" * 9}) + "\n")
    lines = path.read_bytes().splitlines()
    for parts, budget in ((4, 4000), (3, 100), (7, len(lines) * 80)):
        found = list(documents.lines(path, budget, parts, 0))
        starts = [at for at, _ in found]
        assert starts == sorted(set(starts)) and len(found) >= parts
        assert all(json.loads(path.read_bytes()[at:].split(b"\n", 1)[0]) == line for at, line in found[:50])
        assert starts[-1] > path.stat().st_size * (parts - 1) / parts - 100
    assert len(list(documents.lines(path, 1 << 21, 5, 0))) == len(lines)


# by name ------------------------------------------------------------------------------------------------------------
@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch):
    """A `datasets` library whose hub holds what a test puts there; keeps how it was called."""
    calls: list[tuple[tuple[object, ...], dict[str, object]]] = []
    rows: dict[str, Iterable[dict[str, str]]] = {}

    def load_dataset(*where: str, **options: object) -> Iterable[dict[str, str]]:
        calls.append((where, options))
        if where[0] not in rows:
            raise ConnectionError(f"Couldn't reach '{where[0]}' on the Hub\nlong story")
        return rows[where[0]]

    module = types.ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return types.SimpleNamespace(calls=calls, rows=rows)


def test_c4_is_read_as_far_as_needed(plain: Checkpoint, hub: types.SimpleNamespace, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sources, "LEAST_READ", 100_000)
    read = []

    def rows() -> Iterator[dict[str, str]]:
        for i in range(10**9):
            read.append(i)
            yield {"text": f"{i} " + "word " * 2000, "url": "u"}

    hub.rows["allenai/c4"] = rows()
    found = calibration("c4", plain, samples=4, length=16)
    assert len(read) == 10  # of 10,002 bytes
    assert hub.calls == [(("allenai/c4",), {"data_files": {"train": "en/c4-train.00000-of-01024.json.gz"},
                                           "split": "train", "streaming": True})]
    assert found.description == "c4, 4 x 16 tokens, seed 0" and len(found.batches) == 4


def test_lines_of_wikitext_are_one_text(plain: Checkpoint, hub: types.SimpleNamespace):
    hub.rows["Salesforce/wikitext"] = [{"text": t} for t in ("", " = A = \n", "", " b c\n")]
    assert texts(plain, calibration("wikitext2", plain, samples=1, length=12)) == [" = A = \n b c"]
    assert hub.calls[0][0] == ("Salesforce/wikitext", "wikitext-2-raw-v1")


def test_a_hub_out_of_reach_is_one_line(plain: Checkpoint, hub: types.SimpleNamespace):
    with pytest.raises(FewbitsError, match="c4: allenai/c4 cannot be read: Couldn't reach .* on the Hub$") as e:
        calibration("c4", plain, samples=1, length=4)
    assert e.value.hint == "give a text file, or self"


def test_without_the_datasets_library(plain: Checkpoint, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(FewbitsError, match="datasets library, which is not installed") as e:
        calibration("wikitext2", plain, samples=1, length=4)
    assert "fewbits[data]" in str(e.value.hint)


# too little, too much -----------------------------------------------------------------------------------------------
def test_less_text_than_asked_is_taken_and_said(plain: Checkpoint, tmp_path: Path):
    path = tmp_path / "t.txt"
    path.write_text("abcdefgh" * 5)
    found = calibration(path, plain, samples=64, length=16)
    assert len(found.batches) == 2 and found.description.endswith("2 x 16 tokens, seed 0")
    assert found.notes == (f"{path} has text for 2 sequences of 16 tokens; 64 were asked",)


def test_sequences_are_no_longer_than_the_model_reads(plain: Checkpoint, english: Path):
    found = calibration(english, plain, samples=1, length=1000)
    assert found.tokens == 256
    assert found.notes == ("sequences of 256 tokens, all that the model reads; 1000 were asked",)


@pytest.mark.parametrize(("name", "data", "says"), [
    ("empty.txt", b"", "0 tokens of text, one sequence needs 8"), ("short.txt", b"abc", "3 tokens of text"),
    ("empty.jsonl", b"\n\n", "0 tokens of text"), ("latin.txt", b"caf\xe9 " * 9, "not UTF-8 at byte 3"),
    ("cut.txt", "caf\u00e9".encode()[:-1], "not UTF-8 at byte 3"), ("list.json", b"[]", "JSON as a whole"),
    ("missing.txt", None, "no such file"), ("missing.jsonl", None, "no such file")])
def test_what_cannot_be_read_is_refused(plain: Checkpoint, tmp_path: Path, name: str, data: bytes | None, says: str):
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(FewbitsError, match=f"{name}: {says}") as e:
        calibration(path, plain, samples=2, length=8)
    assert e.value.hint


def test_a_length_without_room_for_text(framed: Checkpoint, english: Path):
    with pytest.raises(FewbitsError, match="sequences of 1 tokens, 1 of them the tokenizer's own"):
        calibration(english, framed, samples=2, length=1)


# inputs of any model ------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
                                    image_size=8, patch_size=4)
    transformers.ViTForImageClassification(config).save_pretrained(folder)
    return containers.open(folder)


PIXELS = torch.arange(5 * 3 * 8 * 8).view(5, 3, 8, 8) / 960


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_file_of_tensors_gives_a_batch_a_sample(vit: Checkpoint, tmp_path: Path, name: str):
    path = tmp_path / name
    (save_file if name.endswith("s") else torch.save)({"pixel_values": PIXELS.half()}, path)
    found = calibration(path, vit, samples=2, length=512)
    assert [list(b) for b in found.batches] == [["pixel_values"]] * 2
    assert torch.equal(torch.cat([b["pixel_values"] for b in found.batches]), PIXELS.half()[[0, 2]].float())
    assert found.tokens == 0 and found.notes == () and found.description == f"{path}, 2 x pixel_values, seed 0"
    assert calibration(path, vit, samples=9, length=512).notes == (f"{path} has 5 samples; 9 were asked",)


def test_batches_and_calibrations_are_taken_as_they_are(vit: Checkpoint, plain: Checkpoint):
    batches = [{"pixel_values": PIXELS[:2]}, {"pixel_values": PIXELS[2:]}]
    found = calibration(batches, vit, samples=1, length=1)
    assert [b["pixel_values"] is w["pixel_values"] for b, w in zip(found.batches, batches, strict=True)] == [True, True]
    assert calibration(found, plain, samples=7, length=7, seed=7) is found


def test_models_that_read_no_text_say_what_they_read(vit: Checkpoint, english: Path):
    for spec in (english, "c4", "self"):
        with pytest.raises(FewbitsError, match="ViTForImageClassification reads pixel_values: text alone"):
            calibration(spec, vit, samples=1, length=4)


def test_speech_is_calibrated_on_features_and_the_decoders_tokens(tmp_path: Path, english: Path):
    """Two inputs, one of them tokens, which are counted."""
    whisper = Checkpoint(tmp_path, "transformers", {"architectures": ["WhisperForConditionalGeneration"],
                                                    "is_encoder_decoder": True}, {})
    with pytest.raises(FewbitsError, match="reads input_features and the decoder's tokens: text alone"):
        calibration(english, whisper, samples=1, length=4)
    tensors = {"input_features": torch.rand(4, 80, 30), "decoder_input_ids": torch.arange(12).view(4, 3)}
    save_file(tensors, tmp_path / "x.safetensors")
    found = calibration(tmp_path / "x.safetensors", whisper, samples=3, length=4)
    assert [b["decoder_input_ids"].tolist() for b in found.batches] == [[[0, 1, 2]], [[3, 4, 5]], [[6, 7, 8]]]
    assert found.tokens == 9 and found.description.endswith("3 x decoder_input_ids, input_features, seed 0")


@pytest.mark.parametrize(("tensors", "says"), [
    ({"pixel_value": PIXELS}, "pixel_value is no input of ViTForImageClassification"),
    ({"pixel_values": PIXELS, "interpolate_pos_encoding": torch.ones(4)}, "first dimensions are"),
    ({"pixel_values": PIXELS[:0]}, "first dimensions are"), ({}, "first dimensions are"),
    ({"pixel_values": torch.tensor(1.0)}, "first dimensions are"),
    ({"pixel_values": PIXELS / 0}, "pixel_values of batch 0 holds NaN or infinities")])
def test_inputs_that_the_model_cannot_take(vit: Checkpoint, tmp_path: Path, tensors: Any, says: str):
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FewbitsError, match=f"x.safetensors: {says}"):
        calibration(tmp_path / "x.safetensors", vit, samples=9, length=1)


@pytest.mark.parametrize(("batches", "says"), [
    ([], "no batches"), ([{}], "batch 0 is no dictionary"), ([torch.ones(1)], "batch 0 is no dictionary"),
    ([{"pixel_values": [1.0]}], "pixel_values of batch 0 is list, no tensor")])
def test_batches_of_something_else_are_refused(vit: Checkpoint, batches: list[Any], says: str):
    with pytest.raises(FewbitsError, match=says):
        calibration(batches, vit, samples=1, length=1)


def test_a_pickle_that_runs_code_is_refused(vit: Checkpoint, tmp_path: Path):
    torch.save({"pixel_values": PIXELS, "more": Path("x")}, tmp_path / "x.pt")
    with pytest.raises(FewbitsError, match="not a pickle of tensors alone"):
        calibration(tmp_path / "x.pt", vit, samples=1, length=1)


# what a calibration tells -------------------------------------------------------------------------------------------
def test_the_digest_sees_names_types_shapes_and_values():
    base = torch.arange(6).view(2, 3)
    different = [{"a": base}, {"b": base}, {"a": base.int()}, {"a": base.view(3, 2)}, {"a": base + 1},
                 {"a": base, "b": base}]
    digests = {Calibration([batch], "x").digest() for batch in different} | {Calibration([], "x").digest()}
    assert len(digests) == 7
    one, other = {"a": base, "b": base.T}, {"b": base.T, "a": base}
    assert Calibration([one], "x").digest() == Calibration([other], "y").digest()


def test_split_holds_out_the_last_share():
    whole = Calibration([{"input_ids": torch.tensor([[i]])} for i in range(10)], "ten")
    kept, held = whole.split(0.25)
    assert ids(kept.batches)[:, 0].tolist() == list(range(8)) and ids(held.batches)[:, 0].tolist() == [8, 9]
    assert [len(c.batches) for c in whole.split(0.001)] == [9, 1]
    with pytest.raises(FewbitsError, match="cannot be held out"):
        kept.split(0.99)
