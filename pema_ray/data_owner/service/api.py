"""The users' API over the decoder: OpenAI's completions and chat, with this project's own parameters.

Models are the adapters, by name, and the PLM alone under its own name.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path
from typing import Any, get_args

from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse

from pema_ray.data_owner.config import ScheduleKind
from pema_ray.data_owner.decoding import GenerationAborted, GenerationRequest, Token
from pema_ray.data_owner.service.forms import Chat, Completion, Form, adapter_named, model_names
from pema_ray.data_owner.service.protocol import ChatRequest, CompletionRequest
from pema_ray.data_owner.service.service import DataOwner
from pema_ray.errors import UserError
from pema_ray.line import Busy
from pema_ray.runtime.serving.http import Admission, error_body, handle_errors

_PLAYGROUND = Path(__file__).with_name("playground.html")
_MAX_BYTES = 2 * 2**20  # per request


def make_api(service: DataOwner) -> FastAPI:
    """The application; `service` may still be starting."""
    api = FastAPI(title="pema-ray", description="A data owner's service: PEMA by Gradual Unrolling.", docs_url="/docs")
    _handle_errors(api)
    api.add_middleware(Admission, max_bytes=_MAX_BYTES, count=lambda name: _count(service, name))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Adapters, and the PLM alone."""
        return {"object": "list", "data": [_model(service, name) for name in model_names(service)]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        """One model."""
        adapter_named(service, name)
        return _model(service, name)

    @api.post("/v1/completions")
    async def completions(body: CompletionRequest) -> Any:
        """Continue texts."""
        return await _answer(service, await _tokenized(service, Completion, body))

    @api.post("/v1/chat/completions")
    async def chat(body: ChatRequest) -> Any:
        """Answer a conversation."""
        return await _answer(service, await _tokenized(service, Chat, body))

    @api.get("/playground", response_class=HTMLResponse)
    async def playground() -> str:
        """A page to try adapters: streamed tokens, coloured by the distribution that chose them."""
        return _PLAYGROUND.read_text(encoding="utf-8")

    @api.get("/playground/models")
    async def playground_models() -> dict[str, Any]:
        """Adapters that accept a source text, and their default λ."""
        schedules = {name: builder.schedule for name, builder in service.builders.items()}
        default = next(iter(schedules.values()), service.schedule)
        return {
            "models": list(schedules), "lambda_max": default.lambda_max, "schedule": default.kind,
            "schedules": get_args(ScheduleKind),
        }  # fmt: skip

    @api.get("/healthz")
    async def health() -> Any:
        """Whether requests can be answered."""
        state = {"live": service.decoder.live, **service.decoder.counts} if service.ready else {}
        state |= {"rejected": service.rejected} if service.rejected else {}
        return JSONResponse({"ready": service.ready, **state}, 200 if service.ready else 503)

    return api


async def _tokenized(service: DataOwner, kind: type[Form], body: Any) -> Form:
    """The tokenized request; runs in a thread, so that streams continue meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(service.tokenizing, kind, service, body)


async def _answer(service: DataOwner, form: Form) -> Any:
    if form.body.stream:
        stream = _streamed(service, form)
        first = await anext(stream)  # an error before the first token sets the response's status
        return StreamingResponse(_prepended(first, stream), media_type="text/event-stream")

    answers = [a.tokens for a in await service.decoder.generate(form.requests, service.timeout_seconds)]
    choices = [form.full_choice(index, tokens) for index, tokens in enumerate(answers)]
    return JSONResponse({**form.head(chunk=False), "choices": choices, "usage": form.usage(answers)})


async def _prepended(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def _streamed(service: DataOwner, form: Form) -> AsyncIterator[str]:
    """Server-sent events; ends all answers when the client disconnects."""
    queue: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()

    async def follow(index: int, request: GenerationRequest) -> None:
        try:
            async with aclosing(service.decoder.answer(request, service.timeout_seconds)) as answer:
                async for token in answer:
                    queue.put_nowait((index, token))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(index, request)) for index, request in enumerate(form.requests)]
    answers: list[list[Token]] = [[] for _ in tasks]
    texts, unfinished, started = [""] * len(tasks), len(tasks), False
    try:
        while unfinished:
            index, token = await queue.get()
            if isinstance(token, Exception):
                if not started:
                    raise token
                yield _event(error_body(_message(token), "server_error"))
                return
            started = True
            first = not answers[index]
            answers[index].append(token)
            text = token.text if form.streams_text else form.text(answers[index]) if token.finish else ""
            piece = form.chunk_choice(index, token, text, first, texts[index])
            texts[index] += text
            yield _event({**form.head(chunk=True), "choices": [piece]})
            unfinished -= token.finish is not None
        if form.body.reports_usage:
            yield _event({**form.head(chunk=True), "choices": [], "usage": form.usage(answers)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _count(service: DataOwner, name: str) -> None:
    if service.ready:
        service.decoder.counts[name] += 1


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _model(service: DataOwner, name: str) -> dict[str, Any]:
    owner = "plm-owner" if name == service.card.name else "data-owner"
    return {"id": name, "object": "model", "created": service.started, "owned_by": owner}


def _message(error: Exception) -> str:
    if isinstance(error, UserError | GenerationAborted | Busy):
        return str(error)
    return f"{type(error).__name__} while the answer was generated"


def _handle_errors(api: FastAPI) -> None:
    handle_errors(api, not_found="model_not_found")

    @api.exception_handler(GenerationAborted)
    @api.exception_handler(Busy)
    async def busy(_: Request, error: Exception) -> JSONResponse:
        seconds = str(max(1, round(getattr(error, "retry_after", 1.0))))
        return JSONResponse(error_body(_message(error), "server_error"), 503, headers={"Retry-After": seconds})
