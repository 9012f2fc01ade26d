"""Answers of a model trained on facts while its memory on disk is edited and its weights are not.

Shapes: F facts, V values.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from pema_ray.pluglm.demonstration.facts import World, weights_hash
from pema_ray.pluglm.demonstration.learning import answers
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.knowledge import Knowledge, LocalKnowledge
from pema_ray.runtime.settings import Section

_AIMS = {
    "edited": (0.98, True), "edited_held_out": (0.90, True), "added": (0.90, True), "old_memory": (0.10, False),
}  # fmt: skip


class FactsFigures(Section):
    """Accuracies unless said otherwise; chance is one over the number of values."""

    facts: int
    held_out: int
    """Facts that training never asked about."""
    built: float
    """With the memory as it was built."""
    edited: float
    """With every value edited, against the new values."""
    edited_held_out: float
    """The same, for facts that training never asked about."""
    old_memory: float
    """With the memory before the edits, against the new values."""
    shuffled: float
    """With values shuffled among the keys."""
    none: float
    """Without a memory."""
    before_adding: float
    """For facts that training never asked about, while their entries are deleted."""
    added: float
    """For the same facts, once they are added again."""
    single_edits: int
    """Edits of one entry each, all undone by a swap."""
    flipped: float
    """Share of these edits whose fact was then answered with the new value."""
    others_changed: int
    """Answers to other facts that changed, over all single edits."""
    other_domain: float
    """With a second domain's memory swapped in, for that domain's facts."""
    restored: bool
    """Whether all logits were bit for bit the same after undoing each edit, and after swapping the memory back."""
    weights_before: str
    weights_after: str
    """SHA-256 of all weights."""
    versions: int
    """Of the memory, published by these measurements."""

    @property
    def missed(self) -> list[str]:
        """Missed aims of the demonstration, in words."""
        problems = [
            f"{name} {getattr(self, name):.3f}, aim {'≥' if at_least else '≤'} {aim}"
            for name, (aim, at_least) in _AIMS.items()
            if (getattr(self, name) < aim) == at_least and getattr(self, name) != aim
        ]
        if self.flipped < 1:
            problems.append(f"{self.flipped:.3f} of the single edits flipped their fact, aim all")
        if self.others_changed:
            problems.append(f"{self.others_changed} other answers changed by single edits, aim none")
        if not self.restored:
            problems.append("predictions were not restored exactly")
        if self.weights_before != self.weights_after:
            problems.append("weights changed")
        return problems


def measure(
    model: PlugLMForMaskedLM, world: World, unseen_F: np.ndarray, folder: Path, seed: int, single_edits: int = 20
) -> FactsFigures:
    """Build memories in `folder`, edit them, and ask about every fact after every change."""
    random = np.random.default_rng([seed, 2])
    before = weights_hash(model)
    encoder = DocumentEncoder(model, world.tokenizer(), "facts")

    def attach(memory: KnowledgeMemory) -> Knowledge:
        knowledge = memory.load(encoder.fingerprint)
        model.attach(knowledge)
        return knowledge

    old_F = world.draw(random)
    new_F = world.draw(random, other_than=old_F)
    built = KnowledgeMemory.build(folder / "memory", world.entries(old_F), encoder, "float32")
    attach(built)
    built_F = answers(model, world)[0]
    edited = built
    for fact, value in enumerate(new_F):
        edited = edited.replace(fact, world.entry(fact, int(value)), encoder)
    knowledge = attach(edited)
    edited_F, logits_FV = answers(model, world)
    correct_F = edited_F == new_F

    shuffle_F = torch.from_numpy(random.permutation(world.facts))
    assert isinstance(knowledge, LocalKnowledge)
    model.attach(replace(knowledge, value_ND=knowledge.value_ND[shuffle_F]))
    shuffled_F = answers(model, world)[0]
    model.attach(None)
    none_F = answers(model, world)[0]
    attach(built)
    stale_F = answers(model, world)[0]

    memory, restored, flipped, changed = edited, True, 0, 0
    facts = random.choice(world.facts, min(single_edits, world.facts), replace=False)
    for fact in facts.tolist():
        value = int((new_F[fact] + random.integers(1, world.values)) % world.values)
        attach(memory.replace(fact, world.entry(fact, value), encoder))
        answer_F = answers(model, world)[0]
        flipped += int(answer_F[fact] == value)
        changed += int((np.delete(answer_F, fact) != np.delete(edited_F, fact)).sum())
        memory = memory.swap(edited)
        attach(memory)
        restored &= torch.equal(answers(model, world)[1], logits_FV)

    unseen = np.flatnonzero(unseen_F)
    attach(memory.delete(unseen.tolist()))
    without_F = answers(model, world)[0]
    attach(memory.add([world.entry(fact, int(new_F[fact])) for fact in unseen.tolist()], encoder))
    added_F = answers(model, world)[0]

    other_F = world.draw(random)
    other = KnowledgeMemory.build(folder / "other", world.entries(other_F, "other world"), encoder, "float32")
    attach(memory.swap(other))
    swapped_F = answers(model, world)[0]
    memory = memory.swap(edited)
    attach(memory)
    restored &= torch.equal(answers(model, world)[1], logits_FV)

    return FactsFigures(
        facts=world.facts, held_out=len(unseen), built=float((built_F == old_F).mean()), edited=float(correct_F.mean()),
        edited_held_out=float(correct_F[unseen_F].mean()), old_memory=float((stale_F == new_F).mean()),
        shuffled=float((shuffled_F == new_F).mean()), none=float((none_F == new_F).mean()),
        before_adding=float((without_F == new_F)[unseen_F].mean()), added=float((added_F == new_F)[unseen_F].mean()),
        single_edits=len(facts), flipped=flipped / len(facts), others_changed=changed,
        other_domain=float((swapped_F == other_F).mean()), restored=restored, weights_before=before,
        weights_after=weights_hash(model), versions=memory.version,
    )  # fmt: skip
