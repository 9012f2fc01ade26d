"""A datastore is a memory of keys: every training position once, resumable, refused to another model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import run_build
from pema_ray.memory.manage import verify
from pema_ray.memory.planning import planned_rows
from pema_ray.memory.specification import MemoryBuild
from pema_ray.trime.config import DatastoreConfig
from pema_ray.trime.datastore import open_datastore, plan_datastore
from pema_ray.trime.text.windows import plan_windows
from tests.memory import kit
from tests.trime.kit import HIDDEN, VOCABULARY, tiny_model

CARD = ModelCard("tiny", "f" * 16, HIDDEN, VOCABULARY, 96, (0,))
TOKENS = np.random.default_rng(0).integers(0, VOCABULARY, 211)


def source_factory():
    """Makes the extractor; a closure, so that it travels to an actor by value."""
    model = tiny_model()

    def make():
        from pema_ray.memory.rows import BlockingExtractor
        from pema_ray.trime.datastore import KeySource

        return BlockingExtractor(KeySource(model).extract)

    return make


def build(folder: Path, tokens: np.ndarray = TOKENS, **changes) -> MemoryBuild:
    config = DatastoreConfig(**{"rows_per_shard": 40, "key_dtype": "float32", **changes})
    return plan_datastore(folder, tokens, CARD, "corpus", "train", config, 12, 4)


def in_this_process(build: MemoryBuild, numbers: list[int] | None = None) -> None:
    kit.in_this_process(build, numbers, source_factory())


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_every_position_is_a_row_with_its_key_and_next_token(tmp_path: Path):
    in_this_process(build(tmp_path))
    assert run_build(build(tmp_path), source_factory()).rows == len(TOKENS) - 1 == planned_rows(build(tmp_path))
    rows = open_datastore(tmp_path, CARD).load()
    assert rows.target.tolist() == TOKENS[1:].tolist()
    model, place = tiny_model(), 0
    for window in plan_windows(len(TOKENS), 12, 4):
        with torch.no_grad():
            keys = model.represent(torch.from_numpy(TOKENS[None, window.start : window.end])).key_BTH[0]
        expected = keys[window.first - window.start :].numpy()
        assert np.allclose(rows.key[place : place + window.scored], expected, atol=1e-5)
        place += window.scored
    assert verify(tmp_path) == []


def test_a_window_with_a_single_token_left_is_kept(tmp_path: Path):
    tokens = TOKENS[: 8 * 3 + 2]
    in_this_process(build(tmp_path, tokens))
    run_build(build(tmp_path, tokens), source_factory())
    assert open_datastore(tmp_path, CARD).load().target.tolist() == tokens[1:].tolist()


def test_another_models_datastore_is_refused(tmp_path: Path):
    in_this_process(build(tmp_path))
    run_build(build(tmp_path), source_factory())
    other = ModelCard("other", "a" * 16, HIDDEN, VOCABULARY, 96, (0,))
    with pytest.raises(FingerprintMismatch, match="The datastore .* belongs to PLM 'tiny .*uses PLM 'other"):
        open_datastore(tmp_path, other)
    wide = ModelCard("wide", "f" * 16, 2 * HIDDEN, VOCABULARY, 96, (0,))
    with pytest.raises(UserError, match="its keys have 16 numbers, the model wide .* makes 32"):
        open_datastore(tmp_path, wide)
    assert len(open_datastore(tmp_path, None)) == 210


def test_a_text_without_a_token_to_predict_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match=r"a text of 1 token\(s\): at least two"):
        build(tmp_path, TOKENS[:1])
    with pytest.raises(UserError, match="no external memory here"):
        open_datastore(tmp_path / "nowhere", CARD)


def test_a_row_of_eos_stays_where_examples_are_whole(tmp_path: Path):
    """The seam in `pema_ray.memory`: only pieces of a longer text do without it."""
    pieces = build(tmp_path)
    whole = MemoryBuild(tmp_path / "whole", pieces.examples, CARD, "corpus", "train", pieces.config)
    assert planned_rows(whole) == planned_rows(pieces) + len(pieces.examples)
    assert whole.plan_hash != pieces.plan_hash


@pytest.mark.cluster
def test_a_killed_build_goes_on_to_the_same_bytes(ray_cluster, tmp_path: Path):
    in_this_process(build(tmp_path / "undisturbed"))
    run_build(build(tmp_path / "undisturbed"), source_factory())
    in_this_process(build(tmp_path / "killed"), [2])

    def die(info):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(build(tmp_path / "killed"), source_factory(), on_shard=die)
    assert not (tmp_path / "killed" / "manifest.json").exists()
    run_build(build(tmp_path / "killed", actors=2), source_factory())
    assert contents(tmp_path / "killed") == contents(tmp_path / "undisturbed")
    assert len(ExternalMemory.open(tmp_path / "killed")) == 210
