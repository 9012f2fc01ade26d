"""Turns a pair of texts into token ids, so that the prompt's ids are always a prefix of those of prompt + target.

Byte-level BPEs merge a trailing space with the next word: `"Modern: " + "And"` has other ids than
`"Modern:" + " And"`. Spaces at the end of the prompt are therefore moved to the beginning of the target.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cached_property
from typing import Any

from pema_ray.errors import UserError
from pema_ray.line.tokenizer import AnswerFrame, PLMTokenizer
from pema_ray.tasks.shots import SimilarShots
from pema_ray.tasks.sources import Pair
from pema_ray.tasks.task import Task

_TODAY = date(2024, 7, 26)  # for chat templates that print the date: prompts must not depend on it


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair as token ids: prompt `[p]`, target `[t]` (without EOS)."""

    example_id: int
    prompt: list[int]
    target: list[int]


class Prompter:
    """Words prompts for one task and one tokenizer.

    Args:
        shots: examples shown before every source, or a `SimilarShots` that chooses them for each.
        chat: render through the tokenizer's chat template, with the task's chat wording.
        chat_template_kwargs: arguments of the template beside the messages, such as `enable_thinking`.
    """

    def __init__(
        self,
        tokenizer: PLMTokenizer,
        task: Task,
        shots: Sequence[Pair] | SimilarShots = (),
        chat: bool = False,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> None:
        if chat and not tokenizer.chat_template:
            raise UserError("task.chat is on, but this PLM's tokenizer has no chat template. Set task.chat=false.")
        self.tokenizer, self.task, self.shots, self.chat = tokenizer, task, shots, chat
        self.chat_template_kwargs = dict(chat_template_kwargs or {})

    def text(self, source: str, example_id: int | None = None) -> str:
        """The prompt for one source, in readable form.

        Args:
            example_id: of the source, if it may be among the examples.
        """
        return self.tokenizer.readable(self._rendered(source, example_id))

    def _rendered(self, source: str, example_id: int | None) -> str:
        """The prompt, with control tokens of a chat template marked; see `PLMTokenizer.render_chat`."""
        shots = self.shots.like(source, example_id) if isinstance(self.shots, SimilarShots) else self.shots
        return self._text(source, shots)

    def _text(self, source: str, shots: Sequence[Pair]) -> str:
        if self.chat:
            return self._chat_text(source, shots)
        examples = "".join(self._with_target(shot) + "\n\n" for shot in shots)
        return examples + self.task.template.format(source=source)

    def _with_target(self, pair: Pair) -> str:
        prompt, lead = split_seam(self.task.template.format(source=pair.source))
        return prompt + lead + pair.target

    def _chat_text(self, source: str, shots: Sequence[Pair]) -> str:
        messages = []
        if self.task.chat_system is not None:
            messages.append({"role": "system", "content": self.task.chat_system})
        for shot in shots:
            messages.append({"role": "user", "content": self.task.chat_user.format(source=shot.source)})
            messages.append({"role": "assistant", "content": shot.target})
        messages.append({"role": "user", "content": self.task.chat_user.format(source=source)})
        try:
            return self.tokenizer.render_chat(messages, True, self.chat_template_kwargs, _TODAY)
        except UserError as error:
            raise UserError(f"Task '{self.task.name}': {error}") from None

    @cached_property
    def _frame(self) -> AnswerFrame:
        return self.tokenizer.answer_frame(self.chat_template_kwargs, _TODAY) if self.chat else AnswerFrame("", None)

    @property
    def end_token(self) -> int | None:
        """The token with which a chat template ends an answer; None: the PLM's EOS."""
        return self._frame.end

    def _split(self, prompt: str) -> tuple[str, str]:
        return (prompt.rstrip(" "), self._frame.lead) if self.chat else split_seam(prompt)

    @cached_property
    def shared_tokens(self) -> int:
        """The number of tokens that all prompts begin with, whatever the source; measured on two prompts."""
        first, second = (self._prompt_ids(self._text(source, self._shown_to(source))) for source in ("a", "1"))
        return next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)

    def _shown_to(self, source: str) -> Sequence[Pair]:
        """Examples for a probe prompt that shares nothing with another but what all prompts share."""
        return [Pair(0, source, source)] if isinstance(self.shots, SimilarShots) else self.shots

    def encode_prompt(self, source: str, example_id: int | None = None) -> list[int]:
        """Token ids `[p]` to generate from; `example_id` as in `text`."""
        return self._prompt_ids(self._rendered(source, example_id))

    def _prompt_ids(self, rendered: str) -> list[int]:
        return self._ids(self._split(rendered)[0])

    def encode_pair(self, pair: Pair) -> EncodedPair:
        """Token ids of prompt and target; together those of the joint text, if the prompt's are a prefix of them."""
        prompt, lead = self._split(self._rendered(pair.source, pair.example_id))
        prompt_ids = self._ids(prompt)
        joint_ids = self._ids(prompt, lead + pair.target)
        if joint_ids[: len(prompt_ids)] == prompt_ids:
            target_ids = joint_ids[len(prompt_ids) :]
        else:
            target_ids = self.tokenizer.encode(lead + pair.target, special_tokens=False)
        return EncodedPair(pair.example_id, prompt_ids, target_ids)

    def _ids(self, prompt: str, answer: str = "") -> list[int]:
        return self.tokenizer.encode_rendered(prompt, answer) if self.chat else self.tokenizer.encode(prompt + answer)


def split_seam(prompt: str) -> tuple[str, str]:
    """`(prompt without trailing spaces, beginning of the target)`: these spaces, or one if words would fuse."""
    stripped = prompt.rstrip(" ")
    lead = prompt[len(stripped) :]
    return stripped, lead or ("" if prompt.endswith("\n") else " ")
