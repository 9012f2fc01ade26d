"""Three next-token distributions of a translator (`plain`, `knn`, `trime`), and greedy or beam search with any of them.

- `knn` (kNN-MT): (1 - λ) P_net + λ P_knn, P_knn ∝ exp(sim(g, g_j) / T) over the k nearest, -‖g - g_j‖² or g · g_j;
- `trime` (TrimeMT): equation 2 over the k nearest, sim / (√H T): the same sum with λ = Z_c / (Z_t + Z_c).

Both have mass 1. Knows torch and transformers. Shapes: N hypotheses, K neighbours, H hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pema_ray.memory.search.nearest import Neighbours, SearchResult
from pema_ray.trime.evaluation.combination import joint_over_vocabulary, linear_over_vocabulary, memory_mass
from pema_ray.trime.translation.config import MtGenerateConfig, System
from pema_ray.trime.translation.data import padded
from pema_ray.trime.translation.model import Translator

_BATCH = 32  # sentences that are decoded together


@dataclass(frozen=True, slots=True)
class Mixing:
    """How the memory is mixed in. `weight` is λ of `knn`; `trime` has none."""

    system: System
    neighbours: int = 16
    temperature: float = 10.0
    weight: float = 0.0

    def theta(self, hidden: int) -> float:
        """What raw similarities are divided by."""
        return self.temperature * (math.sqrt(hidden) if self.system == "trime" else 1.0)


def mixed_log_probs(logits_NV: Tensor, nearest: SearchResult, mixing: Mixing, hidden: int) -> Tensor:
    """log P of every next token `[N, V]`, from the network's logits and the nearest entries."""
    normaliser_N = logits_NV.logsumexp(-1)
    log_p_NV = logits_NV - normaliser_N[:, None]
    similarity_NK, token_NK = nearest.similarity_NK.to(logits_NV), nearest.token_NK.to(logits_NV.device).clamp(min=0)
    mass_NV = memory_mass(similarity_NK, token_NK, mixing.theta(hidden), logits_NV.shape[1])
    if mixing.system == "trime":
        return joint_over_vocabulary(log_p_NV, normaliser_N, mass_NV)
    return linear_over_vocabulary(log_p_NV, mass_NV, mixing.weight)


class TranslationDecoder:
    """Translates with one system.

    Args:
        eos: ends sources and answers.
        search: of the datastore; `plain` needs none.
    """

    def __init__(self, model: Translator, eos: int, mixing: Mixing, search: Neighbours | None = None) -> None:
        assert mixing.system == "plain" or search is not None
        self._model, self._eos, self._mixing, self._search = model, eos, mixing, search
        self._logits: Tensor | None = None

    @torch.inference_mode()
    def translate(self, sources: Sequence[Sequence[int]], config: MtGenerateConfig) -> list[list[int]]:
        """The best answer to each source (ids without `<eos>`), in their order; sources are batched by length."""
        order = sorted(range(len(sources)), key=lambda number: len(sources[number]))
        answers: list[list[int]] = [[] for _ in sources]
        hook = self._model.network.register_forward_hook(self._catch)
        try:
            for first in range(0, len(order), _BATCH):
                batch = order[first : first + _BATCH]
                for number, answer in zip(batch, self._batch([[*sources[n], self._eos] for n in batch], config)):
                    answers[number] = answer
        finally:
            hook.remove()
        return answers

    def _batch(self, sources: list[list[int]], config: MtGenerateConfig) -> list[list[int]]:
        from transformers import GenerationConfig, LogitsProcessorList

        m = self._model
        source_BS = torch.from_numpy(padded(sources, m.pad)).to(next(m.parameters()).device)
        longest = int(config.length_factor * (source_BS.shape[1] - 1)) + config.length_extra
        settings = GenerationConfig(
            num_beams=config.beam,
            length_penalty=config.length_penalty if config.beam > 1 else None,
            max_new_tokens=min(longest, m.max_positions - 1),
            early_stopping=config.beam > 1,
            do_sample=False,
            eos_token_id=self._eos,
            pad_token_id=m.pad,
            decoder_start_token_id=m.start,
            forced_eos_token_id=None,
        )
        processors: Any = LogitsProcessorList([self._process])  # type: ignore[list-item]
        answer_BT = m.network.generate(
            input_ids=source_BS,
            attention_mask=(source_BS != m.pad).long(),
            generation_config=settings,
            logits_processor=processors,
        )
        return [self._cut(ids) for ids in answer_BT[:, 1:].tolist()]

    def _cut(self, ids: list[int]) -> list[int]:
        return ids[: ids.index(self._eos)] if self._eos in ids else [i for i in ids if i != self._model.pad]

    def _catch(self, module: Any, inputs: Any, output: Any) -> None:
        self._logits = output.logits[:, -1].float()

    def _process(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Replaces the scores of `generate` by this system's log P; padding is never generated."""
        assert self._logits is not None
        log_p_NV = self.log_probs(self._logits, self._model.take_key()[:, -1])
        log_p_NV[:, self._model.pad] = -math.inf
        return log_p_NV

    def log_probs(self, logits_NV: Tensor, key_NH: Tensor) -> Tensor:
        """log P of every next token."""
        if self._search is None or self._mixing.system == "plain":
            return logits_NV.log_softmax(-1)
        nearest = self._search.search(key_NH.float().cpu().numpy(), self._mixing.neighbours)
        return mixed_log_probs(logits_NV, nearest, self._mixing, key_NH.shape[-1])
