"""A context representation depends on its own sequence alone: not on the batch, the prefix cache or the session."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.line import DecodingSession, ExtractBatch, SessionLost
from pema_ray.plm_owner import InProcessPLM, LoadedPLM
from pema_ray.plm_owner.in_process import shared_prefix
from pema_ray.plm_owner.states import find_final_norm

CLOSE = {"atol": 2e-4, "rtol": 2e-4}
TOKENS = st.lists(st.integers(3, 299), min_size=1, max_size=14)


def states_alone(plm: LoadedPLM, ids: list[int]) -> torch.Tensor:
    """What enters the final norm when one sequence is run through the whole model by itself, without a cache."""
    seen: list[torch.Tensor] = []
    norm = find_final_norm(plm)
    with torch.inference_mode():
        if norm is None:
            out = plm.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
            state = out.hidden_states[-1][0]
            project = plm.decoder.decoder.project_out
            return project(state) if state.shape[-1] != project.out_features else state
        with norm.register_forward_pre_hook(lambda _module, args: seen.append(args[0])):
            plm.model(torch.tensor([ids]), use_cache=False)
    return seen[0][0]


def expected_rows(plm: LoadedPLM, batch: ExtractBatch) -> torch.Tensor:
    alone = [states_alone(plm, ids)[first:] for ids, first in zip(batch.token_ids, batch.first, strict=True)]
    return torch.cat(alone)


@settings(max_examples=5)
@given(data=st.data())
def test_states_are_those_of_each_sequence_alone(architecture: str, tiny_source, data):
    sequences = data.draw(st.lists(TOKENS, min_size=1, max_size=4))
    first = [data.draw(st.integers(0, len(ids) - 1)) for ids in sequences]
    batch = ExtractBatch(sequences, first)
    source = tiny_source(architecture)
    got = source.extract(batch)
    assert got.shape == (batch.rows, source.describe().hidden_size)
    torch.testing.assert_close(got, expected_rows(source.plm, batch), **CLOSE)


@settings(max_examples=5)
@given(data=st.data())
def test_a_shared_prefix_changes_nothing(architecture: str, tiny_source, data):
    prefix = data.draw(st.lists(st.integers(3, 299), min_size=8, max_size=20))
    endings = data.draw(st.lists(TOKENS, min_size=2, max_size=4))
    sequences = [prefix + ending for ending in endings]
    batch = ExtractBatch(sequences, [data.draw(st.integers(len(prefix), len(ids) - 1)) for ids in sequences])
    assert shared_prefix(batch) >= len(prefix)
    source = tiny_source(architecture)
    expected = expected_rows(source.plm, batch)
    torch.testing.assert_close(source.extract(batch), expected, **CLOSE)
    torch.testing.assert_close(source.extract(batch), expected, **CLOSE)  # now from the kept prefix


def test_a_prefix_is_shared_only_short_of_every_wanted_position():
    prefix = list(range(10, 30))
    assert shared_prefix(ExtractBatch([prefix + [1], prefix + [2]], [20, 20])) == 20
    assert shared_prefix(ExtractBatch([prefix + [1], prefix + [2]], [20, 12])) == 12
    assert shared_prefix(ExtractBatch([prefix, prefix], [19, 19])) == 19
    assert shared_prefix(ExtractBatch([prefix + [1]], [20])) == 0  # nothing to share with
    assert shared_prefix(ExtractBatch([prefix[:7] + [1], prefix[:7] + [2]], [7, 7])) == 0  # too short to pay


def test_a_prefix_is_computed_once_for_many_batches(tiny_plm):
    source, prefix = InProcessPLM(tiny_plm("llama")), list(range(10, 30))
    lengths: list[int] = []
    hook = source.plm.model.get_input_embeddings().register_forward_pre_hook(
        lambda _module, args: lengths.append(args[0].numel())
    )
    with hook:
        for ending in (40, 50, 60):
            source.extract(ExtractBatch([prefix + [ending], prefix + [ending + 1]], [20, 20]))
    assert lengths == [20, 2, 2, 2]


def test_no_logits_are_computed(architecture: str, tiny_source):
    source, calls = tiny_source(architecture), []
    source.describe()  # the export's proof does compute some
    head = source.plm.model.get_output_embeddings()
    with head.register_forward_hook(lambda *_: calls.append(1)):
        source.extract(ExtractBatch([[3, 4, 5], [6, 7]], [0, 1]))
        session, _ = source.open([[3, 4, 5]])
        source.extend(session, 0, [0], [9])
        source.close(session)
    assert not calls


def test_a_session_gives_the_states_of_its_ids(architecture: str, tiny_source):
    source = tiny_source(architecture)
    prompts, news = [[5, 6, 7, 8, 9, 10, 11], [20, 21], [30, 31, 32, 33]], [[40, 41, 42], [50, 51, 52], [60, 61, 62]]
    session, state = source.open(prompts)
    torch.testing.assert_close(state, expected_rows(source.plm, _last(prompts)), **CLOSE)
    for step, tokens in enumerate(zip(*news, strict=True)):
        state = source.extend(session, step, [0, 1, 2], list(tokens))
        so_far = [prompt + new[: step + 1] for prompt, new in zip(prompts, news, strict=True)]
        torch.testing.assert_close(state, expected_rows(source.plm, _last(so_far)), **CLOSE)
    source.close(session)


@settings(max_examples=4)
@given(data=st.data())
def test_a_session_whose_prompts_begin_alike_gives_the_states_of_its_ids(architecture: str, tiny_source, data):
    prefix = data.draw(st.lists(st.integers(3, 299), min_size=8, max_size=20))
    held = [prefix + ending for ending in data.draw(st.lists(TOKENS, min_size=2, max_size=6))]
    source = tiny_source(architecture)
    session, state = source.open(held)
    torch.testing.assert_close(state, expected_rows(source.plm, _last(held)), **CLOSE)
    for position in range(4):  # one row is dropped at a time: some idle along, then the cache is copied without them
        rows = data.draw(st.permutations(range(len(held))))[: max(1, len(held) - 1)]
        state = source.extend(session, position, rows, [40 + position] * len(rows))
        held = [held[row] + [40 + position] for row in rows]
        torch.testing.assert_close(state, expected_rows(source.plm, _last(held)), **CLOSE)
    source.close(session)


def test_a_dropped_row_at_the_end_of_the_positions_stops_no_other(architecture: str, tiny_source):
    source = tiny_source(architecture)
    held = [[5] * 94, [6, 7], [8], [9, 10, 11], [12]]
    session, _ = source.open(held)
    source.extend(session, 0, range(5), [20] * 5)
    held = [ids + [20] for ids in held]
    rows = range(1, 5)  # the first has one position left
    for position in range(1, 6):
        state = source.extend(session, position, rows, [20 + position] * 4)
        held = [held[row] + [20 + position] for row in rows]
        torch.testing.assert_close(state, expected_rows(source.plm, _last(held)), **CLOSE)
        rows = range(4)
    source.close(session)


def test_an_empty_session_is_refused(tiny_source):
    for prompts in ([], [[]], [[5], []]):
        with pytest.raises(UserError, match="at least one"):
            tiny_source("llama").open(prompts)


def _last(sequences: list[list[int]]) -> ExtractBatch:
    return ExtractBatch(sequences, [len(ids) - 1 for ids in sequences])


@settings(max_examples=4)
@given(data=st.data())
def test_rows_may_be_dropped_doubled_and_reordered(architecture: str, tiny_source, data):
    source = tiny_source(architecture)
    held = data.draw(st.lists(TOKENS, min_size=1, max_size=3))
    session, _ = source.open(held)
    for position in range(3):
        rows = data.draw(st.lists(st.integers(0, len(held) - 1), min_size=1, max_size=4))
        tokens = data.draw(st.lists(st.integers(3, 299), min_size=len(rows), max_size=len(rows)))
        state = source.extend(session, position, rows, tokens)
        held = [held[row] + [token] for row, token in zip(rows, tokens, strict=True)]
        torch.testing.assert_close(state, expected_rows(source.plm, _last(held)), **CLOSE)
    source.close(session)


def test_decoding_goes_on_past_a_sliding_window(tiny_source):
    source, ids = tiny_source("gemma2"), list(range(20, 30))  # the window is 12
    session, _ = source.open([ids, ids[:3]])
    for position in range(20):
        state = source.extend(session, position, [0, 1], [40 + position, 80 + position])
    sequences = [ids + list(range(40, 60)), ids[:3] + list(range(80, 100))]
    torch.testing.assert_close(state, expected_rows(source.plm, _last(sequences)), **CLOSE)


def test_sessions_do_not_touch_each_other(tiny_source):
    source = tiny_source("llama")
    first, _ = source.open([[5, 6, 7]])
    second, _ = source.open([[8, 9]])
    source.extend(second, 0, [0], [10])
    source.extract(ExtractBatch([[3, 4, 5]], [0]))
    state = source.extend(first, 0, [0], [11])
    torch.testing.assert_close(state, expected_rows(source.plm, _last([[5, 6, 7, 11]])), **CLOSE)


def test_an_unknown_closed_or_out_of_step_session_is_lost(tiny_source):
    source = tiny_source("llama")
    with pytest.raises(SessionLost):
        source.extend("no-such-session", 0, [0], [5])
    session, _ = source.open([[5, 6]])
    with pytest.raises(SessionLost):
        source.extend(session, 1, [0], [7])
    source.extend(session, 0, [0], [7])  # the refused call moved nothing
    with pytest.raises(SessionLost):
        source.extend(session, 0, [0], [7])
    source.close(session)
    source.close(session)
    with pytest.raises(SessionLost):
        source.extend(session, 1, [0], [8])


def test_a_lost_session_opened_again_with_its_ids_goes_on_as_before(tiny_source):
    source = tiny_source("qwen3")
    session, _ = source.open([[5, 6, 7], [8]])
    source.extend(session, 0, [0, 1], [10, 11])
    expected = source.extend(session, 1, [0, 1], [12, 13])
    again, _ = source.open([[5, 6, 7, 10], [8, 11]])
    torch.testing.assert_close(source.extend(again, 0, [0, 1], [12, 13]), expected, **CLOSE)


def test_a_text_longer_than_the_plm_allows_is_refused(tiny_source):
    source, limit = tiny_source("gpt2"), 96
    too_long = "97 tokens is longer than .* allows \\(96\\)"
    with pytest.raises(UserError, match=too_long):
        source.extract(ExtractBatch([[5] * (limit + 1)], [0]))
    with pytest.raises(UserError, match=too_long):
        source.open([[5] * (limit + 1)])
    session, _ = source.open([[5] * limit])
    with pytest.raises(UserError, match=too_long):
        source.extend(session, 0, [0], [6])


@settings(max_examples=6)
@given(data=st.data())
def test_newcomers_join_a_session_without_changing_its_states(architecture: str, tiny_source, data):
    """Random admissions and extensions; a PLM whose cache takes no newcomers says so, and loses nothing by it."""
    source = tiny_source(architecture)
    prefix = data.draw(st.lists(st.integers(3, 299), min_size=0, max_size=12))
    prompts = st.lists(TOKENS.map(lambda ending: prefix + ending), min_size=1, max_size=4)
    held = data.draw(prompts)
    session = DecodingSession(source, held)
    for step in range(6):
        if step % 2 == 0:
            new = data.draw(prompts)
            session.admit(new)
            held = held + new
        else:
            rows = data.draw(st.permutations(range(len(held))))[: max(1, len(held) - data.draw(st.integers(0, 4)))]
            tokens = data.draw(st.lists(st.integers(3, 299), min_size=len(rows), max_size=len(rows)))
            session.extend(rows, tokens)
            held = [[*held[row], token] for row, token in zip(rows, tokens, strict=True)]
        torch.testing.assert_close(session.state_BH, expected_rows(source.plm, _last(held)), **CLOSE)
    session.close()


def test_only_full_attention_takes_newcomers_in_place(tiny_source):
    for architecture, takes in {"llama": True, "gpt2": True, "opt": True, "gemma2": False}.items():
        source = tiny_source(architecture)
        session, _ = source.open([[3, 4, 5], [6]])
        if takes:
            assert source.admit(session, 0, [[7, 8]]).shape == (1, source.describe().hidden_size)
            with pytest.raises(SessionLost):
                source.admit(session, 0, [[9]])  # out of step: an admission is a step too
        else:
            with pytest.raises(SessionLost):
                source.admit(session, 0, [[7, 8]])
        source.close(session)


def test_the_cache_of_a_session_that_goes_on_for_ever_stays_small(tiny_source):
    source = tiny_source("llama")
    session = DecodingSession(source, [[3, 4], [5]])
    for turn in range(60):  # far more steps than the model has positions
        session.extend([1], [6])
        session.admit([[7, 8, 9 + turn]])
    assert source._sessions[session._name].attended_BT.shape[1] < 10
    session.close()
