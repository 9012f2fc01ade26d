"""Decides what the next forward pass computes: who joins, who goes on, whose prompt is prefilled, who has to leave.

Knows no threads and no event loop: whoever owns a batcher submits jobs and calls `run` until all are done. A pass
serves every session that waits for a token; long prompts are prefilled piece by piece between such passes, so that
nobody waits long. A prompt that begins as another of the same owner did takes over its cache. N states, H hidden.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from pema_ray.errors import UserError
from pema_ray.line import Busy, LMHead, SessionLost, Step, Stepped
from pema_ray.plm_owner.engine.config import EngineConfig
from pema_ray.plm_owner.engine.slots import Feed, make_caches
from pema_ray.plm_owner.load import LoadedPLM

_PASS_TOKENS_CPU, _PASS_TOKENS_GPU = 512, 4096
_SHORT = 16  # tokens; longer pieces are prefill and do not hold up those who wait for a token
_WORTH_COPYING = 8  # tokens that two prompts begin with alike
_WORTH_WAITING = 64  # tokens that somebody else is computing just now
_CLOSED_BEFORE = 1024  # sessions remembered that were closed before they were opened: messages overtake each other


@dataclass(eq=False)
class _Slot:
    number: int
    owner: str = ""
    ids: list[int] = field(default_factory=list)
    """Tokens whose keys and values lie in the cache, also when nobody uses them any more."""
    session: str | None = None
    job: Job | None = None
    used: float = 0.0


@dataclass(eq=False)
class Job:
    """One step on its way through the batcher.

    Attributes:
        result: what it gave, or why it could not be done; none until then.
    """

    owner: str
    step: Step
    deadline: float
    result: Stepped | Exception | None = None
    cancelled: bool = False
    _slot: _Slot | None = None
    _todo: list[int] = field(default_factory=list)
    _states: list[torch.Tensor] = field(default_factory=list)
    _drafted: list[int] = field(default_factory=list)


class Batcher:
    """The sessions of one PLM.

    Args:
        head: for drafts.
        clock: seconds that only grow.
    """

    def __init__(
        self, plm: LoadedPLM, head: LMHead, settings: EngineConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.settings, self._plm, self._head, self._clock = settings, plm, head, clock
        self.max_tokens = min(settings.max_tokens or plm.max_positions, plm.max_positions)
        self.pass_tokens = settings.pass_tokens or (_PASS_TOKENS_CPU if plm.device.type == "cpu" else _PASS_TOKENS_GPU)
        self._caches = make_caches(plm, settings.slots, self.max_tokens)
        
        self._slots = [_Slot(number) for number in range(settings.slots)]
        self._sessions: dict[tuple[str, str], _Slot] = {}
        self._closed_before: dict[tuple[str, str], None] = {}
        self._waiting: deque[Job] = deque()
        self._active: list[Job] = []
        self.passes: list[tuple[int, int]] = []
        """Sequences and tokens of every forward pass of the last `run`."""

    # ── what neighbours call ────────────────────────────────────────────────

    def submit(self, owner: str, step: Step, deadline: float = float("inf")) -> Job:
        """Queue a step; `run` works on it. Sessions and caches of different owners never meet.

        Args:
            deadline: on the clock; a step that has not begun by then is `Busy`.
        """
        job = Job(owner, step, deadline)
        self._waiting.append(job)
        return job

    def close(self, owner: str, session: str) -> None:
        """Forget a session; a step of it that is under way is given up. One that is not known is not opened, once."""
        slot = self._sessions.pop((owner, session), None)
        jobs = [job for job in [*self._waiting, *self._active] if (job.owner, job.step.session) == (owner, session)]
        for job in jobs:
            job.cancelled = True
        if slot is not None:
            slot.session = None
        elif not jobs:
            self._closed_before[owner, session] = None
            if len(self._closed_before) > _CLOSED_BEFORE:
                del self._closed_before[next(iter(self._closed_before))]

    def forget_abandoned(self) -> None:
        """Close sessions whose owner has fallen silent: whoever died could not close them."""
        oldest = self._clock() - self.settings.forget_seconds
        for slot in [slot for slot in self._sessions.values() if slot.job is None and slot.used <= oldest]:
            assert slot.session is not None
            self.close(slot.owner, slot.session)

    @property
    def busy(self) -> bool:
        """Whether `run` has anything to do."""
        return bool(self._waiting or self._active)

    @property
    def live_sessions(self) -> int:
        """Sessions that hold a slot."""
        return len(self._sessions)

    def sessions_heard_of(self, seconds: float) -> int:
        """Sessions that took a step in the last so many seconds, or wait for one."""
        oldest = self._clock() - seconds
        return sum(slot.used >= oldest or slot.job is not None for slot in list(self._sessions.values()))

    @property
    def waiting(self) -> int:
        """Steps that have not begun."""
        return len(self._waiting)

    @property
    def cached_tokens(self) -> int:
        """Tokens of live sessions whose keys and values are held."""
        return sum(len(slot.ids) for slot in list(self._sessions.values()))

    @torch.inference_mode()
    def run(self) -> list[Job]:
        """One pass over all that wait for a token, and one over prompts; returns the jobs that are done by it."""
        done = self._drop_cancelled()
        done += self._begin()
        self.passes = []
        short = [job for job in self._active if len(job._todo) <= _SHORT]
        for group in _alike(short):
            done += self._pass(group, _SHORT)
        done += self._prefill([job for job in self._active if len(job._todo) > _SHORT])
        self._active = [job for job in self._active if job.result is None]
        return done

    # ── joining and leaving ─────────────────────────────────────────────────

    def _drop_cancelled(self) -> list[Job]:
        dropped = [job for job in [*self._waiting, *self._active] if job.cancelled]
        for job in dropped:
            job.result = SessionLost(job.step.session)
            if job._slot is not None:
                job._slot.job = None
                if job.step.position == 0:  # nobody will ever know of this session
                    self.close(job.owner, job.step.session)
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._active = [job for job in self._active if not job.cancelled]
        return dropped

    def _begin(self) -> list[Job]:
        """Take waiting steps in their order; those that must wait for a slot, or for their own session, stay."""
        refused: list[Job] = []
        staying: deque[Job] = deque()
        held_up: set[tuple[str, str]] = set()
        full = False
        for job in self._waiting:
            key = (job.owner, job.step.session)
            slot = self._sessions.get(key)
            opens = slot is None and job.step.position == 0
            try:
                if key in held_up or (slot is not None and slot.job is not None):
                    began = False
                elif opens:
                    if key in self._closed_before:  # one end ends one opening
                        del self._closed_before[key]
                        raise SessionLost(job.step.session)
                    self._check(job.step)
                    began, full = (False, True) if full else self._open(job)
                else:
                    self._go_on(job, slot)
                    began = True
                if not began and self._clock() > job.deadline:
                    raise Busy(f"no slot became free in time: {len(self._slots)} sessions are being decoded.")
            except (SessionLost, UserError, Busy) as error:
                job.result = error
                refused.append(job)
                continue
            if began:
                self._active.append(job)
            else:
                held_up.add(key)
                staying.append(job)
        self._waiting = staying
        return refused

    def _check(self, step: Step) -> None:
        end = step.position + len(step.tokens) + step.draft
        if end > self.max_tokens:
            raise self.too_long(end)

    def too_long(self, tokens: int) -> UserError:
        return UserError(f"A text of {tokens} tokens is longer than {self._plm.name} takes here ({self.max_tokens}).")

    def _go_on(self, job: Job, slot: _Slot | None) -> None:
        step = job.step
        if slot is None or step.position > len(slot.ids):
            raise SessionLost(step.session)
        self._check(step)
        whole = [*slot.ids[: step.position], *step.tokens]
        known = min(_alike_until(slot.ids, whole), len(whole) - step.states)  # said before: only states are wanted
        self._take(job, slot, whole, known)

    def _open(self, job: Job) -> tuple[bool, bool]:
        """Whether the session got a slot, and whether there is none left for anybody."""
        ids, step = list(job.step.tokens), job.step
        longest = len(ids) - step.states
        source, shared = None, 0
        for slot in self._slots:
            if slot.owner == job.owner and (found := min(_alike_until(slot.ids, ids), longest)) > shared:
                source, shared = slot, found
        if shared < _WORTH_COPYING:
            source, shared = None, 0
        if self._will_share(job.owner, ids, longest) >= shared + _WORTH_WAITING:
            return False, False
        target = source if source is not None and source.session is None else self._free_slot()
        if target is None:
            return False, True
        if source is not None and source is not target:
            self._caches.copy(source.number, target.number, shared)
        target.owner, target.session = job.owner, step.session
        self._sessions[job.owner, step.session] = target
        self._take(job, target, ids, shared)
        return True, False

    def _will_share(self, owner: str, ids: Sequence[int], most: int) -> int:
        """Leading tokens that a prompt of the same owner, being prefilled now, will have left in its cache."""
        prefilling = [(job._slot, job) for job in self._active if job.owner == owner and len(job._todo) > _SHORT]
        return max((min(_alike_until([*s.ids, *j._todo], ids), most) for s, j in prefilling if s), default=0)

    def _free_slot(self) -> _Slot | None:
        unused = [slot for slot in self._slots if slot.session is None]
        if not unused:
            idle = [slot for slot in self._slots if slot.job is None]
            oldest = min(idle, key=lambda slot: slot.used, default=None)
            if oldest is None or self._clock() - oldest.used < self.settings.idle_seconds:
                return None
            assert oldest.session is not None
            self.close(oldest.owner, oldest.session)
            return oldest
        empty = next((slot for slot in unused if not slot.ids), None)
        return empty or min(unused, key=lambda slot: slot.used)

    def _take(self, job: Job, slot: _Slot, whole: Sequence[int], known: int) -> None:
        slot.ids, slot.job, slot.used = list(whole[:known]), job, self._clock()
        job._slot, job._todo = slot, list(whole[known:])

    # ── passes ──────────────────────────────────────────────────────────────

    def _prefill(self, jobs: Sequence[Job]) -> list[Job]:
        """The oldest prompt's next piece, and of others as much as fits beside it."""
        if not jobs:
            return []
        room = self.pass_tokens
        width = min(len(jobs[0]._todo), room)
        group = [jobs[0]]
        for job in jobs[1:]:
            alike = width / 2 <= len(job._todo) <= width
            if alike and (len(group) + 1) * width <= room:
                group.append(job)
        return self._pass(group, width)

    def _pass(self, jobs: Sequence[Job], most: int) -> list[Job]:
        feeds, pieces = [], []
        for job in jobs:
            slot = job._slot
            assert slot is not None
            piece = job._todo[:most]
            feeds.append(Feed(slot.number, len(slot.ids), piece))
            pieces.append(piece)
        states = self._caches.run(feeds)
        self.passes.append((len(jobs), sum(map(len, pieces))))
        done = []
        for job, piece, state in zip(jobs, pieces, states, strict=True):
            self._advance(job, piece, state)
            if job.result is not None:
                done.append(job)
        return done

    def _advance(self, job: Job, piece: list[int], state_nH: torch.Tensor) -> None:
        slot = job._slot
        assert slot is not None
        slot.ids += piece
        slot.used = self._clock()
        job._todo = job._todo[len(piece) :]
        first = job.step.states - len(job._todo)  # of this piece's states, the last so many are wanted
        if not job._drafted and first > 0:
            job._states.append(state_nH[-first:] if first < len(piece) else state_nH)
        elif job._drafted:
            job._states.append(state_nH)
        if job._todo:
            return
        if len(job._drafted) < job.step.draft:
            newest = state_nH[-1:].to(self._head.weight.device)
            token = int(self._head.logits(self._head.norm(newest)).argmax(-1))
            job._drafted.append(token)
            job._todo = [token]
            return
        job.result = Stepped(torch.cat(job._states)[-job.step.states - job.step.draft :].cpu(), tuple(job._drafted))
        slot.job = None


def _alike(jobs: Sequence[Job]) -> list[list[Job]]:
    """Groups whose rows are padded to at most twice their tokens; mostly one."""
    groups: list[list[Job]] = []
    for job in sorted(jobs, key=lambda job: -len(job._todo)):
        if groups:
            group = groups[-1]
            real = sum(len(other._todo) for other in group) + len(job._todo)
            if (len(group) + 1) * len(group[0]._todo) <= 2 * real:
                group.append(job)
                continue
        groups.append([job])
    return groups


def _alike_until(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading tokens are the same."""
    end = min(len(a), len(b))
    if a[:end] == b[:end]:
        return end
    return next(i for i in range(end) if a[i] != b[i])
