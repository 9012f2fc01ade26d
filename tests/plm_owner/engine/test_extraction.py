"""Representations depend on their request alone, and a large request delays others by one pass at most."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from batcher_kit import CLOSE, finish, positions_until
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.line import Busy, ExtractBatch, Step, Stepped
from pema_ray.plm_owner.engine.checks import plain_states
from pema_ray.plm_owner.engine.extraction import Extraction, ExtractJob, _SharedPrefixLayer, cut

PREFIX = tuple(range(10, 34))


def counted_positions(plm, calls: list[int]):
    """Counts the positions of every pass."""
    return plm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: calls.append(args[0].numel())
    )


@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=40), budget=st.integers(1, 100), limit=st.integers(1, 9)
)
def test_pieces_hold_every_sequence_once_and_keep_to_the_budget(lengths, budget, limit):
    pieces = cut(lengths, budget, limit)
    assert sorted(i for piece in pieces for i in piece) == list(range(len(lengths)))
    for piece in pieces:
        longest = max(lengths[i] for i in piece)
        assert len(piece) == 1 or (len(piece) * longest <= budget and len(piece) <= limit)


def test_rows_come_back_in_the_order_of_the_request(batcher_of, tiny_plm):
    sequences = [[5], list(range(3, 60)), [6, 7], list(range(9, 40)), [8]] * 3
    first = [len(ids) // 2 for ids in sequences]
    batcher = batcher_of(pass_tokens=64)
    (rows,) = finish(batcher, batcher.submit_extraction("me", ExtractBatch(sequences, first)))
    expected = torch.cat([plain_states(tiny_plm("llama"), ids)[f:] for ids, f in zip(sequences, first, strict=True)])
    torch.testing.assert_close(rows, expected, **CLOSE)


def test_the_bytes_do_not_depend_on_what_else_is_running(batcher_of):
    batch = ExtractBatch([list(range(3, 3 + n)) for n in (9, 1, 30, 4, 4, 17)], [0] * 6, PREFIX)
    earlier = ExtractBatch([[7] * n for n in (5, 9, 30)], [0] * 3, PREFIX)
    alone, busy = batcher_of(pass_tokens=48), batcher_of(pass_tokens=48)
    (expected,) = finish(alone, alone.submit_extraction("me", batch))
    before = busy.submit_extraction("me", earlier)
    jobs = [busy.submit_extraction(owner, batch) for owner in ("me", "you", "me")]
    steps = [busy.submit("you", Step(f"s{i}", 0, range(3, 40 + i))) for i in range(3)]
    finish(busy, before, *jobs, *steps)
    for job in jobs:
        assert torch.equal(job.result, expected)


def test_a_prefix_is_computed_once_for_all_requests_of_an_owner(batcher_of, tiny_plm):
    batcher, calls = batcher_of(pass_tokens=20), []
    with counted_positions(tiny_plm("llama"), calls):
        for ending in (40, 50, 60):
            batch = ExtractBatch([[ending], [ending + 1]], [0, 0], PREFIX)
            (rows,) = finish(batcher, batcher.submit_extraction("me", batch))
            expected = [plain_states(tiny_plm("llama"), [*PREFIX, token])[-1:] for token in (ending, ending + 1)]
            torch.testing.assert_close(rows, torch.cat(expected), **CLOSE)
            del calls[-2:]  # of the plain passes
    assert calls == [20, 4, 2, 2, 2]  # in pieces of the budget, then never again


def test_a_prefix_is_never_shared_between_owners_and_forgotten_when_it_changes(batcher_of, tiny_plm):
    batcher, calls = batcher_of(), []
    with counted_positions(tiny_plm("llama"), calls):
        for owner, prefix in (("me", PREFIX), ("you", PREFIX), ("me", PREFIX[1:]), ("me", PREFIX), ("you", PREFIX)):
            finish(batcher, batcher.submit_extraction(owner, ExtractBatch([[5]], [0], prefix)))
    assert calls == [24, 1, 24, 1, 23, 1, 24, 1, 1]
    for number in range(20):
        finish(batcher, batcher.submit_extraction(f"owner {number}", ExtractBatch([[5]], [0], PREFIX)))
    assert len(batcher._extraction._prefixes) <= 8


def test_more_owners_than_kept_prefixes_all_get_their_rows(batcher_of):
    """Each one's prefix is computed in pieces, between those of the others."""
    batcher = batcher_of(pass_tokens=8)
    jobs = [batcher.submit_extraction(f"o{i}", ExtractBatch([[5, 6]], [0], PREFIX)) for i in range(20)]
    assert all(rows.shape[0] == 2 for rows in finish(batcher, *jobs))


def test_many_extractions_of_one_owner_delay_another_by_one_pass(batcher_of):
    batcher = batcher_of(pass_tokens=60, slots=4)
    finish(batcher, batcher.submit("you", Step("s", 0, [5])))
    large = [batcher.submit_extraction("me", ExtractBatch([[5] * 30] * 40, [0] * 40)) for _ in range(32)]
    batcher.run()
    for position in range(1, 5):
        step = batcher.submit("you", Step("s", position, [7]))
        assert positions_until(batcher, step) <= 60 + 1
    prompt = batcher.submit("you", Step("p", 0, range(3, 93)))
    small = batcher.submit_extraction("you", ExtractBatch([[5] * 30] * 2, [0] * 2))
    # as much for the other owner as for this one, and one pass
    assert positions_until(batcher, prompt, small) <= 2 * (90 + 60) + 60
    assert large[1].result is None


def test_an_owner_with_prompts_and_extractions_starves_neither(batcher_of):
    batcher = batcher_of(pass_tokens=20, slots=16)
    extraction = batcher.submit_extraction("me", ExtractBatch([[5] * 20] * 6, [0] * 6))
    prompts = [batcher.submit("me", Step(f"s{i}", 0, [i + 3] * 80)) for i in range(12)]
    assert positions_until(batcher, extraction) <= 2 * 120 + 20
    assert sum(prompt.result is None for prompt in prompts) > 8


def test_an_owner_with_prompts_and_extractions_gets_one_owners_share(batcher_of):
    batcher = batcher_of(pass_tokens=20, slots=16)
    batcher.submit_extraction("me", ExtractBatch([[5] * 20] * 60, [0] * 60))
    for number in range(12):
        batcher.submit("me", Step(f"s{number}", 0, [number + 3] * 80))
    extraction = batcher.submit_extraction("you", ExtractBatch([[5] * 20] * 6, [0] * 6))
    assert positions_until(batcher, extraction) <= 2 * 120 + 20


def test_an_extraction_that_waits_too_long_is_busy_and_one_that_has_begun_is_finished(batcher_of, clock):
    batcher = batcher_of(pass_tokens=30)
    begun = batcher.submit_extraction("me", ExtractBatch([[5] * 30] * 3, [0] * 3), deadline=2.0)
    late = batcher.submit_extraction("me", ExtractBatch([[5]], [0]), deadline=2.0)
    batcher.run()
    assert batcher.waiting_tokens == 61
    clock.now = 2.5
    batcher.run()
    assert isinstance(late.result, Busy) and "tokens wait" in str(late.result)
    assert finish(batcher, begun)[0].shape[0] == 90
    assert not batcher.busy


@pytest.mark.parametrize("wrong", [-1, 380, 2**31 - 1])
def test_a_token_that_the_plm_does_not_know_is_refused_alone(batcher_of, wrong):
    batcher = batcher_of(slots=4)
    jobs = [
        batcher.submit_extraction("me", ExtractBatch([[5], [6, wrong]], [0, 0])),
        batcher.submit_extraction("me", ExtractBatch([[5]], [0], (*PREFIX, wrong))),
        batcher.submit("me", Step("a", 0, [5, wrong, 6])),
    ]
    good = [batcher.submit_extraction("me", ExtractBatch([[5]], [0])), batcher.submit("me", Step("b", 0, [5]))]
    for result in finish(batcher, *jobs):
        assert isinstance(result, UserError) and f"{wrong} is no token of tiny-llama0, which has 380" in str(result)
    rows, stepped = finish(batcher, *good)
    assert len(rows) == 1 and isinstance(stepped, Stepped)
    again = batcher.submit("me", Step("b", 1, [wrong]))
    assert isinstance(finish(batcher, again)[0], UserError)
    assert isinstance(finish(batcher, batcher.submit("me", Step("b", 1, [6])))[0], Stepped)


def test_a_batch_that_is_too_long_is_refused_prefix_included(batcher_of):
    batcher = batcher_of(max_tokens=30)
    job = batcher.submit_extraction("me", ExtractBatch([[5] * 7], [0], PREFIX))
    assert "31 tokens is longer" in str(finish(batcher, job)[0])


def test_a_prefix_whose_cache_gives_other_states_is_computed_with_every_sequence(tiny_plm, monkeypatch):
    plm = tiny_plm("llama")
    assert Extraction(plm, 64).reuses_prefixes
    update = _SharedPrefixLayer.update

    def broken(self, key_states, value_states, *_: Any, **__: Any):
        keys, values = update(self, key_states, value_states)
        return keys, values.flip(-2)

    monkeypatch.setattr(_SharedPrefixLayer, "update", broken)
    extraction = Extraction(plm, 64)
    assert not extraction.reuses_prefixes and extraction.batches
    job = ExtractJob("me", ExtractBatch([[5, 6], [7]], [0, 0], PREFIX), 0.0)
    while job.result is None:
        extraction.advance([job])
    expected = torch.cat([plain_states(plm, [*PREFIX, *ids])[len(PREFIX) :] for ids in ([5, 6], [7])])
    torch.testing.assert_close(job.result, expected, **CLOSE)


def test_sequences_that_disturb_each_other_in_a_batch_run_singly(tiny_plm):
    """As in a layer whose result depends on the width of the batch."""
    plm = tiny_plm("llama")
    hook = plm.decoder.layers[0].register_forward_hook(
        lambda _module, _args, output: output + (0.0 if output.shape[0] == 1 else 1.0)
    )
    with hook:
        extraction = Extraction(plm, 64)
        assert not extraction.batches and not extraction.reuses_prefixes
        job = ExtractJob("me", ExtractBatch([[5, 6], [7]], [0, 0], PREFIX), 0.0)
        while job.result is None:
            extraction.advance([job])
    expected = torch.cat([plain_states(plm, [*PREFIX, *ids])[len(PREFIX) :] for ids in ([5, 6], [7])])
    torch.testing.assert_close(job.result, expected, **CLOSE)


def test_small_extractions_of_one_owner_fill_a_pass_where_passes_may_be_shared(batcher_of, tiny_plm):
    plm, prefixes = tiny_plm("llama"), [PREFIX, (), PREFIX, (), PREFIX, (4, 5, 6)]
    batches = [
        ExtractBatch([list(range(5 + n, 9 + 3 * n)), [7, 8, n]], [1, 0], prefix) for n, prefix in enumerate(prefixes)
    ]
    passes = {}
    for share in (False, True):
        batcher = batcher_of(pass_tokens=96, share_passes=share)
        jobs = [batcher.submit_extraction("me", batch) for batch in batches]
        jobs.append(batcher.submit_extraction("another", batches[0]))
        passes[share] = 0
        while batcher.busy:
            batcher.run()
            passes[share] += len(batcher.passes)
            assert all(positions <= 96 for _, positions in batcher.passes)
        for job, batch in zip(jobs, [*batches, batches[0]], strict=True):
            states = [plain_states(plm, [*batch.prefix, *ids])[len(batch.prefix) :] for ids in batch.token_ids]
            expected = torch.cat([rows[first:] for rows, first in zip(states, batch.first, strict=True)])
            torch.testing.assert_close(job.result, expected, **CLOSE)
        assert batcher.waiting_tokens == 0
    # each owner's prefix once; then a pass for each batch, or for each prefix: three of one owner, one of the other
    assert passes == {False: 2 + 7, True: 2 + 4}
