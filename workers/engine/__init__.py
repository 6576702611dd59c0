"""One continuously batched engine per group; every rank runs the same steps on its own slice of the model."""
