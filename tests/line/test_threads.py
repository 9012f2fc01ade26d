"""Tokenizers and models are loaded from several threads of one process: a build's actor does both at once."""

from __future__ import annotations

import subprocess
import sys

LOADS = """
import sys, threading
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line import LMHeadBundle
from pema_ray.plm_owner.model.load import load_plm
errors = []
def work(load):
    try:
        load()
    except BaseException as error:
        errors.append(error)
bundle, folder = sys.argv[1:]
loads = [lambda: LMHeadBundle.load(bundle).tokenizer(), lambda: load_plm(PLMConfig(name=folder, device="cpu"))] * 3
threads = [threading.Thread(target=work, args=(load,)) for load in loads]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert not errors, errors
"""


def test_threads_of_a_fresh_process_load_tokenizers_and_models_together(tiny_plm_folder, tiny_source, tmp_path):
    folder = tiny_plm_folder("llama")
    bundle = tiny_source("llama").lm_head().save(tmp_path / "lm_head")
    process = subprocess.run([sys.executable, "-c", LOADS, str(bundle), folder], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-2000:]
