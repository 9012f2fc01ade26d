"""`pema-ray pluglm demo-text`: a small PlugLM learns two domains of real text; does each domain's memory help?

Held-out texts of each domain are predicted with its own domain's memory, the other's, both, none, and its own with
values shuffled among the keys. All differences are reported, with a paired bootstrap over texts.

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
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from pema_ray.errors import UserError
from pema_ray.pluglm.config import PretrainSettings, TextConfig
from pema_ray.pluglm.demonstration.corpora import FOLDOC, Domain, read_domain
from pema_ray.pluglm.demonstration.facts import SPECIAL, with_special_tokens
from pema_ray.pluglm.demonstration.learning import small_bert
from pema_ray.pluglm.learning.masking import IGNORED, Masker, collate
from pema_ray.pluglm.learning.pretraining import Pretrainer
from pema_ray.pluglm.learning.text import Sequences
from pema_ray.pluglm.memory.chunking import chunk
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.encoder import PlugLMForMaskedLM
from pema_ray.pluglm.model.knowledge import Knowledge, document_codes
from pema_ray.pluglm.stages.pretrain import local_access, save_model
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section
from pema_ray.training.checkpoint import CHECKPOINT
from pema_ray.training.history import OnPoint

_FIGURES = "demo-text.json"
_PREDICTION_BATCH = 64
OWN, OTHER, BOTH, NONE, SHUFFLED = "its own", "the other domain's", "both", "none", "its own, shuffled"
MEMORIES = (OWN, OTHER, BOTH, NONE, SHUFFLED)
"""`none`: no memory is attached, and knowledge attention adds nothing. `shuffled`: values shuffled among the keys."""


class DomainsSettings(Section):
    """Sizes that train in minutes on one core, with the departures from the paper of `configs/pluglm/small.yaml`."""

    target: str = FOLDOC
    """`corpora.read_domain`"""
    other: str = "kjv"
    held_out: float = Field(default=0.1, gt=0, lt=1)
    """Share of each domain's texts."""
    vocabulary: int = Field(default=8192, ge=32)
    """Word pieces, learned from the texts that are not held out."""
    layers: int = Field(default=4, ge=1)
    """The last one is a memory layer."""
    hidden_size: int = Field(default=128, ge=4)
    heads: int = Field(default=4, ge=1)
    query_size: int = Field(default=64, ge=1)
    memory_feed_forward: int = Field(default=128, ge=0)
    top_k: int = Field(default=5, ge=1)
    max_tokens: int = Field(default=64, ge=8)
    """Longest sequence and entry."""
    value_pooler: bool = True
    steps: int = Field(default=1800, ge=1)
    batch_size: int = Field(default=32, ge=1)
    learning_rate: float = Field(default=1e-3, gt=0)
    contrastive_steps: int = Field(default=600, ge=0)
    refresh_every: int = Field(default=300, ge=1)
    sequences: int = Field(default=1500, ge=1)
    """Largest number of held-out sequences of each domain."""
    resamples: int = Field(default=2000, ge=100)
    """Resamples of the bootstrap."""


class MemoryFigures(Section):
    """The effect of one memory on one domain."""

    memory: str
    loss: float
    """Nats per masked token."""
    difference: float
    """Difference from the loss with the domain's own memory; above zero: this one is worse."""
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
    """Loss of a unigram model of the domain's training texts."""
    memories: tuple[MemoryFigures, ...]
    own_share: float
    """This domain's share of the entries retrieved from the memory of both domains."""
    own_entries: float
    """This domain's share of all entries: the share of random retrieval."""


class DomainsDemo(Section):
    """The training and its figures."""

    seed: int
    settings: DomainsSettings
    learned: dict[str, int]
    """Number of each domain's training texts, which are also in the memory."""
    domains: tuple[DomainFigures, ...]
    """The target domain first."""
    parameters: int
    recall: float
    """At the end of the warm-up: share of training sequences whose own entry ranks first in the batch."""
    training_seconds: float
    seconds: float


def run_domains(
    folder: Path, seed: int = 0, settings: DomainsSettings | None = None, on_point: OnPoint = lambda kind, point: None
) -> DomainsDemo:
    """Train and measure; writes model, memory and `demo-text.json` to `folder`.

    Raises:
        UserError: a domain cannot be read, or both have the same name.
    """
    c, began = settings or DomainsSettings(), time.perf_counter()
    domains = [read_domain(name, c.held_out, seed) for name in (c.target, c.other)]
    if domains[0].name == domains[1].name:
        raise UserError(
            f"{c.target} and {c.other}: both domains would be called '{domains[0].name}', and their entries could not "
            "be told apart. Give the files names that differ before the first dot."
        )
    tokenizer = learn_tokenizer([text for domain in domains for text in domain.learned], c.vocabulary)
    learned, entries = _sequences(domains, "learned", tokenizer, c.max_tokens)
    model = small_bert(c, seed, len(tokenizer), c.max_tokens, exclude_own=True)
    for name in ("memory", "model"):  # of an earlier demonstration
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
    figures = tuple(_figures(model.eval(), tokenizer, memory, domain, c, seed) for domain in domains)
    demo = DomainsDemo(
        seed=seed, settings=c, learned={domain.name: len(domain.learned) for domain in domains}, domains=figures,
        parameters=sum(p.numel() for p in model.parameters()),
        recall=float(np.mean(recalls[-50:])) if recalls else float("nan"),
        training_seconds=round(trained - training, 1), seconds=round(time.perf_counter() - began, 1),
    )  # fmt: skip
    with atomic_file(folder / _FIGURES) as temporary:
        temporary.write_text(demo.model_dump_json(indent=1) + "\n", encoding="utf-8")
    return demo


def learn_tokenizer(texts: Sequence[str], size: int) -> PreTrainedTokenizerFast:
    """A WordPiece tokenizer like BERT's, lower-case, learned from texts."""
    raw: Any = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    raw.normalizer = normalizers.BertNormalizer(lowercase=True)
    raw.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    raw.decoder = decoders.WordPiece()
    raw.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=size, special_tokens=list(SPECIAL), show_progress=False)
    )
    return with_special_tokens(raw)


# ── data ────────────────────────────────────────────────────────────────────


def _sequences(
    domains: Sequence[Domain], part: str, tokenizer: Any, max_tokens: int
) -> tuple[Sequences, list[NewEntry]]:
    """Texts cut into sequences, and the same pieces as entries; each text is a document."""
    rows = [
        {"text": text, "document": f"{domain.name} {part} {number}", "source": domain.name}
        for domain in domains
        for number, text in enumerate(getattr(domain, part))
    ]
    columns = TextConfig(document_column="document", source_column="source")
    pieces = chunk(pa.Table.from_pylist(rows), columns, tokenizer, max_tokens).to_pydict()
    lengths = [len(token_ids) for token_ids in pieces["token_ids"]]
    token = np.concatenate([np.array(token_ids, np.int32) for token_ids in pieces["token_ids"]])
    sequences = Sequences(
        [token], [np.cumsum(lengths)], [document_codes(pieces["document_id"])], np.array([0, len(lengths)])
    )
    entries = [NewEntry(*fields) for fields in zip(pieces["text"], pieces["source"], pieces["document_id"])]
    return sequences, entries


# ── measurements ────────────────────────────────────────────────────────────


def _figures(
    model: PlugLMForMaskedLM, tokenizer: Any, memory: KnowledgeMemory, domain: Domain, c: DomainsSettings, seed: int
) -> DomainFigures:
    """Predict a domain's held-out sequences with every memory, from the same masks."""
    sequences, entries = _sequences([domain], "held_out", tokenizer, c.max_tokens)
    count = min(len(sequences), c.sequences)
    random = np.random.default_rng([seed, 1])
    selected = np.sort(random.choice(len(sequences), count, replace=False)).tolist()
    masker = Masker.of(tokenizer, 0.15, seed, dynamic=False)
    rows = [masker.mask(sequences[number][0], number, 0) for number in selected]
    table = memory.table(["source", "token_ids"]).to_pydict()
    own = [number for number, source in enumerate(table["source"]) if source == domain.name]
    own_ids = {table["entry_id"][number] for number in own}
    count_V = np.ones(len(tokenizer))  # add-one smoothing
    for number in own:
        np.add.at(count_V, table["token_ids"][number], 1)
    count_V[list(tokenizer.all_special_ids)] = 0
    losses: dict[str, np.ndarray] = {}
    retrieved: list[int] = []
    for name in MEMORIES:
        model.attach(_knowledge(memory, domain.name, name, random))
        losses[name] = _losses(model, rows, tokenizer.pad_token_id, retrieved if name == BOTH else None)
    masked_S = np.array([(labels != IGNORED).sum() for _, labels in rows])
    label_M = np.concatenate([labels[labels != IGNORED] for _, labels in rows])
    text_S = np.unique([entries[number].document_id for number in selected], return_inverse=True)[1]
    return DomainFigures(
        domain=domain.name, texts=int(text_S.max()) + 1, sequences=count, masked=int(masked_S.sum()),
        by_frequency=float(np.log(count_V.sum()) - np.log(count_V[label_M]).mean()),
        memories=tuple(
            compared(name, losses[name], losses[OWN], masked_S, text_S, c.resamples, seed) for name in MEMORIES
        ),
        own_share=float(np.mean([entry in own_ids for entry in retrieved])), own_entries=len(own_ids) / len(memory),
    )  # fmt: skip


def _knowledge(memory: KnowledgeMemory, domain: str, which: str, random: np.random.Generator) -> Knowledge | None:
    if which == NONE:
        return None
    if which == BOTH:
        return memory.load()
    sources = set(memory.table(["source"])["source"].to_pylist())
    knowledge = memory.load(sources=sorted(source for source in sources if (source == domain) == (which != OTHER)))
    if which == SHUFFLED:
        order = torch.from_numpy(random.permutation(len(knowledge)))
        return replace(knowledge, value_ND=knowledge.value_ND[order])
    return knowledge


@torch.no_grad()
def _losses(
    model: PlugLMForMaskedLM, rows: Sequence[tuple[np.ndarray, np.ndarray]], pad_id: int, retrieved: list[int] | None
) -> np.ndarray:
    """Summed cross entropy of each sequence's masked tokens `[S]`; adds the retrieved entries to `retrieved`."""
    sums = []
    for start in range(0, len(rows), _PREDICTION_BATCH):
        part = rows[start : start + _PREDICTION_BATCH]
        batch = collate(part, [0] * len(part), pad_id)
        output = model.model(batch.input_BT, batch.mask_BT, output_retrieved=retrieved is not None)
        predicted_BT = batch.label_BT != IGNORED
        logits = model.head(output.last_hidden_state[predicted_BT])
        entropy = F.cross_entropy(logits.double(), batch.label_BT[predicted_BT], reduction="none")
        sums.append(torch.zeros(len(part), dtype=torch.float64).index_add_(0, predicted_BT.nonzero()[:, 0], entropy))
        if retrieved is not None:
            retrieved += output.retrieved[-1].entry_BK.flatten().tolist()
    return torch.cat(sums).numpy()


def compared(
    name: str, sum_S: np.ndarray, own_S: np.ndarray, masked_S: np.ndarray, text_S: np.ndarray, resamples: int, seed: int
) -> MemoryFigures:
    """A memory compared with the domain's own: mean losses, and a paired bootstrap of their difference.

    Whole texts are drawn with replacement, since the sequences of one text are alike.

    Args:
        sum_S, own_S: summed losses of the sequences with this memory and with the domain's own.
        masked_S: masked tokens of the sequences.
        text_S: index of each sequence's text.
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
    """(memory, loss and difference for each domain), in words."""
    rows = []
    for number, name in enumerate(MEMORIES):
        cells: list[str] = []
        for m in (domain.memories[number] for domain in demo.domains):
            cells += [f"{m.loss:.4f}", "" if name == OWN else f"{m.difference:+.4f} [{m.low:+.4f}, {m.high:+.4f}]"]
        rows.append((name, *cells))
    return rows
