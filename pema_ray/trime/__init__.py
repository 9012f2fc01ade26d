"""TRIME (Zhong, Lei, Chen, EMNLP 2022): language models trained with in-batch memory, evaluated with local, long and
external memory.

Knows torch, `pema_ray.memory` and nothing of the two owners: here one party has text and model.
"""
