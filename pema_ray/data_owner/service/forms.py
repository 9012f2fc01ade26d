"""Turns the API's two kinds of request into generation requests, and tokens into OpenAI's answers."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from starlette.exceptions import HTTPException

from pema_ray.data_owner.decoding import Attribution, GenerationRequest, Token
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.data_owner.service.protocol import ChatRequest, CompletionRequest
from pema_ray.data_owner.service.service import DataOwner
from pema_ray.errors import nearest

_MAX_ANSWERS = 64  # per request
_EXPLAINED_ALTERNATIVES = 5  # most probable tokens of each distribution


class Form:
    """One tokenised request, and the format of its answer."""

    object: str
    prefix: str

    def __init__(self, service: DataOwner, body: CompletionRequest | ChatRequest) -> None:
        self.service, self.body = service, body
        self.prompts: list[list[int]] = []
        self.id, self.created = f"{self.prefix}-{uuid.uuid4().hex}", int(time.time())
        self.adapter = adapter_named(service, body.model)
        self.builder = service.builders.get(body.model)
        self.requests = self._requests()

    # ── requests ────────────────────────────────────────────────────────────

    def _prompts(self) -> list[list[int]]:
        raise NotImplementedError

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end an answer, besides the PLM's own."""
        return ()

    def _requests(self) -> list[GenerationRequest]:
        """`n` answers to every prompt."""
        self.prompts = prompts = self._prompts()
        body = self.body
        if len(prompts) * body.n > _MAX_ANSWERS:
            raise HTTPException(400, f"{len(prompts)} prompts and n={body.n}: at most {_MAX_ANSWERS} answers.")
        sampling = body.sampling(random.getrandbits(62))
        requests: list[GenerationRequest] = []
        for prompt in prompts:
            limit = self._answer_limit(prompt, body.answer_limit)
            requests += [
                GenerationRequest(
                    prompt=prompt,
                    max_new_tokens=limit,
                    schedule=self.schedule,
                    adapter=self.adapter,
                    length=body.length or limit,
                    sampling=sampling,
                    stop=body.stops,
                    eos=self.eos,
                    stream=len(requests) + k,
                    **self._shared_fields(),
                )
                for k in range(body.n)
            ]
        return requests

    def _shared_fields(self) -> dict[str, Any]:
        body, top = self.body, self.body.top or 0
        return {
            "top": max(top, _EXPLAINED_ALTERNATIVES) if body.explain else top,
            "explain": body.explain,
            "draft": self.service.draft if body.draft is None else body.draft,
        }

    @property
    def schedule(self) -> UnrollingSchedule:
        """λ: the request's, else the adapter's task's, else the service's."""
        return self.body.unrolling(self.service.schedule if self.builder is None else self.builder.schedule)

    def _answer_limit(self, prompt: Sequence[int], limit: int | None) -> int:
        """The limit if given and possible, else all that the prompt leaves."""
        if not prompt:
            raise HTTPException(400, "The prompt is empty.")
        max_tokens = self.service.max_tokens_of(self.adapter)
        room = max_tokens - len(prompt)
        limit = room if limit is None else limit
        if not 1 <= limit <= room:
            raise HTTPException(
                400,
                f"The prompt has {len(prompt)} tokens and {max(limit, 0)} more are requested; prompt and answer "
                f"together may have {max_tokens}.",
            )
        return limit

    # ── answers ─────────────────────────────────────────────────────────────

    @property
    def streams_text(self) -> bool:
        """Whether text can be streamed; else the last piece has all of it."""
        return True

    def text(self, tokens: Sequence[Token]) -> str:
        """The text of a whole answer."""
        return "".join(token.text for token in tokens)

    def full_choice(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        """The choice of a finished answer."""
        raise NotImplementedError

    def chunk_choice(self, index: int, token: Token, text: str, first: bool, text_before: str) -> dict[str, Any]:
        """The choice of one token in a stream."""
        raise NotImplementedError

    def head(self, chunk: bool) -> dict[str, Any]:
        kind = f"{self.object}.chunk" if chunk and self.object == "chat.completion" else self.object
        return {"id": self.id, "object": kind, "created": self.created, "model": self.body.model}

    def usage(self, answers: Sequence[list[Token]]) -> dict[str, int]:
        prompt, answered = sum(map(len, self.prompts)), sum(map(len, answers))
        return {"prompt_tokens": prompt, "completion_tokens": answered, "total_tokens": prompt + answered}

    def token_text(self, token: int) -> str:
        return self.service.tokenizer.token_text(token)

    def _explanation(self, tokens: Sequence[Token]) -> dict[str, Any]:
        """`explain`: one entry per token, beside OpenAI's own fields."""
        if not self.body.explain:
            return {}
        return {"explanation": [self._explained(token, token.attribution) for token in tokens if token.attribution]}

    def _explained(self, token: Token, attribution: Attribution) -> dict[str, Any]:
        def named(top: list[tuple[int, float]]) -> list[dict[str, Any]]:
            return [{"token": self.token_text(i), "logprob": p} for i, p in top]

        return {
            "token": self.token_text(token.id),
            "lambda": attribution.lam,
            "logprob_pema": attribution.log_pema,
            "logprob_plm": attribution.log_plm,
            "decided_by": attribution.decided_by,
            "top_pema": named(attribution.top_pema),
            "top_plm": named(attribution.top_plm),
        }


class Completion(Form):
    """`POST /v1/completions`."""

    object, prefix = "text_completion", "cmpl"
    body: CompletionRequest

    def _prompts(self) -> list[list[int]]:
        tokenizer = self.service.tokenizer
        return [tokenizer.encode(p) if isinstance(p, str) else self._check_ids(p) for p in self.body.prompts]

    def _check_ids(self, ids: Sequence[int]) -> list[int]:
        card = self.service.card
        wrong = next((i for i in ids if not 0 <= i < card.vocab_size), None)
        if wrong is not None:
            raise HTTPException(400, f"{wrong} is no token id of {card.name}, which has {card.vocab_size} tokens.")
        return list(ids)

    def _requests(self) -> list[GenerationRequest]:
        source, builder, body = self.body.source, self.builder, self.body
        if source is None:
            return super()._requests()
        if builder is None:
            raise HTTPException(400, f"'{body.model}' has no task (`tasks` of the service): send a whole prompt.")
        sampling = body.sampling(random.getrandbits(62), builder.sampling)
        changes: dict[str, Any] = {"schedule": self.schedule, "sampling": sampling, "stop": builder.stop + body.stops}
        if "max_tokens" in body.model_fields_set:
            changes["max_new_tokens"] = body.max_tokens
        if body.length is not None:
            changes["length"] = body.length
        request = builder.build(source, **changes, **self._shared_fields())
        self.prompts = [list(request.prompt)]
        self._answer_limit(request.prompt, request.max_new_tokens)
        return [replace(request, stream=k) for k in range(body.n)]

    @property
    def streams_text(self) -> bool:
        return self._builder_of_source is None or not self._builder_of_source.prompter.task.postprocess

    @property
    def _builder_of_source(self) -> RequestBuilder | None:
        return None if self.body.source is None or self.body.raw else self.builder

    def text(self, tokens: Sequence[Token]) -> str:
        text, builder = super().text(tokens), self._builder_of_source
        return text if builder is None else builder.postprocess(text, self.body.source or "")[0]

    def full_choice(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        return self._choice(index, self.text(tokens), tokens)

    def chunk_choice(self, index: int, token: Token, text: str, first: bool, text_before: str) -> dict[str, Any]:
        return self._choice(index, text, [token], text_before)

    def _choice(self, index: int, text: str, tokens: list[Token], text_before: str = "") -> dict[str, Any]:
        choice = {"index": index, "text": text, "finish_reason": _reason(tokens[-1].finish), "logprobs": None}
        if self.body.top is not None:
            texts = [self.token_text(token.id) for token in tokens]
            choice["logprobs"] = {
                "tokens": texts,
                "token_logprobs": [token.log_prob for token in tokens],
                "top_logprobs": [
                    {self.token_text(i): p for i, p in reversed(token.top[: self.body.top])}
                    for token in tokens  # of two tokens with equal text, the likelier one is kept
                ],
                "text_offset": [len(text_before) + sum(map(len, texts[:i])) for i in range(len(texts))],
            }
        return choice | self._explanation(tokens)


class Chat(Form):
    """`POST /v1/chat/completions`."""

    object, prefix = "chat.completion", "chatcmpl"
    body: ChatRequest

    def _prompts(self) -> list[list[int]]:
        messages = [{"role": m.role.replace("developer", "system"), "content": m.text} for m in self.body.messages]
        return [self.service.tokenizer.encode_chat(messages, template_arguments=self._template_arguments)]

    @property
    def _template_arguments(self) -> Mapping[str, Any]:
        if self.body.chat_template_kwargs is not None:
            return self.body.chat_template_kwargs
        return {} if self.builder is None else self.builder.prompter.chat_template_kwargs

    @property
    def eos(self) -> tuple[int, ...]:
        end = self.service.tokenizer.answer_frame(self._template_arguments).end
        return () if end is None else (end,)

    def full_choice(self, index: int, tokens: list[Token]) -> dict[str, Any]:
        message = {"role": "assistant", "content": self.text(tokens), "refusal": None}
        choice = {"index": index, "message": message, "finish_reason": _reason(tokens[-1].finish)}
        return choice | {"logprobs": self._logprobs(tokens)} | self._explanation(tokens)

    def chunk_choice(self, index: int, token: Token, text: str, first: bool, text_before: str) -> dict[str, Any]:
        delta = ({"role": "assistant"} if first else {}) | {"content": text}
        choice = {"index": index, "delta": delta, "finish_reason": _reason(token.finish)}
        return choice | {"logprobs": self._logprobs([token])} | self._explanation([token])

    def _logprobs(self, tokens: list[Token]) -> dict[str, Any] | None:
        if self.body.top is None:
            return None
        content = []
        for token in tokens:
            top = [self._logprob(i, p) for i, p in token.top[: self.body.top]]
            content.append(self._logprob(token.id, token.log_prob) | {"top_logprobs": top})
        return {"content": content, "refusal": None}

    def _logprob(self, token: int, log_prob: float) -> dict[str, Any]:
        own_bytes = list(self.service.tokenizer.token_bytes(token))
        return {"token": self.token_text(token), "logprob": log_prob, "bytes": own_bytes}


def adapter_named(service: DataOwner, name: str) -> str | None:
    """The adapter of a model's name; None for the PLM alone.

    Raises:
        HTTPException: 404, there is no such model.
    """
    if name in service.decoder.predictors:
        return name
    if name == service.card.name:
        return None
    names = model_names(service)
    raise HTTPException(404, f"There is no model '{name}'; there are {', '.join(names)}.{nearest(name, names)}")


def model_names(service: DataOwner) -> list[str]:
    """The adapters, and the PLM alone."""
    return [*service.decoder.predictors, service.card.name]


def _reason(finish: str | None) -> str | None:
    return {"eos": "stop", "stop": "stop", "length": "length"}.get(finish or "")
