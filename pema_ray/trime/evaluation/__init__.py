"""Evaluating with local, long and external memory: statistics, calibration, systems, attributions."""
