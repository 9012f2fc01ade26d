"""Trains a small PlugLM to look facts up: their values change during training, so weights cannot memorise them.

Shapes: B questions, F facts, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from pema_ray.pluglm.demonstration.facts import VALUE_PLACE, World, knowledge_of_facts
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.learning.objective import PretrainObjective
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.runtime.settings import Section
from pema_ray.training.schedules import learning_rate


class FactsSettings(Section):
    """One model of the demonstration. The defaults are what works at this scale; see `faithful`."""

    entities: int = Field(default=50, ge=1)
    relations: int = Field(default=4, ge=1)
    values: int = Field(default=20, ge=2)
    held_out: float = Field(default=0.2, ge=0, lt=1)
    """Share of the facts that training never asks about."""
    layers: int = Field(default=3, ge=1)
    """The last one is a memory layer."""
    hidden_size: int = Field(default=64, ge=4)
    heads: int = Field(default=4, ge=1)
    query_size: int = Field(default=64, ge=1)
    memory_feed_forward: int = Field(default=0, ge=0)
    top_k: int = Field(default=5, ge=1)
    steps: int = Field(default=3000, ge=1)
    batch_size: int = Field(default=64, ge=1)
    learning_rate: float = Field(default=2e-3, gt=0)
    warm_up_steps: int = Field(default=100, ge=1)
    redraw_every: int = Field(default=5, ge=1)
    """Steps between two draws of all values, each of which refreshes the memory."""
    contrastive_steps: int = Field(default=3000, ge=0)
    """Steps in which queries learn to find their fact's key: a departure from the paper."""
    contrastive_weight: float = Field(default=1.0, gt=0)
    contrastive_temperature: float = Field(default=0.05, gt=0)
    retrieval: Literal["inner_product", "cosine"] = "cosine"
    """`cosine`, a departure from the paper: training does not fix the lengths of the other facts' keys."""
    value_pooler: bool = True
    """A departure from the paper."""
    measure_every: int = Field(default=100, ge=1)

    @property
    def world(self) -> World:
        return World(self.entities, self.relations, self.values)

    @property
    def faithful(self) -> FactsSettings:
        """The published objective and knowledge encoder, all else equal."""
        return self.model_copy(update={"contrastive_steps": 0, "value_pooler": False, "retrieval": "inner_product"})


Point = dict[str, float]


def new_model(c: FactsSettings, seed: int) -> PlugLMForMaskedLM:
    """A small BERT with a memory layer and random weights."""
    return small_bert(c, seed, 5 + len(c.world.words), 16, dropout=0.0, retrieval=c.retrieval)


def small_bert(
    c: Any, seed: int, vocabulary: int, positions: int, dropout: float = 0.1, **settings: Any
) -> PlugLMForMaskedLM:
    """A BERT with a memory layer and random weights.

    Args:
        c: `FactsSettings` or `DomainsSettings`.
        settings: other fields of `PlugLMConfig`.
    """
    backbone = {
        "model_type": "bert", "vocab_size": vocabulary, "hidden_size": c.hidden_size,
        "intermediate_size": 4 * c.hidden_size, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "max_position_embeddings": positions, "type_vocab_size": 2, "pad_token_id": 0,
        "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = PlugLMConfig(
        backbone=backbone, memory_feed_forward=c.memory_feed_forward, query_size=c.query_size, top_k=c.top_k,
        max_document_tokens=positions, value_pooler=c.value_pooler, **settings,
    )  # fmt: skip
    return PlugLMForMaskedLM(config)


def learn(
    c: FactsSettings, seed: int, on_point: Callable[[Point], None] = lambda point: None
) -> tuple[PlugLMForMaskedLM, np.ndarray, list[Point]]:
    """(the trained model, true at facts that training never asks about `[F]`, measurements over training).

    Measurements use new values: `asked` and `held_out` are accuracies on facts that training asks about or not;
    `found` is the share of questions whose fact is among the k retrieved entries.
    """
    world, random = c.world, np.random.default_rng(seed)
    model, unseen_F = new_model(c, seed), world.held_out(random, c.held_out)
    objective, training_facts = PretrainObjective(model, c.contrastive_temperature), np.flatnonzero(~unseen_F)
    optimizer = torch.optim.AdamW(model.parameters(), lr=c.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    fresh = np.random.default_rng([seed, 1])
    question_FT, code_F = world.questions(), torch.from_numpy(world.codes)
    points: list[Point] = []
    value_F = world.draw(random)
    token_FT = world.tokens(value_F)
    began = time.perf_counter()
    for step in range(c.steps):
        if step % c.redraw_every == 0:
            value_F = world.draw(random)
            model.attach(knowledge_of_facts(model.eval(), world, value_F), allow_stale=True)
            objective.train()
            token_FT = world.tokens(value_F)
        with_replacement = c.batch_size > len(training_facts)
        fact_B = torch.from_numpy(random.choice(training_facts, c.batch_size, replace=with_replacement))
        label_BT = torch.full((c.batch_size, 5), IGNORED)
        label_BT[:, VALUE_PLACE] = token_FT[fact_B, VALUE_PLACE]
        own: tuple[Any, ...] = ()
        if step < c.contrastive_steps:
            own = token_FT[fact_B], torch.ones(c.batch_size, 5), torch.tensor(c.contrastive_weight)
        loss, *_ = objective(
            question_FT[fact_B], torch.ones(c.batch_size, 5), label_BT, code_F[fact_B], torch.tensor(1 / c.batch_size),
            *own,
        )  # fmt: skip
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = learning_rate(
            step, "cosine", c.learning_rate, total_steps=c.steps, warm_up_steps=c.warm_up_steps, power=1.0
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.step()
        if (step + 1) % c.measure_every == 0 or step + 1 == c.steps:
            point = {"step": float(step + 1), "loss": loss.item(), "seconds": time.perf_counter() - began}
            points.append(point | _measure(model.eval(), world, world.draw(fresh), unseen_F))
            on_point(points[-1])
            model.attach(knowledge_of_facts(model, world, value_F), allow_stale=True)
            objective.train()
    return model.eval(), unseen_F, points


@torch.no_grad()
def answers(model: PlugLMForMaskedLM, world: World) -> tuple[np.ndarray, Tensor]:
    """(the model's value of every fact `[F]`, its logits over values `[F, V]`)."""
    question_FT = world.questions()
    logits = model(input_ids=question_FT, attention_mask=torch.ones_like(question_FT)).logits[:, VALUE_PLACE]
    logits_FV = logits[:, world.first_value :]
    return logits_FV.argmax(1).numpy(), logits_FV


@torch.no_grad()
def retrieved(model: PlugLMForMaskedLM, world: World) -> np.ndarray:
    """Entries that the last memory layer used for every question `[F, K]`."""
    return model(input_ids=world.questions(), output_retrieved=True).retrieved[-1].entry_BK.numpy()


def _measure(model: PlugLMForMaskedLM, world: World, value_F: np.ndarray, unseen_F: np.ndarray) -> Point:
    model.attach(knowledge_of_facts(model, world, value_F), allow_stale=True)
    correct_F = answers(model, world)[0] == value_F
    is_retrieved_F = (retrieved(model, world) == np.arange(world.facts)[:, None]).any(1)
    return {
        "asked": float(correct_F[~unseen_F].mean()),
        "held_out": float(correct_F[unseen_F].mean()) if unseen_F.any() else float("nan"),
        "found": float(is_retrieved_F.mean()),
    }
