"""Experiments of any kind: configuration files with overrides, run folders, stages, stamps. Knows no method."""
