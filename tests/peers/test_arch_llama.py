"""Every family that goes to GGUF: llama.cpp computes on our file what Transformers computes on its own model."""

from __future__ import annotations

import json
import subprocess

import numpy as np
import pytest
import torch

from fewbits import containers
from fewbits.containers.gguf import Gguf
from tests.arch.models import MODELS, VOCAB, directory, tiny

pytestmark = pytest.mark.peer
TOKENS = 150  # past the sliding windows and one of the original contexts; llama.cpp makes room for 256
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


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name, tmp_path, peer, request):
    python = peer("llama")
    model = tiny(MODELS[name])
    source = containers.open(directory(model, tmp_path / "source", request.getfixturevalue("tiny")))
    containers.write(Gguf(), tmp_path / "m.gguf", source)
    tokens = torch.randint(3, VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1)).tolist()
    subprocess.run([python, "-c", LOGITS, str(tmp_path / "m.gguf"), json.dumps(tokens), str(tmp_path / "out.npy")],
                   check=True, capture_output=True)
    theirs = np.load(tmp_path / "out.npy").astype(np.float64)
    with torch.no_grad():
        ours = model(torch.tensor([tokens])).logits[0].double().numpy()
    assert ours.std() > 0.1
    assert ((ours - theirs) ** 2).sum() / (ours ** 2).sum() <= 1e-6
