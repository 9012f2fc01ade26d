"""LoRA learns by changing linear layers alone, and what it learned stays when it is merged."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line.plm_config import PLMConfig
from pema_ray.pema.baselines import lora
from pema_ray.pema.baselines.config import LoraSettings
from pema_ray.pema.baselines.lora import LoraJob, _losses, target_losses, train_lora, tune_lora
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.tasks import EncodedPair

pytest.importorskip("peft")


@pytest.fixture
def load(tiny_plm_folder) -> Callable[[], LoadedPLM]:
    """Loads a model of its own: training changes it."""
    return lambda: load_plm(PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1))


@pytest.fixture
def plm(load) -> LoadedPLM:
    return load()


def pairs(count: int = 24) -> list[EncodedPair]:
    """The target repeats the prompt's last token, three times."""
    draw = np.random.default_rng(0)
    prompts = [draw.integers(3, 40, draw.integers(2, 7)).tolist() for _ in range(count)]
    return [EncodedPair(i, prompt, [prompt[-1]] * 3) for i, prompt in enumerate(prompts)]


def test_it_learns_and_leaves_embeddings_norms_and_head_alone(plm: LoadedPLM):
    head, told = export_lm_head(plm).head, []
    before = {name: tensor.clone() for name, tensor in plm.model.state_dict().items()}
    loss = float(_losses(plm, head, pairs(), plm.eos_token_ids[0]).mean())
    settings = LoraSettings(rank=8, epochs=30, max_batch_tokens=120)
    tuned, training = train_lora(plm, head, pairs(), settings, 1e-2, on_step=lambda *step: told.append(step))
    assert tuned.name == f"{plm.name}+LoRA" and len(told) == len(training.losses) == told[0][1]
    with torch.no_grad():
        after = float(_losses(tuned, head, pairs(), plm.eos_token_ids[0]).mean())
    assert after < 0.5 * loss
    state = tuned.model.state_dict()
    assert state.keys() == before.keys()
    changed = {name for name, tensor in state.items() if not torch.equal(tensor, before[name])}
    assert changed and all("proj" in name for name in changed)
    assert "lm_head.weight" not in changed
    assert training.trained_parameters < sum(t.numel() for t in before.values()) / 2
    assert not any(parameter.requires_grad for parameter in tuned.model.parameters())


def test_the_loss_is_that_of_the_models_own_logits(plm: LoadedPLM):
    first, *_ = pairs()
    with torch.no_grad():
        logits = plm.model(torch.tensor([first.prompt + first.target])).logits[0, len(first.prompt) - 1 :]
        gold = torch.tensor([*first.target, plm.eos_token_ids[0]])
        expected = torch.nn.functional.cross_entropy(logits, gold)
        torch.testing.assert_close(
            _losses(plm, export_lm_head(plm).head, [first], plm.eos_token_ids[0]).mean(), expected, atol=1e-4, rtol=1e-4
        )


def test_the_epoch_with_the_lowest_dev_loss_is_kept(load):
    plm = load()
    head, eos = export_lm_head(plm).head, plm.eos_token_ids[0]
    dev = [EncodedPair(n, pair.prompt, [50, 51, 52]) for n, pair in enumerate(pairs()[:4])]
    settings = LoraSettings(rank=4, epochs=20, max_batch_tokens=120)
    tuned, training = train_lora(plm, head, pairs(), settings, 5e-2, dev)
    assert len(training.dev_losses) == 20
    assert training.epoch == 1 + training.dev_losses.index(min(training.dev_losses)) < 20  # else it shows nothing
    found = sum(target_losses(tuned, head, dev, eos)) / sum(len(pair.target) + 1 for pair in dev)
    assert found == pytest.approx(min(training.dev_losses), rel=1e-4)
    assert len(target_losses(tuned, head, dev, None)) == sum(len(pair.target) for pair in dev)


def test_one_seed_gives_one_model(load):
    models, settings = [load(), load()], LoraSettings(epochs=2)
    runs = [train_lora(plm, export_lm_head(plm).head, pairs(), settings, 1e-3, seed=3)[1] for plm in models]
    assert runs[0].losses == runs[1].losses


def test_a_missing_library_is_named(plm: LoadedPLM, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match="pip install peft"):
        train_lora(plm, export_lm_head(plm).head, pairs(), LoraSettings(), 1e-3)


def test_the_rate_with_the_lowest_dev_loss_is_saved(tiny_plm_folder, tmp_path):
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)

    def job(*rates: float) -> LoraJob:
        settings = LoraSettings(rank=8, epochs=20, learning_rates=rates, max_batch_tokens=120)
        chosen = pairs()
        return LoraJob(config, chosen, chosen[:8], chosen[8:], settings, tmp_path / "model", 0, None)

    found = tune_lora(job(1e-6, 1e-2, 1e-5))
    assert (found["error"], found["learning_rate"]) == ("", 1e-2) and found["peak_bytes"] > 2**20
    saved = load_plm(config.model_copy(update={"name": str(tmp_path / "model")}))
    again = target_losses(saved, export_lm_head(saved).head, job(1e-2).test, None)
    assert np.mean(again) == pytest.approx(found["nll"], rel=1e-4)
    assert "lower its learning rate" in tune_lora(job(1e30))["error"]


def test_a_tuning_goes_on_with_the_rates_that_are_left(tiny_plm_folder, tmp_path, monkeypatch):
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)
    trained: list[float] = []
    at_rate = lora._at_rate
    monkeypatch.setattr(lora, "_at_rate", lambda job, rate, lowest: trained.append(rate) or at_rate(job, rate, lowest))

    def tuned(*rates: float, epochs: int = 1) -> dict[str, Any]:
        trained.clear()
        settings = LoraSettings(rank=4, learning_rates=rates, epochs=epochs, max_batch_tokens=64)
        chosen = pairs()
        return tune_lora(LoraJob(config, chosen, chosen[:8], chosen[8:], settings, tmp_path / "model", 0, None))

    first = tuned(1e-6, 1e-2)
    assert trained == [1e-6, 1e-2]
    assert tuned(1e-6, 1e-2) == first and trained == []
    assert tuned(1e-5, 1e-2, 1e-6) == first and trained == [1e-5]  # a wider grid
    narrow = tuned(1e-5, 1e-6)  # whose best is no longer in the folder
    assert trained == [1e-5, 1e-6] and narrow["learning_rate"] == 1e-5
    saved = load_plm(config.model_copy(update={"name": str(tmp_path / "model")}))
    again = target_losses(saved, export_lm_head(saved).head, pairs()[8:], None)
    assert np.mean(again) == pytest.approx(narrow["nll"], rel=1e-4)
    tuned(1e-5, 1e-6, epochs=2)
    assert trained == [1e-5, 1e-6]
