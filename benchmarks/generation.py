"""What Gradual Unrolling costs offline: the decoder in process beside transformers' own `generate`.

Both sides answer the same prompts of the demonstration task with the same PLM, greedy, batch by batch. `fixed` answers
have one length, so that both compute equally many tokens. `task` answers end as the task's do: a batch of `generate`
waits for its longest answer, while the decoder admits the next request.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from _harness import Aim, options, reporting_to, run_worker, show, write_results

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.config import GenerateConfig
from pema_ray.data_owner.decoding import Answer, Decoder, GenerationRequest, Predictor
from pema_ray.data_owner.decoding.request_builder import RequestBuilder
from pema_ray.line import LMHeadBundle
from pema_ray.line.plm_config import PLMConfig
from pema_ray.plm_owner import LoadedPLM, load_plm
from pema_ray.plm_owner.engine import EngineConfig, LocalPLM
from pema_ray.runtime.hardware import compute_thread
from pema_ray.tasks import Prompter, load_pairs, load_task

AIMS = {"PEMA / generate, fixed length": Aim(0.95)}


class Bench:
    """A loaded PLM, its engine, and the requests."""

    def __init__(self, o: argparse.Namespace) -> None:
        self.o, self.runner = o, asyncio.Runner()
        plm = PLMConfig(threads=o.threads, device="cuda" if o.gpu else "cpu")
        self.plm: LoadedPLM = compute_thread().submit(load_plm, plm).result()
        self.client = LocalPLM(self.plm, EngineConfig(slots=o.batch_size + 4))
        self.bundle: LMHeadBundle = self.runner.run(self.client.lm_head())
        self.tokenizer = self.bundle.tokenizer()
        card = self.bundle.card
        self.predictor = compute_thread().submit(self._predictor).result()
        task = load_task("bible_modern")
        limits = {"train": 1, "dev": 1, "test": o.answers}
        pairs = load_pairs(task, {}, limits, 0)["test"]
        options = GenerateConfig(lambda_max=0.7, draft=o.draft)
        builder = RequestBuilder(Prompter(self.tokenizer, task, (), chat=True), options, "pema", card.max_positions)
        requests = [builder.build(pair.source, pair.example_id, explain=True) for pair in pairs]
        self.requests = sorted(requests, key=lambda request: -len(request.prompt))  # as the stages order them

    def _predictor(self) -> Predictor:
        card = self.bundle.card
        torch.manual_seed(0)
        adapter = PemaAdapter(AdapterConfig(card.hidden_size, 512, card.name, card.fingerprint))
        adapter.start_from_reconstruction(*_identity(512, card.hidden_size))
        return Predictor(self.bundle.head, adapter.eval())

    def decode(self, requests: list[GenerationRequest], eos: tuple[int, ...]) -> int:
        """Tokens of all answers, by the decoder."""

        async def work() -> list[Answer]:
            decoder = Decoder(
                self.client, self.bundle.head, self.tokenizer, eos, self.o.batch_size, True, self.o.threads
            )
            decoder.predictors = {"pema": self.predictor}
            try:
                return await decoder.generate(requests)
            finally:
                await decoder.stop()

        return sum(len(answer.tokens) for answer in self.runner.run(work()))

    def plain(self, requests: list[GenerationRequest], fixed: bool) -> int:
        """Tokens of all answers, by transformers' `generate` with left padding."""
        return compute_thread().submit(self._plain, requests, fixed).result()

    def _plain(self, requests: list[GenerationRequest], fixed: bool) -> int:
        pad, count = self.bundle.card.eos_token_ids[0], 0
        for start in range(0, len(requests), self.o.batch_size):
            batch = requests[start : start + self.o.batch_size]
            longest = max(len(request.prompt) for request in batch)
            ids = torch.full((len(batch), longest), pad)
            mask = torch.zeros_like(ids)
            for row, request in enumerate(batch):
                ids[row, longest - len(request.prompt) :] = torch.tensor(list(request.prompt))
                mask[row, longest - len(request.prompt) :] = 1
            max_tokens = max(request.max_new_tokens for request in batch)
            ends: dict[str, Any] = {"min_new_tokens": max_tokens} if fixed else {}
            with torch.inference_mode():
                out = self.plm.model.generate(
                    input_ids=ids.to(self.plm.device), attention_mask=mask.to(self.plm.device), do_sample=False,
                    max_new_tokens=max_tokens, pad_token_id=pad, **ends,
                )  # fmt: skip
            new = out[:, longest:]
            count += new.numel() if fixed else int((new != pad).sum()) + len(batch)
        return count


def _identity(rank: int, hidden: int) -> tuple[torch.Tensor, torch.Tensor]:
    directions = torch.linalg.qr(torch.randn(hidden, rank))[0]
    return directions.T.contiguous(), directions


def measure(o: argparse.Namespace) -> dict[str, Any]:
    """Tokens per second of both sides, in turns."""
    from dataclasses import replace

    bench = Bench(o)
    eos = bench.bundle.card.eos_token_ids
    fixed = [replace(request, max_new_tokens=o.tokens, stop=(), explain=False) for request in bench.requests]
    sides: dict[str, Callable[[], int]] = {
        "PEMA, fixed": lambda: bench.decode(fixed, ()),
        "generate, fixed": lambda: bench.plain(fixed, True),
        "PEMA, task": lambda: bench.decode(bench.requests, eos),
        "generate, task": lambda: bench.plain(bench.requests, False),
    }
    rates: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(o.rounds + 1):
        for name, side in sides.items():
            started = time.perf_counter()
            tokens = side()
            if turn:  # the first warms up
                rates[name].append(tokens / (time.perf_counter() - started))
    return {"tokens_per_second": {name: statistics.median(values) for name, values in rates.items()}, "all": rates}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--answers", type=int, default=200)
    parser.add_argument("--tokens", type=int, default=32, help="of every answer of fixed length")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--draft", type=int, default=0, help="longest draft of the decoder")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--generator", type=float, help="tokens/s of the former Generator on the task, to be kept")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    o = parser.parse_args()
    if o.smoke:
        o.answers, o.tokens, o.batch_size, o.rounds = 6, 4, 4, 1
    if o.out is not None:
        with reporting_to(o.out) as report:
            report |= measure(o)
        return
    arguments = [f"--{name}={getattr(o, name.replace('-', '_'))}" for name in
                 ("answers", "tokens", "batch-size", "draft", "rounds", "threads")]  # fmt: skip
    result = run_worker(__file__, [*arguments, *(["--gpu"] if o.gpu else [])]) | {"smoke": o.smoke}
    rates = result["tokens_per_second"]
    ratios = {
        "PEMA / generate, fixed length": rates["PEMA, fixed"] / rates["generate, fixed"],
        "PEMA / generate, on the task": rates["PEMA, task"] / rates["generate, task"],
    }
    aims = dict(AIMS)
    previous = o.generator or _previous(o.results_dir)
    if previous:
        ratios["decoder / former Generator, on the task"] = rates["PEMA, task"] / previous
        aims["decoder / former Generator, on the task"] = Aim(1.2)
        result["former_generator_tokens_per_second"] = previous
    show("generation offline", ratios, aims)
    write_results("generation", ratios, aims, result, o.results_dir)


def _previous(folder: Path) -> float | None:
    """The former Generator's last measured rate, on the machine that the results name."""
    path = folder / "generation.json"
    return json.loads(path.read_text())["figures"].get("former_generator_tokens_per_second") if path.exists() else None


if __name__ == "__main__":
    main()
