"""The external memory of a language model: keys on disk, their index, exact and approximate search."""
