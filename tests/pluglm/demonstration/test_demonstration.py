"""The demonstration of edited facts: its world, figures and page. Whether it learns is not tested here."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from markupsafe import escape

from pema_ray.pluglm.demonstration.demo import FAITHFUL, ROWS, run_demo
from pema_ray.pluglm.demonstration.facts import VALUE_PLACE, World, knowledge_of_facts, weights_hash
from pema_ray.pluglm.demonstration.learning import FactsSettings, new_model

SMALL = FactsSettings(
    entities=4, relations=2, values=3, hidden_size=8, heads=2, query_size=4, steps=4, batch_size=4, measure_every=2,
    contrastive_steps=2, held_out=0.25,
)  # fmt: skip


def test_sentences_are_what_the_tokenizer_makes_of_the_entries() -> None:
    world = World(4, 2, 3)
    value_F = world.draw(np.random.default_rng(0))
    tokenizer = world.tokenizer()
    entries = world.entries(value_F)
    assert tokenizer([entry.text for entry in entries])["input_ids"] == world.tokens(value_F).tolist()
    questions = [entry.text.rsplit(" ", 1)[0] + " [MASK]" for entry in entries]
    assert tokenizer(questions)["input_ids"] == world.questions().tolist()
    assert bool((world.tokens(value_F)[:, VALUE_PLACE] - world.first_value == torch.from_numpy(value_F)).all())
    other_F = world.draw(np.random.default_rng(1), other_than=value_F)
    assert bool((other_F != value_F).all())
    assert other_F.min() >= 0
    assert other_F.max() < 3


def test_the_memory_held_while_learning_is_the_one_on_disk(tmp_path) -> None:
    from pema_ray.pluglm.memory.encoding import DocumentEncoder
    from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

    world, model = SMALL.world, new_model(SMALL, 0).eval()
    value_F = world.draw(np.random.default_rng(0))
    encoder = DocumentEncoder(model, world.tokenizer())
    disk = KnowledgeMemory.build(tmp_path / "memory", world.entries(value_F), encoder, "float32").load()
    local = knowledge_of_facts(model, world, value_F)
    for name in ("entry_N", "document_N", "token", "end_N"):
        assert torch.equal(getattr(local, name), getattr(disk, name)), name
    assert torch.allclose(local.key_NQ, disk.key_NQ, atol=1e-6)
    assert torch.allclose(local.value_ND, disk.value_ND, atol=1e-6)


def test_every_figure_is_measured_and_shown(tmp_path) -> None:
    modes = []
    demo = run_demo(tmp_path, 0, SMALL, on_point=lambda mode, point: modes.append(mode))
    ours, faithful = demo.modes
    assert modes == [ours.name] * 2 + [FAITHFUL] * 2
    assert faithful.settings.contrastive_steps == 0
    assert not faithful.settings.value_pooler
    for mode in demo.modes:
        figures = mode.figures
        assert figures.restored
        assert figures.weights_before == figures.weights_after
        assert (figures.facts, figures.held_out) == (8, 2)
        assert figures.missed  # four steps learn nothing, and this is reported
    assert ours.figures.weights_before != faithful.figures.weights_before
    again = run_demo(tmp_path / "again", 0, SMALL, faithful=False)
    assert again.modes[0].figures == ours.figures
    page = (tmp_path / "demo.html").read_text()
    assert all(str(escape(meaning)) in page for _, meaning, _ in ROWS)
    assert "synthetic" in page
    assert (tmp_path / "demo.svg").read_text().startswith("<svg")
    assert json.loads((tmp_path / "demo.json").read_text())["seed"] == 0


def test_a_hash_sees_every_weight() -> None:
    model = new_model(SMALL, 0)
    before = weights_hash(model)
    assert before == weights_hash(new_model(SMALL, 0))
    with torch.no_grad():
        model.model.backbone.encoder.layer[-1].knowledge.beta[0] += 1e-6
    assert weights_hash(model) != before


@pytest.mark.slow
def test_seeds_are_run_once_and_the_worst_is_told(tmp_path) -> None:
    """The benchmark of several seeds, in its smallest size."""
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "pluglm_facts.py"
    command = [sys.executable, str(script), "--smoke", "--seeds", "0", "1", "--out", str(tmp_path / "runs")]
    command += ["--results-dir", str(tmp_path / "results")]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    assert "seed 1," not in done.stdout  # what is finished is not run again
    results = json.loads((tmp_path / "results" / "pluglm_facts.json").read_text())
    assert set(results["ratios"]) == set(results["figures"]["aims"])
    edited = results["figures"]["contrastive warm-up, value pooler, cosine"]["edited"]
    assert len(edited) == 2
    assert results["ratios"]["edited"] == min(edited)
    assert (tmp_path / "results" / "pluglm_facts.svg").read_text().startswith("<svg")
