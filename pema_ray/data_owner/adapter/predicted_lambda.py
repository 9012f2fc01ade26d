"""λ predicted from the state. Knows no Ray. N rows, H hidden.

`g(x) = σ(w · x + b)`, and the adapter's own distribution becomes `g P_PEMA + (1 - g) P_LM`: with λ_max = 1 (constant),
g is the λ of every token; a falling schedule still bounds it from above. Fitted to held-out rows after the adapter is
trained, as it is better on its training rows than elsewhere.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from pema_ray.errors import UserError

_DECAYS = (1.0, 0.1, 0.01, 0.001)  # of the weights, tried in turn
_STEPS = 60  # of L-BFGS
_MIN_ROWS = 64


def fit_gate(gate: nn.Linear, rows: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> tuple[float, float]:
    """Fit the gate to held-out rows by maximum likelihood.

    The first half of the rows is fitted with several weight decays; the second half selects one, so its NLL is
    slightly optimistic.

    Args:
        rows: blocks of `(x [n, H], log P_PEMA of the target [n], log P_LM of the target [n])`.

    Returns:
        The second half's NLL with the best constant λ of the first half, and with the gate.

    Raises:
        UserError: there are too few rows.
    """
    x_NH, log_pema_N, log_plm_N = (torch.cat(part) for part in zip(*rows, strict=True))
    if len(x_NH) < _MIN_ROWS:
        raise UserError(
            f"train.predict_lambda: the dev memory has {len(x_NH)} rows, but fitting λ needs at least {_MIN_ROWS}. "
            "Add dev pairs (task.limits), or leave it off."
        )
    x_NH = x_NH.double()
    scale = x_NH.std() + 1e-9
    x_NH, half = x_NH / scale, len(x_NH) // 2
    fit_rows, selection_rows = slice(0, half), slice(half, None)

    def nll(w: torch.Tensor, b: torch.Tensor, part: slice) -> torch.Tensor:
        score = x_NH[part] @ w + b
        log_g, log_rest = nn.functional.logsigmoid(score), nn.functional.logsigmoid(-score)
        return -torch.logaddexp(log_pema_N[part].double() + log_g, log_plm_N[part].double() + log_rest).mean()

    def fit(decay: float | None) -> tuple[torch.Tensor, torch.Tensor]:
        w = torch.zeros(x_NH.shape[1], dtype=torch.float64, device=x_NH.device, requires_grad=decay is not None)
        b = torch.full((1,), 2.0, dtype=torch.float64, device=x_NH.device, requires_grad=True)
        trained = [b] if decay is None else [w, b]
        optimizer = torch.optim.LBFGS(trained, max_iter=_STEPS, line_search_fn="strong_wolfe")

        def closure() -> torch.Tensor:
            optimizer.zero_grad()
            loss = nll(w, b, fit_rows) + (decay or 0.0) * w.square().sum()
            loss.backward()
            return loss

        with torch.enable_grad():
            optimizer.step(closure)  # type: ignore[arg-type]
        return w.detach(), b.detach()

    fits = [fit(None), *(fit(decay) for decay in _DECAYS)]
    losses = [float(nll(w, b, selection_rows)) for w, b in fits]
    w, b = fits[losses.index(min(losses))]
    with torch.no_grad():
        gate.weight.copy_((w / scale)[None])
        gate.bias.copy_(b)
    return losses[0], min(losses)
