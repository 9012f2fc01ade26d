"""Look-back: causal, the identity before training, and the same step by step as in one pass."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pema_ray.data_owner.adapter.look_back import LookBack, LookBackCache
from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.batch_samplers import SequenceShuffle, sequences_in_order
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.objectives import JointObjective
from pema_ray.data_owner.training.trainer import AdapterTrainer
from pema_ray.errors import UserError
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import encode
from pema_ray.pema.config import ExperimentConfig
from tests.data_owner.training.test_training import assert_close, assert_one_curve, run_in_processes
from tests.training_kit import die, train

H, V, WIDTH = 16, 40, 8


def stirred(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module with every parameter changed: no parameter stays at a zero that would hide a fault."""
    draw = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=draw)
    return module.eval()


@pytest.fixture
def look_back() -> LookBack:
    module = stirred(LookBack(H, 2, WIDTH))
    assert isinstance(module, LookBack)
    return module


@pytest.fixture
def sequence() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`x [3, 7, H]`, the tokens that follow `[3, 7]`, and an embedding `[V, H]`."""
    draw = torch.Generator().manual_seed(1)
    size = (3, 7)
    return (
        torch.randn(*size, H, generator=draw),
        torch.randint(0, V, size, generator=draw),
        torch.randn(V, H, generator=draw),
    )


def test_it_is_the_identity_before_training(sequence):
    x, follows, embedding = sequence
    assert torch.equal(LookBack(H, 3, WIDTH)(x, follows, embedding), x)


@pytest.mark.parametrize("at", range(7))
def test_it_is_causal(look_back, sequence, at: int):
    """A position does not see the token that follows it, which is to be predicted."""
    x, follows, embedding = sequence
    output = look_back(x, follows, embedding)
    changed_x, changed_follows = x.clone(), follows.clone()
    changed_x[:, at + 1 :] += 1
    changed_follows[:, at:] = (changed_follows[:, at:] + 1) % V
    changed_output = look_back(changed_x, changed_follows, embedding)
    torch.testing.assert_close(changed_output[:, : at + 1], output[:, : at + 1])
    if at < 6:
        assert not torch.allclose(changed_output[:, at + 1], output[:, at + 1])


def test_earlier_tokens_and_states_matter(look_back, sequence):
    x, follows, embedding = sequence
    output = look_back(x, follows, embedding)
    changed = follows.clone()
    changed[:, 1] = (changed[:, 1] + 1) % V
    assert not torch.allclose(look_back(x, changed, embedding)[:, 4], output[:, 4])
    moved = x.clone()
    moved[:, 1] += 1
    assert not torch.allclose(look_back(moved, follows, embedding)[:, 4], output[:, 4])


@pytest.mark.parametrize("prompt_length", [0, 1, 4, 6])
@torch.inference_mode()
def test_steps_give_what_one_pass_gives(look_back, sequence, prompt_length: int):
    """After a prompt of any length, even 0."""
    x, follows, embedding = sequence
    expected = look_back(x, follows, embedding)
    for i in range(3):
        cache = LookBackCache(look_back, x[i, :prompt_length], follows[i, :prompt_length], embedding)
        for t in range(prompt_length, 7):
            torch.testing.assert_close(cache.step(x[i, t : t + 1])[0], expected[i, t])
            cache.follow(int(follows[i, t]), embedding)


@torch.inference_mode()
def test_a_position_that_did_not_step_is_not_remembered(look_back, sequence):
    """λ is 0 there: without `step`, `follow` does nothing."""
    x, follows, embedding = sequence
    stepped, passed = (LookBackCache(look_back, x[0, :3], follows[0, :3], embedding) for _ in range(2))
    passed.follow(int(follows[0, 3]), embedding)
    assert torch.equal(passed.step(x[0, 5:6]), stepped.step(x[0, 5:6]))


# ── in an adapter ───────────────────────────────────────────────────────────


def copies(count: int, seed: int, hidden: int = H) -> MemoryRows:
    """Sequences whose targets repeat their prompts' tokens; a state depends on its position alone, not on a token."""
    draw = np.random.default_rng(seed)
    places = np.random.default_rng(0).normal(size=(12, hidden)).astype(np.float32)
    keys, targets, examples, positions = [], [], [], []
    for example in range(count):
        length = int(draw.integers(2, 6))
        tokens = draw.integers(3, V, length)
        for half in (0, 1):  # the prompt's rows, then the target's: place k of each is the same state
            keys += [places[k + 6 * half] for k in range(length)]
            targets += tokens.tolist()
            positions += [k - length * (1 - half) for k in range(length)]
        examples += [example] * 2 * length
    as_int = [np.array(some, kind) for some, kind in ((targets, np.int32), (examples, np.int64), (positions, np.int32))]
    return MemoryRows(encode(np.array(keys, np.float32), "float32"), *as_int)


def copying_trainer(head, folder: Path, settings: dict, **adapter_settings) -> AdapterTrainer:
    config = TrainConfig(
        rank=6, batch_size=128, epochs=12, validate_every=20, learning_rate=1e-2, solver="none", residual=True,
        **settings,
    )  # fmt: skip
    adapter = AdapterConfig(H, 6, "tiny", "a" * 16, residual=True, **adapter_settings)
    train, dev = copies(400, 1), copies(60, 2)
    if not adapter.looks_back:
        train, dev = train.of_targets, dev.of_targets
    return AdapterTrainer(adapter, config, head, train, dev, folder, seed=5)


def make_trainer(head, folder: Path, look_back: int) -> AdapterTrainer:
    settings = {"look_back": look_back, "look_back_width": 32}
    return copying_trainer(head, folder, settings, look_back_layers=look_back, look_back_width=32)


def with_batches_of_40(trainer: AdapterTrainer, **changes) -> AdapterTrainer:
    """Batches of 40 sequences, two epochs."""
    rows = round(40 * trainer.sampler.rows / 400)
    del trainer.sampler  # recomputed from the new settings
    trainer.settings = trainer.settings.model_copy(update={"epochs": 2, "batch_size": rows, **changes})
    return trainer


def test_it_learns_to_copy(make_head, tmp_path: Path):
    blind = make_trainer(make_head(), tmp_path / "blind", 0).run()
    adapter, seeing = train(make_trainer(make_head(), tmp_path / "seeing", 1))
    assert blind.best_loss > 3.0  # 37 equally likely tokens: 3.6 nats
    assert seeing.best_loss < 0.5 * blind.best_loss
    loaded = PemaAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "adapter"))
    assert loaded.config.looks_back and "looks back through 1 × 32" in (tmp_path / "adapter/README.md").read_text()
    for name, tensor in adapter.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name


def test_a_resumed_training_equals_an_undisturbed_one(make_head, tmp_path: Path):
    undisturbed, _ = train(make_trainer(make_head(), tmp_path / "one", 1))
    die(make_trainer(make_head(), tmp_path / "two", 1), 47)
    resumed, _ = train(make_trainer(make_head(), tmp_path / "two", 1))
    for name, tensor in undisturbed.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


def test_batches_are_whole_sequences_and_processes_share_them():
    rows = copies(50, 3)
    single = SequenceShuffle(rows, 36, seed=1)
    parts = [SequenceShuffle(rows, 36, seed=1, rank=rank, world=2) for rank in range(2)]
    assert single.rows == int((rows.position >= 0).sum())
    examples: list[int] = []
    shares: list[float] = []
    for batch, *parts_of_batch in zip(single.batches(3), *(part.batches(3) for part in parts), strict=True):
        assert sorted(np.concatenate([b.example for b in parts_of_batch])) == sorted(batch.example)
        assert sum(b.share.sum() for b in parts_of_batch) == pytest.approx(2 * batch.share.sum())
        shares += batch.share[batch.is_target].tolist()
        for example in np.unique(batch.example):
            assert (batch.example == example).sum() == (rows.example_id == example).sum()
        assert batch.is_target.sum() * 2 == len(batch.target)
        examples += np.unique(batch.example).tolist()
    assert len(examples) == len(set(examples)) >= 40
    assert shares == pytest.approx([shares[0]] * len(shares))  # a row counts no more in a batch of few rows
    assert sum(shares) / single.steps_per_epoch == pytest.approx(1, rel=0.1)
    blocks = np.concatenate([block.target for part in parts for block in part.row_blocks()])
    assert sorted(blocks) == sorted(rows.target[rows.position >= 0])


def test_a_batch_is_split_between_sequences():
    (batch, *_) = SequenceShuffle(copies(9, 4), 1000, seed=1).batches(0)
    assert batch.example is not None
    parts = batch.split(4)
    assert len(parts) == 4 and sum(len(part.target) for part in parts) == len(batch.target)
    assert sum(len(np.unique(part.example)) for part in parts) == len(np.unique(batch.example))


def test_sequences_in_order_end_after_enough_targets():
    rows = copies(30, 6)
    batches = list(sequences_in_order(rows, 20))
    targets = sum(int(batch.is_target.sum()) for batch in batches)
    assert 20 <= targets < 26
    every = list(sequences_in_order(rows))
    assert np.array_equal(np.concatenate([batch.target for batch in every]), rows.target)


# ── what is refused ─────────────────────────────────────────────────────────


def test_a_memory_without_prompts_is_refused(tmp_path: Path, make_rows, card):
    from pema_ray.memory import ExternalMemory
    from tests.memory.test_manage import make

    with pytest.raises(UserError, match=r"build_memory\.prompts=true"):
        ExternalMemory.open(make(tmp_path / "m", range(4))).view(prompts=True)


def test_rows_without_their_sequences_are_refused(make_head):
    adapter = PemaAdapter(AdapterConfig(H, 4, "tiny", "a" * 16, look_back_layers=1, look_back_width=8))
    state = torch.randn(3, H)
    with pytest.raises(ValueError, match="its rows need their sequences"):
        adapter.log_probs(state, make_head())
    with pytest.raises(ValueError, match="its rows need their sequences"):
        JointObjective(adapter, make_head(), 0.2)(state, torch.zeros(3, dtype=torch.long))


KEPT = {"prompts": True}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"train": {"look_back": 1}}, "train.look_back needs build_memory.prompts=true"),
        ({"compare": {"systems": ["pema_look_back"]}}, "pema_look_back needs build_memory.prompts=true"),
        ({"train": {"local_memory": 64}}, "train.local_memory needs build_memory.prompts=true"),
        ({"compare": {"systems": ["pema_local_memory"]}}, "pema_local_memory needs build_memory.prompts=true"),
        ({"build_memory": KEPT, "train": {"local_memory": 8, "stream": True}}, "whole sequences in RAM"),
        ({"build_memory": KEPT, "train": {"look_back": 1, "stream": True}}, "whole sequences in RAM"),
        ({"build_memory": KEPT, "train": {"look_back": 1, "solver": "adam"}}, "whole sequences in RAM"),
        ({"build_memory": KEPT, "train": {"look_back": 1, "shuffle": "window"}}, "whole sequences in RAM"),
    ],
)
def test_settings_that_give_it_no_sequences_are_refused(section: dict, message: str):
    with pytest.raises(ValueError, match=message):
        ExperimentConfig(**section)


def test_parts_of_a_batch_add_up_to_it(make_head, tmp_path: Path):
    states = []
    for accumulate in (1, 3):
        trainer = make_trainer(make_head(), tmp_path / str(accumulate), 1)
        trainer.settings = trainer.settings.model_copy(update={"accumulate": accumulate, "epochs": 2})
        states.append(train(trainer)[0].state_dict())
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"strategy": "deepspeed", "accumulate": 2}], ids=str)
def test_processes_share_whole_sequences(make_head, tmp_path: Path, settings: dict):
    single, history = train(with_batches_of_40(make_trainer(make_head(), tmp_path / "one", 1)))
    trainer = with_batches_of_40(make_trainer(make_head(), tmp_path / "many", 1), **settings)
    many, many_history = run_in_processes(trainer, 2, tmp_path / "meeting")
    assert_one_curve(history, many_history)
    assert_close(single, many, 1e-4)
