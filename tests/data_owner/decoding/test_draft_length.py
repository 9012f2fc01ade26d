"""The draft length controller learns what a round trip costs and which drafts are accepted, and drafts accordingly."""

from __future__ import annotations

import pytest

from pema_ray.data_owner.decoding.draft_length import BY_PLM, Draft, DraftLengthController
from pema_ray.data_owner.decoding.drafts import DraftCandidate


def _trips(controller: DraftLengthController, trip: float, token: float, drafted: float, count: int = 60) -> None:
    for i in range(count):
        tokens, drafted_tokens = 1 + i % 5, (0, 0, 3, 5)[i % 4]
        controller.record_latency(trip + token * tokens + drafted * drafted_tokens, tokens, drafted_tokens)


def test_seconds_of_a_round_trip_are_learned():
    controller = DraftLengthController()
    _trips(controller, 0.05, 0.004, 0.02)
    assert controller.seconds(4) == pytest.approx(0.066, rel=0.1)
    assert controller.seconds(1, 6) == pytest.approx(0.174, rel=0.1)


def test_drafts_that_are_rejected_grow_shorter_and_accepted_ones_longer():
    controller, offer = DraftLengthController(), [([DraftCandidate("text 2", list(range(16)))], 16, 0)]
    _trips(controller, 0.02, 0.002, 0.02)
    lengths = []
    for _ in range(60):
        lengths.append(len(controller.choose(offer)[0].tokens))
        controller.record_acceptance("text 2", lengths[-1], lengths[-1])
    assert lengths[-1] == 16 > lengths[0]
    for _ in range(60):
        lengths.append(len(controller.choose(offer)[0].tokens))
        controller.record_acceptance("text 2", lengths[-1], 0)
    assert lengths[-1] <= 1
    for _ in range(2000):
        controller.choose(offer)
    assert len(controller.choose(offer)[0].tokens) > lengths[-1]  # after a while it is tried again


def test_of_two_candidates_the_one_that_is_accepted_more_often_is_taken():
    controller = DraftLengthController()
    for _ in range(20):
        controller.record_acceptance("good", 4, 4)
        controller.record_acceptance("bad", 4, 0)
    (draft,) = controller.choose([([DraftCandidate("bad", [1, 2]), DraftCandidate("good", [3, 4])], 8, 0)])
    assert (draft.kind, draft.tokens) == ("good", (3, 4))


def test_the_plm_drafts_where_round_trips_are_long_and_not_where_they_are_short():
    for trip, expected in ((0.2, True), (0.001, False)):
        controller = DraftLengthController()
        _trips(controller, trip, 0.001, 0.02)
        (draft,) = controller.choose([([], 8, 8)])
        assert (draft.by_plm > 0) == expected
        assert draft == Draft() or draft.kind == BY_PLM
        assert controller.choose([([], 8, 0)]) == [Draft()]
    for _ in range(40):
        controller.record_acceptance(BY_PLM, 4, 0)
    _trips(controller, 0.2, 0.001, 0.02)
    assert controller.choose([([], 8, 8)])[0].by_plm <= 1
