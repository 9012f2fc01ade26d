"""The data owner's deployment: adapters, the unroller and the API, over whichever line to a PLM owner it is given."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from pema_ray.config import Section, validate
from pema_ray.data_owner.adapter import PemaAdapter
from pema_ray.data_owner.serving.drafts import MemoryLookup
from pema_ray.data_owner.serving.unroller import Unroller
from pema_ray.data_owner.unrolling import UnrollingSchedule
from pema_ray.errors import UserError, nearest
from pema_ray.hardware import pick_device, pick_dtype, set_threads
from pema_ray.line import LMHeadBundle, ModelCard
from pema_ray.memory import ExternalMemory
from pema_ray.metrics import RayMetrics


class UnrollerConfig(Section):
    """How a data owner's service answers, where a request does not say."""

    lambda_max: float = Field(default=0.9, ge=0, le=1)
    schedule: Literal["constant", "linear", "quadratic"] = "constant"
    floor: float = Field(default=0.0, ge=0, le=1)
    timeout_seconds: float = Field(default=300.0, gt=0)
    """For a whole answer."""
    draft: int = Field(default=8, ge=0, le=16)
    """Most tokens guessed ahead; how many it really is follows from what guesses cost and how often they come true."""
    draft_by_plm: bool = True
    """Let the PLM owner guess as well, where round trips are long."""
    max_live: int = Field(default=256, ge=1)
    """Answers at a time; who comes then is told to come again."""
    device: str = "auto"
    """Where the LM head and the adapters are."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """The LM head's."""
    threads: int = Field(default=0, ge=0)
    """CPU threads of torch; 0 means as many as it likes."""


class PromptTemplate(Section):
    """How an adapter was trained to be asked, so that a request may give its source alone."""

    text: str = Field(pattern=r"\{source\}")
    """With `{source}` where the source goes."""
    special_tokens: bool = True
    """Let the tokenizer add its own; off for texts of a chat template, which have them already."""
    stop: tuple[str, ...] = ()
    """Strings that end an answer."""


class Live(Section):
    """What may be changed while answers are being made: Serve's `user_config`."""

    adapters: dict[str, str] = {}
    """Name -> folder of an adapter."""
    prompts: dict[str, PromptTemplate] = {}
    """Name of an adapter -> how it is asked."""
    memories: dict[str, str] = {}
    """Name of an adapter -> folder of a memory that its answers are guessed from. Guesses go to the PLM owner."""


class DataOwner:
    """What the API stands on; `serving.data_owner` makes the deployment.

    Args:
        connect: makes the line to the PLM owner: an object with `describe`, `limits`, `lm_head`, `step` and `close`.
        unroller: settings, as `UnrollerConfig` takes them.
    """

    def __init__(self, connect: Callable[[], Any], unroller: Mapping[str, Any] | None = None) -> None:
        self.config = validate(UnrollerConfig, dict(unroller or {}), "unroller")
        self._connect = connect
        self._live = Live()
        self._sampling: asyncio.Task[None] | None = None
        self._starting: asyncio.Task[None] | None = None
        self._loading = asyncio.Lock()
        self.reading = ThreadPoolExecutor(1, thread_name_prefix="reading")
        self.unroller: Unroller
        self.card: ModelCard
        self.tokenizer: Any
        self.schedule = UnrollingSchedule(self.config.lambda_max, self.config.schedule, self.config.floor)
        self.timeout_seconds, self.draft = self.config.timeout_seconds, self.config.draft
        self.max_tokens, self.started = 0, int(time.time())
        self.refused: str | None = None
        """Why the last change of adapters was not made, if it was not."""

    @property
    def ready(self) -> bool:
        """Whether answers can be made."""
        return self._starting is not None and self._starting.done() and self._starting.exception() is None

    def check_health(self) -> None:
        """Raises when answers were made here and no more can be."""
        if self.ready:
            self.unroller.check_health()

    async def start(self) -> None:
        """Fetch the LM head and begin; adapters that were named before are loaded."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        await asyncio.shield(self._starting)

    async def _start(self) -> None:
        set_threads(self.config.threads)
        line = self._connect()
        bundle: LMHeadBundle = await line.lm_head()
        device = pick_device(self.config.device)
        head = bundle.head.to(device, pick_dtype(self.config.dtype, device))
        self.card, self.tokenizer = bundle.card, bundle.tokenizer()
        limits = await line.limits()
        self.max_tokens = int(limits["max_session_tokens"])
        self.unroller = Unroller(line, head, self._text, self.card.eos_token_ids, self.config.max_live)
        if self.config.draft_by_plm:
            self.unroller.most_drafted = min(self.config.draft, limits.get("limits", {}).get("max_draft", self.draft))
        self.unroller.adapters, self.unroller.memories = await asyncio.to_thread(self._loaded, self._live)

    @property
    def prompts(self) -> Mapping[str, PromptTemplate]:
        """How adapters are asked, for those that say."""
        return self._live.prompts

    def _text(self, tokens: Any) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def tell(self, metrics: RayMetrics) -> None:
        """Tell figures from now on."""
        self.unroller.metrics = metrics
        levels = lambda: {"live_answers": float(self.unroller.live)}  # noqa: E731
        self._sampling = asyncio.create_task(metrics.keep_sampling(lambda: (self.unroller.counts, levels())))

    async def change(self, live: Mapping[str, Any]) -> None:
        """Take other adapters; answers that are being made keep the ones they began with.

        Raises:
            UserError: an adapter is missing, damaged or another PLM's; then nothing changes.
        """
        wanted = validate(Live, dict(live), "user_config")
        async with self._loading:
            if self.ready:
                loaded = await asyncio.to_thread(self._loaded, wanted)
                self.unroller.adapters, self.unroller.memories = loaded
            self._live = wanted

    def _loaded(self, live: Live) -> tuple[dict[str, PemaAdapter], dict[str, MemoryLookup]]:
        adapters, memories = {}, {}
        for name, folder in live.adapters.items():
            if name == self.card.name:
                raise UserError(f"adapters.{name}: this is the PLM's own name; choose another.")
            adapter = PemaAdapter.from_pretrained(Path(folder), self.card)
            adapters[name] = adapter.to(self.unroller.head.weight.device).eval()
        for name, folder in live.memories.items():
            if name not in adapters:
                raise UserError(f"memories.{name}: there is no adapter of this name.{nearest(name, list(adapters))}")
            memories[name] = MemoryLookup.of(ExternalMemory.open(folder, self.card))
        return adapters, memories
