"""Which memory entries raised the probability of each token: the share of P(x) that every entry adds.

An entry adds `exp(sim/θ)` over the joint normaliser (`gn`), λ times its part of the memory's distribution (`li`), and
lmbda times that of the second interpolation, which also scales all else by 1 - lmbda. The shares of all entries and the
vocabulary's add up to P(x). Shapes: N tokens, M memory entries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.memory.search.nearest import Neighbours, SearchOptions, SearchResult
from pema_ray.memory.search.ray_search import open_search
from pema_ray.runtime.hardware import pick_device
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.evaluation.calibration import Mixture, Settings
from pema_ray.trime.evaluation.results import Chosen, TrimeEvaluation
from pema_ray.trime.evaluation.statistics import Probe, Text, walk
from pema_ray.trime.evaluation.systems import make_probe, make_system
from pema_ray.trime.model.memory_lm import MemoryLM
from pema_ray.trime.model.registry import load_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.datastore import card_of, with_eos
from pema_ray.trime.stages.evaluate import OWN, text_of
from pema_ray.trime.text.segments import TokenStream
from pema_ray.trime.text.vocabulary import Vocabulary

_LEAD, _SHOWN, _ENTRIES, _BEFORE = 4000, 240, 4, 10  # tokens before, tokens shown, entries of each, words of an entry


@dataclass(frozen=True, slots=True)
class AttributedEntry:
    """A memory entry with the token of the text, and its share."""

    source: str
    """`window`, `earlier` or `datastore`."""
    place: int
    """Its token's position in the text, or its row in the datastore."""
    share: float
    """What it adds to P(x): a probability, not a percentage."""
    before: str = ""
    """The words in front of its token."""


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """One token of the text."""

    piece: str
    position: int
    probability: float
    vocabulary: float
    """P_vocab(x), without any memory."""
    entries: tuple[AttributedEntry, ...]

    @property
    def raised(self) -> float:
        """By how much the memories changed P(x): log10 of the ratio, within ±2. It colours the page."""
        ratio = max(self.probability, 1e-12) / max(self.vocabulary, 1e-12)
        return max(-2.0, min(2.0, float(torch.tensor(ratio).log10())))


@dataclass(frozen=True, slots=True)
class Explained:
    """A text, token by token."""

    title: str
    system: str
    tokens: tuple[ExplainedToken, ...]


@torch.inference_mode()
def explain(
    model: MemoryLM,
    text: Text,
    probe: Probe,
    mixture: Mixture,
    settings: Settings,
    neighbours: Neighbours | None,
    first: int,
) -> Iterator[tuple[int, float, float, list[AttributedEntry]]]:
    """(position, P(x), P_vocab(x), entries of the same token by share) for every token from position `first` on."""
    size = probe.sizes.index(mixture.size)
    for scored in chain.from_iterable(walk(model, text, probe)):
        if scored.window.end < first:
            continue
        position_N = torch.arange(scored.window.first, scored.window.end) + 1
        target_N = text.token_N[position_N]
        score = model.score(scored.state_NH, target_N)
        theta = settings.tau * model.hidden_size**0.5
        near_NM = scored.similarity_NM[:, : scored.ends[size]].float() / theta
        entry_M = scored.entry_M[: scored.ends[size]]
        nearest: SearchResult | None = None
        if mixture.external:
            assert neighbours is not None
            nearest = neighbours.search(scored.key_NH.cpu().numpy(), mixture.neighbours)
        for n, position in enumerate(position_N.tolist()):
            if position < first:
                continue
            target, rest = int(target_N[n]), 1 - settings.second_weight
            vocabulary, near_M = float(score.log_prob_N[n].exp()), near_NM[n]
            shares: list[tuple[Tensor, Tensor, str]] = []
            p = vocabulary
            if mixture.rule == "gn":
                parts = [score.log_normaliser_N[n : n + 1], near_M]
                if mixture.joined and nearest is not None:
                    parts.append(nearest.similarity_NK[n].to(near_M.device) / theta)
                normaliser = torch.cat(parts).logsumexp(0)
                p = vocabulary * float((score.log_normaliser_N[n] - normaliser).exp())
                shares.append(((near_M - normaliser).exp(), entry_M, "near"))
                if mixture.joined and nearest is not None:
                    shares.append(((parts[2] - normaliser).exp().cpu(), nearest.row_NK[n], "datastore"))
            elif mixture.rule == "li" and bool(near_M.isfinite().any()):
                p = (1 - settings.weight) * vocabulary
                shares.append((settings.weight * near_M.softmax(0), entry_M, "near"))
            shares = [(rest * share_M, place_M, kind) for share_M, place_M, kind in shares]
            p *= rest
            if mixture.second and nearest is not None:
                second_K = (nearest.similarity_NK[n] / settings.interp_temp).softmax(0)
                shares.append((settings.second_weight * second_K, nearest.row_NK[n], "datastore"))
            entries: dict[tuple[str, int], float] = {}
            for share_M, place_M, kind in shares:
                token_M = text.token_N[place_M] if kind == "near" else nearest.token_NK[n]  # type: ignore[union-attr]
                for at in torch.nonzero(token_M == target).flatten().tolist():
                    place = int(place_M[at])
                    source = kind if kind == "datastore" else "window" if place > scored.window.start else "earlier"
                    entries[source, place] = entries.get((source, place), 0.0) + float(share_M[at])
            p += sum(entries.values())
            attributed = [AttributedEntry(*key, share) for key, share in entries.items() if share > 0]
            yield position, p, vocabulary, sorted(attributed, key=lambda entry: -entry.share)


def explain_test(run: TrimeRun, evaluation: TrimeEvaluation) -> Explained | None:
    """Part of the test text, by the best system there that needs no other run's datastore."""
    systems = [row for row in evaluation.scores if row.datastore in (None, OWN) and row.system != "plain"]
    if not systems:
        return None
    text = text_of(run, "test", torch.device("cpu"))
    end = min(len(text.token_N), _LEAD + _SHOWN)
    shown = Text(text.token_N[:end], None if text.document_N is None else text.document_N[:end])
    best = min(systems, key=lambda row: row.test_nll)
    return explain_with(run, best.system, best.chosen, shown, max(1, end - _SHOWN), f"{evaluation.model}: test text")


def explain_text(run: TrimeRun, evaluation: TrimeEvaluation, system: str | None, words: str, title: str) -> Explained:
    """Any text, by a calibrated system; by default the best.

    Raises:
        UserError: the system has not been evaluated, or the text has no token.
    """
    systems = {row.system: row for row in evaluation.scores if row.datastore in (None, OWN)}
    name = system or min(systems.values(), key=lambda row: row.dev_nll).system
    if name not in systems:
        raise UserError(f"System '{name}' has not been evaluated; there are {', '.join(systems)}.")
    vocabulary = Vocabulary.load(run.path("prepare"))
    ids = vocabulary.encode(words)
    if not len(ids):
        raise UserError(f"{title}: holds no token.")
    token_N = torch.cat([torch.tensor([vocabulary.eos_id]), torch.from_numpy(ids).long()])
    return explain_with(run, name, systems[name].chosen, Text(token_N), 1, title)


def explain_with(run: TrimeRun, name: str, chosen: Chosen, text: Text, first: int, title: str) -> Explained:
    """The text's tokens from position `first` on."""
    c = run.config
    model = load_model(run.model_folder).to(pick_device("cpu"))
    system = make_system(name, c.evaluate)
    probe = make_probe(c, system.vectors or "key", model.hidden_size)
    vocabulary, train = Vocabulary.load(run.path("prepare")), TokenStream.open(run.path("prepare"), "train")
    train_tokens = with_eos(train)

    def before(entry: AttributedEntry) -> str:
        tokens: Any = train_tokens if entry.source == "datastore" else text.token_N.numpy()
        at = entry.place + 1 if entry.source == "datastore" else entry.place  # row r pairs position r with the next
        return " ".join(vocabulary.decode([int(i) for i in tokens[max(0, at - _BEFORE) : at]]).split())

    with ExitStack() as stack:
        search = None
        if system.mixture.external:
            store = open_datastore(run.path("datastore"), card_of(run.model_folder, train.eos_id, model))
            options = SearchOptions(c.index.metric, c.evaluate.probes, c.evaluate.rescore, c.evaluate.oversample)
            search = stack.enter_context(open_search(store, run.path("index"), options, 0))
        rows = list(explain(model, text, probe, system.mixture, settings_of(chosen), search, first))
    pieces = vocabulary.pieces(text.token_N.tolist())
    tokens = tuple(
        ExplainedToken(
            pieces[at],
            at,
            p,
            v,
            tuple(replace(entry, before=before(entry)) for entry in entries[:_ENTRIES]),
        )
        for at, p, v, entries in rows
    )
    return Explained(title, system.label, tokens)


def settings_of(chosen: Chosen) -> Settings:
    """What calibration chose, as the evaluation kept it."""
    return Settings(chosen.tau or 1.0, chosen.weight or 0.0, chosen.interp_temp or 1.0, chosen.second_weight or 0.0)
