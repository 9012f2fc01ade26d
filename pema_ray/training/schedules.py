"""The learning rate of a step, as pure functions of its number. Knows nothing else."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "cosine", "inverse_sqrt", "polynomial"]


def learning_rate(
    step: int,
    schedule: Schedule,
    peak: float,
    *,
    total_steps: int,
    warm_up_steps: int = 0,
    last: float = 0.0,
    power: float = 1.0,
) -> float:
    """The rate of step `step` (from 0): linear warm-up to `peak`, then the schedule's decay.

    With W warm-up steps and s = (step - W) / (total_steps - W), at most 1:

    - warm-up, step < W: peak · (step + 1) / W
    - `constant`: peak
    - `cosine`: last + (peak - last) · (1 + cos πs) / 2
    - `inverse_sqrt`: peak · √(max(W, 1) / (step + 1)), as fairseq's, whatever `total_steps`
    - `polynomial`: last + (peak - last) · (1 - s)^power, as BERT's with power 1
    """
    if step < warm_up_steps:
        return peak * (step + 1) / warm_up_steps
    share = min(1.0, (step - warm_up_steps) / max(1, total_steps - warm_up_steps))
    match schedule:
        case "constant":
            return peak
        case "cosine":
            return last + (peak - last) * 0.5 * (1 + math.cos(math.pi * share))
        case "inverse_sqrt":
            return peak * math.sqrt(max(1, warm_up_steps) / (step + 1))
        case "polynomial":
            return last + (peak - last) * (1 - share) ** power
