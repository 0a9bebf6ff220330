"""`verify` on sound models, and on copies with one thing broken each: the finding must name it."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from copy import deepcopy as copy_of
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from fewbits import convert, quantize, verify
from fewbits.errors import FewbitsError
from tests.arch.models import MODELS, directory
from tests.arch.models import tiny as tiny_model
from tests.containers.hostile_gguf import HOSTILE

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture
def copy(shared, tmp_path):
    """A model directory that may be broken, with ways to do it."""
    path = tmp_path / "model"
    shutil.copytree(shared("models/stories260k"), path)
    return Broken(path)


class Broken:
    def __init__(self, path: Path):
        self.path = path

    def tensors(self, change) -> Path:
        found = load_file(self.path / "model.safetensors")
        change(found)
        save_file(found, self.path / "model.safetensors", {"format": "pt"})
        return self.path

    def json(self, name: str, **changes) -> Path:
        file = self.path / name
        found = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({k: v for k, v in (found | changes).items() if v != "gone"}))
        return self.path

    def tokenizer(self, change) -> Path:
        file = self.path / "tokenizer.json"
        found = json.loads(file.read_text())
        change(found)
        file.write_text(json.dumps(found))
        return self.path


def said(path, **options) -> list[str]:
    return [str(f) for f in verify(path, **options).findings]


# sound ones -----------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("recipe", ["Q4_0", "Q8_0", "int4-g32-asym", "nf4-dq", "int8", "f16"])
def test_what_is_written_is_sound(recipe, shared, tmp_path):
    out = tmp_path / ("q.gguf" if recipe[0] == "Q" else "q")
    quantize(shared("models/stories260k"), out, recipe, calibration="none")
    got = verify(out)
    assert got.ok and not got.findings and got.tensors == 47
    assert json.loads(json.dumps(got.to_json(), default=str))["ok"] is True
    assert got.sha256 == {f.name: hashlib.sha256(f.read_bytes()).hexdigest()
                          for f in (out.iterdir() if out.is_dir() else [out])}


@pytest.mark.parametrize("name", MODELS)
def test_models_of_every_family_are_sound(name, tmp_path):
    """As Transformers writes them, and in GGUF; only the special ids of some default configurations go too far."""
    config = copy_of(MODELS[name])
    config.bos_token_id = config.eos_token_id = None
    source = directory(tiny_model(config), tmp_path / "model")
    (source / "generation_config.json").unlink(missing_ok=True)
    assert said(source) == []
    convert(source, tmp_path / "model.gguf")
    assert said(tmp_path / "model.gguf") == []


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_errors_and_raise_nothing(name, tmp_path):
    path = tmp_path / "x.gguf"
    path.write_bytes(HOSTILE[name][0])
    got = verify(path)
    assert got.errors >= 1 and not got.ok and len(got.sha256) == 1


def test_progress_reaches_the_end(shared):
    seen = {}
    verify(shared("models/stories260k"), progress=lambda what, done, total: seen.update({what: (done, total)}))
    assert seen.keys() == {"decoding", "hashing"} and all(done == total > 0 for done, total in seen.values())


def test_quick_needs_no_torch(shared):
    code = ("import sys, fewbits; v = fewbits.verify(sys.argv[1], decode=False); "
            "print(v.ok, v.tensors, 'torch' in sys.modules, 'transformers' in sys.modules)")
    done = subprocess.run([sys.executable, "-c", code, shared("models/stories260k")], capture_output=True, text=True)
    assert done.stdout.split() == ["True", "47", "False", "False"], done.stderr


# values ---------------------------------------------------------------------------------------------------------------
def test_values_that_are_not_finite(copy):
    def change(tensors):
        tensors[UP][3, 5:8] = float("nan")
        tensors["model.norm.weight"][0] = float("-inf")
    assert said(copy.tensors(change)) == [f"error: {UP}: 3 of 11008 values are NaN",
                                          "error: model.norm.weight: 1 of 64 values are infinite"]
    assert said(copy.path, decode=False) == []


def test_values_that_are_strange(copy):
    def change(tensors):
        tensors[UP].zero_()
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = -3e8
        tensors["model.norm.weight"].zero_()  # a vector may be
    got = verify(copy.tensors(change))
    assert [str(f) for f in got.findings] == [
        f"warning: {UP}: every value is 0",
        "warning: model.layers.1.mlp.up_proj.weight: its largest value is -3e+08"]
    assert got.ok and (got.errors, got.warnings) == (0, 2)


def test_scales_that_are_not_finite(shared, tmp_path):
    path = tmp_path / "q.gguf"
    quantize(shared("models/stories260k"), path, "Q4_0")
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.0.ffn_up.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset:tensor.data_offset + 2] = np.float16("inf").tobytes()
    data[tensor.data_offset + 18:tensor.data_offset + 20] = np.float16("nan").tobytes()
    path.write_bytes(data)
    changed = next(t for t in gguf.GGUFReader(path).tensors if t.name == tensor.name)
    with np.errstate(invalid="ignore"):
        values = gguf.quants.dequantize(changed.data, gguf.GGMLQuantizationType.Q4_0)
    nan, inf = int(np.isnan(values).sum()), int(np.isinf(values).sum())
    assert said(path) == [f"error: {UP}: {nan} of 11008 values are NaN",
                          f"error: {UP}: {inf} of 11008 values are infinite",
                          f"error: {UP}: 2 of the d values of Q4_0 are NaN or infinite"]


def test_planes_that_are_not_what_the_codec_says(shared):
    from fewbits import containers
    from fewbits.checks import values
    from fewbits.qtensor import QTensor

    entry = containers.open(shared("models/stories260k")).entries[UP]
    for planes, what in (({"data": torch.zeros(172, 63)}, "data is torch.float32 [172, 63]; float32 [172, 64] is"),
                         ({"data": torch.zeros(172, 64).half()}, "data is torch.float16 [172, 64]"),
                         ({"codes": torch.zeros(1)}, "has the parts codes; data are expected")):
        (found,) = values.check(entry.as_(load=lambda planes=planes: QTensor(entry.codec, entry.shape, planes)))
        assert found.level == "error" and what in found.what
    (found,) = values.check(entry.as_(load=lambda: QTensor(entry.codec, (64, 172), {})))
    assert "is F32 [64, 172] once loaded, announced as F32 [172, 64]" in found.what


# structure ------------------------------------------------------------------------------------------------------------
def test_shapes_against_the_configuration(copy):
    assert said(copy.json("config.json", intermediate_size=171), decode=False)[0] == \
        "error: model.layers.0.mlp.down_proj.weight: is [64, 172]; by the configuration it would be [64, 171]"
    assert len(said(copy.path)) == 15, "three matrices of five layers"


def test_tensors_that_are_missing_or_unknown(copy):
    def change(tensors):
        tensors["model.layers.0.mlp.other.weight"] = tensors.pop(UP)
    assert said(copy.tensors(change)) == [f"error: {UP}: is missing",
                                          "warning: model.layers.0.mlp.other.weight: is no tensor of llama"]


def test_a_configuration_without_an_entry(copy):
    assert said(copy.json("config.json", hidden_size="gone"), decode=False) == [
        "error: config.json: no entry 'hidden_size', which LlamaForCausalLM needs"]


def test_files_that_do_not_open(copy, tmp_path):
    file = copy.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    got = verify(copy.path)
    assert not got.ok and got.container == "" and len(got.findings) == 1
    assert "model.safetensors" in got.findings[0].what and len(got.sha256) == 5
    with pytest.raises(FewbitsError, match="no such file"):
        verify(tmp_path / "none")


def test_a_gguf_file_of_an_unknown_family_is_checked_by_its_tensors(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "strange")
    writer.add_tensor("a.weight", np.ones((4, 32), np.float32) * np.arange(32, dtype=np.float32))
    writer.add_tensor("b.weight", np.array([1, np.nan], np.float32))
    writer.add_tensor("ids", np.zeros(4, np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    got = verify(tmp_path / "x.gguf")
    first, second = got.findings
    assert str(first).startswith("warning: x.gguf: only its tensors are checked: general.architecture is 'strange'")
    assert str(second) == "error: b.weight: 1 of 2 values are NaN" and got.tensors == 2
    data = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "x.gguf").write_bytes(data[:-30])
    got = verify(tmp_path / "x.gguf")
    assert got.errors == 1 and got.tensors == 0


def test_a_gguf_file_that_lacks_a_tensor_is_an_error(shared, tmp_path):
    path = tmp_path / "q.gguf"
    quantize(shared("models/stories260k"), path, "Q8_0")
    data = path.read_bytes()
    path.write_bytes(data.replace(b"blk.0.ffn_up.weight", b"blk.0.ffn_xx.weight"))
    got = verify(path)
    assert [f.level for f in got.findings] == ["error"] and "ffn_xx" in got.findings[0].what and got.tensors == 47


# vocabulary -----------------------------------------------------------------------------------------------------------
def test_more_tokens_than_rows(copy):
    def change(tokenizer):
        tokenizer["added_tokens"].append({"id": 512, "content": "<new>", "special": True})
    assert said(copy.tokenizer(change), decode=False) == [
        "error: tokenizer.json: ids go up to 512; the embedding has 512 rows"]


def test_one_id_for_two_tokens(copy):
    def change(tokenizer):
        tokenizer["added_tokens"].append({"id": 7, "content": "<new>", "special": True})
    (found,) = said(copy.tokenizer(change), decode=False)
    assert found.startswith("error: tokenizer: is damaged: ValueError: id 7 is ") and "<new>" in found


@pytest.mark.parametrize(("file", "changes", "finding"), [
    ("config.json", {"vocab_size": 500}, "error: config.json: vocab_size is 500; the embedding has 512 rows"),
    ("config.json", {"eos_token_id": [2, 512]}, "error: config.json: eos_token_id is 512; ids go from 0 to 511"),
    ("config.json", {"pad_token_id": -1}, "error: config.json: pad_token_id is -1; ids go from 0 to 511"),
    ("generation_config.json", {"bos_token_id": "1"}, "error: generation_config.json: bos_token_id is '1'"),
    ("tokenizer_config.json", {"pad_token": "<pad>"},
     "error: tokenizer_config.json: pad_token is '<pad>', which tokenizer.json does not have"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"1": {"content": "<x>"}}},
     "error: tokenizer_config.json: token 1 is '<x>'; in tokenizer.json it is '<s>'")])
def test_special_tokens(copy, file, changes, finding):
    found = said(copy.json(file, **changes), decode=False)
    assert any(f.startswith(finding) for f in found), found


def test_tokenizers_of_other_kinds(copy):
    (copy.path / "tokenizer.json").write_text("{")
    assert said(copy.path, decode=False)[0].startswith("error: tokenizer: is damaged: JSONDecodeError")
    (copy.path / "tokenizer.json").unlink()
    (copy.path / "vocab.json").write_text(json.dumps({f"t{i}": i for i in range(600)}))
    assert said(copy.path, decode=False)[0] == "error: vocab.json: ids go up to 599; the embedding has 512 rows"
    (copy.path / "vocab.json").unlink()
    (copy.path / "tokenizer.model").write_bytes(b"".join(b"\x0a\x03\x0a\x01" + bytes([c]) for c in range(65, 70)))
    (copy.path / "added_tokens.json").write_text(json.dumps({"<x>": 513}))
    assert said(copy.path, decode=False)[0] == "error: tokenizer.model: ids go up to 513; the embedding has 512 rows"


# checksums ------------------------------------------------------------------------------------------------------------
def test_checksums_are_sha256sums(copy):
    file = copy.path / "SHA256SUMS"
    assert verify(copy.path, decode=False, checksum_file=file).ok
    assert len(file.read_text().splitlines()) == 5
    if shutil.which("sha256sum"):
        done = subprocess.run(["sha256sum", "-c", "--strict", file.name], cwd=copy.path, capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout.count(": OK") == 5
    assert said(copy.path, against=file, decode=False) == []
    copy.json("generation_config.json", top_k=1)
    (copy.path / "new.txt").write_text("new")
    (copy.path / "tokenizer_config.json").unlink()
    assert [f[:45] for f in said(copy.path, against=file, decode=False)] == [
        "error: generation_config.json: has the checks", "warning: new.txt: is not in the list of check",
        "error: tokenizer_config.json: is in the list "]


def test_lists_of_others(copy, tmp_path):
    digest = hashlib.sha256((copy.path / "config.json").read_bytes()).hexdigest()
    (tmp_path / "list").write_text(f"# a comment\n\n{digest.upper()} *./model/config.json\n")
    found = verify(copy.path, against=tmp_path / "list", decode=False)
    assert found.ok and found.warnings == 4
    (tmp_path / "list").write_text("no list\n")
    with pytest.raises(FewbitsError, match="line 1 is no checksum: 'no list'"):
        verify(copy.path, against=tmp_path / "list")
    with pytest.raises(FewbitsError, match="cannot be read"):
        verify(copy.path, against=tmp_path / "none")


def test_checksums_of_gguf_tensors(shared, tmp_path):
    path, file = tmp_path / "q.gguf", tmp_path / "sums"
    quantize(shared("models/stories260k"), path, "Q8_0")
    got = verify(path, checksum_file=file)
    theirs = {f"q.gguf:{t.name}": hashlib.sha256(t.data.tobytes()).hexdigest() for t in gguf.GGUFReader(path).tensors}
    assert got.tensor_sha256 == theirs and got.ok
    tensor = next(t for t in gguf.GGUFReader(path).tensors if t.name == "blk.1.attn_q.weight")
    data = bytearray(path.read_bytes())
    data[tensor.data_offset + 5] ^= 1
    path.write_bytes(data)
    assert [f.split(" has ")[0] for f in said(path, against=file)] == ["error: q.gguf:",
                                                                       "error: q.gguf:blk.1.attn_q.weight:"]


# whatever is in the files ---------------------------------------------------------------------------------------------
ODD = st.sampled_from([None, True, -1, 0, 1, 7.5, 1 << 40, "", "x", [], [1], ["a"], {}, {"a": 1}, [{"id": 1}]])
FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@FUZZ
@given(data=st.data())
def test_odd_values_in_json_raise_nothing(shared, data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        shutil.copytree(shared("models/stories260k"), path)
        name = data.draw(st.sampled_from(["config.json", "tokenizer.json", "tokenizer_config.json",
                                          "generation_config.json"]))
        found = json.loads((path / name).read_text())
        place = found
        while True:
            keys = list(place) if isinstance(place, dict) else range(len(place))
            key = data.draw(st.sampled_from(sorted(keys)))
            if not (isinstance(place[key], (dict, list)) and place[key] and data.draw(st.booleans())):
                break
            place = place[key]
        place[key] = data.draw(ODD)
        (path / name).write_text(json.dumps(found))
        verify(path, decode=False)


@FUZZ
@given(at=st.integers(0, 30_000), byte=st.integers(0, 255))
def test_changed_bytes_raise_nothing(small_gguf, at, byte):
    path, good = small_gguf
    changed = bytearray(good)
    changed[at % len(good)] = byte
    path.write_bytes(changed)
    verify(path)


@pytest.fixture(scope="module")
def small_gguf(tmp_path_factory, shared):
    path = tmp_path_factory.mktemp("fuzz") / "q.gguf"
    quantize(shared("models/stories260k"), path, "Q4_0")
    return path, path.read_bytes()
