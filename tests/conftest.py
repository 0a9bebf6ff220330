"""Fixtures: the device, real models, peers. What is not there is skipped, and the reason says what to do."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("FEWBITS_SHARED", ROOT.parent / "shared"))
MODELS = Path(os.environ.get("FEWBITS_MODELS", ROOT / ".models"))
PEERS = Path(os.environ.get("FEWBITS_PEERS", ROOT / ".peers"))


def pytest_configure(config: pytest.Config) -> None:
    """Without a GPU Triton interprets kernels; it has to be told before anything imports it."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    import torch

    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    where = "in the interpreter, no GPU" if interpreted else f"on {torch.cuda.get_device_name()}"
    terminalreporter.write_line(f"Triton kernels ran {where}")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory):
    """A cache folder of the tests' own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FEWBITS_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session", autouse=True)
def processor():
    """The CPU computes wherever a test does not say where."""
    from fewbits.runtime import engine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine, "GPUS", ())
        yield


@pytest.fixture(scope="session")
def device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def gpu(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU for decoders, called `cuda` or whatever is not the CPU; without one its kernels are interpreted."""
    import torch

    from fewbits.runtime import engine
    from fewbits.runtime.triton.engine import Gpu

    native = engine.of()
    monkeypatch.setattr(engine, "device", lambda name: None if name in (None, "cpu") else torch.device("cuda"))
    monkeypatch.setattr(engine, "of", lambda where=None, dtype=None: native if where is None else Gpu(
        torch.device(device), torch.float32))


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


@pytest.fixture(scope="session", autouse=True)
def named():
    """A GPU computes where a test names it, or opens it by `devices.found`."""
    from fewbits import devices

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "UNASKED", ())
        yield


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-block Llama with a byte-level tokenizer and a chat template, as Transformers itself writes it.

    Widths 96 and 172: neither 64 nor 128 nor 256 divides them.
    """
    import torch
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    torch.manual_seed(0)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {w: i for i, w in enumerate(["<unk>", "<s>", "</s>", *letters, "th", "in", "er"])}
    merges = [("t", "h"), ("i", "n"), ("e", "r")]
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>",
                                                     unk_token="<unk>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    config = transformers.LlamaConfig(
        vocab_size=len(vocab), hidden_size=96, intermediate_size=172, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2,
        initializer_range=0.15)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("models") / "tiny"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def english(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text of a few thousand words that every checkout has."""
    return ROOT / "examples" / "sample.txt"
