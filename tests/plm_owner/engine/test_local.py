"""A context representation depends on its own sequence alone: not on the batch, the prefix cache or other sessions."""

from __future__ import annotations

import asyncio

import pytest
import torch
from batcher_kit import CLOSE
from hypothesis import given, settings
from hypothesis import strategies as st

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ExtractBatch, SessionLost, Step, Stepped
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, LocalPLM
from pema_ray.plm_owner.model.states import find_final_norm

TOKENS = st.lists(st.integers(3, 299), min_size=1, max_size=14)


def states_alone(plm: LoadedPLM, ids: list[int]) -> torch.Tensor:
    """The input of the final norm when the whole model runs one sequence alone, without a cache."""
    captured: list[torch.Tensor] = []
    norm = find_final_norm(plm)
    with torch.inference_mode():
        if norm is None:
            out = plm.model(torch.tensor([ids]), use_cache=False, output_hidden_states=True)
            state = out.hidden_states[-1][0]
            project = plm.model.model.decoder.project_out
            return project(state) if state.shape[-1] != project.out_features else state
        with norm.register_forward_pre_hook(lambda _module, args: captured.append(args[0])):
            plm.model(torch.tensor([ids]), use_cache=False)
    return captured[0][0]


def expected_rows(plm: LoadedPLM, batch: ExtractBatch) -> torch.Tensor:
    states = [states_alone(plm, [*batch.prefix, *ids])[len(batch.prefix) :] for ids in batch.token_ids]
    return torch.cat([rows[first:] for rows, first in zip(states, batch.first, strict=True)])


@settings(max_examples=5)
@given(data=st.data())
def test_extracted_states_are_those_of_each_sequence_alone(architecture: str, tiny_source, tiny_plm, data):
    sequences = data.draw(st.lists(TOKENS, min_size=1, max_size=4))
    first = [data.draw(st.integers(0, len(ids) - 1)) for ids in sequences]
    prefix = tuple(data.draw(st.lists(st.integers(3, 299), max_size=20)))
    batch, source, plm = ExtractBatch(sequences, first, prefix), tiny_source(architecture), tiny_plm(architecture)
    for _ in range(2):  # the second time from the cached prefix
        rows = source.extract(batch)
        assert rows.shape == (batch.rows, source.describe().card.hidden_size)
        torch.testing.assert_close(rows, expected_rows(plm, batch), **CLOSE)


@settings(max_examples=4)
@given(data=st.data())
def test_stepped_states_are_those_of_each_session_alone(architecture: str, tiny_source, tiny_plm, data):
    """Sessions that step together in pieces, some rewound, some with drafts."""
    source, plm = tiny_source(architecture), tiny_plm(architecture)
    sequences: dict[str, list[int]] = {f"s{i}": [] for i in range(data.draw(st.integers(1, 3)))}
    for _ in range(4):
        steps = []
        for name, ids in sequences.items():
            keep = data.draw(st.integers(max(0, len(ids) - 3), len(ids)))
            tokens = data.draw(TOKENS)
            steps.append(Step(name, keep, tokens, data.draw(st.integers(1, len(tokens))), data.draw(st.integers(0, 2))))
        for step, stepped in zip(steps, source.step(steps), strict=True):
            assert isinstance(stepped, Stepped)
            ids = [*sequences[step.session][: step.position], *step.tokens, *stepped.drafted]
            expected = states_alone(plm, ids)[-step.states - step.draft :]
            torch.testing.assert_close(stepped.state_NH, expected, **CLOSE)
            sequences[step.session] = ids
    source.close(list(sequences))


def test_no_logits_are_computed(architecture: str, tiny_source, tiny_plm):
    source, calls = tiny_source(architecture), []
    source.describe()  # the export's proof does compute some
    with tiny_plm(architecture).model.get_output_embeddings().register_forward_hook(lambda *_: calls.append(1)):
        source.extract(ExtractBatch([[3, 4, 5], [6, 7]], [0, 1]))
        source.step([Step("a", 0, [3, 4, 5])])
        source.step([Step("a", 3, [9])])
    source.close(["a"])
    assert not calls


def test_decoding_continues_past_a_sliding_window(tiny_source, tiny_plm):
    source, ids = tiny_source("gemma2"), list(range(20, 30))  # the window is 12
    texts = {"a": ids, "b": ids[:3]}
    outcomes = source.step([Step(name, 0, text) for name, text in texts.items()])
    for t in range(20):
        outcomes = source.step([Step(name, len(text), [40 + t]) for name, text in texts.items()])
        texts = {name: [*text, 40 + t] for name, text in texts.items()}
    for outcome, text in zip(outcomes, texts.values(), strict=True):
        assert isinstance(outcome, Stepped)
        torch.testing.assert_close(outcome.state_NH, states_alone(tiny_plm("gemma2"), text)[-1:], **CLOSE)
    source.close(["a", "b"])


def test_a_sequence_longer_than_the_plm_allows_is_refused(tiny_source):
    source = tiny_source("gpt2")  # 96 positions
    for batch in (ExtractBatch([[5] * 97], [0]), ExtractBatch([[5] * 90], [0], prefix=(6,) * 7)):
        with pytest.raises(UserError, match=r"97 tokens is longer than .* takes here \(96\)"):
            source.extract(batch)
    (outcome,) = source.step([Step("a", 0, [5] * 97)])
    assert isinstance(outcome, UserError) and "97 tokens is longer" in str(outcome)


async def test_a_client_describes_its_plm_and_forgets_its_sessions(tiny_client):
    client = tiny_client("llama", slots=2, max_tokens=40)
    description = await client.describe()
    assert description.limits.max_tokens == 40
    assert description.card == (await client.lm_head()).card
    await client.step([Step("a", 0, [5, 6])])
    await client.close(["a", "never"])
    assert isinstance((await client.step([Step("a", 2, [7])]))[0], SessionLost)


async def test_another_plm_than_the_expected_one_is_refused(tiny_plm_folder):
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)
    client = LocalPLM(config, fingerprint="0" * 16)
    for call in (client.describe(), client.extract(ExtractBatch([[5]], [0])), client.step([Step("a", 0, [5])])):
        with pytest.raises(FingerprintMismatch, match=f"plm.name={config.name} .*'0000000000000000'"):
            await call
    await client.end()


async def test_a_plm_that_cannot_be_loaded_is_named_at_every_call(tmp_path):
    client = LocalPLM(PLMConfig(name=str(tmp_path / "nothing")))
    for _ in range(2):
        with pytest.raises(UserError, match="no such model folder"):
            await client.describe()
    await client.end()


async def test_an_ended_client_refuses_calls(tiny_client):
    client = tiny_client("llama")
    waiting = asyncio.create_task(client.step([Step("a", 0, [5])]))
    await client.describe()
    await client.end()
    assert isinstance((await waiting)[0], SessionLost | Stepped)
    with pytest.raises(UserError, match="ended"):
        await client.describe()


async def test_a_failed_engine_raises_its_cause(tiny_client):
    """No replica replaces it, so the error must not be `Busy`."""
    client = tiny_client("llama")
    engine = await client.engine()

    def fail():
        raise MemoryError("no room")

    engine.batcher.run = fail
    for _ in range(2):
        with pytest.raises(RuntimeError, match="engine has failed: no room"):
            await client.step([Step("a", 0, [5])])
        with pytest.raises(RuntimeError, match="engine has failed: no room"):
            await client.extract(ExtractBatch([[5]], [0]))


async def test_representations_have_the_type_that_is_set(tiny_client):
    exact, short = tiny_client("llama"), tiny_client("llama", wire_dtype="bfloat16")
    batch, step = ExtractBatch([[5, 6, 7]], [0]), Step("a", 0, [5, 6], 2)
    assert torch.equal(await short.extract(batch), (await exact.extract(batch)).bfloat16())
    (rounded,), (expected,) = await short.step([step]), await exact.step([step])
    assert torch.equal(rounded.state_NH, expected.state_NH.bfloat16())
    for client in (exact, short):
        await client.close(["a"])
