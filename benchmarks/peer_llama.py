"""llama.cpp's quantizer and its logits; run by the Python that has llama-cpp-python, and knows nothing of fewbits.

    python peer_llama.py quantize JOB.json    model, out, ftype, imatrix (.npz: tensor -> mean squares), pure, embedding
    python peer_llama.py logits JOB.json      model, tokens (lists of equal length), out (.npy, float32)
    python peer_llama.py speed JOB.json       model, threads, prompt, before, decoded (counts of tokens), found (.json)
    python peer_llama.py batch JOB.json       the same without prompt; sequences: how many are decoded at once
"""

from __future__ import annotations

import ctypes
import json
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np


def quantize(job: dict[str, Any]) -> int:
    """`embedding`, a ggml type's number, sets the type of the token embedding; -1 leaves it to the mix."""
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.pure, params.nthread = job["ftype"], job["pure"], 1
    if job["embedding"] >= 0:
        params.token_embedding_type = params.output_tensor_type = job["embedding"]
    if job["imatrix"]:
        rows = []
        with np.load(job["imatrix"]) as found:
            for name in found.files:
                values = np.ascontiguousarray(found[name], np.float32)
                rows.append(llama_cpp.llama_model_imatrix_data(
                    name=name.encode(), size=values.size, data=(ctypes.c_float * values.size)(*values.tolist())))
        rows.append(llama_cpp.llama_model_imatrix_data())  # ends the list
        params.imatrix = (llama_cpp.llama_model_imatrix_data * len(rows))(*rows)
    return int(llama_cpp.llama_model_quantize(job["model"].encode(), job["out"].encode(), ctypes.byref(params)))


def logits(job: dict[str, Any]) -> int:
    """One thread, a float32 cache, no flash attention."""
    tokens = job["tokens"]
    length = len(tokens[0])
    llama = llama_cpp.Llama(job["model"], n_ctx=length, n_batch=length, logits_all=True, type_k=0, type_v=0,
                            flash_attn=False, n_threads=1, n_threads_batch=1, verbose=False)
    out = np.lib.format.open_memmap(job["out"], "w+", np.float32, (len(tokens), length, llama.n_vocab()))
    for i, window in enumerate(tokens):
        llama.reset()
        llama.eval(window)
        out[i] = llama.scores[:length]
    return 0


def speed(job: dict[str, Any]) -> int:
    """Seconds of a prompt, and of decoding after a few tokens; the better of flash attention and not."""
    most = max(job["prompt"], job["before"])
    tokens = [i % 1000 + 100 for i in range(most)]
    best: dict[str, float] = {}
    for flash in (False, True):
        model = llama_cpp.Llama(job["model"], n_ctx=most + job["decoded"], n_batch=most,
                                n_threads=job["threads"], n_threads_batch=job["threads"], flash_attn=flash,
                                logits_all=False, verbose=False)
        model.eval(tokens[:job["before"]])
        model.reset()
        start = time.perf_counter()
        model.eval(tokens[:job["prompt"]])
        found = {"prompt": time.perf_counter() - start}
        model.reset()
        model.eval(tokens[:job["before"]])
        vocabulary, token = model.n_vocab(), 1
        start = time.perf_counter()
        for _ in range(job["decoded"]):
            model.eval([token])
            logits = llama_cpp.llama_get_logits_ith(model.ctx, -1)
            token = int(np.ctypeslib.as_array(logits, (vocabulary,)).argmax())
        found["decode"] = time.perf_counter() - start
        best = {k: min(v, best.get(k, v)) for k, v in found.items()}
    Path(job["found"]).write_text(json.dumps(best))
    return 0


def batch(job: dict[str, Any]) -> int:
    """Seconds of decoding several sequences, a token of each in a call; the better of flash attention and not."""
    count, before = job["sequences"], job["before"]
    wanted = llama_cpp.llama_model_default_params()
    model = llama_cpp.llama_model_load_from_file(job["model"].encode(), wanted)
    vocabulary = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    taken = []
    for flash in (0, 1):
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = count * max(256, before + job["decoded"]), count
        params.n_threads = params.n_threads_batch = job["threads"]
        params.flash_attn_type = flash
        context = llama_cpp.llama_init_from_model(model, params)
        tokens = llama_cpp.llama_batch_init(count * before, 0, 1)

        def decode(items: list[tuple[int, int, int, bool]], context: Any = context, tokens: Any = tokens) -> None:
            tokens.n_tokens = len(items)
            for i, (token, position, sequence, last) in enumerate(items):
                tokens.token[i], tokens.pos[i], tokens.logits[i] = token, position, last
                tokens.n_seq_id[i], tokens.seq_id[i][0] = 1, sequence
            if llama_cpp.llama_decode(context, tokens):
                raise RuntimeError("llama_decode failed")

        decode([(100 + k + p, p, k, p == before - 1) for k in range(count) for p in range(before)])
        chosen = [1] * count
        start = time.perf_counter()
        for step in range(job["decoded"]):
            decode([(token, before + step, k, True) for k, token in enumerate(chosen)])
            chosen = [int(np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(context, k), (vocabulary,)).argmax())
                      for k in range(count)]
        taken.append(time.perf_counter() - start)
        llama_cpp.llama_batch_free(tokens)
        llama_cpp.llama_free(context)
    Path(job["found"]).write_text(json.dumps({"decode": min(taken)}))
    return 0


if __name__ == "__main__":
    llama_cpp.llama_log_set(quiet := llama_cpp.llama_log_callback(lambda level, text, data: None), None)
    modes = {"quantize": quantize, "logits": logits, "speed": speed, "batch": batch}
    sys.exit(modes[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text())))
