"""Peers that PEMA is measured against and that belong to neither owner: they are given what PEMA does without."""
