"""Peak anonymous memory of loading a 1.1 B model of random weights (2.2 GB in float16) in few bits, above the imports.

The model is made once. Each way of loading runs in a process of its own, which samples what is resident until the first
token was computed: anonymous memory, and with it the pages of mapped files, which the system takes back when it needs
them. Transformers computes with a model in 16 bits on the mapped file.
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
from memory import make

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


def resident_bytes() -> dict[str, int]:
    """Anonymous memory, and all."""
    with open("/proc/self/status") as status:
        found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in status if line.startswith("Rss")}
    return {"anonymous": found["RssAnon"], "all": found["RssAnon"] + found["RssFile"]}


def one(way: str, model: Path, recipe: str) -> None:
    """Load in this process; prints bytes above the imports, at the peak and after loading, and seconds."""
    import torch
    import transformers

    import fewbits.hf
    import fewbits.loading  # noqa: F401

    _ = transformers.AutoModelForCausalLM, transformers.LlamaForCausalLM  # their modules, too
    warnings.simplefilter("ignore")
    before, done = resident_bytes(), threading.Event()
    peak = dict(before)

    def watch() -> None:
        while not done.wait(0.005):
            now = resident_bytes()
            peak.update({k: max(v, now[k]) for k, v in peak.items()})

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        net = loaded(way, model, recipe)
        seconds, held = time.monotonic() - began, resident_bytes()
        with torch.inference_mode():
            assert torch.isfinite(net(input_ids=torch.arange(8)[None]).logits).all()
    finally:
        done.set()
        thread.join()
    print(json.dumps({"peak": peak["anonymous"] - before["anonymous"], "all": peak["all"] - before["all"],
                      "held": held["anonymous"] - before["anonymous"], "seconds": seconds}))


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
            rows.append([way.split(",")[0], "float16" if plain else recipe, found["peak"] / 1e9, found["held"] / 1e9,
                         found["all"] / 1e9, found["seconds"]])
            print(*rows[-1], flush=True)
    show("Loading a 1.1 B model of 2.2 GB: memory above the imports, GB",
         ["way", "recipe", "anonymous, at the peak", "anonymous, after loading", "with pages of files, at the peak",
          "seconds"], rows, args.json)


if __name__ == "__main__":
    main()
