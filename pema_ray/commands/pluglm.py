"""`pema-ray pluglm …`: pre-train and fine-tune encoders with an editable memory, edit that memory, show what it does.

A thin skin over `pluglm.pretrain` and `pluglm.knowledge_memory`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pema_ray.commands.stages import Overrides, add_stages
from pema_ray.errors import UserError
from pema_ray.experiment.process import guarded
from pema_ray.pluglm.method import PLUGLM

app = typer.Typer(help="PlugLM: an encoder whose knowledge is an editable memory.", no_args_is_help=True)
memory = typer.Typer(
    help="Build, read and edit a knowledge memory. Every edit publishes a new version; readers of older ones go on.",
    no_args_is_help=True,
)
app.add_typer(memory, name="memory")

Folder = Annotated[Path, typer.Argument(help="The memory's folder, such as runs/pluglm/pretrain/memory.")]
Model = Annotated[
    Path,
    typer.Option("--model", "-m", help="Folder of the model that encodes, such as runs/pluglm/pretrain/model."),
]
OnlyOn = Annotated[
    int | None, typer.Option(help="Edit only if this version is current; by default, whatever version is.")
]


add_stages(app, PLUGLM)


@app.command()
def retrieval(
    file: Annotated[Path, typer.Argument(help="JSON Lines with 'text', or a text a line.")],
    folder: Annotated[Path, typer.Option("--memory", help="The memory's folder.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of retrieval.json and retrieval.html.")] = Path("."),
    version: Annotated[int | None, typer.Option(help="By default the current one.")] = None,
) -> None:
    """Which entries, from which source, each memory layer uses for texts: a page and its figures."""

    def work() -> None:
        from pema_ray.pluglm.retrieval import report_of_file
        from pema_ray.runtime.progress import console

        console.print(f"{report_of_file(file, folder, model, version).write(out)}")

    raise typer.Exit(guarded(work))


@app.command("edit-key")
def edit_key() -> None:
    """Make a key that may edit a served memory: it is shown once, and its hash goes into serve_configs/pluglm.yaml."""

    def work() -> None:
        from pema_ray.pluglm.service.editor_keys import new_key
        from pema_ray.runtime.progress import console

        key, hashed = new_key()
        console.print(
            f"key, for the editor: {key}\nhash, for service.editors: {hashed}", highlight=False, soft_wrap=True
        )

    raise typer.Exit(guarded(work))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder of models, memories and the page.")] = Path("runs/pluglm_demo"),
    seed: Annotated[int, typer.Option(help="Of facts, weights and edits.")] = 0,
    faithful: Annotated[bool, typer.Option(help="Train the published objective too, for comparison.")] = True,
    overrides: Overrides = None,
) -> None:
    """Synthetic facts, learned to be looked up: edit the memory and the answers follow, the weights untouched."""
    raise typer.Exit(guarded(lambda: _demo(out, seed, faithful, overrides or [])))


@app.command("demo-text")
def demo_text(
    target: Annotated[
        str | None,
        typer.Option(help="A domain: kjv, web, a dictionary (.dict.dz), or .jsonl, .parquet, .txt. By default FOLDOC."),
    ] = None,
    other: Annotated[str | None, typer.Option(help="The other domain. By default kjv.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of model, memory and figures.")] = Path("runs/pluglm_text"),
    seed: Annotated[int, typer.Option(help="Of weights, masks and what is held out.")] = 0,
    overrides: Overrides = None,
) -> None:
    """Two domains of real text: what is a memory of the right one worth for predicting held-out texts?"""
    given = [f"{name}={value}" for name, value in (("target", target), ("other", other)) if value is not None]
    raise typer.Exit(guarded(lambda: _demo_text(out, seed, [*given, *(overrides or [])])))


# ── the memory ──────────────────────────────────────────────────────────────


@memory.command()
def build(
    folder: Folder,
    files: Annotated[list[str], typer.Argument(help="Parquet or JSON Lines files, folders or patterns.")],
    model: Model,
    text_column: Annotated[str, typer.Option(help="Column of the texts.")] = "text",
    document_column: Annotated[str | None, typer.Option(help="Column of document ids.")] = None,
    source_column: Annotated[str | None, typer.Option(help="Column that says where a text comes from.")] = None,
    source: Annotated[str, typer.Option(help="Or the one source of all texts.")] = "",
    dtype: Annotated[str, typer.Option(help="float32, float16 or bfloat16.")] = "float16",
    entries_per_segment: Annotated[int, typer.Option(help="Entries in a file.")] = 4096,
    workers: Annotated[int, typer.Option(help="Actors that encode.")] = 1,
) -> None:
    """Make a memory of documents, by Ray Data. Documents longer than the model reads become several entries."""

    def work() -> None:
        from pema_ray.pluglm.config import TextConfig
        from pema_ray.pluglm.memory import refresh as refreshing
        from pema_ray.pluglm.memory.entries import VECTOR_DTYPES
        from pema_ray.runtime.cluster import RayConfig, ray_cluster

        if dtype not in VECTOR_DTYPES:
            raise UserError(f"--dtype {dtype}: use {', '.join(VECTOR_DTYPES)}.")
        texts = TextConfig(
            files=tuple(files), text_column=text_column, document_column=document_column, source_column=source_column,
            source=source,
        )  # fmt: skip
        with ray_cluster(RayConfig()):
            made = refreshing.build(folder, texts, _encoder(model), dtype, entries_per_segment, workers)
        _tell(made)

    raise typer.Exit(guarded(work))


@memory.command()
def add(
    folder: Folder,
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="An entry's text; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Or JSON Lines with text, and source, document_id, tags where wanted.")
    ] = None,
    source: Annotated[str, typer.Option(help="Where the texts come from.")] = "",
    document_id: Annotated[str, typer.Option(help="The document they were cut from.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="To choose entries by; may be given several times.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Put entries behind those that are there."""

    def work() -> None:
        from pema_ray.pluglm.memory.entries import NewEntry, read_entries

        entries = [NewEntry(one, source, document_id, tuple(tag or ())) for one in text or []]
        entries += read_entries(file) if file else []
        _tell(_open(folder).add(entries, _encoder(model), only_on))

    raise typer.Exit(guarded(work))


@memory.command()
def replace(
    folder: Folder,
    entry_id: Annotated[int, typer.Argument(help="Of the entry whose place is taken.")],
    model: Model,
    text: Annotated[str, typer.Option(help="The new text.")],
    source: Annotated[str | None, typer.Option(help="By default the old entry's, as the others.")] = None,
    document_id: Annotated[str | None, typer.Option(help="The document it was cut from.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="To choose entries by; may be given several times.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Put an entry in another's place, under its id."""

    def work() -> None:
        from pema_ray.pluglm.memory.entries import NewEntry

        here = _open(folder)
        (old,) = here.entries([entry_id])
        entry = NewEntry(
            text,
            old.source if source is None else source,
            old.document_id if document_id is None else document_id,
            old.tags if tag is None else tuple(tag),
        )
        _tell(here.replace(entry_id, entry, _encoder(model), only_on))

    raise typer.Exit(guarded(work))


@memory.command()
def delete(
    folder: Folder,
    entry_ids: Annotated[list[int], typer.Argument(help="Of the entries.")],
    only_on: OnlyOn = None,
) -> None:
    """Take entries away. Who reads an older version keeps them."""
    raise typer.Exit(guarded(lambda: _tell(_open(folder).delete(entry_ids, only_on))))


@memory.command()
def concat(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(help="Memories of the same encoder.")],
    only_on: OnlyOn = None,
) -> None:
    """Put other memories' entries behind those that are there."""
    raise typer.Exit(guarded(lambda: _tell(_open(folder).concat([_open(other) for other in others], only_on))))


@memory.command()
def swap(
    folder: Folder,
    other: Annotated[Path, typer.Argument(help="A memory of the same encoder; the same folder to go back.")],
    version: Annotated[int | None, typer.Option(help="Of the other memory; by default its current one.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Put another memory, or an older version, in this one's place."""

    def work() -> None:
        from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

        wanted = KnowledgeMemory.open(other, version)
        # its own older version: the current one may be damaged, which is what this mends
        here = wanted if other.resolve() == folder.resolve() else _open(folder)
        _tell(here.swap(wanted, only_on))

    raise typer.Exit(guarded(work))


@memory.command()
def refresh(
    folder: Folder,
    model: Model,
    workers: Annotated[int, typer.Option(help="Actors that encode; 0: this process.")] = 1,
    only_on: OnlyOn = None,
) -> None:
    """Encode all documents anew with a model, by Ray Data."""

    def work() -> None:
        from contextlib import nullcontext

        from pema_ray.pluglm.memory import refresh as refreshing
        from pema_ray.runtime.cluster import RayConfig, ray_cluster
        from pema_ray.runtime.progress import track

        here, encoder = _open(folder), _encoder(model)
        cluster = ray_cluster(RayConfig()) if workers else nullcontext()
        with cluster, track("refresh", len(here.manifest.segments), "segments") as bar:
            made = refreshing.refresh(here, encoder, workers, only_on=only_on, on_done=bar.advance)
        _tell(made)

    raise typer.Exit(guarded(work))


@memory.command()
def show(
    folder: Folder,
    version: Annotated[int | None, typer.Option(help="By default the current one.")] = None,
    entries: Annotated[int, typer.Option(help="Show the first so many entries.")] = 10,
    entry: Annotated[list[int] | None, typer.Option(help="Show these entries instead; may be repeated.")] = None,
) -> None:
    """What a memory is, where its entries come from, its history, and entries of it."""

    def work() -> None:
        from collections import Counter
        from itertools import islice

        from rich.table import Table

        from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
        from pema_ray.runtime.progress import console

        here = KnowledgeMemory.open(folder, version)
        m = here.manifest
        size = sum(info.bytes for info in m.files.values())
        sources = Counter(here.table(["source"])["source"].to_pylist())
        facts = Table(show_header=False, box=None)
        for name, value in {
            "version": f"{m.version} ({m.action})",
            "encoder": m.encoder_label,
            "entries": f"{len(here):,} with keys of {m.query_size} and values of {m.hidden_size} {m.dtype}",
            "sources": ", ".join(f"{one or '(none)'} {count:,}" for one, count in sources.most_common(8)),
            "files": f"{len(m.files):,}, {size / 2**20:,.1f} MiB",
            "history": ", ".join(f"{one.version} {one.action}" for one in list(here.history())[-8:]),
        }.items():
            facts.add_row(name, value)
        console.print(facts)
        table = Table("id", "source", "document", "tags", "text", box=None)
        shown = here.entries(entry) if entry else islice(here.entries(), entries)
        for one in shown:
            table.add_row(str(one.entry_id), one.source, one.document_id, ", ".join(one.tags), one.text[:120])
        console.print(table)

    raise typer.Exit(guarded(work))


@memory.command()
def verify(
    folder: Folder, version: Annotated[int | None, typer.Option(help="By default the current one.")] = None
) -> None:
    """Read every byte of a version, and name everything that is wrong with it (exit code 2)."""

    def work() -> None:
        from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
        from pema_ray.runtime.progress import console, track

        here = KnowledgeMemory.open(folder, version)
        with track("verify", len(here.manifest.files), "files") as bar:
            problems = here.verify(lambda name: bar.advance())
        for problem in problems:
            console.print(problem, style="red", highlight=False, markup=False)
        if problems:
            raise UserError(f"{here.name}: {len(problems)} faults. Swap back to a sound version, or build it anew.")
        console.print(f"{here.name}: {len(here):,} entries in {len(here.manifest.files):,} files, all sound.")

    raise typer.Exit(guarded(work))


@memory.command()
def prune(
    folder: Folder, keep: Annotated[list[int] | None, typer.Option(help="A version to keep; may be repeated.")] = None
) -> None:
    """Take away versions but the current one and those named, and files that no version left needs."""

    def work() -> None:
        from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
        from pema_ray.runtime.progress import console

        gone = KnowledgeMemory.prune(folder, keep or [])
        console.print(f"{folder}: {len(gone)} versions pruned.")

    raise typer.Exit(guarded(work))


def _open(folder: Path) -> Any:
    from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

    return KnowledgeMemory.open(folder)


def _encoder(folder: Path) -> Any:
    from pema_ray.pluglm.memory.encoding import DocumentEncoder
    from pema_ray.pluglm.model.loading import load_pluglm

    return DocumentEncoder(*load_pluglm(folder), name=folder.resolve().name)


def _tell(made: Any) -> None:
    from pema_ray.runtime.progress import console

    console.print(f"{made.folder}: version {made.version} ({made.manifest.action}), {len(made):,} entries.")


# ── demonstrations ──────────────────────────────────────────────────────────


def _demo(out: Path, seed: int, faithful: bool, overrides: Sequence[str]) -> None:
    from rich.table import Table

    from pema_ray.experiment.configuration import read_config
    from pema_ray.pluglm.demonstration.demo import ROWS, run_demo
    from pema_ray.pluglm.demonstration.learning import FactsSettings
    from pema_ray.runtime.hardware import set_threads
    from pema_ray.runtime.progress import console, track

    set_threads(1)  # its matrices are so small that threads would wait for each other
    settings = read_config(FactsSettings, None, overrides)
    with track("demo", settings.steps * (1 + faithful)) as bar:

        def show(mode: str, point: dict[str, float]) -> None:
            bar.advance(int(point["step"]) % settings.measure_every or settings.measure_every)
            told = ", ".join(f"{name} {point[name]:.3f}" for name in ("asked", "held_out", "found"))
            console.print(f"[dim]{mode}, step {point['step']:.0f}: {told}[/]")

        made = run_demo(out, seed, settings, faithful, show)
    table = Table("figure", *(mode.name for mode in made.modes), "aim", box=None)
    for name, meaning, aim in ROWS:
        values = (getattr(mode.figures, name) for mode in made.modes)
        table.add_row(meaning, *(f"{one:.3f}" if isinstance(one, float) else str(one) for one in values), aim)
    console.print(table)
    for problem in made.modes[0].figures.missed:
        console.print(f"not reached: {problem}", style="red", highlight=False)
    console.print(f"{out / 'demo.html'}. The facts are synthetic; the published +3.95 F1 is not claimed.")


def _demo_text(out: Path, seed: int, overrides: Sequence[str]) -> None:
    from rich.table import Table

    from pema_ray.experiment.configuration import read_config
    from pema_ray.pluglm.demonstration.domains import DomainsSettings, run_domains, table_rows
    from pema_ray.runtime.progress import console, track

    settings = read_config(DomainsSettings, None, overrides)
    with track("demo-text", settings.steps) as bar:
        made = run_domains(
            out, seed, settings, lambda kind, point: bar.advance(note=f"loss {point['loss']:.3f}", rows=0)
        )
    table = Table("memory", box=None)
    for domain in made.domains:
        table.add_column(f"{domain.domain}: loss", justify="right")
        table.add_column("difference from its own [95 %]", justify="right")
    for row in table_rows(made):
        table.add_row(*row)
    console.print(table)
    for domain in made.domains:
        console.print(
            f"{domain.domain}: {domain.sequences:,} held-out sequences of {domain.texts:,} texts, {domain.masked:,} "
            f"masked tokens (by frequency alone: {domain.by_frequency:.4f}); with both memories "
            f"{domain.own_share:.1%} of what was retrieved was its own, {domain.own_entries:.1%} of all entries are.",
            highlight=False,
        )
    console.print(f"{out / 'demo-text.json'}. Losses are nats per masked token; no memory holds a held-out text.")
