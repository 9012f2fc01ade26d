"""Translation: the objective, decoding, and that a resumed training equals an undisturbed one."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from pema_ray.commands.main import app
from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.line import ExtractBatch
from pema_ray.memory.codec import Keys
from pema_ray.memory.search.nearest import DatastorePart, OnePieceSearch, SearchOptions
from pema_ray.training.checkpoint import CHECKPOINT, load_checkpoint
from pema_ray.trime.model.memory_lm import VocabularyScore
from pema_ray.trime.objective.loss import joint_log_prob
from pema_ray.trime.objective.memories import PADDING
from pema_ray.trime.translation import dry_run
from pema_ray.trime.translation.calibrate import TargetScores, nll
from pema_ray.trime.translation.config import MtBatchesConfig, MtConfig, MtGenerateConfig, MtModelConfig
from pema_ray.trime.translation.data import BytePairs, Parallel, read_pairs
from pema_ray.trime.translation.datastore import DecoderKeys
from pema_ray.trime.translation.decode import Mixing, TranslationDecoder, mixed_log_probs
from pema_ray.trime.translation.groups import bm25_walk, cut, groups_of
from pema_ray.trime.translation.model import Translator, load_translator, make_translator, save_translator
from pema_ray.trime.translation.objective import MtMemoryMode, MtObjective, other_sentences
from pema_ray.trime.translation.trainer import MtTrainer

EOS, PAD, WORDS, HIDDEN = 0, 1, 6, 8


def tiny(seed: int = 0, dropout: float = 0.0) -> Translator:
    """A layer on each side, weights large enough that contexts differ."""
    torch.manual_seed(seed)
    shape = {"encoder_layers": 1, "decoder_layers": 1, "hidden_size": HIDDEN, "ffn_size": 8, "heads": 2}
    return make_translator(MtModelConfig.model_validate({**shape, "dropout": dropout}), 9, WORDS, 24).eval()


def pairs(count: int, seed: int = 0) -> Parallel:
    draw = np.random.default_rng(seed)
    source, target = (
        [draw.integers(2, words, draw.integers(2, 7)).tolist() for _ in range(count)] for words in (9, WORDS)
    )
    return Parallel(source, target, ["x"] * count)


def part_of(key_MH: torch.Tensor, token_M: torch.Tensor, metric: str) -> OnePieceSearch:
    keys = Keys("float32", key_MH.numpy())
    return OnePieceSearch([DatastorePart(keys, token_M.numpy(), 0, SearchOptions(metric))])  # type: ignore[arg-type]


# ── objective ───────────────────────────────────────────────────────────────


def naive(logits_NV, key_NH, label_N, sentence_N, temperature, top_k):
    """Position by position, in float64."""
    log_p = []
    for n in range(len(label_N)):
        others = [m for m in range(len(label_N)) if sentence_N[m] != sentence_N[n]]
        memory = [(key_NH[n] @ key_NH[m] / math.sqrt(key_NH.shape[1]) / temperature, int(label_N[m])) for m in others]
        memory = sorted(memory, key=lambda one: -float(one[0].detach()))[:top_k]
        total = logits_NV[n].exp().sum() + sum(s.exp() for s, _ in memory)
        mass = logits_NV[n, label_N[n]].exp() + sum(s.exp() for s, label in memory if label == label_N[n])
        log_p.append((mass / total).log())
    return torch.stack(log_p)


@pytest.mark.parametrize("top_k", [1, 3, 8, None])
def test_the_objective_and_its_gradients_are_those_of_a_naive_reference(top_k: int | None):
    torch.manual_seed(1)
    label_N, sentence_N = torch.randint(0, 4, (13,)), torch.tensor([0] * 4 + [7] * 6 + [3] * 3)
    results = []
    for function in ("ours", "naive"):
        torch.manual_seed(2)
        double = torch.float64
        logits = torch.randn(13, 4, dtype=double).requires_grad_()
        key = (3 * torch.randn(13, HIDDEN, dtype=double)).requires_grad_()
        if function == "ours":
            normaliser = logits.logsumexp(-1)
            score = VocabularyScore(logits.gather(1, label_N[:, None])[:, 0] - normaliser, normaliser)
            log_p = joint_log_prob(score, other_sentences(key, label_N, sentence_N, 2.0, top_k, chunk=40))
        else:
            log_p = naive(logits, key, label_N, sentence_N, 2.0, top_k)
        (-log_p).sum().backward()
        results.append((log_p.detach(), logits.grad, key.grad))
    for ours, reference in zip(*results):
        torch.testing.assert_close(ours.double(), reference, atol=1e-5, rtol=1e-5)


def test_a_lone_sentence_has_no_memory_and_finite_gradients():
    key = torch.randn(5, HIDDEN, requires_grad=True)
    memory = other_sentences(key, torch.tensor([1, 1, 2, 1, 2]), torch.zeros(5, dtype=torch.int64), 1.0, 8)
    assert (memory.log_positive == -math.inf).all() and (memory.log_normaliser == -math.inf).all()
    zero = torch.zeros(5)
    joint_log_prob(VocabularyScore(zero - 1, zero), memory).sum().backward()
    assert key.grad is not None and (key.grad == 0).all()


def test_padding_counts_nowhere_and_others_targets_do():
    objective = MtObjective(tiny())
    source = torch.tensor([[3, 4, EOS], [5, EOS, PAD]])
    inputs, label = torch.tensor([[PAD, 2, 3], [PAD, 4, PAD]]), torch.tensor([[2, 3, EOS], [4, EOS, PADDING]])
    rest = (torch.tensor([0, 1]), MtMemoryMode(True, 1.0, None), 1.0)
    loss, sums = objective(source, inputs, label, *rest)
    noisy = inputs.clone()
    noisy[1, 2] = 5
    torch.testing.assert_close(objective(source, noisy, label, *rest)[0], loss)
    assert sums[0] != sums[1]
    longer = torch.nn.functional.pad(source, (0, 2), value=PAD)
    torch.testing.assert_close(objective(longer, inputs, label, *rest)[0], loss)
    plain = objective(source, inputs, label, torch.tensor([0, 1]), MtMemoryMode(False), 1.0)
    assert float(plain[1][0]) == float(plain[1][1]) == pytest.approx(float(sums[1]))


# ── the distributions, and decoding ─────────────────────────────────────────


@pytest.mark.parametrize(("system", "metric"), [("knn", "l2"), ("knn", "inner_product"), ("trime", "inner_product")])
def test_distributions_are_those_of_brute_force_and_sum_to_one(system, metric):
    torch.manual_seed(3)
    key_MH, token_M, query_NH = torch.randn(40, HIDDEN), torch.randint(0, WORDS, (40,)), torch.randn(5, HIDDEN)
    logits_NV = torch.randn(5, WORDS)
    mixing = Mixing(system, 7, 1.5, 0.3)
    nearest = part_of(key_MH, token_M, metric).search(query_NH.numpy(), 7)
    p_NV = mixed_log_probs(logits_NV, nearest, mixing, HIDDEN).exp()
    torch.testing.assert_close(p_NV.sum(1), torch.ones(5), atol=1e-5, rtol=0)
    for n in range(5):
        similarity_M = key_MH @ query_NH[n] if metric == "inner_product" else -(key_MH - query_NH[n]).square().sum(1)
        near = similarity_M.argsort(descending=True)[:7]
        mass = (similarity_M[near] / 1.5 / (math.sqrt(HIDDEN) if system == "trime" else 1)).exp()
        p_knn = torch.zeros(WORDS).index_add(0, token_M[near], mass / mass.sum())
        weight = mass.sum() / (mass.sum() + logits_NV[n].exp().sum()) if system == "trime" else 0.3
        torch.testing.assert_close(p_NV[n], (1 - weight) * logits_NV[n].softmax(0) + weight * p_knn)


def test_calibration_measures_what_decoding_uses():
    torch.manual_seed(4)
    logits_NV, target_N = torch.randn(6, WORDS), torch.randint(0, WORDS, (6,))
    nearest = part_of(torch.randn(30, HIDDEN), torch.randint(0, WORDS, (30,)), "l2").search(np.ones((6, HIDDEN)), 9)
    normaliser_N = logits_NV.logsumexp(-1)
    log_prob_N = logits_NV.gather(1, target_N[:, None])[:, 0] - normaliser_N
    hit_NK = nearest.token_NK == target_N[:, None]
    scores = TargetScores(log_prob_N, normaliser_N, nearest.similarity_NK, hit_NK, HIDDEN)
    for mixing in (Mixing("knn", 9, 2.0, 0.4), Mixing("trime", 9, 2.0)):
        log_p_NV = mixed_log_probs(logits_NV, nearest, mixing, HIDDEN)
        expected = -float(log_p_NV.gather(1, target_N[:, None]).mean())
        assert nll(scores, mixing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("system", ["plain", "knn", "trime"])
def test_a_beam_as_wide_as_the_tree_finds_the_best_answer(system):
    model, source, longest = tiny(seed=5), [3, 4, 5], 3
    torch.manual_seed(6)
    search = part_of(torch.randn(40, HIDDEN), torch.randint(2, WORDS, (40,)), "inner_product")
    decoder = TranslationDecoder(model, EOS, Mixing(system, 8, 1.0, 0.5), search)
    config = MtGenerateConfig(beam=125, length_factor=0, length_extra=longest, length_penalty=0.6)

    @torch.inference_mode()
    def score(answer: tuple[int, ...]) -> float:
        """Σ log P / length^0.6, of an answer that ends or is as long as it may be."""
        state, key = model.represent(torch.tensor([[*source, EOS]]), torch.tensor([[PAD, *answer[:-1]]]))
        log_p = decoder.log_probs(model.logits(state[0]), key[0])
        return float(log_p[range(len(answer)), list(answer)].sum()) / len(answer) ** 0.6

    inner = range(2, WORDS)
    ended = [(*a, EOS) for n in range(longest) for a in itertools.product(inner, repeat=n)]
    best = max([*ended, *itertools.product(inner, repeat=longest)], key=score)
    (answer,) = decoder.translate([source], config)
    assert answer == [token for token in best if token != EOS]
    greedy: list[int] = []
    while len(greedy) < longest and EOS not in greedy:
        state, key = model.represent(torch.tensor([[*source, EOS]]), torch.tensor([[PAD, *greedy]]))
        log_p_V = decoder.log_probs(model.logits(state[0, -1:]), key[0, -1:].detach())[0].detach()
        log_p_V[PAD] = -math.inf
        greedy.append(int(log_p_V.argmax()))
    (answer,) = decoder.translate([source], config.model_copy(update={"beam": 1}))
    assert answer == [token for token in greedy if token != EOS]


def test_rows_of_a_datastore_are_the_keys_of_each_target_and_its_end():
    model, data = tiny(), pairs(3)
    key_NH = DecoderKeys(model).extract(
        ExtractBatch([[*s, EOS, *t] for s, t in zip(data.source, data.target)], [len(s) for s in data.source])
    )
    expected = [
        model.represent(torch.tensor([[*s, EOS]]), torch.tensor([[PAD, *t]])).key_BTH[0].detach()
        for s, t in zip(data.source, data.target)
    ]
    torch.testing.assert_close(key_NH, torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert len(key_NH) == sum(len(t) + 1 for t in data.target)


# ── groups, training ────────────────────────────────────────────────────────


def test_groups_hold_every_sentence_once_within_their_tokens():
    data = pairs(50)
    for order in ("random", "bm25"):
        groups = groups_of(data, MtBatchesConfig(order=order, max_tokens=30), 0, np.arange(50)[::-1])
        assert sorted(np.concatenate(groups)) == list(range(50))
        assert all(max(len(data.target[n]) + 1 for n in g) * len(g) <= 30 for g in groups)
    assert [g.tolist() for g in cut([2, 0, 1], [3, 4, 4], 8)] == [[2, 0], [1]]


def test_the_walk_goes_to_the_most_similar_target(tmp_path: Path):
    target = [[2, 3, 2, 3], [40, 41, 42], [2, 3, 9], [40, 41, 50]]
    walk = bm25_walk(Parallel([[2]] * 4, target, ["x"] * 4), 3, 0, tmp_path / "bm25").tolist()
    assert {frozenset(walk[:2]), frozenset(walk[2:])} == {frozenset({0, 2}), frozenset({1, 3})}
    with pytest.raises(UserError, match="too few"):
        bm25_walk(pairs(2), 3, 0, tmp_path / "other")


def trained(folder: Path, epochs: float, **train) -> tuple[MtTrainer, dict]:
    settings = {"epochs": epochs, "validate_every": 2, "schedule": "constant", "learning_rate": 0.01, **train}
    config = MtConfig.model_validate({"batches": {"order": "random", "max_tokens": 30}, "train": settings})
    points: dict = {}
    trainer = MtTrainer(config, tiny(dropout=0.2), pairs(16), pairs(5, 1), folder, EOS)
    trainer.on_point = lambda kind, point: points.update({point["step"]: point})
    trainer.run()
    return trainer, points


def test_a_resumed_training_is_bit_for_bit_the_same(tmp_path: Path):
    undisturbed, _ = trained(tmp_path / "whole", 2, ce_epochs=0.5)
    half = 2 / undisturbed.steps * (undisturbed.steps // 4 * 2)
    trained(tmp_path / "halves", half, ce_epochs=0.5)
    _, points = trained(tmp_path / "halves", 2, ce_epochs=0.5)
    assert min(points) > 1  # it resumed
    (tensors, state), (resumed, resumed_state) = (
        load_checkpoint(tmp_path / name / CHECKPOINT) for name in ("whole", "halves")
    )
    assert state["step"] == resumed_state["step"] == undisturbed.steps
    for group in ("model", "optimizer"):
        assert all(torch.equal(tensor, resumed[group][name]) for name, tensor in tensors[group].items())


def test_the_warm_up_by_cross_entropy_happens(tmp_path: Path):
    trainer, points = trained(tmp_path, 2, ce_epochs=1)
    warm_up = trainer.steps // 2
    for step, point in points.items():
        if step not in (0, trainer.steps) and step % 2:  # training points that no validation replaced
            assert (point["loss"] == point["vocabulary_loss"]) == (step <= warm_up)
    assert not trainer.mode(0).memory and trainer.mode(warm_up).memory


def test_a_saved_model_is_the_same_model(tmp_path: Path):
    model = tiny()
    save_translator(model, tmp_path)
    source, inputs = torch.tensor([[3, EOS]]), torch.tensor([[PAD, 2]])
    loaded = load_translator(tmp_path).represent(source, inputs)
    assert all(torch.equal(a, b) for a, b in zip(model.represent(source, inputs), loaded))
    with pytest.raises(UserError, match="mt-train"):
        load_translator(tmp_path / "nothing")


def test_the_published_shape_has_39_million_parameters():
    config = read_config(MtConfig, Path("configs/trime/mt_iwslt14_trime.yaml"))
    with torch.device("cpu"):
        model = make_translator(config.model, config.data.source_subwords, config.data.target_subwords, 64)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == pytest.approx(39.4e6, rel=0.01)


# ── text, bad input ─────────────────────────────────────────────────────────


def test_subwords_give_the_text_back(tmp_path: Path):
    subwords = BytePairs.train([("Das Haus ist groß.", "The house is large.")] * 3, MtConfig().data)
    subwords.save(tmp_path)
    loaded = BytePairs.load(tmp_path)
    (ids,) = loaded.target(["The größe, is large!"])
    assert loaded.text(ids) == "The größe, is large!" and EOS not in ids and PAD not in ids


@pytest.mark.parametrize(
    ("train", "complaint"),
    [
        (("a\nb\n", "x\n"), "2 lines.*1: they are no pairs"),
        (("a\n\n", "x\ny\n"), "line 2 is empty"),
        (('{"source": "a", "target": "x"}\n{"source": "a"}\n',), "line 2: needs the texts 'source' and 'target'"),
        (('{"source": "a", "target": "x"}\n{\n',), "line 2: broken JSON"),
        (("",), "'train' has no pair"),
    ],
)
def test_bad_files_are_rejected_by_name(train: tuple[str, ...], complaint: str, tmp_path: Path):
    names = [tmp_path / f"train.{n}" for n in range(len(train))]
    for name, text in zip(names, train):
        name.write_text(text)
    good = tmp_path / "good.jsonl"
    good.write_text('{"source": "a", "target": "x"}\n')
    files = {"train": [str(n) for n in names], "dev": [str(good)], "test": [str(good)]}
    config = MtConfig.model_validate({"data": {"files": files}})
    with pytest.raises(UserError, match=complaint):
        read_pairs(config.data)


@pytest.mark.parametrize(
    ("setting", "complaint"),
    [
        ("generate.systems=[knnn]", "Did you mean 'knn'"),
        ("generate.weights=[1.5]", "weights must lie in"),
        ("model.heads=3", "multiple of heads"),
        ("train.accumulate=2", "groups_per_update"),
        ("index.metric=l2", "index.metric=l2 does not go with 'trime'"),  # what a trime model is evaluated with
    ],
)
def test_bad_settings_are_rejected_by_name(setting: str, complaint: str):
    with pytest.raises(UserError, match=complaint):
        read_config(MtConfig, None, [setting])


def test_squared_distances_go_with_knn(tmp_path: Path):
    config = read_config(MtConfig, None, ["index.metric=l2", "generate.systems=[knn]"])
    assert config.systems == ("knn",)
    assert read_config(MtConfig, None, ["index.metric=l2", "train.memory=none"]).systems == ("plain", "knn")


def test_missing_files_and_too_long_targets_are_rejected(tmp_path: Path):
    config = MtConfig.model_validate({"data": {"files": dict.fromkeys(("train", "dev", "test"), ("no.jsonl",))}})
    with pytest.raises(UserError, match="no such file"):
        read_pairs(config.data)
    with pytest.raises(UserError, match="max_tokens=3"):
        groups_of(pairs(5), MtBatchesConfig(order="random", max_tokens=3), 0, None)


# ── the dry run ─────────────────────────────────────────────────────────────


def test_the_published_setting_is_counted_before_its_text_is_there(tmp_path: Path):
    path = Path(__file__).parents[3] / "configs" / "trime" / "mt_iwslt14_trime.yaml"
    estimate = dry_run.estimate(read_config(MtConfig, path, [f"run_dir={tmp_path}"]))
    assert round(estimate.parameters / 1e6) == 39
    assert (estimate.rows, estimate.key_size) == (3_949_114, 512)  # the published datastore
    assert estimate.datastore_bytes == 3_949_114 * (1024 + 4)
    assert estimate.updates == 50 * -(-3_949_114 // 16_384)
    assert estimate.memory == 16_384
    assert estimate.training_bytes == estimate.parameters * 16
    assert estimate.hours == pytest.approx(estimate.flops / (4 * 2e13) / 3600)
    with pytest.raises(UserError, match="not prepared yet. Run: pema-ray trime mt-train, or set plan.pairs"):
        dry_run.estimate(read_config(MtConfig, None, [f"run_dir={tmp_path}"]))


def test_the_command_has_a_dry_run(tmp_path: Path):
    config = "configs/trime/mt_iwslt14_ce.yaml"
    result = CliRunner().invoke(app, ["trime", "mt-train", "--dry-run", "-c", config, f"run_dir={tmp_path}"])
    assert result.exit_code == 0 and "3,949,114 target positions" in result.output and "0 positions" in result.output
    assert not list(tmp_path.iterdir())
