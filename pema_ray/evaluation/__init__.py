"""Scores, likelihoods, comparisons and the report. Knows tensors and texts, no Ray and no PLM owner."""
