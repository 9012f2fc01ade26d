"""How likely a memory finds the run's targets under an adapter or kNN-LM. Shared by evaluate and compare."""

from __future__ import annotations

import torch

from pema_ray.data_owner import PemaAdapter
from pema_ray.data_owner.feed import Batch, in_order, sequences_in_order
from pema_ray.data_owner.knn import NearestNeighbours
from pema_ray.evaluation.likelihood import TokenLikelihood, token_likelihood
from pema_ray.hardware import pick_device
from pema_ray.memory import ExternalMemory
from pema_ray.stages.run import Run

_ROWS = 1024  # whose probabilities over the whole vocabulary are held at once


def likelihood_of(
    run: Run, split: str, expert: PemaAdapter | NearestNeighbours | None, most: int | None = None
) -> TokenLikelihood:
    """Both likelihoods of a split's targets; without an expert, the PLM's twice.

    Args:
        most: of the first so many rows.
    """
    head, card = run.bundle.head.to(pick_device(run.config.plm.device)), run.bundle.card
    device = head.weight.device
    memory = ExternalMemory.open(run.path("build_memory", split), card)
    looks_back = isinstance(expert, PemaAdapter) and expert.config.looks_back
    rows = memory.view(prompts=looks_back)
    batches = sequences_in_order(rows, most) if looks_back else in_order(rows, most, _ROWS)
    if isinstance(expert, PemaAdapter):
        expert = expert.to(device)

    def log_probs(batch: Batch) -> torch.Tensor:
        state = torch.from_numpy(batch.key).to(device).float()
        if expert is None:
            return head.log_probs(head.norm(state))
        if batch.example is None or not isinstance(expert, PemaAdapter):
            return expert.log_probs(state, head)
        target, example = (torch.from_numpy(ids).to(device) for ids in (batch.target, batch.example))
        return expert.log_probs(state, head, target, example)[torch.from_numpy(batch.wanted).to(device)]

    return token_likelihood(batches, [memory.manifest.eos_token_id], head, log_probs)
