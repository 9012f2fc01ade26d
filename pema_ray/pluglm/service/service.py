"""A PlugLM model as a service: masked words, classes, and edits of the memory they are read from.

A request is answered by one version of the memory, which its answer names. An edit publishes the next version and
attaches it; requests under way keep theirs, so that none is dropped. Knows FastAPI.

Shapes: B texts, T positions, V vocabulary, C classes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from fastapi import FastAPI, Header, Request
from fastapi.responses import JSONResponse
from pydantic import Field, field_validator, model_validator

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.editing import Change
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.versions import VersionConflict
from pema_ray.pluglm.model.heads import PlugLMForSequenceClassification
from pema_ray.pluglm.model.knowledge import Knowledge
from pema_ray.pluglm.model.loading import load_pluglm
from pema_ray.pluglm.service.editor_keys import hash_of
from pema_ray.runtime.hardware import compute_thread, set_threads
from pema_ray.runtime.serving.http import Admission, error_body, handle_errors
from pema_ray.runtime.settings import Section, validate

logger = logging.getLogger(__name__)


class PlugLMServiceConfig(Section):
    """What is served, who may edit, and how large requests may be."""

    memory: str
    """The memory's folder; its current version is read, and edits publish there."""
    fill_mask: str | None = None
    """Folder of a masked language model, which also encodes edits."""
    classifier: str | None = None
    """Folder of a fine-tuned classifier that reads the same memory."""
    editors: tuple[str, ...] = ()
    """SHA-256 of the keys that may edit (`pema-ray pluglm edit-key`); none: nobody may."""
    follow_seconds: float = Field(default=2.0, gt=0)
    """How often the memory is looked at for versions that others published."""
    max_texts: int = Field(default=64, ge=1)
    """Of a request."""
    max_edits: int = Field(default=256, ge=1)
    """Of a request."""
    threads: int = Field(default=1, ge=0)
    """CPU threads of torch."""

    @field_validator("editors")
    @classmethod
    def _are_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for one in value:
            if len(one) != 64 or set(one) - set("0123456789abcdef"):
                raise ValueError("64 hexadecimal digits are expected, as `pema-ray pluglm edit-key` prints them")
        return value

    @model_validator(mode="after")
    def _serves_something(self) -> PlugLMServiceConfig:
        if self.fill_mask is None and self.classifier is None:
            raise ValueError("give fill_mask or classifier, the folder of a model")
        if self.editors and self.fill_mask is None:
            raise ValueError("edits need fill_mask: its knowledge encoder writes them")
        return self


class TextsRequest(Section):
    """Of `/v1/fill-mask` and `/v1/classify`."""

    texts: tuple[str, ...] = Field(min_length=1)
    top: int = Field(default=5, ge=1, le=100)
    """Words for each mask, or classes."""
    explain: bool = False
    """Tell which entries each memory layer used."""


class Edit(Section):
    """One change of the memory."""

    action: Literal["add", "replace", "delete"]
    entry_id: int | None = None
    """Of `replace` and `delete`."""
    text: str | None = None
    """Of `add` and `replace`."""
    source: str = ""
    document_id: str = ""
    tags: tuple[str, ...] = ()

    @model_validator(mode="after")
    def _is_whole(self) -> Edit:
        if (self.entry_id is None) != (self.action == "add"):
            raise ValueError(f"'{self.action}' {'takes no' if self.action == 'add' else 'needs an'} entry_id")
        if (self.text is None) != (self.action == "delete"):
            raise ValueError(f"'{self.action}' {'takes no' if self.action == 'delete' else 'needs a'} text")
        return self


class Edits(Section):
    """Of `/v1/memory/edit`; done in order and published as one version: all of them, or none."""

    edits: tuple[Edit, ...] = Field(min_length=1)
    only_on: int | None = None
    """Edit only if this version is current."""


class Unauthorized(Exception):
    """No key, or one that may not edit."""


class PlugLMService:
    """What the API stands on.

    Raises:
        UserError: a model or the memory cannot be read, or they do not belong together.
        StaleKeys: the memory was made by another encoder.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.config = c = validate(PlugLMServiceConfig, dict(config), "service")
        self._thread = compute_thread()
        self._thread.submit(set_threads, c.threads).result()
        self._models: dict[str, tuple[Any, Any]] = {}
        if c.fill_mask is not None:
            self._models["fill-mask"] = load_pluglm(c.fill_mask)
        if c.classifier is not None:
            self._models["classify"] = load_pluglm(c.classifier, PlugLMForSequenceClassification)
        self._encoder = None
        if c.fill_mask is not None:
            self._encoder = DocumentEncoder(*self._models["fill-mask"], name=Path(c.fill_mask).resolve().name)
        self._editing = asyncio.Lock()
        self._held: Knowledge
        self._follow()

    @property
    def version(self) -> int:
        """Of the memory that new requests read."""
        return self._held.version

    def authorize(self, authorization: str | None) -> None:
        """Raises `Unauthorized` unless this is `Bearer <key>` of an editor."""
        scheme, _, key = (authorization or "").partition(" ")
        hashed = hash_of(key.strip())
        # all of them, so that time tells nothing
        known = [secrets.compare_digest(hashed, one) for one in self.config.editors]
        if scheme.lower() != "bearer" or not any(known):
            raise Unauthorized

    async def fill_mask(self, ask: TextsRequest) -> dict[str, Any]:
        """The most probable words for each mask of each text."""
        return await self._answered("fill-mask", ask, self._words)

    async def classify(self, ask: TextsRequest) -> dict[str, Any]:
        """The most probable classes of each text."""
        return await self._answered("classify", ask, self._classes)

    async def edit(self, edits: Edits) -> dict[str, Any]:
        """Publish the edits as one version and read from it; returns it once new requests are answered by it.

        If it cannot be read here, that is a `warning` beside it: the edits are made, and must not be made again.

        Raises:
            VersionConflict: `only_on` is not current.
            UserError: an entry is not there, a text is empty, or the memory would be too small. Nothing was published.
        """
        if len(edits.edits) > self.config.max_edits:
            raise UserError(f"{len(edits.edits)} edits in one request, this service takes {self.config.max_edits}.")
        async with self._editing:  # one after the other, so that the answer names the version of these edits
            memory = await asyncio.to_thread(self._publish, edits)
            made = {"memory": memory.name, "version": memory.version, "entries": len(memory)}
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)
            except Exception as error:
                logger.exception("%s is published, but cannot be read", memory.name)
                made["warning"] = (
                    f"{memory.name} was published with these edits, but this service goes on answering by version "
                    f"{self.version}: {error}"
                )
        return made

    async def follow(self) -> None:
        """Read the current version for ever, whoever published it."""
        while True:
            await asyncio.sleep(self.config.follow_seconds)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)
            except UserError as error:  # requests go on with the version that is held
                logger.error("%s", error)

    # ── inside ──────────────────────────────────────────────────────────────

    def _follow(self) -> None:
        memory = KnowledgeMemory.open(self.config.memory)
        if getattr(self, "_held", None) is not None and self._held.version == memory.version:
            return
        held, before = memory.load(), getattr(self, "_held", None)
        try:
            for model, _ in self._models.values():
                model.attach(held)
        except UserError:
            if before is not None:  # all of them go on with the version that answers name
                for model, _ in self._models.values():
                    model.attach(before)
            raise
        self._held = held

    def _publish(self, edits: Edits) -> KnowledgeMemory:
        changes = []
        for one in edits.edits:
            ids = () if one.entry_id is None else (one.entry_id,)
            entries = () if one.text is None else (NewEntry(one.text, one.source, one.document_id, one.tags),)
            changes.append(Change(ids, entries))
        least = max(model.config.top_k for model, _ in self._models.values())
        return KnowledgeMemory.open(self.config.memory).edit(changes, self._encoder, edits.only_on, least)

    async def _answered(self, kind: str, ask: TextsRequest, answers: Callable[..., list[Any]]) -> dict[str, Any]:
        if kind not in self._models:
            raise UserError(f"This service has no model for {kind}.")
        if len(ask.texts) > self.config.max_texts:
            raise UserError(f"{len(ask.texts)} texts in one request, this service takes {self.config.max_texts}.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, kind, ask, answers)

    @torch.inference_mode()
    def _compute(self, kind: str, ask: TextsRequest, answers: Callable[..., list[Any]]) -> dict[str, Any]:
        model, tokenizer = self._models[kind]
        inputs = tokenizer(list(ask.texts), padding=True, return_tensors="pt")
        most = model.config.document_positions
        if inputs["input_ids"].shape[1] > most:
            raise UserError(f"A text has {inputs['input_ids'].shape[1]} tokens, this model reads {most}.")
        held = self._held  # attached, and changed by this thread alone
        output = model(inputs["input_ids"], inputs["attention_mask"], output_retrieved=ask.explain)
        results = answers(output.logits, inputs["input_ids"], model, tokenizer, ask)
        if ask.explain:
            for row, result in enumerate(results):
                result["retrieved"] = self._retrieved(output.retrieved, row)
        return {"memory": held.name, "memory_version": held.version, "results": results}

    def _words(
        self, logits_BTV: torch.Tensor, token_BT: torch.Tensor, model: Any, tokenizer: Any, ask: TextsRequest
    ) -> list[dict[str, Any]]:
        found = []
        for row, text in enumerate(ask.texts):
            places = (token_BT[row] == tokenizer.mask_token_id).nonzero().flatten().tolist()
            if not places:
                raise UserError(f"Text {row + 1} has no {tokenizer.mask_token}.")
            masks = []
            for place in places:
                top = logits_BTV[row, place].float().softmax(-1).topk(min(ask.top, logits_BTV.shape[-1]))
                words = [tokenizer.decode([token]).strip() for token in top.indices.tolist()]
                masks.append([{"token": w, "probability": p} for w, p in zip(words, top.values.tolist())])
            found.append({"text": text, "masks": masks})
        return found

    def _classes(
        self, logits_BC: torch.Tensor, token_BT: torch.Tensor, model: Any, tokenizer: Any, ask: TextsRequest
    ) -> list[dict[str, Any]]:
        if model.config.problem_type == "regression":
            return [{"text": text, "value": float(one)} for text, one in zip(ask.texts, logits_BC[:, 0])]
        top = logits_BC.float().softmax(-1).topk(min(ask.top, logits_BC.shape[-1]))
        return [
            {"text": text, "classes": [{"label": model.config.id2label[c], "probability": p} for c, p in zip(*one)]}
            for text, *one in zip(ask.texts, top.indices.tolist(), top.values.tolist())
        ]

    def _retrieved(self, retrieved: Sequence[Any], row: int) -> list[list[dict[str, Any]]]:
        memory = KnowledgeMemory.open(self.config.memory, self._held.version)
        layers = []
        for layer in retrieved:
            ids, weights = layer.entry_BK[row].tolist(), layer.weight_BK[row].tolist()
            layers.append(
                [
                    {"entry_id": one.entry_id, "source": one.source, "text": one.text, "weight": weight}
                    for one, weight in zip(memory.entries(ids), weights)
                ]
            )
        return layers


def make_api(service: PlugLMService) -> FastAPI:
    """The HTTP API."""
    api = FastAPI(title="PlugLM", description="Masked words and classes, read from a memory that may be edited.")
    api.add_middleware(Admission)
    handle_errors(api, lambda error: 409 if isinstance(error, VersionConflict) else 400)

    @api.exception_handler(Unauthorized)
    async def unauthorized(request: Request, error: Unauthorized) -> JSONResponse:
        message = "A key of an editor is needed: Authorization: Bearer pluglm-…"
        return JSONResponse(error_body(message, "authentication_error"), 401)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"ready": True, "memory_version": service.version}

    @api.post("/v1/fill-mask")
    async def fill_mask(ask: TextsRequest) -> dict[str, Any]:
        return await service.fill_mask(ask)

    @api.post("/v1/classify")
    async def classify(ask: TextsRequest) -> dict[str, Any]:
        return await service.classify(ask)

    @api.post("/v1/memory/edit")
    async def edit(request: Request, authorization: str | None = Header(default=None)) -> JSONResponse:
        service.authorize(authorization)  # before the body is looked at
        try:
            body = await request.json()
        except ValueError as error:
            raise UserError(f"The body is no JSON: {error}.") from None
        made = await service.edit(validate(Edits, body, "edit"))
        return JSONResponse(made, 202 if "warning" in made else 200)

    return api
