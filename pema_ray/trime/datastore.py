"""The datastore: g(c) and the next token of every training position, as an external memory (`pema_ray.memory`).

The text is cut into the evaluation's windows, and each window is one example: its context is the prompt, its scored
tokens are the target. Shards, receipts, manifest, number formats, resuming and publishing are the memory's own; the
fingerprint is the TRIME model's. Imports no Ray. H hidden, N rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ExtractBatch, ModelCard
from pema_ray.memory import ExternalMemory
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.rows import BlockingExtractor
from pema_ray.memory.specification import MemoryBuild
from pema_ray.runtime.hardware import pick_device, set_threads
from pema_ray.tasks import EncodedPair
from pema_ray.trime.config import DatastoreConfig
from pema_ray.trime.model.memory_lm import MemoryLM
from pema_ray.trime.text.windows import plan_windows

KeyMaker = Callable[[Path, torch.device], Callable[[ExtractBatch], Tensor]]


class KeySource:
    """A TRIME model as the extractor that a memory is built with: rows are keys g(c) instead of final states."""

    def __init__(self, model: MemoryLM, device: torch.device | str = "cpu") -> None:
        self._model, self._device = model, device

    @torch.inference_mode()
    def extract(self, batch: ExtractBatch) -> Tensor:
        """`[N, H]` float32: keys of the requested positions, sequence after sequence."""
        longest = max(len(ids) for ids in batch.token_ids)
        token_BT = torch.zeros(len(batch.token_ids), longest, dtype=torch.int64)
        for row, ids in enumerate(batch.token_ids):
            token_BT[row, : len(ids)] = torch.tensor(ids)
        key_BTH = self._model.represent(token_BT.to(self._device)).key_BTH.float().cpu()
        sequences = zip(key_BTH, batch.token_ids, batch.first, strict=True)
        return torch.cat([key_TH[first : len(ids)] for key_TH, ids, first in sequences])


@dataclass(frozen=True)
class LoadKeys:
    """Reads a model from a folder, in an actor, and makes keys with it.

    Attributes:
        make: reads the model and returns the function that makes keys; a function of a module, since it is pickled.
    """

    make: KeyMaker
    folder: Path
    threads: int
    device: str = "auto"

    def __call__(self) -> BlockingExtractor:
        set_threads(self.threads)
        return BlockingExtractor(self.make(self.folder, pick_device(self.device)))


def examples_of(token_N: np.ndarray, tokens_per_sample: int, context_window: int) -> list[EncodedPair]:
    """A window is an example: rows are those of its scored positions, each once in the whole text."""
    tokens = token_N.tolist()
    return [
        EncodedPair(number, tokens[window.start : window.first + 1], tokens[window.first + 1 : window.end + 1])
        for number, window in enumerate(plan_windows(len(tokens), tokens_per_sample, context_window))
    ]


def plan_datastore(
    folder: Path,
    token_N: np.ndarray,
    card: ModelCard,
    corpus: str,
    split: str,
    config: DatastoreConfig,
    tokens_per_sample: int,
    context_window: int,
) -> MemoryBuild:
    """The build of a text's datastore, for `pema_ray.memory.build.run_build` with `KeySource`.

    Raises:
        UserError: the text has no token to predict.
    """
    settings = BuildMemoryConfig(
        actors=config.actors,
        cpus_per_actor=config.cpus_per_actor,
        gpus_per_actor=config.gpus_per_actor,
        examples_per_shard=max(1, config.rows_per_shard // (tokens_per_sample - context_window)),
        max_batch_tokens=config.max_batch_tokens,
        key_dtype=config.key_dtype,
    )
    examples = examples_of(token_N, tokens_per_sample, context_window)
    return MemoryBuild(folder, ListedExamples(examples), card, corpus, split, settings, eos_row=False)


def open_datastore(folder: Path | str, card: ModelCard | None) -> ExternalMemory:
    """A finished datastore, for the model that made it.

    Raises:
        FingerprintMismatch: another model made it.
        UserError: there is none, it is empty, or its keys have another width.
    """
    store = ExternalMemory.open(folder)
    manifest = store.manifest
    if not len(store):
        raise UserError(f"{folder}: the datastore has no entries. Build it of a text that has tokens to predict.")
    if card is not None and manifest.hidden_size != card.hidden_size:
        raise UserError(
            f"{folder}: its keys have {manifest.hidden_size} numbers, the model {card.label} makes {card.hidden_size}. "
            "Build a datastore with this model."
        )
    if card is not None and not manifest.belongs_to(card):
        raise FingerprintMismatch(f"The datastore {folder}", manifest.plm_label, card.label)
    return store
