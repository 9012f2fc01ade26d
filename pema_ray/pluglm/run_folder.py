"""What PlugLM's trainings keep of a run: whose settings made it, and whether it was finished. Knows no model.

<run_dir>/
  stamp         what the result depends on, as 16 hex digits
  metrics.json  written last
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pema_ray.memory.shards import atomic_file
from pema_ray.training.checkpoint import CHECKPOINT

_STAMP, _METRICS = "stamp", "metrics.json"


def stamp_of(*settings: Any) -> str:
    """16 hex digits that name settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def begin(run_dir: Path, stamp: str, keep: bool, folders: Sequence[str]) -> None:
    """Take away the folders and the checkpoint that other settings have left, or any (`keep` false)."""
    path = run_dir / _STAMP
    if not keep or not path.exists() or path.read_text() != stamp:
        for name in folders:
            shutil.rmtree(run_dir / name, ignore_errors=True)
        for name in (CHECKPOINT, _METRICS):
            (run_dir / name).unlink(missing_ok=True)
    run_dir.mkdir(parents=True, exist_ok=True)
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
