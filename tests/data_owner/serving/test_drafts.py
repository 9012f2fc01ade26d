"""Drafts repeat what followed before, and grow shorter when they are wrong."""

from __future__ import annotations

from pema_ray.data_owner.serving.drafts import PromptLookup


def test_a_draft_is_what_followed_where_the_text_stood_before():
    drafts = PromptLookup([1, 2, 3, 4, 5, 6, 9, 1, 2], most=3)
    assert drafts.guess(room=10) == [3, 4, 5]
    assert drafts.guess(room=2) == [3, 4]
    assert drafts.guess(room=0) == []
    drafts.follow(7)
    assert drafts.guess(10) == []  # 2, 7 never stood before
    for token in (5, 6):
        drafts.follow(token)
    assert drafts.guess(10) == [9, 1, 2]


def test_the_longest_match_and_the_newest_place_count():
    drafts = PromptLookup([1, 2, 3, 8, 2, 3, 9, 0, 1, 2, 3], most=1)
    assert drafts.guess(9) == [8]  # after 1, 2, 3; after 2, 3 alone it was 9
    assert PromptLookup([2, 3, 8, 0, 2, 3, 9, 0, 2, 3], most=1).guess(9) == [9]


def test_drafts_that_fail_grow_shorter_and_those_that_come_true_longer():
    drafts = PromptLookup([*range(20), 0, 1], most=8)
    assert len(drafts.guess(99)) == 8
    for _ in range(20):
        drafts.learn(8, 0)
    assert len(drafts.guess(99)) == 1  # never none: it must find out when guessing pays again
    for _ in range(20):
        drafts.learn(1, 1)
    assert len(drafts.guess(99)) == 8
    drafts.learn(0, 0)
