"""Peak anonymous memory of loading a 1.1 B model of random weights (2.2 GB in float16) in few bits, above the imports.

The model is made once. Each way of loading runs in a process of its own, which samples RssAnon (mapped files are not in
it) until the first token was computed.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path
from typing import Any

from common import parser, show
from memory import anonymous_bytes, make

WAYS = ("fewbits.load", "from_pretrained", "from_pretrained, float16")


def loaded(way: str, model: Path, recipe: str) -> Any:
    import torch
    import transformers

    import fewbits

    if way == "fewbits.load":
        return fewbits.load(model, recipe=recipe)
    kind = transformers.AutoModelForCausalLM
    if way == "from_pretrained, float16":
        return kind.from_pretrained(model, dtype=torch.float16)
    return kind.from_pretrained(model, quantization_config=fewbits.FewbitsConfig(recipe), device_map="auto")


def one(way: str, model: Path, recipe: str) -> None:
    """Load in this process; prints bytes above the imports, at the peak and afterwards, and seconds."""
    import torch
    import transformers

    import fewbits.hf
    import fewbits.loading  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # their modules, too
    warnings.simplefilter("ignore")
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.005):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        net = loaded(way, model, recipe)
        seconds, held = time.monotonic() - began, anonymous_bytes()
        with torch.inference_mode():
            assert torch.isfinite(net(input_ids=torch.arange(8)[None]).logits).all()
    finally:
        done.set()
        thread.join()
    print(json.dumps({"peak": peak - before, "held": held - before, "seconds": seconds, "imports": before}))


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--recipes", nargs="*", default=["nf4", "int4-g128", "Q4_K_M", "int8"])
    p.add_argument("--one", nargs=3, metavar=("WAY", "MODEL", "RECIPE"), help="one run, in this process")
    args = p.parse_args()
    if args.one:
        one(args.one[0], Path(args.one[1]), args.one[2])
        return
    args.work.mkdir(parents=True, exist_ok=True)
    model = make(args.work)
    rows = []
    for recipe in args.recipes:
        for way in WAYS:
            plain = way == WAYS[-1]
            if plain and recipe != args.recipes[0]:
                continue
            ran = subprocess.run([sys.executable, __file__, "--one", way, str(model), recipe], check=True,
                                 capture_output=True, text=True)
            found = json.loads(ran.stdout.splitlines()[-1])
            rows.append([way, "float16" if plain else recipe, found["peak"] / 1e9, found["held"] / 1e9,
                         found["seconds"], found["imports"] / 1e9])
            print(*rows[-1], flush=True)
    show("Loading a 1.1 B model of 2.2 GB: anonymous memory", ["way", "recipe", "peak above imports, GB",
                                                               "held after loading, GB", "seconds", "imports, GB"],
         rows, args.json)


if __name__ == "__main__":
    main()
