"""A data owner's prefix stands before its texts alone, and its gradient is autograd's, whatever the architecture."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from pema_ray.errors import UserError
from pema_ray.line import ExtractBatch, Step
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import BACKWARD_TOKENS, PrefixLost
from pema_ray.plm_owner.engine import Batcher, EngineConfig
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.load import LoadedPLM
from pema_ray.plm_owner.model.states import capture_state

KINDS = ("llama", "qwen3", "gemma2", "gpt2", "opt")
"""Grouped heads, normalised queries, windows of 12 positions, learned positions, learned positions from a mask."""
EXACT = {"gpt2", "opt"}
"""Whose norms stay in float64; transformers' RMS norms compute in float32."""
TEXT = list(range(40, 50))
PROMPT = tuple(range(20, 30))
SEQUENCES = [[5, 9, 60, 61, 7], [70, 71, 72], [80, 81, 82, 83, 84, 85, 86]]
FIRST = [2, 0, 5]


@pytest.fixture
def plm_of(tiny_plm):
    def make(kind: str, dtype: torch.dtype = torch.float64) -> LoadedPLM:
        plm = tiny_plm(kind)
        return LoadedPLM(kind, deepcopy(plm.model).to(dtype), plm.tokenizer)

    return make


@pytest.fixture
def batcher_for(tiny_plm):
    def make(plm: LoadedPLM, **settings: Any) -> Batcher:
        return Batcher(plm, export_lm_head(tiny_plm(plm.name)).head, EngineConfig(**settings))

    return make


def put(batcher: Batcher, owner: str, prefix: Prefix) -> None:
    """As the engine does it."""
    batcher.prefixes.check(prefix)
    batcher.prefixes.put(owner, prefix)


def close(kind: str) -> dict[str, float]:
    return dict.fromkeys(("atol", "rtol"), 1e-9 if kind in EXACT else 1e-5)


def finish(batcher: Batcher, job: Any) -> Any:
    for _ in range(200):
        if job.result is not None:
            break
        batcher.run()
    if isinstance(job.result, Exception):
        raise job.result
    return job.result


def random_prefix(batcher: Batcher, n: int = 6, seed: int = 0) -> Prefix:
    shape = batcher.prefixes.shape
    assert shape is not None
    generator = torch.Generator().manual_seed(seed)
    return Prefix(torch.randn(n, shape.width, generator=generator, dtype=torch.float64), shape)


def states_one_by_one(plm: LoadedPLM, prefix: Prefix, batch: ExtractBatch) -> torch.Tensor:
    """Every sequence alone behind the prefix, by transformers' own cache."""
    rows = []
    for ids, first in zip(batch.token_ids, batch.first, strict=True):
        cache = DynamicCache(config=plm.model.config)
        for number, (keys, values) in enumerate(prefix.keys_and_values()):
            cache.update(keys, values, number)
        tokens = torch.tensor([[*batch.prefix, *ids]])
        state_TH = capture_state(plm, input_ids=tokens, past_key_values=cache, use_cache=True)[0]
        rows.append(state_TH[len(batch.prefix) + first :])
    return torch.cat(rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompt", [(), PROMPT], ids=["plain", "prompt"])
def test_states_and_gradients_are_autograds(kind: str, prompt: tuple[int, ...], plm_of, batcher_for):
    plm = plm_of(kind)
    batcher = batcher_for(plm, pass_tokens=20)  # several pieces
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    batch = ExtractBatch(SEQUENCES, FIRST, prompt, prefix.handle)
    d_state_NH = torch.randn(batch.rows, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    leaf = prefix.embeddings.clone().requires_grad_()
    expected = states_one_by_one(plm, prefix.replaced(leaf), batch)
    (expected_gradient,) = torch.autograd.grad(expected, leaf, d_state_NH)
    kept = replace(batch, for_gradient=True)
    for extracted in (batch, kept):
        states = finish(batcher, batcher.submit_extraction("me", extracted))
        torch.testing.assert_close(states, expected.detach(), **close(kind))
    gradient, again = (finish(batcher, batcher.submit_gradient("me", batch, d_state_NH)) for _ in range(2))
    torch.testing.assert_close(gradient, expected_gradient, **close(kind))
    assert torch.equal(gradient, again)  # from the graphs that were kept, and computed again
    assert gradient.abs().amax(0).min() > 0  # every number of a position matters


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_finite_differences(kind: str, plm_of, batcher_for):
    plm = plm_of(kind)
    batcher = batcher_for(plm)
    prefix = random_prefix(batcher)
    batch = ExtractBatch(SEQUENCES, FIRST)
    d_state_NH = torch.randn(batch.rows, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))

    def loss(embeddings: torch.Tensor) -> float:
        moved = prefix.replaced(embeddings)
        put(batcher, "me", moved)
        asked = ExtractBatch(SEQUENCES, FIRST, (), moved.handle)
        return float((finish(batcher, batcher.submit_extraction("me", asked)) * d_state_NH).sum())

    put(batcher, "me", prefix)
    asked = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)
    gradient = finish(batcher, batcher.submit_gradient("me", asked, d_state_NH))
    generator, (epsilon, tolerance) = torch.Generator().manual_seed(2), (1e-5, 1e-6) if kind in EXACT else (1e-2, 5e-3)
    for _ in range(20):
        row, column = (int(torch.randint(0, size, (), generator=generator)) for size in prefix.embeddings.shape)
        step = torch.zeros_like(prefix.embeddings)
        step[row, column] = epsilon
        slope = (loss(prefix.embeddings + step) - loss(prefix.embeddings - step)) / (2 * epsilon)
        assert slope == pytest.approx(float(gradient[row, column]), abs=tolerance, rel=tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_and_values_of_a_text_are_that_text(kind: str, plm_of, batcher_for):
    plm = plm_of(kind)
    batcher = batcher_for(plm)
    prefix = finish(batcher, batcher.submit_read("a", TEXT))
    put(batcher, "me", prefix)
    behind = ExtractBatch(SEQUENCES, FIRST, PROMPT, prefix.handle)
    shown = ExtractBatch(SEQUENCES, FIRST, (*TEXT, *PROMPT))
    states, expected = (finish(batcher, batcher.submit_extraction("me", batch)) for batch in (behind, shown))
    torch.testing.assert_close(states, expected, **close(kind))


def test_gradients_of_split_batches_sum(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"))
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    whole = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)
    d_state_NH = torch.randn(whole.rows, 32, dtype=torch.float64)
    first = ExtractBatch(SEQUENCES[:1], FIRST[:1], (), prefix.handle)
    rest = ExtractBatch(SEQUENCES[1:], FIRST[1:], (), prefix.handle)
    parts = zip((first, rest), d_state_NH.split([first.rows, rest.rows]), strict=True)
    summed = sum(finish(batcher, batcher.submit_gradient("me", batch, d_state)) for batch, d_state in parts)
    torch.testing.assert_close(
        finish(batcher, batcher.submit_gradient("me", whole, d_state_NH)), summed, **close("llama")
    )


def test_a_prefix_is_its_owners_alone_and_the_oldest_goes(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"), prefix_positions=10)
    first, second = random_prefix(batcher, 6, 0), random_prefix(batcher, 6, 1)
    put(batcher, "me", first)
    batch = ExtractBatch(SEQUENCES, FIRST, (), first.handle)
    with pytest.raises(PrefixLost):
        finish(batcher, batcher.submit_extraction("somebody else", batch))
    put(batcher, "somebody else", second)
    assert finish(batcher, batcher.submit_extraction("me", batch)) is not None  # others' prefixes take no room of mine
    put(batcher, "me", second)
    with pytest.raises(PrefixLost):
        finish(batcher, batcher.submit_gradient("me", batch, torch.zeros(batch.rows, 32)))
    put(batcher, "me", first)
    assert finish(batcher, batcher.submit_extraction("me", batch)) is not None


def test_prompts_behind_different_prefixes_do_not_share_caches(plm_of, batcher_for):
    plm = plm_of("llama")
    batcher = batcher_for(plm)
    prefixes = [random_prefix(batcher, 6, seed) for seed in (0, 1)]
    for prefix in (*prefixes, prefixes[0]):
        put(batcher, "me", prefix)
        batch = ExtractBatch(SEQUENCES, FIRST, PROMPT, prefix.handle)
        states = finish(batcher, batcher.submit_extraction("me", batch))
        torch.testing.assert_close(states, states_one_by_one(plm, prefix, batch), **close("llama"))
    plain = ExtractBatch(SEQUENCES, FIRST, PROMPT)
    states = finish(batcher, batcher.submit_extraction("me", plain))
    fresh = batcher_for(plm)
    torch.testing.assert_close(states, finish(fresh, fresh.submit_extraction("me", plain)))


def test_what_fits_no_pass_is_refused_by_name(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"), prefix_positions=10, max_tokens=12)
    prefix = random_prefix(batcher)
    with pytest.raises(UserError, match="A prefix of 11 positions is longer than is kept here"):
        put(batcher, "me", random_prefix(batcher, 11))
    with pytest.raises(UserError, match="This prefix is for another PLM"):
        put(batcher, "me", random_prefix(batcher_for(plm_of("gpt2"))))
    with pytest.raises(UserError, match="must be finite"):
        put(batcher, "me", prefix.replaced(prefix.embeddings / 0))
    with pytest.raises(UserError, match=r"floating-point numbers, not torch.int32"):
        put(batcher, "me", prefix.replaced(prefix.embeddings.int()))
    with pytest.raises(UserError, match="A prefix of 11 positions is longer than is kept here"):
        finish(batcher, batcher.submit_read("me", [5] * 11))
    put(batcher, "me", prefix)
    long = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)
    with pytest.raises(UserError, match="A text of 13 tokens is longer"):
        finish(batcher, batcher.submit_extraction("me", long))
    short = ExtractBatch(SEQUENCES[:2], FIRST[:2], (), prefix.handle)
    for wrong, said in (
        (torch.zeros(short.rows, 31), "not"),
        (torch.zeros(short.rows - 1, 32), "not"),
        (torch.full((short.rows, 32), torch.nan), "infinities or NaN"),
    ):
        with pytest.raises(UserError, match=f"The gradient of the states .*{said}"):
            finish(batcher, batcher.submit_gradient("me", short, wrong))
    with pytest.raises(UserError, match="handle of a prefix"):
        finish(batcher, batcher.submit_gradient("me", ExtractBatch(SEQUENCES[:1], [0]), torch.zeros(5, 32)))


def graphs_after(batcher: Batcher, *batches: ExtractBatch) -> list[int]:
    """Bytes that are kept after each extraction."""
    kept = []
    for batch in batches:
        finish(batcher, batcher.submit_extraction("me", batch))
        kept.append(batcher.graphs.nbytes)
    return kept


def positions_of(batcher: Batcher, job: Any) -> int:
    positions = 0
    while job.result is None:
        batcher.run()
        positions += sum(count for _, count in batcher.passes)
    return positions


def test_a_kept_graph_spares_the_forward_pass_and_is_used_once(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama", torch.float32), pass_tokens=20)
    prefix = random_prefix(batcher)
    for owner in ("me", "somebody else"):
        put(batcher, owner, prefix)
    plain = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)
    kept, d_state_NH = replace(plain, for_gradient=True), torch.randn(plain.rows, 32)
    assert graphs_after(batcher, plain) == [0]
    (held,) = graphs_after(batcher, kept)
    assert held > 0 and graphs_after(batcher, kept) == [held]  # asked for again: kept once
    others = positions_of(batcher, batcher.submit_gradient("somebody else", plain, d_state_NH))
    assert batcher.graphs.nbytes == held  # which are mine
    mine = positions_of(batcher, batcher.submit_gradient("me", plain, d_state_NH))
    assert (mine * BACKWARD_TOKENS, batcher.graphs.nbytes) == (others * (BACKWARD_TOKENS - 1), 0)
    assert positions_of(batcher, batcher.submit_gradient("me", plain, d_state_NH)) == others


def test_a_pass_that_lacks_memory_is_computed_without_what_is_kept(plm_of, batcher_for, monkeypatch):
    batcher = batcher_for(plm_of("llama", torch.float32))
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    first, second = (ExtractBatch([[n] * 9] * 2, [0] * 2, (), prefix.handle, True) for n in range(2))
    expected = finish(batcher, batcher.submit_extraction("me", replace(second, for_gradient=False)))
    (kept,) = graphs_after(batcher, first)
    states = batcher._extraction._states

    def short_of_memory(*arguments):
        if batcher.graphs.nbytes:
            raise torch.OutOfMemoryError("out of memory")
        return states(*arguments)

    monkeypatch.setattr(batcher._extraction, "_states", short_of_memory)
    torch.testing.assert_close(finish(batcher, batcher.submit_extraction("me", second)), expected)
    assert 0 < batcher.graphs.nbytes <= 1.1 * kept  # the second's alone


def test_graphs_are_kept_within_bytes_and_time(plm_of, batcher_for):
    plm = plm_of("llama", torch.float32)
    now = [0.0]
    config = EngineConfig(graph_mib=1, forget_seconds=5)
    batcher = Batcher(plm, export_lm_head(plm).head, config, lambda: now[0])
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    asked = [ExtractBatch([[n] * 9] * 20, [0] * 20, (), prefix.handle, True) for n in range(4)]
    kept = graphs_after(batcher, *asked)
    assert all(0 < count <= 2**20 for count in kept)
    assert positions_of(batcher, batcher.submit_gradient("me", asked[0], torch.ones(180, 32))) == 3 * 180  # dropped
    assert positions_of(batcher, batcher.submit_gradient("me", asked[3], torch.ones(180, 32))) == 2 * 180
    too_large = ExtractBatch([[7] * 60] * 20, [0] * 20, (), prefix.handle, True)
    (held,) = graphs_after(batcher, too_large)
    assert held <= 2**20
    now[0] = 4.0
    assert finish(batcher, batcher.submit_extraction("me", replace(asked[0], for_gradient=False))) is not None
    now[0] = 6.0
    batcher.forget_abandoned()
    assert batcher.graphs.nbytes == 0
    assert finish(batcher, batcher.submit_extraction("me", replace(asked[0], for_gradient=False))) is not None
    now[0] = 12.0
    batcher.forget_abandoned()
    assert not batcher._extraction._prefixes
    with pytest.raises(PrefixLost):
        finish(batcher, batcher.submit_extraction("me", asked[0]))
    with pytest.raises(UserError, match="handle of a prefix"):
        finish(batcher, batcher.submit_extraction("me", replace(asked[0], handle="")))


def test_a_gradient_too_small_for_16_bits_is_not_lost(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama", torch.float16))
    shape = batcher.prefixes.shape
    prefix = Prefix(torch.randn(6, shape.width, generator=torch.Generator().manual_seed(0)), shape)
    put(batcher, "me", prefix)
    batch = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)
    d_state_NH = torch.randn(batch.rows, 32, generator=torch.Generator().manual_seed(1))
    large, small = (finish(batcher, batcher.submit_gradient("me", batch, d_state_NH * size)) for size in (1, 1e-8))
    torch.testing.assert_close(small * 1e8, large, atol=2e-2, rtol=2e-2)


def test_a_failing_gradient_ends_its_request_alone(plm_of, batcher_for, monkeypatch):
    batcher = batcher_for(plm_of("llama"))
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    batch = ExtractBatch(SEQUENCES, FIRST, (), prefix.handle)

    def out_of_memory(*arguments, **keywords):
        raise torch.OutOfMemoryError("out of memory")

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd, "grad", out_of_memory)
        with pytest.raises(UserError, match="the gradient of a prefix cannot be computed: out of memory"):
            finish(batcher, batcher.submit_gradient("me", batch, torch.ones(batch.rows, 32)))
        assert batcher.passes[0][1] > 0  # and its owner's turn is over
    assert finish(batcher, batcher.submit_gradient("me", batch, torch.ones(batch.rows, 32))) is not None


def test_a_request_keeps_the_prefix_that_it_was_given(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"), prefix_positions=6)
    first, second = random_prefix(batcher, 6, 0), random_prefix(batcher, 6, 1)
    put(batcher, "me", first)
    batch = ExtractBatch(SEQUENCES, FIRST, (), first.handle)
    expected = finish(batcher, batcher.submit_extraction("me", batch))
    waiting = batcher.submit_extraction("me", batch)
    put(batcher, "me", second)  # in its place
    torch.testing.assert_close(finish(batcher, waiting), expected)


@pytest.mark.parametrize("kind", ["mamba", "jamba"])
def test_models_whose_caches_hold_more_take_none(kind: str, plm_of, batcher_for):
    batcher = batcher_for(plm_of(kind, torch.float32))
    assert batcher.prefixes.shape is None
    for request in (
        lambda: put(batcher, "me", random_prefix(batcher_for(plm_of("llama")))),
        lambda: finish(batcher, batcher.submit_read("a", TEXT)),
    ):
        with pytest.raises(UserError, match=f"{kind}.* takes no prefix"):
            request()


def test_a_text_longer_than_a_window_starts_no_prefix(plm_of, batcher_for):
    batcher = batcher_for(plm_of("gemma2"))
    with pytest.raises(UserError, match="longer than its layers' windows"):
        finish(batcher, batcher.submit_read("a", list(range(40, 60))))


def test_reading_a_text_delays_no_other_owner_by_more_than_a_pass(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama", torch.float32), pass_tokens=16)
    reads = [batcher.submit_read("one", [5 + i % 90 for i in range(64)]) for _ in range(4)]
    other = batcher.submit_extraction("another", ExtractBatch([[5, 6, 7]], [0]))
    passes = 0
    while other.result is None:
        batcher.run()
        passes += 1
    assert passes <= 2 and not any(read.result for read in reads)
    assert batcher.waiting_tokens > 3 * 64
    prefixes = [finish(batcher, read) for read in reads]
    whole = batcher_for(plm_of("llama", torch.float32), pass_tokens=512)
    expected = finish(whole, whole.submit_read("one", [5 + i % 90 for i in range(64)]))
    torch.testing.assert_close(prefixes[0].embeddings, expected.embeddings, atol=1e-5, rtol=1e-4)


# ── sessions ────────────────────────────────────────────────────────────────


def take(batcher: Batcher, session: str, position: int, tokens: list[int], handle: str = "", states: int = 1) -> Any:
    return finish(batcher, batcher.submit("me", Step(session, position, tokens, states, handle=handle)))


@pytest.mark.parametrize("kind", KINDS)
def test_a_session_behind_a_prefix_has_the_states_of_its_extraction(kind: str, plm_of, batcher_for):
    plm = plm_of(kind)
    batcher = batcher_for(plm, slots=4)
    prefixes = [random_prefix(batcher, 6, seed) for seed in (0, 1)]
    for prefix in prefixes:
        put(batcher, "me", prefix)
    text = SEQUENCES[2]
    opened = [take(batcher, f"session {n}", 0, text[:3], prefix.handle, states=3) for n, prefix in enumerate(prefixes)]
    opened.append(take(batcher, "plain", 0, text[:3], states=3))
    for n, handle in enumerate([prefix.handle for prefix in prefixes] + [""]):
        session = "plain" if n == 2 else f"session {n}"
        more = take(batcher, session, 3, text[3:], states=len(text) - 3)
        expected = finish(batcher, batcher.submit_extraction("me", ExtractBatch([text], [0], (), handle)))
        torch.testing.assert_close(torch.cat([opened[n].state_NH, more.state_NH]), expected, **close(kind))
        rewound = take(batcher, session, 2, text[2:4], states=2)
        torch.testing.assert_close(rewound.state_NH, expected[2:4], **close(kind))


def test_a_prefix_is_loaded_once_and_copied_with_the_prompt_behind_it(plm_of, batcher_for, monkeypatch):
    batcher = batcher_for(plm_of("llama"), slots=4)
    prefix = random_prefix(batcher, 12)
    put(batcher, "me", prefix)
    loads: list[int] = []
    load = batcher._caches.load
    monkeypatch.setattr(batcher._caches, "load", lambda slot, prefix: loads.append(slot) or load(slot, prefix))
    first = take(batcher, "a", 0, list(PROMPT), prefix.handle)
    second = take(batcher, "b", 0, list(PROMPT), prefix.handle)
    assert loads == [0]
    torch.testing.assert_close(first.state_NH, second.state_NH)
    take(batcher, "c", 0, list(PROMPT))
    assert loads == [0]


def test_openings_behind_an_unknown_prefix_are_lost(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"), max_tokens=12)
    with pytest.raises(PrefixLost):
        take(batcher, "a", 0, [5], "nobody put it")
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    with pytest.raises(UserError, match="A text of 13 tokens"):
        take(batcher, "a", 0, SEQUENCES[2], prefix.handle)
    assert take(batcher, "a", 0, SEQUENCES[1], prefix.handle).state_NH.shape == (1, 32)
    with pytest.raises(UserError, match="A text of 13 tokens"):
        take(batcher, "a", 3, [5, 6, 7, 8])


def test_an_opening_behind_another_prefix_opens_anew(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama"))
    prefix = random_prefix(batcher)
    put(batcher, "me", prefix)
    text = SEQUENCES[0]
    for handle in ("", prefix.handle, ""):
        state = take(batcher, "a", 0, text, handle).state_NH
        expected = finish(batcher, batcher.submit_extraction("me", ExtractBatch([text], [4], (), handle)))
        torch.testing.assert_close(state, expected, **close("llama"))
    with pytest.raises(PrefixLost):
        take(batcher, "a", 0, text, "nobody put it")


def test_a_prefix_that_leads_to_infinities_stays_with_its_owner(plm_of, batcher_for):
    batcher = batcher_for(plm_of("llama", torch.float32), slots=2)
    prefix = random_prefix(batcher, 30)
    prefix = prefix.replaced((prefix.embeddings.clamp(-3, 3) * 1e38).float())
    put(batcher, "me", prefix)
    spoiled = take(batcher, "a", 0, SEQUENCES[2], prefix.handle, states=7)
    assert not torch.isfinite(spoiled.state_NH).all()
    batcher.close("me", "a")
    steps = [Step("long", 0, list(range(5, 60))), Step("short", 0, SEQUENCES[1])]
    jobs = [batcher.submit("you", step) for step in steps]
    assert all(torch.isfinite(finish(batcher, job).state_NH).all() for job in jobs)
    more = [batcher.submit("you", Step("long", 55, [7])), batcher.submit("you", Step("short", 3, [7]))]
    assert all(torch.isfinite(finish(batcher, job).state_NH).all() for job in more)
