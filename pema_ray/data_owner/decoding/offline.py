"""Spreads generation over Ray Data: each actor holds a client of the PLM owner, the LM head and the predictors."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.data_owner.decoding.decoder import Decoder
from pema_ray.data_owner.decoding.predictor import Predictor, PredictorSource
from pema_ray.data_owner.decoding.request import Answer, GenerationAborted, GenerationRequest
from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle, PLMClient
from pema_ray.line.retry import PatientPLM
from pema_ray.runtime.cluster import data_set
from pema_ray.runtime.hardware import compute_elsewhere, compute_thread, pick_device
from pema_ray.runtime.placement import ANYWHERE, PlacementConfig, ray_options

_BATCHES_PER_TASK = 8  # long tasks keep the batch full: new answers replace finished ones
_PATIENCE_SECONDS = 600.0  # that a starting task waits for its PLM owner


@dataclass(frozen=True)
class GenerationJob:
    """All answers of one system.

    Attributes:
        keys: one for each request; they name the answers.
        predictor: used for every adapter name in the requests; None answers with the PLM alone.
    """

    system: str
    keys: list[int]
    requests: list[GenerationRequest]
    predictor: PredictorSource | None


@dataclass(frozen=True)
class SystemAnswer:
    """One answer, with the system and key it belongs to.

    Attributes:
        seconds: of its task, divided by the task's answers; without loading the predictor.
        received_rows: representations received for its task, divided likewise.
    """

    system: str
    key: int
    answer: Answer
    seconds: float
    received_rows: float = 0.0


def generate(
    jobs: Sequence[GenerationJob],
    connect: Callable[[], PLMClient],
    bundle: Path,
    batch_size: int,
    actors: int = 1,
    cpus_per_actor: float = 1,
    gpus_per_actor: float = 0,
    device: str = "auto",
    share_sessions: bool = False,
    threads: int = 0,
    placement: PlacementConfig = ANYWHERE,
) -> Iterator[list[SystemAnswer]]:
    """Answers of all jobs, task by task as they are finished. Ray must be running.

    Args:
        connect: makes a client of the PLM owner in an actor; must be picklable.
        batch_size: sequences that an actor decodes together; every beam is one.
        device: where each actor keeps the LM head and the adapters.
        threads: CPU threads of an actor, shared by the decoder and a PLM in its process; by default its CPUs.
        share_sessions: whether all actors share the session limit of one PLM owner.
        placement: on which nodes the actors run.

    Raises:
        UserError: as the decoder raises it, or the PLM owner did not answer in time.
    """
    import ray
    import ray.data

    sharing = actors if share_sessions else 1
    tasks = [task for job in jobs for task in _split(job, batch_size)]
    # Requests travel once, through the object store; Ray Data's rows are task numbers.
    tasks_ref = ray.put(tasks)
    numbers = data_set([{"number": n} for n in range(len(tasks))], len(tasks))
    results = numbers.map_batches(
        _Actor,
        fn_constructor_args=(connect, bundle, tasks_ref, batch_size, device, threads or cpus_per_actor, sharing),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(actors, len(tasks)), max_tasks_in_flight_per_actor=2),
        num_cpus=cpus_per_actor,
        num_gpus=gpus_per_actor or None,
        **ray_options(placement),
    )
    for row in results.iter_rows():
        if row["error"]:
            raise UserError(row["error"])
        yield pickle.loads(row["answers"])  # made by our own actors, inside this cluster


def _split(job: GenerationJob, batch_size: int) -> Iterator[GenerationJob]:
    """Tasks of prompts of similar length, the longest first, so that no long answer ends a task alone."""
    size = batch_size * _BATCHES_PER_TASK
    order = sorted(range(len(job.requests)), key=lambda i: (-len(job.requests[i].prompt), job.keys[i]))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        keys, requests = [job.keys[i] for i in indices], [job.requests[i] for i in indices]
        yield GenerationJob(job.system, keys, requests, job.predictor)


class _Actor:
    def __init__(
        self,
        connect: Callable[[], PLMClient],
        bundle: Path,
        tasks: Any,
        batch_size: int,
        device: str = "auto",
        cpus: float = 0,
        sharing: int = 1,
    ) -> None:
        import ray

        compute_thread()
        compute_elsewhere()
        self._predictors: dict[PredictorSource, Predictor] = {}
        self._tasks: list[GenerationJob] = ray.get(tasks) if isinstance(tasks, ray.ObjectRef) else tasks
        self._batch_size, self._threads, self._sharing = batch_size, int(cpus), sharing
        self._runner = asyncio.Runner()
        self._refusal = ""
        try:
            loaded = LMHeadBundle.load(bundle)
            self.client, self.card = connect(), loaded.card
            self.tokenizer, self.head = loaded.tokenizer(), loaded.head.to(pick_device(device))
        except UserError as error:  # returned with the first task, as Ray would wrap it in a traceback
            self._refusal = str(error)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        (number,) = (int(n) for n in batch["number"])
        answers: list[SystemAnswer] = []
        error = self._refusal
        if not error:
            try:
                answers = self._runner.run(self._answer(self._tasks[number]))
            except (UserError, GenerationAborted) as refusal:
                error = str(refusal)
        return {"answers": [pickle.dumps(answers)], "error": [error]}

    async def _answer(self, job: GenerationJob) -> list[SystemAnswer]:
        limits = (await PatientPLM(self.client, _PATIENCE_SECONDS).describe()).limits
        sequences = max(1, min(self._batch_size, limits.max_sessions // self._sharing))
        eos = self.card.eos_token_ids
        decoder = Decoder(
            self.client, self.head, self.tokenizer, eos, sequences, True, self._threads, limits.max_sessions
        )
        if job.predictor is not None:
            predictor = self._predictor(job.predictor)
            decoder.predictors = {request.adapter: predictor for request in job.requests if request.adapter}
        started = time.perf_counter()
        try:
            answers = await decoder.generate(job.requests)
        finally:
            await decoder.stop()
        seconds = (time.perf_counter() - started) / len(answers)
        received = decoder.counts["received_rows"] / len(answers)
        return [SystemAnswer(job.system, key, a, seconds, received) for key, a in zip(job.keys, answers, strict=True)]

    def _predictor(self, spec: PredictorSource) -> Predictor:
        if spec not in self._predictors:
            self._predictors[spec] = spec.load(self.card, self.head)
        return self._predictors[spec]
