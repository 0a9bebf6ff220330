"""Task files of a few questions each, in the layouts that `local` reads."""

from __future__ import annotations

import bz2
import gzip
import json
from pathlib import Path
from typing import Any

CHOICES = [("Question: Which is hot?", ["ice", "the sun in summer", "a cold stone", "snow"], 1),
           ("Question: Which one swims?", ["a fish", "a tree", "a house of stone", "a road"], 0),
           ("Question: What do cows eat?", ["iron", "grass", "cars and buses", "glass"], 1)]
WINOGRANDE = [(["The cup would not fit in the box so the cup", "The cup would not fit in the box so the box"],
               "was too large.", 0),
              (["Ann thanked Bea because Ann", "Ann thanked Bea because Bea"], "had helped.", 1)]
HELLASWAG = ["Roof: A man is on a roof. he", "1", "sings a song.", "takes a tile off.", "is a roof.", "eats it all.",
             "Cooking: How to boil eggs. Take a pot. It should be large.", "0", "Fill it with water.", "Throw it away.",
             "Sleep in it.", "Eggs are round."]
TRUTHFULQA = [{"question": "Is the moon made of cheese?", "mc1_targets": {"It is.": 0, "No.": 1},
               "mc2_targets": {"No, of rock.": 1, "It is.": 0, "It is not.": 1}},
              {"question": "Can pigs fly?", "mc1_targets": {"They can't.": 1, "They can.": 0, "At night.": 0},
               "mc2_targets": {"They can't.": 1, "They can.": 0, "At night.": 0}}]
MMLU = [{"question": f"What is {i} + 1?", "subject": subject, "choices": ["0", str(i + 1), "7 or so", "x"], "answer": 1}
        for subject in ("anatomy", "astronomy", "virology") for i in range(3)]


def write(folder: Path) -> Path:
    """All of them."""
    lines(folder / "arc_easy.jsonl", [{"query": q, "choices": c, "gold": g} for q, c, g in CHOICES])
    lines(folder / "arc_challenge.jsonl", [{"query": q, "choices": c, "gold": g} for q, c, g in CHOICES[:2]])
    lines(folder / "piqa.jsonl", [{"query": q + "\n", "choices": c[:2], "gold": g} for q, c, g in CHOICES])
    lines(folder / "winogrande.jsonl", [{"context_options": o, "continuation": c, "gold": g} for o, c, g in WINOGRANDE])
    (folder / "hellaswag_val.txt.bz2").write_bytes(bz2.compress("\n".join([*HELLASWAG, ""]).encode()))
    (folder / "truthfulqa_mc.json").write_text(json.dumps(TRUTHFULQA, indent=2))
    (folder / "mmlu_test.jsonl.gz").write_bytes(gzip.compress("\n".join(map(json.dumps, MMLU)).encode()))
    return folder


def lines(file: Path, rows: list[Any]) -> None:
    file.write_text("\n".join(map(json.dumps, rows)) + "\n")
