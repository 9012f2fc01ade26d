"""LoRA by `peft`: what fine-tuning reaches when weights and text are in one hand (Hu et al., ICLR 2022).

The upper bound for PEMA, on the same pairs and the same prompts. B sequences, T positions, H hidden.
"""

from __future__ import annotations

import gc
import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory.plan import plan_batches
from pema_ray.pema.baselines.config import LoraSettings
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.load import LoadedPLM, load_plm
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.hardware import peak_memory
from pema_ray.tasks import EncodedPair


@dataclass(frozen=True, slots=True)
class LoraTraining:
    """What training gave, beside the weights: losses in nats per target token, EOS included.

    Attributes:
        losses: of every step.
        dev_losses: after every epoch.
        epoch: whose weights were kept, from 1.
        seconds: of training, without the measuring on dev pairs.
    """

    losses: list[float]
    dev_losses: list[float]
    epoch: int
    trained_parameters: int
    seconds: float


def train_lora(
    plm: LoadedPLM,
    head: LMHead,
    pairs: Sequence[EncodedPair],
    settings: LoraSettings,
    learning_rate: float,
    dev: Sequence[EncodedPair] = (),
    seed: int = 0,
    end_token: int | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[LoadedPLM, LoraTraining]:
    """Fine-tune a PLM in place on the targets of pairs; the updates are merged into its weights.

    Args:
        head: the PLM's own norm and LM head, which stay as they are.
        learning_rate: AdamW's; `settings.learning_rates` are `tune_lora`'s.
        dev: pairs by whose loss the best epoch is kept; without any, the last.
        end_token: what follows a target; by default the PLM's first EOS.
        on_step: called after every step with its number, the number of all steps, and its loss.

    Raises:
        UserError: peft is not installed, the PLM is quantised, or the loss became infinite or no number.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("The LoRA baseline needs peft: pip install peft.") from None
    if plm.is_quantized:
        raise UserError(f"LoRA: {plm.name} is quantised; updates are merged into floating-point weights only.")
    torch.manual_seed(seed)
    updates = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )
    wrapped: Any = get_peft_model(plm.model, updates)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate)
    batches = list(plan_batches(pairs, settings.max_batch_tokens))
    steps, losses, dev_losses, seconds = len(batches) * settings.epochs, [], [], 0.0
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    head, eos = head.to(plm.device), plm.eos_token_ids[0] if end_token is None else end_token
    best: tuple[float, int, list[torch.Tensor]] = (math.inf, settings.epochs, [])
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        wrapped.train()
        for number in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            loss = _losses(plm, head, batches[number], eos).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise UserError(f"LoRA: the loss became no number at step {len(losses)}: lower its learning rate.")
            on_step(len(losses), steps, losses[-1])
        seconds += time.perf_counter() - started
        if dev:
            wrapped.eval()
            dev_losses.append(float(np.mean(target_losses(plm, head, dev, eos, settings.max_batch_tokens))))
            if dev_losses[-1] < best[0]:
                best = dev_losses[-1], epoch + 1, [parameter.detach().clone() for parameter in trained]
    with torch.no_grad():
        for parameter, kept in zip(trained, best[2], strict=bool(best[2])):
            parameter.copy_(kept)
    count = sum(parameter.numel() for parameter in trained)
    merged = wrapped.merge_and_unload().eval().requires_grad_(False)
    tuned = LoadedPLM(f"{plm.name}+LoRA", merged, plm.tokenizer)
    return tuned, LoraTraining(losses, dev_losses, best[1], count, seconds)


@torch.inference_mode()
def target_losses(
    plm: LoadedPLM, head: LMHead, pairs: Sequence[EncodedPair], eos: int | None, max_batch_tokens: int = 2048
) -> list[float]:
    """Cross-entropy of every target token, in nats; with that of `eos` behind each target, where it is given."""
    losses: list[float] = []
    for batch in plan_batches(pairs, max_batch_tokens):
        losses += _losses(plm, head, batch, eos).tolist()
    return losses


def _losses(plm: LoadedPLM, head: LMHead, batch: Sequence[EncodedPair], eos: int | None) -> torch.Tensor:
    """Cross-entropy of the batch's targets, and of their EOS; logits of prompts are not computed."""
    sequences = [e.prompt + e.target for e in batch]
    padded_BT = torch.zeros(len(batch), max(map(len, sequences)), dtype=torch.long)
    wanted_BT = torch.zeros_like(padded_BT, dtype=torch.bool)
    for row, (ids, example) in enumerate(zip(sequences, batch, strict=True)):
        padded_BT[row, : len(ids)] = torch.tensor(ids)
        wanted_BT[row, len(example.prompt) - 1 : len(ids) - (eos is None)] = True
    gold = torch.tensor([token for e in batch for token in (*e.target, *(() if eos is None else (eos,)))])
    state_BTH = capture_state(plm, input_ids=padded_BT.to(plm.device), use_cache=False)  # causal: no mask is needed
    state_NH = state_BTH[wanted_BT.to(state_BTH.device)]
    return F.cross_entropy(head.logits(head.norm(state_NH)).float(), gold.to(state_NH.device), reduction="none")


# ── the baseline, whole ─────────────────────────────────────────────────────


@dataclass(frozen=True)
class LoraJob:
    """Everything that the baseline needs, for a process of its own.

    Attributes:
        folder: gets the merged model and its tokenizer; beside it lies what each learning rate gave.
        end_token: as in `train_lora`.
    """

    plm: PLMConfig
    train: list[EncodedPair]
    dev: list[EncodedPair]
    test: list[EncodedPair]
    settings: LoraSettings
    folder: Path
    seed: int
    end_token: int | None

    @property
    def stamp(self) -> str:
        """Of everything that what one learning rate gives depends on."""
        settings = self.settings.model_dump(exclude={"learning_rates"})
        pairs = [[(e.prompt, e.target) for e in split] for split in (self.train, self.dev, self.test)]
        plm = self.plm.model_dump(exclude={"threads"})
        described = json.dumps([plm, settings, pairs, self.seed, self.end_token], default=str)
        return hashlib.sha256(described.encode()).hexdigest()[:16]


def tune_lora(job: LoraJob) -> dict[str, Any]:
    """Train at every learning rate and save the model with the lowest dev loss.

    What a rate gave is kept, so that an interrupted tuning goes on and a wider grid costs its new rates alone.

    Returns:
        `learning_rate`, `epoch`, `dev` (its loss), `nll` of the test targets, `seconds`, `peak_bytes`; or `error`.
    """
    kept, stamp, grid = (
        job.folder.with_name("learning_rates.json"),
        job.stamp,
        list(map(str, job.settings.learning_rates)),
    )
    record = json.loads(kept.read_text()) if kept.exists() else {}
    rates: dict[str, dict[str, Any]] = {}
    if record.get("stamp") == stamp and record["saved"] in grid and job.folder.exists():  # which holds the best of them
        rates = {rate: outcome for rate, outcome in record["rates"].items() if rate in grid}
    for rate, value in zip(grid, job.settings.learning_rates, strict=True):
        if rate in rates:
            continue
        lowest = min((outcome["dev"] for outcome in rates.values()), default=math.inf)
        try:
            rates[rate] = _at_rate(job, value, lowest)
        except UserError as error:
            rates[rate] = {"dev": math.inf, "error": str(error)}
        best = min(rates, key=lambda rate: rates[rate]["dev"])
        saved = None if rates[best]["error"] else best
        finished = {rate: outcome for rate, outcome in rates.items() if not outcome["error"]}  # others are tried again
        with atomic_file(kept) as temporary:
            temporary.write_text(json.dumps({"stamp": stamp, "saved": saved, "rates": finished}, indent=1) + "\n")
        gc.collect()  # or the next rate's peak memory is that of two models
    return min(rates.values(), key=lambda outcome: outcome["dev"])


def _at_rate(job: LoraJob, rate: float, lowest: float) -> dict[str, Any]:
    """What `tune_lora` returns, for one rate; saves the model if its dev loss is below the lowest so far."""
    plm = load_plm(job.plm)
    head = export_lm_head(plm).head.to(plm.device)
    tuned, training = train_lora(plm, head, job.train, job.settings, rate, job.dev, job.seed, job.end_token)
    loss = min(training.dev_losses)
    if not math.isfinite(loss):
        raise UserError(f"LoRA: learning rate {rate:g} gave a dev loss that is no number.")
    if loss < lowest:
        tuned.model.save_pretrained(job.folder)
        tuned.tokenizer.save_pretrained(job.folder)
    return {
        "error": "",
        "dev": loss,
        "learning_rate": rate,
        "epoch": training.epoch,
        "seconds": training.seconds,
        "peak_bytes": peak_memory(tuned.device),
        "nll": float(np.mean(target_losses(tuned, head, job.test, None))),
    }
