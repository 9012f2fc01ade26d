"""The encoder: any BERT-family backbone, gradients, memories, transformers' interfaces."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from transformers import AutoConfig, AutoModelForMaskedLM, Trainer, TrainingArguments, pipeline

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM, StaleKeys
from pema_ray.pluglm.model.heads import PlugLMForSequenceClassification
from pema_ray.pluglm.model.knowledge import Knowledge, document_codes
from pema_ray.pluglm.model.loading import load_pluglm
from tests.pluglm.conftest import BACKBONE

TEXTS = ["w1 [MASK] w3", "w4 w5 w6 w7", "w8"]


@pytest.fixture
def knowledge(tmp_path, facts, encoder) -> Knowledge:
    return KnowledgeMemory.build(tmp_path / "memory", facts, encoder).load()


def batch(tokenizer, texts=TEXTS) -> dict[str, torch.Tensor]:
    return dict(tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False))


# ── around a checkpoint ─────────────────────────────────────────────────────


@pytest.mark.parametrize("family", ["bert", "roberta", "electra"])
def test_without_memory_and_at_full_width_it_is_the_checkpoint_itself(family: str, tmp_path, words_tokenizer) -> None:
    sizes: dict[str, Any] = {**BACKBONE, "embedding_size": 16} if family == "electra" else BACKBONE
    torch.manual_seed(0)
    checkpoint = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **sizes, initializer_range=0.3)).eval()
    checkpoint.save_pretrained(tmp_path)
    model = PlugLMForMaskedLM.from_backbone(
        str(tmp_path), memory_layers=2, memory_feed_forward=BACKBONE["intermediate_size"], query_size=8, top_k=2,
        max_document_tokens=16,
    ).eval()  # fmt: skip
    model.attach(None)
    inputs = batch(words_tokenizer)
    with torch.no_grad():
        expected, logits = checkpoint(**inputs).logits, model(**inputs).logits
    mask = inputs["attention_mask"].bool()
    assert torch.allclose(logits[mask], expected[mask], atol=1e-5)


def test_other_models_are_refused_by_name(tmp_path) -> None:
    transformers.GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=9).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"'gpt2' is not of the BERT family; use bert, roberta"):
        PlugLMForMaskedLM.from_backbone(str(tmp_path))
    with pytest.raises(UserError, match=r"nowhere: no checkpoint that transformers can read"):
        PlugLMForMaskedLM.from_backbone(str(tmp_path / "nowhere"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"memory_layers": 4}, "memory_layers=4: the backbone has 3 layers"),
        ({"knowledge_attention": "multi_heads"}, "Did you mean 'multi_head'"),
        ({"retrieval": "euclid"}, "use inner_product or cosine"),
        ({"top_k": 0}, "top_k=0: at least 1"),
        ({"max_document_tokens": 99}, "the backbone has 48 positions"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, message) -> None:
    with pytest.raises(UserError, match=message):
        PlugLMConfig(backbone={"model_type": "bert", **BACKBONE}, **{"max_document_tokens": 16, **settings})


@pytest.mark.parametrize(("classifier_dropout", "expected"), [(None, 0.3), (0.0, 0.0), (0.2, 0.2)])
def test_a_classifiers_dropout_is_the_backbones(classifier_dropout, expected) -> None:
    backbone = {"model_type": "bert", **BACKBONE, "hidden_dropout_prob": 0.3, "classifier_dropout": classifier_dropout}
    config = PlugLMConfig(backbone=backbone, max_document_tokens=16)
    assert PlugLMForSequenceClassification(config).dropout.p == expected


# ── the layers ──────────────────────────────────────────────────────────────


@pytest.mark.parametrize("feed_forward", [0, 24])
@pytest.mark.parametrize("kind", ["multi_head", "sentence_level"])
def test_every_kind_reads_the_memory(make_model, words_tokenizer, tmp_path, facts, kind, feed_forward) -> None:
    model = make_model(knowledge_attention=kind, memory_feed_forward=feed_forward, memory_layers=2)
    encoder = DocumentEncoder(model, words_tokenizer)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder, dtype="float32")
    model.attach(memory.load(model.fingerprint()))
    inputs = batch(words_tokenizer)
    with torch.no_grad():
        output = model(**inputs, output_retrieved=True)
        model.attach(None)
        without = model(**inputs, output_retrieved=True)
    assert without.retrieved is None
    assert not torch.allclose(output.logits, without.logits, atol=1e-3)
    assert len(output.retrieved) == 2
    for layer in output.retrieved:
        assert layer.entry_BK.shape == (3, 3)
        assert torch.allclose(layer.weight_BK.sum(1), torch.ones(3), atol=1e-5)
        assert (layer.score_BK.diff(dim=1) <= 0).all()
    assert sum("feed_forward" in name for name, _ in model.named_parameters()) == (8 if feed_forward else 0)


def test_padding_changes_nothing(model, knowledge, words_tokenizer) -> None:
    model.attach(knowledge)
    with torch.no_grad():
        together = model(**batch(words_tokenizer)).logits
        alone = [model(**batch(words_tokenizer, [text])).logits[0] for text in TEXTS]
    for logits, expected in zip(together, alone):
        assert torch.allclose(logits[: len(expected)], expected, atol=1e-5)


def test_a_sequence_changes_no_other_sequence(model, knowledge, words_tokenizer) -> None:
    model.attach(knowledge)
    with torch.no_grad():
        one, two = (model(**batch(words_tokenizer, ["w1 w2 w3", other])).logits for other in ("w4 w5 w6", "w7 w8 w9"))
    assert torch.allclose(one[0], two[0], atol=1e-6)
    assert not torch.allclose(one[1], two[1], atol=1e-3)


@pytest.mark.parametrize("kind", ["multi_head", "sentence_level"])
def test_gradients_reach_projections_poolers_and_embeddings(make_model, words_tokenizer, tmp_path, facts, kind) -> None:
    model = make_model(value_pooler=True, knowledge_attention=kind)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer))
    model.train()
    model.attach(memory.load())
    inputs = batch(words_tokenizer)
    # Only the memory connects `w33` (in entry 11 alone) with the loss.
    output = model(**inputs, labels=inputs["input_ids"], output_retrieved=True)
    output.loss.backward()
    encoder = model.model.knowledge_encoder
    for part in (encoder.key, encoder.value, encoder.pooler.hidden, encoder.value_pooler.hidden):
        assert part.weight.grad.abs().max() > 0
    layer = model.model.backbone.encoder.layer[-1]
    for part in (layer.query, layer.pooler.hidden):
        assert part.weight.grad.abs().max() > 0
    word = model.model.backbone.embeddings.word_embeddings.weight.grad
    retrieved = set(output.retrieved[0].entry_BK.flatten().tolist())
    tokens = {token for entry in memory.entries(sorted(retrieved)) for token in entry.token_ids}
    only_in_memory = tokens - set(inputs["input_ids"].flatten().tolist())
    assert only_in_memory
    decoder = torch.autograd.grad(  # the tied decoder alone gives every word a gradient
        torch.nn.functional.cross_entropy(
            model.head(model.model(**inputs).last_hidden_state.detach()).flatten(0, 1), inputs["input_ids"].flatten()
        ),
        model.head.decoder.weight,
    )[0]
    for token in only_in_memory:
        assert not torch.allclose(word[token], decoder[token], atol=1e-7)


def test_fixed_keys_and_values_are_taken_as_stored(make_model, words_tokenizer, tmp_path, facts) -> None:
    model = make_model(fix_keys=True, fix_values=True)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer))
    model.train()
    model.attach(memory.load())
    inputs = batch(words_tokenizer)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert all(parameter.grad is None for parameter in model.model.knowledge_encoder.parameters())
    assert model.model.backbone.encoder.layer[-1].knowledge.value.weight.grad.abs().max() > 0


def test_one_sequence_alone_can_be_trained_on(model, knowledge, words_tokenizer) -> None:
    model.train()
    model.attach(knowledge)
    inputs = batch(words_tokenizer, ["w1 w2"])
    assert model(**inputs, labels=inputs["input_ids"]).loss.isfinite()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("training", [True, False])
def test_memories_in_half_precision_make_no_nan(
    model, encoder, words_tokenizer, tmp_path, facts, dtype, training
) -> None:
    exact = KnowledgeMemory.build(tmp_path / "exact", facts, encoder, dtype="float32")
    half = KnowledgeMemory.build(tmp_path / "half", facts, encoder, dtype=dtype)
    inputs = batch(words_tokenizer)
    model.attach(exact.load(model.fingerprint()))
    expected = model(**inputs).logits
    model.train(training)
    model.config.fix_keys = model.config.fix_values = True
    model.attach(half.load(model.fingerprint()))
    output = model(**inputs, labels=inputs["input_ids"])
    output.loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert output.logits.isfinite().all()
    if not training:
        assert torch.allclose(output.logits, expected, atol=0.05 if dtype == "float16" else 0.5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_in_half_precision_reads_a_float32_memory(make_model, words_tokenizer, tmp_path, facts, dtype) -> None:
    model = make_model()
    with torch.no_grad():
        for parameter in model.parameters():  # as a model that was saved in 16 bits: nothing is lost on the way there
            parameter.copy_(parameter.bfloat16().float())
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer), dtype="float32")
    model = model.to(dtype)
    model.attach(memory.load(model.fingerprint()), allow_stale=dtype == torch.float16)
    assert model(**batch(words_tokenizer)).logits.isfinite().all()


# ── what may be retrieved ───────────────────────────────────────────────────


def test_a_sequence_does_not_retrieve_its_own_document(make_model, words_tokenizer, tmp_path, facts) -> None:
    model = make_model(exclude_own=True)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer))
    model.attach(memory.load())
    inputs = batch(words_tokenizer, [facts[4].text, facts[5].text, facts[4].text])
    own = torch.from_numpy(document_codes([facts[4].document_id, facts[5].document_id, ""]))
    free = model(**inputs, output_retrieved=True).retrieved[0].entry_BK
    bound = model(**inputs, own_document=own, output_retrieved=True).retrieved[0].entry_BK
    assert not {4, 5} & set(bound[:2].flatten().tolist())
    assert bound[2].tolist() == free[2].tolist()


def test_a_memory_without_enough_entries_is_refused(model, encoder, words_tokenizer, tmp_path, facts) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts[:2], encoder)
    with pytest.raises(UserError, match=r"memory version 1: 2 entries, but the model retrieves top_k=3"):
        model.attach(memory.load())
    with pytest.raises(UserError, match=r"2 entries, but the model retrieves top_k=3"):
        memory.load().search(torch.ones(1, 8), 3)


def test_an_empty_memory_is_refused(model, encoder, tmp_path, facts) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts[:2], encoder).delete([0, 1])
    assert len(memory) == 0
    with pytest.raises(UserError, match=r"memory version 2: the memory is empty"):
        model.attach(memory.load())


def test_too_few_entries_beside_a_sequences_own_are_refused(make_model, words_tokenizer, tmp_path, facts) -> None:
    model = make_model(exclude_own=True)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts[:4], DocumentEncoder(model, words_tokenizer))
    model.attach(memory.load())
    own = torch.from_numpy(document_codes([facts[0].document_id]))
    with pytest.raises(UserError, match=r"may retrieve only 2 entries when its own document's are left out"):
        model(**batch(words_tokenizer, ["w1"]), own_document=own)


def test_a_model_that_was_told_of_no_memory_says_so(model, words_tokenizer) -> None:
    with pytest.raises(UserError, match="has no memory yet"):
        model(**batch(words_tokenizer))


def test_stale_keys_are_refused_with_both_names(make_model, words_tokenizer, tmp_path, facts) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer, "first"))
    message = rf"made by encoder 'first \({model.fingerprint()}\)'.*reads those of encoder '{other.fingerprint()}'"
    with pytest.raises(StaleKeys, match=message):
        memory.load(other.fingerprint())
    with pytest.raises(StaleKeys):
        other.attach(memory.load())
    other.attach(memory.load(), allow_stale=True)
    with pytest.raises(StaleKeys, match=f"second .{other.fingerprint()}"):
        memory.add([NewEntry("w1")], DocumentEncoder(other, words_tokenizer, "second"))


@pytest.mark.parametrize("training", [False, True])
def test_encoding_leaves_the_model_in_its_mode_and_never_drops_anything(make_model, words_tokenizer, training) -> None:
    model = make_model(backbone={"hidden_dropout_prob": 0.5}).train(training)
    encoder = DocumentEncoder(model, words_tokenizer)
    documents = encoder.tokenize(["w1 w2", "w3"])
    one, two = encoder.encode(documents), encoder.encode(documents)
    assert torch.equal(one.key_MQ, two.key_MQ)
    assert {module.training for module in model.modules()} == {training}


def test_a_training_step_makes_keys_stale(model, knowledge, words_tokenizer) -> None:
    model.attach(knowledge)
    model.train()
    inputs = batch(words_tokenizer)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    with pytest.raises(StaleKeys):
        model.attach(knowledge)


def test_a_model_that_left_its_encoder_reads_but_does_not_write(make_model, words_tokenizer, tmp_path, facts) -> None:
    model, other = make_model(seed=0), make_model(seed=1)
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, DocumentEncoder(model, words_tokenizer))
    other.config.memory_fingerprint = model.fingerprint()
    other.attach(memory.load(other.fingerprint()))
    with pytest.raises(UserError, match="has moved away from it"):
        DocumentEncoder(other, words_tokenizer)


def test_other_sizes_are_refused(make_model, knowledge) -> None:
    with pytest.raises(UserError, match=r"keys and values of \(8, 32\) numbers, but this model reads \(4, 32\)"):
        make_model(query_size=4).attach(knowledge, allow_stale=True)


def test_a_pass_goes_on_with_the_version_it_began_with(model, encoder, words_tokenizer, tmp_path, facts) -> None:
    memory = KnowledgeMemory.build(tmp_path / "memory", facts, encoder)
    old, new = memory.load(), memory.delete([0]).load()
    model.attach(old)
    inputs = batch(words_tokenizer)
    layer = model.model.backbone.encoder.layer[0]
    hook = layer.register_forward_hook(lambda *_: model.attach(new))
    during_attach = model(**inputs, output_retrieved=True).retrieved[0].entry_BK
    hook.remove()
    assert model.knowledge is new
    model.attach(old)
    assert torch.equal(during_attach, model(**inputs, output_retrieved=True).retrieved[0].entry_BK)


# ── transformers ────────────────────────────────────────────────────────────


def test_saved_and_loaded_it_is_the_same_model(model, knowledge, words_tokenizer, tmp_path) -> None:
    torch.nn.init.normal_(model.model.backbone.encoder.layer[-1].knowledge.beta)
    model.attach(knowledge)
    inputs = batch(words_tokenizer)
    expected = model(**inputs).logits
    model.save_pretrained(tmp_path / "model")
    words_tokenizer.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").exists()
    for loaded in (load_pluglm(tmp_path / "model")[0], AutoModelForMaskedLM.from_pretrained(tmp_path / "model")):
        assert loaded.fingerprint() == model.fingerprint()
        loaded.eval().attach(knowledge)
        assert torch.equal(loaded(**inputs).logits, expected)
    half = AutoModelForMaskedLM.from_pretrained(tmp_path / "model", dtype=torch.bfloat16)
    assert half.fingerprint() == model.fingerprint()


def test_a_folder_without_a_model_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match="no PlugLM model here"):
        load_pluglm(tmp_path)
    AutoConfig.for_model("bert", **BACKBONE).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="a 'bert' model, no PlugLM"):
        load_pluglm(tmp_path)


def test_fill_mask_pipelines_run_it(model, knowledge, words_tokenizer) -> None:
    model.attach(knowledge)
    output = pipeline("fill-mask", model=model, tokenizer=words_tokenizer)("w1 [MASK] w3", top_k=2)
    inputs = batch(words_tokenizer, ["w1 [MASK] w3"])
    with torch.no_grad():
        assert output[0]["token"] == int(model(**inputs).logits[0, 2].argmax())


def test_the_transformers_trainer_trains_it(model, knowledge, words_tokenizer, tmp_path) -> None:
    model.attach(knowledge)
    rows = [{"input_ids": ids, "labels": ids} for ids in words_tokenizer(["w1 w2 w3", "w4 w5 w6"])["input_ids"] * 8]
    arguments = TrainingArguments(
        str(tmp_path), per_device_train_batch_size=4, max_steps=6, learning_rate=1e-2, report_to=[], logging_steps=1,
        use_cpu=True, save_strategy="no", disable_tqdm=True,
    )  # fmt: skip
    trainer = Trainer(model, arguments, train_dataset=rows)  # pyright: ignore[reportArgumentType]
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0]
    assert trainer.evaluate(rows)["eval_loss"] > 0  # pyright: ignore[reportArgumentType]


def test_resized_embeddings_stay_tied(model) -> None:
    model.resize_token_embeddings(150)
    assert model.config.vocab_size == model.head.decoder.out_features == 150
    assert model.head.decoder.weight is model.get_input_embeddings().weight
