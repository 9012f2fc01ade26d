"""Language models with memory keys: the paper's decoder, its adaptive softmax, and any transformers model."""
