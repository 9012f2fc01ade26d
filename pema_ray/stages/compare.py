"""PEMA beside its peers: the PLM alone, few-shot prompts, kNN-LM, PEMA's own variants, and LoRA with the weights.

All of them answer the same pairs, decoded alike; what is trained is trained on the run's training pairs. Every system's
result is kept as it is finished, so a comparison that was stopped goes on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel

from pema_ray.cluster import ray_cluster
from pema_ray.config import CompareConfig, ExperimentConfig, KnnMixConfig, PLMConfig, TrainConfig, validate
from pema_ray.data_owner.decoding.offline import GenerationJob, SystemAnswer
from pema_ray.data_owner.decoding.predictor import Predictor, PredictorSpec
from pema_ray.data_owner.knn import NearestNeighbours
from pema_ray.data_owner.ray_training import fit
from pema_ray.data_owner.training import History
from pema_ray.errors import UserError
from pema_ray.evaluation.comparison import Comparison, Peer, markdown
from pema_ray.evaluation.likelihood import TokenLikelihood
from pema_ray.evaluation.scores import Scorer
from pema_ray.files import atomic_file
from pema_ray.memory import ExternalMemory
from pema_ray.progress import console, track
from pema_ray.stage_run import chosen_settings, claim
from pema_ray.stages.answers import make_job, predictor_of, run_jobs, to_row
from pema_ray.stages.likelihood import likelihood_of
from pema_ray.stages.run import Run
from pema_ray.stages.train import training_job

_SERVICE = "LM head, representations"
_LOCAL_MEMORY_WIDTH = 256
_FEW_SHOT = ("few_shot", "few_shot_similar")
_VARIANTS: dict[str, dict[str, Any]] = {
    "pema": {},
    "pema_kappa_0": {"kappa": 0.0},
    "pema_no_stage_1": {"solver": "none"},
    "pema_adam": {"solver": "adam"},
    "pema_predicted_lambda": {"predict_lambda": True},
    "pema_look_back": {},  # `train.look_back` blocks, or one
    "pema_local_memory": {},  # of width `train.local_memory`, or 256
}
_LABELS = {
    "pema": "PEMA",
    "pema_kappa_0": "PEMA, κ = 0",
    "pema_no_stage_1": "PEMA without stage 1",
    "pema_adam": "PEMA, stage 1 by Adam",
    "pema_predicted_lambda": "PEMA, λ predicted",
    "pema_look_back": "PEMA that looks back",
    "pema_local_memory": "PEMA with a local memory",
}


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `compare/comparison.json` and `compare/table.md`."""
    run = Run(config)
    if "lora" in config.compare.systems and not config.plm.is_own:
        raise UserError(
            f"compare.systems: lora trains the PLM's weights, which {config.plm.label} does not hand out. "
            "Leave it out, or set plm.name."
        )

    def work() -> dict[str, Any]:
        for name in config.compare.systems:  # refused now rather than when the others are done
            if name in _VARIANTS:
                _variant(config.train, name)
        with ray_cluster(config.ray, max(config.train.cpus_per_worker, config.generate.cpus_per_actor), readers=1):
            peers = tuple(_Bench(run, name).peer() for name in config.compare.systems)
        options, pairs = config.generate, run.metrics("prepare")["pairs"]
        beams = f" {options.beams}" if options.decoding == "beam" else ""
        found = Comparison(
            task=run.task.name,
            plm_name=run.bundle.card.name,
            train_pairs=config.train.max_train_pairs or pairs["train"],
            test_pairs=len(run.pairs(options.split)),
            decoding=options.decoding + beams,
            bleu_signature=_signature(run),
            peers=peers,
        )
        with atomic_file(run.path("compare", "comparison.json")) as temporary:
            temporary.write_text(found.model_dump_json(indent=1) + "\n")
        with atomic_file(run.path("compare", "table.md")) as temporary:
            temporary.write_text(markdown(found), encoding="utf-8")
        console.print(markdown(found), markup=False, highlight=False)
        best = max(peers, key=lambda peer: peer.bleu)
        return {
            "bleu": {peer.name: round(peer.bleu, 2) for peer in peers},
            "nll": {peer.name: peer.nll for peer in peers},
            "summary": f"{len(peers)} systems, best sBLEU {best.bleu:.1f} ({best.name})",
        }

    return run.perform("compare", work)


def _variant(config: TrainConfig, name: str) -> TrainConfig:
    """The run's training with one thing changed; refused where the change does not go with the rest."""
    widths = {"pema_look_back": {"look_back": config.look_back or 1}}
    widths |= {"pema_local_memory": {"local_memory": config.local_memory or _LOCAL_MEMORY_WIDTH}}
    changes = widths.get(name, _VARIANTS[name])
    return validate(TrainConfig, {**config.model_dump(), **changes, "stream": False}, f"compare.systems: {name}: train")


class _Bench:
    """Measures one system, once: what it found is kept under a stamp of all that it depends on."""

    def __init__(self, run: Run, name: str) -> None:
        self.run, self.name, self.config = run, name, run.config
        self.folder = run.path("compare", name)
        self.pairs = run.pairs(self.config.generate.split)

    def peer(self) -> Peer:
        """The system's row of the table."""
        stamp, kept = self._stamp(), self.folder / "peer.json"
        if kept.exists():
            found = json.loads(kept.read_text())
            if found["stamp"] == stamp:
                console.print(f"[dim]{self.name:16} measured before[/]")
                return Peer.model_validate(found["peer"])
        self.folder.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[], Peer]] = {
            "copy": self._copy, "plm": self._plm, "few_shot": self._few_shot,
            "few_shot_similar": partial(self._few_shot, "similar"), "knn": self._knn, "lora": self._lora,
        }  # fmt: skip
        peer = makers.get(self.name, self._pema)()
        with atomic_file(kept) as temporary:
            temporary.write_text(json.dumps({"stamp": stamp, "peer": peer.model_dump(mode="json")}, indent=1) + "\n")
        return peer

    def _stamp(self) -> str:
        chosen: CompareConfig = self.config.compare
        of_each = {"knn": chosen.knn, "lora": chosen.lora} | dict.fromkeys(_FEW_SHOT, chosen.few_shot)
        settings = of_each.get(self.name)
        described = chosen_settings(settings) if isinstance(settings, BaseModel) else settings
        whole = [self.name, self.run.stamp("train"), self.run.stamp("generate"), described]
        return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()[:16]

    # ── the systems ─────────────────────────────────────────────────────────

    def _copy(self) -> Peer:
        return self._scored("copy of the source", "nothing", [pair.source for pair in self.pairs])

    def _plm(self) -> Peer:
        job = make_job(self.run, "PLM alone", self.pairs, self.run.prompter(), self.config.generate, None)
        return self._answered(job, "nothing", nll=self._test_likelihood(None).nll(0.0))

    def _few_shot(self, show: Literal["first", "similar"] = "first") -> Peer:
        shots = self.config.compare.few_shot
        name = f"PLM, {shots} {'similar ' if show == 'similar' else ''}examples"
        job = make_job(self.run, name, self.pairs, self.run.prompter(shots, show), self.config.generate, None)
        return self._answered(job, f"{shots} pairs a prompt" if show == "similar" else f"{shots} pairs")

    def _knn(self) -> Peer:
        memory, (temperature, lam) = self.run.path("build_memory", "train"), self._tune_knn()
        chosen = self.config.compare.knn
        asked = chosen.model_dump(include={"neighbours", "index", "probes"})
        knn = KnnMixConfig(temperature=temperature, **asked)
        spec = PredictorSpec(None, memory.resolve(), knn, self.config.train.max_train_pairs)
        options = self.config.generate.model_copy(update={"lambda_max": lam, "schedule": "constant"})
        name = f"kNN-LM, k = {chosen.neighbours}"
        job = make_job(self.run, name, self.pairs, self.run.prompter(), options, spec)
        likelihood = self._test_likelihood(spec)
        note = f"temperature {temperature:g} and λ {lam:g} chosen on the dev memory"
        return self._answered(job, f"{_SERVICE}; the memory to answer with", nll=likelihood.nll(lam), note=note)

    def _pema(self) -> Peer:
        folder = self.folder
        if self.name == "pema" and self.run.finished("train"):  # the run's own
            folder = self.run.path("train")
            history = History.from_dict(json.loads((folder / "history.json").read_text()))
        else:
            history = self._train()
        adapter = folder / "adapter"
        options, spec = self.config.generate, predictor_of(self.run, adapter)
        if self.name == "pema_predicted_lambda":  # the prediction stands in λ's place: a constant would lower it again
            options = options.model_copy(update={"lambda_max": 1.0, "schedule": "constant"})
        asks = f" and k = {options.knn.neighbours} neighbours" if spec.memory else ""
        name = f"{_LABELS[self.name]}{asks}, λ {options.lambda_max:g}"
        job = make_job(self.run, name, self.pairs, self.run.prompter(), options, spec)
        return self._answered(
            job,
            f"{_SERVICE}; the memory to answer with" if spec.memory else _SERVICE,
            nll=self._test_likelihood(spec).nll(options.lambda_max),
            train_seconds=history.reconstruction_seconds + history.seconds,
            peak_bytes=history.peak_bytes,
        )

    def _train(self) -> History:
        c = _variant(self.config.train, self.name)
        job = replace(training_job(self.run, c), run_dir=self.folder.resolve())
        claim(job.run_dir, f"{self.name} {self.run.stamp('train')}")  # else it would be resumed
        with track(f"training {self.name}", c.epochs, "epochs"):
            return fit(job)

    def _lora(self) -> Peer:
        import ray

        config, folder = self.config, self.folder / "model"
        prompter = self.run.prompter()
        most = config.train.max_train_pairs
        train = [prompter.encode_pair(pair) for pair in self.run.pairs("train")[:most]]
        test = [prompter.encode_pair(pair) for pair in self.pairs]
        asked: dict[str, Any] = {"num_cpus": config.train.cpus_per_worker, "num_gpus": config.train.gpus_per_worker}
        task: Any = ray.remote(max_calls=1, **asked)(_train_lora)  # a process of its own: its peak memory is LoRA's
        with track("training lora", config.compare.lora.epochs, "epochs"):
            threads = max(1, int(config.train.cpus_per_worker))
            plm = config.plm.model_copy(update={"threads": config.plm.threads or threads})
            end = prompter.end_token
            found: Any = ray.get(task.remote(plm, config.compare.lora, train, test, str(folder), config.seed, end))
        if found["error"]:
            raise UserError(found["error"])
        name = f"LoRA, r = {config.compare.lora.rank}, all linear layers"
        job = make_job(self.run, name, self.pairs, prompter, config.generate, None)
        tuned = config.plm.model_copy(update={"name": str(folder)})
        return self._answered(
            job,
            "all weights",
            plm=tuned,
            nll=found["nll"],
            train_seconds=found["seconds"],
            peak_bytes=found["peak_bytes"],
        )

    # ── what they share ─────────────────────────────────────────────────────

    def _answered(self, job: GenerationJob, given: str, plm: PLMConfig | None = None, **figures: Any) -> Peer:
        answers = run_jobs(self.config, self.run, [job], job.system, plm)[job.system]
        rows = [to_row(self.run, pair, answer) for pair, answer in zip(self.pairs, answers, strict=True)]
        texts = [row["answer"] for row in rows]
        return self._scored(job.system, given, texts, seconds_per_token=_seconds_per_token(answers), **figures)

    def _scored(self, name: str, given: str, texts: list[str], **figures: Any) -> Peer:
        s = _scorer(self.run).score(texts)
        return Peer(name=name, given=given, bleu=s.bleu, chrf=s.chrf, archaic_share=s.archaic_share, **figures)

    def _test_likelihood(self, spec: PredictorSpec | None) -> TokenLikelihood:
        """The predictor is loaded for this alone: actors load their own."""
        predictor = spec.load(self.run.bundle.card, self.run.bundle.head) if spec else None
        return likelihood_of(self.run, self.config.generate.split, predictor)

    def _neighbours(self, temperature: float) -> NearestNeighbours:
        chosen, card = self.config.compare.knn, self.run.bundle.card
        memory = ExternalMemory.open(self.run.path("build_memory", "train"), card)
        rows, head = memory.view(max_examples=self.config.train.max_train_pairs), self.run.bundle.head
        return NearestNeighbours(rows, head, chosen.neighbours, temperature, chosen.index, chosen.probes)

    def _tune_knn(self) -> tuple[float, float]:
        """The temperature and λ with the lowest NLL on the dev memory."""
        chosen = self.config.compare.knn
        knn = self._neighbours(chosen.temperatures[0])
        found: dict[tuple[float, float], float] = {}
        for temperature in chosen.temperatures:
            knn.temperature = temperature
            predictor = Predictor(self.run.bundle.head, neighbours=knn)
            likelihood = likelihood_of(self.run, "dev", predictor, chosen.dev_rows)
            found |= {(temperature, lam): likelihood.nll(lam) for lam in chosen.lambdas}
        return min(found, key=lambda settings: found[settings])


def _train_lora(plm: PLMConfig, settings, train, test, folder: str, seed: int, end_token: int | None) -> dict[str, Any]:
    """In a process of its own: fine-tune, save the merged model, measure its likelihood of the test targets."""
    import torch

    from pema_ray.baselines.lora import train_lora
    from pema_ray.hardware import peak_memory
    from pema_ray.plm_owner import load_plm
    from pema_ray.plm_owner.export import export_lm_head
    from pema_ray.plm_owner.states import capture_state

    try:
        loaded = load_plm(plm)
        head = export_lm_head(loaded).head.to(loaded.device)
        tuned, training = train_lora(loaded, head, train, settings, seed, end_token)
        peak = peak_memory(loaded.device)
    except UserError as error:
        return {"error": str(error)}
    tuned.model.save_pretrained(folder)
    tuned.tokenizer.save_pretrained(folder)
    losses: list[float] = []
    with torch.inference_mode():
        for example in test:
            ids = torch.tensor([example.prompt + example.target[:-1]], device=tuned.device)
            state = capture_state(tuned, input_ids=ids, use_cache=False)[0, len(example.prompt) - 1 :]
            log_p = head.log_probs(head.norm(state)).cpu()
            losses += (-log_p[range(len(example.target)), example.target]).tolist()
    return {"error": "", "nll": float(np.mean(losses)), "seconds": training.seconds, "peak_bytes": peak}


def _seconds_per_token(answers: list[SystemAnswer]) -> float:
    return sum(answer.seconds for answer in answers) / max(1, sum(len(answer.answer.tokens) for answer in answers))


def _signature(run: Run) -> str:
    """sacreBLEU's own words for how it scored; it has them once it has scored something."""
    scorer = _scorer(run)
    scorer.score([pair.source for pair in run.pairs(run.config.generate.split)])
    return scorer.signatures[0]


def _scorer(run: Run) -> Scorer:
    pairs = run.pairs(run.config.generate.split)
    return Scorer([pair.target for pair in pairs], run.task.sacrebleu_language, run.task.archaic_pattern)
