"""`pema-ray export-head`: what the PLM owner shares, from a PLM of one's own or from a service."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, Busy
from pema_ray.pema.config import ExperimentConfig
from pema_ray.pema.plm import connect
from pema_ray.pema.run import Run
from pema_ray.runtime.cluster import ray_cluster
from pema_ray.runtime.hardware import dtype_name


def run(config: ExperimentConfig) -> dict[str, Any]:
    """Write `export_head/lm_head/`."""
    run = Run(config)

    def work() -> dict[str, Any]:
        engine = {"max_tokens": None} if config.plm.is_own else None
        try:
            cluster = ray_cluster(config.ray) if config.plm.serve else nullcontext()
            with cluster, BlockingPLM(connect(config.plm, engine=engine)) as plm:
                bundle, longest = plm.lm_head(), plm.describe().limits.max_tokens
        except (Busy, ConnectionError) as error:
            raise UserError(f"{config.plm.label}: the PLM owner cannot be reached now: {error}") from None
        # A service may accept only shorter sequences than its PLM; prompts and examples are checked against its limit.
        card = replace(bundle.card, max_positions=min(bundle.card.max_positions, longest))
        bundle = replace(bundle, card=card)
        bundle.save(run.path("export_head", "lm_head"))
        dtype = dtype_name(bundle.head.dtype)
        return {
            "card": card.to_dict(),
            "head": bundle.head.spec.norm,
            "dtype": dtype,
            "summary": f"{card.label}: H = {card.hidden_size}, V = {card.vocab_size:,}, {dtype}",
        }

    return run.perform("export_head", work)
