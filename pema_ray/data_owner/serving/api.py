"""The API that users call: OpenAI's completions and chat, and what is this project's own, over an `Unroller`.

Models are adapters by name, and the PLM alone under its own name.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
import uuid
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from pathlib import Path
from typing import Any, Protocol

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from pema_ray.data_owner.serving.doorkeeper import Doorkeeper
from pema_ray.data_owner.serving.orders import Explained, GivenUp, Order, Token
from pema_ray.data_owner.serving.protocol import ChatRequest, CompletionRequest, error_body
from pema_ray.data_owner.serving.service import PromptTemplate
from pema_ray.data_owner.serving.unroller import Unroller
from pema_ray.data_owner.unrolling import UnrollingSchedule
from pema_ray.errors import UserError, nearest
from pema_ray.line import ModelCard
from pema_ray.line.stepping import Busy

_PLAYGROUND = Path(__file__).with_name("playground.html")
_MOST_ORDERS = 64  # answers to one request
_MOST_BYTES = 2 * 2**20  # of a request


class Service(Protocol):
    """What the API needs of the deployment that it belongs to."""

    unroller: Unroller
    card: ModelCard
    tokenizer: Any
    schedule: UnrollingSchedule
    max_tokens: int
    """Of a prompt and its answer together."""
    timeout_seconds: float
    draft: int
    started: int
    reading: ThreadPoolExecutor
    """Of one thread: tokenizers do not like company."""
    refused: str | None
    """Why the last change of adapters was not made, if it was not."""

    @property
    def ready(self) -> bool: ...

    @property
    def prompts(self) -> Mapping[str, PromptTemplate]: ...


def make_api(service: Service) -> FastAPI:
    """The application; `service` may still be starting when it is made."""
    api = FastAPI(title="pema-ray", description="A data owner's service: PEMA by Gradual Unrolling.", docs_url="/docs")
    _errors(api)
    api.add_middleware(Doorkeeper, most_bytes=_MOST_BYTES, count=lambda name: _count(service, name))

    @api.get("/v1/models")
    async def models() -> dict[str, Any]:
        """Adapters, and the PLM alone."""
        return {"object": "list", "data": [_model(service, name) for name in _names(service)]}

    @api.get("/v1/models/{name:path}")
    async def model(name: str) -> Any:
        """One of them."""
        _adapter(service, name)
        return _model(service, name)

    @api.post("/v1/completions")
    async def completions(asked: CompletionRequest) -> Any:
        """Continue texts."""
        return await _answer(service, await _read(service, _Completion, asked))

    @api.post("/v1/chat/completions")
    async def chat(asked: ChatRequest) -> Any:
        """Answer a conversation."""
        return await _answer(service, await _read(service, _Chat, asked))

    @api.get("/playground", response_class=HTMLResponse)
    async def playground() -> str:
        """A page to try adapters on: tokens as they come, coloured by who decided."""
        return _PLAYGROUND.read_text(encoding="utf-8")

    @api.get("/playground/models")
    async def playground_models() -> dict[str, Any]:
        """Adapters that can be asked by a source alone, and what λ is by default."""
        asked = [name for name in service.unroller.adapters if name in service.prompts]
        return {"models": asked, "lambda_max": service.schedule.lambda_max, "schedule": service.schedule.kind}

    @api.get("/healthz")
    async def health() -> Any:
        """Whether answers can be made."""
        state = {"live": service.unroller.live, **service.unroller.counts} if service.ready else {}
        state |= {"refused": service.refused} if service.refused else {}
        return JSONResponse({"ready": service.ready, **state}, 200 if service.ready else 503)

    return api


# ── requests of both kinds ──────────────────────────────────────────────────────


class _Form:
    """How one kind of request is read and answered."""

    object: str
    prefix: str

    def __init__(self, service: Service, asked: CompletionRequest | ChatRequest) -> None:
        self.service, self.asked = service, asked
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.prompts = self._prompts()

    def _prompts(self) -> list[list[int]]:
        raise NotImplementedError

    @property
    def stops(self) -> tuple[str, ...]:
        return self.asked.stops

    @property
    def most_tokens(self) -> int | None:
        raise NotImplementedError

    @property
    def top(self) -> int | None:
        """Most probable tokens wanted with each; none: no log-probabilities at all."""
        raise NotImplementedError

    def whole(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        raise NotImplementedError

    def piece(self, index: int, token: Token, first: bool, before: str) -> dict[str, Any]:
        raise NotImplementedError

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = f"{self.object}.chunk" if chunk and self.object == "chat.completion" else self.object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def orders(self) -> list[Order]:
        """`n` answers to every prompt."""
        asked, service = self.asked, self.service
        adapter, schedule = _adapter(service, asked.model), asked.unrolling(service.schedule)
        decoding = asked.decoding(default_seed=random.getrandbits(62))
        orders: list[Order] = []
        if len(self.prompts) * asked.n > _MOST_ORDERS:
            raise HTTPException(400, f"{len(self.prompts)} prompts and n={asked.n}: at most {_MOST_ORDERS} answers.")
        for prompt in self.prompts:
            room = service.max_tokens - len(prompt)
            most = room if self.most_tokens is None else self.most_tokens
            if not prompt or most < 1 or most > room:
                raise HTTPException(
                    400,
                    f"The prompt has {len(prompt)} tokens and {max(most, 0)} more are asked for; prompt and answer "
                    f"together may have {service.max_tokens}." if prompt else "The prompt is empty.",
                )  # fmt: skip
            orders += [
                Order(
                    prompt=prompt,
                    max_new_tokens=most,
                    schedule=schedule,
                    adapter=adapter,
                    length=asked.length or most,
                    decoding=decoding,
                    stop=self.stops,
                    top=self.top or 0,
                    explain=asked.explain,
                    draft=service.draft if asked.draft is None else asked.draft,
                    seed_stream=len(orders) + k,
                )
                for k in range(asked.n)
            ]
        return orders

    def usage(self, answers: Sequence[list[Token]]) -> dict[str, int]:
        prompt, answered = sum(map(len, self.prompts)), sum(map(len, answers))
        return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}

    def text_of(self, token: int) -> str:
        return self.service.tokenizer.decode([token])


class _Completion(_Form):
    object, prefix = "text_completion", "cmpl"
    asked: CompletionRequest

    def _prompts(self) -> list[list[int]]:
        if self.asked.source is not None:
            template = self._template()
            text = template.text.replace("{source}", self.asked.source)
            return [self.service.tokenizer(text, add_special_tokens=template.special_tokens).input_ids]
        return [
            _encode(self.service, p) if isinstance(p, str) else _checked(self.service, p) for p in self.asked.prompts
        ]

    def _template(self) -> PromptTemplate:
        template = self.service.prompts.get(self.asked.model)
        if template is None:
            raise HTTPException(400, f"'{self.asked.model}' does not say how it is asked: give a whole prompt.")
        return template

    @property
    def stops(self) -> tuple[str, ...]:
        return self.asked.stops + (self._template().stop if self.asked.source is not None else ())

    @property
    def most_tokens(self) -> int | None:
        return self.asked.max_tokens

    @property
    def top(self) -> int | None:
        return self.asked.logprobs

    def whole(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        text = "".join(token.text for token in tokens)
        return self._choice(index, text, tokens, tokens[-1].finish, "")

    def piece(self, index: int, token: Token, first: bool, before: str) -> dict[str, Any]:
        return self._choice(index, token.text, [token], token.finish, before)

    def _choice(self, index: int, text: str, tokens: list[Token], finish: str | None, before: str) -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": _reason(finish), "logprobs": None}
        if self.top is not None:
            told = [self.text_of(token.id) for token in tokens]
            offset = [len(before) + sum(map(len, told[:i])) for i in range(len(told))]
            choice["logprobs"] = {
                "tokens": told,
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": [
                    {self.text_of(i): p for i, p in reversed(token.top)}
                    for token in tokens  # the likelier of two alike
                ],
                "text_offset": offset,
            }
        return choice | _explanation(self, tokens)


class _Chat(_Form):
    object, prefix = "chat.completion", "chatcmpl"
    asked: ChatRequest

    def _prompts(self) -> list[list[int]]:
        tokenizer = self.service.tokenizer
        if not tokenizer.chat_template:
            raise HTTPException(400, f"{self.service.card.name} has no chat template; use /v1/completions.")
        said = [{"role": m.role if m.role != "developer" else "system", "content": m.text} for m in self.asked.messages]
        try:
            text = tokenizer.apply_chat_template(said, add_generation_prompt=True, tokenize=False)
        except Exception as error:  # templates refuse what they were not written for, in exceptions of their own
            raise HTTPException(400, f"The chat template refuses these messages: {error}") from None
        return [tokenizer(text, add_special_tokens=False).input_ids]

    @property
    def most_tokens(self) -> int | None:
        return self.asked.most_tokens

    @property
    def top(self) -> int | None:
        return (self.asked.top_logprobs or 0) if self.asked.logprobs else None

    def whole(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        message = {"role": "assistant", "content": "".join(token.text for token in tokens), "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": _reason(tokens[-1].finish)}
        return choice | {"logprobs": self._logprobs(tokens)} | _explanation(self, tokens)

    def piece(self, index: int, token: Token, first: bool, before: str) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": token.text}
        choice = {"index": index, "delta": delta, "finish_reason": _reason(token.finish)}
        return choice | {"logprobs": self._logprobs([token])} | _explanation(self, [token])

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.top is None:
            return None
        return {
            "content": [
                self._one(token.id, token.log_prob) | {"top_logprobs": [self._one(i, p) for i, p in token.top]}
                for token in tokens
            ],
            "refusal": None,
        }

    def _one(self, token: int, log_prob: float) -> dict[str, Any]:
        text = self.text_of(token)
        return {"token": text, "logprob": log_prob, "bytes": list(text.encode())}


async def _read(service: Service, kind: type[_Form], asked: Any) -> _Form:
    """The request's prompts as tokens; streams go on meanwhile."""
    return await asyncio.get_running_loop().run_in_executor(service.reading, kind, service, asked)


async def _answer(service: Service, form: _Form) -> Any:
    orders = form.orders()
    if form.asked.stream:
        stream = _streamed(service, form, orders)
        first = await anext(stream)  # what is wrong from the start is told with a status of its own
        return StreamingResponse(_prepended(first, stream), media_type="text/event-stream")

    async def one(order: Order) -> list[Token]:
        async with aclosing(service.unroller.answer(order, service.timeout_seconds)) as answer:
            return [token async for token in answer]

    tasks = [asyncio.create_task(one(order)) for order in orders]
    try:
        answers = await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
    choices = [form.whole(index, tokens) for index, tokens in enumerate(answers)]
    return JSONResponse({**form.head(chunk=False), "choices": choices, "usage": form.usage(answers)})


async def _prepended(first: str, rest: AsyncIterator[str]) -> AsyncIterator[str]:
    try:
        yield first
        async for event in rest:
            yield event
    finally:
        await rest.aclose()  # type: ignore[attr-defined]


async def _streamed(service: Service, form: _Form, orders: Sequence[Order]) -> AsyncIterator[str]:
    """Server-sent events; whoever listens no more ends all its answers."""
    queue: asyncio.Queue[tuple[int, Token | Exception]] = asyncio.Queue()
    answers: list[list[Token]] = [[] for _ in orders]

    async def follow(index: int, order: Order) -> None:
        try:
            async with aclosing(service.unroller.answer(order, service.timeout_seconds)) as answer:
                async for token in answer:
                    queue.put_nowait((index, token))
        except Exception as error:
            queue.put_nowait((index, error))

    tasks = [asyncio.create_task(follow(index, order)) for index, order in enumerate(orders)]
    texts, left = [""] * len(orders), len(orders)
    began = False
    try:
        while left:
            index, token = await queue.get()
            if isinstance(token, Exception):
                if not began:
                    raise token
                yield _event(error_body(_words(token), "server_error"))
                return
            began = True
            piece = form.piece(index, token, not answers[index], texts[index])
            answers[index].append(token)
            texts[index] += token.text
            yield _event({**form.head(chunk=True), "choices": [piece]})
            left -= token.finish is not None
        if form.asked.tells_usage:
            yield _event({**form.head(chunk=True), "choices": [], "usage": form.usage(answers)})
        yield "data: [DONE]\n\n"
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _count(service: Service, name: str) -> None:
    if service.ready:
        service.unroller.counts[name] += 1


def _event(data: dict[str, Any]) -> str:
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


def _reason(finish: str | None) -> str | None:
    return {"eos": "stop", "stop": "stop", "length": "length"}.get(finish or "")


def _explanation(form: _Form, tokens: Sequence[Token]) -> dict[str, Any]:
    """`explain`: one entry a token, beside OpenAI's own fields."""
    if not form.asked.explain:
        return {}

    def one(token: Token, e: Explained) -> dict[str, Any]:
        def named(top: list[tuple[int, float]]) -> list[dict[str, Any]]:
            return [{"token": form.text_of(i), "logprob": p} for i, p in top]

        return {
            "token": form.text_of(token.id),
            "lambda": e.lam,
            "logprob_pema": e.log_pema,
            "logprob_plm": e.log_plm,
            "decided_by": e.decided_by,
            "top_pema": named(e.top_pema),
            "top_plm": named(e.top_plm),
        }

    return {"explanation": [one(token, token.explained) for token in tokens if token.explained is not None]}


# ── models and texts ────────────────────────────────────────────────────────────


def _names(service: Service) -> list[str]:
    return [*service.unroller.adapters, service.card.name]


def _model(service: Service, name: str) -> dict[str, Any]:
    owner = "plm-owner" if name == service.card.name else "data-owner"
    return {"id": name, "object": "model", "created": service.started, "owned_by": owner}


def _adapter(service: Service, name: str) -> str | None:
    if name in service.unroller.adapters:
        return name
    if name == service.card.name:
        return None
    known = _names(service)
    raise HTTPException(404, f"There is no model '{name}'; there are {', '.join(known)}.{nearest(name, known)}")


def _encode(service: Service, text: str) -> list[int]:
    return service.tokenizer(text).input_ids


def _checked(service: Service, ids: Sequence[int]) -> list[int]:
    wrong = next((i for i in ids if not 0 <= i < service.card.vocab_size), None)
    if wrong is not None:
        raise HTTPException(400, f"{wrong} is no token of {service.card.name}, which has {service.card.vocab_size}.")
    return list(ids)


# ── errors ──────────────────────────────────────────────────────────────────────


def _words(error: Exception) -> str:
    if isinstance(error, UserError | GivenUp | Busy):
        return str(error)
    return f"{type(error).__name__} while the answer was made"


def _errors(api: FastAPI) -> None:
    @api.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"] if part not in ("body", "str", "list[str]"))
        return JSONResponse(error_body(f"{where}: {first['msg']}" if where else first["msg"]), 400)

    @api.exception_handler(HTTPException)
    async def told(_: Request, error: HTTPException) -> JSONResponse:
        code = "model_not_found" if error.status_code == 404 else None
        return JSONResponse(error_body(str(error.detail), code=code), error.status_code)

    @api.exception_handler(UserError)
    async def refused(_: Request, error: UserError) -> JSONResponse:
        return JSONResponse(error_body(str(error)), 400)

    @api.exception_handler(GivenUp)
    @api.exception_handler(Busy)
    async def busy(_: Request, error: Exception) -> JSONResponse:
        after = str(max(1, round(getattr(error, "retry_after", 1.0))))
        return JSONResponse(error_body(_words(error), "server_error"), 503, headers={"Retry-After": after})
