"""Models of sound, images and sentences in 8 and 4 bits: what they lose.

Whisper base transcribes jfk.wav. Its 4-bit versions are calibrated on that recording run backwards, in three mixtures
with noise, cut elsewhere and at other volumes, each with the tokens that the original model writes for it: sounds of a
voice, but not one word of the recording. The ViT's calibration images are the first 512 of the test set, which are not
counted: accuracy is that of the other 9,488. MiniLM's sentences are lines of wikitext2-test; those of its calibration,
where there is one, are of wikitext2-train.
"""

from __future__ import annotations

import gzip
import shutil
import sys
import wave
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
import transformers
from common import parser, show

import fewbits
from fewbits.calibration.sources import Batch
from fewbits.cli.common import quiet_libraries

T = TypeVar("T")
Row = tuple[str, str, str, str]
CALIBRATION_IMAGES, SENTENCES = 512, 400


# Whisper --------------------------------------------------------------------------------------------------------------
def sound(path: Path) -> np.ndarray:
    """Samples at 16 kHz, float32."""
    with wave.open(str(path)) as file:
        assert file.getframerate() == 16000 and file.getsampwidth() == 2
        found = np.frombuffer(file.readframes(file.getnframes()), np.int16)
        return found.reshape(-1, file.getnchannels()).mean(1).astype(np.float32) / 32768


def features(model: Path, samples: np.ndarray) -> torch.Tensor:
    extract = transformers.WhisperFeatureExtractor.from_pretrained(model)
    return extract(samples, sampling_rate=16000, return_tensors="pt")["input_features"]


def written(net: transformers.PreTrainedModel, heard: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return net.generate(input_features=heard, max_new_tokens=120, language="en", task="transcribe")


def sounds(model: Path, samples: np.ndarray, count: int = 6) -> list[Batch]:
    """Inputs of Whisper that share no word with the recording."""
    net, draw = fewbits.load(model), np.random.default_rng(0)
    start = net.generation_config.decoder_start_token_id
    batches = []
    for i in range(count):
        turned = np.roll(samples[::-1], int(draw.integers(len(samples)))) * draw.uniform(0.5, 1.5)
        noise = draw.standard_normal(len(samples)).astype(np.float32) * float(np.abs(samples).mean())
        heard = features(model, (turned + (i % 3) * 0.3 * noise).astype(np.float32))
        tokens = written(net, heard)[0].tolist()
        tokens = tokens if tokens[0] == start else [start, *tokens]
        batches.append({"input_features": heard, "decoder_input_ids": torch.tensor([tokens])})
    return batches


def whisper(model: Path, shared: Path, work: Path) -> list[Row]:
    samples = sound(shared / "data/audio/jfk.wav")
    heard = features(model, samples)
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)

    def transcript(path: Path) -> str:
        return str(tokenizer.decode(written(fewbits.load(path), heard)[0], skip_special_tokens=True)).strip()

    want, batches = transcript(model), sounds(model, samples)
    print(f"\noriginal: {want}", flush=True)
    rows: list[Row] = []
    for recipe, calibration in versions(batches):
        got = made(model, work, recipe, calibration, transcript)
        rows.append(("Whisper base", named(recipe, calibration), "transcript of jfk.wav",
                     "the same" if got == want else f"changed: {got}"))
    return rows


# ViT ------------------------------------------------------------------------------------------------------------------
class DigitConfig(transformers.ViTConfig):
    model_type = "digit_vit"


class DigitViT(transformers.ViTPreTrainedModel):
    """The MNIST ViT: no norm after the last block, and a head of two layers."""

    config_class = DigitConfig

    def __init__(self, config: DigitConfig):
        super().__init__(config)
        self.vit = transformers.ViTModel(config, add_pooling_layer=False)
        self.vit.layernorm = torch.nn.Identity()
        self.head = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.GELU(), torch.nn.Linear(128, 10))
        self.post_init()

    def forward(self, pixel_values: torch.Tensor) -> transformers.modeling_outputs.ImageClassifierOutput:
        seen = self.vit(pixel_values).last_hidden_state[:, 0]
        return transformers.modeling_outputs.ImageClassifierOutput(logits=self.head(seen))


def vit(source: Path, out: Path) -> Path:
    """A directory of it. Its attention's scale is 64^-0.5, Transformers' 8^-0.5: the rest goes into the queries."""
    given, parts = torch.load(source, weights_only=True), {}
    embedding = "vit.embeddings."
    parts[f"{embedding}cls_token"] = given["cls_token"]
    parts[f"{embedding}position_embeddings"] = given["pos_embedding"]
    parts[f"{embedding}patch_embeddings.projection.weight"] = given["patch_to_embedding.weight"].view(64, 1, 7, 7)
    parts[f"{embedding}patch_embeddings.projection.bias"] = given["patch_to_embedding.bias"]
    for end in ("weight", "bias"):
        parts |= {f"head.{i}.{end}": given[f"mlp_head.{i}.{end}"] for i in (0, 2)}
    for i in range(6):
        at, (attention, mlp) = f"vit.layers.{i}.", (f"transformer.layers.{i}.{j}.fn." for j in (0, 1))
        q, k, v = given[f"{attention}fn.to_qkv.weight"].chunk(3)
        parts |= {f"{at}attention.{n}_proj.weight": w for n, w in (("q", q * (8 / 64) ** 0.5), ("k", k), ("v", v))}
        for theirs, ours in ((f"{attention}norm", "layernorm_before"), (f"{attention}fn.to_out", "attention.o_proj"),
                             (f"{mlp}norm", "layernorm_after"), (f"{mlp}fn.net.0", "mlp.fc1"),
                             (f"{mlp}fn.net.2", "mlp.fc2")):
            parts |= {f"{at}{ours}.{end}": given[f"{theirs}.{end}"] for end in ("weight", "bias")}
    net = DigitViT(DigitConfig(hidden_size=64, num_hidden_layers=6, num_attention_heads=8, intermediate_size=128,
                               image_size=28, patch_size=7, num_channels=1, num_labels=10, qkv_bias=False,
                               layer_norm_eps=1e-5))
    net.load_state_dict(parts)
    net.save_pretrained(out)
    return out


def digits(shared: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Images `[n, 1, 28, 28]`, normalised as in training, and what they are."""
    def read(name: str, skip: int) -> np.ndarray:
        return np.frombuffer(gzip.decompress((shared / "data/vision" / name).read_bytes())[skip:], np.uint8)

    images = torch.from_numpy(read("t10k-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28) / np.float32(255))
    return (images - 0.1307) / 0.3081, torch.from_numpy(read("t10k-labels-idx1-ubyte.gz", 8).astype(np.int64))


def vision(model: Path, shared: Path, work: Path) -> list[Row]:
    images, labels = digits(shared)
    batches = [{"pixel_values": part} for part in images[:CALIBRATION_IMAGES].split(32)]
    images, labels = images[CALIBRATION_IMAGES:], labels[CALIBRATION_IMAGES:]

    def right(path: Path) -> float:
        net = fewbits.load(path)
        with torch.inference_mode():
            found = torch.cat([net(pixel_values=part).logits.argmax(-1) for part in images.split(500)])
        return float((found == labels).double().mean()) * 100

    want = right(model)
    rows: list[Row] = [("MNIST ViT", "float32", "right, %", f"{want:.2f}")]
    for recipe, calibration in versions(batches):
        got = made(model, work, recipe, calibration, right)
        rows.append(("MNIST ViT", named(recipe, calibration), "right, % (change)", f"{got:.2f} ({got - want:+.2f})"))
    return rows


# MiniLM ---------------------------------------------------------------------------------------------------------------
def sentences(path: Path, count: int) -> list[str]:
    lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
    found = [line for line in lines if len(line) > 60 and not line.startswith("=")]
    return found[::max(1, len(found) // count)][:count]


def minilm(model: Path, shared: Path, work: Path) -> list[Row]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    texts = shared / "data/text"

    def inputs(lines: list[str]) -> list[Batch]:
        return [dict(tokenizer(line, truncation=True, max_length=128, return_tensors="pt")) for line in lines]

    tested = inputs(sentences(texts / "wikitext2-test.txt", SENTENCES))
    batches = inputs(sentences(texts / "wikitext2-train.txt", 128))

    def vectors(path: Path) -> torch.Tensor:
        net = fewbits.load(path)
        with torch.inference_mode():
            return torch.stack([net(**batch).last_hidden_state[0].mean(0) for batch in tested])

    want = vectors(model)
    rows: list[Row] = []
    for recipe, calibration in versions(batches):
        alike = torch.cosine_similarity(made(model, work, recipe, calibration, vectors), want)
        rows.append(("MiniLM", named(recipe, calibration), "cosine to float32: mean, least",
                     f"{float(alike.mean()):.5f}, {float(alike.min()):.5f}"))
    return rows


# all ------------------------------------------------------------------------------------------------------------------
def versions(batches: list[Batch]) -> list[tuple[str, list[Batch] | None]]:
    return [("int8", None), ("w8a8", None), ("w8a8-static", batches), ("nf4", None), ("nf4", batches),
            ("int4-g64", None), ("int4-g64", batches)]


def made(model: Path, work: Path, recipe: str, calibration: list[Batch] | None, measured: Callable[[Path], T]) -> T:
    """What is measured of the model in a recipe."""
    out = work / f"{model.name}-{recipe}"
    shutil.rmtree(out, ignore_errors=True)
    result = fewbits.quantize(model, out, recipe, calibration=calibration or "none")
    found = measured(out)
    print(f"{model.name} {named(recipe, calibration)}: {found if isinstance(found, (str, float)) else ''} "
          f"({result.seconds:.0f} s)", file=sys.stderr, flush=True)
    shutil.rmtree(out)
    return found


def named(recipe: str, calibration: object) -> str:
    return f"{recipe}, GPTQ" if calibration else recipe


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--only", choices=("whisper", "vit", "minilm"), nargs="*", default=("whisper", "vit", "minilm"))
    args = p.parse_args()
    quiet_libraries()
    args.work.mkdir(parents=True, exist_ok=True)
    transformers.AutoConfig.register("digit_vit", DigitConfig)
    sys.modules["transformers"].DigitViT = DigitViT  # where a configuration's class is looked for
    rows: list[Row] = []
    if "whisper" in args.only:
        rows += whisper(args.models / "whisper-base", args.shared, args.work)
    if "vit" in args.only:
        source = vit(args.shared / "data/models/vit_mnist.pth", args.work / "vit-mnist")
        rows += vision(source, args.shared, args.work)
    if "minilm" in args.only:
        rows += minilm(args.models / "minilm", args.shared, args.work)
    show("What models of sound, images and sentences lose", ("model", "recipe", "what", "found"), rows, args.json)


if __name__ == "__main__":
    main()
