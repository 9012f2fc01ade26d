"""The pre-training loop in one process: learning and resuming."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings
from pema_ray.pluglm.learning.masking import IGNORED, Masker
from pema_ray.pluglm.learning.pretraining import Pretrainer
from pema_ray.pluglm.learning.text import Sequences
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.knowledge import document_code
from pema_ray.pluglm.stages.pretrain import local_access
from tests.training_kit import die

N = 48
TEXTS = [" ".join(f"w{random.Random(n).randrange(100)} w{n}" for _ in range(3)) for n in range(N)]


@pytest.fixture
def sequences(words_tokenizer) -> Sequences:
    ids = [np.array(tokens, np.int32) for tokens in words_tokenizer(TEXTS)["input_ids"]]
    documents = np.array([document_code(str(n)) for n in range(N)])
    return Sequences([np.concatenate(ids)], [np.cumsum([len(tokens) for tokens in ids])], [documents], np.array([0, N]))


@pytest.fixture
def loop(make_model, words_tokenizer, sequences, tmp_path):
    """`loop(folder, **settings)` → (trainer, points): with a new memory the first time, then the existing one."""

    def make(folder: str, model_settings: dict | None = None, **settings) -> tuple[Pretrainer, list[dict]]:
        model = make_model(
            backbone={"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}, **(model_settings or {})
        )
        run_dir, points = tmp_path / folder, []
        if not (run_dir / "memory").exists():
            encoder = DocumentEncoder(model, words_tokenizer)
            entries = [NewEntry(text, document_id=str(n)) for n, text in enumerate(TEXTS)]
            KnowledgeMemory.build(run_dir / "memory", entries, encoder, dtype="float32", entries_per_segment=20)
        defaults = {
            "steps": 8, "batch_size": 12, "accumulate": 2, "refresh_every": 3, "checkpoint_every": 4,
            "validate_every": 4, "warm_up_steps": 2, "learning_rate": 3e-3,
        }  # fmt: skip
        memory = local_access(KnowledgeMemory.open(run_dir / "memory"))
        trainer = Pretrainer(
            model, words_tokenizer, PretrainSettings(**(defaults | settings)), sequences, sequences, memory, run_dir,
            on_point=lambda kind, point: points.append({"kind": kind, **point}),
        )  # fmt: skip
        return trainer, points

    return make


def weights(loop: Pretrainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in loop.model.state_dict().items()}


def test_the_loss_falls_and_the_memory_belongs_to_the_model_in_the_end(loop) -> None:
    trainer, points = loop("run", steps=40, refresh_every=10, checkpoint_every=40, validate_every=20)
    trainer.run()
    validated = [point["loss"] for point in points if point["kind"] == "validation"]
    assert validated[-1] < validated[0] - 0.5
    memory = KnowledgeMemory.open(trainer.run_dir / "memory")
    assert memory.version == trainer.version == 5
    trainer.model.attach(memory.load(trainer.model.fingerprint()))
    used = [point["memory_version"] for point in points if point["kind"] == "train"]
    assert used == [1] * 10 + [2] * 10 + [3] * 10 + [4] * 10


@pytest.mark.parametrize("optimizer", ["adamw", "lamb"])
def test_a_resumed_run_equals_an_undisturbed_one_to_the_bit(loop, optimizer) -> None:
    """Stopped after step 5; the checkpoint is of step 4, the memory was refreshed at step 3."""
    undisturbed, points = loop("undisturbed", optimizer=optimizer, contrastive_steps=6)
    undisturbed.run()
    broken, _ = loop("broken", optimizer=optimizer, contrastive_steps=6)
    die(broken, 5)
    torch.manual_seed(12345)  # whatever the new process's random state is
    resumed, later = loop("broken", optimizer=optimizer, contrastive_steps=6)
    resumed.run()
    assert [p["step"] for p in later if p["kind"] == "train"] == [5, 6, 7, 8]
    losses = {p["step"]: p["loss"] for p in points if p["kind"] == "train"}
    assert all(p["loss"] == losses[p["step"]] for p in later if p["kind"] == "train")
    for name, tensor in weights(undisturbed).items():
        assert torch.equal(tensor, weights(resumed)[name]), name
    assert resumed.history.validation == undisturbed.history.validation
    one, two = (KnowledgeMemory.open(each.run_dir / "memory").load() for each in (undisturbed, resumed))
    assert torch.equal(one.key_NQ, two.key_NQ)
    assert torch.equal(one.value_ND, two.value_ND)


def test_a_finished_run_is_not_run_again(loop) -> None:
    trainer, _ = loop("run", steps=4)
    trainer.run()
    again, points = loop("run", steps=4)
    again.run()
    assert again.version == trainer.version and not points


def test_parts_of_a_step_add_up_to_the_same_gradient(loop, monkeypatch) -> None:
    """Without BatchNorm, whose statistics are per part, and without dropout."""
    sgd = lambda self, named: torch.optim.SGD([parameter for _, parameter in named])  # noqa: E731
    monkeypatch.setattr(Pretrainer, "make_optimizer", sgd)  # Adam would enlarge noise in gradients that should be zero
    results = []
    for name, accumulate in (("one", 1), ("three", 3)):
        trainer, _ = loop(name, {"query_norm": False}, accumulate=accumulate, steps=2, learning_rate=0.1)
        for module in trainer.model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        for layer in trainer.model.model.backbone.encoder.layer:
            layer.attention.self.dropout.p = 0.0
        trainer.run()
        results.append(weights(trainer))
    for name, tensor in results[0].items():
        assert torch.allclose(tensor, results[1][name], atol=2e-5), name


def test_contrastive_warm_up_teaches_retrieval(loop) -> None:
    trainer, points = loop(
        "run", {"value_pooler": True}, steps=60, contrastive_steps=60, refresh_every=60, checkpoint_every=60,
        validate_every=60, learning_rate=1e-2, accumulate=1,
    )  # fmt: skip
    trainer.run()
    recall = [point["recall"] for point in points if point["kind"] == "train"]
    assert np.mean(recall[-5:]) > np.mean(recall[:5]) + 0.3


def test_the_last_step_has_a_learning_rate(loop) -> None:
    trainer, points = loop("run", steps=5, power=0.5, warm_up_steps=0)
    trainer.run()
    rates = [point["learning_rate"] for point in points if point["kind"] == "train"]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(3e-3 * 0.2**0.5)
    assert all(np.isfinite(rates))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_bfloat16_memories_and_passes_make_no_nan(make_model, words_tokenizer, sequences, tmp_path, precision) -> None:
    model = make_model()
    entries = [NewEntry(text, document_id=str(n)) for n, text in enumerate(TEXTS)]
    memory = KnowledgeMemory.build(
        tmp_path / "memory", entries, DocumentEncoder(model, words_tokenizer), dtype="bfloat16"
    )
    settings = PretrainSettings(steps=4, batch_size=12, refresh_every=2, precision=precision, contrastive_steps=2)
    Pretrainer(model, words_tokenizer, settings, sequences, None, local_access(memory), tmp_path).run()
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_a_diverging_run_says_so(loop) -> None:
    trainer, _ = loop("run", learning_rate=1e30, warm_up_steps=0, optimizer="adamw", refresh_every=99)
    with pytest.raises(UserError, match=r"infinite or no number at step \d: lower train.learning_rate"):
        trainer.run()


def test_the_warm_up_aims_at_the_piece_that_a_sequence_was_cut_from(make_model, words_tokenizer, tmp_path) -> None:
    """In documents of several pieces, with entries of one or two sequences: the entry that holds the sequence."""
    texts = [f"w{n} w{n + 1}" for n in range(0, 24, 2)]
    names = [str(n // 4) for n in range(12)]  # three documents of four pieces
    ids = [np.array(tokens, np.int32) for tokens in words_tokenizer(texts)["input_ids"]]
    codes = np.array([document_code(name) for name in names])
    sequences = Sequences([np.concatenate(ids)], [np.cumsum([4] * 12)], [codes], np.array([0, 12]))
    model = make_model()
    encoder = DocumentEncoder(model, words_tokenizer)
    for joined in (1, 2):
        joint = [" ".join(texts[n : n + joined]) for n in range(0, 12, joined)]
        entries = [NewEntry(text, document_id=names[n * joined]) for n, text in enumerate(joint)]
        memory = KnowledgeMemory.build(tmp_path / f"memory{joined}", entries, encoder)
        settings = PretrainSettings(steps=1, batch_size=12)
        trainer = Pretrainer(
            model, words_tokenizer, settings, sequences, None, local_access(memory), tmp_path / f"run{joined}"
        )
        trainer.attach(1)
        numbers = [5, 0, 11, 6]
        place_B = torch.tensor([sequences.place(number) for number in numbers])
        token_BL, mask_BL = trainer._own_pieces(torch.from_numpy(codes[numbers]), place_B)
        assert [words_tokenizer.decode(row[1 : n - 1]) for row, n in zip(token_BL, mask_BL.sum(1).tolist())] == [
            joint[number // joined] for number in numbers
        ]


def test_a_checkpoint_of_another_model_is_refused(loop) -> None:
    loop("run", steps=4)[0].run()
    other, _ = loop("run", {"query_size": 4}, steps=8)
    with pytest.raises(UserError, match="holds a model of another shape"):
        other.run()


def test_too_few_sequences_for_a_batch_are_refused(loop) -> None:
    with pytest.raises(UserError, match="batch_size=96: there are only 48"):
        loop("run", batch_size=96)


def test_a_checkpoint_names_its_memory_and_keeps_it(loop) -> None:
    trainer, _ = loop("run", steps=8, refresh_every=3, checkpoint_every=4)
    trainer.run()
    kept = [version.version for version in KnowledgeMemory.open(Path(trainer.run_dir) / "memory").history()]
    assert kept == [trainer.version]


@pytest.mark.parametrize("dynamic", [False, True])
def test_masks_are_of_the_sequence_and_if_dynamic_of_the_epoch(words_tokenizer, dynamic) -> None:
    masker = Masker.of(words_tokenizer, 0.3, 7, dynamic)
    tokens = np.array(words_tokenizer(" ".join(f"w{n}" for n in range(60)))["input_ids"])
    first, labels = masker.mask(tokens, 3, 0)
    assert all(np.array_equal(a, b) for a, b in zip((first, labels), masker.mask(tokens, 3, 0)))
    assert not np.array_equal(labels, masker.mask(tokens, 4, 0)[1])
    assert np.array_equal(labels, masker.mask(tokens, 3, 1)[1]) == (not dynamic)
    selected = labels != IGNORED
    assert selected.sum() == 18
    assert not selected[[0, -1]].any()
    assert np.array_equal(labels[selected], tokens[selected])
    assert np.array_equal(first[~selected], tokens[~selected])


def test_masking_follows_berts_recipe(words_tokenizer) -> None:
    masker = Masker.of(words_tokenizer, 0.15, 0, True)
    tokens = np.array(words_tokenizer(" ".join(["w5"] * 100))["input_ids"])
    fates = {"mask": 0, "stays": 0, "random": 0}
    for sequence in range(200):
        inputs, labels = masker.mask(tokens, sequence, 0)
        for token in inputs[labels != IGNORED]:
            kind = "mask" if token == words_tokenizer.mask_token_id else "stays" if token == tokens[1] else "random"
            fates[kind] += 1
    total = sum(fates.values())
    assert total == 200 * 15
    assert [fates[kind] / total for kind in ("mask", "random", "stays")] == pytest.approx([0.8, 0.1, 0.1], abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"optimizer": "lamb", "strategy": "deepspeed"}, "lamb needs whole tensors"),
        ({"batch_size": 10, "workers": 3}, "cannot be shared by 3 workers"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings, message) -> None:
    with pytest.raises(ValueError, match=message):
        PretrainSettings(**settings)
