"""`pema-ray trime batches`, for `batches.order: bm25`: each segment's nearest ones by BM25, and the walk through them.

The index is made once, in the driver, from the training split's token ids; actors search it for runs of segments.
S segments, K neighbours.
"""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.runtime.cluster import data_set, ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.text.batches import walk
from pema_ray.trime.text.segments import Segments, TokenStream

WALK = "walk.parquet"
_QUERIES = 256  # segments of one search task


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `batches/walk.parquet`: the training segments in BM25's order."""
    run = TrimeRun(config)
    if config.batches.order != "bm25":
        raise UserError(f"batches.order={config.batches.order} needs no search: only bm25 has something to prepare.")
    return run.perform("batches", lambda: _walk(run))


def _walk(run: TrimeRun) -> dict[str, Any]:
    c = run.config.batches
    segments = Segments(TokenStream.open(run.path("prepare"), "train"), c.segment)
    index_folder = run.path("batches", "index")
    build_index(segments, index_folder)
    with ray_cluster(run.config.ray, c.cpus_per_actor), track("bm25", -(-len(segments) // _QUERIES), "tasks") as bar:
        neighbours_SK = _search_all(run, segments, index_folder, bar.advance)
    path_S = walk(neighbours_SK, run.config.seed)
    followed = float(np.mean([b in neighbours_SK[a] for a, b in pairwise(path_S)]))
    with atomic_file(run.path("batches", WALK)) as temporary:
        pq.write_table(pa.table({"segment": path_S}), temporary)
    return {
        "segments": len(segments),
        "followed": followed,
        "summary": f"{len(segments):,} segments; {followed:.0%} of the walk's steps go to a neighbour",
    }


def build_index(segments: Segments, folder: Path) -> None:
    """A BM25 index of all segments on disk.

    Raises:
        UserError: there are too few segments to be each other's neighbours.
    """
    import bm25s

    if len(segments) < 3:
        raise UserError(
            f"batches.order=bm25: {len(segments)} training segments of {segments.length} tokens are too few to search "
            "for similar ones. Take a smaller batches.segment, or more text."
        )
    retriever = bm25s.BM25(backend="numpy")
    retriever.index(_words(segments, range(len(segments))), show_progress=False)
    retriever.save(str(folder))


def load_index(folder: Path) -> Any:
    import bm25s

    return bm25s.BM25.load(str(folder), mmap=True)


def search(retriever: Any, segments: Segments, numbers: range, neighbours: int) -> np.ndarray:
    """The nearest segments of some, `[len(numbers), K]`, the nearest first, without the segment itself; -1: no more."""
    k = min(neighbours + 1, len(segments))
    nearest_NK, score_NK = retriever.retrieve(
        _words(segments, numbers), k=k, show_progress=False, sorted=True, n_threads=1
    )
    rows = np.full((len(numbers), neighbours), -1, np.int64)
    for row, (number, nearest_K, score_K) in enumerate(zip(numbers, nearest_NK, score_NK)):
        matches = nearest_K[(nearest_K != number) & (score_K > 0)][:neighbours]
        rows[row, : len(matches)] = matches
    return rows


def _words(segments: Segments, numbers: range) -> list[list[str]]:
    """Token ids stand for words."""
    return [[str(token) for token in segments.tokens(number)] for number in numbers]


class _Searcher:
    def __init__(self, prepared: Path, length: int, folder: Path, neighbours: int) -> None:
        self.segments = Segments(TokenStream.open(prepared, "train"), length)
        self.retriever, self.neighbours = load_index(folder), neighbours

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        parts = []
        for first in batch["first"]:
            numbers = range(int(first), min(int(first) + _QUERIES, len(self.segments)))
            parts.append(search(self.retriever, self.segments, numbers, self.neighbours).ravel())
        return {"first": batch["first"], "nearest": np.array(parts + [None], dtype=object)[:-1]}


def _search_all(run: TrimeRun, segments: Segments, folder: Path, tick: Any) -> np.ndarray:
    import ray.data

    c = run.config.batches
    firsts = [{"first": first} for first in range(0, len(segments), _QUERIES)]
    nearest_SK = np.full((len(segments), c.neighbours), -1, np.int64)
    rows = data_set(firsts, len(firsts)).map_batches(
        _Searcher,
        fn_constructor_args=(run.path("prepare"), c.segment, folder, c.neighbours),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(c.actors, len(firsts))),
        num_cpus=c.cpus_per_actor,
    )
    for row in rows.iter_rows():
        part = np.asarray(row["nearest"], np.int64).reshape(-1, c.neighbours)
        nearest_SK[row["first"] : row["first"] + len(part)] = part
        tick()
    return nearest_SK


def read_walk(folder: Path, segments: int) -> np.ndarray:
    """The order of the segments that `pema-ray trime batches` wrote.

    Raises:
        UserError: it is not there, or of another number of segments.
    """
    path = folder / WALK
    try:
        walk_S = pq.read_table(path).column("segment").to_numpy()
    except (OSError, pa.ArrowException, KeyError) as error:
        raise UserError(f"{path}: cannot be read: {str(error).splitlines()[0]} Run: pema-ray trime batches") from None
    if len(walk_S) != segments or len(np.unique(walk_S)) != segments:
        raise UserError(
            f"{path}: orders {len(np.unique(walk_S)):,} segments, the training split has {segments:,}. "
            "Run: pema-ray trime batches"
        )
    return walk_S
