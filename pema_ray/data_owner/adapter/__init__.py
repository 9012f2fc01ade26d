"""Adapts the PLM's next-token distribution: PEMA's maps, look-back, local memory, kNN-LM, predicted λ."""
