"""A prefix trained through the line is the prefix that autograd through the whole model would train."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.config import PrefixConfig
from pema_ray.data_owner.training.prefix import PrefixAndAdapter, PrefixObjective, PrefixTrainer
from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, ExtractBatch
from pema_ray.line.prefix import Prefix
from pema_ray.plm_owner.engine import LocalPLM
from pema_ray.plm_owner.model.load import LoadedPLM

TEXT = list(range(40, 48))
SEQUENCES = [[5, 9, 60, 61, 7], [70, 71, 72], [80, 81, 82, 83, 84, 85, 86]]
BATCH = ExtractBatch(SEQUENCES, [2, 0, 5])
TARGET = torch.tensor([61, 7, 99, 71, 72, 90, 86, 91])


@pytest.fixture
def llama(tiny_plm) -> LoadedPLM:
    return tiny_plm("llama")


@pytest.fixture
def plm(llama) -> Iterator[BlockingPLM]:
    with BlockingPLM(LocalPLM(llama)) as client:
        yield client


def objective_for(plm: BlockingPLM, frozen: int = 1, residual: bool = True) -> PrefixObjective:
    description = plm.describe()
    config = AdapterConfig(32, 4, description.card.name, description.card.fingerprint, residual=residual)
    torch.manual_seed(0)
    adapter = PemaAdapter(config)
    with torch.no_grad():
        adapter.B_pd.normal_(0, 0.1)
    start = plm.read_prefix(TEXT)
    model = PrefixAndAdapter(Prefix(start.embeddings, start.shape, frozen), adapter)
    return PrefixObjective(model, plm, plm.lm_head().head)


def whole_model_loss(llama: LoadedPLM, embeddings: torch.Tensor, objective: PrefixObjective) -> torch.Tensor:
    """The same loss where one process has all weights: sequence by sequence, logits by the model's own head."""
    prefix, adapter = objective.model.prefix.replaced(embeddings), objective.model.adapter
    losses = []
    targets = iter(TARGET.split([3, 3, 2]))
    for ids, first in zip(BATCH.token_ids, BATCH.first, strict=True):
        cache = DynamicCache(config=llama.model.config)
        for number, (keys, values) in enumerate(prefix.keys_and_values()):
            cache.update(keys, values, number)
        normed = llama.model.model(torch.tensor([ids]), past_key_values=cache).last_hidden_state[0, first:]
        adapted = normed + F.linear(F.linear(normed, adapter.A), adapter.B_pd)
        losses.append(F.cross_entropy(llama.model.lm_head(adapted), next(targets), reduction="none"))
    return torch.cat(losses).mean()


def test_loss_and_gradients_are_those_of_the_whole_model(llama, plm):
    objective = objective_for(plm)
    adapter = objective.model.adapter
    embeddings = objective.model.prefix.embeddings.clone().requires_grad_()
    expected = whole_model_loss(llama, embeddings, objective)
    wanted = torch.autograd.grad(expected, [embeddings, adapter.A, adapter.B_pd])
    objective.train()
    (loss,) = objective(BATCH, TARGET)
    loss.backward()
    torch.testing.assert_close(loss.detach(), expected.detach(), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(objective.model.delta.grad, wanted[0][1:], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adapter.A.grad, wanted[1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(adapter.B_pd.grad, wanted[2], atol=1e-5, rtol=1e-4)


def test_prefix_and_adapter_learn_together_and_frozen_positions_stay(llama, plm):
    objective = objective_for(plm, frozen=2)
    before, weights = objective.model.prefix.embeddings, deepcopy(llama.model.state_dict())
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    objective.train()
    losses = []
    for _ in range(30):
        (loss,) = objective(BATCH, TARGET)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.2 * losses[0]
    after = objective.model.prefix.embeddings
    torch.testing.assert_close(after[:2], before[:2], atol=0, rtol=0)
    assert (after[2:] - before[2:]).abs().amax(1).min() > 0.01
    assert all(torch.equal(tensor, weights[name]) for name, tensor in llama.model.state_dict().items())


def test_a_prefix_with_nothing_to_train_is_refused(plm):
    with pytest.raises(UserError, match="All 8 positions of the prefix are frozen"):
        objective_for(plm, frozen=8)


def test_a_stopped_training_resumes_to_the_same_prefix(plm, tmp_path):
    config = PrefixConfig(rank=4, epochs=4, validate_every=3, learning_rate=1e-2, prefix_learning_rate=5e-2)
    start = plm.read_prefix(TEXT)
    parts = [(ExtractBatch([ids], [first]), TARGET[a:b]) for ids, first, a, b in (
        (SEQUENCES[0], 2, 0, 3), (SEQUENCES[1], 0, 3, 6), (SEQUENCES[2], 5, 6, 8),
    )]  # fmt: skip

    def trainer(folder: str) -> PrefixTrainer:
        (tmp_path / folder).mkdir(exist_ok=True)
        return PrefixTrainer(config, plm, plm.lm_head().head, start, parts, parts, tmp_path / folder)

    whole = trainer("whole")
    history = whole.run()
    assert history.best_loss < 0.7 * history.validation[0]["loss"] and len(history.train) == 12

    class Stopped(Exception):
        pass

    def stop(metrics) -> None:
        if metrics["step"] == 6:
            raise Stopped

    first = trainer("stopped")
    first.on_saved = stop
    with pytest.raises(Stopped):
        first.run()
    second = trainer("stopped")
    assert [point["loss"] for point in second.run().train] == [point["loss"] for point in history.train]
    assert torch.equal(second.model.prefix.embeddings, whole.model.prefix.embeddings)
