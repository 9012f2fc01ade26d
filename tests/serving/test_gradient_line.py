"""A prefix trained over HTTPS, or while replicas die, is bit for bit the one trained in one process; what a PLM owner
does not offer, has lost, or limits, is told by name."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import pytest
import torch
from https_kit import Owner
from serving_kit import DirectHandle

from pema_ray.data_owner.prefixed import PrefixedPLM, TrainedPrefix
from pema_ray.data_owner.remote import RemotePLM
from pema_ray.data_owner.training.config import PrefixConfig
from pema_ray.data_owner.training.prefix import PrefixTrainer
from pema_ray.errors import UserError
from pema_ray.line import BlockingPLM, Busy, ExtractBatch, PLMClient, Step, codec
from pema_ray.line.plm_config import PLMConfig
from pema_ray.line.prefix import Prefix
from pema_ray.line.protocol import BACKWARD_TOKENS, PrefixLost
from pema_ray.line.retry import PatientPLM
from pema_ray.pema.stages.train_prefix import start_of
from pema_ray.plm_owner.engine import LocalPLM
from pema_ray.plm_owner.service.api import RequestLimits
from pema_ray.plm_owner.service.deployment import PLMEngine
from pema_ray.plm_owner.service.replicas import Replicas

TEXT = list(range(40, 52))
BATCH = ExtractBatch([[5, 9, 60, 61, 7], [70, 71, 72], [80, 81, 82, 83, 84, 85, 86]], [2, 0, 5])
TARGET = torch.tensor([61, 7, 99, 71, 72, 90, 86, 91])
STEPS = 12


@pytest.fixture
def owner_of(tmp_path, tiny_plm_folder):
    return lambda **settings: Owner(tmp_path, tiny_plm_folder("llama"), **settings)


def train(client: PLMClient, folder: Path, **changed: Any) -> tuple[Prefix, list[float]]:
    """A short training: the prefix, and the loss of every step."""
    with BlockingPLM(PatientPLM(client, 60.0)) as plm:
        start, head = start_of(plm, TEXT), plm.lm_head().head
        settings = PrefixConfig(rank=4, epochs=STEPS, learning_rate=1e-2, prefix_learning_rate=5e-2, validate_every=4)
        settings = settings.model_copy(update=changed)
        trainer = PrefixTrainer(settings, plm, head, start, [(BATCH, TARGET)], [(BATCH, TARGET)], folder)
        history = trainer.run()
        return trainer.model.prefix, [point["loss"] for point in history.train]


@pytest.fixture(scope="module")
def in_process(tiny_plm_folder, tmp_path_factory):
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1)
    return train(LocalPLM(config), tmp_path_factory.mktemp("in_process"))


async def test_two_organisations_train_the_same_prefix_as_one_process(owner_of, in_process, tmp_path):
    expected, losses = in_process
    assert losses[-1] < losses[0]
    async with owner_of() as owner:
        prefix, remote_losses = await asyncio.to_thread(train, owner.remote(), tmp_path / "remote")
        assert remote_losses == losses
        assert torch.equal(prefix.embeddings, expected.embeddings)
        events = [line["what"] for line in owner.log()]
        assert events.count("gradient") == STEPS and events.count("read-prefix") == 1
        backward = next(line for line in owner.log() if line["what"] == "gradient")
        assert (backward["rows"], backward["tokens"]) == (BATCH.rows, BACKWARD_TOKENS * BATCH.tokens)


def test_replicas_may_die_twenty_times_and_the_prefix_is_the_same(in_process, tiny_plm_folder, tmp_path):
    expected, losses = in_process
    config = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(config, {"slots": 4, "max_tokens": 90}), 2)
    random_, kills, ended = random.Random(5), list[str](), []

    def die(method: str) -> None:
        if method in ("extract", "gradient", "put_prefix") and len(kills) < 20 and random_.random() < 0.7:
            name = random_.choice(sorted(handle.replicas))
            ended.append(handle.replicas[name])
            handle.kill(name)
            handle.add()
            kills.append(method)

    handle.before = die
    prefix, survived_losses = train(Replicas(handle), tmp_path)
    assert len(kills) == 20 and {"extract", "gradient"} <= set(kills)
    assert survived_losses == losses
    assert torch.equal(prefix.embeddings, expected.embeddings)


def test_requests_side_by_side_give_the_same_training(in_process, tiny_plm_folder, tmp_path):
    expected, losses = in_process
    config = {"name": tiny_plm_folder("llama"), "dtype": "float32", "device": "cpu", "threads": 1}
    handle = DirectHandle(lambda: PLMEngine(config, {"slots": 4, "max_tokens": 90}), 3)
    prefix, parallel_losses = train(Replicas(handle), tmp_path, requests=3)
    assert parallel_losses == pytest.approx(losses, rel=1e-4)
    torch.testing.assert_close(prefix.embeddings, expected.embeddings, atol=1e-3, rtol=1e-3)
    gradients = [home for method, home in handle.calls if method == "gradient"]
    assert len(gradients) == 3 * STEPS and set(gradients) == set(handle.replicas)  # each where its graph is kept
    engines = [replica.plm.batcher for replica in handle.replicas.values()]
    assert all(engine is not None and engine.graphs.nbytes == 0 for engine in engines)


async def test_a_start_that_its_owner_keeps_gives_the_same_training(owner_of, in_process, tiny_plm_folder, tmp_path):
    expected, losses = in_process
    async with owner_of(engine={"prefix_start": "kept"}) as owner:
        remote = owner.remote()
        with pytest.raises(UserError, match="keeps the keys and values of texts to itself"):
            await remote.read_prefix(TEXT)
        trained, remote_losses = await asyncio.to_thread(train, owner.remote(), tmp_path / "remote")
        assert remote_losses == losses
        assert trained.text == tuple(TEXT) and (trained.embeddings[0] == 0).all()  # a frozen position
        trained.save_pretrained(tmp_path / "saved")
        again = Prefix.from_pretrained(tmp_path / "saved")
        assert again.handle == trained.handle and again.text == trained.text
        local = LocalPLM(PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu", threads=1))
        whole = trained.added_to(await local.read_prefix(TEXT))
        assert torch.equal(whole.embeddings, expected.embeddings)  # for whoever has the weights
        for client, prefix in ((remote, trained), (local, whole)):
            await client.put_prefix(prefix)
        asked = [ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle) for prefix in (trained, whole)]
        torch.testing.assert_close(await remote.extract(asked[0]), await local.extract(asked[1]), atol=1e-6, rtol=1e-6)
        (outcome,) = await remote.step([Step("a", 0, [5, 9], handle=trained.handle)])
        assert outcome.state_NH.shape == (1, 32)
        too_long = Prefix(torch.zeros(91, trained.shape.width), trained.shape, text=(5,) * 91)
        with pytest.raises(UserError, match="longer than"):
            await remote.put_prefix(too_long)
        wrong = Prefix(torch.zeros(1, trained.shape.width), trained.shape, text=(10**6,))
        with pytest.raises(UserError, match="is no token of"):
            await remote.put_prefix(wrong)
        await local.end()


async def test_gradients_cross_the_line_in_16_bits(owner_of, in_process):
    prefix, _ = in_process
    batch = ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle)
    d_state_NH = torch.randn(batch.rows, 32)
    async with owner_of() as owner:
        remote = owner.remote()
        await remote.put_prefix(prefix)
        exact = await remote.gradient(batch, d_state_NH)
        half = await remote.gradient(batch, d_state_NH.bfloat16())
        assert (exact.dtype, half.dtype) == (torch.float32, torch.bfloat16)
        torch.testing.assert_close(half.float(), exact, atol=2e-2 * float(exact.abs().max()), rtol=5e-2)


async def test_gradients_of_several_requests_add_up(owner_of, tiny_plm):
    local = LocalPLM(tiny_plm("llama"))
    prefix = await local.read_prefix(TEXT)
    batch = ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle)
    d_state_NH = torch.randn(batch.rows, 32)
    await local.put_prefix(prefix)
    expected = await local.gradient(batch, d_state_NH)
    async with owner_of(limits=RequestLimits(max_rows=2)) as owner:  # a sequence of three rows is cut
        remote = owner.remote()
        await remote.put_prefix(prefix)
        torch.testing.assert_close(await remote.gradient(batch, d_state_NH), expected, atol=1e-5, rtol=1e-4)
        rows = [line["rows"] for line in owner.log() if line["what"] == "gradient"]
        assert sum(rows) == batch.rows and max(rows) <= 2
    await local.end()


async def test_sessions_and_extractions_stand_behind_a_prefix_at_every_replica(owner_of, tiny_plm):
    local = LocalPLM(tiny_plm("llama"))
    trained = TrainedPrefix(await local.read_prefix(TEXT), tuple(TEXT), (await local.describe()).card.fingerprint)
    async with owner_of(replicas=2) as owner:
        remote, plain = PrefixedPLM(owner.remote(), trained), owner.remote()
        asked = ExtractBatch([[*TEXT, 5, 9]], [13])
        for _ in range(4):  # Serve's turns: both replicas answer
            torch.testing.assert_close(await remote.extract(asked), await plain.extract(asked), atol=2e-4, rtol=2e-4)
        names = [f"s{number}" for number in range(4)]
        for position, tokens in ((0, [*TEXT, 5]), (13, [9, 8])):
            steps = [Step(name, position, tokens) for name in names]
            for outcome in await remote.step(steps):
                ids = [*TEXT, 5][:position] + tokens
                state = await plain.extract(ExtractBatch([ids], [len(ids) - 1]))
                torch.testing.assert_close(outcome.state_NH, state, atol=2e-4, rtol=2e-4)
        owner.handle.kill("r0")  # and its prefixes
        owner.handle.add()
        for _ in range(3):
            torch.testing.assert_close(await remote.extract(asked), await plain.extract(asked), atol=2e-4, rtol=2e-4)
    await local.end()


async def test_a_plm_owner_without_adaptation_is_named_before_anything_is_sent(owner_of, in_process):
    prefix, _ = in_process
    async with owner_of(engine={"prefix_positions": 0}) as owner:
        remote = owner.remote()
        assert (await remote.describe()).prefix_shape is None
        for call in (
            remote.read_prefix(TEXT),
            remote.put_prefix(prefix),
            remote.gradient(BATCH, torch.zeros(BATCH.rows, 32)),
        ):
            with pytest.raises(UserError, match="has not set adaptation: prefix"):
                await call
        assert {line["what"] for line in owner.log()} == {"model"}
        async with owner.raw() as http:
            body = codec.encode_prefix(prefix, owner.fingerprint)
            response = await http.post("/v1/prefixes", content=body)
            assert response.status_code == 403 and "adaptation: none" in response.text


async def test_a_prefix_belongs_to_the_owner_who_put_it(owner_of, in_process):
    from pema_ray.plm_owner.service.access import Quota, add_client

    prefix, _ = in_process
    batch = ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle)
    async with owner_of() as owner:
        await owner.remote().put_prefix(prefix)
        other_key = owner.folder / "other"
        other_key.write_text(add_client(owner.keys, "another", Quota()))
        other = owner.remote(key_file=str(other_key))
        for call in (other.extract(batch), other.gradient(batch, torch.zeros(batch.rows, 32))):
            with pytest.raises(PrefixLost):
                await call
        (outcome,) = await other.step([Step("a", 0, [5], handle=prefix.handle)])
        assert isinstance(outcome, PrefixLost)


async def test_quotas_count_prefixes_and_backward_tokens(owner_of, in_process):
    prefix, _ = in_process
    batch = ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle)
    cost = BACKWARD_TOKENS * batch.tokens
    async with owner_of(tokens_per_minute=cost + len(prefix) + 2) as owner:
        remote, d_state_NH = owner.remote(), torch.zeros(batch.rows, 32)
        with pytest.raises(PrefixLost):  # refused: costs nothing
            await remote.gradient(batch, d_state_NH)
        await remote.put_prefix(prefix)
        await remote.gradient(batch, d_state_NH)
        with pytest.raises(Busy, match="tokens"):
            await remote.gradient(batch, d_state_NH)


async def test_what_is_too_large_or_damaged_is_named(owner_of, in_process):
    prefix, _ = in_process
    long = prefix.replaced(prefix.embeddings.repeat(40, 1))
    async with owner_of(limits=RequestLimits(max_body_mb=0.05), engine={"prefix_positions": 64}) as owner:
        remote: RemotePLM = owner.remote()
        with pytest.raises(UserError, match=r"takes bodies of 0.05 MiB \(limits.max_body_mb\), this prefix has"):
            await remote.put_prefix(long)
        with pytest.raises(UserError, match="longer than is kept here"):
            await remote.put_prefix(prefix.replaced(prefix.embeddings.repeat(6, 1)))
        with pytest.raises(UserError, match="must be finite"):
            await remote.put_prefix(prefix.replaced(prefix.embeddings * float("inf")))
        with pytest.raises(UserError, match="A prefix of 65 positions is longer than is kept here"):
            await remote.read_prefix([5] * 65)
        with pytest.raises(UserError, match=r"413: A prefix of 600 tokens has 0.1 MiB, more than max_body_mb allows"):
            await remote.read_prefix([5] * 600)
        async with owner.raw() as http:
            for path in ("/v1/prefixes", "/v1/prefixes/read", "/v1/gradient"):
                response = await http.post(path, content=b"noise")
                assert response.status_code == 400, path
                response = await http.post(path, content=b"", headers={"Authorization": "Bearer no"})
                assert response.status_code == 401, path


async def test_a_gradient_of_another_shape_is_refused(owner_of, in_process, monkeypatch):
    prefix, _ = in_process
    batch = ExtractBatch(BATCH.token_ids, BATCH.first, handle=prefix.handle)
    async with owner_of() as owner:
        remote = owner.remote()
        await remote.put_prefix(prefix)
        width = prefix.shape.width
        for wrong in (torch.zeros(len(prefix), width - 1), torch.full((len(prefix), width), float("nan"))):
            monkeypatch.setattr(remote, "_gradient", AsyncMock(return_value=wrong))
            with pytest.raises(UserError, match="sent no gradient of a prefix"):
                await remote.gradient(batch, torch.zeros(batch.rows, 32))
