"""One TRIME experiment, typed: `read_config(TrimeConfig, path, overrides)`. Knows pydantic and no stage.

Words used: a *segment* is L consecutive tokens; a *group* is the segments whose positions share one memory (and go
through the model together); an *update* is one step of the optimiser.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from pema_ray.errors import nearest
from pema_ray.memory.search.config import IndexConfig
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.settings import Folder, Section
from pema_ray.training.config import TrainingConfig
from pema_ray.training.schedules import Schedule

Split = Literal["train", "dev", "test"]
MemoryKind = Literal["none", "local", "long", "ext"]
SYSTEM_NAMES = (
    "plain", "cache_local", "cache", "knn", "knn_cache", "local", "long", "ext", "local_knn", "long_knn", "ext_knn",
)  # fmt: skip


class PrepareConfig(Section):
    """The corpus: documents of text, a vocabulary made from the training split, token ids in Parquet shards."""

    corpus: Literal["files", "bible"] = "files"
    """`files`: the user's own; `bible`: translations that come as Python packages (extra `demo`)."""
    files: dict[str, tuple[str, ...]] = {}
    """Split -> files: `.txt`, or `.jsonl` with `text` and, if there is one, `title`. `shares` divide the
    split `all`."""
    shares: dict[Literal["dev", "test"], float] = {}
    """Of the split `all`: what part of its documents, by length, goes to dev and to test (drawn with `seed`)."""
    document_start: str | None = r"^ ?= [^=](.*[^=])? = ?$"
    """Of `.txt`: a regular expression for the line that begins a document; none: a file is one document. The
    default finds WikiText's articles."""
    translations: tuple[str, ...] = ("kjv", "asv", "web")
    """Of `bible`: package names without `pythonbible-`. The last one's held-out books are dev and test."""
    books: tuple[str, ...] = ()
    """Of `bible`: only these; none: all that every translation has."""
    dev_books: tuple[str, ...] = ("Mark",)
    """Of `bible`: held out of the last translation; the others' stay in the training split."""
    test_books: tuple[str, ...] = ("Luke",)
    """Books of `bible` that are the test split, of the last translation."""
    vocabulary: Literal["word", "bpe", "character", "byte", "tokenizer"] = "word"
    """`word`: what `words` splits; `byte`: UTF-8 bytes, as enwik8 is measured; `tokenizer`: that of a transformers
    model."""
    tokenizer: str | None = None
    """Of `tokenizer`: hub name or folder."""
    words: Literal["space", "punctuation"] = "space"
    """Of `word`: split at white space, or punctuation marks from words as well."""
    lowercase: bool = False
    """Lower-case the text before anything else."""
    line_ends: bool = True
    """Of `word` and `bpe`: every line's end is a token `<eos>`, as in WikiText."""
    min_count: int = Field(default=1, ge=1)
    """Of `word` and `character`: rarer ones are `<unk>`."""
    max_words: int | None = Field(default=None, ge=2)
    """Largest vocabulary, `<eos>` and `<unk>` included; of `bpe` its size (8192 if none)."""
    max_unknown: float = Field(default=0.1, ge=0, le=1)
    """Share of a held-out split's tokens that the vocabulary may lack; more are refused."""
    vocabulary_from: str | None = None
    """Another run's folder; its vocabulary is used, so that its model can read this text."""
    seed: int | None = Field(default=None, ge=0)
    """What `shares` are drawn with; none: the experiment's `seed`."""
    tokens_per_shard: int = Field(default=1 << 20, ge=1)
    """About this many tokens; a shard is the unit of work and of resuming."""

    @field_validator("files")
    @classmethod
    def _are_splits(cls, files: dict[str, tuple[str, ...]]) -> dict[str, tuple[str, ...]]:
        for name in files:
            if name not in ("train", "dev", "test", "all"):
                raise ValueError(f"'{name}' is no split.{nearest(name, ('train', 'dev', 'test', 'all'))}")
        return files

    @model_validator(mode="after")
    def _goes_together(self) -> PrepareConfig:
        if any(not 0 < share < 1 for share in self.shares.values()) or sum(self.shares.values()) >= 1:
            raise ValueError("shares must be positive and leave something to train on")
        if (self.vocabulary == "tokenizer") != (self.tokenizer is not None):
            raise ValueError("vocabulary 'tokenizer' and the name of a tokenizer go together")
        if ("all" in self.files) != bool(self.shares):
            raise ValueError("the split 'all' and shares go together: what part of it is dev, what part test")
        return self


class DecoderShape(Section):
    """Layers, sizes and dropout of the decoder."""

    layers: int = Field(default=2, ge=1)
    """Layers of the decoder."""
    hidden_size: int = Field(default=96, ge=2)
    """d, the size of states and keys."""
    ffn_size: int = Field(default=384, ge=1)
    """Width of the feed-forward blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    cutoffs: tuple[int, ...] | None = None
    """Where the bands of adaptive input and softmax end; none: one embedding for all words, tied to the softmax."""
    factor: float = Field(default=1.0, ge=1)
    """By which each further band's embeddings are smaller."""
    tie_projections: bool = True
    """Input and softmax share the maps of the bands as well, not the embeddings alone."""
    tail_dropout: float = Field(default=0.0, ge=0, lt=1)
    """In the softmax's tail clusters."""
    dropout: float = Field(default=0.1, ge=0, lt=1)
    """Dropout on what the blocks add, and on embeddings."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention weights."""
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Within the feed-forward blocks."""
    final_norm: bool = True
    """A layer norm after the last layer."""

    @model_validator(mode="after")
    def _divides(self) -> DecoderShape:
        if self.hidden_size % self.heads:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be a multiple of heads ({self.heads})")
        if self.cutoffs is not None and list(self.cutoffs) != sorted(set(self.cutoffs)):
            raise ValueError("cutoffs must rise")
        return self


class ModelConfig(Section):
    """Which language model is trained."""

    name: str = "decoder"
    """`decoder` (shaped by `shape`), a published shape (`247m`, `150m`, `enwik8-38m`, `7m`), or
    `transformers:<hub name or folder>`."""
    shape: DecoderShape = DecoderShape()
    """Of `decoder`."""
    fresh: bool = False
    """Of `transformers:`: take the architecture and train its weights from random numbers."""


class BatchesConfig(Section):
    """Which segments share a memory, and in which order they come."""

    segment: int = Field(default=128, ge=2)
    """L, tokens of a segment."""
    order: Literal["random", "keep", "bm25"] = "random"
    """`random`: another permutation every epoch; `keep`: consecutive segments form a group; `bm25`: similar ones do.
    The last two permute whole groups."""
    group: int = Field(default=8, ge=1)
    """Segments that share a memory: m = group × segment."""
    groups_per_update: int = Field(default=1, ge=1)
    """Tokens of an update = groups_per_update × group × segment, whatever the number of workers."""
    across_workers: bool = True
    """A group is spread over all workers, which exchange keys and their gradients; else each has groups of its own."""
    neighbours: int = Field(default=20, ge=1)
    """Of `bm25`: how many nearest segments are kept for the walk."""
    actors: int = Field(default=1, ge=1)
    """Of `bm25`: processes that search."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that one of them asks of Ray."""


class TokenTrainingConfig(TrainingConfig):
    """What the trainings of language models and of translators share."""

    ce_epochs: float = Field(default=0, ge=0)
    """Epochs of plain cross-entropy before the memory comes in (`ce-warmup-epoch`)."""
    learning_rate: float
    schedule: Schedule
    final_learning_rate: float = Field(default=0.0, ge=0)
    """Where the schedules `cosine` and `polynomial` end."""
    betas: tuple[float, float] = (0.9, 0.98)
    """β1 and β2 of `adam` and `adamw`."""
    validate_every: int
    patience: int | None = Field(default=None, ge=1)
    """Validations without a better one before training stops; none: never."""

    @model_validator(mode="after")
    def _accumulates_groups(self) -> TokenTrainingConfig:
        if self.accumulate != 1:
            raise ValueError("accumulate follows from batches.groups_per_update: set that, and leave this at 1")
        return self


class TrimeTrainConfig(TokenTrainingConfig):
    """The objective and the optimiser."""

    memory: MemoryKind = "local"
    """TrimeLM (`local`), TrimeLM_long, TrimeLM_ext; `none` is the plain language model (cross-entropy)."""
    hide_local: float = Field(default=0.9, ge=0, le=1)
    """p of `ext`: how often an update sees other segments only (`cross-sent-ratio`)."""
    across_documents: bool = False
    """Whether a `long` memory continues past the end of a document, as in the published code."""
    updates: int = Field(default=900, ge=1)
    """Steps of the optimiser."""
    optimizer: Literal["nag", "adam", "adamw"] = "adamw"
    """`nag` is SGD with Nesterov's momentum; `adamw` is what fairseq calls adam (weight decay apart)."""
    learning_rate: float = Field(default=2e-3, gt=0)
    """The learning rate, at its highest."""
    schedule: Schedule = "cosine"
    """How the learning rate falls after `warm_up_steps`."""
    momentum: float = Field(default=0.99, ge=0, lt=1)
    """Momentum of `nag`."""
    weight_decay: float = Field(default=0.0, ge=0)
    """On all parameters, as fairseq's."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Number format of matrix products; weights, norms and sums of exponentials are float32."""
    validate_every: int = Field(default=100, ge=1)
    """Updates between two validations; a checkpoint is written with each."""
    validation_groups: int = Field(default=64, ge=1)
    """Groups of the dev split that are used, from its start."""
    keep_checkpoints: bool = False
    """Keep the model of every validation, not only the best and the last."""


class PlanConfig(Section):
    """What `train --dry-run` counts with before the corpus has been prepared."""

    vocabulary: int | None = Field(default=None, ge=2)
    """Words of the vocabulary, for `--dry-run`."""
    tokens: int | None = Field(default=None, ge=1)
    """Tokens of the training split, for `--dry-run`."""
    flops_per_second: float = Field(default=5e10, gt=0)
    """What one worker sustains: a CPU core 2e10 to 1e11 in float32, a GPU 5e12 to 2e14."""


class DatastoreConfig(Section):
    """The external memory: keys of every training position."""

    rows_per_shard: int = Field(default=65_536, ge=1)
    """About this many rows; a shard is the unit of work and of resuming."""
    max_batch_tokens: int = Field(default=8192, ge=1)
    """Most token positions of one forward pass."""
    key_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    """Number format of the keys."""
    actors: int = Field(default=1, ge=1)
    """Processes that hold the model."""
    cpus_per_actor: float = Field(default=1, gt=0)
    """CPUs that one of them asks of Ray."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that one of them asks of Ray."""


class SearchConfig(Section):
    """How a datastore is searched."""

    probes: int = Field(default=32, ge=1)
    """Lists that an `ivf_*` index looks into."""
    rescore: bool = True
    """Compare the candidates of an `ivf_pq*` index with the exact keys."""
    oversample: int = Field(default=2, ge=1)
    """Candidates for each neighbour, where they are rescored."""
    search_actors: int = Field(default=0, ge=0)
    """Ray actors that share the datastore's parts; 0: this process holds them all."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` takes a GPU where one is visible."""


class TrimeEvaluateConfig(SearchConfig):
    """Windows, memories, calibration."""

    tokens_per_sample: int | None = Field(default=None, ge=2)
    """Tokens of a window, its context included; none: `batches.segment`."""
    context_window: int | None = Field(default=None, ge=0)
    """Tokens of a window that are context only; none: half."""
    batch_windows: int = Field(default=16, ge=1)
    """Windows that go through the model together."""
    mem_size: int = Field(default=2048, ge=0)
    """Long memory: this many positions before a window."""
    mem_sizes: tuple[int, ...] = ()
    """Further sizes, to plot perplexity; 0 (local memory alone) and `mem_size` are always among them."""
    count_context_twice: bool = False
    """A window's context stands in the long memory as well, as in the published code."""
    reset_at_documents: bool = False
    """No token sees a memory entry of another document."""
    neighbours: int = Field(default=256, ge=1)
    """k of the external memory."""
    neighbour_counts: tuple[int, ...] = ()
    """Further values of k, to plot perplexity."""
    taus: tuple[float, ...] = (0.7, 0.8, 0.9, 1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3, 1.4, 1.6, 2.0)
    """τ to choose from, where memory and vocabulary share a normaliser."""
    interp_temps: tuple[float, ...] = ()
    """Temperatures of the raw similarity in the second interpolation; none: √H (inner product) or H (l2) times
    0.008 to 4."""
    max_tokens: dict[Literal["dev", "test"], int] = {}
    """Split -> tokens that are used, from its start."""
    systems: tuple[str, ...] = ()
    """Systems of `pema_ray.trime.evaluation.systems`; none: those that go with `train.memory`."""
    model: str | None = None
    """A trained model's folder (`<run>/train/model`) instead of this run's own: another domain's, whose run this one's
    `prepare.vocabulary_from` names."""
    datastores: dict[str, str] = {}
    """Name -> folder of further datastores of the same model (another domain's), evaluated beside the run's own."""

    @field_validator("systems")
    @classmethod
    def _are_systems(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in SYSTEM_NAMES:
                raise ValueError(f"'{name}' is no system.{nearest(name, SYSTEM_NAMES)}")
        return names

    @field_validator("taus", "interp_temps")
    @classmethod
    def _are_temperatures(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not value > 0 for value in values):
            raise ValueError("temperatures must be positive")
        return tuple(sorted(set(values)))


class TableConfig(Section):
    """The demonstration: every objective with every seed, at equal steps and at equal time, in one table."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Of weights, batches and dropout; all share one split of the corpus (`prepare.seed`)."""
    memories: tuple[MemoryKind, ...] = ("none", "local", "long", "ext")
    """Objectives; `none` is the baseline, whose training time the others get, each in a second training."""
    settings: dict[MemoryKind, dict[str, Any]] = {}
    """Objective -> settings (`section.key`) of it alone."""


class TrimeConfig(Section):
    """A whole TRIME experiment; every stage reads its own section and the shared ones."""

    run_dir: Folder = "runs/trime"
    """The run folder: what stages make lies there."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw: weights, batches, dropout."""
    ray: RayConfig = RayConfig()
    prepare: PrepareConfig = PrepareConfig()
    model: ModelConfig = ModelConfig()
    batches: BatchesConfig = BatchesConfig()
    train: TrimeTrainConfig = TrimeTrainConfig()
    plan: PlanConfig = PlanConfig()
    datastore: DatastoreConfig = DatastoreConfig()
    index: IndexConfig = IndexConfig()
    evaluate: TrimeEvaluateConfig = TrimeEvaluateConfig()
    table: TableConfig = TableConfig()

    @model_validator(mode="after")
    def _equation_2_has_inner_products(self) -> TrimeConfig:
        names = self.evaluate.systems or (("ext",) if self.train.memory == "ext" else ())
        joined = [name for name in names if name.startswith("ext")]
        if self.index.metric == "l2" and joined:
            raise ValueError(
                f"index.metric=l2 does not go with '{joined[0]}', which joins neighbours to equation 2, whose memory "
                "is compared by inner products: take inner_product, or the knn systems alone"
            )
        return self

    @model_validator(mode="after")
    def _memory_and_order_agree(self) -> TrimeConfig:
        if self.train.memory == "long" and self.batches.order != "keep":
            raise ValueError("train.memory=long needs batches.order=keep: consecutive segments in a group")
        return self
