"""Orders of segments against cases written by hand: random, keep-order, BM25's walk."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.trime.stages.batches import build_index, load_index, read_walk, search
from pema_ray.trime.text.batches import groups_of_epoch, share_of, walk
from pema_ray.trime.text.segments import PADDING, Segments, TokenStream


def numbers(groups: list[np.ndarray]) -> list[list[int]]:
    return [group.tolist() for group in groups]


def test_keep_order_has_consecutive_segments_in_every_group_and_groups_in_another_order_each_epoch():
    epochs = [numbers(groups_of_epoch(10, 4, "keep", seed=3, epoch=epoch)) for epoch in range(6)]
    for groups in epochs:
        assert sorted(groups) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert len({tuple(map(tuple, groups)) for groups in epochs}) > 1
    assert epochs[2] == numbers(groups_of_epoch(10, 4, "keep", seed=3, epoch=2))


def test_random_order_has_every_segment_once_in_an_epoch():
    first, second = (groups_of_epoch(11, 3, "random", seed=0, epoch=epoch) for epoch in (0, 1))
    assert [len(group) for group in first] == [3, 3, 3, 2]
    assert sorted(np.concatenate(first)) == sorted(np.concatenate(second)) == list(range(11))
    assert numbers(first) != numbers(second)


def test_bm25_groups_are_runs_of_the_walk():
    walk_S = np.array([4, 2, 0, 5, 1, 3])
    groups = numbers(groups_of_epoch(6, 2, "bm25", seed=0, epoch=1, walk_S=walk_S))
    assert sorted(groups) == [[0, 5], [1, 3], [4, 2]]


def test_the_walk_goes_to_the_nearest_unused_neighbour():
    """0 → 3 → 1 → 2 along nearest ones, wherever it begins on the ring; numbers, not the texts of numbers, compared."""
    neighbours = [[0, 3, 1], [2, 0, 3], [2, 0, 1], [3, 1, 0]]
    starts = {}
    for seed in range(20):
        path = walk(neighbours, seed).tolist()
        starts[path[0]] = path
    assert starts == {0: [0, 3, 1, 2], 1: [1, 2, 0, 3], 2: [2, 0, 3, 1], 3: [3, 1, 2, 0]}


def test_the_walk_begins_again_at_random_where_no_neighbour_is_left():
    neighbours = [[1, -1], [0, -1], [3, -1], [2, -1], [-1, -1]]
    paths = {tuple(walk(np.array(neighbours), seed).tolist()) for seed in range(40)}
    assert len(paths) > 5
    for path in paths:
        assert sorted(path) == list(range(5))
        place = {segment: i for i, segment in enumerate(path)}
        assert abs(place[0] - place[1]) == abs(place[2] - place[3]) == 1


@given(st.integers(1, 30), st.integers(0, 5), st.integers(0, 99))
def test_the_walk_is_a_permutation_that_follows_its_seed(segments: int, nearest: int, seed: int):
    neighbours = np.random.default_rng(seed).integers(-1, segments, (segments, nearest))
    path = walk(neighbours, seed)
    assert sorted(path) == list(range(segments))
    np.testing.assert_array_equal(path, walk(neighbours, seed))


@given(st.integers(1, 12), st.integers(1, 5))
def test_workers_share_a_group_in_order_and_as_evenly_as_it_goes(group: int, world: int):
    parts = [share_of(np.arange(group) + 7, rank, world) for rank in range(world)]
    np.testing.assert_array_equal(np.concatenate([part for part, _ in parts]), np.arange(group) + 7)
    assert [first for _, first in parts] == [sum(len(p) for p, _ in parts[:rank]) for rank in range(world)]
    sizes = [len(part) for part, _ in parts]
    assert max(sizes) - min(sizes) <= 1


# ── segments ────────────────────────────────────────────────────────────────


def stream(tokens: list[int], starts: tuple[int, ...] = (0,)) -> TokenStream:
    return TokenStream(np.array(tokens, np.int32), np.array(starts), eos_id=9)


def test_a_segment_predicts_its_tokens_from_those_before_and_the_last_one_is_padded():
    batch = Segments(stream([1, 2, 3, 4, 5, 6, 7], starts=(0, 3)), 4).batch([1, 0], first=5)
    assert batch.label_BL.tolist() == [[5, 6, 7, PADDING], [1, 2, 3, 4]]
    assert batch.input_BL.tolist() == [[4, 5, 6, 9], [9, 1, 2, 3]]
    assert batch.document_BL[:, :3].tolist() == [[1, 1, 1], [0, 0, 0]] and batch.document_BL[1, 3] == 1
    assert batch.segment_BL.tolist() == [[5] * 4, [6] * 4]
    assert (Segments(stream([1]), 3).none().label_BL == PADDING).all()


# ── BM25 ────────────────────────────────────────────────────────────────────


def test_bm25_finds_segments_of_the_same_words_first_and_never_the_segment_itself(tmp_path: Path):
    topics = [[1, 2, 3, 4], [11, 12, 13, 14], [1, 2, 3, 5], [11, 12, 13, 15], [1, 2, 8, 7], [21, 22, 23, 24]]
    segments = Segments(stream([token for topic in topics for token in topic]), 4)
    build_index(segments, tmp_path)
    nearest = search(load_index(tmp_path), segments, range(6), neighbours=3)
    assert nearest[0].tolist() == [2, 4, -1] and nearest[2].tolist() == [0, 4, -1]
    assert nearest[1].tolist() == [3, -1, -1] and nearest[3].tolist() == [1, -1, -1]
    assert nearest[5].tolist() == [-1, -1, -1]
    path = walk(nearest, seed=0).tolist()
    place = {segment: i for i, segment in enumerate(path)}
    assert abs(place[1] - place[3]) == 1


def test_a_corpus_too_small_to_search_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="2 training segments of 4 tokens are too few"):
        build_index(Segments(stream([1, 2, 3, 4, 5]), 4), tmp_path)


def test_a_walk_of_another_length_is_refused_by_name(tmp_path: Path):
    with pytest.raises(UserError, match=r"walk.parquet: cannot be read.*pema-ray trime batches"):
        read_walk(tmp_path, 3)
    pq.write_table(pa.table({"segment": np.array([2, 0, 1])}), tmp_path / "walk.parquet")
    assert read_walk(tmp_path, 3).tolist() == [2, 0, 1]
    with pytest.raises(UserError, match="orders 3 segments, the training split has 4"):
        read_walk(tmp_path, 4)
