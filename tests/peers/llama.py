"""What llama.cpp computes on a file, in a process of its own Python."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path

import numpy as np

LOGITS = """
import json, sys
import numpy as np
from llama_cpp import Llama
path, tokens, out = sys.argv[1:]
tokens = json.loads(tokens)
llama = Llama(path, n_ctx=len(tokens), n_batch=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, n_threads=1,
              n_threads_batch=1, verbose=False)
llama.eval(tokens)
np.save(out, llama.scores[:len(tokens)])
"""


def logits(python: str, path: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits `[tokens, vocabulary]` in float64, of one thread and a float32 cache."""
    out = path.with_suffix(".npy")
    subprocess.run([python, "-c", LOGITS, str(path), json.dumps(list(tokens)), str(out)], check=True,
                   capture_output=True)
    return np.load(out).astype(np.float64)
