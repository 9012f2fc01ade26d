"""The PLM owner in the same process: a `ContextSource` over a loaded model.

`extract` serves the building of memories (many positions, no cache kept); sessions serve decoding
(one position at a time, key-value cache). B sequences, T positions, N rows, H hidden.
"""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, LMHeadBundle, ModelCard, SessionLost
from pema_ray.plm_owner.cache import GrowingLayer, attends_to_everything, growing_cache
from pema_ray.plm_owner.export import export_lm_head
from pema_ray.plm_owner.load import LoadedPLM
from pema_ray.plm_owner.states import capture_state

_SHORTEST_SHARED_PREFIX = 8  # tokens; below this a cache costs more than it saves
_IDLE_SHARE = 0.25  # of a session's cache rows may be dropped ones before the cache is copied without them


@dataclass
class _Session:
    cache: DynamicCache
    attended_BT: torch.Tensor
    """1 where a position is real, 0 where it is padding; a row of the cache each."""
    rows: list[int]
    """The session's rows, as rows of the cache."""
    position: int = 0


class InProcessPLM:
    """Extracts and decodes with a model in this process."""

    def __init__(self, plm: LoadedPLM) -> None:
        self.plm = plm
        self._sessions: dict[str, _Session] = {}
        self._prefix: tuple[tuple[int, ...], DynamicCache] | None = None
        self.takes_positions = "position_ids" in inspect.signature(plm.decoder.forward).parameters

    @cached_property
    def _bundle(self) -> LMHeadBundle:
        return export_lm_head(self.plm)

    def describe(self) -> ModelCard:
        return self._bundle.card

    def lm_head(self) -> LMHeadBundle:
        return self._bundle

    # ── extraction ──────────────────────────────────────────────────────────

    @torch.inference_mode()
    def extract(self, batch: ExtractBatch) -> torch.Tensor:
        """One forward pass over the batch; what all its sequences begin with is computed once and kept."""
        self._check_length(max(map(len, batch.token_ids)))
        shared = shared_prefix(batch)
        rest = [ids[shared:] for ids in batch.token_ids]
        longest = max(map(len, rest))
        padded = torch.zeros(len(rest), longest, dtype=torch.long)
        for row, ids in enumerate(rest):
            padded[row, : len(ids)] = torch.tensor(ids)
        inputs: dict[str, Any] = {"input_ids": padded.to(self.plm.device), "use_cache": False}
        if shared:
            cache = self._prefix_cache(tuple(batch.token_ids[0][:shared]))
            cache.batch_repeat_interleave(len(rest))
            inputs |= {"past_key_values": cache, "use_cache": True}
        state_BTH = capture_state(self.plm, **inputs)  # causal: padding on the right is never looked at
        wanted = torch.zeros(padded.shape, dtype=torch.bool)
        for row, (ids, first) in enumerate(zip(batch.token_ids, batch.first, strict=True)):
            wanted[row, first - shared : len(ids) - shared] = True
        return state_BTH[wanted.to(state_BTH.device)].cpu()

    def forget_prefix(self) -> None:
        """Forget what the last batches began with."""
        self._prefix = None

    def _prefix_cache(self, prefix: tuple[int, ...]) -> DynamicCache:
        if self._prefix is None or self._prefix[0] != prefix:
            cache = growing_cache(self.plm.model.config)
            ids = torch.tensor([prefix], device=self.plm.device)
            self.plm.decoder(input_ids=ids, past_key_values=cache, use_cache=True)
            self._prefix = prefix, cache
        return _copy(self._prefix[1])

    # ── sessions ────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def open(self, prompts: Sequence[Sequence[int]]) -> tuple[str, torch.Tensor]:
        session, state = self._prefill(prompts)
        name = uuid.uuid4().hex
        self._sessions[name] = session
        return name, state.cpu()

    @torch.inference_mode()
    def admit(self, session: str, position: int, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Prefill the newcomers by themselves, then lay their cache beside the session's, aligned at the end."""
        held = self._sessions.get(session)
        if held is None or held.position != position or not self._may_pad_between(held.cache):
            raise SessionLost(session)
        new, state = self._prefill(prompts)
        chosen = torch.tensor(held.rows, device=self.plm.device)
        if held.rows != list(range(len(held.attended_BT))):
            held.cache.batch_select_indices(chosen)
        mine, theirs = (_without_empty_columns(a) for a in (held.attended_BT[chosen], new.attended_BT))
        for layer, other in zip(held.cache.layers, new.cache.layers, strict=True):
            cast(GrowingLayer, layer).join(cast(GrowingLayer, other), mine.shape[1], theirs.shape[1])
        longest = max(mine.shape[1], theirs.shape[1])
        held.attended_BT = torch.cat([F.pad(a, (longest - a.shape[1], 0)) for a in (mine, theirs)])
        held.rows, held.position = list(range(len(held.attended_BT))), position + 1
        return state.cpu()

    def _may_pad_between(self, cache: DynamicCache) -> bool:
        return self.takes_positions and attends_to_everything(cache)

    def _prefill(self, prompts: Sequence[Sequence[int]]) -> tuple[_Session, torch.Tensor]:
        """What all prompts begin with is computed once, the rest padded on its left."""
        if not prompts or not all(prompts):
            raise UserError("A session needs at least one prompt, and every prompt at least one token.")
        self._check_length(max(map(len, prompts)))
        cache, shared = growing_cache(self.plm.model.config), 0
        if self._may_pad_between(cache):
            shared = shared_prefix(ExtractBatch([list(ids) for ids in prompts], [len(ids) - 1 for ids in prompts]))
        if shared:
            cache = self._prefix_cache(tuple(prompts[0][:shared]))
            cache.batch_repeat_interleave(len(prompts))
        longest = max(map(len, prompts)) - shared
        padded = torch.zeros(len(prompts), longest, dtype=torch.long)
        attended = torch.zeros(len(prompts), shared + longest, dtype=torch.long)
        attended[:, :shared] = 1
        for row, ids in enumerate(prompts):
            missing = longest - (len(ids) - shared)
            padded[row, missing:] = torch.tensor(ids[shared:])
            attended[row, shared + missing :] = 1
        session = _Session(cache, attended.to(self.plm.device), list(range(len(prompts))))
        return session, self._forward(session, padded.to(self.plm.device))

    @torch.inference_mode()
    def extend(self, session: str, position: int, rows: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        held = self._sessions.get(session)
        if held is None or held.position != position:
            raise SessionLost(session)
        wanted = [held.rows[row] for row in rows]
        self._check_length(int(held.attended_BT[wanted].sum(-1).max()) + 1)  # padding takes no position
        device, in_cache = self.plm.device, held.attended_BT.shape[0]
        forked = len(set(wanted)) < len(wanted)
        if forked or len(wanted) < (1 - _IDLE_SHARE) * in_cache:
            chosen = torch.tensor(wanted, device=device)
            held.cache.batch_select_indices(chosen)
            held.attended_BT, in_cache = held.attended_BT[chosen], len(wanted)
            wanted = list(range(len(wanted)))
        new = torch.zeros(in_cache, dtype=torch.long, device=device)  # rows that were dropped idle along,
        attended = torch.zeros_like(new)  # on the position they ended on
        new[wanted] = torch.tensor(list(tokens), device=device)
        attended[wanted] = 1
        held.attended_BT = torch.cat([held.attended_BT, attended[:, None]], dim=1)
        held.rows, held.position = wanted, held.position + 1
        return self._forward(held, new[:, None])[wanted].cpu()

    def close(self, session: str) -> None:
        self._sessions.pop(session, None)

    def _forward(self, session: _Session, ids_BT: torch.Tensor) -> torch.Tensor:
        inputs: dict[str, Any] = {
            "input_ids": ids_BT,
            "attention_mask": session.attended_BT,
            "past_key_values": session.cache,
            "use_cache": True,
        }
        if self.takes_positions:
            positions = session.attended_BT.cumsum(-1).sub(1).clamp_min(0)
            inputs["position_ids"] = positions[:, -ids_BT.shape[1] :]
        return capture_state(self.plm, **inputs)[:, -1]

    def _check_length(self, length: int) -> None:
        if length > self.plm.max_positions:
            raise UserError(
                f"A text of {length} tokens is longer than {self.plm.name} allows ({self.plm.max_positions})."
            )


def shared_prefix(batch: ExtractBatch) -> int:
    """How many leading tokens all sequences share, short of every wanted position; 0 if too few to be worth a cache."""
    if len(batch.token_ids) < 2:
        return 0
    lowest, highest = min(batch.token_ids), max(batch.token_ids)  # lexicographic extremes bound every other one
    limit = min(min(batch.first), len(lowest), len(highest))
    shared = next((i for i in range(limit) if lowest[i] != highest[i]), limit)
    return shared if shared >= _SHORTEST_SHARED_PREFIX else 0


def _without_empty_columns(attended_BT: torch.Tensor) -> torch.Tensor:
    """The mask from the first position that any row attends to."""
    return attended_BT[:, int(attended_BT.any(0).int().argmax()) :]


def _copy(cache: DynamicCache) -> DynamicCache:
    """A cache that may be extended without touching the original's tensors."""
    import copy

    return copy.deepcopy(cache)
