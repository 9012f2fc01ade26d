"""Nearest rows of an external memory: exact or by an index, in one process or spread over actors. Knows no method.

`nearest.py` compares, `index.py` builds and reads faiss's inverted files, `ray_search.py` spreads parts over Ray
actors. TRIME and translation search their datastores with it; kNN-LM has a faiss index of its own over normed rows.
"""
