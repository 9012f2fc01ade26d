"""What PlugLM's trainings keep of a run: whose settings made it, and whether it was finished. Knows no model.

<run_dir>/
  stamp         what the result depends on, as 16 hex digits
  metrics.json  written last
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.progress import console
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.ray_checkpoint import RAY_TRAIN

_STAMP, _METRICS = "stamp", "metrics.json"


def stamp_of(*settings: Any) -> str:
    """16 hex digits that name settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def begin(run_dir: Path, stamp: str, keep: bool, folders: Sequence[str]) -> None:
    """Set aside the folders and checkpoints that other settings have left in `run_dir`, or any (`keep` false)."""
    path = run_dir / _STAMP
    run_dir.mkdir(parents=True, exist_ok=True)
    if not keep or not path.exists() or path.read_text() != stamp:
        left = [run_dir / name for name in (*folders, CHECKPOINT, RAY_TRAIN, _METRICS) if (run_dir / name).exists()]
        if left:
            numbers = (run_dir / f"before-{number}" for number in itertools.count(1))
            aside = next(folder for folder in numbers if not folder.exists())
            aside.mkdir()
            for one in left:
                os.replace(one, aside / one.name)
            console.print(f"[yellow]{run_dir}: what was there is kept in {aside.name}[/]", highlight=False)
    with atomic_file(path) as temporary:
        temporary.write_text(stamp)


def finished(run_dir: Path, stamp: str) -> dict[str, Any] | None:
    """What a run of these settings has found, if it was finished and its model is still there."""
    try:
        found = json.loads((run_dir / _METRICS).read_text())
    except (OSError, ValueError):
        return None
    whole = (run_dir / "model" / "config.json").exists() and found.get("stamp") == stamp
    return found if whole else None


def finish(run_dir: Path, metrics: Mapping[str, Any]) -> None:
    """Keep what a run has found."""
    with atomic_file(run_dir / _METRICS) as temporary:
        temporary.write_text(json.dumps(metrics, indent=2) + "\n")
