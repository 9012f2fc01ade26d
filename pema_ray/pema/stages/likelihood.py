"""Likelihood of a memory's targets under a predictor. Shared by evaluate and compare."""

from __future__ import annotations

import torch

from pema_ray.data_owner.decoding.predictor import Predictor
from pema_ray.data_owner.training.batch_samplers import Batch, in_order, sequences_in_order
from pema_ray.evaluation.likelihood import TokenLikelihood, token_likelihood
from pema_ray.memory import ExternalMemory
from pema_ray.pema.run import Run
from pema_ray.runtime.hardware import pick_device

_ROWS = 1024  # rows in one block, each with its probabilities over the whole vocabulary; whole sequences exceed it


def likelihood_of(run: Run, split: str, predictor: Predictor | None, limit: int | None = None) -> TokenLikelihood:
    """Both likelihoods of a split's targets; without a predictor, the PLM's twice.

    Args:
        limit: use only this many rows, from the first.
    """
    head = run.bundle.head.to(pick_device(run.config.plm.device)) if predictor is None else predictor.head
    memory = ExternalMemory.open(run.path("build_memory", split), run.bundle.card)
    looks_back = predictor is not None and predictor.looks_back
    rows = memory.view(prompts=looks_back)
    batches = sequences_in_order(rows, limit) if looks_back else in_order(rows, limit, _ROWS)

    def log_probs(batch: Batch) -> torch.Tensor:
        device = head.weight.device
        state = torch.from_numpy(batch.key[:]).to(device)
        if predictor is None:
            return head.log_probs(head.norm(state))
        if batch.example is None:
            return predictor.log_probs(state)
        target, example, mask = (torch.from_numpy(a).to(device) for a in (batch.target, batch.example, batch.is_target))
        return predictor.log_probs(state, (target, example, mask))

    return token_likelihood(batches, [memory.manifest.eos_token_id], head, log_probs)
