"""The supported part of OpenAI's requests. Unsupported parameters are rejected by name, never ignored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator

from pema_ray.data_owner.config import ScheduleKind
from pema_ray.data_owner.decoding import SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule

_MAX_N = 16
_GREEDY_BELOW = 1e-3  # temperature; lower ones overflow
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _reject_surrogates(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"half a character (a lone surrogate) at position {error.start}") from None
    return text


# For texts that are not tokenised; the tokenizer checks the others.
Text = Annotated[str, AfterValidator(_reject_surrogates)]


class _Unrolled(BaseModel):
    """Parameters of both kinds of request; the last seven are this project's own (`extra_body` in OpenAI's client)."""

    model_config = ConfigDict(extra="forbid")

    model: Text
    n: int = Field(default=1, ge=1, le=_MAX_N)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, bool] | None = None
    temperature: Finite = Field(default=1.0, ge=0, le=10)
    top_p: Finite = Field(default=1.0, gt=0, le=1)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    user: Text | None = None
    presence_penalty: Literal[0] = 0
    frequency_penalty: Literal[0] = 0

    lambda_max: Finite | None = Field(default=None, ge=0, le=1)
    """Weight of the adapter at the first token."""
    schedule: ScheduleKind | None = None
    length: int | None = Field(default=None, ge=1, le=1_000_000)
    """Tokens over which a falling λ reaches its floor; by default the maximum length of the answer."""
    floor: Finite | None = Field(default=None, ge=0, le=1)
    explain: bool = False
    """Return λ, both probabilities and the most probable tokens of both distributions with every token."""
    draft: int | None = Field(default=None, ge=0, le=16)
    """Longest draft; answers are the same with any length."""
    raw: bool = False
    """Leave the answer as it was generated, without the task's post-processing."""

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _no_penalty(cls, value: Any) -> Any:
        return 0 if value in (0, None) else value

    @field_validator("temperature", "top_p", "n", "stream", mode="before")
    @classmethod
    def _none_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _at_most_four(cls, stop: str | list[str] | None) -> str | list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop or []
        if len(stops) > 4 or any(not s or len(s) > 500 for s in stops):
            raise ValueError("at most four stop strings, of 1 to 500 characters each")
        for text in stops:
            _reject_surrogates(text)
        return stop

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def reports_usage(self) -> bool:
        return bool((self.stream_options or {}).get("include_usage"))

    def sampling(self, default_seed: int, default: SamplingParams | None = None) -> SamplingParams:
        """Greedy at temperature 0, as in OpenAI's API.

        Args:
            default: of an adapter's task; used if the request names neither temperature nor top_p.
        """
        seed = self.seed if self.seed is not None else default_seed
        if default is not None and not {"temperature", "top_p"} & self.model_fields_set:
            return replace(default, seed=seed)
        if self.temperature < _GREEDY_BELOW:
            return SamplingParams("greedy", seed=seed)
        return SamplingParams("sample", self.temperature, self.top_p, seed=seed)

    def unrolling(self, default: UnrollingSchedule) -> UnrollingSchedule:
        """This request's λ, completed by the default's fields.

        Raises:
            UserError: a floor above λ_max.
        """
        lam = default.lambda_max if self.lambda_max is None else self.lambda_max
        floor = min(default.floor, lam) if self.floor is None else self.floor
        return UnrollingSchedule(lam, self.schedule or default.kind, floor)


class CompletionRequest(_Unrolled):
    """`POST /v1/completions`."""

    prompt: str | list[str] | list[int] | list[list[int]] = Field(default="", max_length=1_000_000)
    max_tokens: int = Field(default=16, ge=1, le=1_000_000)
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] = False
    best_of: Literal[1, None] = None
    suffix: None = None
    source: str | None = Field(default=None, min_length=1, max_length=1_000_000)
    """Instead of a prompt: the source text, from which the adapter's task makes the prompt as in training."""

    @property
    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt, as text or as token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def answer_limit(self) -> int | None:
        """Maximum tokens of an answer."""
        return self.max_tokens

    @property
    def top(self) -> int | None:
        """Number of most probable tokens requested with each token; None: no log-probabilities."""
        return self.logprobs

    @field_validator("prompt")
    @classmethod
    def _not_empty(cls, prompt: Any) -> Any:
        if prompt == "":
            return prompt  # a source is given instead
        if not prompt or (isinstance(prompt, list) and len(prompt) > 64 and not isinstance(prompt[0], int)):
            raise ValueError("1 to 64 prompts, none of them empty")
        return prompt

    @model_validator(mode="after")
    def _prompt_or_source(self) -> CompletionRequest:
        if (self.source is None) == (self.prompt == ""):
            raise ValueError("a prompt or a source is needed, and not both; 1 to 64 prompts, none of them empty")
        return self


class TextPart(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: Text | None = None

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class ChatRequest(_Unrolled):
    """`POST /v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=1000)
    max_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1_000_000)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    """Further arguments of the chat template; by default those of the adapter's task."""

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs=true")
        return self

    @property
    def answer_limit(self) -> int | None:
        """Maximum tokens of an answer."""
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def top(self) -> int | None:
        """As in `CompletionRequest`."""
        return (self.top_logprobs or 0) if self.logprobs else None
