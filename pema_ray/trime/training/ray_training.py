"""What TRIME's two trainings share on the driver: a progress bar, `history.json`, metrics."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import track
from pema_ray.training.config import TrainingConfig
from pema_ray.training.history import TrainerHistory
from pema_ray.training.ray_loop import run_workers, showing_loss
from pema_ray.trime.model.registry import count_parameters
from pema_ray.trime.training.token_trainer import TokenTrainer


def train_on_ray(
    work: Callable[[Any], dict[str, Any]],
    job: Any,
    run_dir: Path,
    config: TrainingConfig,
    ray: RayConfig,
    updates: int,
    tokens: str = "tokens",
) -> dict[str, Any]:
    """Run `work(job)` in every worker and write `history.json`.

    Args:
        work: returns `outcome(trainer)`.
        updates: of the whole training.
        tokens: their name in the summary.

    Returns:
        The stage's metrics.
    """
    cluster = ray_cluster(ray, config.cpus_per_worker, config.gpus_per_worker, config.min_workers or config.workers)
    with cluster, track("training", updates, "updates") as bar:
        outcome = run_workers(work, job, run_dir, config, showing_loss(bar)).returned
    history = TrainerHistory.from_dict(outcome["history"])
    with atomic_file(run_dir / "history.json") as temporary:
        temporary.write_text(json.dumps(outcome["history"]) + "\n")
    perplexity, rate = math.exp(history.best_loss), outcome["tokens"] / max(1e-9, history.seconds)
    return {
        "parameters": outcome["parameters"],
        "updates": len(history.train),
        "best_step": history.best_step,
        "dev_loss": history.best_loss,
        "dev_perplexity": perplexity,
        "tokens": outcome["tokens"],
        "tokens_per_second": round(rate, 1),
        "training_seconds": round(history.seconds, 2),
        "peak_bytes": history.peak_bytes,
        "summary": f"{outcome['parameters']:,} parameters; dev perplexity {perplexity:.2f} at update "
        f"{history.best_step} of {updates:,}, {rate:,.0f} {tokens}/s",
    }


def outcome(trainer: TokenTrainer) -> dict[str, Any]:
    """What a worker returns when its training is over."""
    history, parameters = trainer.history.to_dict(), count_parameters(trainer.model)
    return {"history": history, "tokens": trainer.tokens_trained, "parameters": parameters}
