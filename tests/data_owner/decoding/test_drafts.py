"""Draft candidates repeat what followed earlier in the text or in a memory."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.data_owner.decoding.drafts import DraftCandidate, MemoryLookup, PromptLookup


def drafted(drafts: PromptLookup, limit: int = 10) -> dict[str, list[int]]:
    return {candidate.kind: candidate.tokens for candidate in drafts.candidates(limit)}


def test_a_draft_is_what_followed_where_the_text_stood_before():
    drafts = PromptLookup([1, 2, 3, 4, 5, 6, 9, 1, 2])
    assert drafted(drafts)["text 2"] == [3, 4, 5, 6, 9, 1, 2]
    assert drafted(drafts, limit=2)["text 2"] == [3, 4]
    assert drafted(PromptLookup([1, 2, 3])) == {}


def test_the_longest_match_and_the_newest_place_count():
    assert drafted(PromptLookup([1, 2, 3, 8, 2, 3, 9, 0, 1, 2, 3]), 1) == {"text 3": [8]}  # after 2, 3 alone it was 9
    assert drafted(PromptLookup([2, 3, 8, 0, 2, 3, 9, 5, 2, 3]), 1) == {"text 2": [9]}


def test_drafts_follow_a_passage_past_changes():
    drafts = PromptLookup([10, 11, 12, 13, 14, 15, 16, 0])
    for token in (10, 11):
        drafts.follow(token)
    assert drafted(drafts)["text 2"] == [12, 13, 14, 15, 16, 0, 10, 11]
    drafts.follow(99)  # instead of 12
    assert drafted(drafts)["along 0"][:3] == [13, 14, 15]
    drafts.follow(13)
    assert drafted(drafts)["along 1"][:3] == [14, 15, 16]
    drafts.follow(16)  # skips 14 and 15
    assert drafted(drafts)["along 0"] == [0, 10, 11, 99, 13, 16]


@given(prompt=st.lists(st.integers(0, 5), min_size=1, max_size=30), answer=st.lists(st.integers(0, 5), max_size=30))
def test_candidates_are_always_stretches_of_the_text(prompt, answer):
    drafts = PromptLookup(prompt)
    for token in answer:
        drafts.follow(token)
    text = [*prompt, *answer]
    for candidate in drafts.candidates(5):
        assert 0 < len(candidate.tokens) <= 5
        assert any(text[i : i + len(candidate.tokens)] == candidate.tokens for i in range(len(text)))


def test_a_memory_drafts_the_commonest_continuation_within_its_example():
    targets = [[1, 2, 3, 4], [1, 2, 5, 6], [7, 2, 5, 9], [4, 1]]
    token = np.array([token for target in targets for token in target])
    begins = np.array([i == 0 for target in targets for i in range(len(target))])
    memory = MemoryLookup(token, begins)
    assert memory.candidates([1], 5)[0].kind == "memory 1"
    (candidate,) = memory.candidates([9, 1, 2], 5)
    assert candidate.kind == "memory 2" and candidate.tokens in ([3, 4], [5, 6])
    assert memory.candidates([2], 1) == [DraftCandidate("memory 1", [5])]  # 5 twice, 3 once
    assert memory.candidates([7, 2], 5) == [DraftCandidate("memory 2", [5, 9])]
    assert memory.candidates([1, 2, 3], 9) == [DraftCandidate("memory 3", [4])]  # not on into the next example
    assert memory.candidates([6], 5) == memory.candidates([], 5) == memory.candidates([88], 5) == []
    assert MemoryLookup(np.zeros(0, np.int32), np.zeros(0, bool)).candidates([1, 2], 5) == []
