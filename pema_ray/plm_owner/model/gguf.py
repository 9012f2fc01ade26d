"""Turns a GGUF file into safetensors, once: reading a GGUF vocabulary takes longer than reading the weights.

The user's cache folder keeps the dequantised copy, atomically, under a name made of the file's content.
"""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from pema_ray.plm_owner.model.checkpoint import read_model
from pema_ray.runtime.environment import cache_folder
from pema_ray.runtime.files import sha256_of

logger = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The folder with the same model in safetensors (float32), converted now if it is missing."""
    folder = cache_folder() / "gguf" / f"{file.stem}-{sha256_of(file)[:16]}"
    if folder.exists():
        return folder
    logger.info("converting %s to safetensors, once", file.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    try:
        _convert(file, staging)
        try:
            os.replace(staging, folder)
        except OSError:
            if not folder.exists():  # else another process was faster
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    where = str(file.parent)
    AutoTokenizer.from_pretrained(where, gguf_file=file.name).save_pretrained(folder)
    model = read_model(str(file), where, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain float32 now: remove what says otherwise.
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(folder)
