"""What layers read: text and other inputs, the walk through the model's blocks, second moments."""
