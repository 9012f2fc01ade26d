"""Fine-tuning from files under Ray Train, and the service under Ray Serve."""

from __future__ import annotations

import asyncio
import json
from importlib import import_module
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from ray.train import Result

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import FinetuneConfig
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.encoder import StaleKeys
from pema_ray.pluglm.model.loading import load_pluglm
from pema_ray.pluglm.service.editor_keys import new_key
from pema_ray.pluglm.stages.finetune import run as finetune
from pema_ray.pluglm.stages.pretrain import save_model

CONFIG = Path(__file__).parents[3] / "serve_configs" / "pluglm.yaml"


@pytest.fixture
def config(tmp_path, model, words_tokenizer, facts, monkeypatch) -> Any:
    """`config(memory={…}, **train)`: a classification of twelve texts, with a memory of facts; paths are relative."""
    monkeypatch.chdir(tmp_path)
    save_model(model, words_tokenizer, tmp_path / "pretrained")
    KnowledgeMemory.build(tmp_path / "facts", facts, DocumentEncoder(model, words_tokenizer), "float32")
    rows = [{"sentence": f"w{2 + n % 2} w{40 + n}", "label": "even" if n % 2 == 0 else "odd"} for n in range(12)]
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "test.jsonl").write_text('{"sentence": "w2 w50"}\n{"sentence": "w3 w51"}\n')

    def make(name: str = "run", memory: dict[str, Any] | None = None, **train: Any) -> FinetuneConfig:
        data = {"train": "all.jsonl", "validation": "all.jsonl"}
        return FinetuneConfig.model_validate(
            {
                "run_dir": name, "model": "pretrained",
                "task": {"kind": "classification"}, "data": {**data, "test": "test.jsonl"},
                "memory": {"folder": "facts", "in_task": True} if memory is None else memory,
                "train": {"epochs": 4, "batch_size": 6, "max_tokens": 16, "learning_rate": 1e-2, "trackers": (),
                          "cpus_per_worker": 1, **train},
            }
        )  # fmt: skip

    return make


@pytest.mark.cluster
def test_from_files_to_a_model_with_its_report(config, ray_cluster, tmp_path) -> None:
    metrics = finetune(config())
    assert [point["epoch"] for point in metrics["history"]] == [1, 2, 3, 4]
    assert metrics["scores"]["validation"]["accuracy"] == pytest.approx(metrics["best"])
    reported = Result.from_path(str(tmp_path / "run" / "finetune" / "ray_train"))
    assert reported.checkpoint is not None and reported.metrics is not None
    assert metrics["history"][-1].items() <= reported.metrics.items()
    assert reported.metrics["best_accuracy"] == metrics["best"]
    assert reported.metrics["best_version"] == metrics["memory_version"]
    assert (Path(reported.checkpoint.path) / "model" / "config.json").exists()
    assert "test" not in metrics["scores"]  # it has no labels
    answers = [json.loads(line) for line in (tmp_path / "run" / "finetune" / "test.jsonl").read_text().splitlines()]
    assert [answer["id"] for answer in answers] == ["0", "1"]
    assert {answer["answer"] for answer in answers} <= {"even", "odd"}
    memory = KnowledgeMemory.open(tmp_path / "run" / "finetune" / "memory")
    assert len(memory) == 24
    assert len(KnowledgeMemory.open(tmp_path / "facts")) == 12  # the original is unchanged
    report = json.loads((tmp_path / "run" / "finetune" / "retrieval.json").read_text())
    assert report["inputs_in_sum"] == 12
    assert report["memory_sources"] == {"a": 6, "b": 6, "training examples": 12}
    own = {entry.text.rsplit(" ", 1)[0]: entry.entry_id for entry in memory.entries() if entry.tags}
    for example in report["inputs"]:  # validated on training examples: none retrieves itself
        assert own[example["text"]] not in [use["entry_id"] for use in example["layers"][0]["entries"]]
    assert (tmp_path / "run" / "finetune" / "retrieval-test.html").exists()
    assert finetune(config()) == metrics  # a finished run is reused


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "accelerate", "deepspeed"])
def test_two_workers_with_a_memory_in_shards(config, ray_cluster, tmp_path, strategy) -> None:
    """A memory that is not frozen: it is refreshed, and the kept model reads its own version."""
    memory = {"folder": str(tmp_path / "facts"), "shards": 2, "cpus_per_shard": 0}
    free = {"workers": 2, "fix_keys": False, "fix_values": False, "refresh_every": 3, "strategy": strategy}
    metrics = finetune(config(strategy, memory, **free))
    folder, heads = tmp_path / strategy / "finetune", import_module("pema_ray.pluglm.model.heads")
    kept, _ = load_pluglm(folder / "model", heads.PlugLMForSequenceClassification)
    kept.attach(KnowledgeMemory.open(folder / "memory").load(kept.fingerprint()))
    assert metrics["scores"]["validation"]["accuracy"] == pytest.approx(metrics["best"])


def test_a_memory_of_another_encoder_is_refused(config, tmp_path, make_model, words_tokenizer) -> None:
    save_model(make_model(1), words_tokenizer, tmp_path / "pretrained")
    with pytest.raises(StaleKeys, match="its keys were made by encoder"):
        finetune(config())
    with pytest.raises(UserError, match=r"none.jsonl: no such file"):
        finetune(config().model_copy(update={"data": config().data.model_copy(update={"test": "none.jsonl"})}))


def test_the_serve_file_builds_its_application() -> None:
    from ray.serve.schema import ServeDeploySchema

    schema = ServeDeploySchema.model_validate(yaml.safe_load(CONFIG.read_text()))
    (application,) = schema.applications
    module, _, builder = application.import_path.partition(":")
    built = getattr(import_module(module), builder)(application.args)
    assert built._bound_deployment.name == "PlugLM"
    with pytest.raises(UserError, match="unknown key 'service.editor'.*Did you mean 'editors'"):
        getattr(import_module(module), builder)({"service": {"memory": "m", "editor": []}})


@pytest.mark.cluster
@pytest.mark.slow
def test_edits_reach_every_replica_and_drop_no_request(config, ray_cluster, tmp_path) -> None:
    from ray import serve

    from pema_ray.pluglm.service.application import pluglm

    config()
    key, hashed = new_key()
    service = {
        "fill_mask": str(tmp_path / "pretrained"), "memory": str(tmp_path / "facts"), "editors": (hashed,),
        "follow_seconds": 0.2,
    }  # fmt: skip
    serve.start(http_options={"host": "127.0.0.1", "port": 8127})
    serve.run(pluglm({"service": service, "replicas": 2, "cpus": 0.5}), name="pluglm", route_prefix="/")
    statuses: list[int] = []
    versions: list[int] = []

    async def edit_and_ask() -> None:
        async with httpx.AsyncClient(base_url="http://127.0.0.1:8127", timeout=60) as c:
            edited = asyncio.Event()

            async def ask() -> None:
                while not edited.is_set() or set(versions[-20:]) != {5}:  # until both replicas have followed
                    answer = await c.post("/v1/fill-mask", json={"texts": ["w1 [MASK]"]})
                    statuses.append(answer.status_code)
                    versions.append(answer.json()["memory_version"])

            async def edit() -> None:
                for number in range(4):
                    change = {"action": "replace", "entry_id": number, "text": f"w{60 + number}"}
                    headers = {"authorization": f"Bearer {key}"}
                    answer = await c.post("/v1/memory/edit", json={"edits": [change]}, headers=headers)
                    assert answer.json()["version"] == number + 2
                edited.set()

            async with asyncio.timeout(120):
                await asyncio.gather(edit(), ask(), ask())

    try:
        asyncio.run(edit_and_ask())
    finally:
        serve.shutdown()
    assert set(statuses) == {200}
    assert versions[-1] == 5
