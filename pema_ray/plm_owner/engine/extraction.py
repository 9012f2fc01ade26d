"""Representations of whole batches, without sessions. B sequences, T positions, N rows, H hidden."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from pema_ray.line import ExtractBatch
from pema_ray.plm_owner.load import LoadedPLM
from pema_ray.plm_owner.states import capture_state


@torch.inference_mode()
def extract(plm: LoadedPLM, batch: ExtractBatch, budget: int) -> torch.Tensor:
    """Representations `[N, H]` on the CPU."""
    rows: list[torch.Tensor] = [torch.empty(0)] * len(batch.token_ids)
    for piece in pieces([len(ids) for ids in batch.token_ids], budget):
        whole = [[*batch.prefix, *batch.token_ids[i]] for i in piece]
        padded = torch.zeros(len(whole), max(map(len, whole)), dtype=torch.long)
        for row, ids in enumerate(whole):
            padded[row, : len(ids)] = torch.tensor(ids)
        state_BTH = capture_state(plm, input_ids=padded.to(plm.device), use_cache=False).cpu()
        for row, i in enumerate(piece):
            rows[i] = state_BTH[row, len(batch.prefix) + batch.first[i] : len(whole[row])].clone()
    return torch.cat(rows)


def pieces(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Sequences by falling length, cut so that no piece is padded to more than `budget` positions, or has one."""
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    found, begin = [], 0
    while begin < len(order):
        end = begin + max(1, budget // lengths[order[begin]])
        found.append(order[begin:end])
        begin = end
    return found
