"""One translation experiment, typed: `read_config(MtConfig, path, overrides)`. Knows pydantic and no stage.

Words used: a *group* is the sentences whose target positions share one memory (and go through the model together); an
*update* is one step of the optimiser.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from pema_ray.errors import nearest
from pema_ray.memory.search.config import IndexConfig
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.settings import Folder, Section
from pema_ray.training.schedules import Schedule
from pema_ray.trime.config import DatastoreConfig, SearchConfig, Split, TokenTrainingConfig

SYSTEM_NAMES = ("plain", "knn", "trime")
System = Literal["plain", "knn", "trime"]


class MtDataConfig(Section):
    """Parallel text, and the subwords of its two sides."""

    corpus: Literal["files", "bible"] = "files"
    """`files`: the user's own; `bible`: King James to World English, Python packages (extra `demo`)."""
    files: dict[Split, tuple[str, ...]] = {}
    """Split -> one `.jsonl` file, or two text files of equally many lines: source, target."""
    source: str = "source"
    """Field of the source in `.jsonl` files."""
    target: str = "target"
    """Field of the target in `.jsonl` files."""
    target_language: str = "en"
    """Language of the targets, for sacreBLEU's tokenizer."""
    dev_books: tuple[str, ...] = ("Mark",)
    """Books of `bible` that are the dev split."""
    test_books: tuple[str, ...] = ("Luke",)
    """Books of `bible` that are the test split."""
    limits: dict[Split, int] = {}
    """Split -> number of pairs to keep, drawn with `seed`; a split that is not named is kept whole."""
    source_subwords: int = Field(default=4000, ge=260)
    """Size of the source's byte-level BPE; a pretrained model brings its own tokenizer."""
    target_subwords: int = Field(default=4000, ge=260)
    """Subwords of the target's vocabulary."""
    max_tokens: int = Field(default=256, ge=2)
    """Longest source or target, in subwords; longer training pairs are left out, others are refused."""

    @model_validator(mode="after")
    def _names_files(self) -> MtDataConfig:
        if self.corpus == "files":
            for split in ("train", "dev", "test"):
                if self.files and not 1 <= len(self.files.get(split, ())) <= 2:
                    raise ValueError(f"files.{split}: one .jsonl file, or two text files: source, target")
        return self


class MtModelConfig(Section):
    """The encoder-decoder: of Marian's shape with random weights, or a checkpoint."""

    name: str = "marian"
    """`marian`, shaped by what follows, or `transformers:<hub name or folder>` with its weights and tokenizer."""
    encoder_layers: int = Field(default=2, ge=1)
    """Layers of the encoder."""
    decoder_layers: int = Field(default=2, ge=1)
    """Layers of the decoder."""
    hidden_size: int = Field(default=128, ge=2)
    """d, the size of states and keys."""
    ffn_size: int = Field(default=256, ge=1)
    """Width of the feed-forward blocks."""
    heads: int = Field(default=4, ge=1)
    """Attention heads."""
    dropout: float = Field(default=0.3, ge=0, lt=1)
    """Dropout on what the blocks add, and on embeddings."""
    attention_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Dropout on attention weights."""
    activation_dropout: float = Field(default=0.0, ge=0, lt=1)
    """Within the feed-forward blocks."""

    @model_validator(mode="after")
    def _divides(self) -> MtModelConfig:
        if self.hidden_size % self.heads or self.hidden_size % 2:
            raise ValueError(f"hidden_size ({self.hidden_size}) must be even and a multiple of heads ({self.heads})")
        return self


class MtBatchesConfig(Section):
    """Which sentences share a memory."""

    order: Literal["random", "bm25"] = "bm25"
    """`bm25`: similar targets, along the walk; `random`: sentences of about the same length. Groups come in another
    order every epoch."""
    max_tokens: int = Field(default=4096, ge=2)
    """Most target positions of a group, padding included."""
    groups_per_update: int = Field(default=1, ge=1)
    """Groups, whatever the number of workers; each is spread over all of them."""
    neighbours: int = Field(default=20, ge=1)
    """Of `bm25`: how many nearest sentences are kept for the walk."""


class MtTrainConfig(TokenTrainingConfig):
    """The objective and the optimiser (AdamW, which fairseq calls adam)."""

    memory: Literal["none", "trime"] = "trime"
    """Whether other target positions of a batch are memories (`trime`), or not (`none`: cross-entropy)."""
    temperature: float = Field(default=10.0, gt=0)
    """Temperature of the memories' similarity: divides g · g_j / √H."""
    top_k: int | None = Field(default=8, ge=1)
    """Only this many most similar memories enter normaliser and positives; none: all."""
    epochs: float = Field(default=10, gt=0)
    """Passes over the training split."""
    learning_rate: float = Field(default=5e-4, gt=0)
    """The learning rate, at its highest."""
    schedule: Schedule = "inverse_sqrt"
    """How the learning rate falls after `warm_up_steps`."""
    weight_decay: float = Field(default=1e-4, ge=0)
    """On all parameters, as fairseq's."""
    validate_every: int = Field(default=200, ge=1)
    """Updates between two validations; a checkpoint is written with each."""


class MtGenerateConfig(SearchConfig):
    """Decoding: which systems, beam, memory; calibration on dev."""

    systems: tuple[System, ...] = ()
    """`plain`, `knn` (kNN-MT: weight λ), `trime` (one normaliser); none: `plain`, and the one that goes with
    `train.memory`."""
    beam: int = Field(default=4, ge=1)
    """Hypotheses of beam search; 1 is greedy."""
    length_penalty: float = 0.6
    """A hypothesis scores Σ log P / (its length)^this."""
    length_factor: float = Field(default=1.2, ge=0)
    """Longest answer: this × source tokens + `length_extra`."""
    length_extra: int = Field(default=10, ge=1)
    """Longest answer: tokens added to those of `length_factor`."""
    neighbours: int = Field(default=16, ge=1)
    """k, neighbours of a position."""
    temperatures: tuple[float, ...] = ()
    """T to choose from on dev; a single one is used as it is. `knn` divides the negative squared distance (or the inner
    product), `trime` g · g_j / √H. None: a grid."""
    weights: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    """λ of `knn` to choose from on dev."""
    calibration_pairs: int = Field(default=500, ge=1)
    """Dev pairs that are used, from the start of the split."""

    @field_validator("systems", mode="before")
    @classmethod
    def _are_systems(cls, names: object) -> object:
        for name in names if isinstance(names, list | tuple) else ():
            if name not in SYSTEM_NAMES:
                raise ValueError(f"'{name}' is no system.{nearest(str(name), SYSTEM_NAMES)}")
        return names

    @field_validator("temperatures")
    @classmethod
    def _are_temperatures(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if any(not value > 0 for value in values):
            raise ValueError("temperatures must be positive")
        return values

    @field_validator("weights")
    @classmethod
    def _are_weights(cls, values: tuple[float, ...]) -> tuple[float, ...]:
        if not values or any(not 0 <= value <= 1 for value in values):
            raise ValueError("weights must lie in [0, 1], and there must be one")
        return values


class MtPlanConfig(Section):
    """What `mt-train --dry-run` counts with before the text has been prepared."""

    pairs: int | None = Field(default=None, ge=1)
    """Pairs of the training split, for `--dry-run`."""
    target_tokens: int | None = Field(default=None, ge=1)
    """Their targets' subwords, `<eos>` apart."""
    flops_per_second: float = Field(default=5e10, gt=0)
    """What one worker sustains: a CPU core 2e10 to 1e11 in float32, a GPU 5e12 to 2e14."""


class MtConfig(Section):
    """A whole translation experiment; every stage reads its own section and the shared ones."""

    run_dir: Folder = "runs/trime/mt"
    """The run folder: what stages make lies there."""
    seed: int = Field(default=0, ge=0)
    """Seed of every draw: weights, batches, dropout."""
    ray: RayConfig = RayConfig()
    data: MtDataConfig = MtDataConfig()
    model: MtModelConfig = MtModelConfig()
    batches: MtBatchesConfig = MtBatchesConfig()
    train: MtTrainConfig = MtTrainConfig()
    plan: MtPlanConfig = MtPlanConfig()
    datastore: DatastoreConfig = DatastoreConfig()
    index: IndexConfig = IndexConfig()
    generate: MtGenerateConfig = MtGenerateConfig()

    @property
    def systems(self) -> tuple[System, ...]:
        """The systems that decode: as configured, or those that go with the training objective."""
        return self.generate.systems or ("plain", "trime" if self.train.memory == "trime" else "knn")

    @model_validator(mode="after")
    def _equation_2_has_inner_products(self) -> MtConfig:
        if self.index.metric == "l2" and "trime" in self.systems:
            raise ValueError(
                "index.metric=l2 does not go with 'trime', which joins neighbours to equation 2, whose memory is "
                "compared by inner products: take inner_product, or leave 'trime' out of generate.systems"
            )
        return self
