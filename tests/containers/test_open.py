"""Finding the container of a path, and saying why there is none."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import safetensors.torch
import torch

from fewbits import containers
from fewbits.errors import FewbitsError


def directory(path, quantization=None):
    path.mkdir()
    config = {"model_type": "llama"} | ({"quantization_config": quantization} if quantization is not None else {})
    (path / "config.json").write_text(json.dumps(config))
    safetensors.torch.save_file({"x.weight": torch.ones(2, 2)}, path / "model.safetensors")
    return path


@pytest.mark.parametrize("quantization,name", [
    (None, "transformers"), ({"quant_method": "gptq", "bits": 4, "group_size": 128}, "gptq"),
    ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
    ({"load_in_4bit": False, "load_in_8bit": True}, "bitsandbytes")])
def test_the_container_is_found(tmp_path, quantization, name):
    assert containers.open(directory(tmp_path / "m", quantization)).container == name


def test_every_container_has_its_own_name():
    assert [containers.by_name(c.name) for c in containers.CONTAINERS] == list(containers.CONTAINERS)
    with pytest.raises(FewbitsError, match="unknown container 'aqlm'"):
        containers.by_name("aqlm")


def test_what_no_container_reads_is_explained(tmp_path):
    def why(path):
        with pytest.raises(FewbitsError) as error:
            containers.open(path)
        assert str(path) in str(error.value)
        return str(error.value)

    assert "no such file" in why(tmp_path / "nothing")
    (tmp_path / "file").write_bytes(b"text")
    assert "not a GGUF file" in why(tmp_path / "file")
    assert "has no config.json" in why(tmp_path)
    assert "quantization method 'aqlm'" in why(directory(tmp_path / "aqlm", {"quant_method": "aqlm"}))
    assert "quantization_config is not an object" in why(directory(tmp_path / "list", [1]))
    (tmp_path / "pickled").mkdir()
    (tmp_path / "pickled/config.json").write_text("{}")
    assert "no *.safetensors" in why(tmp_path / "pickled")


def test_opening_needs_neither_torch_nor_transformers(tmp_path):
    path = directory(tmp_path / "m")
    code = (f"import sys; from fewbits import containers; containers.open({str(path)!r});"
            "print(sorted({'torch', 'transformers'} & sys.modules.keys()))")
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"
