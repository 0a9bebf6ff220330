"""Files of the time before GGUF, written here from the layout's description: values, facts, tokenizer, lies."""

from __future__ import annotations

import struct
from functools import partial

import gguf
import numpy as np
import pytest
import torch
import transformers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from fewbits import containers
from fewbits.containers import ggml_legacy, gguf_file
from fewbits.containers.gguf import Gguf
from fewbits.converting import convert
from fewbits.errors import FewbitsError

WIDTH, HEADS, KEYS, MLP, LAYERS, WORDS = 64, 4, 2, 96, 2, 300
LAYOUTS = {"ggml": b"lmgg", "ggmf 1": b"fmgg\1\0\0\0", "ggjt 1": b"tjgg\1\0\0\0", "ggjt 2": b"tjgg\2\0\0\0",
           "ggjt 3": b"tjgg\3\0\0\0"}
TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q4_2": 4, "Q4_3": 5, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12,
         "Q6_K": 14}
OLD = {"tok_embeddings": "model.embed_tokens", "norm": "model.norm", "output": "lm_head"} | {
    f"layers.{i}.{old}": f"model.layers.{i}.{new}" for i in range(LAYERS) for old, new in {
        "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
        "attention.wo": "self_attn.o_proj", "attention_norm": "input_layernorm", "feed_forward.w1": "mlp.gate_proj",
        "feed_forward.w2": "mlp.down_proj", "feed_forward.w3": "mlp.up_proj",
        "ffn_norm": "post_attention_layernorm"}.items()}


def u32(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def words() -> list[tuple[bytes, float]]:
    """Tokens of a little SentencePiece model: unknown, two ends, bytes, letters and what they make."""
    pieces = [" t", "he", " the", "in", "er", "é", *"abcdefghijklmnopqrstuvwxyz "]
    found = [(" \u2047 ".encode(), 0.0), (b"", 0.0), (b"", 0.0), *((bytes([i]), 0.0) for i in range(256))]
    return found + [(p.encode(), -float(i)) for i, p in enumerate(pieces)] + [
        (f"w{i}".encode(), -float(len(pieces) + i)) for i in range(WORDS - 259 - len(pieces))]


def model() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=WORDS, hidden_size=WIDTH, intermediate_size=MLP, rms_norm_eps=1e-6,
                                      num_hidden_layers=LAYERS, num_attention_heads=HEADS, num_key_value_heads=KEYS,
                                      initializer_range=0.15)
    return transformers.LlamaForCausalLM(config).eval()


def meta_rows(name: str, w: torch.Tensor) -> torch.Tensor:
    """Meta's order of rows: a rotary pair side by side, where Transformers has it half a head apart."""
    heads = HEADS if "wq" in name else KEYS
    if not name.endswith(("wq", "wk")):
        return w
    half = w.shape[0] // heads // 2
    return w[[h * 2 * half + i + side * half for h in range(heads) for i in range(half) for side in (0, 1)]]


def nibbles(q: np.ndarray, pairs: bool) -> np.ndarray:
    low, high = (q[:, ::2], q[:, 1::2]) if pairs else (q[:, :q.shape[1] // 2], q[:, q.shape[1] // 2:])
    return ((low & 15) | (high & 15) << 4).astype(np.uint8)


def old_blocks(kind: str, version: int, w: np.ndarray) -> tuple[bytes, np.ndarray]:
    """Blocks as the C structs of the time were, and the values they decode to."""
    size = 16 if kind in ("Q4_2", "Q4_3") else 32
    wide = np.float32 if kind in ("Q4_0", "Q4_1", "Q8_0") else np.float16
    x = w.reshape(-1, size).astype(np.float32)
    if kind == "Q8_0":
        d = (np.abs(x).max(1, keepdims=True) / 127).astype(wide)
        q = np.rint(x / d).astype(np.int8)
        return np.concatenate([d.view(np.uint8), q.view(np.uint8)], 1).tobytes(), (q * d).reshape(w.shape)
    top = 31 if kind.startswith("Q5") else 15
    if kind in ("Q4_1", "Q4_3", "Q5_1"):
        m = x.min(1, keepdims=True).astype(wide)
        d = ((x.max(1, keepdims=True) - m) / top).astype(wide)
        q = np.clip(np.rint((x - m) / d), 0, top).astype(np.uint8)
        fields, values = [d.view(np.uint8), m.view(np.uint8)], q * d.astype(np.float32) + m.astype(np.float32)
    else:
        d = (np.abs(x).max(1, keepdims=True) / (top // 2)).astype(wide)
        q = np.clip(np.rint(x / d) + top // 2 + 1, 0, top).astype(np.uint8)
        fields, values = [d.view(np.uint8)], (q.astype(np.float32) - top // 2 - 1) * d.astype(np.float32)
    if top == 31:
        fields.append(np.packbits(q >> 4, axis=1, bitorder="little"))
    blocks = np.concatenate([*fields, nibbles(q, pairs=version == 1)], 1)
    return blocks.tobytes(), values.reshape(w.shape)


def encoded(layout: str, kind: str, w: torch.Tensor) -> tuple[str, bytes, np.ndarray]:
    """Type, bytes and decoded values of one tensor."""
    values, version = w.numpy(), int(layout[-1]) if layout.startswith("ggjt") else 1
    if w.ndim == 1 or kind == "F32":
        return "F32", values.astype(np.float32).tobytes(), values
    if kind == "F16":
        return kind, values.astype(np.float16).tobytes(), values.astype(np.float16).astype(np.float32)
    if version == 1 or (version == 2 and kind in ("Q4_0", "Q4_1", "Q8_0")):
        return kind, *old_blocks(kind, version, values)
    blocks = gguf.quants.quantize(values, gguf.GGMLQuantizationType[kind])
    return kind, blocks.tobytes(), gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])


def write(path, layout: str, kind: str, source: transformers.LlamaForCausalLM) -> dict[str, torch.Tensor]:
    """Write a whole file; what its weights decode to, by their Transformers names."""
    raw = LAYOUTS[layout] + u32(WORDS, WIDTH, 256, HEADS, LAYERS, WIDTH // HEADS, TYPES[kind])
    for token, score in words():
        raw += u32(len(token)) + token + (b"" if layout == "ggml" else struct.pack("<f", score))
    state, wanted = source.state_dict(), {}
    for old, new in OLD.items():
        w = meta_rows(old, state[f"{new}.weight"])
        name, data, values = encoded(layout, kind, w)
        text = f"{old}.weight".encode()
        raw += u32(w.ndim, len(text), TYPES[name], *w.shape[::-1]) + text
        raw += (b"\0" * (-len(raw) % 32) if layout.startswith("ggjt") else b"") + data
        back = torch.empty_like(w)
        back[meta_rows(old, torch.arange(len(w)))] = torch.from_numpy(values.reshape(w.shape).copy())
        wanted[f"{new}.weight"] = back
    path.write_bytes(raw)
    return wanted


CASES = [(layout, kind) for layout in LAYOUTS for kind in ("F32", "F16", "Q4_0", "Q4_1")] + [
    ("ggjt 1", "Q4_2"), ("ggjt 1", "Q4_3"), *((f"ggjt {v}", k) for v in (1, 2, 3) for k in ("Q5_0", "Q5_1", "Q8_0"))]


@pytest.mark.parametrize("layout, kind", CASES)
def test_every_layout_and_type_decodes_to_its_values(layout, kind, tmp_path):
    wanted = write(tmp_path / "m.bin", layout, kind, model())
    found = containers.open(tmp_path / "m.bin")
    assert found.container == "ggml" and found.facts["layout"].startswith(layout)
    assert found.entries.keys() == wanted.keys()
    for name, w in wanted.items():
        tensor = found.entries[name].load()
        assert tensor.codec == found.entries[name].codec
        assert torch.equal(tensor.dequantize(), w), name
    assert found.nbytes <= (tmp_path / "m.bin").stat().st_size


def test_types_have_the_numbers_that_ggml_kept():
    kept = {n: label for n, label in ggml_legacy.TYPES.items() if n not in gguf_file.REMOVED}
    assert {n: gguf.GGMLQuantizationType(n).name for n in kept} == kept
    assert {n: gguf_file.REMOVED[n] for n in ggml_legacy.TYPES.keys() - kept.keys()} == {4: "Q4_2", 5: "Q4_3"}


def test_what_the_file_does_not_say_is_established(tmp_path):
    for layout, epsilon in (("ggml", 1e-6), ("ggjt 3", 5e-6)):
        write(tmp_path / "m.bin", layout, "F16", model())
        found = containers.open(tmp_path / "m.bin")
        wanted = {"model_type": "llama", "num_key_value_heads": KEYS, "intermediate_size": MLP, "vocab_size": WORDS,
                  "max_position_embeddings": 2048, "tie_word_embeddings": False, "num_hidden_layers": LAYERS}
        assert {k: found.config[k] for k in wanted} == wanted
        assert found.config["rms_norm_eps"] == pytest.approx(epsilon)
        assert found.facts["assumed"]["context_length"] == 2048


@pytest.mark.parametrize("layout, kind", [("ggml", "F16"), ("ggjt 1", "Q5_1"), ("ggjt 2", "Q5_0"), ("ggjt 3", "Q4_0")])
def test_what_today_can_hold_goes_to_gguf_without_loss(layout, kind, tmp_path):
    wanted = write(tmp_path / "m.bin", layout, kind, model())
    containers.write(Gguf(), tmp_path / "m.gguf", containers.open(tmp_path / "m.bin"))
    types = {t.tensor_type.name for t in gguf.GGUFReader(tmp_path / "m.gguf").tensors}
    assert types == {"F32", kind}
    back = containers.open(tmp_path / "m.gguf")
    assert all(torch.equal(back.entries[k].load().dequantize(), w) for k, w in wanted.items())


def test_wide_scales_have_no_place_in_gguf(tmp_path):
    write(tmp_path / "m.bin", "ggjt 2", "Q4_0", model())
    with pytest.raises(FewbitsError, match="cannot hold .* .Q4_0-ggjt2.: .* not the family 'ggml-old'"):
        containers.write(Gguf(), tmp_path / "m.gguf", containers.open(tmp_path / "m.bin"))
    with pytest.raises(FewbitsError, match="are read, not written"):
        containers.write(containers.by_name("ggml"), tmp_path / "n.bin", containers.open(tmp_path / "m.bin"))


def test_wide_scales_are_rounded_to_the_type_of_today_where_that_is_allowed(tmp_path):
    write(tmp_path / "old.bin", "ggjt 1", "Q4_0", model())
    with pytest.raises(FewbitsError, match="Q4_0-ggjt1 would become Q4_0"):
        convert(tmp_path / "old.bin", tmp_path / "new.gguf")
    found = convert(tmp_path / "old.bin", tmp_path / "new.gguf", lossy=True)
    rounded = [step for step in found.tensors if step.how == "rounded"]
    assert rounded and {step.after for step in rounded} == {"Q4_0"} and max(step.error for step in rounded) < 5e-4


@pytest.mark.parametrize("layout", ["ggml", "ggjt 3"])
def test_the_tokenizer_has_its_kinds_and_scores(layout, tmp_path):
    write(tmp_path / "m.bin", layout, "F16", model())
    files = containers.open(tmp_path / "m.bin").files
    tokenizer = Tokenizer.from_str(files["tokenizer.json"].decode())
    for text in ("the inner", "née", "\n", "日"):
        assert tokenizer.decode(tokenizer.encode(text).ids) == text
    vocabulary = [w.decode(errors="replace").replace(" ", "▁") for w, _ in words()]
    assert tokenizer.encode("the").ids == [1, vocabulary.index("▁the", 259)]
    assert tokenizer.encode("\n", add_special_tokens=False).ids[-1] == 3 + ord("\n")


# files that lie -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def good(tmp_path_factory) -> bytes:
    path = tmp_path_factory.mktemp("good") / "m.bin"
    write(path, "ggjt 3", "Q8_0", model())
    return path.read_bytes()


def patched(at: int, *values: int):
    return lambda raw: raw[:at] + u32(*values) + raw[at + 4 * len(values):]


def swapped(old: bytes, new: bytes):
    return lambda raw: raw.replace(old, new, 1)


def resized(**sizes: int):
    names = ("n_vocab", "n_embd", "n_mult", "n_head", "n_layer", "n_rot", "ftype")
    return lambda raw: raw[:8] + u32(*(sizes.get(n, v) for n, v in zip(names, struct.unpack_from("<7I", raw, 8),
                                                                       strict=True))) + raw[36:]


def head(raw: bytes) -> int:
    """Where the first tensor begins."""
    return raw.index(b"tok_embeddings.weight") - 20


def tensor(at: int, value: int):
    return lambda raw: patched(head(raw) + 4 * at, value)(raw)


HOSTILE = {
    "version 4": (patched(4, 4), "ggjt version 4; 1, 2, 3 can be read"),
    "ggmf 2": (lambda raw: b"fmgg\2\0\0\0" + raw[8:], "ggmf version 2; 1 can be read"),
    "magic alone": (lambda raw: raw[:4], "ends inside version"),
    "a GPT-J": (lambda raw: b"lmgg" + u32(50400, 2048, 4096, 16, 28, 64, 1, 50400) + raw[8:],
                "not the header of a Llama"),
    "no heads": (resized(n_head=0), "not the header of a Llama"),
    "quantization version in ftype": (resized(ftype=2002), "not the header of a Llama"),
    "vocabulary of 2^32 - 1": (resized(n_vocab=2**32 - 1), "n_vocab is 4294967295, more than"),
    "a million tokens": (lambda raw: resized(n_vocab=1 << 20)(raw) + bytes(1 << 24), "n_vocab is 1048576; at most"),
    "one token more": (resized(n_vocab=WORDS + 1), "ends inside|bytes; at most|dimensions and a name"),
    "one token less": (resized(n_vocab=WORDS - 1), "dimensions and a name of"),
    "token of 1 GB": (patched(36, 1 << 30), "token 0 has 1073741824 bytes"),
    "token that is no text": (swapped(b" the", b" th\xff"), "is not valid UTF-8"),
    "score NaN": (lambda raw: raw[:45] + struct.pack("<f", float("nan")) + raw[49:], "299 with a finite score"),
    "no dimensions": (tensor(0, 0), "a tensor has 0 dimensions"),
    "3 dimensions": (tensor(0, 3), "a tensor has 3 dimensions"),
    "name of 2^31": (tensor(1, 1 << 31), "name of 2147483648 bytes"),
    "type 9": (tensor(2, 9), "has the type 9, which ggjt 3 does not have"),
    "type Q4_2": (tensor(2, 4), r"has the type 4 .Q4_2., which ggjt 3 does not have"),
    "width 0": (tensor(3, 0), "impossible shape"),
    "width 2^32 - 1": (tensor(3, 2**32 - 1), "do not divide into blocks|ends at byte"),
    "width 33": (tensor(3, 33), "rows of 33 do not divide into blocks of 32"),
    "embedding of a part": (tensor(3, 32), r"the embedding is|has \d+ dimensions|type"),
    "name not UTF-8": (swapped(b"tok_embeddings", b"\xff\xfek_embeddings"), "name is not valid UTF-8"),
    "another model's name": (swapped(b"tok_embeddings.weight", b"tok_embeddings.weighs"), "the embedding is .0, 0."),
    "name twice": (swapped(b"layers.1.ffn_norm", b"layers.0.ffn_norm"), "'layers.0.ffn_norm.weight' appears twice"),
    "unknown tensor": (swapped(b"layers.1.ffn_norm", b"layers.1.fft_norm"), "has no place in llama"),
    "missing tensor": (resized(n_layer=LAYERS + 1), "'blk.2.attn_k.weight' is missing"),
    "cut short": (lambda raw: raw[:-1], "ends at byte"),
    "trailing bytes": (lambda raw: raw + b"\0" * 5, "ends inside name of a tensor"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_files_are_refused_by_name(name, good, tmp_path):
    change, message = HOSTILE[name]
    (tmp_path / "hostile.bin").write_bytes(change(good))
    with pytest.raises(FewbitsError, match=message) as error:
        containers.open(tmp_path / "hostile.bin")
    assert "hostile.bin" in str(error.value)


def test_every_truncation_is_refused(good, tmp_path):
    path = tmp_path / "cut.bin"
    for size in (*range(4, 400, 3), *range(400, len(good), 1999)):
        path.write_bytes(good[:size])
        with pytest.raises(FewbitsError):
            containers.open(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_a_damaged_file_is_read_or_refused_and_nothing_else(good, tmp_path, data):
    raw, edge = bytearray(good), head(good) + 400
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(4, edge))] = data.draw(st.integers(0, 255))
    (tmp_path / "damaged.bin").write_bytes(raw)
    try:
        found = containers.open(tmp_path / "damaged.bin")
        list(map(partial(found.files.__getitem__), found.files))
    except FewbitsError as error:
        assert "damaged.bin" in str(error)
