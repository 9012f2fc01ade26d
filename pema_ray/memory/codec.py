"""Number formats of stored representations. N rows, H hidden.

`float32` is exact, `float16` and `bfloat16` halve the bytes, `int8` quarters them: each row is divided by its scale,
`max|row| / 127`, and rounded. Reading returns float32, whatever the format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch

from pema_ray.errors import UserError

KeyDtype = Literal["float32", "float16", "bfloat16", "int8"]
KEY_DTYPES: tuple[KeyDtype, ...] = get_args(KeyDtype)
STORAGE: dict[KeyDtype, np.dtype] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
    "int8": np.dtype("i1"),
}
_INT8_MAX = 127


@dataclass(frozen=True, slots=True)
class Keys:
    """Representations as they are stored; indexing decodes.

    Attributes:
        dtype: the number format.
        data: `[N, H]` in the format's storage; bfloat16 numbers are their 16 bits.
        scale: `[N]` float32, of int8 alone.
    """

    dtype: KeyDtype
    data: np.ndarray
    scale: np.ndarray | None = None

    def __post_init__(self) -> None:
        if self.data.ndim != 2 or self.data.dtype != STORAGE[self.dtype]:
            raise ValueError(f"{self.dtype} keys are a {STORAGE[self.dtype].name} matrix, not {self.data.dtype}")
        if (None if self.scale is None else len(self.scale)) != (len(self) if self.dtype == "int8" else None):
            raise ValueError("int8 keys have a scale for each row, other keys have none")

    def __len__(self) -> int:
        return len(self.data)

    @property
    def shape(self) -> tuple[int, int]:
        return self.data.shape[0], self.data.shape[1]

    @property
    def nbytes(self) -> int:
        return self.data.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def __getitem__(self, index: np.ndarray | slice) -> np.ndarray:
        """Rows as float32 `[n, H]`."""
        rows = self.take(index)
        return rows.data if self.dtype == "float32" else decode(*rows.tensors(), self.dtype).numpy()

    def take(self, index: np.ndarray | slice) -> Keys:
        """The same rows, still encoded."""
        if isinstance(index, np.ndarray) and index.dtype != bool and self.data.flags.c_contiguous:
            rows = self.data.take(index.astype(np.intp, copy=False), 0)  # faster than indexing
        else:
            rows = self.data[index]
        return Keys(self.dtype, rows, None if self.scale is None else self.scale[index])

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`data` and `scale` as tensors, for `decode`; memory is shared unless it is read-only."""
        return _tensor(self.data), None if self.scale is None else _tensor(self.scale)

    @classmethod
    def concatenate(cls, parts: Sequence[Keys]) -> Keys:
        dtype = parts[0].dtype
        if any(part.dtype != dtype for part in parts):
            raise ValueError(f"keys of several formats: {', '.join(sorted({part.dtype for part in parts}))}")
        scales = [part.scale for part in parts if part.scale is not None]
        return cls(dtype, np.concatenate([part.data for part in parts]), np.concatenate(scales) if scales else None)


def decode(data_NH: torch.Tensor, scale_N: torch.Tensor | None, dtype: KeyDtype) -> torch.Tensor:
    """Stored representations as float32 `[N, H]`, on their device."""
    if dtype == "bfloat16":
        return data_NH.view(torch.bfloat16).float()
    return data_NH.float() if scale_N is None else data_NH.float() * scale_N[:, None]


def _tensor(array: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(np.require(array, requirements=["C", "W"]))  # torch warns of read-only memory


def encode(exact_NH: np.ndarray, dtype: KeyDtype) -> Keys:
    """float32 representations `[N, H]` in a number format.

    Raises:
        UserError: a number is not finite, or too large for float16.
    """
    exact = np.ascontiguousarray(exact_NH, np.float32)
    if not np.isfinite(exact).all():
        raise UserError(
            "A context representation is not finite: the PLM overflows in its dtype. Set plm.dtype=float32."
        )
    if dtype == "float32":
        return Keys(dtype, exact)
    if dtype == "bfloat16":
        bits = exact.view(np.uint32)
        rounded = bits + 0x7FFF + ((bits >> 16) & 1)  # to nearest, ties to even
        stored = (rounded >> 16).astype(np.uint16)
        if (stored & 0x7F80 == 0x7F80).any():  # the last half step below float32's end rounds up to infinity
            raise UserError(
                f"A context representation reaches {np.abs(exact).max():.3g}, more than bfloat16 holds. "
                "Set build_memory.key_dtype=float32."
            )
        return Keys(dtype, stored)
    if dtype == "int8":
        scale = np.abs(exact).max(axis=1, initial=0.0) / np.float32(_INT8_MAX)
        divisor = np.where(scale > 0, scale, np.float32(1))
        steps = np.clip(np.rint(exact / divisor[:, None]), -_INT8_MAX, _INT8_MAX)  # a subnormal scale is itself rounded
        return Keys(dtype, steps.astype(np.int8), scale.astype(np.float32))
    with np.errstate(over="ignore"):
        half = exact.astype(np.float16)
    if np.isinf(half).any():
        raise UserError(
            f"A context representation reaches {np.abs(exact).max():.3g}, float16 ends at 65504. "
            "Set build_memory.key_dtype to bfloat16, int8 or float32."
        )
    return Keys(dtype, half)
