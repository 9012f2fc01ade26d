"""How long an update of each objective takes, measured in turns in this process, so that other work slows all alike.

The table's *equal time* follows from it: wall times of trainings hours apart would compare the machine's loads.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from pema_ray.runtime.hardware import pick_device
from pema_ray.training.strategies import Place
from pema_ray.trime.config import MemoryKind, TrimeConfig
from pema_ray.trime.model.registry import make_model
from pema_ray.trime.text.segments import Segments, TokenStream
from pema_ray.trime.training.trainer import TrimeTrainer

ROUNDS = 12


def seconds_per_update(
    configs: Mapping[MemoryKind, TrimeConfig], prepared: Path, vocabulary: int, rounds: int = ROUNDS
) -> dict[MemoryKind, float]:
    """Median seconds of each objective's update, after two that are not counted; no warm-up by cross-entropy.

    Args:
        configs: of each objective; they differ in the objective's settings alone.
        prepared: the corpus that they share.
        vocabulary: its number of words.
    """
    trainers: dict[MemoryKind, TrimeTrainer] = {
        memory: _trainer(config, prepared, vocabulary, rounds + 2) for memory, config in configs.items()
    }
    batches = {memory: trainer.batches(0) for memory, trainer in trainers.items()}
    times: dict[MemoryKind, list[float]] = {memory: [] for memory in configs}
    for step in range(rounds + 2):
        for memory, trainer in trainers.items():
            started = time.perf_counter()
            trainer.learn(step, next(batches[memory]))
            if trainer.place.device.type == "cuda":
                torch.cuda.synchronize()
            if step >= 2:
                times[memory].append(time.perf_counter() - started)
    return {memory: statistics.median(seconds) for memory, seconds in times.items()}


def _trainer(config: TrimeConfig, prepared: Path, vocabulary: int, updates: int) -> TrimeTrainer:
    """A trainer of one process with its strategy, for this many updates."""
    train = config.train.model_copy(update={"ce_epochs": 0.0, "strategy": "ddp", "updates": updates})
    c = config.model_copy(update={"train": train})
    torch.manual_seed(c.seed)
    model = make_model(c.model, vocabulary, c.batches.segment)
    text = Segments(TokenStream.open(prepared, "train"), c.batches.segment)
    place = Place(device=pick_device("auto" if train.gpus_per_worker else "cpu"))
    model.to(place.device)
    walk_S = np.arange(len(text)) if c.batches.order == "bm25" else None  # the order changes no time
    trainer = TrimeTrainer(c, model, text, text, prepared, place=place, walk_S=walk_S)
    trainer.strategy = trainer.make_strategy()
    return trainer
