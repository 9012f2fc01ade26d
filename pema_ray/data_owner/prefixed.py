"""A PLM behind a data owner's prefix: a `PLMClient` like any other, so that every stage and service works over it.

Prompts stay as they are worded: the prefix takes the place of the tokens that it was started from, and this client
leaves them out of what it sends. Its model card has a fingerprint of its own, so that memories and adapters of other
prefixes are refused. Knows no Ray and no model.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from weakref import WeakValueDictionary

import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import Busy, Description, ExtractBatch, LMHeadBundle, PLMClient, Step, Stepped
from pema_ray.line.messages import ModelCard
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import PrefixLost, adaptable

OWN_PREFIX = "prefix"  # in an adapter's folder
_DESCRIPTION = "prefix.json"
_HANDLE_DIGITS = 12  # of a prefix, in a fingerprint
_ATTEMPTS = 4  # others may put theirs in this one's place
_CROWDED = "the PLM owner has no room for this prefix beside others that are in use"


@dataclass(frozen=True)
class TrainedPrefix:
    """A prefix, the PLM that it was trained for, and the tokens whose place it takes.

    Attributes:
        replaces: the first tokens of every prompt.
        fingerprint: of the PLM alone.
    """

    prefix: Prefix
    replaces: tuple[int, ...]
    fingerprint: str

    def save_pretrained(self, folder: Path, plm_name: str) -> None:
        """Write `prefix.json` beside the files of `Prefix.save_pretrained`."""
        self.prefix.save_pretrained(folder, plm_name)
        described = {"replaces": list(self.replaces), "fingerprint": self.fingerprint}
        (folder / _DESCRIPTION).write_text(json.dumps(described) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> TrainedPrefix:
        """Raises UserError if the folder holds none, or a damaged one."""
        path = Path(folder) / _DESCRIPTION
        try:
            described = json.loads(path.read_text())
            replaces, fingerprint = tuple(described["replaces"]), str(described["fingerprint"])
        except FileNotFoundError:
            raise UserError(f"{folder}: holds no prefix: {_DESCRIPTION} is missing.") from None
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}: is damaged: {error}") from None
        return cls(Prefix.from_pretrained(folder), replaces, fingerprint)

    @classmethod
    def of_adapter(cls, folder: Path, card: ModelCard) -> TrainedPrefix | None:
        """The prefix of an adapter's folder: in a folder of its own there, or instead of an adapter.

        Returns:
            None where there is none, or where all requests to the PLM of `card` stand behind it already.

        Raises:
            FingerprintMismatch: it was trained for another PLM.
            UserError: it is damaged.
        """
        home = next((path for path in (folder / OWN_PREFIX, folder) if is_prefix(path)), None)
        if home is None or card.fingerprint == (trained := cls.from_pretrained(home)).own_fingerprint:
            return None
        trained.card(card)
        return trained

    def card(self, card: ModelCard) -> ModelCard:
        """The model card of the PLM behind this prefix.

        Raises:
            FingerprintMismatch: the prefix was trained for another PLM.
        """
        if card.fingerprint != self.fingerprint:
            raise FingerprintMismatch("The prefix's PLM", card.label, self.fingerprint)
        return replace(card, fingerprint=self.own_fingerprint, max_positions=card.max_positions - self.longer)

    @property
    def own_fingerprint(self) -> str:
        """Of the PLM behind this prefix."""
        return f"{self.fingerprint}+{self.prefix.handle[:_HANDLE_DIGITS]}"

    @property
    def name(self) -> str:
        """Names it in steps to a `PrefixedPLM`: its handle, and what it replaces."""
        return f"{self.prefix.handle} {hash(self.replaces)}"

    @property
    def longer(self) -> int:
        """Positions that the prefix takes beyond those of the tokens that it replaces."""
        return len(self.prefix) - len(self.replaces)

    def batch_behind(self, batch: ExtractBatch) -> ExtractBatch:
        """The batch without the tokens that the prefix replaces.

        Raises:
            UserError: a prompt begins otherwise, or a representation of these tokens is requested.
        """
        left = max(0, len(self.replaces) - len(batch.prefix))  # in the sequences themselves
        for ids, first in zip(batch.token_ids, batch.first, strict=True):
            self._check([*batch.prefix, *ids])
            if first < left:
                raise UserError("plm.prefix: a representation is requested of a position that the prefix replaces.")
        return ExtractBatch(
            [ids[left:] for ids in batch.token_ids],
            [first - left for first in batch.first],
            batch.prefix[len(self.replaces) :],
            self.prefix.handle,
        )

    def step_behind(self, step: Step) -> Step:
        """The same for a step."""
        if step.position == 0:
            self._check(step.tokens)
            rest = step.tokens[len(self.replaces) :]
            if step.states > len(rest):
                raise UserError("plm.prefix: a representation is requested of a position that the prefix replaces.")
            return replace(step, tokens=rest, handle=self.prefix.handle)
        position = step.position - len(self.replaces)
        if position < 0:
            raise UserError("plm.prefix: a session cannot be rewound into the tokens that the prefix replaces.")
        return replace(step, position=position, handle="" if position else self.prefix.handle)

    def _check(self, ids: Sequence[int]) -> None:
        if tuple(ids[: len(self.replaces)]) != self.replaces:
            raise UserError(
                f"plm.prefix takes the place of the first {len(self.replaces)} tokens of every prompt, and this prompt "
                "begins otherwise: keep task.name, task.chat, task.shots and task.limits as in its training."
            )


def is_prefix(folder: Path) -> bool:
    """Whether a folder holds a trained prefix instead of an adapter."""
    return (folder / _DESCRIPTION).exists()


class PrefixedPLM:
    """A `PLMClient` over another, behind prefixes.

    Args:
        trained: before every request; None: steps that name a prefix alone stand behind one.

    Attributes:
        named: prefixes by name, of adapters that were trained behind them, as long as somebody holds them: every step
            of theirs names its own.

    Raises (every call):
        UserError: this PLM owner takes no prefixes, or a prompt begins with other tokens than the prefix replaces.
        FingerprintMismatch: the prefix was trained for another PLM.
    """

    def __init__(self, client: PLMClient, trained: TrainedPrefix | None) -> None:
        self._client, self._trained = adaptable(client), trained
        self.named: WeakValueDictionary[str, TrainedPrefix] = WeakValueDictionary()

    async def add(self, prefixes: Sequence[TrainedPrefix]) -> None:
        """Put prefixes, so that steps may name them.

        Raises:
            UserError: the PLM owner refuses one of them.
        """
        for trained in prefixes:
            await self._client.put_prefix(trained.prefix)
        self.named.update({trained.name: trained for trained in prefixes})

    async def describe(self) -> Description:
        description = await self._client.describe()
        if self._trained is None:
            return description
        if description.prefix_shape is None:
            raise UserError(
                "plm.prefix: this PLM owner takes no prefixes. Ask it for adaptation: prefix, or leave it out."
            )
        limits = replace(description.limits, max_tokens=description.limits.max_tokens - self._trained.longer)
        return Description(self._trained.card(description.card), limits)

    async def lm_head(self) -> LMHeadBundle:
        bundle = await self._client.lm_head()
        return bundle if self._trained is None else replace(bundle, card=self._trained.card(bundle.card))

    async def extract(self, batch: ExtractBatch) -> torch.Tensor:
        trained = self._trained
        if trained is None:
            return await self._client.extract(batch)
        behind = trained.batch_behind(batch)
        for _ in range(_ATTEMPTS):
            with suppress(PrefixLost):
                return await self._client.extract(behind)
            await self._client.put_prefix(trained.prefix)
        raise Busy(_CROWDED)

    async def step(self, steps: Sequence[Step]) -> list[Stepped | Exception]:
        outcomes: list[Stepped | Exception] = []
        sent: dict[int, Step] = {}
        prefixes = [self.named.get(step.handle, self._trained) for step in steps]
        for i, (step, trained) in enumerate(zip(steps, prefixes, strict=True)):
            outcomes.append(PrefixLost(step.session))
            try:
                sent[i] = step if trained is None else trained.step_behind(step)
            except UserError as error:
                outcomes[i] = error
        for attempt in range(_ATTEMPTS):
            lost = [i for i in sent if isinstance(outcomes[i], PrefixLost)]
            if attempt:
                for trained in {t.name: t for i in lost if (t := prefixes[i]) is not None}.values():
                    try:
                        await self._client.put_prefix(trained.prefix)
                    except UserError as error:  # ends these steps alone
                        for i in lost:
                            outcomes[i] = error if prefixes[i] is trained else outcomes[i]
                lost = [i for i in lost if isinstance(outcomes[i], PrefixLost)]
            if lost:
                for i, outcome in zip(lost, await self._client.step([sent[i] for i in lost]), strict=True):
                    outcomes[i] = outcome
        return [Busy(_CROWDED) if isinstance(outcome, PrefixLost) else outcome for outcome in outcomes]

    async def close(self, sessions: Sequence[str]) -> None:
        await self._client.close(sessions)

    async def end(self) -> None:
        await self._client.end()
