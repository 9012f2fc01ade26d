"""Proves that a loaded PLM agrees with its LM-head bundle, before anything is built on it.

B sequences, T positions, H hidden, V vocabulary.
"""

from __future__ import annotations

import inspect
import logging
from typing import Any

import torch
from transformers import DynamicCache

from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.states import capture_state, capture_state_and_logits
from pema_ray.runtime.hardware import dtype_name

logger = logging.getLogger(__name__)
_TEXT = (
    "In 1999, she said: 'Ça va?' — don't RE-tokenise  double  spaces;\n\tЯ 日本 ½. The house is old, and its garden is "
    "large. He asked 27 people what they had seen; none of them remembered the colour of the door, or the year."
)
_LONG, _SHORT = 48, 16  # tokens of the two sequences; the long one crosses the sliding windows of small models
_STEPS = 3  # of one token each, as decoding runs them
UNSUPPORTED = (TypeError, ValueError, RuntimeError, KeyError, IndexError, AttributeError, NotImplementedError)
# Relative to the logits' spread, beyond what rounding explains (`_rounding`).
_LOGITS_TOLERANCE = {torch.float32: 2e-4, torch.bfloat16: 1e-2, torch.float16: 1e-2}
# Mean distance of states, relative to their size. In 16 bits a mixture of experts may route a token differently.
_STATES_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.1, torch.float16: 0.1}
_DEVIATIONS = 6  # standard deviations: among millions of logits, none deviates more by chance
_ROWS = 8192
_QUANTIZED_TOLERANCE = 0.1  # methods round activations too, some by what else is in the batch


@torch.inference_mode()
def prove(plm: LoadedPLM, lm_head: LMHead) -> None:
    """Check weights and token ids, then run a probe: alone, in a padded batch, and with a cache.

    Raises:
        UserError: a pass that fails; weights, states or logits that are not finite; tokens without an embedding;
            logits that are not `head(norm(state))`; states that change with the batch or with a cache.
    """
    _check_weights(plm)
    _check_token_ids(plm, lm_head)
    long, short = _probes(plm)
    try:
        state_BTH, logits_BTV = capture_state_and_logits(plm, input_ids=long[None], use_cache=False)
    except RuntimeError as error:  # kernels of attention or quantised weights that do not fit device or sizes
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{plm.name}: {type(plm.model).__name__} cannot compute as it was loaded: {reason}") from error
    long_TH, logits_TV = state_BTH[0].float().cpu(), logits_BTV[0].float().cpu()
    short_TH = capture_state(plm, input_ids=short[None], use_cache=False)[0].float().cpu()
    if not all(bool(torch.isfinite(output).all()) for output in (long_TH, short_TH, logits_TV)):
        raise UserError(f"{plm.name}: {_first_overflow(plm, long)} is not finite. {_advice(plm)}")
    _check_logits(plm, lm_head, long_TH, logits_TV)
    _check_batch(plm, long, short, [long_TH, short_TH])
    _check_cache(plm, long, long_TH)


# ── without running the model ───────────────────────────────────────────────────


def _check_weights(plm: LoadedPLM) -> None:
    for name, parameter in plm.model.named_parameters():
        if parameter.dtype in _STATES_TOLERANCE and parameter.device.type != "meta":
            low, high = torch.aminmax(parameter.detach())  # one read of the memory; both propagate NaN
            if not (torch.isfinite(low) and torch.isfinite(high)):
                damaged = bool(torch.isnan(low))  # conversions do not produce NaN
                raise UserError(f"{plm.name}: the weight {name} is not finite. {_DAMAGED if damaged else _advice(plm)}")


_DAMAGED = "The checkpoint is damaged: download or convert it again."


def _advice(plm: LoadedPLM) -> str:
    dtype = plm.model.dtype
    if dtype == torch.float32:
        return _DAMAGED
    larger = "bfloat16 or float32" if dtype == torch.float16 else "float32"
    return (
        f"{dtype_name(dtype)} may overflow: set plm.dtype={larger}. If that does not help, the checkpoint is damaged."
    )


def _check_token_ids(plm: LoadedPLM, lm_head: LMHead) -> None:
    """Check that every token has an embedding; spare ones are usual (padding to a round number)."""
    rows = plm.model.get_input_embeddings().weight.shape[0]
    beyond = {f"'{token}'": number for token, number in plm.tokenizer.get_vocab().items() if number >= rows}
    beyond |= {f"EOS {n}": n for n in plm.eos_token_ids if n >= rows and n not in beyond.values()}
    if beyond:
        named = ", ".join(sorted(beyond, key=lambda token: beyond[token])[:3])
        more = f" and {len(beyond) - 3} more" if len(beyond) > 3 else ""
        raise UserError(
            f"{plm.name}: the tokenizer has tokens with ids up to {max(beyond.values())}, the model {rows} embeddings: "
            f"{named}{more} cannot be read.\nUse the model's own tokenizer, or call "
            "model.resize_token_embeddings(len(tokenizer)), train the new rows, and save both."
        )
    if lm_head.vocab_size > rows:  # the PLM might draft a token without an embedding
        raise UserError(
            f"{plm.name}: the LM head has {lm_head.vocab_size} rows, the model only {rows} embeddings: it could write "
            "tokens that it cannot read. Use a checkpoint whose LM head and embeddings agree."
        )


# ── on a probe ──────────────────────────────────────────────────────────────────


def _probes(plm: LoadedPLM) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of a long and a short text that begin differently, `[T]` each."""
    ids = plm.tokenizer(_TEXT).input_ids
    length = min(_LONG, plm.max_positions)
    repeated = torch.tensor(ids * (1 + 2 * length // len(ids)), device=plm.device)
    return repeated[:length], repeated[length : length + min(_SHORT, length)]


def _first_overflow(plm: LoadedPLM, ids_T: torch.Tensor) -> str:
    """The first module, in the order of computation, whose output is not finite."""
    overflown: list[str] = []

    def watch(name: str):
        def check(_module: Any, _inputs: Any, output: Any) -> None:
            value = output[0] if isinstance(output, tuple) else output
            if isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
                overflown.append(name)

        return check

    hooks = [module.register_forward_hook(watch(name)) for name, module in plm.model.named_modules()]
    try:
        plm.model(input_ids=ids_T[None], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return f"the output of {overflown[0]}" if overflown else "the state of the last layer"


def _check_logits(plm: LoadedPLM, lm_head: LMHead, state_TH: torch.Tensor, expected_TV: torch.Tensor) -> None:
    """Compare the logits of a pass with those of the bundle, from the same pass's states."""
    normed_TH = lm_head.norm(state_TH.to(lm_head.dtype))
    logits_TV = lm_head.logits(normed_TH)
    excess_TV = (logits_TV - expected_TV).abs() - _rounding(lm_head, normed_TH, expected_TV)
    gap = float(excess_TV.max() / expected_TV.std().clamp_min(1e-6))
    if gap > _LOGITS_TOLERANCE[lm_head.dtype]:
        raise UserError(
            f"{plm.name}: {type(plm.model).__name__} computes its logits in a way the LM-head bundle does not "
            f"express (they differ by {gap:.2g} of their spread). This architecture is not supported."
        )


def _rounding(lm_head: LMHead, normed_TH: torch.Tensor, logits_TV: torch.Tensor) -> torch.Tensor:
    """How far two correct computations of the logits `[T, V]` may differ.

    Both round the logits. Before that, one may round the normed state once, the other twice (many norms round before
    they multiply by their weight): about one unit of each of the H terms of a product, independent of each other.
    """
    eps = torch.finfo(lm_head.dtype).eps
    squared_TH = normed_TH.float().square()
    parts = lm_head.weight.split(_ROWS)  # the whole weight in float32 may be larger than the model
    terms_TV = torch.cat([squared_TH @ rows_VH.float().square().T for rows_VH in parts], -1).sqrt()
    terms_TV *= abs(lm_head.spec.logit_scale)
    return eps * (logits_TV.abs() + _DEVIATIONS / 2 * terms_TV)


def _check_batch(plm: LoadedPLM, long: torch.Tensor, short: torch.Tensor, expected: list[torch.Tensor]) -> None:
    """Compare both sequences in one pass, the short one padded on its right as in extraction, with each alone."""
    padded_BT = torch.zeros(2, len(long), dtype=torch.long, device=plm.device)
    padded_BT[0], padded_BT[1, : len(short)] = long, short
    state_BTH = capture_state(plm, input_ids=padded_BT, use_cache=False).float().cpu()
    for state_TH, expected_TH in zip(state_BTH, expected, strict=True):
        distance = _distance(state_TH[: len(expected_TH)], expected_TH)
        if not distance <= _states_tolerance(plm):
            raise UserError(_differs(plm, "in a padded batch than alone", distance))


def _check_cache(plm: LoadedPLM, ids: torch.Tensor, expected_TH: torch.Tensor) -> None:
    """Compare a prompt and steps of one token with one pass; some models continue correctly only token by token.

    A model that raises does not use transformers' cache in this way; the engine checks whether it can decode.
    """
    steps = min(_STEPS, len(ids) - 1)
    distance = 0.0
    for prompt in (len(ids) - steps, 1):
        try:
            state_TH = _with_cache(plm, ids, prompt)
        except UNSUPPORTED as error:
            logger.info("%s: %s is not proved with a cache: %s", plm.name, type(plm.model).__name__, error)
            return
        distance = _distance(state_TH[-steps:], expected_TH[-steps:])
        if distance <= _states_tolerance(plm):
            return
    raise UserError(_differs(plm, "with a cache than without", distance))


def _with_cache(plm: LoadedPLM, ids: torch.Tensor, prompt: int) -> torch.Tensor:
    """States `[T, H]` of the first `prompt` tokens in one pass, and of the others one by one."""
    parameters = inspect.signature(plm.decoder.forward).parameters
    name = next((name for name in ("past_key_values", "cache_params") if name in parameters), None)
    if name is None:
        raise NotImplementedError("it takes no cache")
    cache = DynamicCache(config=plm.model.config)
    pieces = [ids[:prompt], *ids[prompt:, None]]
    states = [capture_state(plm, input_ids=piece[None], use_cache=True, **{name: cache})[0] for piece in pieces]
    return torch.cat(states).float().cpu()


def _states_tolerance(plm: LoadedPLM) -> float:
    return _QUANTIZED_TOLERANCE if plm.is_quantized else _STATES_TOLERANCE[plm.model.dtype]


def _distance(state_TH: torch.Tensor, expected_TH: torch.Tensor) -> float:
    distance_T = (state_TH - expected_TH).abs().mean(-1) / expected_TH.abs().mean(-1).clamp_min(1e-6)
    return float(distance_T.mean())


def _differs(plm: LoadedPLM, where: str, distance: float) -> str:
    return (
        f"{plm.name}: {type(plm.model).__name__} gives other states {where} (they differ by {distance:.2g} of their "
        "size). This architecture is not supported with this version of transformers."
    )
