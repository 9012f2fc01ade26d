"""One pass of a model over a text measures what every system of evaluation needs (paper section 4).

Local memory: the window's earlier tokens, context tokens too. Long memory: the last `size` positions before the window,
with the keys they were scored with. External memory: the nearest entries of a datastore, whose search is a parameter.
Knows torch, no Ray. Shapes: W windows, T positions, N scored tokens, M memory entries, K neighbours, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
from torch import Tensor

from pema_ray.errors import UserError
from pema_ray.memory.search.nearest import Neighbours, SearchResult
from pema_ray.trime.evaluation.recent import RecentKeys
from pema_ray.trime.evaluation.similarity import LogSums, log_sums
from pema_ray.trime.model.memory_lm import LMStates, MemoryLM
from pema_ray.trime.text.windows import Window, batches, plan_windows

Vectors = Literal["key", "state"]


@dataclass(frozen=True, slots=True)
class Text:
    """A stream of tokens, and where its documents are.

    Attributes:
        token_N: int64.
        document_N: a number for each token, the same throughout a document; None: one document.
    """

    token_N: Tensor
    document_N: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Probe:
    """What a pass measures: memory sizes, temperatures and neighbours to choose among later.

    Attributes:
        sizes: rising numbers of long-memory entries; 0 is local memory alone.
        taus: softmax temperatures τ of memory logits (θ = τ √H); neighbours: rising numbers k of neighbours.
        interp_temps: temperatures of the raw similarity in the second interpolation.
        vectors: what the local and long memory compare: keys g, or final states f (the continuous cache's).
    """

    tokens_per_sample: int
    context_window: int
    batch_windows: int = 8
    sizes: tuple[int, ...] = (0,)
    taus: tuple[float, ...] = (1.0,)
    neighbours: tuple[int, ...] = (1024,)
    interp_temps: tuple[float, ...] = (10.0,)
    vectors: Vectors = "key"
    reset_at_documents: bool = False
    count_context_twice: bool = False

    def __post_init__(self) -> None:
        for rising in (self.sizes, self.neighbours):
            assert list(rising) == sorted(set(rising))
            assert rising[0] >= 0

    def thetas(self, hidden_size: int) -> tuple[float, ...]:
        """τ √H."""
        return tuple(tau * math.sqrt(hidden_size) for tau in self.taus)


@dataclass(frozen=True, slots=True)
class Statistics:
    """Of every scored token, in order: all that calibration needs to choose τ, λ, k and sizes.

    Attributes:
        position_N: of the predicted token in the text.
        log_vocab_N, log_norm_N: log P_vocab(x) and the vocabulary's log-normaliser.
        context: of the local and long memory, by size and τ.
        external: of the neighbours, by k and τ; second: by k and interp_temp. None without a datastore.
    """

    position_N: Tensor
    log_vocab_N: Tensor
    log_norm_N: Tensor
    context: LogSums
    external: LogSums | None = None
    second: LogSums | None = None

    def __len__(self) -> int:
        return len(self.position_N)

    def __getitem__(self, rows: slice) -> Statistics:
        def cut(column: Any) -> Any:
            return None if column is None else column[rows]

        return Statistics(*(cut(getattr(self, column.name)) for column in fields(self)))

    @classmethod
    def concatenate(cls, parts: Sequence[Statistics]) -> Statistics:
        def joined(name: str) -> Any:
            columns = [getattr(part, name) for part in parts]
            if columns[0] is None:
                return None
            return LogSums.concatenate(columns) if isinstance(columns[0], LogSums) else torch.cat(columns)

        return cls(*(joined(column.name) for column in fields(cls)))


@dataclass(frozen=True, slots=True)
class Scored:
    """A window's scored tokens and the memory that each of them sees.

    Attributes:
        state_NH, key_NH: of the scored inputs.
        similarity_NM: raw, of local entries first, then of long ones from the newest on; -inf: hidden.
        entry_M: the position of each entry's token; ends: how many columns each size has.
    """

    window: Window
    state_NH: Tensor
    key_NH: Tensor
    similarity_NM: Tensor
    entry_M: Tensor
    ends: tuple[int, ...]


@torch.inference_mode()
def measure(
    model: MemoryLM,
    text: Text,
    probe: Probe,
    neighbours: Neighbours | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> Statistics:
    """Run the model once over the text.

    Args:
        neighbours: a datastore's search; None: no external memory.
        on_batch: called with the number of tokens scored, batch after batch.
    """
    parts: list[Statistics] = []

    def finish(batch: list[Scored], search: Future[SearchResult] | None) -> None:
        parts.append(_statistics(model, text, probe, batch, None if search is None else search.result()))
        if on_batch:
            on_batch(len(parts[-1]))

    pending: tuple[list[Scored], Future[SearchResult] | None] | None = None
    with ThreadPoolExecutor(1) as executor:  # searches while the model computes the next windows
        for batch in walk(model, text, probe):
            search = None
            if neighbours is not None:
                query_NH = torch.cat([scored.key_NH for scored in batch]).cpu().numpy()
                search = executor.submit(neighbours.search, query_NH, probe.neighbours[-1])
            if pending is not None:
                finish(*pending)
            pending = batch, search
        if pending is not None:
            finish(*pending)
    return Statistics.concatenate(parts)


def walk(model: MemoryLM, text: Text, probe: Probe) -> Iterator[list[Scored]]:
    """The windows of a text, in order and in batches, each with the memory that it sees.

    Raises:
        UserError: windows longer than the model's positions, or without room for new tokens.
    """
    if probe.tokens_per_sample > model.max_positions:
        raise UserError(
            f"evaluate: windows of {probe.tokens_per_sample} tokens, the model allows {model.max_positions}. "
            "Lower evaluate.tokens_per_sample."
        )
    tokens = text.token_N
    recent = RecentKeys(max(probe.sizes) + probe.tokens_per_sample, model.hidden_size, tokens.device)
    for batch in batches(plan_windows(len(tokens), probe.tokens_per_sample, probe.context_window), probe.batch_windows):
        states = model.represent(_stack(tokens, batch))
        compared_WTH = (states.key_BTH if probe.vectors == "key" else states.state_BTH).float()
        scored = []
        for row, window in enumerate(batch):
            scored.append(_look_back(text, probe, window, states, compared_WTH[row], row, recent))
            recent.append(compared_WTH[row, window.first - window.start : window.length])
        yield scored


def _stack(tokens: Tensor, batch: Sequence[Window]) -> Tensor:
    """`[W, T]`; shorter windows are padded at the end, where no earlier position sees it."""
    longest = max(window.length for window in batch)
    stacked = tokens.new_zeros(len(batch), longest)
    for row, window in enumerate(batch):
        stacked[row, : window.length] = tokens[window.start : window.end]
    return stacked


def _look_back(
    text: Text, probe: Probe, window: Window, states: LMStates, compared_TH: Tensor, row: int, recent: RecentKeys
) -> Scored:
    new = slice(window.first - window.start, window.length)
    until = window.first if probe.count_context_twice else window.start  # long memory ends where the window begins
    longest = min(max(probe.sizes), until - recent.begin)
    memory_MH = torch.cat([compared_TH[: window.length], recent.between(until - longest, until).flip(0)])
    device = compared_TH.device
    own_T = torch.arange(window.start, window.end, device=device)
    long_M = torch.arange(until - longest, until, device=device)
    entry_M = torch.cat([own_T, long_M.flip(0)]) + 1  # entry j pairs the context that ends at j with the token at j + 1
    target_at_N = torch.arange(window.first, window.end, device=device) + 1
    hidden_NM = entry_M[None] >= target_at_N[:, None]
    if probe.reset_at_documents and text.document_N is not None:
        hidden_NM |= text.document_N[entry_M][None] != text.document_N[target_at_N][:, None]
    similarity_NM = (compared_TH[new] @ memory_MH.T).masked_fill_(hidden_NM, -torch.inf)
    ends = tuple(window.length + min(size, longest) for size in probe.sizes)
    return Scored(window, states.state_BTH[row, new], states.key_BTH[row, new].float(), similarity_NM, entry_M, ends)


def _statistics(
    model: MemoryLM, text: Text, probe: Probe, batch: Sequence[Scored], nearest: SearchResult | None
) -> Statistics:
    position_N = torch.cat([torch.arange(scored.window.first, scored.window.end) + 1 for scored in batch])
    target_N, thetas = text.token_N[position_N.to(text.token_N.device)], probe.thetas(model.hidden_size)
    score = model.score(torch.cat([scored.state_NH for scored in batch]), target_N)
    context = []
    for scored, target in zip(batch, target_N.split([scored.window.scored for scored in batch]), strict=True):
        hit_NM = text.token_N[scored.entry_M][None] == target[:, None]
        context.append(log_sums(scored.similarity_NM, hit_NM, scored.ends, thetas).cpu())
    external = second = None
    if nearest is not None:
        hit_NK = nearest.token_NK == target_N[:, None].cpu()
        external = log_sums(nearest.similarity_NK, hit_NK, probe.neighbours, thetas)
        second = log_sums(nearest.similarity_NK, hit_NK, probe.neighbours, probe.interp_temps)
    return Statistics(
        position_N,
        score.log_prob_N.float().cpu(),
        score.log_normaliser_N.float().cpu(),
        LogSums.concatenate(context),
        external,
        second,
    )
