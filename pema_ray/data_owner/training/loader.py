"""Brings batches to the training device ahead of the step that needs them. Knows no Ray and no model. N rows, H hidden.

A thread gathers the rows of the next batches, still encoded, as that takes fewer bytes than float32. For a GPU it
copies them from pinned memory on its own stream. The training thread decodes them on the device.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch

from pema_ray.data_owner.training.batch_samplers import Batch
from pema_ray.memory.codec import KeyDtype, decode
from pema_ray.runtime.hardware import compute_elsewhere

Part = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]
"""What `JointObjective.forward` takes: representations `[N, H]` float32, targets, shares, and sequences or none."""

_PREFETCH = 2  # batches that are prepared while one is trained on


def load(
    batches: Iterator[Sequence[Batch]], device: torch.device, prefetch: int = _PREFETCH
) -> Iterator[tuple[Sequence[Batch], list[Part]]]:
    """Each batch in its parts, and the parts as tensors on the device.

    Args:
        batches: read in another thread; an error there is raised when its batch is due.
        prefetch: batches that are prepared while one is in use.
    """
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def next_batch() -> tuple[Sequence[Batch], list[_Copied]] | None:
        parts = next(batches, None)
        return None if parts is None else (parts, [_copy(part, device, copy_stream) for part in parts])

    reader = ThreadPoolExecutor(1, "loader", initializer=compute_elsewhere)
    try:
        waiting = deque(reader.submit(next_batch) for _ in range(prefetch))
        while (loaded := waiting.popleft().result()) is not None:
            waiting.append(reader.submit(next_batch))
            parts, copied = loaded
            yield parts, [part.tensors() for part in copied]
    finally:
        reader.shutdown(cancel_futures=True)


def load_parts(batches: Iterator[Batch], device: torch.device) -> Iterator[tuple[Batch, Part]]:
    """Whole batches, each with its tensors."""
    for (batch,), (part,) in load(([batch] for batch in batches), device):
        yield batch, part


@dataclass(frozen=True, slots=True)
class _Copied:
    """A batch on the device, or on its way there: `event` is recorded behind its copies."""

    dtype: KeyDtype
    data: torch.Tensor
    scale: torch.Tensor | None
    target: torch.Tensor
    share: torch.Tensor
    example: torch.Tensor | None
    event: torch.cuda.Event | None

    def tensors(self) -> Part:
        if self.event is not None:
            stream = torch.cuda.current_stream(self.data.device)
            stream.wait_event(self.event)
            for tensor in (self.data, self.scale, self.target, self.share, self.example):
                if tensor is not None:
                    tensor.record_stream(stream)  # its memory is not reused before this stream has read it
        return decode(self.data, self.scale, self.dtype), self.target, self.share, self.example


def _copy(batch: Batch, device: torch.device, stream: torch.cuda.Stream | None) -> _Copied:
    data, scale = batch.key.tensors()
    target, share = torch.from_numpy(batch.target), torch.from_numpy(batch.share)
    tensors = [data, scale, target, share, None if batch.example is None else torch.from_numpy(batch.example)]
    event = None
    if stream is not None:
        event = torch.cuda.Event()
        with torch.cuda.stream(stream):
            tensors = [t if t is None else t.pin_memory().to(device, non_blocking=True) for t in tensors]
            event.record(stream)
    data, scale, target, share, example = tensors
    assert data is not None, "keys have data"
    assert target is not None, "batches have targets"
    assert share is not None, "batches have shares"
    return _Copied(batch.key.dtype, data, scale, target, share, example, event)
