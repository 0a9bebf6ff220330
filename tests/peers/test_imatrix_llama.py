"""Our importance matrices against llama.cpp's own inputs: every product that it computes is looked at as it happens."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

from fewbits import containers, imatrix
from fewbits.calibration import sources
from fewbits.containers.gguf import Gguf
from tests.arch.models import MODELS, VOCAB, directory, tiny

pytestmark = pytest.mark.peer
TOKENS = 150  # past one of the original contexts; llama.cpp makes room for 256
# what llama-imatrix sums: rows of the right side of MUL_MAT and MUL_MAT_ID, by the name of the left side
WATCH = """
import ctypes, glob, json, os, sys
import llama_cpp
import numpy as np
from llama_cpp import llama_cpp as L
path, out, batches = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
base = ctypes.CDLL(glob.glob(os.path.dirname(llama_cpp.__file__) + "/lib/libggml-base.so*")[0])

class Tensor(ctypes.Structure): pass
P = ctypes.POINTER(Tensor)
Tensor._fields_ = [("type", ctypes.c_int), ("buffer", ctypes.c_void_p), ("ne", ctypes.c_int64 * 4),
    ("nb", ctypes.c_size_t * 4), ("op", ctypes.c_int), ("op_params", ctypes.c_int32 * 16), ("flags", ctypes.c_int32),
    ("src", P * 10), ("view_src", P), ("view_offs", ctypes.c_size_t), ("data", ctypes.c_void_p),
    ("name", ctypes.c_char * 64)]
base.ggml_op_desc.restype, base.ggml_op_desc.argtypes = ctypes.c_char_p, [P]
sums, counts = {}, {}

def array(t, dtype):
    shape, strides = list(t.ne)[::-1], list(t.nb)[::-1]
    raw = ctypes.string_at(t.data, sum((n - 1) * s for n, s in zip(shape, strides)) + 4)
    return np.lib.stride_tricks.as_strided(np.frombuffer(raw, dtype), shape, strides)

@L.ggml_backend_sched_eval_callback
def watch(pointer, ask, data):
    t = ctypes.cast(pointer, P)
    op = base.ggml_op_desc(t)
    if op not in (b"MUL_MAT", b"MUL_MAT_ID"):
        return not ask
    left, right = t.contents.src[0].contents, t.contents.src[1].contents
    name = left.name.decode()
    if not name.endswith(".weight"):
        return not ask
    if ask:
        return True
    x = array(right, np.float32).astype(np.float64)[0] ** 2
    if op == b"MUL_MAT":
        total, seen = x.sum((0, 1))[None], [x.shape[0] * x.shape[1]]
    else:
        ids = array(t.contents.src[2].contents, np.int32)[0, 0]  # [tokens, used]
        total, seen = np.zeros((left.ne[2], x.shape[-1])), [0] * left.ne[2]
        for token, experts in enumerate(ids):
            for place, expert in enumerate(experts):
                total[expert] += x[token, place % x.shape[1]]
                seen[expert] += 1
    sums[name] = sums.get(name, 0) + total
    counts[name] = counts.get(name, 0) + np.array(seen)
    return True

quiet = L.llama_log_callback(lambda level, text, data: None)
L.llama_log_set(quiet, None)
L.llama_backend_init()
model = L.llama_model_load_from_file(path.encode(), L.llama_model_default_params())
settings = L.llama_context_default_params()
settings.n_ctx = settings.n_batch = settings.n_ubatch = 256
settings.n_threads = settings.n_threads_batch = 1
settings.flash_attn_type, settings.type_k, settings.type_v = 0, 0, 0
settings.cb_eval = watch
context = L.llama_init_from_model(model, settings)
for tokens in batches:
    L.llama_memory_clear(L.llama_get_memory(context), True)
    batch = L.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0], batch.logits[i] = token, i, 1, 0, 1
    assert L.llama_decode(context, batch) == 0
np.savez(out, **{n + ".sums": v for n, v in sums.items()}, **{n + ".counts": v for n, v in counts.items()})
"""


@pytest.mark.parametrize("name", MODELS)
def test_collects_what_llama_cpp_computes_on(name: str, tmp_path: Path, peer, request) -> None:
    folder = directory(tiny(MODELS[name]), tmp_path / "source", request.getfixturevalue("tiny"))
    source = containers.open(folder)
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    tokens = torch.randint(3, VOCAB, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    subprocess.run([peer("llama"), "-c", WATCH, str(tmp_path / "m.gguf"), str(tmp_path / "theirs.npz"),
                    json.dumps(tokens.tolist())], check=True, capture_output=True)
    theirs = np.load(tmp_path / "theirs.npz")
    text = sources.Calibration([{"input_ids": row[None]} for row in tokens], "random")
    ours = imatrix.collect(source, text, head=True)
    names = {n.removesuffix(".sums") for n in theirs if n.endswith(".sums")}
    # a tied head, which llama-imatrix leaves out too, and routers, which stay in floats
    names = {n for n in names if n != "token_embd.weight" and "ffn_gate_inp" not in n}
    assert ours.entries.keys() == names
    for tensor, sums in ours.entries.items():
        assert sums.counts.tolist() == theirs[tensor + ".counts"].tolist(), tensor
        wanted = theirs[tensor + ".sums"]
        assert np.abs(sums.sums - wanted).max() <= 2e-3 * wanted.max(), tensor
