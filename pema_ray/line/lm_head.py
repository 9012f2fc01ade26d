"""The LM-head bundle: the final norm, the LM head and the tokenizer, shared once.

On disk: `bundle.json`, `lm_head.safetensors` and `tokenizer/`. Symbols: H hidden, V vocabulary, N rows.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from pema_ray.errors import UserError
from pema_ray.line.messages import ModelCard
from pema_ray.line.tokenizer import PLMTokenizer

# transformers imports lazily, and patches torch while it loads a model: neither is thread-safe.
TRANSFORMERS_LOCK = threading.RLock()
FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class HeadSpec:
    """How to apply the tensors: `logits = softcap(scale · (W · norm(f) + b))`."""

    norm: Literal["layer_norm", "rms_norm", "identity"]
    epsilon: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None


class LMHead(nn.Module):
    """`P(y | f) = softmax(W_hd norm(f))`, frozen: the part of the PLM that both owners hold (paper section 3.1).

    Attributes:
        weight: `W_hd [V, H]`; bias `[V]` or None; `norm_weight` and `norm_bias` `[H]` or None.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    norm_weight: torch.Tensor | None
    norm_bias: torch.Tensor | None

    def __init__(self, spec: HeadSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.spec = spec
        for name in ("weight", "bias", "norm_weight", "norm_bias"):
            self.register_buffer(name, tensors.get(name))
        if self.weight is None or self.weight.ndim != 2:
            raise ValueError("an LM head needs a weight of shape [V, H]")

    @property
    def hidden_size(self) -> int:
        return self.weight.shape[1]

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    def norm(self, state_NH: torch.Tensor) -> torch.Tensor:
        """The PLM's final norm, `[N, H] → [N, H]`, computed in float32 as its own implementations do."""
        if self.spec.norm == "identity":
            return state_NH
        x = state_NH.float()
        weight = None if self.norm_weight is None else self.norm_weight.float()
        if self.spec.norm == "layer_norm":
            bias = None if self.norm_bias is None else self.norm_bias.float()
            return F.layer_norm(x, x.shape[-1:], weight, bias, self.spec.epsilon).to(state_NH.dtype)
        return F.rms_norm(x, x.shape[-1:], weight, self.spec.epsilon).to(state_NH.dtype)

    def logits(self, normed_NH: torch.Tensor) -> torch.Tensor:
        """float32 logits `[N, V]` of representations that have passed `norm`."""
        logits = F.linear(normed_NH.to(self.dtype), self.weight, self.bias).float()
        if self.spec.logit_scale != 1.0:
            logits = logits * self.spec.logit_scale
        if self.spec.logit_softcap is not None:
            logits = self.spec.logit_softcap * torch.tanh(logits / self.spec.logit_softcap)
        return logits

    def log_probs(self, normed_NH: torch.Tensor) -> torch.Tensor:
        """float32 log P `[N, V]`."""
        return self.logits(normed_NH).log_softmax(-1)


@dataclass(frozen=True)
class LMHeadBundle:
    """An LM head with the card of its PLM and the tokenizer's files (name → bytes)."""

    card: ModelCard
    head: LMHead
    tokenizer_files: Mapping[str, bytes]

    def save(self, folder: str | Path) -> Path:
        """Write the bundle as a folder, atomically."""
        folder = Path(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            tensors = {name: t.contiguous() for name, t in self.head.state_dict().items()}
            save_file(tensors, staging / "lm_head.safetensors")
            bundle = {"format_version": FORMAT_VERSION, "card": self.card.to_dict(), "head": asdict(self.head.spec)}
            (staging / "bundle.json").write_text(json.dumps(bundle, indent=2) + "\n")
            (staging / "tokenizer").mkdir()
            for name, content in self.tokenizer_files.items():
                (staging / "tokenizer" / name).write_bytes(content)
            staging.chmod(0o755)
            if folder.exists():
                shutil.rmtree(folder)
            os.replace(staging, folder)
        except BaseException:
            shutil.rmtree(staging, ignore_errors=True)
            raise
        return folder

    @classmethod
    def load(cls, folder: str | Path) -> LMHeadBundle:
        """Read a bundle and check that its shapes agree with its card.

        Raises:
            UserError: the folder is missing, incomplete or inconsistent.
        """
        folder = Path(folder)
        try:
            bundle = json.loads((folder / "bundle.json").read_text())
            tensors = load_file(folder / "lm_head.safetensors")
            files = {path.name: path.read_bytes() for path in sorted((folder / "tokenizer").iterdir())}
        except FileNotFoundError as error:
            missing = error.filename or "lm_head.safetensors"  # safetensors gives no file name
            raise UserError(f"{folder}: not an LM-head bundle: {missing} is missing. Run export-head.") from None
        except NotADirectoryError:
            raise UserError(f"{folder}: not an LM-head bundle: it is a file, expected a folder.") from None
        except (ValueError, SafetensorError) as error:  # broken JSON and broken UTF-8 are ValueErrors
            raise UserError(f"{folder}: damaged LM-head bundle: {error}. Run export-head again.") from None
        version = bundle.get("format_version") if isinstance(bundle, dict) else None
        if version != FORMAT_VERSION:
            raise UserError(f"{folder}: bundle format {version}, expected {FORMAT_VERSION}.")
        try:
            card = ModelCard.from_dict(bundle["card"])
            head = LMHead(HeadSpec(**bundle["head"]), tensors)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{folder}: damaged LM-head bundle: bundle.json: {error}. Run export-head again.") from None
        if (head.vocab_size, head.hidden_size) != (card.vocab_size, card.hidden_size):
            raise UserError(
                f"{folder}: the head has shape {tuple(head.weight.shape)}, its card says "
                f"({card.vocab_size}, {card.hidden_size})."
            )
        return cls(card, head, files)

    def to_files(self) -> dict[str, bytes]:
        """The files that `save` writes, by name."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = self.save(Path(scratch) / "bundle")
            paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
            return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}

    @classmethod
    def from_files(cls, files: Mapping[str, bytes]) -> LMHeadBundle:
        """The bundle of `to_files`; raises as `load` does."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in files.items():
                path = Path(folder) / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content)
            return cls.load(folder)

    def tokenizer(self) -> PLMTokenizer:
        """The PLM's tokenizer, rebuilt from the bundle's files.

        Raises:
            UserError: its files are damaged, or as `PLMTokenizer` does.
        """
        with TRANSFORMERS_LOCK, tempfile.TemporaryDirectory() as folder:
            from transformers import AutoTokenizer

            for name, content in self.tokenizer_files.items():
                (Path(folder) / name).write_bytes(content)
            try:
                hf = AutoTokenizer.from_pretrained(folder)
            except Exception as error:  # transformers and tokenizers raise any type
                reason = (str(error).splitlines() or [type(error).__name__])[0]
                raise UserError(
                    f"The LM-head bundle's tokenizer cannot be read: {reason} Run export-head again."
                ) from None
            return PLMTokenizer(hf, self.card.vocab_size)


def fingerprint_of(description: Mapping[str, object], *tensors: torch.Tensor | None) -> str:
    """16 hex digits that name a PLM: its description and the bits of its norm and head, as bfloat16.

    bfloat16 makes the float32 and the bfloat16 loading of one checkpoint the same PLM.
    """
    digest = hashlib.sha256(json.dumps(description, sort_keys=True, default=str).encode())
    for tensor in tensors:
        if tensor is not None:
            bits = tensor.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(bits.numpy().tobytes())
    return digest.hexdigest()[:16]
