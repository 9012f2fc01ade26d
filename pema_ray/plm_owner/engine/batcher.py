"""Decides what the next forward pass computes: steps of all sessions that wait for a token, or one bulk pass.

Knows no threads and no event loop: its owner submits jobs and calls `run` until all are done. Passes over short pieces
serve every session that waits for a token. Between two of them runs exactly one bulk pass: a piece of a prompt or of an
extraction, of at most `pass_tokens` positions. Owners share the bulk passes fairly, and so do one owner's prompts and
extractions. N states, H hidden.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence

import torch

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, LMHead, SessionLost, Step, Stepped
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import PrefixLost
from pema_ray.plm_owner.engine.config import EngineConfig
from pema_ray.plm_owner.engine.extraction import Extraction, ExtractJob, GradientJob, ReadJob
from pema_ray.plm_owner.engine.fair import FairQueue
from pema_ray.plm_owner.engine.graphs import Graphs
from pema_ray.plm_owner.engine.prefixes import Prefixes
from pema_ray.plm_owner.engine.sessions import Sessions, StepJob
from pema_ray.plm_owner.engine.slots import SlotCaches, SlotTokens, make_caches
from pema_ray.plm_owner.model.load import LoadedPLM

Job = StepJob | ExtractJob
_PASS_TOKENS_CPU, _PASS_TOKENS_GPU = 512, 4096
_SLOT_GRACE = 0.25  # seconds in which a session that is being closed frees its slot
_SHORT = 16  # tokens; longer pieces are prefill, in bulk passes


class Batcher:
    """The jobs of one PLM.

    Args:
        head: for drafts.
        clock: monotonic seconds.
    """

    def __init__(
        self, plm: LoadedPLM, head: LMHead, config: EngineConfig, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.config, self._plm, self._head, self._clock = config, plm, head, clock
        self.max_tokens = min(config.max_tokens or plm.max_positions, plm.max_positions)
        self.pass_tokens = config.pass_tokens or (_PASS_TOKENS_CPU if plm.device.type == "cpu" else _PASS_TOKENS_GPU)
        self._vocabulary = min(head.vocab_size, plm.model.get_input_embeddings().weight.shape[0])
        self._caches = make_caches(plm, config.slots, self.max_tokens)
        self._sessions = Sessions(self._caches, config.slots, config.idle_seconds, clock)
        self.graphs = Graphs(config.graph_mib << 20, config.forget_seconds, clock)
        self._extraction = Extraction(plm, self.pass_tokens, config.share_passes, self.graphs)
        usable = isinstance(self._caches, SlotCaches) and self._extraction.reuses_prefixes
        self.prefixes = Prefixes(plm, config.prefix_positions, usable, clock)
        self._waiting: deque[StepJob] = deque()
        self._active: list[StepJob] = []
        self._extractions: list[ExtractJob] = []
        self._owners, self._flows, self._bulk_is_next = FairQueue(), FairQueue(), False
        self.passes: list[tuple[int, int]] = []
        """Sequences and tokens of every forward pass of the last `run`."""

    # ── requests ────────────────────────────────────────────────────────────

    def submit(self, owner: str, step: Step, deadline: float = float("inf")) -> StepJob:
        """Queue a step; `run` works on it. Sessions and caches of different owners never meet.

        Args:
            deadline: by the clock; a step that has not begun by then is `Busy`.
        """
        slot_deadline = deadline if step.waits else min(deadline, self._clock() + _SLOT_GRACE)
        job = StepJob(owner, step, deadline, slot_deadline)
        job.prefix, job.result = self._find_prefix(owner, step.handle)
        self._waiting.append(job)
        return job

    def submit_extraction(self, owner: str, batch: ExtractBatch, deadline: float = float("inf")) -> ExtractJob:
        """Queue an extraction; those of one owner run in order."""
        job = ExtractJob(owner, batch, deadline, tokens=batch.tokens)
        job.owned, job.result = self._find_prefix(owner, batch.handle)
        self._extractions.append(job)
        return job

    def submit_gradient(
        self, owner: str, batch: ExtractBatch, d_state_NH: torch.Tensor, deadline: float = float("inf")
    ) -> GradientJob:
        """Queue a gradient of the batch's prefix, among the extractions of its owner."""
        job = GradientJob(owner, batch, deadline, tokens=batch.tokens, d_state_NH=d_state_NH)
        job.owned, job.result = self._find_prefix(owner, batch.handle)
        self._extractions.append(job)
        return job

    def _find_prefix(self, owner: str, handle: str) -> tuple[Prefix | None, PrefixLost | None]:
        """The prefix of a request, or why there is none; a request keeps what it was given, whatever is put later."""
        try:
            return (self.prefixes.get(owner, handle) if handle else None), None
        except PrefixLost as error:
            return None, error

    def submit_read(self, owner: str, token_ids: Sequence[int], deadline: float = float("inf")) -> ReadJob:
        """Queue the reading of the keys and values of a text, which has tokens, among the extractions of its owner."""
        job = ReadJob(owner, ExtractBatch([list(token_ids)], [0]), deadline, tokens=len(token_ids))
        self._extractions.append(job)
        return job

    def close(self, owner: str, session: str) -> None:
        """Forget a session and drop its step. The next opening of an unknown one is refused: it was overtaken."""
        jobs = [job for job in [*self._waiting, *self._active] if job.key == (owner, session)]
        for job in jobs:
            job.cancelled = True
        self._sessions.close((owner, session), refuse_next=not jobs)

    def forget_abandoned(self) -> None:
        """Drop sessions, graphs and prefixes that were not used for `forget_seconds`: an owner that died could not."""
        self._sessions.forget(self.config.forget_seconds)
        self.graphs.forget()
        for owner in self.prefixes.forget(self.config.forget_seconds):
            self._extraction.forget(owner)

    # ── levels ──────────────────────────────────────────────────────────────

    @property
    def busy(self) -> bool:
        """Whether `run` has anything to do."""
        return bool(self._waiting or self._active or self._extractions)

    @property
    def live_sessions(self) -> int:
        """Sessions that hold a slot."""
        return len(self._sessions)

    def sessions_heard_of(self, seconds: float) -> int:
        """Sessions that took a step in the last `seconds`, or wait for one."""
        oldest = self._clock() - seconds
        return sum(slot.used >= oldest or slot.job is not None for slot in self._sessions.slots())

    @property
    def waiting(self) -> int:
        """Steps that have not begun."""
        return len(self._waiting)

    @property
    def waiting_tokens(self) -> int:
        """Tokens of prompts and extractions still to compute."""
        queued = sum(len(job.step.tokens) for job in list(self._waiting))
        active = sum(len(job.remaining) for job in list(self._active))
        return queued + active + sum(job.tokens for job in list(self._extractions))

    @property
    def cached_tokens(self) -> int:
        """Tokens of live sessions whose keys and values are held."""
        return sum(len(slot.ids) for slot in self._sessions.slots())

    # ── passes ──────────────────────────────────────────────────────────────

    @torch.inference_mode()
    def run(self) -> list[Job]:
        """Serve all sessions that wait for a token, or run the next bulk pass; returns the finished jobs."""
        done: list[Job] = [*self._drop_cancelled(), *self._begin(), *self._refuse_extractions()]
        self.passes = []
        short = [job for job in self._active if len(job.remaining) <= _SHORT]
        long = [job for job in self._active if len(job.remaining) > _SHORT]
        bulk = bool(long or self._extractions)
        if short and not (bulk and self._bulk_is_next):
            for group in _similar_lengths(short):
                done += self._pass(group, _SHORT)
            self._bulk_is_next = bulk
        elif bulk:
            done += self._bulk(long)
            self._bulk_is_next = False
        self._active = [job for job in self._active if job.result is None]
        self._extractions = [job for job in self._extractions if job.result is None]
        return done

    def _bulk(self, long: Sequence[StepJob]) -> list[Job]:
        """Compute a piece of a prompt or extraction, of the owner whose turn it is; returns the finished jobs."""
        flows: dict[tuple[str, str], list[Job]] = {}
        for job in long:
            flows.setdefault((job.owner, "prefill"), []).append(job)
        for job in self._extractions:
            flows.setdefault((job.owner, "extract"), []).append(job)
        owner = self._owners.choose(dict.fromkeys(owner for owner, _ in flows))
        flow = self._flows.choose(flow for flow in flows if flow[0] == owner)
        extractions = [job for job in flows[flow] if isinstance(job, ExtractJob)]
        if extractions:
            self.passes.append(self._extraction.advance(extractions))
        else:
            self._prefill([job for job in flows[flow] if isinstance(job, StepJob)])
        positions = sum(positions for _, positions in self.passes)
        self._owners.charge(owner, positions)
        self._flows.charge(flow, positions)
        return [job for job in flows[flow] if job.result is not None]

    def _prefill(self, jobs: Sequence[StepJob]) -> None:
        """Compute the oldest prompt's next piece, and those of similar prompts that fit into the pass."""
        width = min(len(jobs[0].remaining), self.pass_tokens)
        group = [jobs[0]]
        for job in jobs[1:]:
            is_similar = width / 2 <= len(job.remaining) <= width
            if is_similar and (len(group) + 1) * width <= self.pass_tokens:
                group.append(job)
        self._pass(group, width)

    def _pass(self, jobs: Sequence[StepJob], width: int) -> list[StepJob]:
        feeds, pieces = [], []
        for job in jobs:
            assert job.slot is not None
            piece = job.remaining[:width]
            feeds.append(SlotTokens(job.slot.number, len(job.slot.ids), piece))
            pieces.append(piece)
        states = self._caches.run(feeds)
        self.passes.append((len(jobs), sum(map(len, pieces))))
        for job, piece, state in zip(jobs, pieces, states, strict=True):
            self._advance(job, piece, state)
        return [job for job in jobs if job.result is not None]

    def _advance(self, job: StepJob, piece: list[int], state_nH: torch.Tensor) -> None:
        slot, step = job.slot, job.step
        assert slot is not None
        slot.ids += piece
        slot.used = self._clock()
        job.remaining = job.remaining[len(piece) :]
        requested = step.states - len(job.remaining)  # the last states of this piece
        if job.drafted:
            job.states.append(state_nH)
        elif requested > 0:
            job.states.append(state_nH[-requested:] if requested < len(piece) else state_nH)
        if job.remaining:
            return
        if len(job.drafted) < step.draft:
            newest = state_nH[-1:].to(self._head.weight.device)
            token = int(self._head.logits(self._head.norm(newest)).argmax(-1))
            job.drafted.append(token)
            job.remaining = [token]
            return
        job.result = Stepped(torch.cat(job.states)[-step.states - step.draft :].cpu(), tuple(job.drafted))
        slot.job = None

    # ── admission ───────────────────────────────────────────────────────────

    def _drop_cancelled(self) -> list[Job]:
        steps = [job for job in [*self._waiting, *self._active] if job.cancelled]
        extractions = [job for job in self._extractions if job.cancelled]
        for job in [*steps, *extractions]:
            job.result = SessionLost()
        for job in steps:
            if job.slot is not None:
                job.slot.job = None
                if job.step.position == 0:  # its caller will never learn of the session; a retry opens it anew
                    self._sessions.close(job.key)
        self._waiting = deque(job for job in self._waiting if not job.cancelled)
        self._active = [job for job in self._active if not job.cancelled]
        self._extractions = [job for job in self._extractions if not job.cancelled]
        return [*steps, *extractions]

    def _begin(self) -> list[Job]:
        """Begin waiting steps in order, but for those that wait for a slot or their session; returns the refused."""
        refused: list[Job] = []
        still_waiting: deque[StepJob] = deque()
        waiting_sessions: set[tuple[str, str]] = set()
        full = False
        self._sessions.begin_scan()
        for job in self._waiting:
            if job.result is not None:
                refused.append(job)
                continue
            slot = self._sessions.find(job.key)
            if slot is not None and slot.job is None and job.step.position == 0 and job.step.handle != slot.handle:
                self._sessions.close(job.key)  # opened anew behind another prefix
                slot = None
            try:
                if job.key in waiting_sessions or (slot is not None and slot.job is not None):
                    began = False
                elif slot is None and job.step.position == 0:
                    if self._sessions.was_closed(job.key):
                        raise SessionLost(job.step.session)
                    self._check(job.step, 0 if job.prefix is None else len(job.prefix))
                    prefilling = (active for active in self._active if len(active.remaining) > _SHORT)
                    began, full = self._sessions.open(job, prefilling, full)
                else:
                    self._check(job.step, 0 if slot is None else slot.prefix_positions)
                    self._sessions.continue_(job, slot)
                    began = True
                if not began and self._clock() > (job.slot_deadline if full else job.deadline):
                    reason = f"no slot became free in time: {self.config.slots} sessions are being decoded."
                    raise Busy(reason, 1.0 if job.step.waits else 0.0)
            except (SessionLost, UserError, Busy) as error:
                job.result = error
                refused.append(job)
                continue
            if began:
                self._active.append(job)
            else:
                waiting_sessions.add(job.key)
                still_waiting.append(job)
        self._waiting = still_waiting
        return refused

    def _refuse_extractions(self) -> list[Job]:
        """Refuse extractions that are invalid or have waited too long; returns them."""
        refused: list[Job] = []
        for job in self._extractions:
            if job.result is not None:
                refused.append(job)
                continue
            try:
                if not job.checked:
                    self._check_extraction(job)
                    job.checked = True
                if not job.begun and self._clock() > job.deadline:
                    raise Busy(f"{self.waiting_tokens} tokens wait for representations.")
            except (UserError, Busy) as error:
                job.result = error
                refused.append(job)
        self._extractions = [job for job in self._extractions if job.result is None]
        return refused

    def _check_extraction(self, job: ExtractJob) -> None:
        """Refuse what would fail in a pass."""
        batch, positions = job.batch, 0 if job.owned is None else len(job.owned)
        self._check_length(positions + batch.longest)
        self._check_tokens([batch.prefix, *batch.token_ids])
        if isinstance(job, ReadJob):
            self.prefixes.check_length(batch.longest)
        if job.needs_graph and job.owned is None:
            raise UserError("A gradient needs a batch with the handle of a prefix.")
        if not isinstance(job, GradientJob):
            return
        expected = (batch.rows, self._head.weight.shape[1])
        if tuple(job.d_state_NH.shape) != expected:
            raise UserError(f"The gradient of the states has shape {list(job.d_state_NH.shape)}, not {list(expected)}.")
        if not torch.isfinite(job.d_state_NH).all():
            raise UserError("The gradient of the states holds infinities or NaN.")

    def _check(self, step: Step, prefix_positions: int) -> None:
        self._check_length(prefix_positions + step.position + len(step.tokens) + step.draft)
        self._check_tokens([step.tokens])

    def _check_length(self, length: int) -> None:
        if length > self.max_tokens:
            raise UserError(
                f"A text of {length} tokens is longer than {self._plm.name} takes here ({self.max_tokens})."
            )

    def _check_tokens(self, sequences: Sequence[Sequence[int]]) -> None:
        """A token without an embedding would end the engine, and with it all sessions."""
        for ids in sequences:
            if ids and (min(ids) < 0 or max(ids) >= self._vocabulary):
                wrong = next(token for token in ids if not 0 <= token < self._vocabulary)
                raise UserError(f"{wrong} is no token of {self._plm.name}, which has {self._vocabulary}.")


def _similar_lengths(jobs: Sequence[StepJob]) -> list[list[StepJob]]:
    """Groups whose rows are padded to at most twice their tokens; usually one."""
    groups: list[list[StepJob]] = []
    for job in sorted(jobs, key=lambda job: -len(job.remaining)):
        if groups:
            group = groups[-1]
            tokens = sum(len(member.remaining) for member in group) + len(job.remaining)
            if (len(group) + 1) * len(group[0].remaining) <= 2 * tokens:
                group.append(job)
                continue
        groups.append([job])
    return groups
