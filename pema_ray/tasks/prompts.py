"""From a pair of texts to token ids, so that the prompt's ids are always a prefix of prompt + target's.

Byte-level BPEs merge a trailing space with the word after it: `"Modern: " + "And"` has other ids than
`"Modern:" + " And"`. The seam is therefore moved: spaces at the end of the prompt open the target.
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

_TODAY = date(2024, 7, 26)  # for chat templates that name the day: prompts are the same on every day


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """A pair as token ids: prompt `[p]`, target `[t]` (without EOS)."""

    example_id: int
    prompt: list[int]
    target: list[int]


class Prompter:
    """Words prompts for one task and one tokenizer.

    Args:
        shots: pairs shown as worked examples before every source, or who chooses them for each.
        chat: render through the tokenizer's chat template, with the task's own chat wording.
        chat_template_kwargs: what the template takes beside the messages, such as `enable_thinking`.
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
        """The prompt for one source, as people read it.

        Args:
            example_id: of a source that is itself among the pairs shown.
        """
        return self.tokenizer.readable(self._rendered(source, example_id))

    def _rendered(self, source: str, example_id: int | None) -> str:
        """The prompt with a chat template's control tokens told from text; see `PLMTokenizer.render_chat`."""
        if isinstance(self.shots, SimilarShots):
            return self._text(source, self.shots.like(source, example_id))
        return self._text(source, self.shots)

    def _text(self, source: str, shots: Sequence[Pair]) -> str:
        if self.chat:
            return self._chat_text(source, shots)
        shown = "".join(self._with_target(shot) + "\n\n" for shot in shots)
        return shown + self.task.template.format(source=source)

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
        """How many tokens all prompts begin with, whatever the source; found by comparing two prompts."""
        one, other = (self._prompt_ids(self._text(source, self._shown_to(source))) for source in ("a", "1"))
        return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0)

    def _shown_to(self, source: str) -> Sequence[Pair]:
        """What two prompts show that have nothing in common but what all have."""
        return [Pair(0, source, source)] if isinstance(self.shots, SimilarShots) else self.shots

    def encode_prompt(self, source: str, example_id: int | None = None) -> list[int]:
        """Token ids `[p]` to generate from; `example_id` as in `text`."""
        return self._prompt_ids(self._rendered(source, example_id))

    def _prompt_ids(self, rendered: str) -> list[int]:
        return self._ids(self._split(rendered)[0])

    def encode_pair(self, pair: Pair) -> EncodedPair:
        """Token ids of prompt and target; `prompt + target` tokenises the joint text wherever its seam allows."""
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
    """`(prompt without its trailing spaces, what opens the target)`: those spaces, or one where words would fuse."""
    kept = prompt.rstrip(" ")
    lead = prompt[len(kept) :]
    return kept, lead or ("" if prompt.endswith("\n") else " ")
