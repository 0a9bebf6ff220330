"""Do files we write tokenize equally everywhere?

For each model: Transformers directory -> our GGUF -> llama.cpp, and that GGUF -> our directory -> transformers. One
megabyte of mixed text (English, code, other scripts, combining marks, emoji, runs of spaces and line ends) goes through
both, and through the tokenizer of the directory that came first.

    python benchmarks/gguf_tokenizers.py [NAME...] [--megabytes 1]
"""

from __future__ import annotations

import json
import random
import subprocess
import tempfile
import time
import unicodedata
from pathlib import Path
from typing import Any

from common import ROOT, parser, show

PEER = """
import json, sys
from llama_cpp import Llama
llama = Llama(sys.argv[1], vocab_only=True, verbose=False)
for text in json.load(open(sys.argv[2])):
    print(json.dumps(llama.tokenize(text.encode(), add_bos=True, special=True)))
"""
FILES = ("SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m.Q4_K_M.gguf")  # as published: no directory came first
# first and last code point of the letters of a script
SCRIPTS = {"Greek": (0x391, 0x3C9), "Cyrillic": (0x410, 0x44F), "Armenian": (0x561, 0x586), "Hebrew": (0x5D0, 0x5EA),
           "Arabic": (0x621, 0x64A), "Devanagari": (0x905, 0x94D), "Bengali": (0x985, 0x9B9), "Tamil": (0xB85, 0xBB9),
           "Thai": (0xE01, 0xE3A), "Georgian": (0x10D0, 0x10F0), "Hangul": (0xAC00, 0xD7A3), "Han": (0x4E00, 0x9FA5),
           "Hiragana": (0x3041, 0x3096), "Katakana": (0x30A1, 0x30FA), "Ethiopic": (0x1200, 0x1248),
           "Khmer": (0x1780, 0x17B3)}
EMOJI = ["😀", "🎉", "👍🏽", "👩‍👩‍👧‍👦", "🏳️‍🌈", "🇫🇷", "❤️", "1️⃣", "🧑🏿‍🚀", "☃", "🤷‍♀️", "©", "™", "½", "²", "٣", "५", "Ⅷ"]
SPACES = [" ", "  ", "   ", "\n", "\n\n", "\t", "\r\n", " \n", "\u00a0", "\u3000", "    ", " " * 17, " " * 40, "\n" * 5]


def mixed_text(folder: Path, size: int, seed: int = 0) -> list[str]:
    """Documents of about 2 kB, `size` bytes in all: a third English, a third code, a third of everything else."""
    rng = random.Random(seed)
    english = (folder / "wikitext2-test.txt").read_text(encoding="utf-8")
    code = (folder / "code.txt").read_text(encoding="utf-8")
    english_words = english.split()
    documents, total = [], 0
    while total < size:
        kind = len(documents) % 3
        if kind < 2:
            source = (english, code)[kind]
            at = rng.randrange(len(source) - 2000)
            text = source[at:at + 2000]
        else:
            text = "".join(_word(rng, english_words) + rng.choice(SPACES if rng.random() < 0.3 else [" "])
                           for _ in range(150))
        documents.append(text)
        total += len(text.encode())
    return documents


def _word(rng: random.Random, english: list[str]) -> str:
    kind = rng.random()
    if kind < 0.55:
        first, last = rng.choice(list(SCRIPTS.values()))
        letters = "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))
        return letters.title() if rng.random() < 0.2 else letters
    if kind < 0.65:
        return rng.choice(EMOJI) * rng.randint(1, 3)
    if kind < 0.75:  # combining marks on Latin letters
        return "".join(rng.choice("aeiouncs") + chr(rng.randint(0x300, 0x33F)) for _ in range(rng.randint(1, 5)))
    if kind < 0.8:
        return str(rng.randint(0, 10 ** rng.randint(1, 12)))
    if kind < 0.85:
        return "".join(rng.choice("!?.,;:'\"()[]{}<>@#$%^&*-_=+|\\/~`…—“”«»") for _ in range(rng.randint(1, 4)))
    if kind < 0.9:
        return "".join(_any(rng) for _ in range(rng.randint(1, 4)))
    return rng.choice(english) + rng.choice(["", "'s", "'LL", "n't", "_x", "…"])


def _any(rng: random.Random) -> str:
    """Any character that this Python's Unicode knows.

    On younger ones libraries differ among themselves: U+11BF9, a digit since Unicode 16, is one for `tokenizers` 0.23
    and none for llama.cpp.
    """
    while True:
        letter = chr(rng.choice([rng.randint(1, 0x2FF), rng.randint(0x2000, 0xD7FF), rng.randint(0xE000, 0xFFFD),
                                 rng.randint(0x10000, 0x1FFFF)]))
        if unicodedata.category(letter) != "Cn":
            return letter


def compare(model: Path, documents: list[str], peer: str) -> dict[str, Any]:
    """Documents that tokenize otherwise, of each pair."""
    from transformers import AutoTokenizer

    from fewbits import containers
    from fewbits.containers.gguf import Gguf

    gguf, begin = Gguf(), time.time()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        source = containers.open(model)
        ours = containers.write(gguf, folder / "model.gguf", source)
        written = time.time() - begin
        (folder / "directory").mkdir()
        for name, data in ours.files.items():
            (folder / "directory" / name).write_bytes(data)
        (folder / "directory" / "config.json").write_text(json.dumps(ours.config))
        (folder / "texts.json").write_text(json.dumps(documents))
        out = subprocess.run([peer, "-c", PEER, str(folder / "model.gguf"), str(folder / "texts.json")],
                             capture_output=True, text=True)
        if out.returncode:
            raise SystemExit(out.stderr[-2000:])
        llama = [json.loads(line) for line in out.stdout.splitlines()]
        after = AutoTokenizer.from_pretrained(folder / "directory")
        before = AutoTokenizer.from_pretrained(model) if model.is_dir() else after
        original = [before(text)["input_ids"] for text in documents]
        back = [after(text)["input_ids"] for text in documents]
        turned = [after.decode(ids, skip_special_tokens=True) for ids in back]
    parts = [i for i in range(len(documents)) if llama[i] != back[i]]
    first = _difference(llama[parts[0]], back[parts[0]], after) if parts else None
    return {"model": model.name, "bytes": sum(len(t.encode()) for t in documents), "documents": len(documents),
            "tokens": sum(map(len, llama)), "pre": ours.facts["metadata"]["tokenizer.ggml.pre"].value,
            "llama.cpp differs from our directory": len(parts),
            "our directory differs from the original": sum(a != b for a, b in zip(original, back, strict=True)),
            "llama.cpp differs from the original": sum(a != b for a, b in zip(original, llama, strict=True)),
            "text comes back": sum(a == b for a, b in zip(documents, turned, strict=True)),
            "seconds to write": round(written, 1),
            "first difference": first}


def _difference(ours: list[int], theirs: list[int], tokenizer: Any) -> dict[str, Any]:
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), min(len(ours), len(theirs)))
    return {"llama.cpp": tokenizer.convert_ids_to_tokens(ours[max(0, at - 2):at + 6]),
            "transformers": tokenizer.convert_ids_to_tokens(theirs[max(0, at - 2):at + 6])}


def main() -> None:
    p = parser(__doc__)
    p.add_argument("names", nargs="*", default=["smollm2-135m", "gemma3-270m", "stories260k", *FILES])
    p.add_argument("--peer", type=Path, default=ROOT / ".peers" / "llama" / "bin" / "python")
    p.add_argument("--megabytes", type=float, default=1.0)
    arguments = p.parse_args()
    documents = mixed_text(arguments.shared / "data" / "text", int(arguments.megabytes * 1e6))
    rows = []
    for name in arguments.names:
        model = arguments.models / name
        model = model if model.exists() else arguments.shared / "data" / "models" / name
        rows.append(compare(model, documents, str(arguments.peer)))
        print(json.dumps(rows[-1], indent=1, ensure_ascii=False))
    keys = [k for k in rows[0] if k != "first difference"]
    show("Tokens of mixed text", keys, [[row[k] for k in keys] for row in rows], arguments.json)


if __name__ == "__main__":
    main()
