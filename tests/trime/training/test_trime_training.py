"""Training: no position sees what is hidden from it, workers are interchangeable, a resumed run is exact."""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pema_ray.training.checkpoint import load_checkpoint
from pema_ray.training.history import TrainerHistory
from pema_ray.training.strategies import Place
from pema_ray.training.trainer import POINTS
from pema_ray.trime.config import DecoderShape, TrimeConfig
from pema_ray.trime.model.decoder import DecoderLM
from pema_ray.trime.objective.loss import joint_log_prob
from pema_ray.trime.objective.memories import PADDING, Places
from pema_ray.trime.objective.objective import MemoryMode, TrimeObjective
from pema_ray.trime.text.segments import Segments, TokenStream
from pema_ray.trime.training import update_time as pace
from pema_ray.trime.training.trainer import TrimeTrainer, UpdateSchedule
from tests.training_kit import die
from tests.trime.kit import VOCABULARY, tiny_model

LENGTH = 8


def corpus(tokens: int, seed: int = 0) -> Segments:
    """Random tokens in documents of 20; the last segment is shorter than the others."""
    draw = np.random.default_rng(seed)
    token_T = draw.integers(0, VOCABULARY, tokens).astype(np.int32)
    return Segments(TokenStream(token_T, np.arange(0, tokens, 20), eos_id=0), LENGTH)


def configured(memory: str = "local", group: int = 5, dropout: float = 0.0, batches: dict | None = None, **train):
    order = "keep" if memory == "long" else "random"
    settings = {"updates": 6, "validate_every": 3, "learning_rate": 0.01, "warm_up_steps": 2, "clip": 1.0, **train}
    return TrimeConfig.model_validate(
        {
            "model": {"shape": {"hidden_size": 16, "dropout": dropout}},
            "batches": {"segment": LENGTH, "group": group, "order": order, **(batches or {})},
            "train": {"memory": memory, **settings},
        }
    )


def trainer_of(config: TrimeConfig, folder: Path, place: Place | None = None, walk_S: np.ndarray | None = None):
    """Of the tiny model, on 83 tokens: 11 segments, so that groups of 5 leave one of a single, short segment."""
    model = tiny_model(adaptive=True)
    model.shape = model.shape.model_copy(update={"dropout": config.model.shape.dropout})
    return TrimeTrainer(config, model, corpus(83), corpus(50, seed=1), folder, place=place or Place(), walk_S=walk_S)


def train(*arguments, **options):
    """(history, weights) of a training to its end."""
    trainer = trainer_of(*arguments, **options)
    return trainer.run(), {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


# ── who sees whom ───────────────────────────────────────────────────────────


def losses(mode: MemoryMode, segments: Segments, numbers: list[int]) -> torch.Tensor:
    """-log P of every position, one by one, `[B, L]`."""
    model = tiny_model(adaptive=True)
    objective = TrimeObjective(model)
    batch = segments.batch(numbers)
    tensors = [torch.from_numpy(array) for array in batch]
    loss_BL = torch.zeros(batch.label_BL.shape)
    state, key = model.represent(tensors[0])
    score = model.score(state.flatten(0, 1), tensors[1].clamp(min=0).flatten())
    memory = objective._memory(key, tensors[1], Places(tensors[3], tensors[2]), mode)
    counts = (batch.label_BL != PADDING).flatten()
    score_N = type(score)(*(t[counts] for t in score))
    loss_BL.flatten()[torch.from_numpy(counts)] = -joint_log_prob(score_N, memory).detach()
    return loss_BL


@pytest.mark.parametrize("memory", ["none", "local", "long"])
def test_a_later_token_never_changes_an_earlier_probability(memory: str):
    """Every later token: of the same segment, and of later segments in the batch."""
    segments = corpus(4 * LENGTH)
    mode = MemoryMode(memory, across_documents=True)  # type: ignore[arg-type]
    before_BL = losses(mode, segments, [0, 1, 2, 3])
    for changed in (3, LENGTH, 2 * LENGTH + 5):
        token_T = segments.stream.token_T.copy()
        token_T[changed] = (token_T[changed] + 1) % VOCABULARY
        changed_segments = Segments(TokenStream(token_T, segments.stream.start_D, 0), LENGTH)
        after_BL = losses(mode, changed_segments, [0, 1, 2, 3])
        torch.testing.assert_close(after_BL.flatten()[:changed], before_BL.flatten()[:changed], atol=0, rtol=0)
        assert not torch.equal(after_BL.flatten()[changed:], before_BL.flatten()[changed:])


def test_external_memory_sees_later_tokens_of_other_segments_alone():
    segments = corpus(3 * LENGTH)
    before_BL = losses(MemoryMode("ext"), segments, [0, 1, 2])
    token_T = segments.stream.token_T.copy()
    token_T[-1] = (token_T[-1] + 1) % VOCABULARY
    after_BL = losses(MemoryMode("ext"), Segments(TokenStream(token_T, segments.stream.start_D, 0), LENGTH), [0, 1, 2])
    torch.testing.assert_close(after_BL[2, :-1], before_BL[2, :-1], atol=0, rtol=0)
    assert (after_BL[:2] != before_BL[:2]).any()


def test_hidden_local_memory_leaves_a_lone_segment_its_vocabulary_only():
    segments = corpus(LENGTH)
    plain_BL = losses(MemoryMode("none"), segments, [0])
    torch.testing.assert_close(losses(MemoryMode("ext", hide_local=True), segments, [0]), plain_BL)
    assert not torch.allclose(losses(MemoryMode("ext"), segments, [0]), plain_BL)
    torch.testing.assert_close(losses(MemoryMode("ext"), segments, [0]), losses(MemoryMode("local"), segments, [0]))


def test_a_memory_that_ends_with_its_document_is_smaller():
    segments = corpus(6 * LENGTH)
    across, within = (losses(MemoryMode("long", across_documents=w), segments, list(range(6))) for w in (True, False))
    torch.testing.assert_close(across.flatten()[:20], within.flatten()[:20])  # the first document
    assert not torch.allclose(across.flatten()[20:], within.flatten()[20:])


def test_padding_counts_nowhere():
    """Three tokens of a last segment weigh as three, and what is after them changes nothing."""
    objective = TrimeObjective(tiny_model())
    batch = corpus(LENGTH + 3).batch([0, 1])
    tensors = [torch.from_numpy(array) for array in batch]
    for memory in ("none", "local", "long", "ext"):
        loss, sums = objective(*tensors, MemoryMode(memory), 1.0)
        noisy = tensors[0].clone()
        noisy[1, 3:] = 5
        noisy_loss, _ = objective(noisy, *tensors[1:], MemoryMode(memory), 1.0)
        torch.testing.assert_close(loss, noisy_loss, atol=0, rtol=0)
        assert float(sums[0]) == pytest.approx(float(loss.detach()), rel=1e-5)


@pytest.mark.parametrize("memory", ["none", "local", "long", "ext"])
@pytest.mark.parametrize("tie", [True, False])
def test_bfloat16_gives_the_loss_and_the_direction_of_float32(memory: str, tie: bool):
    torch.manual_seed(0)
    shape = DecoderShape(hidden_size=16, cutoffs=(7, 15), factor=2, tie_projections=tie, dropout=0)
    model = DecoderLM(shape, VOCABULARY, LENGTH)
    tensors = [torch.from_numpy(array) for array in corpus(40).batch([0, 1, 2, 3, 4])]
    gradients, losses = [], []
    for dtype in (torch.float32, torch.bfloat16):
        loss, _ = TrimeObjective(model, dtype)(*tensors, MemoryMode(memory), 40.0)  # type: ignore[arg-type]
        parts = torch.autograd.grad(loss, list(model.parameters()), materialize_grads=True)
        gradients.append(torch.cat([gradient.flatten() for gradient in parts]))
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.01)
    assert torch.cosine_similarity(*gradients, dim=0) > 0.99


# ── updates ─────────────────────────────────────────────────────────────────


def test_warm_up_by_cross_entropy_and_the_coin_are_the_same_for_all_and_follow_the_seed():
    config = configured("ext", group=2, ce_epochs=0.5, hide_local=0.5)
    schedule = UpdateSchedule(config, 11)
    assert schedule.groups_per_epoch == 6
    assert [schedule.mode(number, number).memory for number in range(5)] == ["none"] * 3 + ["ext"] * 2
    coins = [schedule.mode(10, update).hide_local for update in range(200)]
    assert coins == [UpdateSchedule(config, 11).mode(10, update).hide_local for update in range(200)]
    assert 70 < sum(coins) < 130


def test_an_update_may_reach_over_the_end_of_an_epoch():
    schedule = UpdateSchedule(configured(group=4, batches={"groups_per_update": 2}), 11)
    seen = [segment for update in range(3) for n in schedule.numbers(update) for segment in schedule.group(n)]
    assert sorted(seen) == sorted([*range(11), *range(11)])


@pytest.mark.parametrize("memory", ["local", "long", "ext"])
@pytest.mark.parametrize("optimizer", ["adamw", "nag"])
def test_a_resumed_run_is_bit_for_bit_the_same(memory: str, optimizer: str, tmp_path: Path):
    settings = {"optimizer": optimizer, "momentum": 0.9, "dropout": 0.2}
    undisturbed, model = train(configured(memory, **settings), tmp_path / "whole")
    die(trainer_of(configured(memory, **settings), tmp_path / "stopped"), 5)
    assert load_checkpoint(tmp_path / "stopped/checkpoint.safetensors")[1]["step"] == 3
    resumed, resumed_model = train(configured(memory, **settings), tmp_path / "stopped")
    assert losses_of(resumed) == losses_of(undisturbed)
    for name, tensor in model.items():
        assert torch.equal(tensor, resumed_model[name]), name


def losses_of(history: TrainerHistory) -> list[tuple[str, float]]:
    kinds = {"train": history.train, "validation": history.validation}
    return [(f"{kind} {point['step']}", point["loss"]) for kind, points in kinds.items() for point in points]


def test_training_learns_and_keeps_the_best(tmp_path: Path):
    history, model = train(configured(updates=30, validate_every=5, validation_groups=1), tmp_path)
    assert history.train[-1]["loss"] < history.train[0]["loss"]
    assert history.best_loss == min(point["loss"] for point in history.validation)
    best, _ = load_checkpoint(tmp_path / "best.safetensors")
    assert all(torch.equal(best["model"][name], tensor) for name, tensor in model.items())


# ── several processes ───────────────────────────────────────────────────────

# Not Adam: of gradients that are nothing but rounding (a bias on attention's keys) it makes steps of full length.
SGD = {"optimizer": "nag", "momentum": 0.9, "learning_rate": 0.3}
SHARED = {
    "local": configured("local", **SGD),
    "long": configured("long", **SGD),
    "ext": configured("ext", hide_local=0.5, **SGD),
    "ext, a walk": configured("ext", batches={"order": "bm25"}, **SGD),
    "two groups": configured("long", group=3, batches={"groups_per_update": 2}, **SGD),
    "accelerate": configured("ext", strategy="accelerate", **SGD),
    "one device": configured("long", group=3, batches={"groups_per_update": 3, "across_workers": False}, **SGD),
}
WALK = np.random.default_rng(0).permutation(11)


def _in_a_process(rank: int, world: int, meeting: str, folder: str, shared: dict[str, TrimeConfig], port: int) -> None:
    torch.set_num_threads(1)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    try:
        for name, config in shared.items():
            train(config, Path(folder, name), Place(rank, world), WALK)
            torch.distributed.barrier()
    finally:
        torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> Path:
    """Every kind of memory, by two processes whose shares of a group are uneven: 3 and 2 segments, 1 and none."""
    folder = tmp_path_factory.mktemp("together")
    train_together(folder, SHARED)
    return folder


def train_together(folder: Path, shared: dict[str, TrimeConfig]) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_in_a_process, (2, str(folder / "meeting"), str(folder), shared, port), nprocs=2)


@pytest.mark.parametrize("name", SHARED)
def test_two_processes_train_the_model_of_one(name: str, together: Path, tmp_path: Path):
    compare_with_one(SHARED[name], tmp_path, together / name)


@pytest.mark.slow
def test_two_processes_under_deepspeed_train_the_model_of_one(tmp_path: Path):
    """ZeRO-1; nothing that it does between processes may disturb the exchange of keys."""
    config = configured("ext", strategy="deepspeed", batches={"groups_per_update": 2}, group=3, **SGD)
    train_together(tmp_path, {"deepspeed": config})
    alone = configured("ext", batches={"groups_per_update": 2}, group=3, **SGD)
    compare_with_one(alone, tmp_path / "alone", tmp_path / "deepspeed")


def compare_with_one(config: TrimeConfig, alone_folder: Path, shared_folder: Path) -> None:
    """Train in this process; its model, optimiser and losses are those of the others."""
    train(config, alone_folder, walk_S=WALK)
    for name in ("checkpoint.safetensors", "best.safetensors"):
        (alone, _), (shared, _) = (load_checkpoint(folder / name) for folder in (alone_folder, shared_folder))
        for group, tensors in alone.items():
            for key, tensor in tensors.items():
                torch.testing.assert_close(shared[group][key], tensor, atol=2e-6, rtol=1e-4, msg=f"{group} {key}")
    shared, alone = ((folder / POINTS).read_text().splitlines() for folder in (shared_folder, alone_folder))
    for ours, theirs in zip(map(json.loads, shared), map(json.loads, alone), strict=True):
        assert ours.pop("kind") == theirs.pop("kind") and ours == pytest.approx(theirs, rel=1e-5)


def test_the_pace_of_objectives_is_measured_in_turns(tmp_path: Path, monkeypatch):
    """Each objective's clock runs for its own updates alone, and the first two of each are not counted."""
    order: list[str] = []

    class Learner:
        def __init__(self, memory: str) -> None:
            self.memory, self.place = memory, Place()

        def batches(self, first: int) -> Iterator[None]:
            return repeat(None)

        def learn(self, step: int, inputs: None) -> None:
            order.append(f"{self.memory} {step}")
            now[0] += {"none": 1.0, "local": 3.0}[self.memory] * (100 if step < 2 else 1)

    now = [0.0]
    monkeypatch.setattr(pace, "_trainer", lambda config, prepared, vocabulary, updates: Learner(config.train.memory))
    monkeypatch.setattr(pace.time, "perf_counter", lambda: now[0])
    configs: Any = {memory: configured(memory=memory) for memory in ("none", "local")}
    assert pace.seconds_per_update(configs, tmp_path, 9, rounds=3) == {"none": 1.0, "local": 3.0}
    assert order[:4] == ["none 0", "local 0", "none 1", "local 1"] and len(order) == 10


def test_the_pace_is_measured_over_more_updates_than_the_training_has(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(pace.TokenStream, "open", lambda folder, split: corpus(83).stream)
    seconds = pace.seconds_per_update({"local": configured("local", updates=2)}, tmp_path, VOCABULARY, rounds=3)
    assert seconds["local"] > 0
