"""PEMA as a table: what each stage does, which sections its result depends on, which stages it is made from
(`parents`), and which files prove it done (`evidence`). `experiment/method.py` explains the columns."""

from __future__ import annotations

from pema_ray.experiment.method import Method, Stage
from pema_ray.pema.config import ExperimentConfig

PEMA = Method(
    prefix="pema-ray",
    config=ExperimentConfig,
    example="configs/quickstart.yaml",
    stages={
        "prepare": Stage(
            "Read the task's pairs, check them, and write them to the run folder.",
            "pema_ray.pema.stages.prepare",
            reads=("task",),
            depends_on=("task",),
            evidence=("train.parquet", "dev.parquet", "test.parquet"),
        ),
        "export_head": Stage(
            "Get what the PLM owner shares: final norm, LM head, tokenizer. Check a PLM of your own.",
            "pema_ray.pema.stages.export_head",
            reads=("plm",),
            also_reads=("ray",),
            depends_on=("plm",),
            evidence=("lm_head/bundle.json",),
        ),
        "train_prefix": Stage(
            "Data owner: train a key-value prefix through the PLM, by gradients that its owner computes. Resumes.",
            "pema_ray.pema.stages.train_prefix",
            reads=("prefix",),
            also_reads=("plm", "task"),
            depends_on=("prefix",),
            parents=("prepare", "export_head"),
            evidence=("prefix/prefix.json", "history.json"),
            in_chain=False,
        ),
        "build_memory": Stage(
            "Build the external memory on Ray Data, one pass over the pairs. Resumes.",
            "pema_ray.pema.stages.build_memory",
            reads=("build_memory", "ray", "placement"),
            also_reads=("plm", "task"),
            depends_on=("build_memory",),
            parents=("prepare", "export_head"),
        ),
        "train": Stage(
            "Data owner: train the adapter on the memory with Ray Train (closed form, then joint). Resumes.",
            "pema_ray.pema.stages.train",
            reads=("train", "ray", "placement"),
            also_reads=("plm", "task", "build_memory"),
            depends_on=("train",),
            parents=("build_memory",),
            evidence=("adapter/adapter_config.json", "adapter/adapter_model.safetensors", "history.json"),
        ),
        "generate": Stage(
            "Answer the test split by Gradual Unrolling.",
            "pema_ray.pema.stages.generate",
            reads=("generate", "ray"),
            also_reads=("plm", "task", "placement", "train.max_train_pairs"),
            depends_on=("generate",),
            parents=("train",),
            evidence=("answers.jsonl",),
        ),
        "evaluate": Stage(
            "Compare PEMA with the PLM alone, few-shot prompting and copying: sBLEU, chrF, NLL over λ.",
            "pema_ray.pema.stages.evaluate",
            reads=("evaluate", "ray"),
            also_reads=("plm", "task", "generate", "placement", "train"),
            depends_on=("evaluate",),
            parents=("generate",),
            evidence=("evaluation.json",),
        ),
        "report": Stage(
            "Write the HTML report and print the comparison.",
            "pema_ray.pema.stages.report",
            parents=("evaluate",),
            evidence=("report.html",),
        ),
        "compare": Stage(
            "Compare PEMA with its peers on the same pairs: PLM alone, few-shot, kNN-LM, PEMA's variants, LoRA. "
            "Trains and answers with each system; resumes.",
            "pema_ray.pema.stages.compare",
            reads=("compare", "ray"),
            also_reads=("plm", "task", "build_memory", "placement", "prefix"),
            depends_on=("compare", "train", "generate", "prefix"),
            parents=("build_memory",),
            evidence=("comparison.json", "table.md"),
            in_chain=False,
        ),
    },
)
