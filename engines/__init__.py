"""Everything that touches a tensor: the training engine and the inference engines."""
