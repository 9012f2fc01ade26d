"""A PlugLM model as a service: masked words, classes, and edits of its memory.

A request is answered by one version of the memory, and the response names it. An edit publishes and attaches the next
version; running requests keep theirs, so none is dropped. Knows FastAPI.

Shapes: B texts, T positions, V vocabulary, C classes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable, Mapping
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
from pema_ray.pluglm.model.memory_layer import Retrieved
from pema_ray.pluglm.service.editor_keys import hash_of
from pema_ray.runtime.hardware import compute_thread, set_threads
from pema_ray.runtime.serving.http import Admission, error_body, handle_errors
from pema_ray.runtime.settings import Section, validate

logger = logging.getLogger(__name__)

_MAX_EDITS = 256  # in one request


class PlugLMServiceConfig(Section):
    """Models, memory, editors, and limits of requests."""

    memory: str
    """The memory's folder; the service reads its current version and publishes edits there."""
    fill_mask: str | None = None
    """Folder of a masked language model, which also encodes edits."""
    classifier: str | None = None
    """Folder of a fine-tuned classifier that reads the same memory."""
    editors: tuple[str, ...] = ()
    """SHA-256 of the editors' keys (`pema-ray pluglm edit-key`); empty: no edits."""
    follow_seconds: float = Field(default=2.0, gt=0)
    """Interval between checks for versions that others published."""
    max_texts: int = Field(default=64, ge=1)
    """Texts per request."""
    threads: int = Field(default=1, ge=0)
    """CPU threads of torch."""

    @field_validator("editors")
    @classmethod
    def _are_hashes(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for digits in value:
            if len(digits) != 64 or set(digits) - set("0123456789abcdef"):
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
    """Request of `/v1/fill-mask` and `/v1/classify`."""

    texts: tuple[str, ...] = Field(min_length=1)
    top: int = Field(default=5, ge=1, le=100)
    """Words for each mask, or classes."""
    explain: bool = False
    """Return the entries that each memory layer used."""


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
    """Request of `/v1/memory/edit`; published in order as one version: all edits, or none."""

    edits: tuple[Edit, ...] = Field(min_length=1)
    only_on: int | None = None
    """Edit only if this version is current."""


class Unauthorized(Exception):
    """The key of an editor is missing or wrong."""


class PlugLMService:
    """Models and their memory, behind `make_api`.

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
        self._knowledge: Knowledge | None = None
        self._follow()

    @property
    def version(self) -> int:
        """The memory's version that new requests read."""
        assert self._knowledge is not None
        return self._knowledge.version

    def authorize(self, authorization: str | None) -> None:
        """Raises `Unauthorized` unless this is `Bearer <key>` of an editor."""
        scheme, _, key = (authorization or "").partition(" ")
        hashed = hash_of(key.strip())
        # compare with all of them: the time must not depend on the matching one
        matches = [secrets.compare_digest(hashed, editor) for editor in self.config.editors]
        if scheme.lower() != "bearer" or not any(matches):
            raise Unauthorized

    async def fill_mask(self, request: TextsRequest) -> dict[str, Any]:
        """The most probable words for each mask of each text."""
        return await self._answer("fill-mask", request, _words)

    async def classify(self, request: TextsRequest) -> dict[str, Any]:
        """The most probable classes of each text."""
        return await self._answer("classify", request, _classes)

    async def edit(self, edits: Edits) -> dict[str, Any]:
        """Publish the edits as one version; returns it once new requests read it.

        If it cannot be read here, a `warning` says so: the edits are published, and must not be sent again.

        Raises:
            VersionConflict: `only_on` is not current.
            UserError: an id is unknown, a text is empty, or the memory would be too small. Nothing was published.
        """
        if len(edits.edits) > _MAX_EDITS:
            raise UserError(f"{len(edits.edits)} edits in one request, this service takes {_MAX_EDITS}.")
        async with self._editing:  # one at a time, so that the response names the version of these edits
            memory = await asyncio.to_thread(self._publish, edits)
            response = {"memory": memory.name, "version": memory.version, "entries": len(memory)}
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)
            except Exception as error:
                logger.exception("%s is published, but cannot be read", memory.name)
                response["warning"] = (
                    f"{memory.name} was published with these edits, but this service still answers by version "
                    f"{self.version}: {error}"
                )
        return response

    async def follow(self) -> None:
        """Follow the memory's current version, until cancelled."""
        while True:
            await asyncio.sleep(self.config.follow_seconds)
            try:
                await asyncio.get_running_loop().run_in_executor(self._thread, self._follow)
            except UserError as error:  # requests still read the attached version
                logger.error("%s", error)

    # ── inside ──────────────────────────────────────────────────────────────

    def _follow(self) -> None:
        """Attach the memory's current version to all models, or to none."""
        memory, previous = KnowledgeMemory.open(self.config.memory), self._knowledge
        if previous is not None and previous.version == memory.version:
            return
        knowledge = memory.load()
        try:
            for model, _ in self._models.values():
                model.attach(knowledge)
        except UserError:
            if previous is not None:
                for model, _ in self._models.values():
                    model.attach(previous)
            raise
        self._knowledge = knowledge

    def _publish(self, edits: Edits) -> KnowledgeMemory:
        changes = []
        for edit in edits.edits:
            ids = () if edit.entry_id is None else (edit.entry_id,)
            entries = () if edit.text is None else (NewEntry(edit.text, edit.source, edit.document_id, edit.tags),)
            changes.append(Change(ids, entries))
        least = max(model.config.top_k for model, _ in self._models.values())
        return KnowledgeMemory.open(self.config.memory).edit(changes, self._encoder, edits.only_on, least)

    async def _answer(self, kind: str, request: TextsRequest, results_of: Callable[..., list[Any]]) -> dict[str, Any]:
        if kind not in self._models:
            raise UserError(f"This service has no model for {kind}.")
        if len(request.texts) > self.config.max_texts:
            raise UserError(f"{len(request.texts)} texts in one request, this service takes {self.config.max_texts}.")
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, kind, request, results_of)

    @torch.inference_mode()
    def _compute(self, kind: str, request: TextsRequest, results_of: Callable[..., list[Any]]) -> dict[str, Any]:
        model, tokenizer = self._models[kind]
        inputs = tokenizer(list(request.texts), padding=True, return_tensors="pt")
        max_tokens = model.config.document_positions
        if inputs["input_ids"].shape[1] > max_tokens:
            raise UserError(f"A text has {inputs['input_ids'].shape[1]} tokens, this model reads {max_tokens}.")
        knowledge = self._knowledge  # only this thread changes it
        assert knowledge is not None
        output = model(inputs["input_ids"], inputs["attention_mask"], output_retrieved=request.explain)
        results = results_of(output.logits, inputs["input_ids"], model, tokenizer, request)
        if request.explain:
            memory = KnowledgeMemory.open(self.config.memory, knowledge.version)
            for row, result in enumerate(results):
                result["retrieved"] = [_entries(memory, layer, row) for layer in output.retrieved]
        return {"memory": knowledge.name, "memory_version": knowledge.version, "results": results}


def _words(
    logits_BTV: torch.Tensor, token_BT: torch.Tensor, model: Any, tokenizer: Any, request: TextsRequest
) -> list[dict[str, Any]]:
    results = []
    for row, text in enumerate(request.texts):
        places = (token_BT[row] == tokenizer.mask_token_id).nonzero().flatten().tolist()
        if not places:
            raise UserError(f"Text {row + 1} has no {tokenizer.mask_token}.")
        masks = []
        for place in places:
            top = logits_BTV[row, place].float().softmax(-1).topk(min(request.top, logits_BTV.shape[-1]))
            words = [tokenizer.decode([token]).strip() for token in top.indices.tolist()]
            masks.append([{"token": w, "probability": p} for w, p in zip(words, top.values.tolist())])
        results.append({"text": text, "masks": masks})
    return results


def _classes(
    logits_BC: torch.Tensor, token_BT: torch.Tensor, model: Any, tokenizer: Any, request: TextsRequest
) -> list[dict[str, Any]]:
    if model.config.problem_type == "regression":
        return [{"text": text, "value": value} for text, value in zip(request.texts, logits_BC[:, 0].tolist())]
    top = logits_BC.float().softmax(-1).topk(min(request.top, logits_BC.shape[-1]))
    return [
        {"text": text, "classes": [{"label": model.config.id2label[c], "probability": p} for c, p in zip(*best)]}
        for text, *best in zip(request.texts, top.indices.tolist(), top.values.tolist())
    ]


def _entries(memory: KnowledgeMemory, layer: Retrieved, row: int) -> list[dict[str, Any]]:
    """The entries that a layer used for one text."""
    return [
        {"entry_id": entry.entry_id, "source": entry.source, "text": entry.text, "weight": weight}
        for entry, weight in zip(memory.entries(layer.entry_BK[row].tolist()), layer.weight_BK[row].tolist())
    ]


def make_api(service: PlugLMService) -> FastAPI:
    """The HTTP API."""
    api = FastAPI(title="PlugLM", description="Masked words and classes, with an editable memory.")
    api.add_middleware(Admission)
    handle_errors(api, lambda error: 409 if isinstance(error, VersionConflict) else 400)

    @api.exception_handler(Unauthorized)
    async def unauthorized(request: Request, error: Unauthorized) -> JSONResponse:
        message = "Edits need an editor's key: Authorization: Bearer pluglm-…"
        return JSONResponse(error_body(message, "authentication_error"), 401)

    @api.get("/healthz")
    async def healthz() -> dict[str, Any]:
        return {"ready": True, "memory_version": service.version}

    @api.post("/v1/fill-mask")
    async def fill_mask(texts: TextsRequest) -> dict[str, Any]:
        return await service.fill_mask(texts)

    @api.post("/v1/classify")
    async def classify(texts: TextsRequest) -> dict[str, Any]:
        return await service.classify(texts)

    @api.post("/v1/memory/edit")
    async def edit(request: Request, authorization: str | None = Header(default=None)) -> JSONResponse:
        service.authorize(authorization)  # before the body is read
        try:
            body = await request.json()
        except ValueError as error:
            raise UserError(f"The body is no JSON: {error}.") from None
        response = await service.edit(validate(Edits, body, "edit"))
        return JSONResponse(response, 202 if "warning" in response else 200)

    return api
