"""Exports what the PLM owner shares: the real final norm, the LM head, the tokenizer, and a fingerprint.

It finds the parts of any causal LM by structure, then proves them (`proof.py`) or refuses the model by name.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pema_ray.errors import UserError
from pema_ray.line import LMHead, LMHeadBundle, ModelCard
from pema_ray.line.lm_head import HeadSpec, fingerprint_of
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.proof import prove
from pema_ray.plm_owner.model.quantization import is_floating_point
from pema_ray.plm_owner.model.states import find_final_norm

_PROBE_TEXT = "In 1999, she said: 'Ça va?' — don't RE-tokenise  double  spaces;\n\tЯ 日本 ½."
_NOT_COMPUTED_WITH = {  # settings that no state depends on
    "transformers_version", "dtype", "torch_dtype", "architectures", "use_cache", "name_or_path", "_name_or_path",
    "quantization_config", "attn_implementation", "_attn_implementation", "experts_implementation",
    "bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings",
}  # fmt: skip


def export_lm_head(plm: LoadedPLM) -> LMHeadBundle:
    """The LM-head bundle of a loaded PLM, its tensors copied to the CPU.

    Raises:
        UserError: the model has no norm or head that a bundle can express, its head is quantised, or its proof fails.
    """
    norm, head = find_final_norm(plm), plm.model.get_output_embeddings()
    if head is None:
        raise UserError(f"{plm.name}: {type(plm.model).__name__} has no LM head.")
    if not is_floating_point(getattr(head, "weight", None)):
        raise UserError(
            f"{plm.name}: its LM head is quantised ({type(head).__name__}), the data owner needs it in floating point. "
            "Take a checkpoint whose lm_head is not, or skip it in plm.quantization (bitsandbytes: "
            "llm_int8_skip_modules: [lm_head])."
        )
    spec, tensors = _describe_norm(plm, norm)
    tensors["weight"] = head.weight
    tensors["bias"] = getattr(head, "bias", None)
    copied = {name: t.detach().to("cpu", copy=True) for name, t in tensors.items() if t is not None}
    lm_head = LMHead(spec, copied)
    sample = _sample(plm)  # before the first pass, which repacks the codes of some quantised layers
    prove(plm, lm_head)
    files = _tokenizer_files(plm)
    config = plm.model.config.get_text_config()
    settings = config.to_diff_dict()
    description = {
        "architecture": type(plm.model).__name__,
        "layers": config.num_hidden_layers,
        "vocabulary": sorted(plm.tokenizer.get_vocab().items()),
        "tokenised": plm.tokenizer(_PROBE_TEXT).input_ids,
        "head": [spec.norm, spec.logit_scale, spec.logit_softcap],
        "config": {name: value for name, value in settings.items() if name not in _NOT_COMPUTED_WITH},
        "eos": plm.eos_token_ids,
    }
    card = ModelCard(
        name=plm.name,
        fingerprint=fingerprint_of(description, tensors.get("norm_weight"), head.weight, sample),
        hidden_size=lm_head.hidden_size,
        vocab_size=lm_head.vocab_size,
        max_positions=plm.max_positions,
        eos_token_ids=plm.eos_token_ids,
    )
    return LMHeadBundle(card, lm_head, files)


def _sample(plm: LoadedPLM) -> torch.Tensor:
    """A few numbers of every parameter: a PLM that was fine-tuned under the same head gets another fingerprint.

    For a quantised one also of every buffer, where some methods keep their codes and scales.
    """
    samples = []
    for tensor in (*plm.model.parameters(), *(plm.model.buffers() if plm.is_quantized else ())):
        if tensor.device.type != "meta":  # offloaded to disk by accelerate
            flat = tensor.detach().reshape(-1)
            samples.append(flat[:: max(1, len(flat) // 64)][:64].to("cpu", torch.bfloat16))
    return torch.cat(samples)


def _describe_norm(plm: LoadedPLM, norm: nn.Module | None) -> tuple[HeadSpec, dict[str, torch.Tensor | None]]:
    config = plm.model.config.get_text_config()
    scale, softcap = _logit_scale(config), getattr(config, "final_logit_softcapping", None)
    if norm is None:
        return HeadSpec("identity", 0.0, scale, softcap), {}
    if isinstance(norm, nn.LayerNorm):
        spec = HeadSpec("layer_norm", norm.eps, scale, softcap)
        return spec, {"norm_weight": norm.weight, "norm_bias": norm.bias}
    epsilon = getattr(norm, "variance_epsilon", None) or getattr(norm, "eps", None)
    weight = getattr(norm, "weight", None)
    kind = type(norm).__name__.lower()
    if "layernorm" in kind and epsilon is not None and weight is not None:  # Cohere's own; `prove` decides
        spec = HeadSpec("layer_norm", float(epsilon), scale, softcap)
        return spec, {"norm_weight": weight, "norm_bias": getattr(norm, "bias", None)}
    if "rms" not in kind or epsilon is None or weight is None:
        raise UserError(f"{plm.name}: its final norm is a {type(norm).__name__}, which the bundle cannot express.")
    if _adds_one(norm):
        weight = weight.float() + 1.0  # Gemma's RMSNorm stores w - 1
    return HeadSpec("rms_norm", float(epsilon), scale, softcap), {"norm_weight": weight}


def _adds_one(norm: Any) -> bool:
    """Whether this RMSNorm multiplies by `1 + weight`, measured on a vector of RMS 1."""
    size = norm.weight.shape[0]
    ones = torch.ones(1, size, device=norm.weight.device, dtype=norm.weight.dtype)
    with torch.inference_mode():
        out, weight = norm(ones).float(), norm.weight.float()
    return bool((out - (1 + weight)).abs().mean() < (out - weight).abs().mean())


def _logit_scale(config) -> float:
    """Cohere multiplies its logits by `logit_scale`; Granite divides by `logits_scaling`."""
    if getattr(config, "logit_scale", None) is not None:
        return float(config.logit_scale)
    if getattr(config, "logits_scaling", None):
        return 1.0 / float(config.logits_scaling)
    return 1.0


def _tokenizer_files(plm: LoadedPLM) -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        plm.tokenizer.save_pretrained(folder)
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir()) if path.is_file()}
