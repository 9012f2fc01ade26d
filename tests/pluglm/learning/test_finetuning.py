"""The fine-tuning loop in one process: learning, the best epoch, resuming, and labels that are never retrieved."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.learning.finetuning import Finetuner, TaskExamples
from pema_ray.pluglm.learning.in_task import entries_of
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.loading import load_pluglm
from pema_ray.pluglm.retrieval import RetrievalLog
from pema_ray.pluglm.stages.finetune import copy_memory, new_task_model
from pema_ray.pluglm.stages.pretrain import local_access, save_model
from pema_ray.pluglm.tasks import make_task
from tests.training_kit import die

KINDS = ("classification", "regression", "tokens", "answers", "yes_no", "factoid", "cloze")


@pytest.fixture
def pretrained(tmp_path, model, words_tokenizer) -> str:
    save_model(model, words_tokenizer, tmp_path / "pretrained")
    return str(tmp_path / "pretrained")


def write_examples(tmp_path, kind: str) -> str:
    """Twelve examples; the label follows from the first word."""
    even = [n % 2 == 0 for n in range(12)]
    words = [f"w{2 if is_even else 3} w{40 + n} w{60 + n}" for n, is_even in enumerate(even)]
    if kind in ("classification", "regression"):
        rows = [{"sentence": text, "label": int(is_even)} for text, is_even in zip(words, even)]
    elif kind == "tokens":
        rows = [
            {"tokens": text.split(), "tags": ["B-A" if is_even else "B-B", "O", "O"]}
            for text, is_even in zip(words, even)
        ]
    elif kind == "cloze":
        rows = [
            {"masked_sentences": [f"{text} [MASK]"], "obj_label": "w5" if is_even else "w6"}
            for text, is_even in zip(words, even)
        ]
    elif kind == "answers":
        questions = [
            {"context": text, "qas": [{"id": str(n), "question": f"w1 w{80 + n}", "answers": [
                {"text": text.split()[1 + is_even], "answer_start": text.index(text.split()[1 + is_even])}]}]}
            for n, (text, is_even) in enumerate(zip(words, even))
        ]  # fmt: skip
        (tmp_path / "squad.json").write_text(json.dumps({"data": [{"paragraphs": questions}]}))
        return str(tmp_path / "squad.json")
    else:
        exact = {
            "yes_no": lambda text, is_even: "yes" if is_even else "no",
            "factoid": lambda text, is_even: [[text.split()[1 + is_even]]],
        }
        questions = [
            {"id": str(n), "type": kind.replace("_", ""), "body": f"w1 w{80 + n}",
             "exact_answer": exact[kind](text, is_even), "snippets": [{"text": text}]}
            for n, (text, is_even) in enumerate(zip(words, even))
        ]  # fmt: skip
        (tmp_path / "bioasq.json").write_text(json.dumps({"questions": questions}))
        return str(tmp_path / "bioasq.json")
    path = tmp_path / f"{kind}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def make(tmp_path, pretrained: str, kind: str, name: str = "run", in_task: bool = True, **train: Any) -> Finetuner:
    """A loop with the same twelve examples for training and validation."""
    path = write_examples(tmp_path, kind)
    settings = {"epochs": 20, "batch_size": 6, "max_tokens": 16, "learning_rate": 1e-2, **train}
    config = FinetuneConfig.model_validate(
        {
            "model": pretrained, "task": {"kind": kind, **({"metric": "mse"} if kind == "regression" else {})},
            "data": {"train": path, "validation": path}, "memory": {"in_task": in_task}, "train": settings,
        }
    )  # fmt: skip
    task = make_task(config.task)
    examples = task.read(tmp_path / path)
    task.prepare(examples)
    pretrained_model, tokenizer = load_pluglm(pretrained)
    memory = None
    folder = tmp_path / f"memory-{name}"
    if in_task and not folder.exists():
        encoder = DocumentEncoder(pretrained_model, tokenizer)
        memory = KnowledgeMemory.build(folder, entries_of(task, examples, tokenizer, 16), encoder, "float32")
    elif in_task:
        memory = KnowledgeMemory.open(folder)
    fingerprint = memory.fingerprint if memory and config.train.frozen else None
    model = new_task_model(config, task, fingerprint)
    data = TaskExamples.of(task, examples, tokenizer, 16)
    (tmp_path / name).mkdir(exist_ok=True)
    return Finetuner(
        model, tokenizer, task, config.train, data, data, local_access(memory) if memory else None, tmp_path / name,
        write_model=lambda model: save_model(model, tokenizer, tmp_path / name / "model"),
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_task_learns_and_its_model_is_kept(tmp_path, pretrained, kind) -> None:
    loop = make(tmp_path, pretrained, kind)
    losses = []
    loop.on_point = lambda kind, point: losses.append(point["loss"]) if kind == "train" else None
    loop.run()
    assert sum(losses[-4:]) < 0.7 * sum(losses[:4])
    assert len(loop.history.validation) == 20
    kept, tokenizer = load_pluglm(tmp_path / "run" / "model", loop.task.model_class())
    memory = KnowledgeMemory.open(tmp_path / "memory-run")
    kept.attach(memory.load(kept.fingerprint()))  # frozen: it reads the memory of its training
    settings = loop.settings.model_copy(update={"epochs": 0})
    again = Finetuner(kept, tokenizer, loop.task, settings, None, loop.dev, None, tmp_path)
    scores = loop.task.scores(loop.dev.examples, again.predict(loop.dev))
    assert scores[loop.task.main] == pytest.approx(loop.best)
    if loop.task.main == "mse":
        assert loop.best == min(point["mse"] for point in loop.history.validation) < loop.history.validation[0]["mse"]


def test_no_example_retrieves_itself_in_training_or_after(tmp_path, pretrained) -> None:
    loop = make(tmp_path, pretrained, "classification", epochs=1)
    searched = []
    search = type(loop.memory.open(1)).search  # pyright: ignore[reportOptionalMemberAccess]

    def watched(self, query_BQ, k, own_B=None, cosine=False):
        retrieved = search(self, query_BQ, k, own_B, cosine)
        assert own_B is not None
        own_entry_B = self.piece_of(own_B, torch.zeros_like(own_B))
        assert bool((own_entry_B >= 0).all())
        assert not bool((retrieved.entry_BK == own_entry_B[:, None]).any())
        searched.append(len(own_B))
        return retrieved

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pema_ray.pluglm.model.knowledge.LocalKnowledge.search", watched)
        loop.run()
    assert sum(searched) == 12 + 12  # one epoch, one validation


def test_a_frozen_memory_stays_and_another_follows_the_encoder(tmp_path, pretrained) -> None:
    frozen = make(tmp_path, pretrained, "classification", "frozen", epochs=2)
    frozen.run()
    assert KnowledgeMemory.open(tmp_path / "memory-frozen").version == 1
    freed = make(tmp_path, pretrained, "classification", "freed", epochs=2, fix_keys=False, fix_values=False)
    before = freed.model.model.knowledge_encoder.value.weight.detach().clone()
    freed.run()
    assert not torch.equal(before, freed.model.model.knowledge_encoder.value.weight)
    memory = KnowledgeMemory.open(tmp_path / "memory-freed", freed.version)
    assert memory.version == 3
    assert (
        memory.fingerprint == freed.model.fingerprint() != KnowledgeMemory.open(tmp_path / "memory-frozen").fingerprint
    )
    best = KnowledgeMemory.open(tmp_path / "memory-freed", freed.best_version)
    kept, _ = load_pluglm(tmp_path / "freed" / "model", freed.task.model_class())
    kept.attach(best.load(kept.fingerprint()))


def test_without_a_memory(tmp_path, pretrained) -> None:
    loop = make(tmp_path, pretrained, "classification", in_task=False, epochs=2)
    loop.run()
    assert loop.model.knowledge is None


def test_a_run_that_resumes_ends_at_the_same_weights(tmp_path, pretrained) -> None:
    undisturbed = make(tmp_path, pretrained, "classification", "undisturbed", epochs=4)
    undisturbed.run()
    broken = make(tmp_path, pretrained, "classification", "broken", epochs=4)
    die(broken, 6, "validation")  # after the third epoch of two steps
    again = make(tmp_path, pretrained, "classification", "broken", epochs=4)
    again.run()
    assert [point["epoch"] for point in again.history.validation] == [1, 2, 3, 4]
    for name, tensor in undisturbed.model.state_dict().items():
        assert torch.equal(tensor, again.model.state_dict()[name]), name


def test_parts_of_a_step_add_up(tmp_path, pretrained) -> None:
    """Without BatchNorm, whose statistics are per part."""
    weights = []
    for accumulate in (1, 3):
        loop = make(tmp_path, pretrained, "classification", f"in-{accumulate}", epochs=1, accumulate=accumulate)
        loop.model.model.backbone.encoder.layer[-1].query_norm = torch.nn.Identity()
        loop.run()
        weights.append(loop.model.classifier.weight.detach())
    assert torch.allclose(*weights, atol=1e-5)


def test_every_tag_counts_alike_whatever_part_it_is_in(tmp_path, pretrained) -> None:
    """Sentences of one to seven words: some parts of a step have many more tags than others."""
    weights, losses = [], []
    rows = [{"tokens": [f"w{n}"] * (1 + n % 7), "tags": ["B-A" if n % 2 else "O"] * (1 + n % 7)} for n in range(12)]
    for accumulate in (1, 3):
        loop = make(tmp_path, pretrained, "tokens", f"in-{accumulate}", epochs=1, accumulate=accumulate, clip=None)
        path = tmp_path / "uneven.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        loop.train = TaskExamples.of(loop.task, [*loop.task.read(path)], loop.tokenizer, 16)  # tags A and O
        loop.model.model.backbone.encoder.layer[-1].query_norm = torch.nn.Identity()
        loop.attach(1)
        loop.strategy = loop.make_strategy()
        losses.append(loop.learn(0, next(loop.batches(0)))["loss"])
        weights.append(loop.model.classifier.weight.detach())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert torch.allclose(*weights, atol=1e-5)


def test_parts_without_a_label_are_no_fault(tmp_path, pretrained) -> None:
    """Cloze answers of several tokens cannot be learned; a part with no other answers has zero loss, not NaN."""
    loop = make(tmp_path, pretrained, "cloze", epochs=1, batch_size=6, accumulate=6)
    path = tmp_path / "cloze.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for row in rows[3:]:
        row["obj_label"] = "w5 w6"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    loop.train = TaskExamples.of(loop.task, loop.task.read(path), loop.tokenizer, 16)
    losses = []
    loop.on_point = lambda kind, point: losses.append(point["loss"]) if kind == "train" else None
    loop.run()
    assert len(losses) == 2
    assert all(0 <= loss < 100 for loss in losses)
    assert max(losses) > 0
    for row in rows:
        row["obj_label"] = "w5 w6"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    unlearnable = TaskExamples.of(loop.task, loop.task.read(path), loop.tokenizer, 16)
    with pytest.raises(UserError, match="None of the training examples can be learned from.*one token"):
        Finetuner(loop.model, loop.tokenizer, loop.task, loop.settings, unlearnable, unlearnable, None, tmp_path)


def test_no_snippet_retrieves_another_of_its_question(tmp_path, pretrained) -> None:
    questions = [
        {"id": str(n), "type": "factoid", "body": f"w1 w{80 + n}", "exact_answer": [["w7"]],
         "snippets": [{"text": f"w{20 + n} w7"}, {"text": f"w7 w{30 + n}"}]}
        for n in range(6)
    ]  # fmt: skip
    loop = make(tmp_path, pretrained, "factoid", epochs=1)
    path = tmp_path / "bioasq.json"
    path.write_text(json.dumps({"questions": questions}))
    examples = loop.task.read(path)
    pretrained_model, tokenizer = load_pluglm(pretrained)
    entries = entries_of(loop.task, examples, tokenizer, 16)
    memory = KnowledgeMemory.build(tmp_path / "snippets", entries, DocumentEncoder(pretrained_model, tokenizer))
    loop.model.attach(memory.load(loop.model.fingerprint()))
    retrieved = []
    loop.predict(
        TaskExamples.of(loop.task, examples, tokenizer, 16),
        lambda output, numbers: retrieved.extend(zip(numbers, output.retrieved[0].entry_BK.tolist())),
    )
    assert len(retrieved) == 12
    for example, ids in retrieved:  # an example's entry has its number; 2n and 2n + 1 are of one question
        assert example // 2 not in {entry_id // 2 for entry_id in ids}


def test_faults_are_named(tmp_path, pretrained) -> None:
    for change, message in (
        ({"data": {"validation": "x"}}, "'classification' needs data.train"),
        ({"train": {"batch_size": 7, "accumulate": 2}}, "cannot be shared"),
    ):
        with pytest.raises(ValueError, match=message):
            FinetuneConfig.model_validate(
                {"model": pretrained, "task": {"kind": "classification"}, "data": {"train": "x", "validation": "x"}}
                | change
            )
    loop = make(tmp_path, pretrained, "classification", "high", epochs=3, learning_rate=1e30, clip=None)
    with pytest.raises(UserError, match="lower train.learning_rate"):
        loop.run()


def test_a_copied_memory_is_a_memory_of_its_own(tmp_path, facts, encoder) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder)
    edited = memory.delete([3])
    copied = copy_memory(edited, tmp_path / "copy")
    assert [entry.entry_id for entry in copied.entries()] == [entry.entry_id for entry in edited.entries()]
    assert copied.delete([4]).version == 2
    assert len(edited) == len(KnowledgeMemory.open(tmp_path / "memory")) == 11


def test_what_was_retrieved_is_told_by_source(tmp_path, facts, model, words_tokenizer, encoder) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder, "float32")
    model.attach(memory.load(encoder.fingerprint))
    inputs = words_tokenizer(["w1 w2", "w3 w4 w5", "w6"], padding=True, return_tensors="pt")
    log = RetrievalLog(max_inputs=2)
    with torch.no_grad():
        for rows in ([0, 1], [2]):
            part = {name: inputs[name][rows] for name in ("input_ids", "attention_mask")}
            output = model(**part, output_retrieved=True)
            log.add(output.retrieved, rows)
            if rows == [0, 1]:
                first = output.retrieved[0]
    report = log.report(memory, {0: "w1 w2", 1: "<b>w3</b>", 2: "w6"}, {1: "w9"})
    assert report.inputs_in_sum == 3
    assert len(report.inputs) == 2
    uses = report.inputs[1].layers[0].entries
    assert [use.entry_id for use in uses] == first.entry_BK[1].tolist()
    assert [use.text for use in uses] == [facts[use.entry_id].text for use in uses]
    assert {row.source for row in report.sums} <= {"a", "b"}
    assert sum(row.share for row in report.sums) == pytest.approx(1)
    assert sum(row.entries for row in report.sums) == 3 * 3
    page = report.write(tmp_path / "report").read_text()
    assert "&lt;b&gt;w3&lt;/b&gt;" in page
    assert "<b>w9</b>" in page
    assert "://" not in page
