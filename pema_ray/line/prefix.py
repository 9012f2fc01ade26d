"""A key-value prefix: what a data owner trains where the PLM's weights stay with their owner.

Every position of a text attends to the prefix's n positions, and the text stands behind them (Li and Liang, ACL 2021;
"Cartridges", arXiv 2506.06266). n positions, L layers, G key-value heads, D head size.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pema_ray.errors import UserError

_CONFIG, _WEIGHTS, _TENSOR = "adapter_config.json", "adapter_model.safetensors", "prompt_embeddings"
_WHOLE, _ADDED = "CARTRIDGE", "CARTRIDGE_ADDED_TO_TEXT"  # types of adapters; peft knows the first


@dataclass(frozen=True, slots=True)
class PrefixShape:
    """What a PLM's caches hold of one position."""

    layers: int
    heads: int
    """Key-value heads of a layer."""
    head_size: int

    @property
    def width(self) -> int:
        """Numbers of one position: keys and values of all layers."""
        return self.layers * 2 * self.heads * self.head_size


@dataclass(frozen=True, eq=False)
class Prefix:
    """Keys and values of n positions, as a cache holds them: rotary embeddings are applied.

    Attributes:
        embeddings: `[n, L · 2 · G · D]`: the first layer's keys, its values, the second layer's keys, …, head by head.
        frozen: the first so many positions are not trained: attention sinks.
        text: token ids to whose keys and values the embeddings are added, where the PLM owner keeps those to itself;
            empty: the embeddings are the keys and values.

    Raises:
        ValueError: the tensor is not of this shape, more positions are frozen than there are, or the text has another
            length.
    """

    embeddings: torch.Tensor
    shape: PrefixShape
    frozen: int = 1
    text: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.embeddings.ndim != 2 or self.embeddings.shape[1] != self.shape.width:
            raise ValueError(
                f"a prefix for {self.shape} has rows of {self.shape.width} numbers, not {list(self.embeddings.shape)}"
            )
        if not 0 <= self.frozen <= len(self.embeddings):
            raise ValueError(f"{self.frozen} frozen positions of {len(self.embeddings)}")
        if self.text and len(self.text) != len(self.embeddings):
            raise ValueError(f"{len(self.embeddings)} positions are added to a text of {len(self.text)}")

    def __len__(self) -> int:
        return len(self.embeddings)

    @cached_property
    def handle(self) -> str:
        """Its name at the PLM owner: a hash of its content and number format."""
        data = self.embeddings.detach().cpu().contiguous()
        described = json.dumps([asdict(self.shape), str(data.dtype), len(self), *self.text])
        return hashlib.sha256(described.encode() + data.view(torch.uint8).numpy().tobytes()).hexdigest()

    def keys_and_values(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """`(keys, values)` of every layer, `[1, G, n, D]` each; gradients flow through."""
        s = self.shape
        layers_LkGnD = self.embeddings.view(len(self), s.layers, 2, s.heads, s.head_size).permute(1, 2, 3, 0, 4)
        return [(keys[None], values[None]) for keys, values in layers_LkGnD]

    @classmethod
    def of(cls, layers: list[tuple[torch.Tensor, torch.Tensor]], frozen: int = 1) -> Prefix:
        """From `(keys, values)` of every layer, `[1, G, n, D]` each."""
        _, heads, count, size = layers[0][0].shape
        stacked_LkGnD = torch.stack([torch.cat(pair) for pair in layers])
        embeddings = stacked_LkGnD.permute(3, 0, 1, 2, 4).reshape(count, -1)
        return cls(embeddings.contiguous(), PrefixShape(len(layers), heads, size), frozen)

    def replaced(self, embeddings: torch.Tensor) -> Prefix:
        """The same prefix with other numbers."""
        return replace(self, embeddings=embeddings)

    def added_to(self, start: Prefix) -> Prefix:
        """The keys and values themselves, of those of its text."""
        added = self.embeddings.to(start.embeddings)
        return replace(self, embeddings=start.embeddings + added, text=())

    def save_pretrained(self, folder: Path | str, plm_name: str = "") -> None:
        """Write it as a `CARTRIDGE` adapter of peft: whoever has the PLM's weights can load it there.

        Embeddings that are added to those of a text are no such adapter; peft refuses them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({_TENSOR: self.embeddings.detach().cpu().contiguous()}, folder / _WEIGHTS)
        config = {
            "peft_type": _ADDED if self.text else _WHOLE,
            "task_type": "CAUSAL_LM",
            "base_model_name_or_path": plm_name,
            "num_virtual_tokens": len(self),
            "num_frozen_tokens": self.frozen,
            "num_layers": self.shape.layers,
            "num_attention_heads": self.shape.heads,
            "token_dim": self.shape.heads * self.shape.head_size,
            "num_transformer_submodules": 1,
            "inference_mode": True,
        }
        if self.text:
            config["text"] = list(self.text)
        (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")

    @classmethod
    def from_pretrained(cls, folder: Path | str) -> Prefix:
        """Read a `CARTRIDGE` adapter of peft, or what `save_pretrained` has written.

        Raises:
            UserError: there is none, or its files are damaged or do not go together.
        """
        folder = Path(folder)
        for name in (_CONFIG, _WEIGHTS):
            if not (folder / name).is_file():
                raise UserError(f"{folder}: holds no prefix: {name} is missing.")
        try:
            config = json.loads((folder / _CONFIG).read_text())
            if config.get("peft_type") not in (_WHOLE, _ADDED):
                raise UserError(f"{folder}: holds a {config.get('peft_type')} adapter, not a CARTRIDGE prefix.")
            heads = config["num_attention_heads"]
            shape = PrefixShape(config["num_layers"], heads, config["token_dim"] // heads)
            embeddings, text = load_file(folder / _WEIGHTS)[_TENSOR], tuple(config.get("text", ()))
            if bool(text) != (config["peft_type"] == _ADDED):
                raise ValueError(f"a {config['peft_type']} prefix with a text of {len(text)} tokens")
            return cls(embeddings, shape, config["num_frozen_tokens"], text)
        except (AttributeError, KeyError, TypeError, ValueError, ZeroDivisionError, SafetensorError) as error:
            raise UserError(f"{folder}: the prefix is damaged: {error}") from None
