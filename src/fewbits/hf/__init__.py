"""fewbits inside of Transformers: `from_pretrained(…, quantization_config=FewbitsConfig("nf4"))`.

Importing this makes Transformers know the method "fewbits", and so models saved in the layout of our own.
"""

from __future__ import annotations

from fewbits.hf.config import FewbitsConfig
from fewbits.hf.quantizer import FewbitsQuantizer
from fewbits.hf.takeover import disable, enable

__all__ = ["FewbitsConfig", "FewbitsQuantizer", "disable", "enable"]
