"""Fixtures: the device, real models, peers. What is not there is skipped, and the reason says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FEWBITS_SHARED", ROOT.parent / "shared"))
MODELS = Path(os.environ.get("FEWBITS_MODELS", ROOT / ".models"))
PEERS = Path(os.environ.get("FEWBITS_PEERS", ROOT / ".peers"))


@pytest.fixture(scope="session")
def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture(scope="session")
def shared():
    """A file of the shared data folder: `shared("text/c4.txt")`."""

    def find(name: str) -> Path:
        path = SHARED / "data" / name
        if not path.exists():
            pytest.skip(f"needs the shared data: {name} (set FEWBITS_SHARED)")
        return path

    return find


@pytest.fixture(scope="session")
def model():
    """A built model: `model("smollm2-135m")`."""

    def find(name: str) -> Path:
        path = MODELS / name
        if not path.exists():
            pytest.skip(f"needs the model {name} in {MODELS} (set FEWBITS_MODELS)")
        return path

    return find


@pytest.fixture(scope="session")
def peer():
    """The Python of a peer's virtual environment: `peer("llama")`."""

    def find(name: str) -> str:
        python = PEERS / name / "bin" / "python"
        if not python.exists():
            pytest.skip(f"needs the peer {name}: make peers")
        return str(python)

    return find
