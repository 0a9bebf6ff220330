"""Peak anonymous memory of quantizing a 1.1 B model of random weights (2.2 GB in float16), above the imports.

The model is made once. Each recipe runs in a process of its own, which samples RssAnon (mapped files are not in it).
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from inspect import signature
from pathlib import Path
from typing import Any

from common import parser, show

CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632,
          "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 64,
          "vocab_size": 32000, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
          "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "float16", "bos_token_id": 1, "eos_token_id": 2}


def make(folder: Path) -> Path:
    """The random model, written tensor by tensor."""
    import torch

    from fewbits import containers
    from fewbits.checkpoint import Checkpoint, Entry
    from fewbits.codecs.floats import F16
    from fewbits.containers.base import write
    from fewbits.qtensor import QTensor
    from fewbits.recipe import ModelFacts

    out = folder / "random-1.1b"
    if out.exists():
        return out

    def entry(name: str, shape: tuple[int, ...], seed: int) -> Entry:
        def load() -> QTensor:
            draw = torch.Generator().manual_seed(seed)
            weight = torch.randn(F16.matrix(shape), generator=draw) * 0.02
            return QTensor(F16, shape, {"data": weight.half()})
        return Entry(name, shape, F16, load)

    facts = ModelFacts.from_config(CONFIG)
    entries = {f.name: entry(f.name, f.shape, i) for i, f in enumerate(facts.tensors)}
    write(containers.by_name("transformers"), out, Checkpoint(folder / "none", "none", CONFIG, entries, _tokenizer()))
    return out


def _tokenizer() -> dict[str, bytes]:
    """A byte-level tokenizer of 32000 entries, so that the GGUF is complete."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["<unk>", "<s>", "</s>", *letters]
    vocab = {w: i for i, w in enumerate(words + [f"<filler_{i}>" for i in range(32000 - len(words))])}
    tokenizer = Tokenizer(models.BPE(vocab, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
                "unk_token": "<unk>"}
    return {"tokenizer.json": tokenizer.to_str().encode(), "tokenizer_config.json": json.dumps(settings).encode()}


def anonymous_bytes() -> int:
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


def one(model: Path, out: Path, recipe: str, calibration: Path | None = None, samples: int = 8) -> None:
    """Quantize in this process; prints peak bytes above the imports, and seconds."""
    import torch  # noqa: F401
    import transformers  # noqa: F401

    import fewbits.quantizing
    from fewbits.containers.base import remove

    remove(out)
    before, peak, done = anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.01):
            peak = max(peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    began = time.monotonic()
    try:
        options: dict[str, Any] = {"solver": "search"}
        if calibration:
            options = {"solver": "gptq", "calibration": calibration, "samples": samples}
        if "finish" in signature(fewbits.quantizing.quantize).parameters:
            options["finish"] = "off"
        result = fewbits.quantizing.quantize(model, out, recipe, **options)
    finally:
        done.set()
        thread.join()
    print(json.dumps({"above": peak - before, "before": before, "seconds": time.monotonic() - began,
                      "size": result.nbytes}))
    remove(out)


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--recipes", nargs="*", default=["Q4_K_M", "Q8_0", "nf4-dq", "int4-g128", "int8"])
    p.add_argument("--one", nargs=3, metavar=("MODEL", "OUT", "RECIPE"), help="one run, in this process")
    p.add_argument("--calibration", type=Path, help="with --one: a text, and the solver is GPTQ")
    p.add_argument("--samples", type=int, default=8, help="with --one: sequences of 512 tokens")
    args = p.parse_args()
    if args.one:
        one(Path(args.one[0]), Path(args.one[1]), args.one[2], args.calibration, args.samples)
        return
    args.work.mkdir(parents=True, exist_ok=True)
    model = make(args.work)
    rows = []
    for recipe in args.recipes:
        out = args.work / f"memory-{recipe}"
        ran = subprocess.run([sys.executable, __file__, "--one", str(model), str(out), recipe], check=True,
                             capture_output=True, text=True)
        found = json.loads(ran.stdout.splitlines()[-1])
        rows.append([recipe, found["above"] / 2**20, found["before"] / 2**20, found["seconds"], found["size"] / 1e9])
        print(*rows[-1], flush=True)
    show("Quantizing a 1.1 B model: anonymous memory", ["recipe", "peak above imports, MiB", "imports, MiB", "seconds",
                                                        "result, GB"], rows, args.json)




if __name__ == "__main__":
    main()
