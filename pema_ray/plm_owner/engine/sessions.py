"""Which session holds which slot: opens and continues sessions, shares common prefixes, evicts idle sessions.

A slot keeps its keys and values after its session has ended, until another session needs it: a prompt that begins like
another of the same owner copies that cache. N states, H hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from pema_ray.line import SessionLost, Step, Stepped
from pema_ray.line.prefix import Prefix
from pema_ray.plm_owner.engine.slots import Caches

_WORTH_COPYING = 8  # tokens of a common prefix
_WORTH_WAITING = 64  # tokens that another session is computing now
_MAX_CLOSED_BEFORE = 1024  # remembered sessions that were closed before they were opened: messages overtake each other


@dataclass(eq=False)
class Slot:
    """One session's place in the caches."""

    number: int
    owner: str = ""
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values are in the cache, even after the session has ended."""
    handle: str = ""
    """Of the data owner's prefix before its tokens; empty: none."""
    prefix_positions: int = 0
    """The first so many of `ids` stand for that prefix, whose positions have no tokens."""
    session: str | None = None
    job: StepJob | None = None
    used: float = 0.0


@dataclass(eq=False)
class StepJob:
    """One step on its way through the batcher.

    Attributes:
        deadline: an opening or a step that has not begun by then is `Busy`.
        slot_deadline: the same, while there is no slot for it.
        result: its outcome, an error included; none until then.
    """

    owner: str
    step: Step
    deadline: float
    slot_deadline: float
    result: Stepped | Exception | None = None
    cancelled: bool = False
    slot: Slot | None = None
    prefix: Prefix | None = None
    """Of the session that it opens."""
    remaining: list[int] = field(default_factory=list)
    """Tokens still to compute."""
    states: list[torch.Tensor] = field(default_factory=list)
    drafted: list[int] = field(default_factory=list)

    @property
    def key(self) -> tuple[str, str]:
        """Owner and session."""
        return self.owner, self.step.session


class Sessions:
    """The slots and the sessions that hold them."""

    def __init__(self, caches: Caches, slots: int, idle_seconds: float, clock: Callable[[], float]) -> None:
        self._caches, self._idle_seconds, self._clock = caches, idle_seconds, clock
        self._slots = [Slot(number) for number in range(slots)]
        self._by_key: dict[tuple[str, str], Slot] = {}
        self._closed_before: dict[tuple[str, str], None] = {}
        self._promised = 0

    def __len__(self) -> int:
        return len(self._by_key)

    def slots(self) -> list[Slot]:
        """The slots that sessions hold."""
        return list(self._by_key.values())

    def find(self, key: tuple[str, str]) -> Slot | None:
        """The session's slot."""
        return self._by_key.get(key)

    def close(self, key: tuple[str, str], refuse_next: bool = False) -> None:
        """Free the session's slot; with `refuse_next`, the next opening of one without a slot is refused."""
        slot = self._by_key.pop(key, None)
        if slot is not None:
            slot.session = None
        elif refuse_next:
            self._closed_before[key] = None
            if len(self._closed_before) > _MAX_CLOSED_BEFORE:
                del self._closed_before[next(iter(self._closed_before))]

    def forget(self, seconds: float) -> None:
        """Close sessions that have taken no step for `seconds`."""
        oldest = self._clock() - seconds
        for key, slot in list(self._by_key.items()):
            if slot.job is None and slot.used <= oldest:
                self.close(key)

    def continue_(self, job: StepJob, slot: Slot | None) -> None:
        """Rewind the session to the step's position and continue with its tokens.

        Raises:
            SessionLost: it holds fewer tokens, or no slot.
        """
        step = job.step
        if slot is None or (position := slot.prefix_positions + step.position) > len(slot.ids):
            raise SessionLost(step.session)
        ids = [*slot.ids[:position], *step.tokens]
        # a repeated step recomputes only its states
        cached = min(_common_prefix(slot.ids, ids), len(ids) - step.states)
        self._begin(job, slot, ids, cached)

    def was_closed(self, key: tuple[str, str]) -> bool:
        """Whether the session was closed before this opening; true once."""
        return self._closed_before.pop(key, self) is None

    def begin_scan(self) -> None:
        """Call before trying the waiting openings in order: none takes the slot of an earlier one."""
        self._promised = 0

    def open(self, job: StepJob, prefilling: Iterable[StepJob], full: bool) -> tuple[bool, bool]:
        """Give the session a slot, if one is free and no better cache is being computed.

        Args:
            full: no slot was free for an earlier session.

        Returns:
            Whether it has one, and whether no slot is free for any session.
        """
        unused = sum(slot.session is None for slot in self._slots)
        if full or (self._promised and unused <= self._promised):
            return False, True
        prefix, step = _ids_of(job.prefix), job.step
        ids = [*prefix, *step.tokens]
        limit = len(ids) - step.states
        source, shared = None, 0
        for slot in self._slots:
            if slot.owner == job.owner and (common := min(_common_prefix(slot.ids, ids), limit)) > shared:
                source, shared = slot, common
        if shared < _WORTH_COPYING:
            source, shared = None, 0
        if _will_share(job.owner, ids, limit, prefilling) >= shared + _WORTH_WAITING:
            self._promised += 1
            return False, False
        target = source if source is not None and source.session is None else self._free_slot()
        if target is None:
            return False, True
        if source is not None and source is not target:
            self._caches.copy(source.number, target.number, shared)
        if target.handle:  # a prefix may lead to infinities, which masks do not hide from the next sequence
            self._caches.clear(target.number, shared)
        if job.prefix is not None and shared < len(prefix):
            self._caches.load(target.number, job.prefix)
            shared = len(prefix)
        target.owner, target.session = job.owner, step.session
        target.handle, target.prefix_positions = step.handle, len(prefix)
        self._by_key[job.key] = target
        self._begin(job, target, ids, shared)
        return True, False

    def _free_slot(self) -> Slot | None:
        unused = [slot for slot in self._slots if slot.session is None]
        if not unused:
            idle = [slot for slot in self._slots if slot.job is None]
            oldest = min(idle, key=lambda slot: slot.used, default=None)
            if oldest is None or self._clock() - oldest.used < self._idle_seconds:
                return None
            assert oldest.session is not None
            self.close((oldest.owner, oldest.session))
            return oldest
        empty = next((slot for slot in unused if not slot.ids), None)
        return empty or min(unused, key=lambda slot: slot.used)

    def _begin(self, job: StepJob, slot: Slot, ids: Sequence[int], cached: int) -> None:
        slot.ids, slot.job, slot.used = list(ids[:cached]), job, self._clock()
        job.slot, job.remaining = slot, list(ids[cached:])


def _ids_of(prefix: Prefix | None) -> list[int]:
    """Numbers that stand for a prefix's positions among token ids: no token has them, and no other prefix."""
    first = 0 if prefix is None else -int(prefix.handle[:15], 16) - 1
    return [] if prefix is None else [first - i for i in range(len(prefix))]


def _will_share(owner: str, ids: Sequence[int], limit: int, prefilling: Iterable[StepJob]) -> int:
    """Length of the common prefix with a prompt of the same owner that is being prefilled now."""
    slots = [(job.slot, job.remaining) for job in prefilling if job.owner == owner]
    return max((min(_common_prefix([*slot.ids, *rest], ids), limit) for slot, rest in slots if slot), default=0)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    end = min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    return next(i for i in range(end) if a[i] != b[i])
