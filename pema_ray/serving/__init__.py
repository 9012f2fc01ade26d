"""Puts the owners' deployments together under Ray Serve: the one room that knows both of them.

`applications.py` has a builder for each topology, as `serve_configs/` name them.
"""
