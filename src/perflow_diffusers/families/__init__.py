"""Model families as data: what their networks are called and made of, and which weights are published for them."""
