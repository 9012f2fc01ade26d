"""Published sizes, saving and loading, transformers models by a hook, and what a dry run counts."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from rich.console import Console

from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.trime.config import DecoderShape, ModelConfig, TrimeConfig
from pema_ray.trime.dry_run import estimate
from pema_ray.trime.model.decoder import DecoderLM, sinusoids
from pema_ray.trime.model.memory_lm import MemoryLM
from pema_ray.trime.model.registry import (
    PUBLISHED,
    count_parameters,
    fingerprint_of,
    load_model,
    make_model,
    save_model,
)
from pema_ray.trime.model.transformers_model import TransformersLM
from tests.trime.kit import tiny_model

CONFIGS = Path(__file__).parents[3] / "configs/trime"
LANGUAGE_MODELS = sorted(path for path in CONFIGS.glob("*.yaml") if not path.stem.startswith("mt_"))


@pytest.mark.parametrize(
    ("name", "vocabulary", "published"),
    [("247m", 267_744, 247e6), ("150m", 267_744, 150e6), ("enwik8-38m", 208, 38e6), ("7m", 267_744, 7e6)],
)
def test_published_models_have_their_published_sizes(name: str, vocabulary: int, published: float):
    with torch.device("meta"):
        model = make_model(ModelConfig(name=name), vocabulary, 3072)
    assert count_parameters(model) == pytest.approx(published, rel=0.01 if name != "7m" else 0.05)
    assert isinstance(model, MemoryLM)


def test_keys_are_what_goes_into_the_last_feed_forward_block():
    model = tiny_model(adaptive=True)
    seen = []
    last = model.layers[-1]
    last.up.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))  # type: ignore[union-attr]
    state_BTH, key_BTH = model.represent(torch.randint(0, 23, (2, 5)))
    assert torch.equal(seen[0], key_BTH) and state_BTH.shape == key_BTH.shape == (2, 5, 16)


def test_positions_are_fairseqs_sinusoids():
    """sin(p · 10000^(-i / (half - 1))), the first position being 1; an odd size ends with a zero."""
    table = sinusoids(4, 7, torch.device("cpu"))
    assert table.shape == (4, 7)
    assert float(table[2, 1]) == pytest.approx(torch.sin(torch.tensor(3 * 10000 ** (-1 / 2))).item(), abs=1e-6)
    assert float(table[2, 5]) == pytest.approx(torch.cos(torch.tensor(3 / 10000)).item(), abs=1e-6)
    assert (table[:, 6] == 0).all()


@pytest.mark.parametrize("adaptive", [False, True])
def test_a_saved_model_is_the_same_model(adaptive: bool, tmp_path: Path):
    model = tiny_model(adaptive)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    token_BT = torch.randint(0, 23, (2, 9))
    for expected, actual in zip(model.represent(token_BT), loaded.represent(token_BT), strict=True):
        assert torch.equal(expected, actual)
    assert fingerprint_of(loaded) == fingerprint_of(model) != fingerprint_of(tiny_model(adaptive, seed=1))


def test_a_missing_and_a_damaged_model_are_named(tmp_path: Path):
    with pytest.raises(UserError, match="holds no trained model. Run: pema-ray trime train"):
        load_model(tmp_path)
    save_model(tiny_model(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="not a readable model"):
        load_model(tmp_path)


def test_an_unknown_model_is_named_with_the_nearest_one():
    with pytest.raises(UserError, match="unknown model '247'. Did you mean '247m'?"):
        make_model(ModelConfig(name="247"), 100, 8)


# ── transformers ────────────────────────────────────────────────────────────


def test_any_transformers_model_gives_states_keys_and_its_own_distribution(
    architecture: str, tiny_plm_folder, tokenizer, tmp_path: Path
):
    name = tiny_plm_folder(architecture)
    refused = {"gemma2": "soft-capped logits are not supported", "mamba": "no feed-forward block found in MambaBlock"}
    if architecture in refused:
        with pytest.raises(UserError, match=refused[architecture]):
            make_model(ModelConfig(name=f"transformers:{name}"), len(tokenizer), 8)
        return
    model = make_model(ModelConfig(name=f"transformers:{name}"), len(tokenizer), 8).eval()
    assert isinstance(model, TransformersLM) and isinstance(model, MemoryLM)
    token_BT = torch.randint(3, len(tokenizer), (3, 7))
    with torch.no_grad():
        state_BTH, key_BTH = model.represent(token_BT)
        expected = model.causal(input_ids=token_BT).logits.log_softmax(-1)
        torch.testing.assert_close(model.log_probs(state_BTH.flatten(0, 1))[0].view_as(expected), expected)
        assert key_BTH.shape == (3, 7, model.hidden_size)
        assert not torch.allclose(key_BTH[:, -1], model.represent(token_BT.flip(1))[1][:, -1])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    for actual, reference in zip(loaded.represent(token_BT), (state_BTH, key_BTH), strict=True):
        torch.testing.assert_close(actual, reference)


def test_a_fresh_architecture_takes_the_corpus_s_vocabulary_and_learns(tiny_plm_folder):
    model = make_model(ModelConfig(name=f"transformers:{tiny_plm_folder('llama')}", fresh=True), 41, 16)
    assert model.vocabulary_size == 41
    state_BTH, key_BTH = model.represent(torch.randint(0, 41, (2, 5)))
    score = model.score(state_BTH.flatten(0, 1), torch.randint(0, 41, (10,)))
    (score.log_prob_N.sum() + key_BTH.sum()).backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if "mlp.up" in name)


def test_a_vocabulary_that_the_model_does_not_know_is_refused(tiny_plm_folder):
    with pytest.raises(UserError, match=r"the corpus was prepared with 5,000. Prepare with vocabulary=tokenizer"):
        make_model(ModelConfig(name=f"transformers:{tiny_plm_folder('llama')}"), 5000, 8)
    with pytest.raises(UserError, match=r"batches.segment \(4096\) is more than the 96 positions"):
        make_model(ModelConfig(name=f"transformers:{tiny_plm_folder('llama')}"), 300, 4096)


# ── dry runs ────────────────────────────────────────────────────────────────


def test_a_dry_run_counts_parameters_updates_rows_and_bytes(tmp_path: Path):
    config = read_config(TrimeConfig, CONFIGS / "wikitext103_247m_long.yaml", [f"run_dir={tmp_path}"])
    result = estimate(config)
    assert result.parameters == pytest.approx(247e6, rel=0.01)
    assert (result.updates, result.tokens_per_update, result.memory) == (286_000, 73_728, 12_288)
    assert result.key_size == 1024
    assert result.rows == 103_227_021
    assert result.datastore_bytes == 103_227_021 * (2048 + 4)  # the published 211 GB of keys, and token ids
    assert result.epochs == pytest.approx(204.3, abs=0.1)
    assert result.training_bytes == result.parameters * 4 * 3
    tokens = 286_000 * 73_728
    assert (
        6 * 201e6 * tokens < result.flops < 12 * 201e6 * tokens
    )  # six operations for a weight of the layers, and the rest
    assert result.hours == pytest.approx(result.flops / (4 * 4e13) / 3600)
    console = Console(width=120)
    with console.capture() as output:
        console.print(result.table())
    assert "286,000 of 73,728 tokens, 204.3 epochs" in output.get()


def test_a_dry_run_without_a_corpus_says_what_is_missing(tmp_path: Path):
    with pytest.raises(UserError, match="the corpus is not prepared yet. Run: pema-ray trime prepare, or set plan."):
        estimate(TrimeConfig(run_dir=str(tmp_path)))


@pytest.mark.parametrize("path", LANGUAGE_MODELS, ids=lambda path: path.stem)
def test_every_shipped_configuration_is_valid(path: Path):
    config = read_config(TrimeConfig, path)
    if config.plan.tokens:
        assert estimate(config).parameters > 0


def test_the_seven_published_settings_are_there():
    published = {path.stem for path in LANGUAGE_MODELS if read_config(TrimeConfig, path).model.name in PUBLISHED}
    assert published >= {
        "wikitext103_247m_local", "wikitext103_247m_long", "wikitext103_247m_ext", "wikitext103_150m_local",
        "wikitext103_150m_long", "enwik8_38m_local", "enwik8_38m_long",
    }  # fmt: skip


def test_a_shape_that_cannot_be_is_refused():
    with pytest.raises(UserError, match=r"hidden_size \(10\) must be a multiple of heads \(4\)"):
        read_config(TrimeConfig, None, ["model.shape.hidden_size=10"])
    with pytest.raises(UserError, match="train.memory=long needs batches.order=keep"):
        read_config(TrimeConfig, None, ["train.memory=long"])
    with pytest.raises(UserError, match="accumulate follows from batches.groups_per_update"):
        read_config(TrimeConfig, None, ["train.accumulate=2"])


def test_a_longer_sequence_than_meant_works():
    model = DecoderLM(DecoderShape(), 50, 4)
    assert model.represent(torch.randint(0, 50, (1, 9))).state_BTH.shape == (1, 9, 96)
