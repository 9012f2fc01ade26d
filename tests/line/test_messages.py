"""Messages across the line refuse inconsistent contents before anything is computed."""

from __future__ import annotations

import json

import pytest

from pema_ray.line import ExtractBatch, ModelCard


def test_a_card_survives_json():
    card = ModelCard("opt", "0123456789abcdef", 32, 380, 96, (1, 7))
    assert ModelCard.from_dict(json.loads(json.dumps(card.to_dict()))) == card
    assert card.label == "opt (0123456789abcdef)"


def test_a_batch_counts_its_rows():
    assert ExtractBatch([[1, 2, 3], [4]], [1, 0]).rows == 3
    with pytest.raises(ValueError, match="at least one sequence"):
        ExtractBatch([], [])


@pytest.mark.parametrize(("ids", "first"), [([[1, 2]], [2]), ([[1, 2]], [-1]), ([[]], [0])])
def test_a_first_position_outside_its_sequence_is_refused(ids: list[list[int]], first: list[int]):
    with pytest.raises(ValueError, match="lies outside a sequence"):
        ExtractBatch(ids, first)


def test_sequences_and_first_positions_must_pair_up():
    with pytest.raises(ValueError, match="2 sequences, but 1 first positions"):
        ExtractBatch([[1], [2]], [0])
