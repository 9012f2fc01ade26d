"""How likely a memory finds the run's targets under an adapter or kNN-LM. Shared by evaluate and compare."""

from __future__ import annotations

import torch

from pema_ray.data_owner import PemaAdapter
from pema_ray.data_owner.feed import Batch, in_order, sequences_in_order
from pema_ray.data_owner.knn import NearestNeighbours, WithNeighbours
from pema_ray.evaluation.likelihood import TokenLikelihood, token_likelihood
from pema_ray.hardware import pick_device
from pema_ray.memory import ExternalMemory
from pema_ray.stages.run import Run

AnyExpert = PemaAdapter | NearestNeighbours | WithNeighbours
_ROWS = 1024  # whose probabilities over the whole vocabulary are held at once; of whole sequences, some more


def likelihood_of(run: Run, split: str, expert: AnyExpert | None, most: int | None = None) -> TokenLikelihood:
    """Both likelihoods of a split's targets; without an expert, the PLM's twice.

    Args:
        most: of the first so many rows.
    """
    head, card = run.bundle.head.to(pick_device(run.config.plm.device)), run.bundle.card
    device = head.weight.device
    memory = ExternalMemory.open(run.path("build_memory", split), card)
    mixed = expert if isinstance(expert, WithNeighbours) else None
    adapter = expert.adapter if isinstance(expert, WithNeighbours) else expert
    looks_back = isinstance(adapter, PemaAdapter) and adapter.config.looks_back
    rows = memory.view(prompts=looks_back)
    batches = sequences_in_order(rows, most) if looks_back else in_order(rows, most, _ROWS)
    if isinstance(adapter, PemaAdapter):
        adapter = adapter.to(device)

    def log_probs(batch: Batch) -> torch.Tensor:
        state = torch.from_numpy(batch.key).to(device).float()
        wanted = torch.from_numpy(batch.wanted).to(device)
        if adapter is None:
            return head.log_probs(head.norm(state))
        if isinstance(adapter, PemaAdapter) and batch.example is not None:
            target, example = (torch.from_numpy(ids).to(device) for ids in (batch.target, batch.example))
            found = adapter.log_probs(state, head, (target, example, wanted))
        else:
            found = adapter.log_probs(state, head)
        return mixed.mix(found, state[wanted], head) if mixed else found

    return token_likelihood(batches, [memory.manifest.eos_token_id], head, log_probs)
