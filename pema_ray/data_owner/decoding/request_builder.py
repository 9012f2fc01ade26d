"""Builds generation requests from a task's source texts, with the same prompts and limits in stages and services."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding.request import GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.tasks import Prompter
from pema_ray.tasks.postprocess import tidy
from pema_ray.tasks.sources import name_of_example

_EXTRA_TOKENS = 16  # beyond `max_new_ratio` times the source


@dataclass(frozen=True)
class RequestBuilder:
    """Builds the requests of one system.

    Attributes:
        adapter: its name; None answers with the PLM alone.
        max_tokens: of a prompt and its answer together, as the PLM owner limits them.
        seed: of sampling.
    """

    prompter: Prompter
    options: GenerateConfig
    adapter: str | None
    max_tokens: int
    seed: int = 0

    def build(
        self, source: str, example_id: int = 0, reference: str | None = None, **changes: Any
    ) -> GenerationRequest:
        """The request for one source text.

        Args:
            example_id: names the random draws, and the pair that `task.show: similar` must not show.
            reference: the reference answer, used by `generate.length=reference` only.
            changes: fields of the request to replace.

        Raises:
            UserError: the prompt leaves no room for an answer.
        """
        options, tokenizer = self.options, self.prompter.tokenizer
        prompt = self.prompter.encode_prompt(source, example_id)
        source_tokens = len(tokenizer.encode(source, special_tokens=False))
        room = self.max_tokens - len(prompt)
        if room < 1:
            raise UserError(
                f"{name_of_example(example_id).capitalize()}: its prompt has {len(prompt)} tokens; the PLM owner "
                f"allows {self.max_tokens} in all. Shorten the source, or show fewer examples (task.shots)."
            )
        length = {"prompt": len(prompt), "source": source_tokens}.get(str(options.length), options.length)
        if options.length == "reference":  # an oracle
            length = len(prompt) + len(tokenizer.encode(reference or "", special_tokens=False))
        limit = min(options.max_new_tokens, int(options.max_new_ratio * source_tokens) + _EXTRA_TOKENS, room)
        fields: dict[str, Any] = {
            "prompt": prompt,
            "max_new_tokens": limit,
            "schedule": self.schedule,
            "adapter": self.adapter,
            "length": max(1, int(length)),
            "sampling": self.sampling,
            "stop": self.stop,
            "eos": () if self.prompter.end_token is None else (self.prompter.end_token,),
            "draft": options.draft,
            "stream": example_id,
        }
        return GenerationRequest(**{**fields, **changes})

    @property
    def schedule(self) -> UnrollingSchedule:
        o = self.options
        return UnrollingSchedule(0.0 if self.adapter is None else o.lambda_max, o.schedule, o.floor)

    @property
    def sampling(self) -> SamplingParams:
        o = self.options
        return SamplingParams(o.decoding, o.temperature, o.top_p, o.beams, o.length_penalty, self.seed)

    @property
    def stop(self) -> tuple[str, ...]:
        return (*self.prompter.task.stop, *self.options.stop)

    def postprocess(self, text: str, source: str) -> tuple[str, list[str]]:
        """The answer after the task's rules, and the names of the rules that changed it."""
        return tidy(text, source, self.prompter.task.postprocess)
