"""From a trained model to a table, a page and a service, in the run's folder."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import ray
import torch
from fastapi.testclient import TestClient

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.memory.search.index import load_parts
from pema_ray.memory.search.nearest import OnePieceSearch, SearchOptions
from pema_ray.memory.search.ray_search import deal, open_search
from pema_ray.trime.config import ModelConfig, PrepareConfig, TrimeConfig
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.evaluation.calibration import token_log_probs
from pema_ray.trime.evaluation.explain import explain_text
from pema_ray.trime.evaluation.explain import settings_of as chosen_settings
from pema_ray.trime.evaluation.results import TrimeEvaluation
from pema_ray.trime.evaluation.statistics import Text, measure
from pema_ray.trime.evaluation.systems import make_probe, make_system
from pema_ray.trime.model.registry import load_model, make_model, save_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.service.service import TrimeService, distribution, make_api
from pema_ray.trime.stages import datastore as build_datastore
from pema_ray.trime.stages import evaluate, report
from pema_ray.trime.stages import index as build_index
from pema_ray.trime.stages.table import Row, Table, mean_and_sd, settings_of
from pema_ray.trime.stages.table import markdown as table_markdown
from pema_ray.trime.text.vocabulary import Vocabulary, from_counts

SENTENCE = "the cat sat on the mat and the dog sat on the log while a bird sang in the old tree near the river"
WORDS = SENTENCE.split()
SETTINGS = [
    "model.shape={layers: 1, hidden_size: 16, ffn_size: 32, heads: 2}",
    "batches.segment=16",
    "datastore.rows_per_shard=64",
    "datastore.key_dtype=float32",
    "index.kind=ivf_flat",
    "index.shards_per_part=2",
    "index.recall_at=10",
    "evaluate.mem_size=32",
    "evaluate.mem_sizes=[8]",
    "evaluate.neighbours=16",
    "evaluate.neighbour_counts=[4]",
    "ray.num_cpus=4",
]


def settings(folder: Path, *more: str) -> TrimeConfig:
    return read_config(TrimeConfig, None, [f"run_dir={folder}", *SETTINGS, *more])


def prepared(folder: Path, *more: str, seed: int = 0, memory: str = "ext") -> TrimeRun:
    """A run whose corpus is prepared and whose model is trained, as far as later stages can see."""
    config = settings(folder, f"train.memory={memory}", *more)
    run = TrimeRun(config)
    vocabulary = from_counts(PrepareConfig(), Counter(WORDS))
    rng, corpus = np.random.default_rng(seed), {}
    for split, count in (("train", 400), ("dev", 90), ("test", 70)):
        (run.path("prepare", split)).mkdir(parents=True)
        halves = [rng.integers(0, len(vocabulary), n).astype(np.int32) for n in (count // 3, count - count // 3)]
        columns = {"document": [0, 1], "title": ["a", "b"], "token": pa.array(halves, pa.list_(pa.int32()))}
        pq.write_table(pa.table(columns), run.path("prepare", split, "shard-00000.parquet"))
        corpus[split] = {"tokens": count, "documents": 2, "shards": [{"name": "shard-00000.parquet"}]}
    vocabulary.save(run.path("prepare"))
    run.path("prepare", "corpus.json").write_text(json.dumps(corpus))
    torch.manual_seed(seed)
    save_model(make_model(ModelConfig(shape=config.model.shape), len(vocabulary), 16), run.path("train", "model"))
    for stage in ("prepare", "train"):
        metrics = {"stamp": run.stamp(stage), "summary": "", "splits": corpus}
        run.path(stage, "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.fixture(scope="module")
def finished(ray_cluster, tmp_path_factory) -> TrimeRun:
    """A run with datastore, index, evaluation and report."""
    run = prepared(tmp_path_factory.mktemp("run"))
    for stage in (build_datastore, build_index, evaluate, report):
        stage.run(run.config)
    return run


@pytest.mark.cluster
def test_a_run_ends_with_a_table_and_a_page(finished: TrimeRun):
    evaluation = TrimeEvaluation.load(finished.path("evaluate"))
    assert [row.system for row in evaluation.scores] == ["local", "long", "ext", "long_knn", "ext_knn"]
    assert evaluation.tokens == {"dev": 90, "test": 70}
    assert {curve.title for curve in evaluation.curves} == {
        "Perplexity against memory size", "Perplexity against k", "Perplexity against λ",
    }  # fmt: skip
    dev = {row.system: row.dev_nll for row in evaluation.scores}
    assert dev["long_knn"] <= dev["long"] + 1e-6  # λ = 0 is among what calibration may choose
    assert dev["ext_knn"] <= dev["ext"] + 1e-6
    table = finished.path("evaluate", "table.md").read_text()
    assert table.count("| own |") == 3
    page = finished.path("report", "report.html").read_text()
    assert page.count('<svg class="plot"') == 3
    assert page.count("data-why=") == 69 or page.count("data-why=") == 70
    index = finished.metrics("index")
    assert 0 < index["recall"] <= 1
    assert index["parts"] == -(-build_datastore.plan_build(finished).shards // 2)


@pytest.mark.cluster
def test_finished_stages_are_reused(finished: TrimeRun, capsys):
    before = finished.path("evaluate", "evaluation.json").stat().st_mtime_ns
    for stage in (build_datastore, build_index, evaluate):
        stage.run(finished.config)
    assert finished.path("evaluate", "evaluation.json").stat().st_mtime_ns == before
    assert "reused" in capsys.readouterr().out


@pytest.mark.cluster
def test_search_actors_give_the_same_table(finished: TrimeRun):
    """Two actors hold what one process held, and one of them dies on the way."""
    store, index = open_datastore(finished.path("datastore"), None), finished.path("index")
    query_NH = np.random.default_rng(0).normal(size=(9, 16)).astype(np.float32)
    expected = OnePieceSearch(load_parts(store, index, SearchOptions())).search(query_NH, 20)
    for actors in (2, 3):
        with open_search(store, index, SearchOptions(), actors, 0.5) as search:
            result = search.search(query_NH, 20)
            assert torch.equal(result.row_NK, expected.row_NK)
            assert torch.equal(result.similarity_NK, expected.similarity_NK)
            if actors == 2:
                ray.kill(search._holders[0], no_restart=False)
                assert torch.equal(search.search(query_NH, 20).row_NK, expected.row_NK)
            with pytest.raises(UserError, match="1,000 neighbours requested of a datastore of 400 entries"):
                search.search(query_NH, 1000)


@pytest.mark.cluster
def test_another_domain_is_evaluated_with_its_own_the_other_and_no_datastore(finished: TrimeRun, tmp_path: Path):
    """The same weights on another text: only datastores differ."""
    model, store = finished.path("train", "model"), finished.path("datastore")
    more = [f"evaluate.model={model}", f"evaluate.datastores={{first: {store}}}", "evaluate.systems=[long, long_knn]"]
    run = prepared(tmp_path / "second", *more, seed=4)
    for stage in (build_datastore, build_index, evaluate):
        stage.run(run.config)
    evaluation = TrimeEvaluation.load(run.path("evaluate"))
    assert [(row.system, row.datastore) for row in evaluation.scores] == [
        ("long", None), ("long_knn", "own"), ("long_knn", "first"),
    ]  # fmt: skip
    assert evaluation.fingerprint == TrimeEvaluation.load(finished.path("evaluate")).fingerprint


@pytest.mark.cluster
def test_a_stranger_among_the_datastores_is_refused(finished: TrimeRun, tmp_path: Path):
    stranger = prepared(tmp_path / "stranger", f"evaluate.datastores={{first: {finished.path('datastore')}}}", seed=7)
    for stage in (build_datastore, build_index):
        stage.run(stranger.config)
    with pytest.raises(FingerprintMismatch, match="The datastore .* belongs to PLM"):
        evaluate.run(stranger.config)


def test_what_belongs_to_other_runs_is_part_of_a_stamp(tmp_path: Path):
    """Another datastore, index or vocabulary in the same place must give no stale result."""
    other = prepared(tmp_path / "other")
    store, index = other.path("datastore"), other.path("index")
    for folder, name in ((store, "manifest.json"), (index, "index.json")):
        folder.mkdir()
        (folder / name).write_text("{}")
    model = other.path("train", "model")
    borrowed = (f"evaluate.model={model}", f"evaluate.datastores={{first: {store}}}")
    run = TrimeRun(settings(tmp_path / "run", f"prepare.vocabulary_from={other.folder}", *borrowed))
    stamps = [(run.stamp("prepare"), run.stamp("evaluate"))]
    for path in (store / "manifest.json", index / "index.json", other.path("prepare", "vocabulary.json")):
        path.write_text(path.read_text() + " ")
        stamps.append((run.stamp("prepare"), run.stamp("evaluate")))
    prepare_stamps, evaluate_stamps = zip(*stamps)
    assert len(set(evaluate_stamps)) == 4
    assert len(set(prepare_stamps)) == 2  # the vocabulary's change alone
    run.path("prepare").mkdir(parents=True)
    run.path("prepare", "metrics.json").write_text(json.dumps({"stamp": prepare_stamps[-1], "summary": ""}))
    run.input_files.save()
    other.path("prepare", "vocabulary.json").unlink()
    assert run.metrics("prepare")  # gone since: the one that was taken counts


@pytest.mark.cluster
def test_the_shares_of_entries_add_up_to_the_probability(finished: TrimeRun):
    evaluation = TrimeEvaluation.load(finished.path("evaluate"))
    text = " ".join(WORDS * 2)
    for system in ("long", "ext", "ext_knn"):
        explained = explain_text(finished, evaluation, system, text, "a text")
        probabilities = [token.probability for token in explained.tokens]
        assert len(probabilities) == len(WORDS * 2) + 1  # `<eos>` at the line's end
        expected = _scored(finished, evaluation, system, text)  # the same numbers as scoring gives
        assert probabilities == pytest.approx(expected, rel=1e-3, abs=1e-6)
    with pytest.raises(UserError, match="System 'cache' has not been evaluated; there are local, long"):
        explain_text(finished, evaluation, "cache", text, "a text")


def _scored(run: TrimeRun, evaluation: TrimeEvaluation, name: str, text: str) -> list[float]:
    model, vocabulary = load_model(run.model_folder), Vocabulary.load(run.path("prepare"))
    probe = make_probe(run.config, "key", model.hidden_size)
    token_N = torch.from_numpy(np.concatenate([[vocabulary.eos_id], vocabulary.encode(text)]).astype(np.int64))
    parts = load_parts(open_datastore(run.path("datastore"), None), run.path("index"), SearchOptions())
    statistics = measure(model, Text(token_N), probe, OnePieceSearch(parts))
    settings = chosen_settings(next(row.chosen for row in evaluation.scores if row.system == name))
    return token_log_probs(statistics, probe, make_system(name, run.config.evaluate).mixture, settings).exp().tolist()


# ── the service ─────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def service(finished: TrimeRun, tmp_path_factory):
    """One service for all tests: an actor takes seconds to start."""
    path = tmp_path_factory.mktemp("service") / "experiment.yaml"
    path.write_text("{}\n")
    overrides = (f"run_dir={finished.folder}", *SETTINGS, "train.memory=ext")
    return TrimeService({"config": str(path), "overrides": overrides, "system": "ext_knn", "search_actors": 1})


@pytest.mark.cluster
async def test_the_service_scores_and_continues_with_a_chosen_datastore(service: TrimeService, finished: TrimeRun):
    await service.change({"datastores": {"own": str(finished.path("datastore"))}})
    text = "the cat sat on the mat"
    with TestClient(make_api(service)) as client:
        assert client.get("/v1/datastores").json()["data"] == [{"id": "own", "entries": 400}]
        answer = client.post("/v1/score", json={"text": text, "datastore": "own"}).json()
        expected = _scored(finished, TrimeEvaluation.load(finished.path("evaluate")), "ext_knn", text)
        assert [np.exp(token["log_prob"]) for token in answer["tokens"]] == pytest.approx(expected, rel=1e-4)
        without = client.post("/v1/score", json={"text": text}).json()
        assert without["system"] == "long" and without["perplexity"] != answer["perplexity"]
        following = client.post("/v1/next", json={"text": text, "datastore": "own", "top": 1000}).json()["tokens"]
        assert sum(token["probability"] for token in following) == pytest.approx(1, abs=1e-5)
        assert len(following) == service.model.vocabulary_size


@pytest.mark.cluster
async def test_what_comes_next_is_what_scoring_says_of_it(service: TrimeService, finished: TrimeRun):
    """`/v1/next` gives each word the probability that `/v1/score` gives it at the end of the text."""
    await service.change({"datastores": {"own": str(finished.path("datastore"))}})
    system, probe, settings = service._systems[True]
    token_N = torch.from_numpy(service.vocabulary.encode(" ".join(WORDS)).astype(np.int64))
    search = service._datastores["own"].search
    log_p_V, _ = distribution(service.model, Text(token_N), probe, system.mixture, settings, search)
    for token in (0, 5, 11):
        longer = Text(torch.cat([token_N, torch.tensor([token])]))
        scored = token_log_probs(measure(service.model, longer, probe, search), probe, system.mixture, settings)[-1]
        assert float(log_p_V[token]) == pytest.approx(float(scored), abs=1e-4)


@pytest.mark.cluster
async def test_datastores_are_swapped_and_mistakes_are_rejected(
    service: TrimeService, finished: TrimeRun, tmp_path: Path
):
    folder = str(finished.path("datastore"))
    await service.change({"datastores": {"own": folder}})
    kept = service._datastores["own"]
    await service.change({"datastores": {"own": folder, "again": folder}})
    assert service._datastores["own"] is kept and list(service.datastores) == ["own", "again"]
    for wrong, complaint in (
        ({"datastores": {"gone": str(tmp_path)}}, "no external memory here"),
        ({"datastore": {}}, "user_config: unknown key 'datastore'. Did you mean 'datastores'?"),
    ):
        with pytest.raises(UserError, match=complaint):
            await service.change(wrong)
        assert list(service.datastores) == ["own", "again"]
    with TestClient(make_api(service)) as client:
        for body, status, complaint in (
            ({"text": "the cat", "datastore": "owm"}, 404, "No datastore 'owm'. Did you mean 'own'?"),
            ({"text": " ".join(WORDS * 500)}, 400, "this service takes 8,192"),
            ({"text": "the", "top": 0}, 400, "greater than or equal to 1"),
        ):
            answer = client.post("/v1/score", json=body)
            assert answer.status_code == status and complaint in answer.text
    await service.change({"datastores": {"again": folder}})
    assert list(service.datastores) == ["again"]
    await service.change({"datastores": {}})


@pytest.mark.cluster
def test_a_system_without_calibration_is_not_served(finished: TrimeRun, tmp_path: Path):
    (tmp_path / "experiment.yaml").write_text("{}\n")
    overrides = (f"run_dir={finished.folder}", *SETTINGS, "train.memory=ext")
    arguments = {
        "config": str(tmp_path / "experiment.yaml"),
        "overrides": [*overrides, "train.updates=7"],
        "system": "ext_knn",
    }
    with pytest.raises(
        UserError, match=r"not evaluated with the settings of this service.*belong in service\.overrides"
    ):
        TrimeService(arguments)
    with pytest.raises(UserError, match="System 'knn_cache' of this run has no calibration"):
        TrimeService({"config": str(tmp_path / "experiment.yaml"), "overrides": overrides, "system": "knn_cache"})


# ── the table ───────────────────────────────────────────────────────────────


def row(budget: str, memory, system: str, test: tuple[float, ...]) -> Row:
    return Row(
        budget=budget, memory=memory, system=system, label=system, datastore=None, dev_nll=test, test_nll=test,
        updates=(100,) * len(test), training_seconds=(1.0,) * len(test),
    )  # fmt: skip


def test_the_table_has_means_and_deviations_and_the_plain_model_under_both_budgets():
    nlls = tuple(float(np.log(value)) for value in (90.0, 100.0, 110.0))
    rows = (
        row("equal steps", "none", "cache", nlls),
        row("equal steps", "local", "local", tuple(n - 0.1 for n in nlls)),
        row("equal time", "local", "local", tuple(n + 0.1 for n in nlls)),
    )
    table = Table(
        corpus="c", tokens={"train": 1, "dev": 1, "test": 1}, parameters=5, segment=16, seeds=(0, 1, 2),
        per_character=False, rows=rows,
    )  # fmt: skip
    text = table_markdown(table)
    steps, time = text.split("**At equal time**")
    assert "; mean ± sd of 3 seeds; " in text
    assert mean_and_sd(nlls, False) == "100.00 ± 10.00"
    assert steps.count("100.00 ± 10.00") == time.count("100.00 ± 10.00") == 2  # dev and test
    assert "**90.48 ± 9.05**" in steps and "**100.00 ± 10.00**" in time
    assert mean_and_sd([np.log(2.0)], True) == "1.000"


def test_each_objective_gets_the_order_of_batches_it_needs(tmp_path: Path):
    base = settings(tmp_path, "table.settings={ext: {train.hide_local: 0.5}}")
    configs = {m: settings_of(base, tmp_path, 1, m, "equal steps", 7) for m in ("none", "local", "long", "ext")}
    assert {m: c.batches.order for m, c in configs.items()} == {
        "none": "random", "local": "random", "long": "keep", "ext": "bm25",
    }  # fmt: skip
    assert {c.seed for c in configs.values()} == {1} and {c.train.updates for c in configs.values()} == {7}
    assert configs["ext"].train.hide_local == 0.5 != configs["local"].train.hide_local
    with pytest.raises(UserError, match="table.settings.ext: unknown key 'train.hidelocal'"):
        settings_of(settings(tmp_path, "table.settings={ext: {train.hidelocal: 1}}"), tmp_path, 1, "ext", "s", 7)


@pytest.mark.parametrize(("parts", "holders"), [(1, 3), (5, 2), (6, 3), (7, 7), (2, 9)])
def test_parts_are_dealt_evenly_and_nobody_goes_without(parts: int, holders: int):
    dealt = deal(parts, holders)
    assert [number for numbers in dealt for number in numbers] == list(range(parts))
    assert len(dealt) == min(parts, holders)
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_unknown_systems_are_refused_with_the_nearest_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"'longknn' is no system. Did you mean 'long_knn'\?"):
        settings(tmp_path, "evaluate.systems=[longknn]")


def test_squared_distances_never_join_equation_2(tmp_path: Path):
    with pytest.raises(UserError, match="index.metric=l2 does not go with 'ext_knn'"):
        settings(tmp_path, "index.metric=l2", "evaluate.systems=[knn,ext_knn]")
    assert settings(tmp_path, "index.metric=l2", "evaluate.systems=[knn]").index.metric == "l2"


def test_a_missing_model_is_named_with_its_command(tmp_path: Path):
    run = prepared(tmp_path / "run")
    run.path("train", "metrics.json").unlink()
    with pytest.raises(UserError, match="stage 'train' has not been run yet. Run: pema-ray trime train"):
        build_datastore.run(run.config)
