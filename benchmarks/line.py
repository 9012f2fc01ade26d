"""What the line between the owners costs: how long a step takes while another owner extracts representations."""

from __future__ import annotations

import asyncio
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median, quantiles

from _harness import Aim, device_of, options, show, write_results
from build_memory import PACKAGED, tiny_model

from pema_ray.config import PLMConfig
from pema_ray.line import ExtractBatch, Step, Stepped
from pema_ray.plm_owner import EngineConfig, LocalPLM

NAME = "line"
AIMS: dict[str, Aim] = {"step_with_32_extractions_over_with_1": Aim(1.5, at_most=True)}


async def step_latency(
    plm: PLMConfig, extractions: Sequence[int] = (0, 1, 8, 32), steps: int = 40, sequences: int = 32, tokens: int = 128
) -> dict[str, dict[str, float]]:
    """Milliseconds of a step of one token, by how many extractions of another owner are under way.

    Args:
        sequences, tokens: of each extraction; as soon as one is answered, the next is sent.
    """
    client = LocalPLM(plm, EngineConfig(slots=4, max_tokens=512))
    engine = await client.engine()
    batch = ExtractBatch([[5 + i % 90] * tokens for i in range(sequences)], [0] * sequences)
    found: dict[str, dict[str, float]] = {}

    async def extract_for_ever() -> None:
        while True:
            await engine.extract("another", batch, timeout=1e6)

    for count in extractions:
        running = [asyncio.create_task(extract_for_ever()) for _ in range(count)]
        await engine.step("one", [Step("it", 0, [5] * 200)])
        seconds = []
        for _ in range(steps):
            started = time.perf_counter()
            (outcome,) = await engine.step("one", [Step("it", 200, [6])])
            seconds.append(time.perf_counter() - started)
            assert isinstance(outcome, Stepped)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        found[str(count)] = {"median": 1e3 * median(seconds), "90th percentile": 1e3 * quantiles(seconds, n=10)[-1]}
    await client.end()
    return found


def main() -> None:
    parser = options("Milliseconds of a step beside extractions of another owner.")
    parser.add_argument("--model", default=PACKAGED, help="as plm.name in a configuration")
    parser.add_argument("--steps", type=int, default=40)
    o = parser.parse_args()
    device = device_of(o)
    with tempfile.TemporaryDirectory(prefix="line") as scratch:
        name = tiny_model(Path(scratch)) if o.smoke else o.model
        plm = PLMConfig(name=name, device=str(device), threads=o.threads)
        latency = asyncio.run(step_latency(plm, steps=3 if o.smoke else o.steps))
    ratios = {"step_with_32_extractions_over_with_1": latency["32"]["median"] / latency["1"]["median"]}
    figures = {
        "step_milliseconds": latency,
        "device": str(device),
        "smoke": o.smoke,
        "aims": {name: str(aim) for name, aim in AIMS.items()},
    }
    write_results(NAME, ratios, figures, o.results_dir)
    show("The line", ratios, AIMS)


if __name__ == "__main__":
    main()
