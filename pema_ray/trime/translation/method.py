"""The stages of translation with a memory."""

from __future__ import annotations

from pema_ray.experiment.method import Method, Stage
from pema_ray.trime.translation.config import MtConfig

TRANSLATION = Method(
    prefix="pema-ray trime",
    config=MtConfig,
    example="configs/trime/mt_bible_trime.yaml",
    stages={
        "prepare": Stage(
            "Prepare parallel text; part of mt-train.",
            None,
            depends_on=("data",),
            evidence=("train.parquet", "dev.parquet", "test.parquet"),
            command="mt-train",
        ),
        "train": Stage(
            "Prepare parallel text, order it by BM25, and train an encoder-decoder. Resumes.",
            "pema_ray.trime.translation.train",
            reads=("data", "model", "batches", "train", "plan", "ray"),
            depends_on=("model", "batches", "train"),
            parents=("prepare",),
            evidence=("model/trime_mt.json", "history.json"),
            command="mt-train",
        ),
        "datastore": Stage(
            "Keep the decoder key of every training target position, and index them. Resumes.",
            "pema_ray.trime.translation.datastore",
            reads=("datastore", "index", "ray"),
            depends_on=("datastore",),
            parents=("train",),
            evidence=("manifest.json",),
            command="mt-datastore",
        ),
        "index": Stage(
            "Index the datastore; part of mt-datastore.",
            None,
            depends_on=("index",),
            parents=("datastore",),
            evidence=("index.json",),
            command="mt-datastore",
        ),
        "generate": Stage(
            "Translate the test split: plain, by kNN-MT or by TrimeMT; score by sacreBLEU.",
            "pema_ray.trime.translation.generate",
            reads=("generate", "ray"),
            also_reads=("index.metric", "train.memory"),
            depends_on=("generate",),
            parents=("train",),
            command="mt-generate",
        ),
    },
)
