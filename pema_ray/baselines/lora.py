"""LoRA by `peft`: what fine-tuning reaches when weights and text are in one hand (Hu et al., ICLR 2022).

The upper bound for PEMA, on the same pairs and the same prompts. B sequences, T positions, H hidden.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from transformers import get_cosine_schedule_with_warmup

from pema_ray.config import LoraSettings
from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.memory.plan import plan_batches
from pema_ray.plm_owner.load import LoadedPLM
from pema_ray.plm_owner.states import capture_state
from pema_ray.tasks import EncodedPair


@dataclass(frozen=True, slots=True)
class LoraTraining:
    """What training gave, beside the weights: losses in nats per target token, EOS included."""

    losses: list[float]
    trained_parameters: int
    seconds: float


def train_lora(
    plm: LoadedPLM,
    head: LMHead,
    pairs: Sequence[EncodedPair],
    settings: LoraSettings,
    seed: int = 0,
    end_token: int | None = None,
    on_step: Callable[[int, int, float], None] = lambda step, steps, loss: None,
) -> tuple[LoadedPLM, LoraTraining]:
    """Fine-tune a PLM in place on the targets of pairs; the updates are merged into its weights.

    Args:
        head: the PLM's own norm and LM head, which stay as they are.
        end_token: what follows a target; by default the PLM's first EOS.
        on_step: told of every step, of how many, and its loss.

    Raises:
        UserError: peft is not installed.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError:
        raise UserError("The LoRA baseline needs peft: pip install peft.") from None
    torch.manual_seed(seed)
    chosen = LoraConfig(
        r=settings.rank, lora_alpha=settings.alpha, lora_dropout=settings.dropout, target_modules="all-linear"
    )
    wrapped: Any = get_peft_model(plm.model, chosen)
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.learning_rate)
    batches = list(plan_batches(pairs, settings.max_batch_tokens))
    steps, losses, started = len(batches) * settings.epochs, [], time.perf_counter()
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, steps // 20), steps)
    head, eos = head.to(plm.device), plm.eos_token_ids[0] if end_token is None else end_token
    wrapped.train()
    for epoch in range(settings.epochs):
        for number in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            loss = _loss(plm, head, batches[number], eos)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(float(loss.detach()))
            if not math.isfinite(losses[-1]):
                raise UserError(f"LoRA: the loss became no number at step {len(losses)}: lower its learning_rate.")
            on_step(len(losses), steps, losses[-1])
    seconds = time.perf_counter() - started
    count = sum(parameter.numel() for parameter in trained)
    merged = wrapped.merge_and_unload().eval().requires_grad_(False)
    return LoadedPLM(f"{plm.name}+LoRA", merged, plm.tokenizer), LoraTraining(losses, count, seconds)


def _loss(plm: LoadedPLM, head: LMHead, batch: Sequence[EncodedPair], eos: int) -> torch.Tensor:
    """Mean cross-entropy of the batch's targets and their EOS; logits of prompts are not computed."""
    sequences = [e.prompt + e.target for e in batch]
    padded_BT = torch.zeros(len(batch), max(map(len, sequences)), dtype=torch.long)
    wanted_BT = torch.zeros_like(padded_BT, dtype=torch.bool)
    for row, (ids, example) in enumerate(zip(sequences, batch, strict=True)):
        padded_BT[row, : len(ids)] = torch.tensor(ids)
        wanted_BT[row, len(example.prompt) - 1 : len(ids)] = True
    gold = torch.tensor([token for e in batch for token in (*e.target, eos)])
    state_BTH = capture_state(plm, input_ids=padded_BT.to(plm.device), use_cache=False)  # causal: no mask is needed
    state_NH = state_BTH[wanted_BT.to(state_BTH.device)]
    return F.cross_entropy(head.logits(head.norm(state_NH)).float(), gold.to(state_NH.device))
