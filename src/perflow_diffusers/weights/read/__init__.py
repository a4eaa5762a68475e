"""Any kind of weights as one lazy mapping of tensors by canonical names."""
