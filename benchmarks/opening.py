"""How long does opening a big GGUF file take, and how much of it comes into memory? Beside the gguf package's reader.

    python benchmarks/opening.py [--times 5]

The file is sparse: 300 tensors of a Llama of 8 billion weights and a vocabulary of Llama 3's size, 5.7 GB of which few
are on disk. Each reading is in a process of its own; imports are not counted.
"""

from __future__ import annotations

import json
import random
import statistics
import subprocess
import sys
from pathlib import Path
from string import ascii_lowercase

import numpy as np
from common import parser, show

from fewbits.containers import gguf_file
from fewbits.containers.gguf_file import Spec, Value

LAYERS, WIDTH, MLP, KEYS, TOKENS, MERGES = 33, 4096, 14336, 1024, 128_256, 280_147
LIMIT = 0.1  # seconds

READ = """
import json, os, sys, time
from pathlib import Path
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
path = Path(sys.argv[2])
if sys.argv[1] == "gguf":
    import gguf
    read = gguf.GGUFReader
else:
    from fewbits import containers
    read = containers.open
before, began, worked = resident(), time.perf_counter(), time.process_time()
found = read(path)
seconds, work = time.perf_counter() - began, time.process_time() - worked
count = len(found.tensors if sys.argv[1] == "gguf" else found.entries)
print(json.dumps([seconds, work, resident() - before, count]))
"""


def specs() -> list[Spec]:
    layer = {"attn_norm": (WIDTH,), "attn_q": (WIDTH, WIDTH), "attn_k": (KEYS, WIDTH), "attn_v": (KEYS, WIDTH),
             "attn_output": (WIDTH, WIDTH), "ffn_norm": (WIDTH,), "ffn_gate": (MLP, WIDTH), "ffn_up": (MLP, WIDTH),
             "ffn_down": (WIDTH, MLP)}
    shapes = {"token_embd.weight": (TOKENS, WIDTH), "output_norm.weight": (WIDTH,), "output.weight": (TOKENS, WIDTH)}
    shapes |= {f"blk.{i}.{name}.weight": shape for i in range(LAYERS) for name, shape in layer.items()}
    return [Spec(name, shape, "Q5_K" if len(shape) > 1 else "F32") for name, shape in shapes.items()]


def metadata() -> dict[str, Value]:
    rng = random.Random(0)

    def word() -> str:
        return "".join(rng.choices(ascii_lowercase, k=rng.randint(1, 12)))

    numbers = {"context_length": 8192, "embedding_length": WIDTH, "block_count": LAYERS, "feed_forward_length": MLP,
               "attention.head_count": WIDTH // 128, "attention.head_count_kv": KEYS // 128,
               "rope.dimension_count": 128}
    return {"general.architecture": Value("STRING", "llama"),
            **{f"llama.{k}": Value("UINT32", v) for k, v in numbers.items()},
            "llama.attention.layer_norm_rms_epsilon": Value("FLOAT32", 1e-5),
            "tokenizer.ggml.model": Value("STRING", "gpt2"), "tokenizer.ggml.pre": Value("STRING", "llama-bpe"),
            "tokenizer.ggml.tokens": Value("ARRAY", [f"{word()}{i}" for i in range(TOKENS)], "STRING"),
            "tokenizer.ggml.token_type": Value("ARRAY", np.ones(TOKENS, np.int32), "INT32"),
            "tokenizer.ggml.merges": Value("ARRAY", [f"{word()} {word()}" for _ in range(MERGES)], "STRING")}


def build(path: Path) -> None:
    records = gguf_file.place(specs(), gguf_file.ALIGNMENT)
    head = gguf_file.header(metadata(), records)
    end = len(head) + -len(head) % gguf_file.ALIGNMENT + records[-1].offset + records[-1].nbytes
    with open(path, "wb") as file:
        file.write(head)
        file.truncate(end)


def measure(reader: str, path: Path, times: int) -> list[float]:
    """Medians of seconds, of seconds of the processor, of resident bytes gained, and of tensors found."""
    runs = [json.loads(subprocess.run([sys.executable, "-c", READ, reader, str(path)], check=True, capture_output=True,
                                      text=True).stdout) for _ in range(times)]
    return [statistics.median(column) for column in zip(*runs, strict=True)]


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--times", type=int, default=5)
    options = p.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    path = options.work / "opening.gguf"
    build(path)
    rows = []
    for name, reader, times in (("fewbits", "fewbits", options.times), ("gguf's GGUFReader", "gguf", 1)):
        seconds, work, resident, tensors = measure(reader, path, times)
        rows.append((name, int(tensors), path.stat().st_size / 1e9, seconds * 1e3, work * 1e3, resident / 1e6))
    path.unlink()
    show("Opening a GGUF file", ("reader", "tensors", "GB", "ms", "ms of the processor", "resident MB gained"), rows,
         options.json)
    sys.exit(rows[0][3] > LIMIT * 1e3)


if __name__ == "__main__":
    main()
