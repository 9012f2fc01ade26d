"""`pema-ray trime prepare`: documents to token ids, on Ray Data. One shard is one task, and finished ones are skipped.

A first pass counts the training split's tokens (or trains a BPE on it), a second encodes every split. On disk, beside
`vocabulary.json` and `corpus.json`: `<split>/shard-00000.parquet` with a row for each document, `document` (int64,
from 0 within the split), `title` (string), `token` (list of int32).
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pema_ray.errors import UserError
from pema_ray.runtime.cluster import data_set, ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.trime.config import PrepareConfig, Split, TrimeConfig
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.text.corpus import Span, find_documents
from pema_ray.trime.text.vocabulary import UNKNOWN, Vocabulary, from_counts, from_tokenizer, split_text, train_bpe

CORPUS = "corpus.json"
_BYTES_PER_TOKEN = {"word": 5, "bpe": 4, "tokenizer": 4, "character": 1, "byte": 1}
_SHOWN = 5  # unknown tokens in an error message


@dataclass(frozen=True)
class Shard:
    """Documents that one task encodes."""

    split: Split
    name: str
    first: int
    """Number of its first document within the split."""
    spans: tuple[Span, ...]


def run(config: TrimeConfig) -> dict[str, Any]:
    """Write `prepare/`: vocabulary, shards of token ids, `corpus.json`."""
    run = TrimeRun(config)
    return run.perform("prepare", lambda: _prepare(run))


def _prepare(run: TrimeRun) -> dict[str, Any]:
    c, folder = run.config.prepare, run.path("prepare")
    documents = find_documents(c, run.config.seed if c.seed is None else c.seed, folder / "text")
    shards = [shard for split, spans in documents.items() for shard in cut_into_shards(split, spans, c)]
    for split in documents:
        (folder / split).mkdir(exist_ok=True)
    training = [shard for shard in shards if shard.split == "train"]
    with ray_cluster(run.config.ray), track("prepare", len(training) + len(shards), "shards") as bar:
        vocabulary = _make_vocabulary(c, training, lambda: bar.advance())
        vocabulary.save(folder)
        receipts = _map(partial(_encode, folder, vocabulary), shards, lambda: bar.advance())
    corpus = {split: _sum([receipt for receipt in receipts if receipt["split"] == split]) for split in documents}
    _refuse_unknown(corpus, c.max_unknown)
    with atomic_file(folder / CORPUS) as temporary:
        temporary.write_text(json.dumps(corpus, indent=2) + "\n")
    counts = {split: {k: v for k, v in part.items() if k != "shards"} for split, part in corpus.items()}
    sizes = ", ".join(f"{split} {part['tokens']:,} tokens of {part['documents']:,}" for split, part in counts.items())
    unknown = corpus["test"]["unknown"] / max(1, corpus["test"]["tokens"])
    return {
        "vocabulary": len(vocabulary),
        "splits": counts,
        "summary": f"{len(vocabulary):,} {c.vocabulary}s; {sizes} documents; {unknown:.1%} of test unknown",
    }


def cut_into_shards(split: Split, spans: Sequence[Span], config: PrepareConfig) -> Iterator[Shard]:
    """Consecutive documents, about `tokens_per_shard` in each shard; a document is never cut."""
    limit = config.tokens_per_shard * _BYTES_PER_TOKEN[config.vocabulary]
    shard: list[Span] = []
    size = number = first = 0
    for position, span in enumerate(spans):
        shard.append(span)
        size += span.end - span.start
        if size >= limit or position == len(spans) - 1:
            yield Shard(split, f"shard-{number:05d}.parquet", first, tuple(shard))
            number, first, size, shard = number + 1, position + 1, 0, []


def _make_vocabulary(config: PrepareConfig, shards: Sequence[Shard], tick: Callable[[], None]) -> Vocabulary:
    if config.vocabulary_from is not None:
        vocabulary = Vocabulary.load(Path(config.vocabulary_from) / "prepare")
    elif config.vocabulary == "tokenizer":
        vocabulary = from_tokenizer(config)
    elif config.vocabulary == "bpe":
        vocabulary = train_bpe(config, (span.text() for shard in shards for span in shard.spans))
    else:
        counts: Counter[str] = Counter()
        for part in _map(partial(_count, config), shards, tick):
            counts.update(dict(zip(part["tokens"], part["counts"], strict=True)))
        return from_counts(config, counts)
    for _ in shards:
        tick()
    return vocabulary


def _map(work: Callable[[Shard], dict[str, Any]], shards: Sequence[Shard], tick: Callable[[], None]) -> list[Any]:
    """`work` of every shard by Ray Data, in the shards' order."""
    import ray

    plan = ray.put(list(shards))

    def run_shard(row: dict[str, Any]) -> dict[str, Any]:
        result, error = {}, ""
        try:
            result = work(ray.get(plan)[row["number"]])
        except UserError as refused:  # returned as data: Ray would bury its one line in a traceback
            error = str(refused)
        return {"number": row["number"], "result": json.dumps(result), "error": error}

    numbers = data_set([{"number": n} for n in range(len(shards))], len(shards))
    done: dict[int, Any] = {}
    for row in numbers.map(run_shard, num_cpus=1).iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        done[row["number"]] = json.loads(row["result"])
        tick()
    return [done[number] for number in range(len(shards))]


def _count(config: PrepareConfig, shard: Shard) -> dict[str, Any]:
    counts: Counter[str] = Counter()
    for span in shard.spans:
        counts.update(split_text(span.text(), config))
    return {"tokens": list(counts), "counts": list(counts.values())}


def _encode(folder: Path, vocabulary: Vocabulary, shard: Shard) -> dict[str, Any]:
    """Write a shard of token ids and its receipt, unless they are there; returns the receipt."""
    path = folder / shard.split / shard.name
    receipt_path = path.with_suffix(".receipt.json")
    if receipt_path.exists() and path.exists():
        receipt = json.loads(receipt_path.read_text())
        if receipt["bytes"] == path.stat().st_size:
            return receipt
    tokens = [vocabulary.encode(span.text()) for span in shard.spans]
    numbers = range(shard.first, shard.first + len(tokens))
    table = pa.table(
        {
            "document": pa.array(numbers, pa.int64()),
            "title": [span.title for span in shard.spans],
            "token": pa.array(tokens, pa.list_(pa.int32())),
        }
    )
    with atomic_file(path) as temporary:
        pq.write_table(table, temporary, compression="none", use_dictionary=False, write_statistics=False)
    receipt = {"split": shard.split, "name": shard.name, "documents": len(tokens), "bytes": path.stat().st_size}
    receipt |= {"tokens": sum(map(len, tokens)), **_unknown(vocabulary, shard, tokens)}
    with atomic_file(receipt_path) as temporary:
        temporary.write_text(json.dumps(receipt) + "\n")
    return receipt


def _unknown(vocabulary: Vocabulary, shard: Shard, tokens: list[Any]) -> dict[str, Any]:
    """How many tokens the vocabulary lacks (an `<unk>` of the corpus itself is known), and the first few."""
    unknown = vocabulary.unknown_id
    if unknown is None or not any((ids == unknown).any() for ids in tokens):
        return {"unknown": 0, "examples": []}
    in_vocabulary = set(vocabulary.tokens)
    missing = Counter(t for s in shard.spans for t in split_text(s.text(), vocabulary.config) if t not in in_vocabulary)
    return {"unknown": missing.total(), "examples": [token for token, _ in missing.most_common(_SHOWN)]}


def _sum(receipts: list[dict[str, Any]]) -> dict[str, Any]:
    """A split's entry of `corpus.json`."""
    shards = [{k: receipt[k] for k in ("name", "documents", "tokens", "bytes")} for receipt in receipts]
    examples = [token for receipt in receipts for token in receipt["examples"]][:_SHOWN]
    total = {key: sum(receipt[key] for receipt in receipts) for key in ("documents", "tokens", "unknown")}
    return {**total, "examples": examples, "shards": shards}


def _refuse_unknown(corpus: Mapping[str, dict[str, Any]], limit: float) -> None:
    for name in ("dev", "test"):
        part = corpus[name]
        share = part["unknown"] / max(1, part["tokens"])
        if share > limit:
            raise UserError(
                f"{share:.1%} of the {name} split's {part['tokens']:,} tokens are not in the training vocabulary and "
                f"would be {UNKNOWN} (such as {', '.join(map(repr, part['examples']))}); prepare.max_unknown allows "
                f"{limit:.1%}. Take a vocabulary of bpe, a smaller min_count, or more training text."
            )
