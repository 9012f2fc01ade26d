"""Reports of the entries that each memory layer used, per input and per source, as JSON and as an HTML page.

Shapes: B sequences, K retrieved entries.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined

from pema_ray.errors import UserError
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.model.memory_layer import Retrieved
from pema_ray.runtime.files import atomic_file
from pema_ray.runtime.settings import Section


class Use(Section):
    """One entry that one layer used for one input."""

    entry_id: int
    source: str
    text: str
    score: float
    """Its ranking score."""
    weight: float
    """Its share of the layer's attention over K entries."""


class LayerUse(Section):
    """The entries that one memory layer used, best first; layer 0 is the first memory layer."""

    layer: int
    entries: tuple[Use, ...]


class InputUse(Section):
    """The entries used for one input. A long example is several inputs."""

    name: str
    text: str
    said: str = ""
    """The model's answer."""
    layers: tuple[LayerUse, ...]


class SourceSum(Section):
    """A source's share of a layer's retrieval, over all inputs."""

    layer: int
    source: str
    entries: int
    """Retrieved entries, repetitions included."""
    different: int
    """Distinct entries among them."""
    share: float
    """Share of the attention; the shares of a layer sum to 1."""


class RetrievalReport(Section):
    """A report of one model with one version of a memory."""

    memory: str
    """`<memory> version <n>`."""
    memory_entries: int
    memory_sources: dict[str, int]
    inputs: tuple[InputUse, ...]
    sums: tuple[SourceSum, ...]
    inputs_in_sum: int
    """Number of inputs in `sums`; `inputs` may hold only the first of them."""

    def write(self, folder: Path, name: str = "retrieval") -> Path:
        """Write `<name>.json` and `<name>.html`; returns the page's path."""
        folder.mkdir(parents=True, exist_ok=True)
        for suffix, text in ((".json", self.model_dump_json(indent=1) + "\n"), (".html", render(self))):
            with atomic_file(folder / f"{name}{suffix}") as temporary:
                temporary.write_text(text, encoding="utf-8")
        return folder / f"{name}.html"


@dataclass
class RetrievalLog:
    """Collects the entries that a model retrieves, batch by batch."""

    max_inputs: int = 200
    """Number of inputs reported one by one."""
    _inputs: list[tuple[Any, list[list[tuple[int, float, float]]]]] = field(default_factory=list)
    _sums: dict[tuple[int, int], list[float]] = field(default_factory=lambda: defaultdict(lambda: [0, 0.0]))
    _count: int = 0

    def add(self, retrieved: Sequence[Retrieved] | None, keys: Sequence[Any]) -> None:
        """Add a batch: the entries that its memory layers retrieved, and keys of its B inputs."""
        self._count += len(keys)
        layers = [
            [list(zip(*row)) for row in zip(layer.entry_BK.tolist(), layer.score_BK.tolist(), layer.weight_BK.tolist())]
            for layer in retrieved or ()
        ]
        for row, key in enumerate(keys):
            for number, layer in enumerate(layers):
                for entry, _, weight in layer[row]:
                    total = self._sums[number, entry]
                    total[0], total[1] = total[0] + 1, total[1] + weight
            if len(self._inputs) < self.max_inputs:
                self._inputs.append((key, [layer[row] for layer in layers]))

    def report(
        self, memory: KnowledgeMemory, texts: Mapping[Any, str], answers: Mapping[Any, Any] | None = None
    ) -> RetrievalReport:
        """The report, with texts and sources of the entries.

        Args:
            texts: the inputs' texts, by the keys of `add`.
            answers: the model's answers, by the same keys.
        """
        sources = dict(zip(*memory.table(["source"]).to_pydict().values()))
        shown = sorted({entry for _, layers in self._inputs for layer in layers for entry, _, _ in layer})
        entry_texts = {entry.entry_id: entry.text for entry in memory.entries(shown)} if shown else {}
        inputs = tuple(
            InputUse(
                name=str(key), text=texts[key], said=str((answers or {}).get(key, "")),
                layers=tuple(
                    LayerUse(layer=number, entries=tuple(
                        Use(entry_id=e, source=sources[e], text=entry_texts[e], score=score, weight=weight)
                        for e, score, weight in layer
                    ))
                    for number, layer in enumerate(layers)
                ),
            )
            for key, layers in self._inputs
        )  # fmt: skip
        return RetrievalReport(
            memory=memory.name, memory_entries=len(memory), memory_sources=dict(Counter(sources.values())),
            inputs=inputs, sums=self._summed(sources), inputs_in_sum=self._count,
        )  # fmt: skip

    def _summed(self, sources: Mapping[int, str]) -> tuple[SourceSum, ...]:
        totals: dict[tuple[int, str], list[float]] = defaultdict(lambda: [0, 0, 0.0])
        layer_weights: dict[int, float] = defaultdict(float)
        for (layer, entry), (times, weight) in self._sums.items():
            total = totals[layer, sources[entry]]
            total[0], total[1], total[2] = total[0] + times, total[1] + 1, total[2] + weight
            layer_weights[layer] += weight
        sums = [
            SourceSum(layer=layer, source=source, entries=int(n), different=int(m), share=weight / layer_weights[layer])
            for (layer, source), (n, m, weight) in totals.items()
        ]
        return tuple(sorted(sums, key=lambda row: (row.layer, -row.share, row.source)))


def render(report: RetrievalReport) -> str:
    """The page; it makes no request, and all text in it is escaped."""
    return render_template("pema_ray.pluglm", "retrieval.html.j2", report=report)


def render_template(package: str, name: str, **values: Any) -> str:
    """A package's Jinja template with these values, HTML-escaped."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = files(package).joinpath(name).read_text(encoding="utf-8")
    return environment.from_string(template).render(**values)


def report_of_file(file: Path, folder: Path, model_folder: Path, version: int | None = None) -> RetrievalReport:
    """The report of a model for the texts of a file (JSON Lines with `text`, or one text per line).

    Raises:
        UserError: the file, the model or the memory cannot be read, or they do not belong together.
    """
    from pema_ray.pluglm.model.loading import load_pluglm

    texts = _texts(file)
    model, tokenizer = load_pluglm(model_folder)
    memory = KnowledgeMemory.open(folder, version)
    model.attach(memory.load(model.fingerprint()))
    log = RetrievalLog()
    max_tokens = model.config.document_positions
    with torch.no_grad():
        for start in range(0, len(texts), 32):
            part = texts[start : start + 32]
            inputs = tokenizer(part, padding=True, truncation=True, max_length=max_tokens, return_tensors="pt")
            output = model(inputs["input_ids"], inputs["attention_mask"], output_retrieved=True)
            log.add(output.retrieved, range(start, start + len(part)))
    return log.report(memory, dict(enumerate(texts)))


def _texts(file: Path) -> list[str]:
    try:
        lines = [line for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        texts = [json.loads(line)["text"] for line in lines] if file.suffix == ".jsonl" else lines
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: cannot be read as texts: {error!r}.") from None
    if not texts:
        raise UserError(f"{file}: holds no text.")
    return texts
