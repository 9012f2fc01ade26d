"""An index is built in parts, goes on where it stopped to the same bytes, and belongs to one datastore."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.line import ModelCard
from pema_ray.memory.codec import encode
from pema_ray.memory.search.config import IndexConfig
from pema_ray.memory.search.index import IndexBuild, build_index, load_parts
from pema_ray.memory.search.nearest import OnePieceSearch, SearchOptions, merge, recall, require_faiss
from pema_ray.memory.shards import MemoryRows
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.stages.index import add_parts
from tests.memory.kit import write_memory
from tests.trime.kit import HIDDEN, VOCABULARY, keys_of

CARD = ModelCard("tiny", "f" * 16, HIDDEN, VOCABULARY, 96, (0,))


def store_of(
    folder: Path,
    count: int = 3000,
    shards: int = 6,
    dtype: str = "float16",
    fingerprint: str = "f" * 16,
    hidden: int = HIDDEN,
):
    """A datastore of clustered keys."""
    torch.manual_seed(1)
    centre_CH, token_M = keys_of(40, hidden, 7)[0], keys_of(count)[1]
    key_MH = centre_CH[torch.randint(0, 40, (count,))] * 2 + torch.randn(count, hidden) * 0.5
    blocks = []
    for rows in np.array_split(np.arange(count), shards):
        keys = encode(key_MH[rows].numpy(), dtype)  # type: ignore[arg-type]
        target = token_M[rows].numpy().astype(np.int32)
        blocks.append(MemoryRows(keys, target, rows, np.zeros(len(rows), np.int32)))
    return write_memory(folder, blocks, fingerprint=fingerprint, vocab_size=VOCABULARY, eos_token_id=0)


def config(kind: str, **changes) -> IndexConfig:
    return IndexConfig(**{"kind": kind, "shards_per_part": 2, "train_rows": 2000, **changes})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("dtype", ["float16", "int8"])
@pytest.mark.parametrize("metric", ["inner_product", "l2"])
@pytest.mark.parametrize("kind", ["ivf_flat", "ivf_pq", "ivf_pq_fast"])
def test_indices_find_most_of_what_an_exact_search_finds(kind: str, metric: str, dtype: str, tmp_path: Path):
    store = store_of(tmp_path / "store", dtype=dtype)
    build_index(IndexBuild(tmp_path / "index", store, config(kind, metric=metric), 0))
    options = SearchOptions(metric=metric, probes=32, rescore=True, oversample=4)  # type: ignore[arg-type]
    query_NH = keys_of(50, HIDDEN, 9)[0].numpy() * 2
    exact = OnePieceSearch(load_parts(store, None, options)).search(query_NH, 20)
    approximate = OnePieceSearch(load_parts(store, tmp_path / "index", options)).search(query_NH, 20)
    assert recall(approximate, exact) > 0.8
    common = approximate.row_NK == exact.row_NK  # rescored: the similarity of a true neighbour is the exact one
    assert torch.allclose(approximate.similarity_NK[common], exact.similarity_NK[common], rtol=1e-4, atol=1e-4)


def test_all_lists_and_exact_codes_are_an_exact_search(tmp_path: Path):
    store, options = store_of(tmp_path / "store"), SearchOptions(probes=10_000)
    build_index(IndexBuild(tmp_path / "index", store, config("ivf_flat"), 0))
    query_NH = keys_of(50, HIDDEN, 9)[0].numpy()
    exact, approximate = (
        OnePieceSearch(load_parts(store, folder, options)).search(query_NH, 20) for folder in (None, tmp_path / "index")
    )
    assert recall(approximate, exact) == 1


@pytest.mark.parametrize("kind", ["ivf_pq", "ivf_pq_fast"])
def test_a_stopped_build_goes_on_to_the_same_bytes(kind: str, tmp_path: Path):
    store = store_of(tmp_path / "store")
    build_index(IndexBuild(tmp_path / "undisturbed", store, config(kind), 0))

    def stop(number: int):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_index(IndexBuild(tmp_path / "stopped", store, config(kind), 0), stop)
    assert not (tmp_path / "stopped" / "index.json").exists()
    finished = (tmp_path / "stopped" / "part-00000.faiss").stat().st_mtime_ns
    (tmp_path / "stopped" / ".part-00001.faiss.1.tmp").write_bytes(b"torn")
    again = IndexBuild(tmp_path / "stopped", store, config(kind), 0)
    assert again.missing == [1, 2]
    build_index(again)
    assert contents(tmp_path / "stopped") == contents(tmp_path / "undisturbed")
    assert (tmp_path / "stopped" / "part-00000.faiss").stat().st_mtime_ns == finished


def test_other_settings_begin_anew(tmp_path: Path):
    store = store_of(tmp_path / "store")
    build_index(IndexBuild(tmp_path / "index", store, config("ivf_pq"), 0))
    assert len(IndexBuild(tmp_path / "index", store, config("ivf_pq"), 0).missing) == 0
    info = build_index(IndexBuild(tmp_path / "index", store, config("ivf_pq", pq_bytes=8), 0))
    assert info.pq_bytes == 8
    build_index(IndexBuild(tmp_path / "index", store, config("exact"), 0))
    assert sorted(contents(tmp_path / "index")) == ["index.json", "plan.json"]


@pytest.mark.parametrize("kind", ["ivf_pq", "ivf_pq_fast"])
def test_parts_held_apart_are_the_whole_on_any_number_of_threads(kind: str, tmp_path: Path):
    store, options = store_of(tmp_path / "store"), SearchOptions(probes=8)
    build_index(IndexBuild(tmp_path / "index", store, config(kind), 0))
    query_NH = keys_of(30, HIDDEN, 9)[0].numpy()
    together = OnePieceSearch(load_parts(store, tmp_path / "index", options)).search(query_NH, 20)
    faiss = require_faiss()
    before = faiss.omp_get_max_threads()
    try:
        for threads in (1, 2):
            faiss.omp_set_num_threads(threads)
            searches = [
                OnePieceSearch(load_parts(store, tmp_path / "index", options, parts)) for parts in ([1], [0, 2])
            ]
            merged = merge([search.search(query_NH, 20) for search in searches], 20)
            assert torch.equal(together.row_NK, merged.row_NK)
            assert torch.equal(together.similarity_NK, merged.similarity_NK)
    finally:
        faiss.omp_set_num_threads(before)


def test_an_index_of_another_datastore_is_refused(tmp_path: Path):
    store = store_of(tmp_path / "store")
    build_index(IndexBuild(tmp_path / "index", store, config("exact"), 0))
    larger = store_of(tmp_path / "larger", 2000)
    with pytest.raises(UserError, match="the index of another datastore than"):
        load_parts(larger, tmp_path / "index", SearchOptions())
    stranger = store_of(tmp_path / "stranger", fingerprint="a" * 16)
    with pytest.raises(UserError, match="of a datastore of model f{16}, but .*stranger was made by"):
        load_parts(stranger, tmp_path / "index", SearchOptions())
    with pytest.raises(UserError, match="no index here"):
        load_parts(store, tmp_path / "nowhere", SearchOptions())


def test_damage_is_named(tmp_path: Path):
    store = store_of(tmp_path / "store")
    build_index(IndexBuild(tmp_path / "index", store, config("ivf_flat"), 0))
    part = tmp_path / "index" / "part-00001.faiss"
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(UserError, match="part-00001.faiss: damaged"):
        load_parts(store, tmp_path / "index", SearchOptions())
    part.unlink()
    with pytest.raises(UserError, match="part-00001.faiss: this part of the index is missing"):
        load_parts(store, tmp_path / "index", SearchOptions())
    fields = json.loads((tmp_path / "index" / "index.json").read_text())
    (tmp_path / "index" / "index.json").write_text(json.dumps({**fields, "colour": 1}))
    with pytest.raises(UserError, match="index.json: damaged"):
        load_parts(store, tmp_path / "index", SearchOptions())


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"kind": "ivf_flat", "lists": 5000}, "index.lists=5,000: they are learned from 3,000 keys"),
        ({"kind": "ivf_pq", "pq_bytes": 7}, "index.pq_bytes=7 does not divide the keys' size 16"),
        ({"kind": "ivf_pq_fast", "pq_bytes": 16}, "index.pq_bytes=16 does not divide half of the keys' size 16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(changes, complaint: str, tmp_path: Path):
    with pytest.raises(UserError, match=complaint):
        IndexBuild(tmp_path / "index", store_of(tmp_path / "store"), IndexConfig(**changes), 0)


def test_too_few_keys_for_codes_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="ivf_pq needs 256 keys to learn from at least, there are 200: take exact"):
        IndexBuild(tmp_path / "index", store_of(tmp_path / "store", 200, 1), IndexConfig(kind="ivf_pq"), 0)
    with pytest.raises(UserError, match="ivf_pq_fast needs 16 keys to learn from at least, there are 15: take exact"):
        IndexBuild(tmp_path / "index", store_of(tmp_path / "few", 15, 1), IndexConfig(kind="ivf_pq_fast"), 0)


@pytest.mark.parametrize(
    ("kind", "hidden", "pq_bytes"), [("ivf_pq", 96, 48), ("ivf_pq_fast", 96, 24), ("ivf_pq_fast", 1024, 64)]
)
def test_codes_take_the_bytes_that_the_keys_size_allows(kind: str, hidden: int, pq_bytes: int, tmp_path: Path):
    assert (
        IndexBuild(tmp_path, store_of(tmp_path, 300, 1, hidden=hidden), IndexConfig(kind=kind), 0).pq_bytes == pq_bytes
    )


def test_codes_of_4_bits_for_keys_of_an_odd_size_are_refused(tmp_path: Path):
    with pytest.raises(UserError, match="ivf_pq_fast needs keys of an even size, not of 15: take ivf_pq"):
        IndexBuild(tmp_path, store_of(tmp_path, 300, 1, hidden=15), IndexConfig(kind="ivf_pq_fast"), 0)


def test_a_datastore_without_entries_is_refused(tmp_path: Path):
    store_of(tmp_path / "store", 0, 1)
    with pytest.raises(UserError, match="store: the datastore has no entries"):
        open_datastore(tmp_path / "store", CARD)


@pytest.mark.cluster
def test_parts_built_by_two_tasks_of_ray_are_the_same_bytes_and_a_dead_task_is_done_again(ray_cluster, tmp_path: Path):
    class DiesOnce(IndexBuild):
        """Its process is killed when it is about to add a part, the first time."""

        def add(self, number: int) -> None:
            mark = self.folder.parent / "died"
            if number == 1 and not mark.exists():
                mark.touch()
                os.kill(os.getpid(), signal.SIGKILL)
            IndexBuild.add(self, number)

    store = store_of(tmp_path / "store")
    alone, spread = (IndexBuild(tmp_path / name, store, config("ivf_pq"), 0) for name in ("alone", "spread"))
    build_index(alone)
    spread.prepare()
    dies = DiesOnce(tmp_path / "spread", store, config("ivf_pq"), 0)
    assert sorted(add_parts(dies, dies.missing, config("ivf_pq", actors=2, cpus_per_actor=0.5))) == [0, 1, 2]
    assert (tmp_path / "died").exists()
    spread.finish()
    assert contents(tmp_path / "spread") == contents(tmp_path / "alone")
