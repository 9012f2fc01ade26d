"""TRIME's objective: training memories, and vocabulary and memory in one normaliser (equations 2 and 3)."""
