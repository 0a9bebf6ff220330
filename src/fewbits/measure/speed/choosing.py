"""The candidates and the works that options ask for; what cannot be is refused before anything runs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from itertools import product
from pathlib import Path

from fewbits import containers, hub
from fewbits.checkpoint import Checkpoint
from fewbits.errors import FewbitsError
from fewbits.measure.speed.rows import Candidate, Work
from fewbits.memory import available_bytes
from fewbits.planning import kv_bytes, working_bytes
from fewbits.recipe import ModelFacts

# peers, and what is importable where they are installed
PEERS = {"transformers": "transformers", "bitsandbytes": "bitsandbytes", "gptqmodel": "gptqmodel",
         "llama.cpp": "llama_cpp"}
DECODER = "decoder"  # in place of a kernel's name: the native decoder, which is what None means
MODULES = "modules"  # Transformers' modules, each with the kernel that suits it


def opened(models: Sequence[str | Path]) -> dict[str, Checkpoint]:
    """Models by name: that of the file or folder, with as many of the folders above it as tell them apart.

    Raises:
        FewbitsError: none, one twice, or one that cannot be read.
    """
    if not models:
        raise FewbitsError("no model to measure")
    found = [containers.open(hub.locate(m)) for m in models]
    paths = [Path(os.path.abspath(c.path)) for c in found]
    twice = next((p for i, p in enumerate(paths) if p in paths[:i]), None)
    if twice:
        raise FewbitsError(f"{twice} is there twice")

    def name(path: Path) -> str:
        names = (("/".join(p.parts[-n:]) for p in paths) for n in range(1, len(path.parts) + 1))
        return next("/".join(path.parts[-n:]) for n, all_ in enumerate(names, 1)
                    if list(all_).count("/".join(path.parts[-n:])) == 1)

    return {name(path): checkpoint for path, checkpoint in zip(paths, found, strict=True)}


def works(prompts: Sequence[int], generate: Sequence[int], batches: Sequence[int], cache: Sequence[bool]) -> list[Work]:
    """All combinations, the smallest first: memory that one leaves behind is not the next one's."""
    for what, values, least in (("prompts", prompts, 1), ("tokens to generate", generate, 0), ("batches", batches, 1)):
        wrong = next((v for v in values if v < least), None)
        if wrong is not None:
            raise FewbitsError(f"{what}: {wrong} is less than {least}")
    found = dict.fromkeys(Work(p, g, b, c or not g) for p, g, b, c in product(prompts, generate, batches, cache))
    return sorted(found, key=lambda w: (w.batch * (w.prompt + w.generate), not w.cache))


def trainings(prompts: Sequence[int], batches: Sequence[int]) -> list[Work]:
    found = [Work(p, 0, b, False, True) for p, b in product(prompts, batches)]
    return sorted(dict.fromkeys(found), key=lambda w: w.batch * w.prompt)


def candidates(models: Mapping[str, Checkpoint], kernels: Sequence[str | None], peers: Mapping[str, str | None],
               train: bool = False, device: str | None = None) -> list[Candidate]:
    """Each model in every engine; the decoder, and it alone, on a device."""
    found = []
    for name, checkpoint in models.items():
        path = Path(os.path.abspath(checkpoint.path))
        for kernel in kernels:
            modules = train or kernel not in (None, DECODER)
            engines = ("modules",) if modules else ("decoder",) if device else ("decoder", "modules")
            found.append(Candidate(name, path, "fewbits", engines, sys.executable,
                                   None if kernel in (DECODER, MODULES) else kernel, None if modules else device))
        found += [Candidate(name, path, peer, (peer,), python or sys.executable) for peer, python in peers.items()]
    return list(dict.fromkeys(found))


def check_kernels(kernels: Sequence[str | None]) -> None:
    """
    Raises:
        FewbitsError: there is none of a name.
    """
    asked = [k for k in kernels if k not in (None, DECODER, MODULES)]
    if asked:
        from fewbits.runtime.dispatch import KERNELS

        names = [DECODER, MODULES, *(k.name for k in KERNELS)]
        for unknown in [k for k in asked if k not in names][:1]:
            raise FewbitsError(f"no kernel is called {unknown!r}", "one of: " + ", ".join(names))


def check_peers(peers: Mapping[str, str | None]) -> None:
    """
    Raises:
        FewbitsError: an unknown one; one that is not installed here, or a Python that isn't there.
    """
    for peer, python in peers.items():
        if peer not in PEERS:
            raise FewbitsError(f"no peer is called {peer!r}", "one of: " + ", ".join(PEERS))
        if python is None and find_spec(PEERS[peer]) is None:
            raise FewbitsError(f"{peer} is not installed here", f"install it, or say where: {peer}=PATH/TO/python")
        if python is not None and shutil.which(python) is None:
            raise FewbitsError(f"{peer}: no Python at {python}")


def check_context(models: Mapping[str, Checkpoint], asked: Sequence[Work]) -> None:
    """
    Raises:
        FewbitsError: more tokens than a model is made for.
    """
    for name, checkpoint in models.items():
        most = ModelFacts.of(checkpoint).number("max_position_embeddings", "n_positions")
        for work in asked:
            if 0 < most < work.prompt + work.generate:
                raise FewbitsError(f"{name}: a {work} is longer than its context of {most} tokens",
                                   "ask for a shorter prompt, or fewer tokens after it")


def vocabulary(checkpoint: Checkpoint) -> int:
    return ModelFacts.of(checkpoint).number("vocab_size")


def needed_bytes(checkpoint: Checkpoint, candidate: Candidate, asked: Sequence[Work]) -> int:
    """About what a candidate takes: weights, in float32 where modules may decode them, caches and activations."""
    facts, plain = ModelFacts.of(checkpoint), candidate.engine == "llama.cpp" or "decoder" in candidate.engines
    weights = checkpoint.nbytes if plain else max(checkpoint.nbytes, 4 * checkpoint.parameters)
    caches = max(w.batch * kv_bytes(facts, w.prompt + w.generate) * (1 if plain else 2) for w in asked)
    return weights + caches + working_bytes(facts, max(w.prompt + w.generate for w in asked))


def check_memory(needed: Mapping[Candidate, int]) -> None:
    """
    Raises:
        FewbitsError: a candidate alone takes more than is free.
    """
    free = available_bytes()
    for candidate, most in needed.items():
        if most > free:
            raise FewbitsError(f"{candidate.name} ({candidate.engine}) takes about {most / 1e9:.1f} GB, "
                               f"{free / 1e9:.1f} GB are free", "smaller batches, shorter prompts, or a smaller model")
