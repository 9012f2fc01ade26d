"""On a cluster: search over actors, texts and encoding by Ray Data, pre-training by Ray Train."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from ray.train import Result

from pema_ray.errors import UserError
from pema_ray.pluglm.config import ModelSettings, PretrainConfig, TextConfig
from pema_ray.pluglm.learning.text import Sequences, pieces, prepare_sequences
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.refresh import build, refresh
from pema_ray.pluglm.memory.sharded import ShardedKnowledge, start_shards
from pema_ray.pluglm.model.knowledge import Knowledge, document_code, document_codes
from pema_ray.pluglm.model.loading import load_pluglm
from pema_ray.pluglm.run import PluglmRun
from pema_ray.pluglm.stages.pretrain import run as pretrain
from tests.pluglm.conftest import BACKBONE

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("ray_cluster")]


def write_texts(folder: Path, count: int, words: int = 6) -> tuple[Path, Path, list[str]]:
    """Texts, one half in Parquet (with ids), the other in JSON Lines (without)."""
    random = np.random.default_rng(0)
    texts = [" ".join(f"w{n}" for n in random.integers(0, 100, words)) for _ in range(count)]
    half = count // 2
    parquet, jsonl = folder / "a.parquet", folder / "b.jsonl"
    ids = [f"d{n}" for n in range(half)]
    pq.write_table(pa.table({"body": texts[:half], "id": ids, "from": ["atlas"] * half}), parquet, row_group_size=7)
    jsonl.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[half:]))
    return parquet, jsonl, texts


# ── search ──────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("shards", [1, 3])
def test_actors_find_what_one_piece_finds(tmp_path, facts, encoder, shards) -> None:
    twins = [NewEntry(facts[2].text, document_id="twin")] * 4  # equal keys, in several parts
    memory = KnowledgeMemory.build(tmp_path / "memory", [*facts, *twins], encoder, entries_per_segment=4)
    local, sharded = memory.load(), ShardedKnowledge(start_shards(memory.folder, shards, cpus=0), 1)
    assert isinstance(sharded, Knowledge)
    for name in ("name", "fingerprint", "sizes"):
        assert getattr(sharded, name) == getattr(local, name)
    assert len(sharded) == 16
    torch.manual_seed(0)
    query = torch.cat([torch.randn(9, 8), local.key_NQ[2:3].float()])
    own = torch.from_numpy(document_codes([*(f"doc{n % 6}" for n in range(9)), "twin"]))
    for arguments in ((3, None, False), (5, own, False), (5, own, True), (10, own, False)):
        for a, b in zip(local.search(query, *arguments), sharded.search(query, *arguments)):
            assert a.tolist() == b.tolist()
    entries = torch.tensor([[15, 0], [7, 7]])
    for a, b in zip(local.vectors(entries), sharded.vectors(entries)):
        assert torch.equal(a, b)
    for a, b in zip(local.tokens(torch.tensor([12, 1, 1])), sharded.tokens(torch.tensor([12, 1, 1]))):
        assert torch.equal(a, b)
    codes = torch.tensor([document_code("twin"), document_code("doc3"), document_code("nobody"), 0])
    assert sharded.pieces_of(codes).tolist() == local.pieces_of(codes).tolist()
    for number in range(4):
        numbers = torch.full_like(codes, number)
        assert sharded.piece_of(codes, numbers).tolist() == local.piece_of(codes, numbers).tolist()
    assert local.piece_of(codes, torch.zeros_like(codes)).tolist() == [12, 6, -1, -1]
    with pytest.raises(UserError, match="has no entry 99"):
        sharded.vectors(torch.tensor([99]))
    with pytest.raises(UserError, match="16 entries, but the model retrieves top_k=17"):
        sharded.search(query, 17)
    with pytest.raises(UserError, match="no version 8"):
        ShardedKnowledge(sharded._shards, 8)


def test_actors_follow_versions_and_come_back_when_they_die(tmp_path, facts, encoder) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder)
    shards = start_shards(memory.folder, 5, cpus=0)
    old = ShardedKnowledge(shards, 1)
    newer = memory.delete([0, 1, 2, 3, 4, 5, 6, 7, 8, 9])  # fewer entries than actors
    new = ShardedKnowledge(shards, 2)
    query = torch.ones(1, 8)
    assert sorted(new.search(query, 2).entry_BK[0].tolist()) == [10, 11]
    expected = old.search(query, 4)
    ray.kill(shards[0], no_restart=False)
    assert old.search(query, 4).entry_BK.tolist() == expected.entry_BK.tolist()
    assert new.search(query, 2).entry_BK.tolist() == newer.load().search(query, 2).entry_BK.tolist()
    newer.delete([10, 11])
    none = ShardedKnowledge(shards, 3)
    with pytest.raises(UserError, match="the memory is empty"):
        none.search(query, 1)


# ── texts and encoding ──────────────────────────────────────────────────────


def test_texts_come_in_order_and_long_ones_are_cut(tmp_path, words_tokenizer) -> None:
    parquet, jsonl, texts = write_texts(tmp_path, 40, words=9)
    config = TextConfig(
        files=(str(parquet),), text_column="body", document_column="id", source_column="from", source="unused"
    )
    tables = list(pieces(config, words_tokenizer, 6, 16))
    assert [table.num_rows for table in tables] == [16, 16, 16, 12]
    rows = [row for table in tables for row in table.to_pylist()]
    assert [row["document_id"] for row in rows] == [f"d{n}" for n in range(20) for _ in range(3)]
    assert [" ".join(row["text"] for row in rows[n * 3 : n * 3 + 3]) for n in range(20)] == texts[:20]
    assert rows[0]["token_ids"] == words_tokenizer(" ".join(texts[0].split()[:4]))["input_ids"]
    assert {row["source"] for row in rows} == {"atlas"}
    unnamed = [
        row
        for table in pieces(TextConfig(files=(str(jsonl),), source="j"), words_tokenizer, 6, 99)
        for row in table.to_pylist()
    ]
    assert len({row["document_id"] for row in unnamed}) == 20
    assert {row["source"] for row in unnamed} == {"j"}


def test_sequences_are_prepared_once_and_read_back(tmp_path, words_tokenizer, monkeypatch) -> None:
    monkeypatch.setattr("pema_ray.pluglm.learning.text._SEQUENCES_PER_FILE", 7)
    _, jsonl, texts = write_texts(tmp_path, 40)
    config = TextConfig(files=(str(jsonl),))
    sequences = prepare_sequences(tmp_path / "sequences", config, words_tokenizer, 16)
    assert len(sequences) == 20
    for n in (0, 6, 7, 19):
        assert sequences[n][0].tolist() == words_tokenizer(texts[20 + n])["input_ids"]
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "sequences").iterdir()}
    prepare_sequences(tmp_path / "sequences", config, words_tokenizer, 16)
    assert stamps == {path: path.stat().st_mtime_ns for path in (tmp_path / "sequences").iterdir()}
    jsonl.write_text(jsonl.read_text() + '{"text": "w1 w2"}\n')
    assert len(prepare_sequences(tmp_path / "sequences", config, words_tokenizer, 16)) == 21
    assert len(Sequences.open(tmp_path / "sequences")) == 21


def test_texts_that_cannot_be_read_are_named(tmp_path, words_tokenizer) -> None:
    parquet, jsonl, _ = write_texts(tmp_path, 10)
    (tmp_path / "blank.jsonl").write_text('{"text": "  "}\n{"text": null}\n')
    (tmp_path / "broken.jsonl").write_text('{"text": "w1"}\n{"text": \n')
    (tmp_path / "other.csv").write_text("text\n")
    for settings, message in (
        ({"files": str(tmp_path / "none.jsonl")}, "none.jsonl: no such file"),
        ({"files": str(tmp_path / "other.csv")}, r"other.csv: expected .parquet or .jsonl"),
        ({"files": str(parquet)}, "no column 'text'; it has body, id, from"),
        ({"files": str(jsonl), "document_column": "texts"}, "no column 'texts'.*Did you mean 'text'"),
        ({"files": str(tmp_path / "blank.jsonl")}, "no text in column 'text'"),
        ({"files": str(tmp_path / "broken.jsonl")}, "broken.jsonl: cannot be read"),
        ({}, "No text files are given"),
    ):
        with pytest.raises(UserError, match=message):
            list(pieces(TextConfig(**settings), words_tokenizer, 6, 16))


def test_building_and_refreshing_give_the_same_bytes_for_any_number_of_actors(
    tmp_path, make_model, words_tokenizer
) -> None:
    parquet, _, texts = write_texts(tmp_path, 60)
    config = TextConfig(files=(str(parquet),), text_column="body", document_column="id", source_column="from")
    first, second = (DocumentEncoder(make_model(seed), words_tokenizer, f"model {seed}") for seed in (0, 1))
    manifests = []
    for workers in (0, 2):
        folder = tmp_path / f"memory-{workers}"
        memory = build(folder, config, first, "float32", entries_per_segment=8, workers=0)
        refreshed = refresh(memory.delete([5]), second, workers)
        assert not memory.verify() and not refreshed.verify()
        manifests.append((memory.manifest, refreshed.manifest))
    assert manifests[0] == manifests[1]
    assert (refreshed.fingerprint, refreshed.version, len(refreshed)) == (second.fingerprint, 3, 29)
    assert [entry.text for entry in memory.entries()] == texts[:30]
    assert torch.allclose(memory.load().key_NQ, first.encode(first.tokenize(texts[:30])).key_MQ, atol=1e-6)


def test_a_refresh_that_fails_publishes_nothing(tmp_path, facts, make_model, words_tokenizer, encoder) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder, dtype="float16")
    model = make_model()
    model.model.knowledge_encoder.value.bias.data[0] = 1e6
    with pytest.raises(UserError, match="a value is not finite in float16"):
        refresh(memory, DocumentEncoder(model, words_tokenizer))
    assert KnowledgeMemory.open(memory.folder).version == 1


# ── pre-training ────────────────────────────────────────────────────────────


@pytest.fixture
def config(tmp_path, words_tokenizer) -> Any:
    """`config(**train)`: a tiny run on 2 × 20 texts."""
    words_tokenizer.save_pretrained(tmp_path / "tokenizer")
    parquet, _, _ = write_texts(tmp_path, 40)
    texts = {"files": str(parquet), "text_column": "body", "document_column": "id"}
    sizes = {name: value for name, value in BACKBONE.items() if name not in ("vocab_size", "pad_token_id")}

    def make(name: str = "run", **train: Any) -> PretrainConfig:
        settings = {
            "steps": 4, "batch_size": 8, "max_tokens": 16, "refresh_every": 2, "checkpoint_every": 2,
            "validate_every": 2, "cpus_per_worker": 1, "trackers": (), "warm_up_steps": 1,
        }  # fmt: skip
        return PretrainConfig.model_validate(
            {
                "run_dir": str(tmp_path / name),
                "model": {
                    "sizes": {**sizes, "num_hidden_layers": 2}, "tokenizer": str(tmp_path / "tokenizer"),
                    "memory_feed_forward": 16, "query_size": 8, "top_k": 3, "max_document_tokens": 16,
                },
                "documents": texts,
                "text": texts,
                "validation": texts,
                "memory": {
                    "entries_per_segment": 8, "dtype": "float32", "shards": 2, "cpus_per_shard": 0,
                    "refresh_workers": 0,
                },
                "train": settings | train,
            }
        )  # fmt: skip

    return make


def trained(config: PretrainConfig) -> tuple[dict[str, Any], dict[str, torch.Tensor], KnowledgeMemory]:
    metrics = pretrain(config)
    folder = Path(config.run_dir, "pretrain")
    model, _ = load_pluglm(folder / "model")
    memory = KnowledgeMemory.open(folder / "memory")
    model.attach(memory.load(model.fingerprint()))  # the trained model reads the current version
    return metrics, model.state_dict(), memory


def test_a_run_from_files_to_a_model_and_its_memory(config) -> None:
    metrics, weights, memory = trained(config(optimizer="lamb", contrastive_steps=2))
    assert [point["step"] for point in metrics["history"]] == [0, 2, 4]
    assert memory.version == metrics["memory_version"] == 3
    reported = Result.from_path(str(Path(config().run_dir) / "pretrain" / "ray_train")).metrics
    assert reported == metrics["history"][-1] and reported["memory_version"] == 3
    assert memory.entries().__next__().document_id == "d0"
    assert all(np.isfinite(point["loss"]) for point in metrics["history"])
    again, same, _ = trained(config(optimizer="lamb", contrastive_steps=2))
    assert again == metrics  # a finished run is reused
    assert all(torch.equal(tensor, same[name]) for name, tensor in weights.items())


def test_what_other_settings_left_is_set_aside_and_comes_back_with_them(config) -> None:
    one = config()
    faster = one.train.model_copy(update={"trackers": ("tensorboard",), "max_failures": 1})
    same = one.model_copy(update={"train": faster})
    other = one.model_copy(update={"seed": 1})
    files_at_start = []

    def train(settings: PretrainConfig) -> bool:
        """Whether a training took place, in an empty folder."""
        run = PluglmRun(settings)

        def work() -> dict[str, str]:
            run.claim("pretrain", anew=not settings.train.resume)
            files_at_start.append({path.name for path in run.path("pretrain").iterdir()} - {"stamp"})
            run.path("pretrain", "model").mkdir()
            run.path("pretrain", "model", "config.json").write_text("{}")
            return {"summary": "done"}

        before = len(files_at_start)
        assert run.perform("pretrain", work)["summary"] == "done"
        return len(files_at_start) > before

    text = Path(one.run_dir, "text.jsonl")
    text.parent.mkdir()
    text.touch()
    assert train(one) and not train(same)
    assert train(other) and not train(other) and not train(one) and not train(other)
    anew = other.model_copy(update={"train": other.train.model_copy(update={"resume": False})})
    assert not train(anew)
    (run := PluglmRun(anew)).path("pretrain", "metrics.json").unlink()
    assert train(anew)
    assert files_at_start == [set()] * 3 and text.exists()
    assert len(list(run.folder.glob("pretrain.before-*"))) == 2


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "accelerate", "deepspeed"])
def test_strategies_and_numbers_of_workers_agree(config, strategy) -> None:
    """Without BatchNorm, whose statistics are per worker; dropout is off."""
    plain = config("one", accumulate=2)
    plain = plain.model_copy(update={"model": plain.model.model_copy(update={"query_norm": False})})
    _, expected, _ = trained(plain)
    two_workers = config(strategy, workers=2, strategy=strategy, accumulate=1)
    metrics, weights, memory = trained(two_workers.model_copy(update={"model": plain.model}))
    assert memory.version == metrics["memory_version"] == 3
    for name, tensor in expected.items():
        if not name.endswith("key.bias"):  # its gradient is only noise, which Adam enlarges
            assert torch.allclose(tensor, weights[name], atol=2e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "deepspeed"])
def test_a_run_whose_worker_is_killed_goes_on_to_the_same_model(config, strategy, monkeypatch) -> None:
    """SIGKILL in step 5, after the refresh of step 4; the checkpoint is of step 3."""
    settings = {"steps": 6, "refresh_every": 2, "checkpoint_every": 3, "strategy": strategy}
    _, expected, _ = trained(config("undisturbed", **settings))
    broken = config("broken", **settings)
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers cannot import tests
    monkeypatch.setattr("pema_ray.pluglm.stages.pretrain._work", killed_work)
    kill = Path(broken.run_dir, "kill")
    kill.parent.mkdir()
    kill.write_text("4")
    _, weights, memory = trained(broken)
    assert not kill.exists()
    assert memory.version > 4  # the first attempt published versions too
    for name, tensor in expected.items():
        assert torch.equal(tensor, weights[name]), name


def killed_work(job: Any) -> dict[str, Any]:
    """The worker's function, in a process that dies once, at the step in the file `kill`."""
    import os
    import signal

    from pema_ray.pluglm.learning.pretraining import Pretrainer
    from pema_ray.pluglm.stages.pretrain import _work

    learn, kill = Pretrainer.learn, job.run_dir.parent / "kill"

    def dies(self, step, inputs):
        if kill.exists() and int(kill.read_text()) == step:
            kill.unlink()
            os.kill(os.getpid(), signal.SIGKILL)
        return learn(self, step, inputs)

    Pretrainer.learn = dies
    return _work(job)


def test_bad_settings_of_the_model_are_named(tmp_path) -> None:
    for settings, message in (
        ({}, "give either 'backbone'"),
        ({"sizes": {"hidden_size": 8}}, "'sizes' needs a 'tokenizer'"),
    ):
        with pytest.raises(ValueError, match=message):
            ModelSettings(**settings)
