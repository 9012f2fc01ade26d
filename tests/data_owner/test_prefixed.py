"""Behind a prefix that is the KV of the replaced tokens, a PLM answers as without; other prompts are refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from pema_ray.data_owner.prefixed import PrefixedPLM, TrainedPrefix
from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import BlockingPLM, Busy, ExtractBatch, Step
from pema_ray.plm_owner.engine import EngineConfig, LocalPLM

SHOWN = tuple(range(40, 52))
CLOSE = {"atol": 2e-4, "rtol": 2e-4}


@pytest.fixture
def plain(tiny_plm) -> Iterator[BlockingPLM]:
    with BlockingPLM(LocalPLM(tiny_plm("llama"))) as client:
        yield client


@pytest.fixture
def trained(plain) -> TrainedPrefix:
    return TrainedPrefix(plain.read_prefix(SHOWN), SHOWN, plain.describe().card.fingerprint)


@pytest.fixture
def prefixed(tiny_plm, trained) -> Iterator[BlockingPLM]:
    local = LocalPLM(tiny_plm("llama"), EngineConfig(prefix_positions=20))
    with BlockingPLM(PrefixedPLM(local, trained)) as client:
        yield client


@pytest.mark.parametrize("shared", [0, 5, 12, 20], ids=lambda count: f"{count} tokens shared")
def test_extractions_are_those_of_the_replaced_tokens(shared: int, plain, prefixed):
    sequences = [[*SHOWN, *range(60, 70), 5, 9], [*SHOWN, *range(60, 70), 7]]
    batch = ExtractBatch([ids[shared:] for ids in sequences], [22 - shared, 21 - shared], tuple(sequences[0][:shared]))
    torch.testing.assert_close(prefixed.extract(batch), plain.extract(batch), **CLOSE)


def test_sessions_are_those_of_the_replaced_tokens(plain, prefixed):
    steps = [
        [Step("a", 0, [*SHOWN, 5, 9], 1)],
        [Step("a", 14, [7, 8], 2, draft=2)],
        [Step("a", 13, [3], 1), Step("b", 0, [*SHOWN, 70], 1)],
        [Step("a", 12, [6, 6], 2)],  # back to where the prefix ends
    ]
    for message in steps:
        for outcome, expected in zip(prefixed.step(message), plain.step(message), strict=True):
            assert outcome.drafted == expected.drafted
            torch.testing.assert_close(outcome.state_NH, expected.state_NH, **CLOSE)


def test_a_prefix_that_was_dropped_is_put_again(plain, prefixed, trained):
    batch, opening = ExtractBatch([[*SHOWN, 5, 9]], [13]), [Step("a", 0, [*SHOWN, 5], 1), Step("b", 0, [*SHOWN, 5], 1)]
    other = trained.prefix.replaced(-trained.prefix.embeddings)
    for request in (lambda plm: plm.extract(batch), lambda plm: torch.cat([s.state_NH for s in plm.step(opening)])):
        expected = request(plain)
        local = prefixed.client._client
        prefixed._runner.run(local.put_prefix(other))  # there is room for one
        torch.testing.assert_close(request(prefixed), expected, **CLOSE)


def only(outcomes):
    """Raise the first step's error; the others were taken."""
    first, *others = outcomes
    assert all(outcome.state_NH.shape == (1, 32) for outcome in others)
    raise first


def test_a_prompt_that_begins_otherwise_is_refused(prefixed):
    for request in (
        lambda: prefixed.extract(ExtractBatch([[41, *SHOWN]], [12])),
        lambda: prefixed.extract(ExtractBatch([[5, 9]], [0], SHOWN[:-1])),
        lambda: only(prefixed.step([Step("a", 0, [5, 9, 7], 1), Step("b", 0, [*SHOWN, 5], 1)])),
    ):
        with pytest.raises(UserError, match="the first 12 tokens of every prompt, and this prompt begins otherwise"):
            request()
    for request in (
        lambda: prefixed.extract(ExtractBatch([[*SHOWN, 5]], [11])),
        lambda: only(prefixed.step([Step("a", 0, [*SHOWN, 5], 2)])),
    ):
        with pytest.raises(UserError, match="a position that the prefix replaces"):
            request()
    prefixed.step([Step("a", 0, [*SHOWN, 5], 1)])
    with pytest.raises(UserError, match="cannot be rewound into"):
        only(prefixed.step([Step("a", 11, [5], 1)]))


def test_its_card_is_the_prefixs_own(plain, prefixed, trained):
    card = prefixed.describe().card
    assert card.fingerprint == f"{trained.fingerprint}+{trained.prefix.handle[:12]}"
    assert prefixed.lm_head().card == card
    moved = replace(trained, prefix=trained.prefix.replaced(trained.prefix.embeddings + 1))
    assert moved.card(plain.describe().card).fingerprint != card.fingerprint
    foreign = PrefixedPLM(plain.client, replace(trained, fingerprint="another"))
    with pytest.raises(FingerprintMismatch):
        plain._runner.run(foreign.describe())


def test_a_folder_gives_back_what_was_saved(trained, tmp_path):
    trained.save_pretrained(tmp_path / "prefix", "llama")
    again = TrainedPrefix.from_pretrained(tmp_path / "prefix")
    assert (again.replaces, again.fingerprint) == (trained.replaces, trained.fingerprint)
    assert again.prefix.handle == trained.prefix.handle
    (tmp_path / "prefix" / "prefix.json").write_text("{}")
    with pytest.raises(UserError, match=r"prefix.json: is damaged"):
        TrainedPrefix.from_pretrained(tmp_path / "prefix")
    with pytest.raises(UserError, match=r"holds no prefix: prefix.json is missing"):
        TrainedPrefix.from_pretrained(tmp_path)


def test_clients_that_crowd_each_other_out_are_told_to_retry(prefixed, trained):
    local, other = prefixed.client._client, trained.prefix.replaced(-trained.prefix.embeddings)
    put, others = local.put_prefix, []

    async def put_and_be_overtaken(prefix):
        await put(prefix)
        await put(other)
        others.append(prefix)

    local.put_prefix = put_and_be_overtaken
    with pytest.raises(Busy, match="no room for this prefix"):
        prefixed.extract(ExtractBatch([[*SHOWN, 5, 9]], [13]))
    (outcome,) = prefixed.step([Step("a", 0, [*SHOWN, 5], 1)])
    assert isinstance(outcome, Busy) and len(others) > 4


def test_a_plm_owner_without_prefixes_is_refused_by_name():
    class Other:
        async def describe(self): ...

    with pytest.raises(UserError, match="cannot stand behind another"):
        PrefixedPLM(Other(), TrainedPrefix(None, (), ""))  # type: ignore[arg-type]


def test_a_plm_owner_that_takes_none_is_told(tiny_plm, trained):
    local = LocalPLM(tiny_plm("llama"), EngineConfig(prefix_positions=0))
    with (
        BlockingPLM(PrefixedPLM(local, trained)) as client,
        pytest.raises(UserError, match="this PLM owner takes no prefixes"),
    ):
        client.describe()
