"""Training language models and translators: updates, checkpoints, histories."""
