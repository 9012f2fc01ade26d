"""`pema-ray pluglm demo-text`: a small PlugLM learns two domains of real text; what is each domain's memory worth?

Held-out texts of each domain are predicted with its own domain's memory, the other's, both, none, and its own with
the values dealt out anew among the keys. Differences come with a paired bootstrap over texts, and are told whichever
way they fall.

Shapes: B sequences, T positions, S sequences of a domain, D texts.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.nn.functional as F
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings, TextConfig
from pema_ray.pluglm.demonstration.corpora import FOLDOC, Domain, read_domain
from pema_ray.pluglm.learning.masking import IGNORED, Masker, collate
from pema_ray.pluglm.learning.pretraining import Pretrainer
from pema_ray.pluglm.learning.text import Sequences
from pema_ray.pluglm.memory.chunking import Cutter
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.config import PlugLMConfig
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.knowledge import Knowledge, document_codes
from pema_ray.pluglm.stages.pretrain import local_access, save_model
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.history import OnPoint

_SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_FIGURES = "demo-text.json"
_PREDICTED = 64  # sequences predicted together
OWN, OTHER, BOTH, NONE, SHUFFLED = "its own", "the other domain's", "both", "none", "its own, shuffled"
MEMORIES = (OWN, OTHER, BOTH, NONE, SHUFFLED)
"""`none`: no memory is attached, and knowledge attention adds nothing. `shuffled`: values dealt out anew among keys."""


class DomainsSettings(Section):
    """Sizes that train in minutes on one core, with the departures from the paper of `configs/pluglm/small.yaml`."""

    target: str = FOLDOC
    """`corpora.read_domain`"""
    other: str = "kjv"
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of each domain's texts."""
    vocabulary: int = Field(default=8192, ge=32)
    """Pieces of words, learned from the texts that are not held out."""
    layers: int = Field(default=4, ge=1)
    """The last one is a memory layer."""
    hidden_size: int = Field(default=128, ge=4)
    heads: int = Field(default=4, ge=1)
    query_size: int = Field(default=64, ge=1)
    memory_feed_forward: int = Field(default=128, ge=0)
    top_k: int = Field(default=5, ge=1)
    max_tokens: int = Field(default=64, ge=8)
    """Of sequences and of entries."""
    value_pooler: bool = True
    steps: int = Field(default=1800, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    contrastive_steps: int = Field(default=600, ge=0)
    refresh_every: int = Field(default=300, ge=1)
    sequences: int = Field(default=1500, ge=1)
    """At most so many held-out ones of each domain are predicted."""
    resamples: int = Field(default=2000, ge=100)
    """Of the bootstrap."""


class MemoryFigures(Section):
    """One memory's worth to one domain."""

    memory: str
    loss: float
    """Nats per masked token."""
    difference: float
    """From the loss with the domain's own memory; above zero: this one is worse."""
    low: float
    high: float
    """95 % interval of the difference: percentiles of a paired bootstrap over texts."""


class DomainFigures(Section):
    """One domain's held-out texts."""

    domain: str
    texts: int
    sequences: int
    masked: int
    by_frequency: float
    """Loss of a guess that knows only how often each token stands in the domain's learned texts."""
    memories: tuple[MemoryFigures, ...]
    own_share: float
    """Of the entries retrieved when both domains were in the memory: those of this domain."""
    own_entries: float
    """This domain's share of all entries: what retrieval by chance would give."""


class DomainsDemo(Section):
    """What was trained, and what came of it."""

    seed: int
    settings: DomainsSettings
    learned: dict[str, int]
    """Texts of each domain that were learned from, and are in the memory."""
    domains: tuple[DomainFigures, ...]
    """The target domain first."""
    parameters: int
    recall: float
    """At the end of the warm-up: share of training sequences whose own entry came first of the batch's."""
    training_seconds: float
    seconds: float


def run_domains(
    folder: Path, seed: int = 0, settings: DomainsSettings | None = None, on_point: OnPoint = lambda kind, point: None
) -> DomainsDemo:
    """Train and measure in `folder`, which is left with model, memory and `demo-text.json`.

    Raises:
        UserError: a domain cannot be read, or both have one name.
    """
    c, began = settings or DomainsSettings(), time.perf_counter()
    domains = [read_domain(name, c.held_out, seed) for name in (c.target, c.other)]
    if domains[0].name == domains[1].name:
        raise UserError(
            f"{c.target} and {c.other}: both domains would be called '{domains[0].name}', and their entries could not "
            "be told apart. Give the files names that differ before the first dot."
        )
    tokenizer = learn_tokenizer([text for one in domains for text in one.learned], c.vocabulary)
    learned, entries = _sequences(domains, "learned", tokenizer, c.max_tokens)
    model = _new_model(c, tokenizer, seed)
    for name in ("memory", "model"):  # of the demonstration before
        shutil.rmtree(folder / name, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name in (CHECKPOINT, _FIGURES):
        (folder / name).unlink(missing_ok=True)
    encoder = DocumentEncoder(model, tokenizer, "domains")
    memory = KnowledgeMemory.build(folder / "memory", entries, encoder, "float16")
    recalls: list[float] = []

    def show(kind: str, point: Mapping[str, Any]) -> None:
        if "recall" in point:
            recalls.append(point["recall"])
        on_point(kind, point)

    training = time.perf_counter()
    train = PretrainSettings(
        steps=c.steps, batch_size=c.batch_size, max_tokens=c.max_tokens, learning_rate=c.learning_rate, clip=1.0,
        warm_up_steps=max(1, c.steps // 20), schedule="cosine", refresh_every=c.refresh_every,
        contrastive_steps=c.contrastive_steps, checkpoint_every=c.steps,
    )  # fmt: skip
    trainer = Pretrainer(
        model, tokenizer, train, learned, None, local_access(memory), folder, seed, on_point=show, name="domains"
    )
    trainer.run()
    memory = KnowledgeMemory.open(folder / "memory", trainer.version)
    trained = time.perf_counter()
    save_model(model, tokenizer, folder / "model")
    figures = tuple(_figures(model.eval(), tokenizer, memory, one, c, seed) for one in domains)
    demo = DomainsDemo(
        seed=seed, settings=c, learned={one.name: len(one.learned) for one in domains}, domains=figures,
        parameters=sum(p.numel() for p in model.parameters()),
        recall=float(np.mean(recalls[-50:])) if recalls else float("nan"),
        training_seconds=round(trained - training, 1), seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    with atomic_file(folder / _FIGURES) as temporary:
        temporary.write_text(demo.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return demo


def learn_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """BERT's kind of tokenizer, learned from texts: lower case, pieces of words."""
    raw: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(_SPECIAL), show_progress=False)
    )
    cls, sep = (raw.token_to_id(name) for name in ("[CLS]", "[SEP]"))
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), _SPECIAL))
    return PreTrainedTokenizerFast(tokenizer_object=raw, **names)


# ── what is learned ─────────────────────────────────────────────────────────


def _sequences(domains: Sequence[Domain], part: str, tokenizer: Any, most: int) -> tuple[Sequences, list[NewEntry]]:
    """Texts cut into sequences, and the same pieces as entries; a text is a document."""
    rows = [
        {"text": text, "document": f"{one.name} {part} {number}", "source": one.name}
        for one in domains
        for number, text in enumerate(getattr(one, part))
    ]
    columns = TextConfig(document_column="document", source_column="source")
    cut = Cutter(columns, tokenizer, most)(pa.Table.from_pylist(rows)).to_pydict()
    lengths = [len(one) for one in cut["token_ids"]]
    token = np.concatenate([np.array(one, np.int32) for one in cut["token_ids"]])
    sequences = Sequences(
        [token], [np.cumsum(lengths)], [document_codes(cut["document_id"])], np.array([0, len(lengths)])
    )
    entries = [NewEntry(*one) for one in zip(cut["text"], cut["source"], cut["document_id"])]
    return sequences, entries


def _new_model(c: DomainsSettings, tokenizer: Any, seed: int) -> PlugLMForMaskedLM:
    backbone = {
        "model_type": "bert", "vocab_size": len(tokenizer), "hidden_size": c.hidden_size,
        "intermediate_size": 4 * c.hidden_size, "num_hidden_layers": c.layers, "num_attention_heads": c.heads,
        "max_position_embeddings": c.max_tokens, "type_vocab_size": 2, "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(seed)
    return PlugLMForMaskedLM(
        PlugLMConfig(
            backbone=backbone, memory_feed_forward=c.memory_feed_forward, query_size=c.query_size, top_k=c.top_k,
            max_document_tokens=c.max_tokens, value_pooler=c.value_pooler, exclude_own=True,
        )
    )  # fmt: skip


# ── what is measured ────────────────────────────────────────────────────────


def _figures(
    model: PlugLMForMaskedLM, tokenizer: Any, memory: KnowledgeMemory, domain: Domain, c: DomainsSettings, seed: int
) -> DomainFigures:
    """A domain's held-out sequences, predicted with every memory from the same masks."""
    sequences, entries = _sequences([domain], "held_out", tokenizer, c.max_tokens)
    count = min(len(sequences), c.sequences)
    random = np.random.default_rng([seed, 1])
    chosen = np.sort(random.choice(len(sequences), count, replace=False)).tolist()
    masker = Masker.of(tokenizer, 0.15, seed, dynamic=False)
    rows = [masker.mask(sequences[number][0], number, 0) for number in chosen]
    table = memory.table(["source", "token_ids"]).to_pydict()
    own = [number for number, source in enumerate(table["source"]) if source == domain.name]
    own_ids = {table["entry_id"][number] for number in own}
    count_V = np.ones(len(tokenizer))  # one more of each, so that nothing is impossible
    for number in own:
        np.add.at(count_V, table["token_ids"][number], 1)
    count_V[list(tokenizer.all_special_ids)] = 0
    losses: dict[str, np.ndarray] = {}
    found: list[int] = []
    for name in MEMORIES:
        knowledge = _knowledge(memory, domain.name, name, random)
        model.attach(knowledge)
        losses[name] = _losses(model, rows, tokenizer.pad_token_id, found if name == BOTH else None)
    masked_S = np.array([(labels != IGNORED).sum() for _, labels in rows])
    label_M = np.concatenate([labels[labels != IGNORED] for _, labels in rows])
    text_S = np.unique([entries[number].document_id for number in chosen], return_inverse=True)[1]
    return DomainFigures(
        domain=domain.name, texts=int(text_S.max()) + 1, sequences=count, masked=int(masked_S.sum()),
        by_frequency=float(np.log(count_V.sum()) - np.log(count_V[label_M]).mean()),
        memories=tuple(
            compared(name, losses[name], losses[OWN], masked_S, text_S, c.resamples, seed) for name in MEMORIES
        ),
        own_share=float(np.mean([one in own_ids for one in found])), own_entries=len(own_ids) / len(memory),
    )  # fmt: skip


def _knowledge(memory: KnowledgeMemory, domain: str, which: str, random: np.random.Generator) -> Knowledge | None:
    if which == NONE:
        return None
    if which == BOTH:
        return memory.load()
    sources = {one for one in memory.table(["source"])["source"].to_pylist() if (one == domain) == (which != OTHER)}
    held = memory.load(sources=sorted(sources))
    if which == SHUFFLED:
        return replace(held, value_ND=held.value_ND[torch.from_numpy(random.permutation(len(held)))])
    return held


@torch.no_grad()
def _losses(
    model: PlugLMForMaskedLM, rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, found: list[int] | None
) -> np.ndarray:
    """Summed cross entropy of each sequence's masked tokens `[S]`; `found` takes the entries that were retrieved."""
    sums = []
    for start in range(0, len(rows), _PREDICTED):
        part = rows[start : start + _PREDICTED]
        batch = collate(part, [0] * len(part), pad_id)
        output = model.model(batch.input_BT, batch.mask_BT, output_retrieved=found is not None)
        predicted_BT = batch.label_BT != IGNORED
        logits = model.head(output.last_hidden_state[predicted_BT])
        entropy = F.cross_entropy(logits.double(), batch.label_BT[predicted_BT], reduction="none")
        sums.append(torch.zeros(len(part), dtype=torch.float64).index_add_(0, predicted_BT.nonzero()[:, 0], entropy))
        if found is not None:
            found += output.retrieved[-1].entry_BK.flatten().tolist()
    return torch.cat(sums).numpy()


def compared(
    name: str, sum_S: np.ndarray, own_S: np.ndarray, masked_S: np.ndarray, text_S: np.ndarray, resamples: int, seed: int
) -> MemoryFigures:
    """A memory beside the domain's own: mean losses, and a paired bootstrap of their difference.

    Texts are drawn with replacement, all sequences of one together: sequences of one text are alike.

    Args:
        sum_S, own_S: summed losses of the sequences with this memory and with the domain's own.
        masked_S: tokens that they are sums over.
        text_S: which text each is of, from 0.
    """
    gain_D = np.bincount(text_S, sum_S - own_S)
    masked_D = np.bincount(text_S, masked_S)
    random = np.random.default_rng([seed, 2])  # the same texts for every memory
    drawn = random.integers(0, len(gain_D), (resamples, len(gain_D)))
    low, high = np.percentile(gain_D[drawn].sum(1) / masked_D[drawn].sum(1), [2.5, 97.5])
    total = masked_S.sum()
    return MemoryFigures(
        memory=name, loss=float(sum_S.sum() / total), difference=float((sum_S - own_S).sum() / total),
        low=float(low), high=float(high),
    )  # fmt: skip


def table_rows(demo: DomainsDemo) -> list[tuple[str, ...]]:
    """(memory, loss and difference for each domain), as the command prints it."""
    rows = []
    for number, name in enumerate(MEMORIES):
        cells: list[str] = []
        for domain in demo.domains:
            one = domain.memories[number]
            told = "" if name == OWN else f"{one.difference:+.4f} [{one.low:+.4f}, {one.high:+.4f}]"
            cells += [f"{one.loss:.4f}", told]
        rows.append((name, *cells))
    return rows
