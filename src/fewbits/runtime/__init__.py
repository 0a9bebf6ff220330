"""Computing with quantized tensors."""
