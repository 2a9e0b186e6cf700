"""One forward pass a batch, from which every probe is fed."""
