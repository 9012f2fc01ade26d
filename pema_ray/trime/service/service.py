"""A TRIME model as a service: how likely a text is, and what comes next, with a chosen datastore.

Search actors hold the datastores, which can be swapped while requests run: each request keeps the one it started with.
Knows FastAPI and starts Ray actors; `pema_ray.trime.service.application` makes the deployment.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from fastapi import FastAPI
from pydantic import Field
from torch import Tensor

from pema_ray.errors import UserError, nearest
from pema_ray.experiment.configuration import read_config
from pema_ray.memory.search.nearest import Neighbours, SearchOptions, check_k
from pema_ray.memory.search.ray_search import open_search
from pema_ray.runtime.hardware import compute_thread, pick_device, set_threads
from pema_ray.runtime.serving.http import Admission, handle_errors
from pema_ray.runtime.settings import Section, validate
from pema_ray.trime.config import TrimeConfig
from pema_ray.trime.datastore import open_datastore
from pema_ray.trime.evaluation.calibration import Mixture, Settings, token_log_probs
from pema_ray.trime.evaluation.combination import joint_over_vocabulary, linear_over_vocabulary, memory_mass
from pema_ray.trime.evaluation.explain import settings_of
from pema_ray.trime.evaluation.results import Chosen, TrimeEvaluation
from pema_ray.trime.evaluation.statistics import Probe, Text, measure, walk
from pema_ray.trime.evaluation.systems import EvaluationSystem, make_probe, make_system
from pema_ray.trime.model.memory_lm import MemoryLM
from pema_ray.trime.model.registry import load_model
from pema_ray.trime.run import TrimeRun
from pema_ray.trime.stages.datastore import card_of
from pema_ray.trime.text.vocabulary import Vocabulary


class TrimeServiceConfig(Section):
    """The model that is served, and limits of requests."""

    config: str
    """The experiment's YAML file: its run holds vocabulary, model and calibration (`evaluate`)."""
    overrides: tuple[str, ...] = ()
    """`section.key=value`, as on the command line."""
    system: str = "long_knn"
    """The system of requests with a datastore."""
    without: str = "long"
    """The system of requests without one."""
    search_actors: int = Field(default=2, ge=0)
    """Of each datastore; 0: the replica searches by itself."""
    cpus_per_actor: float = Field(default=0.5, gt=0)
    """CPUs that one of them asks of Ray."""
    max_tokens: int = Field(default=8192, ge=2)
    """Of a request's text."""
    threads: int = Field(default=1, ge=0)
    """CPU threads of torch."""


class TrimeUserConfig(Section):
    """What may change while requests run: Serve's `user_config`."""

    datastores: dict[str, str] = {}
    """Name -> folder; an index beside it (`<folder>/../index`) is used if it is this datastore's."""


class TextRequest(Section):
    """A request."""

    text: str
    datastore: str | None = None
    """One of `/v1/datastores`; None: no external memory."""
    top: int = Field(default=10, ge=1, le=1000)
    """Of `/v1/next`: how many tokens."""


@dataclass(frozen=True)
class LoadedDatastore:
    """A datastore that is served; `close` stops its actors once no request uses it."""

    folder: str
    search: Neighbours
    close: Callable[[], None]


class TrimeService:
    """Scores texts and predicts next tokens, for the API.

    Raises:
        UserError: the run was not evaluated with these settings, or a system of the service is not calibrated.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = validate(TrimeServiceConfig, dict(config), "service")
        self._thread = compute_thread()
        self._thread.submit(set_threads, self.config.threads).result()
        self.experiment = read_config(TrimeConfig, self.config.config, self.config.overrides)
        self.run = run = TrimeRun(self.experiment)
        self.device = pick_device(self.experiment.evaluate.device)
        self.model = load_model(run.model_folder).to(self.device)
        self.vocabulary = Vocabulary.load(run.path("prepare"))
        self.card = card_of(run.model_folder, self.vocabulary.eos_id, self.model)
        if not run.finished("evaluate"):
            raise UserError(
                f"{run.folder}: not evaluated with the settings of this service. Run: pema-ray trime evaluate -c "
                f"{self.config.config}. Settings that its stages were given on the command line belong in "
                "service.overrides."
            )
        chosen = {row.system: row.chosen for row in reversed(TrimeEvaluation.load(run.path("evaluate")).scores)}
        self._systems = {
            True: self._system(self.config.system, chosen),
            False: self._system(self.config.without, chosen),
        }
        """With a datastore, and without one."""
        self._datastores: dict[str, LoadedDatastore] = {}
        self.refused: str | None = None
        """Why the last change of datastores was rejected, if it was."""

    def _system(self, name: str, chosen: Mapping[str, Chosen]) -> tuple[EvaluationSystem, Probe, Settings]:
        """A system as it was calibrated, and a probe of its settings alone."""
        if name not in chosen:
            raise UserError(
                f"System '{name}' of this run has no calibration.{nearest(name, list(chosen))} "
                f"Run: pema-ray trime evaluate, with '{name}' among evaluate.systems."
            )
        settings = settings_of(chosen[name])
        system = make_system(name, self.experiment.evaluate)
        probe = make_probe(self.experiment, system.vectors or "key", self.model.hidden_size)
        probe = replace(
            probe,
            sizes=tuple(sorted({0, system.mixture.size})),
            neighbours=(system.mixture.neighbours,),
            taus=(settings.tau,),
            interp_temps=(settings.interp_temp,),
        )
        return system, probe, settings

    # ── datastores ──────────────────────────────────────────────────────────

    @property
    def datastores(self) -> dict[str, int]:
        """Name -> entries."""
        return {name: len(datastore.search) for name, datastore in self._datastores.items()}

    async def change(self, live: Mapping[str, Any]) -> None:
        """Serve other datastores; running requests keep theirs.

        Raises:
            UserError: a datastore is missing, another model's, or smaller than k; then nothing changes.
        """
        folders = validate(TrimeUserConfig, dict(live), "user_config").datastores
        kept = {n: old for n, folder in folders.items() if (old := self._datastores.get(n)) and old.folder == folder}
        new: dict[str, LoadedDatastore] = {}
        try:
            for name, folder in folders.items():
                if name not in kept:
                    new[name] = await asyncio.to_thread(self._open, folder)
        except Exception:
            for loaded in new.values():
                loaded.close()
            raise
        removed = [loaded for name, loaded in self._datastores.items() if name not in kept]
        self._datastores = kept | new
        if removed:  # after all earlier requests
            await asyncio.get_running_loop().run_in_executor(self._thread, lambda: [old.close() for old in removed])

    def _open(self, folder: str) -> LoadedDatastore:
        c, e = self.config, self.experiment.evaluate
        store = open_datastore(folder, self.card)
        check_k(e.neighbours, len(store))
        index = Path(folder).parent / "index"
        options = SearchOptions(self.experiment.index.metric, e.probes, e.rescore, e.oversample)
        stack = ExitStack()
        existing = index if (index / "index.json").exists() else None
        search = stack.enter_context(open_search(store, existing, options, c.search_actors, c.cpus_per_actor))
        return LoadedDatastore(folder, search, stack.close)

    # ── answers ─────────────────────────────────────────────────────────────

    async def score(self, request: TextRequest) -> dict[str, Any]:
        """Each token's log-probability, with the memories and from the vocabulary alone."""
        return await self._answer(self._score, request)

    async def next(self, request: TextRequest) -> dict[str, Any]:
        """The most probable tokens after a text."""
        return await self._answer(self._next, request)

    async def _answer(self, work: Callable[..., dict[str, Any]], request: TextRequest) -> dict[str, Any]:
        """`work(request, search)` in the compute thread, and what it was computed with."""
        name = request.datastore
        if name is not None and name not in self._datastores:
            names = list(self._datastores)
            there = ", ".join(names) or "none"
            raise UnknownDatastore(f"No datastore '{name}'.{nearest(name, names)} There are: {there}.")
        search = None if name is None else self._datastores[name].search
        answer = await asyncio.get_running_loop().run_in_executor(self._thread, work, request, search)
        system = self._systems[search is not None][0].name
        return {"model": self.card.label, "datastore": name, "system": system, **answer}

    def _text(self, words: str) -> Text:
        ids = self.vocabulary.encode(words)
        if not len(ids):
            raise UserError("The text holds no token.")
        if len(ids) > self.config.max_tokens:
            raise UserError(f"The text has {len(ids):,} tokens, this service takes {self.config.max_tokens:,}.")
        first = torch.tensor([self.vocabulary.eos_id])
        return Text(torch.cat([first, torch.from_numpy(ids).long()]).to(self.device))

    def _score(self, request: TextRequest, search: Neighbours | None) -> dict[str, Any]:
        system, probe, settings = self._systems[search is not None]
        text = self._text(request.text)
        statistics = measure(self.model, text, probe, search)
        log_p = token_log_probs(statistics, probe, system.mixture, settings).tolist()
        pieces = self.vocabulary.pieces(text.token_N[1:].tolist())
        rows = zip(pieces, log_p, statistics.log_vocab_N.tolist(), strict=True)
        return {
            "perplexity": math.exp(-sum(log_p) / len(log_p)),
            "tokens": [{"piece": p, "log_prob": lp, "vocabulary_log_prob": lv} for p, lp, lv in rows],
        }

    def _next(self, request: TextRequest, search: Neighbours | None) -> dict[str, Any]:
        system, probe, settings = self._systems[search is not None]
        text = self._text(request.text)
        log_p_V, log_vocab_V = distribution(self.model, text, probe, system.mixture, settings, search)
        p, token = log_p_V.exp().topk(min(request.top, len(log_p_V)))
        pieces = self.vocabulary.pieces(token.tolist())
        rows = zip(pieces, token.tolist(), p.tolist(), log_vocab_V.exp()[token].tolist(), strict=True)
        return {"tokens": [{"piece": s, "id": i, "probability": x, "vocabulary": v} for s, i, x, v in rows]}


class UnknownDatastore(UserError):
    """A request named a datastore that is not served."""


@torch.inference_mode()
def distribution(
    model: MemoryLM, text: Text, probe: Probe, mixture: Mixture, settings: Settings, search: Neighbours | None
) -> tuple[Tensor, Tensor]:
    """log P of every word after the text, with the memories and without: two times `[V]`, float64."""
    longer = Text(torch.cat([text.token_N, text.token_N.new_zeros(1)]))  # its last token is the target, never an input
    *_, batch = walk(model, longer, probe)
    scored = batch[-1]
    log_vocab_NV, log_norm_N = (part.double() for part in model.log_probs(scored.state_NH[-1:]))
    V, size = model.vocabulary_size, probe.sizes.index(mixture.size)
    theta = settings.tau * math.sqrt(model.hidden_size)
    log_p_NV = log_vocab_NV
    near_NM, token_M = scored.similarity_NM[-1:, : scored.ends[size]], longer.token_N[scored.entry_M]
    near = (near_NM.double(), token_M[None, : scored.ends[size]])
    far: tuple[Tensor, Tensor] | None = None
    if mixture.external:
        assert search is not None
        result = search.search(scored.key_NH[-1:].cpu().numpy(), mixture.neighbours)
        similarity_NK = result.similarity_NK.double().masked_fill(result.token_NK < 0, -torch.inf)
        far = similarity_NK.to(near_NM.device), result.token_NK.clamp(min=0).to(near_NM.device)
    if mixture.rule == "gn":
        mass_NV = memory_mass(*near, theta, V)
        if mixture.joined and far is not None:
            mass_NV = torch.logaddexp(mass_NV, memory_mass(*far, theta, V))
        log_p_NV = joint_over_vocabulary(log_vocab_NV, log_norm_N, mass_NV)
    elif mixture.rule == "li":
        log_p_NV = linear_over_vocabulary(log_p_NV, memory_mass(*near, theta, V), settings.weight)
    if mixture.second and far is not None:
        log_p_NV = linear_over_vocabulary(log_p_NV, memory_mass(*far, settings.interp_temp, V), settings.second_weight)
    return log_p_NV[0].cpu(), log_vocab_NV[0].cpu()


def make_api(service: TrimeService) -> FastAPI:
    """The HTTP API."""
    api = FastAPI(title="TRIME", description="Likelihoods and next tokens of a language model with memory.")
    api.add_middleware(Admission)
    handle_errors(api, lambda error: 404 if isinstance(error, UnknownDatastore) else 400)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"ready": True, "model": service.card.label}

    @api.get("/v1/datastores")
    async def datastores() -> dict[str, Any]:
        data = [{"id": name, "entries": entries} for name, entries in service.datastores.items()]
        return {"data": data, **({"refused": service.refused} if service.refused else {})}

    @api.post("/v1/score")
    async def score(request: TextRequest) -> dict[str, Any]:
        return await service.score(request)

    @api.post("/v1/next")
    async def next_tokens(request: TextRequest) -> dict[str, Any]:
        return await service.next(request)

    return api
