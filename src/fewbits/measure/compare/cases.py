"""What is compared: recipes that suit a model, or those that were named, and files that are there already."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fewbits import containers, hub, planning
from fewbits.checkpoint import Checkpoint
from fewbits.containers.base import remove
from fewbits.errors import FewbitsError
from fewbits.measure.compare.kept import Kept, digest
from fewbits.measure.compare.settings import TEXT
from fewbits.recipe import ModelFacts, Recipe, get
from fewbits.recipe.allocation import target
from fewbits.recipe.facts import LINEAR

GGUF = ("Q8_0", "Q4_0", "Q6_K", "Q5_K_M", "Q4_K_M", "IQ4_XS", "Q3_K_M", "Q2_K")  # of two that are alike, the first
BESIDE = (".quantization.json", ".log.jsonl", ".recipe.toml")  # what quantizing leaves beside a file


@dataclass
class Case:
    """A candidate on its way through the measurements."""

    name: str
    kind: str  # of KINDS
    to: str  # the recipe; empty of a file
    path: Path
    kept: Kept
    key: Any = None  # what decided the file
    fields: dict[str, Any] = field(default_factory=dict)  # of its Candidate

    @property
    def failed(self) -> bool:
        return bool(self.fields.get("reason"))

    def forget(self) -> None:
        """Remove the file, if it was made here, and what lies beside it."""
        if self.to and "making" in self.kept.found:
            for path in (self.path, *(self.path.with_name(self.path.name + end) for end in BESIDE)):
                remove(path)


def suitable(source: Checkpoint) -> list[str]:
    """A dozen recipes that this model takes, each with fewer bits than it has, no two of which give the same tensors.

    Raises:
        FewbitsError: there are none.
    """
    facts = ModelFacts.of(source)
    widths = [f.shape[-1] for f in facts.tensors if f.role in LINEAR]
    group = next((g for g in (128, 64) if all(w % g == 0 for w in widths)), 32)
    own = source.nbytes * 8 / max(1, source.parameters)
    wanted = [*GGUF, f"int3-g{group}-asym", f"int4-g{group}", "nf4", "nf4-dq", "int8"]
    rows = [r for r in planning.plan(source, 0, recipes=wanted).rows
            if not r.reason and r.bits_per_weight < own - 0.01]
    alike: dict[str, str] = {}
    for row in sorted(rows, key=lambda r: wanted.index(r.recipe)):
        codecs = [c.codec.name for c in get(row.recipe).resolve(facts)]
        alike.setdefault(digest([row.container, codecs]), row.recipe)
    found = [row.recipe for row in rows if row.recipe in alike.values()]
    if not found:
        raise FewbitsError(f"{source.path}: no recipe has fewer bits than its {own:.2f}", "name some with --to")
    return found


def considered(to: Sequence[str], source: Checkpoint, folder: Path) -> Iterator[Case]:
    """The model itself, then one for each of `to`.

    Raises:
        FewbitsError: one that is neither a recipe nor a model.
    """
    own = source.path.stem if source.path.is_file() else source.path.name
    yield Case(own, "original", "", source.path, Kept(folder / "measured" / "original.json"))
    names = {own}
    for item in to:
        recipe = _recipe(item)
        path = hub.locate(item) if recipe is None else folder
        name = _told(path, own) if recipe is None else Path(item).stem if item.endswith(".toml") else recipe.name
        if name in names:
            name = path.name if recipe is None else item
        if name in names and recipe is None:
            name = str(path)
        if name in names:
            continue
        names.add(name)
        if recipe is None:
            slug = f"{_slug(path.name)}-{digest(str(path.resolve()))[:8]}"
            yield Case(name, "file", "", path, Kept(folder / "measured" / f"{slug}.json"))
            continue
        slug = _slug(f"{own}-{name}")
        path = folder / "models" / (slug + containers.by_name(recipe.container).suffix)
        yield Case(name, "recipe", item, path, Kept(folder / "measured" / f"{slug}.json"))


def _recipe(item: str) -> Recipe | None:
    """The recipe called `item`; None where it is a model.

    Raises:
        FewbitsError: neither.
    """
    if target(item):  # what each tensor gets is found when quantizing
        return Recipe(item, "gguf")
    try:
        return get(item)
    except FewbitsError:
        if Path(item).exists() or ("/" in item and not item.endswith(".toml")):
            return None
        raise


def _told(path: Path, own: str) -> str:
    """What a file's name says beyond the original's: `Q4_K_M` of `smollm2-135m-Q4_K_M.gguf`."""
    name = re.sub(r"\.gguf$", "", path.name)
    more = re.fullmatch(re.escape(own) + "[-._ ](.+)", name, re.IGNORECASE)
    return more[1] if more else name


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name)


def text_file(given: str | None, folder: Path) -> Path:
    """The file to measure on.

    Raises:
        FewbitsError: it isn't there, or none was given and the usual one cannot be had.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FewbitsError(f"{given}: no such file", "give a UTF-8 text with --text FILE")
        return Path(given)
    from fewbits.calibration.documents import named

    file = folder / f"{TEXT}.txt"
    if not file.exists():
        try:
            file.write_text(named(TEXT, 1 << 24)[0], encoding="utf-8")
        except FewbitsError as error:
            raise FewbitsError(str(error), "give a UTF-8 text of your own with --text FILE") from None
    return file
