"""Peers that need no weights of the PLM: a small language model beside the PLM's exact distribution.

- `memory_decoder`: it imitates what kNN-LM would find in the training memory, and is mixed with the PLM in probability
  space (after Cao et al., "Memory Decoder", 2025): `P = λ P_small + (1 - λ) P_LM`.
- `proxy_tuning`: two of them, one that imitates the PLM on the training prompts (M⁻), and the same trained further on
  the targets (M⁺), shift the PLM's logits (after Liu et al., "Tuning Language Models by Proxy", 2024):
  `log P = log P_LM + α (log P_M⁺ - log P_M⁻) + const`.

Both papers start from pretrained small models of the PLM's vocabulary. A data owner who has none begins with what the
line yields: embeddings are the rows of the LM head, and the last layer's output is read by the PLM's norm and head.
B sequences, T positions, N rows, H hidden, K neighbours, V vocabulary.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaModel

from pema_ray.data_owner.adapter.knn import NearestNeighbours
from pema_ray.data_owner.decoding.predictor import Predictor
from pema_ray.data_owner.decoding.state import DecodingState
from pema_ray.errors import UserError
from pema_ray.evaluation.likelihood import TokenLikelihood
from pema_ray.line import LMHead, LMHeadBundle, ModelCard
from pema_ray.memory import ExternalMemory
from pema_ray.memory.external_memory import RowsView
from pema_ray.memory.plan import plan_batches
from pema_ray.pema.baselines.config import SmallLMSettings
from pema_ray.runtime.hardware import peak_memory, pick_device, set_threads
from pema_ray.tasks import EncodedPair

_ROWS = 256  # whose logits are held at once
_SEARCHED = 8192  # rows whose neighbours are searched for at once
_HEAD_SIZE = 64

Teacher = Callable[[np.ndarray, torch.Tensor], torch.Tensor]
"""Rows of the memory, and log P `[n, V]` of a model there → `Σ_v p(v) log P(v)` of what is to be learned, `[n]`."""


class SmallLM(nn.Module):
    """A Llama of few layers between the PLM's LM head as embedding and the PLM's LM head as output.

    Args:
        head: stays as it is.
    """

    def __init__(self, head: LMHead, layers: int) -> None:
        super().__init__()
        hidden = head.weight.shape[1]
        fitting = (n for n in range(max(1, hidden // _HEAD_SIZE), 0, -1) if hidden % (2 * n) == 0)
        heads = next(fitting, None)
        if heads is None:
            raise UserError(f"a small language model needs an even hidden size, not {hidden}")
        self._head = [head]  # no part of what is trained and saved
        self.scale = float(1 / head.weight.float().std())
        shape: dict[str, Any] = {"hidden_size": hidden, "intermediate_size": 4 * hidden, "num_hidden_layers": layers}
        self.body: Any = LlamaModel(LlamaConfig(vocab_size=1, num_attention_heads=heads, **shape))
        self.body.norm = nn.Identity()  # the PLM's own norm follows

    @property
    def head(self) -> LMHead:
        return self._head[0]

    def forward(self, ids_BT: torch.Tensor, cache: Any = None) -> torch.Tensor:
        """Its representations `[B, T, H]`; with a cache, of what follows what it holds."""
        embedded = nn.functional.embedding(ids_BT, self.head.weight).float() * self.scale
        return self.body(inputs_embeds=embedded, past_key_values=cache, use_cache=cache is not None).last_hidden_state

    def log_probs(self, x_NH: torch.Tensor) -> torch.Tensor:
        """float32 `[N, V]` of representations."""
        return self.head.log_probs(self.head.norm(x_NH))

    def rows(self, pairs: Sequence[EncodedPair]) -> torch.Tensor:
        """Representations `[N, H]` before each target token and before EOS, pair by pair."""
        sequences = [pair.prompt + pair.target for pair in pairs]
        padded_BT = torch.zeros(len(pairs), max(map(len, sequences)), dtype=torch.long)
        wanted_BT = torch.zeros_like(padded_BT, dtype=torch.bool)
        for row, (ids, pair) in enumerate(zip(sequences, pairs, strict=True)):
            padded_BT[row, : len(ids)] = torch.tensor(ids)
            wanted_BT[row, len(pair.prompt) - 1 : len(ids)] = True
        device = self.head.weight.device
        return self(padded_BT.to(device))[wanted_BT.to(device)]  # causal: padding on the right changes nothing

    def save(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        save_file({name: t.contiguous().cpu() for name, t in self.state_dict().items()}, folder / "model.safetensors")
        (folder / "small_lm.json").write_text(json.dumps({"layers": self.body.config.num_hidden_layers}))

    @classmethod
    def load(cls, folder: Path, head: LMHead) -> SmallLM:
        """Raises UserError if nothing was saved there."""
        if not (folder / "small_lm.json").exists():
            raise UserError(f"{folder}: holds no small language model.")
        model = cls(head, json.loads((folder / "small_lm.json").read_text())["layers"])
        model.load_state_dict(load_file(folder / "model.safetensors"))
        return model.to(head.weight.device).eval()


class AlignedMemory:
    """A memory's rows beside the pairs that they were built from.

    Args:
        pairs: those without rows are left out: the build has rejected them, or the view ends before them.

    Raises:
        UserError: the memory does not have a row for every token of the others: equal rows were merged, or the context
            was generated.
    """

    def __init__(self, rows: RowsView, pairs: Sequence[EncodedPair]) -> None:
        self.rows = rows
        example_N = rows.example_id
        starts = np.flatnonzero(np.diff(example_N, prepend=example_N[0] - 1))
        ends = np.append(starts[1:], len(example_N))
        where = {int(example_N[start]): (int(start), int(end)) for start, end in zip(starts, ends, strict=True)}
        self.pairs = [pair for pair in pairs if pair.example_id in where]
        self._where = [where[pair.example_id] for pair in self.pairs]
        lengths = [end - start for start, end in self._where]
        if not self.pairs or rows.weight is not None or lengths != [len(pair.target) + 1 for pair in self.pairs]:
            raise UserError(
                "proxy_tuning and memory_decoder need a memory with a row for every target token and EOS: "
                "build_memory.context=teacher_forced, and no equal rows merged."
            )
        self._number = {pair.example_id: n for n, pair in enumerate(self.pairs)}

    def rows_of(self, pairs: Sequence[EncodedPair]) -> np.ndarray:
        """`[N]`, the rows of some of its pairs, one pair after the other."""
        spans = (self._where[self._number[pair.example_id]] for pair in pairs)
        return np.concatenate([np.arange(start, end) for start, end in spans])


# ── what is learned ─────────────────────────────────────────────────────────


def gold_teacher(rows: RowsView) -> Teacher:
    """All mass on the row's own target."""

    def expectation(chosen_n: np.ndarray, log_p_nV: torch.Tensor) -> torch.Tensor:
        target = torch.from_numpy(rows.target[chosen_n].astype(np.int64)).to(log_p_nV.device)
        return log_p_nV.gather(1, target[:, None])[:, 0]

    return expectation


def plm_teacher(rows: RowsView, head: LMHead) -> Teacher:
    """The PLM's exact distribution, from its representations and its head."""

    def expectation(chosen_n: np.ndarray, log_p_nV: torch.Tensor) -> torch.Tensor:
        state = torch.from_numpy(rows[chosen_n]).to(head.weight.device)
        return (head.log_probs(head.norm(state)).exp() * log_p_nV).sum(-1)

    return expectation


def neighbour_teacher(rows: RowsView, head: LMHead, neighbours: int, temperature: float, beta: float) -> Teacher:
    """`β P_kNN + (1 - β)` on the row's own target; a row is not its own neighbour. Every row is searched for once."""
    knn = NearestNeighbours(rows, head, neighbours + 1, temperature)
    target_N = torch.from_numpy(rows.target.astype(np.int64))
    token_NK = torch.empty(len(target_N), neighbours + 1, dtype=torch.int32)
    share_NK = torch.empty(len(target_N), neighbours + 1)
    for start in range(0, len(target_N), _SEARCHED):
        number_n = np.arange(start, min(start + _SEARCHED, len(target_N)))
        distance, neighbour = knn.search(torch.from_numpy(rows[number_n]), head)
        score = -distance / temperature
        score[(neighbour < 0) | (neighbour == torch.from_numpy(number_n)[:, None])] = -torch.inf
        token_NK[start : start + _SEARCHED] = target_N[neighbour].int()
        share_NK[start : start + _SEARCHED] = score.softmax(-1)
    gold = gold_teacher(rows)

    def expectation(chosen_n: np.ndarray, log_p_nV: torch.Tensor) -> torch.Tensor:
        chosen, device = torch.from_numpy(chosen_n), log_p_nV.device
        near = (share_NK[chosen].to(device) * log_p_nV.gather(1, token_NK[chosen].long().to(device))).sum(-1)
        return beta * near + (1 - beta) * gold(chosen_n, log_p_nV)

    return expectation


# ── training ────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class SmallLMTraining:
    """What training gave, beside the weights.

    Attributes:
        dev_losses: mean cross-entropy of the dev targets after every epoch, in nats.
        epoch: whose weights were kept, from 1.
        seconds: of training and of searching for what is to be learned, without the measuring on dev pairs.
    """

    learning_rate: float
    dev_losses: list[float]
    epoch: int
    seconds: float


def train_small_lm(
    make: Callable[[], SmallLM], memory: AlignedMemory, teacher: Teacher, dev: Teacher, dev_memory: AlignedMemory,
    settings: SmallLMSettings, seed: int = 0,
) -> tuple[SmallLM, SmallLMTraining]:  # fmt: skip
    """Minimise the cross-entropy against a teacher at every rate; the rate and epoch that are best on dev are kept.

    Args:
        make: a model to begin with; called once for every rate.
        dev: the teacher of the dev rows.

    Raises:
        UserError: every rate gave a loss that is infinite or no number.
    """
    best: tuple[float, SmallLM, SmallLMTraining] | None = None
    for rate in settings.learning_rates:
        torch.manual_seed(seed)
        model = make()
        training = _train(model, memory, teacher, dev, dev_memory, settings, rate, seed)
        loss = min(training.dev_losses, default=math.inf)
        if math.isfinite(loss) and (best is None or loss < best[0]):
            best = loss, model, training
    if best is None:
        raise UserError("A small language model's loss became no number at every learning rate: give lower ones.")
    return best[1], best[2]


def _train(
    model: SmallLM, memory: AlignedMemory, teacher: Teacher, dev: Teacher, dev_memory: AlignedMemory,
    settings: SmallLMSettings, rate: float, seed: int,
) -> SmallLMTraining:  # fmt: skip
    batches = list(plan_batches(memory.pairs, settings.max_batch_tokens))
    steps = len(batches) * settings.epochs
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.05)
    kept, losses, seconds = copy.deepcopy(model.state_dict()), [], 0.0
    epoch_kept = 0
    for epoch in range(settings.epochs):
        started = time.perf_counter()
        model.train()
        for number in np.random.default_rng([seed, epoch]).permutation(len(batches)):
            optimizer.zero_grad(set_to_none=True)
            _learn(model, batches[number], memory, teacher)
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
        seconds += time.perf_counter() - started
        losses.append(dev_loss(model, dev_memory, dev, settings.max_batch_tokens))
        if losses[-1] == min(losses):
            kept, epoch_kept = copy.deepcopy(model.state_dict()), epoch + 1
    model.load_state_dict(kept)
    model.eval()
    return SmallLMTraining(rate, losses, epoch_kept, seconds)


def _learn(model: SmallLM, pairs: Sequence[EncodedPair], memory: AlignedMemory, teacher: Teacher) -> None:
    """Gradients of a batch: logits are held for some rows at a time."""
    x_NH, row_numbers = model.rows(pairs), memory.rows_of(pairs)
    leaf = x_NH.detach().requires_grad_()
    for start in range(0, len(row_numbers), _ROWS):
        part = slice(start, start + _ROWS)
        loss = -teacher(row_numbers[part], model.log_probs(leaf[part])).sum() / len(row_numbers)
        loss.backward()
    x_NH.backward(leaf.grad)


@torch.inference_mode()
def dev_loss(model: SmallLM, memory: AlignedMemory, teacher: Teacher, max_batch_tokens: int) -> float:
    """Mean cross-entropy against a teacher, in nats."""
    model.eval()
    total = rows = 0
    for pairs in plan_batches(memory.pairs, max_batch_tokens):
        x_NH, row_numbers = model.rows(pairs), memory.rows_of(pairs)
        for start in range(0, len(row_numbers), _ROWS):
            part = slice(start, start + _ROWS)
            total -= float(teacher(row_numbers[part], model.log_probs(x_NH[part])).sum())
        rows += len(row_numbers)
    return total / max(1, rows)


# ── in decoding ─────────────────────────────────────────────────────────────


def shift(log_plm_NV: torch.Tensor, expert_NV: torch.Tensor, other_NV: torch.Tensor, alpha: float) -> torch.Tensor:
    """Proxy-tuning: `log P ∝ log P_LM + α (log P_M⁺ - log P_M⁻)`, `[N, V]`."""
    return (log_plm_NV + alpha * (expert_NV - other_NV)).log_softmax(-1)


@dataclass(frozen=True)
class SmallLMSpec:
    """Where the models lie: what `PredictorSpec` is for an adapter.

    Attributes:
        folder: `expert/`, and `anti_expert/` for proxy-tuning.
        alpha: of proxy-tuning; none: the expert's own distribution.
    """

    folder: Path
    alpha: float | None = None

    def load(self, card: ModelCard, head: LMHead) -> SmallLMPredictor:
        names = ("expert",) if self.alpha is None else ("expert", "anti_expert")
        return SmallLMPredictor(head, [SmallLM.load(self.folder / name, head) for name in names], self.alpha)


class _State(DecodingState):
    """Caches of one sequence, one for each model, and the tokens that they have not read yet."""

    def __init__(self, models: Sequence[SmallLM], ids: Sequence[int]) -> None:
        from transformers import DynamicCache

        self._models, self._pending = models, list(ids)
        self._caches = [DynamicCache(config=model.body.config) for model in models]

    def read(self) -> list[torch.Tensor]:
        """Each model's newest representation `[1, H]`."""
        ids = torch.tensor([self._pending], device=self._models[0].head.weight.device)
        self._pending = []
        return [model(ids, cache)[:, -1] for model, cache in zip(self._models, self._caches, strict=True)]

    def follow(self, token: int) -> None:
        """The newest position was followed by this token."""
        self._pending.append(token)

    def fork(self) -> _State:
        """A second sequence that begins alike."""
        other = copy.copy(self)
        other._pending, other._caches = list(self._pending), copy.deepcopy(self._caches)
        return other


class SmallLMPredictor(Predictor):
    """Predicts from the tokens of a sequence alone; of its prompt's representations the last is received."""

    def __init__(self, head: LMHead, models: Sequence[SmallLM], alpha: float | None) -> None:
        super().__init__(head)
        self._models, self._alpha = models, alpha

    @property
    def looks_back(self) -> bool:
        """It has a state of its own for every sequence."""
        return True

    @property
    def prompt_from(self) -> int:
        """Past every prompt: it reads tokens."""
        return 2**31

    def begin(self, state_TH: torch.Tensor, ids: Sequence[int]) -> _State:
        """The state of one sequence, from all tokens of its prompt."""
        return _State(self._models, ids)

    def both(
        self, state_NH: torch.Tensor, decoding: Sequence[DecodingState | None]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`(log P_own [N, V], ones [N], log P_LM [N, V])`; each state reads the tokens that are new to it."""
        log_plm = self.head.log_probs(self.head.norm(state_NH))
        columns = zip(*(state.read() for state in decoding if isinstance(state, _State)), strict=True)
        log_probs = [model.log_probs(torch.cat(rows)) for model, rows in zip(self._models, columns, strict=True)]
        log_own = log_probs[0] if self._alpha is None else shift(log_plm, log_probs[0], log_probs[1], self._alpha)
        return log_own, torch.ones(len(log_own), device=log_own.device), log_plm

    def distribution(
        self, state_NH: torch.Tensor, decoding: Sequence[DecodingState | None]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The first two of `both`."""
        log_own, share, _ = self.both(state_NH, decoding)
        return log_own, share


@torch.inference_mode()
def target_log_probs(
    models: Sequence[SmallLM], memory: AlignedMemory, head: LMHead, alphas: Sequence[float] = (),
    max_batch_tokens: int = 4096,
) -> dict[Literal["own", "plm"] | float, np.ndarray]:  # fmt: skip
    """Log-probabilities `[N]` of the targets, EOS apart: of the first model, of the PLM, and proxy-tuned by each α."""
    by_system: dict[Any, list[np.ndarray]] = {key: [] for key in ("own", "plm", *alphas)}
    for pairs in plan_batches(memory.pairs, max_batch_tokens):
        rows = memory.rows_of(pairs)
        last = np.cumsum([len(pair.target) + 1 for pair in pairs]) - 1
        is_token = np.ones(len(rows), bool)
        is_token[last] = False
        states = [model.rows(pairs) for model in models]
        for start in range(0, len(rows), _ROWS):
            part = slice(start, start + _ROWS)
            target = torch.from_numpy(memory.rows.target[rows[part]].astype(np.int64)).to(head.weight.device)
            plm = head.log_probs(head.norm(torch.from_numpy(memory.rows[rows[part]]).to(head.weight.device)))
            own = [model.log_probs(state[part]) for model, state in zip(models, states, strict=True)]
            shifted = {alpha: shift(plm, own[0], own[1], alpha) for alpha in alphas}
            for key, log_p in {"own": own[0], "plm": plm, **shifted}.items():
                values = log_p.gather(1, target[:, None])[:, 0].cpu().numpy()
                by_system[key].append(values[is_token[part]])
    return {key: np.concatenate(values).astype(np.float64) for key, values in by_system.items()}


# ── a peer, whole ───────────────────────────────────────────────────────────


@dataclass(frozen=True)
class SmallLMJob:
    """Everything that training a peer needs, for a process of its own.

    Attributes:
        pairs: of the splits train and dev, and of `test`, the one that likelihood is measured on.
        memory: holds a folder for each split.
        lambdas: to choose from, for `memory_decoder`.
    """

    kind: Literal["memory_decoder", "proxy_tuning"]
    pairs: dict[str, list[EncodedPair]]
    memory: Path
    bundle: Path
    test: str
    folder: Path
    settings: SmallLMSettings
    lambdas: tuple[float, ...]
    max_examples: int | None
    seed: int
    threads: int
    device: str


def train_peer(job: SmallLMJob) -> dict[str, Any]:
    """Train, tune on dev and save a peer.

    Returns:
        `chosen` (λ or α), `nll` of the test targets, `seconds`, `peak_bytes`, `trained`; or `error`.
    """
    set_threads(job.threads)
    try:
        bundle = LMHeadBundle.load(job.bundle)
        head = bundle.head.to(pick_device(job.device))
        memories = {split: _aligned(job, split, bundle.card) for split in ("train", "dev", job.test)}
        models, trainings = _models(job, head, memories["train"], memories["dev"])
    except UserError as error:
        return {"error": str(error)}
    for name, model in models.items():
        model.save(job.folder / name)
    proxy = job.kind == "proxy_tuning"
    choices = job.settings.alphas if proxy else job.lambdas

    def nll(split: str, among: Sequence[float]) -> dict[float, float]:
        log_probs = target_log_probs(list(models.values()), memories[split], head, among if proxy else ())
        if proxy:
            return {alpha: float(-log_probs[alpha].mean()) for alpha in among}
        zeros = np.zeros(len(log_probs["own"]), bool)
        return {lam: TokenLikelihood(log_probs["own"], log_probs["plm"], zeros).nll(lam) for lam in among}

    on_dev = nll("dev", choices)
    best = min(on_dev, key=lambda value: on_dev[value])
    return {
        "error": "",
        "chosen": best,
        "nll": nll(job.test, [best])[best],
        "seconds": sum(training.seconds for training in trainings),
        "peak_bytes": peak_memory(head.weight.device),
        "trained": ", ".join(f"{training.learning_rate:g} and {training.epoch}" for training in trainings),
    }


def _aligned(job: SmallLMJob, split: str, card: ModelCard) -> AlignedMemory:
    limit = job.max_examples if split == "train" else None
    return AlignedMemory(ExternalMemory.open(job.memory / split, card).view(max_examples=limit), job.pairs[split])


def _models(
    job: SmallLMJob, head: LMHead, train: AlignedMemory, dev: AlignedMemory
) -> tuple[dict[str, SmallLM], list[SmallLMTraining]]:
    """The models by name, the expert first, and how each was trained."""
    s = job.settings

    def fresh() -> SmallLM:
        return SmallLM(head, s.layers).to(head.weight.device)

    dev_gold = gold_teacher(dev.rows)
    if job.kind == "memory_decoder":
        started = time.perf_counter()
        teacher = neighbour_teacher(train.rows, head, s.neighbours, s.temperature, s.beta)
        searching = time.perf_counter() - started
        expert, training = train_small_lm(fresh, train, teacher, dev_gold, dev, s, job.seed)
        return {"expert": expert}, [replace(training, seconds=training.seconds + searching)]
    plm, dev_plm = plm_teacher(train.rows, head), plm_teacher(dev.rows, head)
    other, first = train_small_lm(fresh, train, plm, dev_plm, dev, s, job.seed)
    gold = gold_teacher(train.rows)

    def like_the_other() -> SmallLM:
        model = fresh()
        model.load_state_dict(other.state_dict())
        return model

    expert, second = train_small_lm(like_the_other, train, gold, dev_gold, dev, s, job.seed)
    return {"expert": expert, "anti_expert": other}, [first, second]
