"""`pema-ray train-prefix`: a key-value prefix in place of the examples that all prompts show, by the gradient line."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pema_ray.data_owner.prefixed import TrainedPrefix
from pema_ray.data_owner.training.config import PrefixConfig
from pema_ray.data_owner.training.prefix import PrefixTrainer
from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, ExtractBatch
from pema_ray.line.prefix import Prefix
from pema_ray.line.retry import PatientPLM
from pema_ray.memory.plan import plan_batches
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.plm import connect
from pema_ray.pema.run import Run
from pema_ray.runtime.hardware import set_threads
from pema_ray.runtime.progress import console, track
from pema_ray.tasks import EncodedPair
from pema_ray.training.history import TrainerHistory
from pema_ray.training.ray_loop import showing_loss

_PATIENCE_SECONDS = 600.0  # while no request of a PLM owner succeeds


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `train_prefix/prefix/`, which `plm.prefix` names, and `train_prefix/history.json`."""
    run = Run(config)
    if config.plm.prefix is not None:
        raise UserError(
            "train-prefix trains for the PLM alone: leave plm.prefix out, and set it in the experiment that follows."
        )

    def work() -> dict[str, Any]:
        history = train(run, run.path("train_prefix"), config.seed, lambda: run.claim("train_prefix"))
        first, best = history.validation[0], min(history.validation, key=lambda point: point["loss"])
        return {
            "dev_loss": best["loss"],
            "dev_loss_at_start": first["loss"],
            "best_step": history.best_step,
            "seconds_of_training": round(history.seconds, 1),
            "summary": f"dev loss {first['loss']:.3f} at the start, {best['loss']:.3f} trained",
        }

    return run.perform("train_prefix", work)


def train(run: Run, folder: Path, seed: int, claim: Callable[[], None]) -> TrainerHistory:
    """Train on the prompts of a run, and write `prefix/` and `history.json` into a folder.

    Args:
        claim: takes the folder for this training, once its settings are known to be possible.

    Raises:
        UserError: prompts have nothing in common to start from, or the PLM owner takes no prefixes.
    """
    config, c = run.config, run.config.prefix
    prompter = run.prompter()
    shared, end = prompter.shared_tokens, prompter.end_token
    if config.task.show == "similar":
        raise UserError(
            "train-prefix takes the place of examples that all prompts show, and with task.show=similar every prompt "
            "shows others: set task.show=first."
        )
    if config.task.shots == 0 and c.start == "examples" and not c.text:
        raise UserError(
            "train-prefix starts from examples that all prompts show: set task.shots=3 and task.show=first; or from "
            "prefix.text, or prefix.start=random."
        )
    pairs = {split: [prompter.encode_pair(pair) for pair in run.pairs(split)] for split in ("train", "dev")}
    set_threads(config.plm.threads)
    replaced = tuple(pairs["train"][0].prompt[:shared])
    start_ids = _start(c, run, replaced, seed)
    engine = {"max_tokens": None, "prefix_positions": 2 * len(start_ids)}  # each step puts another prefix
    client = PatientPLM(connect(config.plm, run.bundle.card, engine), _PATIENCE_SECONDS, _tell)
    with BlockingPLM(client) as plm:
        end = run.bundle.card.eos_token_ids[0] if end is None else end
        start = start_of(plm, start_ids)
        batches = {split: _batches(examples, replaced, end, c.max_batch_tokens) for split, examples in pairs.items()}
        trainer = PrefixTrainer(
            c, plm, run.bundle.head, replace(start, frozen=c.frozen), batches["train"], batches["dev"],
            folder, seed,
        )  # fmt: skip
        _ = trainer.model  # refuses what cannot be trained, before anything is set aside
        claim()
        if not c.resume:
            for name in trainer.resumed_from:
                (folder / name).unlink(missing_ok=True)
        with track("training prefix", trainer.steps) as bar:
            trainer.on_point = showing_loss(bar)
            history = trainer.run()
        best = trainer.model.prefix
        crossed = best.replaced(best.embeddings.to(run.bundle.head.dtype))  # as it crossed the line, and was validated
        trained = TrainedPrefix(crossed, replaced, run.bundle.card.fingerprint)
    trained.save_pretrained(folder / "prefix", run.bundle.card.name)
    (folder / "history.json").write_text(json.dumps(history.to_dict()))
    return history


def start_of(plm: BlockingPLM, token_ids: list[int]) -> Prefix:
    """The keys and values of a text; or zeros that are added to them, where the PLM owner keeps them to itself."""
    description = plm.describe()
    if not description.keeps_start or description.prefix_shape is None:
        return plm.read_prefix(token_ids)
    zeros = torch.zeros(len(token_ids), description.prefix_shape.width)
    return Prefix(zeros, description.prefix_shape, text=tuple(token_ids))


def _start(c: PrefixConfig, run: Run, shared: tuple[int, ...], seed: int) -> list[int]:
    """The text from whose keys and values the prefix starts; it takes the place of `shared` whatever its length."""
    if c.start == "random":
        assert c.positions is not None
        return np.random.default_rng(seed).integers(run.bundle.card.vocab_size, size=c.positions).tolist()
    text = run.tokenizer.encode(c.text) if c.text else []
    bos = run.tokenizer.encode("")[:1]  # stands at the beginning alone
    ids = [*text, *(shared[1:] if text and bos and shared[:1] == tuple(bos) else shared)]
    if c.positions is not None and c.positions > len(ids):
        raise UserError(
            f"prefix.positions={c.positions}: the text that the prefix starts from has {len(ids)} tokens. Show more "
            "examples (task.shots), or leave it out."
        )
    kept = len(ids) if c.positions is None else c.positions
    if c.frozen >= kept:
        raise UserError(f"prefix.frozen={c.frozen}: the prefix has {kept} positions, so none is left to train.")
    return ids if kept == len(ids) else [ids[0], *ids[1 - kept :]]


def _tell(wait: str) -> None:
    if wait:
        console.print(wait, style="yellow")


def _batches(
    pairs: Sequence[EncodedPair], replaced: tuple[int, ...], end: int, max_tokens: int
) -> list[tuple[ExtractBatch, torch.Tensor]]:
    """Prompts without the tokens that the prefix replaces, and the target of every requested representation.

    Raises:
        UserError: a prompt begins otherwise, or ends with these tokens.
    """
    batches, shared = [], len(replaced)
    for example in pairs:
        if tuple(example.prompt[:shared]) != replaced or len(example.prompt) == shared:
            raise UserError(
                f"The prompt of example {example.example_id} does not continue the {shared} tokens that all prompts "
                "should begin with, so a prefix cannot replace them. Remove the example."
            )
    for examples in plan_batches(pairs, max_tokens, shared):
        token_ids = [example.prompt[shared:] + example.target for example in examples]
        first = [len(example.prompt) - shared - 1 for example in examples]
        target = [token for example in examples for token in (*example.target, end)]
        batches.append((ExtractBatch(token_ids, first), torch.tensor(target)))
    return batches
