"""Drafts repeat what followed before, in the text or in a memory, and are as long as is worth their while."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.serving.drafts import Guess, MemoryLookup, PromptLookup
from pema_ray.data_owner.serving.pace import BY_PLM, Bet, Pace


def told(drafts: PromptLookup, room: int = 10) -> dict[str, list[int]]:
    return {guess.kind: guess.tokens for guess in drafts.guesses(room)}


def test_a_draft_is_what_followed_where_the_text_stood_before():
    drafts = PromptLookup([1, 2, 3, 4, 5, 6, 9, 1, 2])
    assert told(drafts)["text 2"] == [3, 4, 5, 6, 9, 1, 2]
    assert told(drafts, room=2)["text 2"] == [3, 4]
    assert told(PromptLookup([1, 2, 3])) == {}


def test_the_longest_match_and_the_newest_place_count():
    assert told(PromptLookup([1, 2, 3, 8, 2, 3, 9, 0, 1, 2, 3]), 1) == {"text 3": [8]}  # after 2, 3 alone it was 9
    assert told(PromptLookup([2, 3, 8, 0, 2, 3, 9, 5, 2, 3]), 1) == {"text 2": [9]}


def test_an_answer_that_follows_a_passage_is_guessed_on_past_changes():
    drafts = PromptLookup([10, 11, 12, 13, 14, 15, 16, 0])
    for token in (10, 11):
        drafts.follow(token)
    assert told(drafts)["text 2"] == [12, 13, 14, 15, 16, 0, 10, 11]
    drafts.follow(99)  # 12, put otherwise
    assert told(drafts)["along 0"][:3] == [13, 14, 15]
    drafts.follow(13)
    assert told(drafts)["along 1"][:3] == [14, 15, 16]
    drafts.follow(16)  # 14 and 15 left out
    assert told(drafts)["along 0"] == [0, 10, 11, 99, 13, 16]


@given(prompt=st.lists(st.integers(0, 5), min_size=1, max_size=30), answer=st.lists(st.integers(0, 5), max_size=30))
def test_guesses_are_always_stretches_of_the_text(prompt, answer):
    drafts = PromptLookup(prompt)
    for token in answer:
        drafts.follow(token)
    whole = [*prompt, *answer]
    for guess in drafts.guesses(5):
        assert 0 < len(guess.tokens) <= 5
        assert any(whole[i : i + len(guess.tokens)] == guess.tokens for i in range(len(whole)))


def test_a_memory_tells_what_mostly_followed_and_ends_with_its_example():
    targets = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 2, 5, 9], [4, 1]]
    token = np.array([token for target in targets for token in target])
    begins = np.array([i == 0 for target in targets for i in range(len(target))])
    memory = MemoryLookup(token, begins)
    assert memory.guesses([1], 5)[0].kind == "memory 1"
    (either,) = memory.guesses([9, 1, 2], 5)
    assert either.kind == "memory 2" and either.tokens in ([3, 4], [5, 6])
    assert memory.guesses([2], 1) == [Guess("memory 1", [5])]  # 5 twice, 3 once
    assert memory.guesses([7, 2], 5) == [Guess("memory 2", [5, 9])]
    assert memory.guesses([1, 2, 3], 9) == [Guess("memory 3", [4])]  # not on into the next example
    assert memory.guesses([6], 5) == memory.guesses([], 5) == memory.guesses([88], 5) == []
    assert MemoryLookup(np.zeros(0, np.int32), np.zeros(0, bool)).guesses([1, 2], 5) == []


def _trips(pace: Pace, trip: float, token: float, drafted: float, count: int = 60) -> None:
    for i in range(count):
        tokens, own = 1 + i % 5, (0, 0, 3, 5)[i % 4]
        pace.took(trip + token * tokens + drafted * own, tokens, own)


def test_seconds_of_a_round_trip_are_learned():
    pace = Pace()
    _trips(pace, 0.05, 0.004, 0.02)
    assert pace.seconds(4) == pytest.approx(0.066, rel=0.1)
    assert pace.seconds(1, 6) == pytest.approx(0.174, rel=0.1)


def test_guesses_that_fail_grow_shorter_and_those_that_come_true_longer():
    pace, offer = Pace(), [([Guess("text 2", list(range(16)))], 16, 0)]
    _trips(pace, 0.02, 0.002, 0.02)
    lengths = []
    for _ in range(60):
        lengths.append(len(pace.choose(offer)[0].tokens))
        pace.came_true("text 2", lengths[-1], lengths[-1])
    assert lengths[-1] == 16 > lengths[0]
    for _ in range(60):
        lengths.append(len(pace.choose(offer)[0].tokens))
        pace.came_true("text 2", lengths[-1], 0)
    assert lengths[-1] <= 1
    for _ in range(2000):
        pace.choose(offer)
    assert len(pace.choose(offer)[0].tokens) > lengths[-1]  # after a while it is tried again


def test_of_two_guesses_the_one_that_comes_true_is_taken():
    pace = Pace()
    for _ in range(20):
        pace.came_true("good", 4, 4)
        pace.came_true("bad", 4, 0)
    (bet,) = pace.choose([([Guess("bad", [1, 2]), Guess("good", [3, 4])], 8, 0)])
    assert (bet.kind, bet.tokens) == ("good", (3, 4))


def test_the_plm_guesses_where_round_trips_are_long_and_not_where_they_are_short():
    for trip, asked in ((0.2, True), (0.001, False)):
        pace = Pace()
        _trips(pace, trip, 0.001, 0.02)
        (bet,) = pace.choose([([], 8, 8)])
        assert (bet.draft > 0) == asked
        assert bet == Bet() or bet.kind == BY_PLM
        assert pace.choose([([], 8, 0)]) == [Bet()]
    for _ in range(40):
        pace.came_true(BY_PLM, 4, 0)
    _trips(pace, 0.2, 0.001, 0.02)
    assert pace.choose([([], 8, 8)])[0].draft <= 1
