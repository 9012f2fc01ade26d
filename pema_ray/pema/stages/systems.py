"""The systems that `compare` measures: how each is made, tuned on the dev pairs, and asked.

All answer the same pairs, decoded alike; what is trained is trained on the run's training pairs. A measurement is kept
as soon as it is finished, so a comparison that was stopped continues.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.config import GenerateConfig, KnnMixConfig
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer
from pema_ray.data_owner.decoding.predictor import Predictor, PredictorSource, PredictorSpec
from pema_ray.data_owner.training.ray_training import fit
from pema_ray.data_owner.training.trainer import AdapterHistory
from pema_ray.errors import UserError
from pema_ray.evaluation.comparison import Measurement
from pema_ray.evaluation.likelihood import TokenLikelihood
from pema_ray.evaluation.scores import Scorer
from pema_ray.experiment.stage_run import chosen_settings, claim
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.prefix import Prefix
from pema_ray.memory import ExternalMemory
from pema_ray.pema.baselines.small_lm import SmallLMJob, SmallLMSpec, train_peer
from pema_ray.pema.baselines.variants import LORA, PREFIXES, SMALL_LMS, VARIANTS, count, describe_adapter, training_of
from pema_ray.pema.config import CompareConfig
from pema_ray.pema.method import PEMA
from pema_ray.pema.run import COMPARE_PROTOCOL, Run
from pema_ray.pema.stages.answers import make_job, predictor_of, run_jobs, write_rows
from pema_ray.pema.stages.likelihood import likelihood_of
from pema_ray.pema.stages.train import training_job
from pema_ray.pema.stages.train_prefix import train as train_prefix
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.placement import ray_options
from pema_ray.runtime.progress import console, track
from pema_ray.runtime.settings import Split
from pema_ray.tasks import EncodedPair
from pema_ray.tasks.postprocess import tidy
from pema_ray.training.history import TrainerHistory

_SERVICE = "LM head, representations"


class ComparedSystem:
    """Measures one system with one seed, once: the measurement is kept under a stamp of all that it depends on."""

    def __init__(self, run: Run, name: str, seed: int) -> None:
        self.run, self.name, self.seed = run, name, seed
        self.config = run.config
        self.folder = run.path("compare", name, f"seed-{seed}")
        self.answers = self.folder / "answers.jsonl"
        self.pairs = run.pairs(self.config.generate.split)

    @property
    def is_trained(self) -> bool:
        """Whether another seed gives another system."""
        return self.name in {**VARIANTS, **LORA, **PREFIXES, **SMALL_LMS}

    @property
    def given(self) -> str:
        """What must be given to it, beside prompts."""
        shots = self.config.compare.few_shot
        if self.name in LORA:
            return "all weights"
        if self.name in PREFIXES:
            return f"{_SERVICE}, gradients"
        if self.name in VARIANTS:
            return f"{_SERVICE}; the memory to answer with" if self.config.generate.knn.weight > 0 else _SERVICE
        return {
            "copy": "nothing",
            "plm": "nothing",
            "few_shot": count(shots, "pair"),
            "few_shot_similar": f"{count(shots, 'pair')} a prompt",
            **dict.fromkeys(SMALL_LMS, _SERVICE),
            "knn": f"{_SERVICE}; the memory to answer with",
        }[self.name]

    @property
    def label(self) -> str:
        """The system, as the table names it."""
        c = self.config.compare
        if self.name in VARIANTS:
            variant = VARIANTS[self.name]
            training = training_of(self.config.train, self.name, self.run.bundle.card.hidden_size)
            knn = self.config.generate.knn
            asks = f", k = {knn.neighbours} neighbours" if knn.weight > 0 else ""
            return f"{variant.label} ({describe_adapter(training)}{asks})"
        if self.name in PREFIXES:
            inner = "PLM" if self.name == "prefix" else ComparedSystem(self.run, PREFIXES[self.name], self.seed).label
            start = "random text" if self.config.prefix.start == "random" else count(c.few_shot, "example")
            instruction = "an instruction and " if self.config.prefix.text else ""
            return f"{inner} behind a prefix trained from {instruction}{start}"
        layers = count(c.small_lm.layers, "layer")
        shots = f" on prompts with {count(c.few_shot, 'example')}" if LORA.get(self.name) else ""
        return {
            "copy": "copy of the source",
            "plm": "PLM alone",
            "few_shot": f"PLM, {count(c.few_shot, 'example')}",
            "few_shot_similar": f"PLM, {count(c.few_shot, 'similar example')}",
            "knn": f"kNN-LM, k = {c.knn.neighbours}",
            **{name: f"{label}, {layers}, not pretrained" for name, label in SMALL_LMS.items()},
        }.get(self.name, f"LoRA, r = {c.lora.rank}, all linear layers{shots}")

    def measurement(self) -> Measurement:
        """Trained, tuned, asked and scored; or what was measured before."""
        stamp, kept = self._stamp(), self.folder / "measurement.json"
        if kept.exists() and self.answers.exists():
            before = json.loads(kept.read_text())
            if before["stamp"] == stamp:
                console.print(f"[dim]{self.name:16} seed {self.seed}: measured before[/]")
                return Measurement.model_validate(before["measurement"])
        self.folder.mkdir(parents=True, exist_ok=True)
        kept.unlink(missing_ok=True)  # answers are replaced before it is written again
        makers: dict[str, Callable[[], Measurement]] = {
            "copy": self._copy, "plm": self._plm, "few_shot": self._few_shot, "few_shot_similar": self._few_shot,
            "knn": self._knn, "lora": self._lora, "lora_shots": self._lora, "memory_decoder": self._small_lm,
            "proxy_tuning": self._small_lm, **dict.fromkeys(PREFIXES, self._behind_prefix),
        }  # fmt: skip
        measured = makers.get(self.name, self._pema)()
        with atomic_file(kept) as temporary:
            kept_with = {"stamp": stamp, "measurement": measured.model_dump(mode="json")}
            temporary.write_text(json.dumps(kept_with, indent=1) + "\n")
        return measured

    def _stamp(self) -> str:
        settings: CompareConfig = self.config.compare
        shots = self.name in ("few_shot", "few_shot_similar", "pema_shots", "lora_shots", *PREFIXES)
        grids: dict[str, Any] = {}
        if self.name in {**VARIANTS, "knn": None, "pema_prefix": None}:
            grids |= {"dev_rows": settings.dev_rows}
        if self.name in {**VARIANTS, "memory_decoder": None, "pema_prefix": None}:
            grids |= {"lambdas": settings.lambdas}
        if self.name == "memory_decoder":
            grids |= {"knn.lambdas": settings.knn.lambdas}
        if self.name in ("few_shot", "few_shot_similar"):
            grids |= {"nll": "of prompts with examples"}  # older measurements have none
        sections: list[BaseModel] = []
        sections += [settings.knn] if self.name == "knn" else []
        sections += [settings.lora] if self.name in LORA else []
        sections += [settings.small_lm] if self.name in SMALL_LMS else []
        sections += [self.config.prefix] if self.name in PREFIXES else []
        described = [chosen_settings(section) for section in sections]
        stages = [self.run.stamp("train"), self.run.stamp("generate")]
        few_shot = settings.few_shot if shots else None
        whole = [COMPARE_PROTOCOL, self.name, self.seed, *stages, few_shot, grids, described]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    # ── the systems ─────────────────────────────────────────────────────────

    def _copy(self) -> Measurement:
        rows = [{"example_id": pair.example_id, "answer": pair.source} for pair in self.pairs]
        return self._scored(rows)

    def _plm(self) -> Measurement:
        return self._answered(self.config.generate, None, nll=self._likelihood(None, self._split).nll(0.0))

    def _few_shot(self) -> Measurement:
        run = self._run_with_examples("similar" if self.name == "few_shot_similar" else "first", (self._split,))
        return self._answered(self.config.generate, None, nll=likelihood_of(run, self._split, None).nll(0.0))

    def _knn(self) -> Measurement:
        memory, (temperature, lam) = self.run.path("build_memory", "train"), self._tune_knn()
        options = self.config.compare.knn.model_dump(include={"neighbours", "index", "probes"})
        knn = KnnMixConfig(temperature=temperature, **options)
        spec = PredictorSpec(None, memory.resolve(), knn, self.config.train.max_train_pairs)
        generate = self.config.generate.model_copy(update={"lambda_max": lam, "schedule": "constant"})
        nll = self._likelihood(spec, self._split).nll(lam)
        note = f"temperature {temperature:g} and λ {lam:g}, chosen on the dev memory"
        return self._answered(generate, spec, nll=nll, note=note, line_bytes=self._memory_bytes())

    def _pema(self) -> Measurement:
        if VARIANTS[self.name].shots:
            return self._on_prompts_with_examples()
        folder = self.folder
        if self.name == "pema" and self.seed == self.config.seed and self.run.finished("train"):  # the run's own
            folder = self.run.path("train")
            history = AdapterHistory.from_dict(json.loads((folder / "history.json").read_text()))
        else:
            history = self._train()
        spec, options = predictor_of(self.run, folder / "adapter"), self.config.generate
        note = ""
        if self.name == "pema_predicted_lambda":  # the prediction stands in λ's place: a constant would lower it again
            options = options.model_copy(update={"lambda_max": 1.0, "schedule": "constant"})
        elif options.schedule == "constant" and self.config.compare.lambdas:
            lam = self._tune_lambda(spec)
            options = options.model_copy(update={"lambda_max": lam})
            note = f"λ {lam:g} and the best of {history.total_steps:,} steps ({history.best_step:,}), chosen on dev"
        return self._answered(
            options,
            spec,
            nll=self._likelihood(spec, self._split).nll(options.lambda_max),
            train_seconds=history.reconstruction_seconds + history.seconds,
            peak_bytes=history.peak_bytes,
            line_bytes=self._memory_bytes(),
            note=note,
        )

    def _on_prompts_with_examples(self) -> Measurement:
        """The first system of a run whose prompts show examples: PEMA."""
        return self._inner("pema", self._run_with_examples("first", self.config.build_memory.splits))

    def _inner(self, name: str, run: Run) -> Measurement:
        """What a system of another run gives, which answers the same pairs; its answers are copied."""
        inner = ComparedSystem(run, name, self.seed)
        measured = inner.measurement()
        with atomic_file(self.answers) as temporary:
            temporary.write_bytes(inner.answers.read_bytes())
        return measured

    def _behind_prefix(self) -> Measurement:
        """The PLM alone, or PEMA, behind a prefix that is trained on the run's training pairs."""
        shown = self._run_with_examples("first", ())
        folder = ComparedSystem(self.run, "prefix", self.seed).folder / "prefix"  # of all systems behind it
        stamp = f"{shown.stamp('train_prefix')} {self.seed}"
        if (folder / "trained.json").exists() and json.loads((folder / "trained.json").read_text()) == stamp:
            history = TrainerHistory.from_dict(json.loads((folder / "history.json").read_text()))
        else:
            history = train_prefix(shown, folder, self.seed, lambda: claim(folder, stamp))
            with atomic_file(folder / "trained.json") as temporary:
                temporary.write_text(json.dumps(stamp))
        inner = PREFIXES[self.name]
        splits = self.config.build_memory.splits if inner == "pema" else (self._split,)
        trained = str((folder / "prefix").resolve())
        measured = self._inner(inner, self._run_with_examples("first", splits, prefix=trained))
        note = f"the best of {len(history.train):,} steps of the prefix ({history.best_step:,}), chosen on dev"
        return measured.model_copy(
            update={
                "train_seconds": history.seconds + (measured.train_seconds or 0.0),
                "peak_bytes": max(history.peak_bytes, measured.peak_bytes or 0),
                "line_bytes": (measured.line_bytes or 0) + self._prefix_bytes(shown, Path(trained), len(history.train)),
                "note": f"{note}; {measured.note}" if measured.note else note,
            }
        )

    def _prefix_bytes(self, run: Run, folder: Path, steps: int) -> int:
        """What training a prefix brings: representations of all targets, and gradients of the prefix."""
        prompter = run.prompter()
        rows = sum(len(prompter.encode_pair(pair).target) + 1 for pair in run.pairs("train"))
        numbers = Prefix.from_pretrained(folder).embeddings.numel()
        gradients = steps * self.config.prefix.requests * numbers * run.bundle.head.dtype.itemsize
        return rows * self.config.prefix.epochs * self._row_bytes + gradients

    def _run_with_examples(
        self, show: Literal["first", "similar"], splits: tuple[Split, ...], prefix: str | None = None
    ) -> Run:
        """A run of its own below this system's folder, with memories of prompts that show `compare.few_shot` examples.

        Args:
            splits: whose memories it builds.
            prefix: stands in place of the examples.
        """
        config, limits, limit = self.config, dict(self.config.task.limits), self.config.train.max_train_pairs
        if limit is not None:  # the first so many, as a smaller limit draws them
            limits["train"] = min(limit, limits.get("train", limit))
        shown = {"shots": config.compare.few_shot, "show": show, "limits": limits}
        folder = self.run.path("compare", self.name, "run")
        if prefix is not None:  # another prefix is another PLM, with memories of its own
            folder = self.folder / f"run-{Prefix.from_pretrained(prefix).handle[:12]}"
        inner = config.model_copy(
            update={
                "run_dir": str(folder),
                "plm": config.plm.model_copy(update={"prefix": prefix}),
                "task": config.task.model_copy(update=shown),
                "build_memory": config.build_memory.model_copy(update={"splits": splits}),
                "compare": config.compare.model_copy(update={"systems": ("pema",)}),
            }
        )
        for stage in ("prepare", "export_head", "build_memory") if splits else ("prepare", "export_head"):
            PEMA.run(stage, inner)
        return Run(inner)

    def _train(self) -> AdapterHistory:
        c = training_of(self.config.train, self.name, self.run.bundle.card.hidden_size)
        job = replace(training_job(self.run, c), run_dir=self.folder.resolve(), seed=self.seed)
        claim(job.run_dir, f"{self.name} {self.seed} {self.run.stamp('train')}")  # else it would be resumed
        with track(f"training {self.name}", c.epochs, "epochs"):
            return fit(job)

    def _small_lm(self) -> Measurement:
        config, settings = self.config, self.config.compare
        folder = self.folder / "model"
        job = SmallLMJob(
            kind="memory_decoder" if self.name == "memory_decoder" else "proxy_tuning",
            pairs={split: self._encoded(split, limit=None) for split in ("train", "dev", self._split)},
            memory=self.run.path("build_memory").resolve(),
            bundle=self.run.path("export_head", "lm_head").resolve(),
            test=self._split,
            folder=folder.resolve(),
            settings=settings.small_lm,
            lambdas=tuple(sorted({*settings.lambdas, *settings.knn.lambdas} - {1.0})),
            max_examples=config.train.max_train_pairs,
            seed=self.seed,
            threads=max(1, int(config.train.cpus_per_worker)),
            device=config.plm.device,
        )
        outcome = self._in_a_process(train_peer, job)
        proxy = self.name == "proxy_tuning"
        lam = 1.0 if proxy else outcome["chosen"]
        symbol = "α" if proxy else "λ"
        note = f"{symbol} {outcome['chosen']:g}, learning rate and epoch ({outcome['trained']}), chosen on dev"
        note += "; decoded one sequence at a time"
        return self._answered(
            config.generate.model_copy(update={"lambda_max": lam, "schedule": "constant"}),
            SmallLMSpec(folder.resolve(), outcome["chosen"] if proxy else None),
            nll=outcome["nll"],
            train_seconds=outcome["seconds"],
            peak_bytes=outcome["peak_bytes"],
            line_bytes=self._memory_bytes(),
            note=note,
        )

    def _in_a_process(self, work: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
        """Done by a Ray task in a process of its own, so that its peak memory is this system's.

        Raises:
            UserError: what it was refused.
        """
        import ray
        from ray.exceptions import OutOfMemoryError, WorkerCrashedError

        train = self.config.train
        resources = {"num_cpus": train.cpus_per_worker, "num_gpus": train.gpus_per_worker}
        placed = ray_options(self.config.placement)
        task: Any = ray.remote(max_calls=1, max_retries=0, **resources, **placed)(work)
        try:
            with track(f"training {self.name}", 1, "systems"):
                outcome: dict[str, Any] = ray.get(task.remote(*arguments))
        except (WorkerCrashedError, OutOfMemoryError) as error:
            raise UserError(f"{self.name}: its process died, for want of memory perhaps: {error}") from None
        if outcome["error"]:
            raise UserError(outcome["error"])
        return outcome

    def _encoded(self, split: str, limit: int | None) -> list[EncodedPair]:
        return [self._prompter.encode_pair(pair) for pair in self.run.pairs(split)[:limit]]

    def _lora(self) -> Measurement:
        from pema_ray.pema.baselines.lora import LoraJob, tune_lora  # needs the PLM owner's package

        config, folder = self.config, self.folder / "model"
        job = LoraJob(
            plm=config.plm.model_copy(
                update={"threads": config.plm.threads or max(1, int(config.train.cpus_per_worker))}
            ),
            train=self._encoded("train", config.train.max_train_pairs),
            dev=self._encoded("dev", None),
            test=self._encoded(self._split, None),
            settings=config.compare.lora,
            folder=folder.resolve(),
            seed=self.seed,
            end_token=self._prompter.end_token,
        )
        outcome = self._in_a_process(tune_lora, job)
        return self._answered(
            config.generate,
            None,
            plm=config.plm.model_copy(update={"name": str(folder), "revision": None}),
            nll=outcome["nll"],
            train_seconds=outcome["seconds"],
            peak_bytes=outcome["peak_bytes"],
            note=f"learning rate {outcome['learning_rate']:g} and epoch {outcome['epoch']} of "
            f"{config.compare.lora.epochs}, chosen on the dev pairs",
        )

    # ── what they share ─────────────────────────────────────────────────────

    @property
    def _split(self) -> Split:
        return self.config.generate.split

    @cached_property
    def _prompter(self):
        shots, limit = self.config.compare.few_shot, self.config.train.max_train_pairs
        if self.name in ("few_shot", "lora_shots"):
            return self.run.prompter(shots, "first", limit)
        return self.run.prompter(shots, "similar", limit) if self.name == "few_shot_similar" else self.run.prompter()

    def _answered(
        self,
        options: GenerateConfig,
        spec: PredictorSource | None,
        plm: PLMConfig | None = None,
        line_bytes: int = 0,
        **figures: Any,
    ) -> Measurement:
        job: GenerationJob = make_job(self.run, self.label, self.pairs, self._prompter, options, spec, explain=False)
        seeded = [replace(r, sampling=replace(r.sampling, seed=self.seed)) for r in job.requests]
        job = replace(job, requests=seeded)
        answers = run_jobs(self.config, self.run, [job], self.label, plm)[self.label]
        rules = self.run.task.postprocess
        rows = [
            {"example_id": pair.example_id, "answer": tidy(answer.answer.text, pair.source, rules)[0]}
            for pair, answer in zip(self.pairs, answers, strict=True)
        ]
        received = 0 if plm is not None else line_bytes + self._answer_bytes(answers)
        return self._scored(rows, seconds_per_token=_seconds_per_token(answers), line_bytes=received, **figures)

    def _scored(self, rows: list[dict[str, Any]], **figures: Any) -> Measurement:
        s = scorer_of(self.run).score([row["answer"] for row in rows])
        write_rows(self.answers, rows)
        return Measurement(seed=self.seed, bleu=s.bleu, chrf=s.chrf, archaic_share=s.archaic_share, **figures)

    @property
    def _row_bytes(self) -> int:
        """One representation on the line."""
        head = self.run.bundle.head
        return self.run.bundle.card.hidden_size * head.weight.element_size()

    def _memory_bytes(self) -> int:
        """Representations of the memories that training and tuning read, rows of prompts included."""
        rows = 0
        for split, limit in (("train", self.config.train.max_train_pairs), ("dev", None)):
            memory = ExternalMemory.open(self.run.path("build_memory", split))
            has_prompts = memory.manifest.prompt_from is not None
            if limit is None:
                rows += sum(shard.rows + shard.prompt_rows for shard in memory.manifest.shards)
            else:
                rows += len(memory.view(max_examples=limit, prompts=has_prompts, verify=False))
        return rows * self._row_bytes

    def _answer_bytes(self, answers: Sequence[SystemAnswer]) -> int:
        return round(sum(answer.received_rows for answer in answers)) * self._row_bytes

    def _likelihood(self, spec: PredictorSpec | None, split: str, limit: int | None = None) -> TokenLikelihood:
        """The predictor is loaded for this alone: actors load their own."""
        predictor = spec.load(self.run.bundle.card, self.run.bundle.head) if spec else None
        return likelihood_of(self.run, split, predictor, limit)

    def _tune_lambda(self, spec: PredictorSpec) -> float:
        """The λ with the lowest NLL on the dev memory."""
        settings = self.config.compare
        likelihood = self._likelihood(spec, "dev", settings.dev_rows)
        return min(settings.lambdas, key=likelihood.nll)

    def _tune_knn(self) -> tuple[float, float]:
        """The temperature and λ with the lowest NLL on the dev memory."""
        settings, card = self.config.compare, self.run.bundle.card
        memory = ExternalMemory.open(self.run.path("build_memory", "train"), card)
        rows, head = memory.view(max_examples=self.config.train.max_train_pairs), self.run.bundle.head
        knn = settings.knn
        neighbours = NearestNeighbours(rows, head, knn.neighbours, knn.temperatures[0], knn.index, knn.probes)
        nll: dict[tuple[float, float], float] = {}
        for temperature in knn.temperatures:
            neighbours.temperature = temperature
            predictor = Predictor(head, neighbours=neighbours)
            likelihood = likelihood_of(self.run, "dev", predictor, settings.dev_rows)
            nll |= {(temperature, lam): likelihood.nll(lam) for lam in knn.lambdas}
        return min(nll, key=lambda pair: nll[pair])


def scorer_of(run: Run) -> Scorer:
    """Scores answers to the pairs that are generated for."""
    pairs = run.pairs(run.config.generate.split)
    return Scorer([pair.target for pair in pairs], run.task.sacrebleu_language, run.task.archaic_pattern)


def _seconds_per_token(answers: Sequence[SystemAnswer]) -> float:
    return sum(answer.seconds for answer in answers) / max(1, sum(len(answer.answer.tokens) for answer in answers))
