"""Turns a GGUF file into safetensors, once: reading a GGUF vocabulary takes longer than reading the weights.

The dequantised copy is kept in the user's cache folder under a name made of the file's content, whole or not at all.
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import tempfile
from pathlib import Path

import torch

from pema_ray.plm_owner.model.checkpoint import read_model
from pema_ray.runtime.environment import cache_folder

logger = logging.getLogger(__name__)


def converted(file: Path) -> Path:
    """The folder that holds the same model in safetensors (float32), converted now if it is not there yet."""
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()[:16]
    folder = cache_folder() / "gguf" / f"{file.stem}-{digest}"
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
            if not folder.exists():  # else another process was faster with the same content
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    return folder


def _convert(file: Path, folder: Path) -> None:
    from transformers import AutoTokenizer

    where = str(file.parent)
    AutoTokenizer.from_pretrained(where, gguf_file=file.name).save_pretrained(folder)
    model = read_model(str(file), where, gguf_file=file.name, dtype=torch.float32)
    # The weights are plain float32 now; the model must not remember that they were not.
    delattr(model.config, "quantization_config")
    vars(model).update(hf_quantizer=None, is_quantized=False)
    model.save_pretrained(folder)
