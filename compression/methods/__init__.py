"""One paper per file: pure functions of tensors, found by the recipe's `method`."""
