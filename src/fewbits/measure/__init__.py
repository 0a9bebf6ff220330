"""What quantizing cost: divergence from the original, perplexity, size."""

from fewbits.measure.divergence import Divergence, evaluate

__all__ = ["Divergence", "evaluate"]
