"""Which memory entries raised the probability of each token: the share of P(x) that every entry brings.

An entry brings `exp(sim/θ)` over the joint normaliser (`gn`), λ times its part of the memory's distribution (`li`), and
lmbda times that of the second interpolation, which also scales all else by 1 - lmbda. The shares of all entries and the
vocabulary's add up to P(x). Shapes: N tokens, M memory entries, K neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
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
from pema_ray.trime.evaluation.statistics import Probe, Scored, Text, walk
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
    """A memory entry whose token is the one that came, and what it brought."""

    source: str
    """`window`, `earlier` or `datastore`."""
    place: int
    """Its token's position in the text, or its row in the datastore."""
    share: float
    """Of P(x)'s own sum: probability, not percent of it."""
    before: str = ""
    """The words in front of its token."""


@dataclass(frozen=True, slots=True)
class Why:
    """One token of the text."""

    piece: str
    position: int
    probability: float
    vocabulary: float
    """P_vocab(x), what the model says without any memory."""
    entries: tuple[AttributedEntry, ...]

    @property
    def raised(self) -> float:
        """By how much the memories changed P(x), as log10 of the ratio, within ±2; what colours the page."""
        ratio = max(self.probability, 1e-12) / max(self.vocabulary, 1e-12)
        return max(-2.0, min(2.0, float(torch.tensor(ratio).log10())))


@dataclass(frozen=True, slots=True)
class Explained:
    """A text, token by token."""

    title: str
    system: str
    tokens: tuple[Why, ...]


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
    for batch in walk(model, text, probe):
        for scored in batch:
            if scored.window.end >= first:
                yield from _window(model, text, probe, mixture, settings, neighbours, scored, size, first)


def _window(
    model: MemoryLM,
    text: Text,
    probe: Probe,
    mixture: Mixture,
    settings: Settings,
    neighbours: Neighbours | None,
    scored: Scored,
    size: int,
    first: int,
) -> Iterator[tuple[int, float, float, list[AttributedEntry]]]:
    position_N = torch.arange(scored.window.first, scored.window.end) + 1
    target_N = text.token_N[position_N]
    score = model.score(scored.state_NH, target_N)
    theta = settings.tau * model.hidden_size**0.5
    near_NM = scored.similarity_NM[:, : scored.ends[size]].float() / theta
    place_M = scored.entry_M[: scored.ends[size]]
    found: SearchResult | None = None
    if mixture.external:
        assert neighbours is not None
        found = neighbours.search(scored.key_NH.cpu().numpy(), mixture.neighbours)
    for n, position in enumerate(position_N.tolist()):
        if position < first:
            continue
        target, rest = int(target_N[n]), 1 - settings.second_weight
        vocabulary, near_M = float(score.log_prob_N[n].exp()), near_NM[n]
        shares: list[tuple[Tensor, Tensor, str]] = []
        p = vocabulary
        if mixture.rule == "gn":
            parts = [score.log_normaliser_N[n : n + 1], near_M]
            if mixture.joined and found is not None:
                parts.append(found.similarity_NK[n].to(near_M.device) / theta)
            whole = torch.cat(parts).logsumexp(0)
            p = vocabulary * float((score.log_normaliser_N[n] - whole).exp())
            shares.append(((near_M - whole).exp(), place_M, "near"))
            if mixture.joined and found is not None:
                shares.append(((parts[2] - whole).exp().cpu(), found.row_NK[n], "datastore"))
        elif mixture.rule == "li" and bool(near_M.isfinite().any()):
            p = (1 - settings.weight) * vocabulary
            shares.append((settings.weight * near_M.softmax(0), place_M, "near"))
        shares = [(rest * share, place, kind) for share, place, kind in shares]
        p *= rest
        if mixture.second and found is not None:
            second_K = (found.similarity_NK[n] / settings.interp_temp).softmax(0)
            shares.append((settings.second_weight * second_K, found.row_NK[n], "datastore"))
        entries: dict[tuple[str, int], float] = {}
        for share, place, kind in shares:
            tokens = text.token_N[place] if kind == "near" else found.token_NK[n]  # type: ignore[union-attr]
            for at in torch.nonzero(tokens == target).flatten().tolist():
                where = int(place[at])
                source = kind if kind == "datastore" else "window" if where > scored.window.start else "earlier"
                entries[source, where] = entries.get((source, where), 0.0) + float(share[at])
        p += sum(entries.values())
        told = [AttributedEntry(source, where, share) for (source, where), share in entries.items() if share > 0]
        yield position, p, vocabulary, sorted(told, key=lambda entry: -entry.share)


def explain_test(run: TrimeRun, found: TrimeEvaluation) -> Explained | None:
    """Some of the test text, by the system with the best score there that the run itself can ask."""
    able = [one for one in found.scores if one.datastore in (None, OWN) and one.system not in ("plain",)]
    if not able:
        return None
    text = text_of(run, "test", torch.device("cpu"))
    end = min(len(text.token_N), _LEAD + _SHOWN)
    shown = Text(text.token_N[:end], None if text.document_N is None else text.document_N[:end])
    best = min(able, key=lambda one: one.test_nll)
    return explain_with(run, best.system, best.chosen, shown, max(1, end - _SHOWN), f"{found.model}: test text")


def explain_text(run: TrimeRun, found: TrimeEvaluation, system: str | None, words: str, title: str) -> Explained:
    """Any text, by a system that has been calibrated; by default the best.

    Raises:
        UserError: the system has not been evaluated, or the text has no token.
    """
    able = {one.system: one for one in found.scores if one.datastore in (None, OWN)}
    name = system or min(able.values(), key=lambda one: one.dev_nll).system
    if name not in able:
        raise UserError(f"System '{name}' has not been evaluated; there are {', '.join(able)}.")
    vocabulary = Vocabulary.load(run.path("prepare"))
    ids = vocabulary.encode(words)
    if not len(ids):
        raise UserError(f"{title}: holds no token.")
    token_N = torch.cat([torch.tensor([vocabulary.eos_id]), torch.from_numpy(ids).long()])
    return explain_with(run, name, able[name].chosen, Text(token_N), 1, title)


def explain_with(run: TrimeRun, name: str, chosen: Chosen, text: Text, first: int, title: str) -> Explained:
    """The text's tokens from position `first` on."""
    c = run.config
    model = load_model(run.model_folder).to(pick_device("cpu"))
    system = make_system(name, c.evaluate)
    probe = make_probe(c, system.vectors or "key", model.hidden_size)
    vocabulary, train = Vocabulary.load(run.path("prepare")), TokenStream.open(run.path("prepare"), "train")
    trained = with_eos(train)

    def before(entry: AttributedEntry) -> str:
        tokens: Any = trained if entry.source == "datastore" else text.token_N.numpy()
        at = entry.place + 1 if entry.source == "datastore" else entry.place  # row r pairs position r with the next
        return _join(vocabulary, tokens[max(0, at - _BEFORE) : at])

    with ExitStack() as stack:
        search = None
        if system.mixture.external:
            store = open_datastore(run.path("datastore"), card_of(run.model_folder, train.eos_id, model))
            options = SearchOptions(c.index.metric, c.evaluate.probes, c.evaluate.rescore, c.evaluate.oversample)
            search = stack.enter_context(open_search(store, run.path("index"), options, 0))
        rows = list(explain(model, text, probe, system.mixture, settings_of(chosen), search, first))
    pieces = vocabulary.pieces(text.token_N.tolist())
    tokens = tuple(
        Why(
            pieces[at],
            at,
            p,
            v,
            tuple(AttributedEntry(e.source, e.place, e.share, before(e)) for e in entries[:_ENTRIES]),
        )
        for at, p, v, entries in rows
    )
    return Explained(title, system.label, tokens)


def settings_of(chosen: Chosen) -> Settings:
    """What calibration chose, as it was kept."""
    return Settings(chosen.tau or 1.0, chosen.weight or 0.0, chosen.interp_temp or 1.0, chosen.second_weight or 0.0)


def _join(vocabulary: Vocabulary, ids: Any) -> str:
    return " ".join(vocabulary.decode([int(i) for i in ids]).split())
