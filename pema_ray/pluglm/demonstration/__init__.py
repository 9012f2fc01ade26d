"""Demonstrations of PlugLM's memory: synthetic facts that are edited (`facts`, `learning`, `measures`, `demo`), and two
domains of real text (`domains`). Knows the rest of `pluglm`; no owner.
"""
