"""Spreads generation over Ray Data: actors that each hold a `ContextSource`, the LM head and the adapters."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.data_owner.experts import Expert, ExpertSpec
from pema_ray.data_owner.generation import Decoding, Generated, Generator, Request
from pema_ray.errors import UserError
from pema_ray.hardware import pick_device
from pema_ray.line import ContextSource, LMHeadBundle


@dataclass(frozen=True)
class GenerationJob:
    """Answers wanted from one system: with an expert, or with the PLM alone."""

    system: str
    keys: list[int]
    requests: list[Request]
    expert: ExpertSpec | None
    decoding: Decoding
    stop: tuple[str, ...] = ()
    explain: bool = False


@dataclass(frozen=True)
class Answer:
    """One generated answer, with the system and key it belongs to and the seconds its batch took, per answer."""

    system: str
    key: int
    generated: Generated
    seconds: float


def generate(
    jobs: Sequence[GenerationJob],
    source_factory: Callable[[], ContextSource],
    bundle: Path,
    batch_size: int,
    actors: int = 1,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    device: str = "auto",
) -> Iterator[list[Answer]]:
    """Answers of all jobs, batch by batch as they are finished. Ray must be running.

    Args:
        device: where each actor keeps the LM head and the adapters.
    """
    import ray
    import ray.data

    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    batches = [batch for job in jobs for batch in _batches(job, batch_size)]
    # Jobs travel once, through the object store; Ray Data's rows are only their numbers.
    held = ray.put(batches)
    work = ray.data.from_items([{"number": n} for n in range(len(batches))], override_num_blocks=len(batches))
    done = work.map_batches(
        _Actor,
        fn_constructor_args=(source_factory, bundle, held, device),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(batches)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor or None,
    )
    for row in done.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield pickle.loads(row["answers"])  # made by our own actors, inside this cluster


def _batches(job: GenerationJob, size: int) -> Iterator[GenerationJob]:
    """Cut a job into batches of prompts of similar length, so that little is padded; beams take room too."""
    if job.decoding.kind == "beam":
        size = max(1, size // job.decoding.beams)
    order = sorted(range(len(job.requests)), key=lambda i: (len(job.requests[i].prompt), job.keys[i]))
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        yield GenerationJob(
            job.system,
            [job.keys[i] for i in chosen],
            [job.requests[i] for i in chosen],
            job.expert,
            job.decoding,
            job.stop,
            job.explain,
        )


class _Actor:
    def __init__(
        self, source_factory: Callable[[], ContextSource], bundle: Path, batches: Any, device: str = "auto"
    ) -> None:
        import ray

        self._experts: dict[ExpertSpec, Expert] = {}
        self._batches: list[GenerationJob] = ray.get(batches) if isinstance(batches, ray.ObjectRef) else batches
        self._refusal = ""
        try:
            loaded = LMHeadBundle.load(bundle)
            self.source, self.card, self.head = source_factory(), loaded.card, loaded.head
            self.tokenizer = loaded.tokenizer()
            self.head.to(pick_device(device))
        except UserError as error:  # told with the first batch: Ray would bury its one line in a traceback
            self._refusal = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,) = (int(n) for n in batch["number"])
        answers: list[Answer] = []
        error = self._refusal
        if not error:
            try:
                answers = self._answer(self._batches[number])
            except UserError as refused:
                error = str(refused)
        return {"answers": [pickle.dumps(answers)], "error": [error]}

    def _answer(self, job: GenerationJob) -> list[Answer]:
        import time

        started = time.perf_counter()
        generator = Generator(
            self.source, self.head, self._expert(job.expert), self._text, self.card.eos_token_ids, job.stop
        )
        generated = generator.generate(job.requests, job.decoding, job.explain, streams=job.keys)
        seconds = (time.perf_counter() - started) / len(generated)
        return [Answer(job.system, key, g, seconds) for key, g in zip(job.keys, generated, strict=True)]

    def _expert(self, wanted: ExpertSpec | None) -> Expert | None:
        if wanted is None:
            return None
        if wanted not in self._experts:
            self._experts[wanted] = wanted.load(self.card, self.head)
        return self._experts[wanted]

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)
