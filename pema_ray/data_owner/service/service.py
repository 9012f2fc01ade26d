"""The data owner's deployment: adapters, the decoder and the API, over any client of a PLM owner."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pema_ray.data_owner.config import GenerateConfig, UnrollingConfig
from pema_ray.data_owner.decoding import Decoder, Predictor, PredictorSpec
from pema_ray.data_owner.decoding.drafts import MemoryLookup
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.data_owner.prefixed import PrefixedPLM
from pema_ray.errors import UserError, nearest
from pema_ray.line import ModelCard, PLMClient
from pema_ray.line.protocol import AdaptablePLM
from pema_ray.line.retry import PatientPLM
from pema_ray.line.tokenizer import PLMTokenizer
from pema_ray.memory import ExternalMemory
from pema_ray.memory.examples import read_pairs
from pema_ray.runtime.hardware import compute_thread, pick_device, pick_dtype, set_threads
from pema_ray.runtime.metrics import RayMetrics
from pema_ray.runtime.settings import Section, validate
from pema_ray.tasks import Pair, Prompter, Task
from pema_ray.tasks.shots import SimilarShots

logger = logging.getLogger(__name__)
_START_SECONDS = 600.0  # to wait for the PLM owner


class DecoderConfig(UnrollingConfig):
    """Defaults of a data owner's service; requests and adapters' tasks override them."""

    timeout_seconds: float = Field(default=300.0, gt=0)
    """For a whole answer."""
    draft: int = Field(default=8, ge=0, le=16)
    """Longest draft. Draft length and source adapt to measured acceptance and latency."""
    max_live: int = Field(default=256, ge=1)
    """Answers at a time (beam search counts every beam); more are rejected with status 503."""
    device: str = "auto"
    """Device of the LM head and the adapters."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The LM head's."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 takes torch's default."""


class ShownPair(Section):
    """An example that every prompt shows."""

    source: str
    target: str


class ServedTask(Section):
    """The task that an adapter was trained for: requests may then send a source instead of a prompt."""

    task: Task
    chat: bool = False
    """Render prompts through the tokenizer's chat template."""
    chat_template_kwargs: dict[str, Any] = {}
    """Further arguments of the chat template; also the default for chats with this adapter."""
    shown: tuple[ShownPair, ...] = ()
    """Pairs that every prompt shows."""
    similar: str | None = None
    """Prepared pairs (`prepare/train.parquet`), to show those most like each source."""
    shots: int = Field(default=0, ge=0)
    """How many of `similar` a prompt shows."""
    generate: GenerateConfig = GenerateConfig()
    """λ, decoding, limits, stop strings and neighbours; a request's own settings override them."""
    memory: str | None = None
    """The memory that `generate.knn` searches."""
    max_examples: int | None = None
    """Use the memory's first examples only, up to this number."""

    def prompter(self, tokenizer: PLMTokenizer) -> Prompter:
        """Makes the task's prompts, exactly as the offline stages do."""
        shots: SimilarShots | list[Pair] = [Pair(-1, pair.source, pair.target) for pair in self.shown]
        if self.similar is not None:
            shots = SimilarShots(list(read_pairs(Path(self.similar))), self.shots)
        return Prompter(tokenizer, self.task, shots, self.chat, self.chat_template_kwargs)


class DataOwnerUserConfig(Section):
    """Settings that can change while answers are being generated: Serve's `user_config`."""

    adapters: dict[str, str] = {}
    """Name -> folder of an adapter; one that was trained behind a prefix holds that too, or is a prefix alone."""
    tasks: dict[str, ServedTask] = {}
    """Name of an adapter -> its task."""
    memories: dict[str, str] = {}
    """Name of an adapter -> folder of a memory that its drafts come from. Drafts go to the PLM owner."""


def _log_wait(reason: str) -> None:
    if reason:
        logger.warning("not ready: %s", reason)


@dataclass(frozen=True)
class _Loaded:
    """What `DataOwnerUserConfig` names, loaded."""

    predictors: dict[str, Predictor] = field(default_factory=dict)
    memories: dict[str, MemoryLookup] = field(default_factory=dict)
    builders: dict[str, RequestBuilder] = field(default_factory=dict)


class DataOwner:
    """The service behind the API; `pema.serving.data_owner` deploys it.

    Args:
        connect: makes the client of the PLM owner.
        decoder: settings, as `DecoderConfig` takes them.

    Attributes:
        builders: by adapter name, for adapters that have a task.
        max_tokens: of a prompt and its answer together.
        rejected: why the last change of adapters was rejected, if it was.
        tokenizing: a pool of one thread, because tokenizers are not thread-safe.
    """

    def __init__(self, connect: Callable[[], PLMClient], decoder: Mapping[str, Any] | None = None) -> None:
        self.config: DecoderConfig = validate(DecoderConfig, dict(decoder or {}), "decoder")
        self._connect = connect
        self._user_config = DataOwnerUserConfig()
        self._sampling: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self.tokenizing = ThreadPoolExecutor(1, thread_name_prefix="tokenizing")
        self.decoder: Decoder
        self.card: ModelCard
        self.tokenizer: PLMTokenizer
        c = self.config
        self.schedule = UnrollingSchedule(c.lambda_max, c.schedule, c.floor)
        self.timeout_seconds, self.draft = c.timeout_seconds, c.draft
        self.max_tokens, self.started = 0, int(time.time())
        self.builders: Mapping[str, RequestBuilder] = {}
        self._prefixed: PrefixedPLM | None = None
        self._takes_prefixes = False
        self.rejected: str | None = None

    @property
    def ready(self) -> bool:
        """Whether requests can be answered."""
        return self._starting is not None and self._starting.done() and self._starting.exception() is None

    def check_health(self) -> None:
        """Raise when the decoder has failed."""
        if self.ready:
            self.decoder.check_health()

    async def start(self) -> None:
        """Fetch the LM head, load the configured adapters and start the decoder."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        c = self.config
        compute_thread().submit(set_threads, c.threads)
        client = self._connect()
        if isinstance(client, AdaptablePLM):  # adapters may bring prefixes of their own
            client = self._prefixed = PrefixedPLM(client, None)
        patient = PatientPLM(client, _START_SECONDS, _log_wait)
        described, bundle = await patient.describe(), await patient.lm_head()
        device = pick_device(c.device)
        head = bundle.head.to(device, pick_dtype(c.dtype, device))
        self.card, self.tokenizer = bundle.card, bundle.tokenizer()
        self.max_tokens, self._takes_prefixes = described.limits.max_tokens, described.prefix_shape is not None
        eos = self.card.eos_token_ids
        self.decoder = Decoder(
            client, head, self.tokenizer, eos, c.max_live, threads=c.threads, max_sessions=described.limits.max_sessions
        )
        self.decoder.allow_plm_drafts(min(c.draft, described.limits.max_draft))
        await self._use(await asyncio.to_thread(self._load, self._user_config))

    def use_metrics(self, metrics: RayMetrics) -> None:
        """Report figures from now on."""
        self.decoder.use_metrics(metrics)
        figures = lambda: (self.decoder.counts, {"live_answers": float(self.decoder.live)})  # noqa: E731
        self._sampling = asyncio.create_task(metrics.keep_sampling(figures))

    async def change(self, user_config: Mapping[str, Any]) -> None:
        """Replace the adapters; answers that are being generated keep theirs.

        Raises:
            UserError: an adapter is missing, damaged or another PLM's; then nothing changes.
        """
        requested = validate(DataOwnerUserConfig, dict(user_config), "user_config")
        async with self._loading:
            if self.ready:
                await self._use(await asyncio.to_thread(self._load, requested))
            self._user_config = requested

    async def _use(self, loaded: _Loaded) -> None:
        if self._prefixed is not None:
            await self._prefixed.add([p.prefix for p in loaded.predictors.values() if p.prefix is not None])
        self.decoder.predictors, self.decoder.memories = loaded.predictors, loaded.memories
        self.builders = loaded.builders

    def _load(self, user_config: DataOwnerUserConfig) -> _Loaded:
        loaded = _Loaded()
        for section in ("tasks", "memories"):
            for name in getattr(user_config, section):
                if name not in user_config.adapters:
                    hint = nearest(name, list(user_config.adapters))
                    raise UserError(f"{section}.{name}: no adapter has this name.{hint}")
        for name, folder in user_config.adapters.items():
            if name == self.card.name:
                raise UserError(f"adapters.{name}: this is the PLM's own name; choose another.")
            predictor = loaded.predictors[name] = self._predictor(folder, user_config.tasks.get(name))
            if predictor.prefix is not None and not self._takes_prefixes:
                raise UserError(f"adapters.{name}: was trained behind a prefix, and this PLM owner takes none.")
        for name, folder in user_config.memories.items():
            prefix = loaded.predictors[name].prefix
            card = self.card if prefix is None else prefix.card(self.card)
            loaded.memories[name] = MemoryLookup.of(ExternalMemory.open(folder, card))
        for name, task in user_config.tasks.items():
            prompter = task.prompter(self.tokenizer)
            max_tokens = self._max_tokens_of(loaded.predictors[name])
            loaded.builders[name] = RequestBuilder(prompter, task.generate, name, max_tokens)
        return loaded

    def max_tokens_of(self, adapter: str | None) -> int:
        """Of a prompt and its answer together, with an adapter or with the PLM alone."""
        return self._max_tokens_of(None if adapter is None else self.decoder.predictors.get(adapter))

    def _max_tokens_of(self, predictor: Predictor | None) -> int:
        longer = 0 if predictor is None or predictor.prefix is None else predictor.prefix.longer
        return self.max_tokens - longer

    def _predictor(self, folder: str, task: ServedTask | None) -> Predictor:
        if task is None:
            return PredictorSpec(Path(folder)).load(self.card, self.decoder.head)
        memory = None if task.memory is None else Path(task.memory)
        if task.generate.knn.weight > 0 and memory is None:
            raise UserError(f"tasks: generate.knn.weight is {task.generate.knn.weight:g}, but no memory is given.")
        spec = PredictorSpec(Path(folder), memory, task.generate.knn, task.max_examples)
        return spec.load(self.card, self.decoder.head)
