"""Peers without the PLM's weights learn what they say they learn, and decode what they were measured to predict."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pema_ray.data_owner.decoding import Decoder, GenerationRequest, SamplingParams
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.line import LMHead
from pema_ray.memory import MemoryRows
from pema_ray.memory.codec import encode
from pema_ray.memory.external_memory import RowsView
from pema_ray.pema.baselines import small_lm
from pema_ray.pema.baselines.config import SmallLMSettings
from pema_ray.pema.baselines.small_lm import (
    AlignedMemory,
    SmallLM,
    SmallLMPredictor,
    SmallLMSpec,
    gold_teacher,
    neighbour_teacher,
    plm_teacher,
    shift,
    target_log_probs,
    train_small_lm,
)
from pema_ray.plm_owner.model.export import export_lm_head
from pema_ray.plm_owner.model.states import capture_state
from pema_ray.tasks import EncodedPair

EOS = 1
SETTINGS = SmallLMSettings(layers=1, learning_rates=(3e-3,), epochs=12, max_batch_tokens=200)


@pytest.fixture(scope="module")
def head(tiny_plm) -> LMHead:
    return export_lm_head(tiny_plm("llama")).head


def pairs(count: int, seed: int = 0) -> list[EncodedPair]:
    """The target repeats the prompt's last token, two or three times."""
    draw = np.random.default_rng(seed)
    prompts = [draw.integers(3, 30, draw.integers(2, 7)).tolist() for _ in range(count)]
    return [EncodedPair(i, prompt, [prompt[-1]] * (2 + i % 2)) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def memory_of(tiny_plm) -> Callable[[list[EncodedPair]], AlignedMemory]:
    """The rows that the tiny PLM gives for pairs, as a teacher-forced build stores them."""
    plm = tiny_plm("llama")

    @torch.inference_mode()
    def build(chosen: list[EncodedPair]) -> AlignedMemory:
        keys, targets, examples, positions = [], [], [], []
        for pair in reversed(chosen):  # a memory has an order of its own
            ids = torch.tensor([pair.prompt + pair.target])
            keys.append(capture_state(plm, input_ids=ids, use_cache=False)[0, len(pair.prompt) - 1 :])
            targets += [*pair.target, EOS]
            examples += [pair.example_id] * (len(pair.target) + 1)
            positions += range(len(pair.target) + 1)
        rows = MemoryRows(
            encode(torch.cat(keys).float().numpy(), "float32"),
            np.array(targets, np.int32),
            np.array(examples, np.int64),
            np.array(positions, np.int32),
        )
        half = len(rows) // 2
        return AlignedMemory(RowsView([rows.take(slice(0, half)), rows.take(slice(half, None))]), chosen)

    return build


def model_of(head: LMHead, seed: int = 0) -> SmallLM:
    torch.manual_seed(seed)
    return SmallLM(head, 2).eval()


@torch.inference_mode()
def test_a_batch_gives_the_rows_of_every_pair_alone(head):
    model, chosen = model_of(head), pairs(6)
    alone = torch.cat([model(torch.tensor([p.prompt + p.target]))[0, len(p.prompt) - 1 :] for p in chosen])
    torch.testing.assert_close(model.rows(chosen), alone, atol=1e-4, rtol=1e-4)


def test_rows_of_pairs_are_found_in_any_order(memory_of):
    chosen = pairs(8)
    memory = memory_of(chosen)
    some = [chosen[5], chosen[0], chosen[7]]
    rows = memory.rows_of(some)
    assert memory.rows.target[rows].tolist() == [token for pair in some for token in (*pair.target, EOS)]


def test_a_memory_without_a_row_for_every_token_is_refused(memory_of):
    chosen = pairs(4)
    rows = memory_of(chosen).rows
    longer = [replace(chosen[0], target=[*chosen[0].target, 5]), *chosen[1:]]
    for wrong in (longer, [replace(chosen[0], example_id=99)]):
        with pytest.raises(UserError, match="a row for every target token"):
            AlignedMemory(rows, wrong)
    rejected = replace(chosen[0], example_id=99)
    assert AlignedMemory(rows, [rejected, *chosen]).pairs == chosen


# ── teachers ────────────────────────────────────────────────────────────────


def distributions(teacher, chosen: np.ndarray, vocab_size: int) -> torch.Tensor:
    """`[n, V]`: an expectation's gradient is the distribution that it is taken under."""
    log_p = torch.zeros(len(chosen), vocab_size, requires_grad=True)
    teacher(chosen, log_p).sum().backward()
    assert log_p.grad is not None
    return log_p.grad


def test_teachers_give_distributions(memory_of, head):
    pytest.importorskip("faiss")
    memory = memory_of(pairs(20))
    chosen = np.array([3, 0, 17])
    for teacher in (
        gold_teacher(memory.rows),
        plm_teacher(memory.rows, head),
        neighbour_teacher(memory.rows, head, 5, 10.0, 0.5),
    ):
        torch.testing.assert_close(distributions(teacher, chosen, head.vocab_size).sum(-1), torch.ones(3))
    gold = distributions(gold_teacher(memory.rows), chosen, head.vocab_size)
    assert gold.argmax(-1).tolist() == memory.rows.target[chosen].tolist()
    state = torch.from_numpy(memory.rows[chosen])
    plm = distributions(plm_teacher(memory.rows, head), chosen, head.vocab_size)
    torch.testing.assert_close(plm.log(), head.log_probs(head.norm(state)))


def test_a_row_is_not_its_own_neighbour(head):
    pytest.importorskip("faiss")
    key = np.random.default_rng(0).normal(size=(6, head.weight.shape[1])).astype(np.float32)
    index = np.arange(6)
    rows = RowsView([MemoryRows(encode(key, "float32"), (10 + index).astype(np.int32), index, index.astype(np.int32))])
    found = distributions(neighbour_teacher(rows, head, 5, 10.0, 1.0), index, head.vocab_size)
    assert all(found[n, 10 + n] == 0 for n in range(6))
    torch.testing.assert_close(found.sum(-1), torch.ones(6))


# ── training ────────────────────────────────────────────────────────────────


def test_a_model_comes_near_the_plm_and_then_near_the_targets(memory_of, head):
    train, dev = memory_of(pairs(60)), memory_of(pairs(12, seed=1))
    plm, dev_plm = plm_teacher(train.rows, head), plm_teacher(dev.rows, head)
    longer = SETTINGS.model_copy(update={"epochs": 40, "learning_rates": (1e-2,)})
    _, imitation = train_small_lm(lambda: SmallLM(head, 1), train, plm, dev_plm, dev, longer)
    assert imitation.seconds > 0
    everything = np.arange(len(dev.rows))
    log_plm = distributions(dev_plm, everything, head.vocab_size).log()
    entropy = -float(dev_plm(everything, log_plm).mean())
    assert 0 < min(imitation.dev_losses) - entropy < 0.7 * (imitation.dev_losses[0] - entropy)
    gold, dev_gold = gold_teacher(train.rows), gold_teacher(dev.rows)
    found, training = train_small_lm(lambda: SmallLM(head, 1), train, gold, dev_gold, dev, SETTINGS)
    log_p = target_log_probs([found], dev, head)
    assert -log_p["own"].mean() < 0.6 * -log_p["plm"].mean()  # the rule is simple, and the PLM is random
    assert training.epoch == 1 + training.dev_losses.index(min(training.dev_losses))
    assert small_lm.dev_loss(found, dev, dev_gold, 200) == pytest.approx(min(training.dev_losses), rel=1e-5)


def test_one_seed_gives_one_model_and_the_best_rate_is_kept(memory_of, head):
    train, dev = memory_of(pairs(30)), memory_of(pairs(6, seed=1))
    teachers = gold_teacher(train.rows), gold_teacher(dev.rows)
    settings = SETTINGS.model_copy(update={"learning_rates": (1e-6, 3e-3), "epochs": 3})
    runs = [train_small_lm(lambda: SmallLM(head, 1), train, *teachers, dev, settings)[1] for _ in range(2)]
    assert runs[0].dev_losses == runs[1].dev_losses and runs[0].learning_rate == 3e-3


# ── in decoding ─────────────────────────────────────────────────────────────


def test_proxy_tuning_without_a_difference_is_the_plm():
    draw = torch.Generator().manual_seed(0)
    plm, expert, other = (torch.randn(3, 50, generator=draw).log_softmax(-1) for _ in range(3))
    torch.testing.assert_close(shift(plm, expert, other, 0.0), plm)
    torch.testing.assert_close(shift(plm, expert, expert, 1.5), plm)
    product = plm.exp() * (expert.exp() / other.exp()).sqrt()
    torch.testing.assert_close(shift(plm, expert, other, 0.5).exp(), product / product.sum(-1, keepdim=True))


@torch.inference_mode()
def greedy(model: SmallLM, prompt: list[int], count: int) -> list[int]:
    ids = list(prompt)
    while len(ids) < len(prompt) + count and ids[-1] != EOS:
        ids.append(int(model.log_probs(model(torch.tensor([ids]))[:, -1]).argmax()))
    return ids[len(prompt) :]


async def decoded(tiny_client, plm_tokenizer, head, predictor, prompts, **sampling) -> list[list[int]]:
    decoder = Decoder(tiny_client("llama"), head, plm_tokenizer, [EOS], 16)
    decoder.predictors = {"small": predictor}
    requests = [
        GenerationRequest(
            prompt, max_new_tokens=8, adapter="small", schedule=UnrollingSchedule(1.0, "constant"),
            sampling=SamplingParams(**sampling), explain=True, stream=n,
        )
        for n, prompt in enumerate(prompts)
    ]  # fmt: skip
    try:
        return [[token.id for token in answer.tokens] for answer in await decoder.generate(requests)]
    finally:
        await decoder.stop()


async def test_the_decoder_answers_as_the_model_alone(tiny_client, plm_tokenizer, head, tmp_path):
    models = model_of(head, 1), model_of(head, 2)
    for name, model in zip(("expert", "anti_expert"), models, strict=True):
        model.save(tmp_path / name)
    prompts = [pair.prompt for pair in pairs(5)]
    predictor = SmallLMSpec(tmp_path).load(None, head)
    found = await decoded(tiny_client, plm_tokenizer, head, predictor, prompts)
    assert found == [greedy(models[0], prompt, 8) for prompt in prompts]
    beams = await decoded(tiny_client, plm_tokenizer, head, predictor, prompts, kind="beam", beams=2)
    assert beams == await decoded(
        tiny_client, plm_tokenizer, head, SmallLMPredictor(head, models[:1], None), prompts, kind="beam", beams=2
    )
    tuned = await decoded(tiny_client, plm_tokenizer, head, SmallLMSpec(tmp_path, 0.0).load(None, head), prompts)
    plain = await decoded(tiny_client, plm_tokenizer, head, SmallLMPredictor(head, [models[0]] * 2, 1.0), prompts)
    assert tuned == plain  # both are the PLM alone


def test_a_folder_without_a_model_is_named(head, tmp_path):
    with pytest.raises(UserError, match="holds no small language model"):
        SmallLM.load(tmp_path, head)
