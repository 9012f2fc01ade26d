"""The training loop of a translation model, in one process of any number. Knows no Ray.

Groups follow from (seed, epoch), dropout from (seed, update, group, process): a run that resumes goes on exactly as if
it had never stopped.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import AdamW

from pema_ray.errors import UserError
from pema_ray.hardware import peak_memory
from pema_ray.training.checkpoint import CHECKPOINT, load_checkpoint, save_checkpoint
from pema_ray.training.schedules import learning_rate
from pema_ray.training.strategies import Place, Strategy, make_strategy
from pema_ray.trime.batches import share_of
from pema_ray.trime.memories import PADDING
from pema_ray.trime.mt.config import MtConfig
from pema_ray.trime.mt.data import Parallel, padded
from pema_ray.trime.mt.groups import cut, groups_of
from pema_ray.trime.mt.model import Translator
from pema_ray.trime.mt.objective import MtObjective, Ways
from pema_ray.trime.training import History, Point

if TYPE_CHECKING:
    from pema_ray.training.ray_loop import Tell

logger = logging.getLogger(__name__)
BEST = "best.safetensors"


@dataclass
class MtTrainer:
    """Trains one model.

    Validation is the vocabulary's loss alone on dev: other dev sentences' targets are nothing a translator has.

    Args:
        eos: ends sources and targets.
        run_dir: holds the checkpoint (resume) and the best model; every process sees the same folder.
        walk_S: BM25's order of the training sentences.
    """

    config: MtConfig
    model: Translator
    eos: int
    train: Parallel
    dev: Parallel
    run_dir: Path
    place: Place = field(default_factory=Place)
    tell: Tell = lambda kind, point: None
    walk_S: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._groups = groups_of(self.train, self.config.batches, self.config.seed, self.walk_S)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, np.int64))

    @property
    def updates(self) -> int:
        """Steps of the optimiser in the whole training."""
        each = self.config.batches.groups_per_update
        return max(1, math.ceil(self.config.train.epochs * len(self._groups) / each))

    def run(self) -> History:
        """Train to the end; `model` is then the best one by validation."""
        c = self.config.train
        self.model.to(self.place.device)
        objective = MtObjective(self.model)
        step, history, moments = self._restore()
        strategy = make_strategy(
            c.strategy,
            self.place,
            objective,
            lambda named: AdamW([p for _, p in named], c.learning_rate, c.betas, weight_decay=c.weight_decay),
            batch_size=self.config.batches.groups_per_update,
            accumulate=self.config.batches.groups_per_update,
            clip=c.clip,
            zero_stage=c.zero_stage,
            idle_inputs=lambda: self._inputs(self.train, np.empty(0, np.int64), Ways(False), 1.0),
        )
        strategy.load_optimizer_state(moments)
        self._optimise(objective, strategy, history, step)
        history.peak_bytes = peak_memory(self.place.device)
        if self.place.world > 1:
            torch.distributed.barrier()  # the leading process may still be writing its best
        best, _ = load_checkpoint(self.run_dir / BEST)
        self.model.load_state_dict(best["model"])
        return history

    # ── an update ───────────────────────────────────────────────────────────

    def group(self, number: int) -> np.ndarray:
        """Sentences of the group with this number, counted over all epochs."""
        epoch, within = divmod(number, len(self._groups))
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.config.seed, epoch])
            self._order = (epoch, generator.permutation(len(self._groups)))
        return self._groups[self._order[1][within]]

    def ways(self, number: int) -> Ways:
        """No memory during the warm-up by cross-entropy, then as configured."""
        c = self.config.train
        on = c.memory == "trime" and number >= c.ce_epochs * len(self._groups)
        return Ways(on, c.temperature, c.top_k)

    def parts(self, update: int) -> Iterator[tuple[np.ndarray, Ways]]:
        """This process's sentences of each group of an update."""
        each = self.config.batches.groups_per_update
        for number in range(update * each, (update + 1) * each):
            mine, _ = share_of(self.group(number), self.place.rank, self.place.world)
            yield mine, self.ways(number)

    def tokens_of(self, update: int) -> int:
        """Target tokens of an update, over all processes, `<eos>` among them."""
        each = self.config.batches.groups_per_update
        groups = (self.group(number) for number in range(update * each, (update + 1) * each))
        return sum(len(self.train.target[sentence]) + 1 for group in groups for sentence in group)

    def _inputs(self, pairs: Parallel, numbers: np.ndarray, ways: Ways, divisor: float) -> tuple[Any, ...]:
        """Tensors of some sentences; of none, one that is all padding: every process takes part in every exchange."""
        m = self.model
        sources = [pairs.source[n] + [self.eos] for n in numbers] or [[self.eos]]
        inputs = [[m.start, *pairs.target[n]] for n in numbers] or [[m.start]]
        labels = [pairs.target[n] + [self.eos] for n in numbers] or [[PADDING]]
        arrays = (padded(sources, m.pad), padded(inputs, m.pad), padded(labels, PADDING))
        tensors = [torch.from_numpy(array).to(self.place.device) for array in arrays]
        sentence_B = torch.as_tensor(numbers if len(numbers) else [-1], device=self.place.device)
        return (*tensors, sentence_B, ways, divisor)

    def _optimise(self, objective: MtObjective, strategy: Strategy, history: History, step: int) -> None:
        c = self.config.train
        if step == 0:
            self._validate(objective, history, 0)
        since = np.zeros(3)  # losses' sums and tokens since the last validation
        while step < self.updates and not history.stopped_early:
            started = time.perf_counter()
            objective.train()
            tokens = self.tokens_of(step)
            sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)
            parts = list(self.parts(step))
            for number, (mine, ways) in enumerate(parts):
                seeds = np.random.SeedSequence([self.config.seed, step, number, self.place.rank])
                torch.manual_seed(int(seeds.generate_state(1)[0]))
                inputs = self._inputs(self.train, mine, ways, tokens / self.place.world)
                sums += strategy.learn(inputs, last=number == len(parts) - 1)[1]
            strategy.step(self.learning_rate(step), c.clip)
            step += 1
            loss, vocabulary_loss = (self._sum(sums) / tokens).tolist()
            if not math.isfinite(loss):
                raise UserError(f"The loss became infinite or no number at update {step}: lower train.learning_rate.")
            since += np.array([loss * tokens, vocabulary_loss * tokens, tokens])
            history.tokens += tokens
            history.seconds += time.perf_counter() - started
            self._tell("train", Point(step, loss, vocabulary_loss, history.seconds))
            if step % c.validate_every == 0 or step == self.updates:
                means = (since[:2] / since[2]).tolist()
                history.train.append(Point(step, means[0], means[1], history.seconds))
                since[:] = 0
                self._validate(objective, history, step)
                self._save(strategy, history, step)

    def learning_rate(self, step: int) -> float:
        c = self.config.train
        return learning_rate(
            step,
            c.schedule,
            c.learning_rate,
            total_steps=self.updates,
            warm_up_steps=c.warm_up_steps,
            last=c.final_learning_rate,
        )

    @torch.no_grad()
    def _validate(self, objective: MtObjective, history: History, step: int) -> None:
        started = time.perf_counter()
        objective.eval()
        lengths = [len(target) + 1 for target in self.dev.target]
        most = max(self.config.batches.max_tokens, max(lengths))
        groups = cut(np.argsort(lengths, kind="stable"), lengths, most)
        sums = torch.zeros(2, dtype=torch.float64, device=self.place.device)
        for group in groups[self.place.rank :: self.place.world]:
            sums += objective(*self._inputs(self.dev, group, Ways(False), 1.0))[1]
        loss = float(self._sum(sums)[1]) / sum(lengths)
        history.seconds += time.perf_counter() - started
        point = Point(step, loss, loss, history.seconds)
        history.validation.append(point)
        if loss < history.best_loss:
            history.best_loss, history.best_step, history.stale = loss, step, 0
            if self.place.leads:
                save_checkpoint(self.run_dir / BEST, {"model": self.model.state_dict()})
        else:
            history.stale += 1
            patience = self.config.train.patience
            history.stopped_early = patience is not None and history.stale >= patience
        self._tell("validation", point)

    # ── processes, resume ───────────────────────────────────────────────────

    def _sum(self, values: Tensor) -> Tensor:
        """Over all processes, the same in each of them."""
        if self.place.world > 1:
            torch.distributed.all_reduce(values)
        return values

    def _tell(self, kind: str, point: Point) -> None:
        if self.place.leads:
            self.tell(kind, asdict(point))

    def _save(self, strategy: Strategy, history: History, step: int) -> None:
        moments = strategy.optimizer_state()  # every process must ask
        if self.place.leads:
            groups = {"model": self.model.state_dict(), "optimizer": moments}
            save_checkpoint(self.run_dir / CHECKPOINT, groups, {"step": step, "history": history.to_dict()})

    def _restore(self) -> tuple[int, History, dict[str, Tensor]]:
        path = self.run_dir / CHECKPOINT
        if not path.exists():
            return 0, History(), {}
        groups, told = load_checkpoint(path)
        try:
            self.model.load_state_dict(groups["model"])
        except RuntimeError:
            raise UserError(f"{path}: holds a model of another shape. Delete it to start over.") from None
        logger.info("training resumes at update %d", told["step"])
        return told["step"], History.from_dict(told["history"]), groups.get("optimizer", {})
