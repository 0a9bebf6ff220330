"""llama.cpp's quantizer and its logits; run by the Python that has llama-cpp-python, and knows nothing of fewbits.

    python peer_llama.py quantize JOB.json    model, out, ftype, imatrix (.npz: tensor -> mean squares), pure, embedding
    python peer_llama.py logits JOB.json      model, tokens (lists of equal length), out (.npy, float32)
"""

from __future__ import annotations

import ctypes
import json
import sys
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


if __name__ == "__main__":
    llama_cpp.llama_log_set(quiet := llama_cpp.llama_log_callback(lambda level, text, data: None), None)
    modes = {"quantize": quantize, "logits": logits}
    sys.exit(modes[sys.argv[1]](json.loads(Path(sys.argv[2]).read_text())))
