"""Tokens of llama.cpp, printed as they come; run by the Python that has llama-cpp-python.

    python peer_first.py MODEL PROMPT COUNT THREADS CONTEXT
"""

from __future__ import annotations

import sys

import llama_cpp

model, prompt, count, threads, context = sys.argv[1:]
llama = llama_cpp.Llama(model, n_ctx=int(context), n_threads=int(threads), n_threads_batch=int(threads), verbose=False)
tokens = llama.tokenize(prompt.encode(), add_bos=True)
for i, token in enumerate(llama.generate(tokens, temp=0.0, repeat_penalty=1.0)):
    print(llama.detokenize([token]).decode(errors="replace"), end="", flush=True)
    if i + 1 == int(count):
        break
