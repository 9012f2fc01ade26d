"""Machine translation with TRIME: an encoder-decoder trained with other sentences' keys, and decoded with a datastore.

The settings are in `config`, the training objective in `objective`, the three ways of decoding in `decode`.
"""
