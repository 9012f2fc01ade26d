"""Reads the weights of a causal LM and refuses a checkpoint that does not fill the whole model.

transformers only warns about such a checkpoint, and starts from random numbers where tensors are missing.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pema_ray.errors import UserError
from pema_ray.line.lm_head import TRANSFORMERS_LOCK

logger = logging.getLogger(__name__)
_NAMED = 3  # tensors that a message names
_INDEX = re.compile(r"(?<=\.)\d+(?=\.|$)")


def read_model(name: str, where: str, **options: Any) -> Any:
    """The causal LM in a folder or on the hub, with every tensor from the checkpoint.

    Args:
        name: the PLM as messages show it.
        options: of transformers' `from_pretrained`.

    Raises:
        UserError: tensors are missing, have another shape, or belong to the model but have no place in it.
        OSError, ValueError and others of transformers: the files cannot be read as a causal LM.
    """
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # `_refuse_incomplete` names mismatches
    with TRANSFORMERS_LOCK, _without_report() as reports:
        from transformers import AutoModelForCausalLM

        loaded: Any = AutoModelForCausalLM.from_pretrained(where, **options)
    model, info = loaded
    if getattr(model, "_hf_peft_config_loaded", False):  # then `info` describes the adapter, not the model under it
        lines = [line for report in reports for line in report.splitlines()]
        info["missing_keys"] |= {line.split()[0] for line in lines if "MISSING" in line and "|" in line}
    _refuse_incomplete(name, model, info)
    return model


@contextmanager
def _without_report() -> Iterator[list[str]]:
    """Collect transformers' tables of missing tensors instead of showing them, at any log level."""
    reports: list[str] = []

    def is_no_report(record: logging.LogRecord) -> bool:
        is_report = "LOAD REPORT" in record.getMessage()
        if is_report:
            reports.append(record.getMessage())
        return not is_report

    source = logging.getLogger("transformers.modeling_utils")
    level = source.level
    source.addFilter(is_no_report)
    # With TRANSFORMERS_VERBOSITY=error, as our commands set it, there is no table. At WARNING, transformers also looks
    # for a plan of tensor parallelism.
    source.setLevel(logging.WARNING - 1)
    try:
        yield reports
    finally:
        source.setLevel(level)
        source.removeFilter(is_no_report)


def _refuse_incomplete(name: str, model: nn.Module, info: dict[str, Any]) -> None:
    kind = type(model).__name__
    missing, unexpected = sorted(info["missing_keys"]), sorted(info["unexpected_keys"])
    lacking = f"plm.name={name}: the checkpoint lacks {_counted(missing)} of {kind}"
    if missing and unexpected:
        raise UserError(
            f"{lacking}, and holds {_counted(unexpected)} without a place.\nRename the tensors if only a prefix "
            "differs; else use the config.json saved with them."
        )
    if missing:
        raise UserError(f"{lacking}. Download or save it again: nothing may start from random numbers.")
    if info["mismatched_keys"]:
        mismatched = sorted(info["mismatched_keys"])
        tensor, shape, expected = mismatched[0]
        raise UserError(
            f"plm.name={name}: the checkpoint holds {_counted([key for key, *_ in mismatched])} of another shape than "
            f"{kind}: {tensor} is {tuple(shape)}, expected {tuple(expected)}.\nUse the config.json saved with it."
        )
    left_out = [key for key in unexpected if _belongs(key, model)]
    if left_out:
        raise UserError(
            f"plm.name={name}: {kind} as config.json describes it leaves out {_counted(left_out)} of the checkpoint: "
            "it has fewer layers, or no bias. Use the config.json saved with it."
        )
    if unexpected:
        logger.warning("plm.name=%s: ignored %s of the checkpoint, foreign to %s", name, _counted(unexpected), kind)


def _belongs(key: str, model: nn.Module) -> bool:
    """Whether a tensor without a place belongs to the model: to one more layer, or as a weight or bias to a module that
    the model has. Heads for other purposes do not."""
    patterns = {_INDEX.sub("*", name) for name, _ in model.named_parameters()}
    pattern = _INDEX.sub("*", key)
    module, _, leaf = pattern.rpartition(".")
    modules = {name.rpartition(".")[0] for name in patterns}
    return pattern in patterns or (leaf.startswith(("weight", "bias")) and module in modules)


def _counted(names: Collection[str]) -> str:
    shown = ", ".join(list(names)[:_NAMED]) + (", …" if len(names) > _NAMED else "")
    return f"{len(names)} tensor{'s' * (len(names) != 1)} ({shown})"
