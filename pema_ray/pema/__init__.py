"""PEMA's experiments (NAACL 2024): the only room that may bring both owners together."""
