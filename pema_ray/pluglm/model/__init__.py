"""The encoder, its memory layers and heads, and loading them."""
