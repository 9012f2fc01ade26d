"""Experiments of any kind: run folders, stages, stamps."""
