"""Settings of training an adapter."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from pema_ray.training.config import TrainingConfig


class TrainConfig(TrainingConfig):
    """The adapter: its shape, its stages, its optimiser (paper section 3; settings of section 4)."""

    rank: int = Field(default=512, ge=1)
    """r, at most the PLM's hidden size."""
    space: Literal["pre_norm", "post_norm"] = "post_norm"
    """Where the adapter acts: after the final norm, or before it (as published)."""
    residual: bool = False
    """`h_pd = x + B_pd A x`: the adapter learns a low-rank correction."""
    look_back: int = Field(default=0, ge=0)
    """Attention blocks over all representations of a sequence, its prompt's too (`build_memory.prompts`), before the
    adapter's maps; 0 is published PEMA."""
    look_back_width: int = Field(default=256, ge=4, multiple_of=4)
    """Width of the look-back blocks."""
    look_back_dropout: float = Field(default=0.2, ge=0, lt=1)
    """Dropout in the look-back blocks and in the local memory's maps; without it, small memories overfit."""
    local_memory: int = Field(default=0, ge=0)
    """Width of trained query and key maps over the prompt and the text so far (`build_memory.prompts`), whose tokens
    are mixed in; 0: none."""
    predict_lambda: bool = False
    """Predict each token's λ from its state; fitted on the dev memory."""
    solver: Literal["closed_form", "adam", "none"] = "closed_form"
    """Stage 1, reconstruction: exact, by gradient, or skipped (random A, zero B)."""
    kappa: float = Field(default=0.2, ge=0, le=1)
    """Weight of the reconstruction loss in stage 3; 0 is the paper's stage 2, prediction alone."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input (published: 0.2)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Peak learning rate of Adam."""
    final_learning_rate: float | None = None
    """Final rate of the cosine schedule; none keeps the rate constant, as published."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step, over all workers."""
    shuffle: Literal["global", "window"] = "global"
    """`global`: a worker holds all rows and every epoch permutes them. `window`: it holds a few shards at a time."""
    window_shards: int = Field(default=8, ge=1)
    """Shards whose rows `shuffle: window` shuffles together; a worker holds twice as many."""
    epochs: int = Field(default=2, ge=1)
    """Passes of prediction over the memory."""
    reconstruction_batch_size: int = Field(default=20480, ge=1)
    """Rows of a step of the `adam` solver."""
    reconstruction_epochs: int = Field(default=10, ge=1)
    """Maximum epochs of the `adam` solver, which stops early as stage 3 does, by the error on the dev memory."""
    scale_by_rank: bool = False
    """`h = B A x / r`, as published: changes what a learning rate means."""
    fresh_maps: bool = False
    """Stage 3 starts from new maps, as published, and takes only the frozen `B_rct` from stage 1."""
    validate_every: int = Field(default=100, ge=1)
    """Optimisation steps between two validations on the dev memory."""
    validation_rows: int = Field(default=4096, ge=1)
    """Rows of the dev memory to validate on, from its start."""
    patience: int = Field(default=5, ge=1)
    """Validations without a better dev loss before training stops."""
    stream: bool = False
    """Train while the memory is built: `train` then does the work of `build-memory` too. One worker; stage 1 is solved
    on the first shard alone."""
    published: str | None = None
    """Name under which the training memory was published (`pema-ray memory publish`): workers read it from there."""
    max_train_pairs: int | None = Field(default=None, ge=1)
    """Train on the memory's first pairs only, up to this number."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Number format of the LM head; the adapter is float32."""

    @model_validator(mode="after")
    def _check_stream(self) -> TrainConfig:
        for name, value, needed in (
            ("workers", self.workers, 1),
            ("shuffle", self.shuffle, "global"),
            ("solver", self.solver == "adam", False),
            ("published", self.published, None),
            ("max_train_pairs", self.max_train_pairs, None),
        ):
            if self.stream and value != needed:
                raise ValueError(f"stream cannot be combined with this '{name}': leave it at its default")
        return self

    @model_validator(mode="after")
    def _check_sequences(self) -> TrainConfig:
        if self.reads_sequences and (self.stream or self.shuffle == "window" or self.solver == "adam"):
            raise ValueError(
                "look_back and local_memory learn from whole sequences in RAM: they need shuffle global, a solver "
                "other than adam and no stream"
            )
        return self

    @property
    def reads_sequences(self) -> bool:
        """Whether training needs rows of prompts."""
        return self.look_back > 0 or self.local_memory > 0


class PrefixConfig(TrainingConfig):
    """A key-value prefix, trained together with a residual adapter through the gradient line."""

    start: Literal["examples", "random"] = "examples"
    """Of which text the prefix is the keys and values before its training: of the examples that all prompts show, or of
    `positions` tokens that are drawn at random."""
    text: str = ""
    """An instruction that stands before the examples, in the text that the prefix starts from alone."""
    positions: int | None = Field(default=None, ge=2)
    """Of the prefix: the first token of the text and its last ones are kept. Default: all of it."""
    frozen: int = Field(default=1, ge=0)
    """The prefix's first so many positions keep their start: attention sinks."""
    rank: int = Field(default=128, ge=1)
    """r of the adapter that is trained with the prefix, and dropped: `train` fits one to the finished prefix."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's learning rate for the adapter, at its highest; a cosine takes it to a fiftieth."""
    prefix_learning_rate: float = Field(default=5e-3, gt=0)
    """The same for the prefix."""
    epochs: int = Field(default=1, ge=1)
    """Passes over the training pairs."""
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Token positions of a step, padding included, without the prefix."""
    requests: int = Field(default=1, ge=1)
    """Requests that a step is sent in, side by side: as many as the PLM owner has replicas."""
    validate_every: int = Field(default=20, ge=1)
    """Steps between two validations on the dev pairs."""
    patience: int = Field(default=5, ge=1)
    """Validations without a better dev loss before training stops."""

    @model_validator(mode="after")
    def _trains_in_one_process(self) -> PrefixConfig:
        if self.start == "random" and (self.positions is None or self.text):
            raise ValueError("a prefix that starts at random needs 'positions', and takes no 'text'")
        if self.positions is not None and self.frozen >= self.positions:
            raise ValueError(f"of {self.positions} positions {self.frozen} are frozen: none is left to train")
        for name, setting in TrainingConfig.model_fields.items():
            own = name in PrefixConfig.__annotations__ or name in ("clip", "resume")
            if not own and getattr(self, name) != setting.get_default(call_default_factory=True):
                raise ValueError(f"a prefix is trained in this process: leave '{name}' at its default")
        return self
