"""Every type that ggml has: a codec of ours, decoded only, or refused by name."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from fewbits import codecs
from fewbits.codecs import decode_only
from fewbits.codecs.decode_only import DecodeOnly
from fewbits.errors import FewbitsError
from fewbits.qtensor import QTensor

NO_WEIGHTS = ("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64")  # activations on their way, and plain numbers


@pytest.mark.parametrize("name", [kind.name for kind in GGMLQuantizationType])
def test_every_type(name):
    if name in NO_WEIGHTS:
        with pytest.raises(FewbitsError, match=f"unknown codec '{name}'"):
            codecs.get(name)
    else:
        codec = codecs.get(name)
        columns, size = GGML_QUANT_SIZES[GGMLQuantizationType[name]]
        assert codec.name == name
        assert codec.nbytes((3, 256)) == 3 * 256 // columns * size
        assert isinstance(codec, DecodeOnly) == (name in decode_only.TYPES)


@pytest.mark.parametrize("name", decode_only.TYPES)
def test_blocks_are_carried_and_decoded(name):
    codec, shape = codecs.get(name), (2, 3, 512)
    size = (6, codec.nbytes((512,)))
    data = torch.randint(0, 256, size, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert codec.planes(shape) == {"blocks": ("uint8", tuple(data.shape))}
    got = QTensor(codec, shape, {"blocks": data}).dequantize()
    with np.errstate(all="ignore"):
        want = quants.dequantize(data.numpy(), GGMLQuantizationType[name]).reshape(shape)
    assert np.array_equal(got.numpy(), want, equal_nan=True)
    assert codec.check((4, 256)) is None
    assert str(GGML_QUANT_SIZES[GGMLQuantizationType[name]][0]) in codec.check((4, 100))


@pytest.mark.parametrize("name", decode_only.TYPES)
def test_none_is_produced(name):
    with pytest.raises(FewbitsError, match=f"{name} can be read, not produced") as caught:
        codecs.get(name).fit(torch.zeros(4, 256), None)
    assert "IQ4_XS" in caught.value.hint
