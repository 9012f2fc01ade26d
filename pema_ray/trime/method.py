"""TRIME's stages; those of translation are in `trime/translation/method.py`."""

from __future__ import annotations

from pema_ray.experiment.method import Method, Stage
from pema_ray.trime.config import TrimeConfig

_WINDOWS = ("evaluate.tokens_per_sample", "evaluate.context_window", "batches.segment")

TRIME = Method(
    prefix="pema-ray trime",
    config=TrimeConfig,
    example="configs/trime/bible_local.yaml",
    stages={
        "prepare": Stage(
            "Read the corpus, make its vocabulary, and keep token ids as Parquet shards.",
            "pema_ray.trime.stages.prepare",
            reads=("prepare", "ray"),
            depends_on=("prepare",),
            evidence=("vocabulary.json", "corpus.json"),
        ),
        "batches": Stage(
            "For batches.order=bm25: find every segment's nearest ones, and order the segments along them.",
            "pema_ray.trime.stages.batches",
            reads=("batches", "ray"),
            depends_on=("batches.segment", "batches.order", "batches.neighbours"),
            parents=("prepare",),
            evidence=("walk.parquet",),
            in_chain=False,
        ),
        "train": Stage(
            "Train the language model with its memory by Ray Train. Resumes.",
            "pema_ray.trime.stages.train",
            reads=("model", "batches", "train", "plan", "ray"),
            depends_on=("model", "batches", "train"),
            parents=("prepare",),
            evidence=("model/config.json", "model/model.safetensors"),
        ),
        "datastore": Stage(
            "Keep the key and the next token of every training position, by model actors on Ray Data. Resumes.",
            "pema_ray.trime.stages.datastore",
            reads=("datastore", "ray"),
            depends_on=("datastore", *_WINDOWS),
            parents=("train",),
            evidence=("manifest.json",),
        ),
        "index": Stage(
            "Index the datastore with faiss, part by part, and measure recall against exact search. Resumes.",
            "pema_ray.trime.stages.index",
            reads=("index", "ray"),
            also_reads=("evaluate.device",),
            depends_on=("index",),
            parents=("datastore",),
            evidence=("index.json",),
        ),
        "evaluate": Stage(
            "Calibrate every way of evaluating the model on dev, and score it on test: one table.",
            "pema_ray.trime.stages.evaluate",
            reads=("evaluate", "ray"),
            also_reads=("train.memory", "index.metric"),
            depends_on=("evaluate", "batches.segment"),
            parents=("train",),
            evidence=("evaluation.json", "table.md"),
        ),
        "report": Stage(
            "One HTML page: the table, loss curves, perplexity against memory size, k and λ, and what raised each "
            "token.",
            "pema_ray.trime.stages.report",
            parents=("evaluate",),
            evidence=("report.html",),
        ),
        "table": Stage(
            "The demonstration: every objective with every seed, at equal steps and equal time, from corpus to one "
            "table. Resumes.",
            "pema_ray.trime.stages.table",
            reads=("table", "ray"),
            in_chain=False,
        ),
    },
)
