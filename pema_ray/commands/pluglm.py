"""`pema-ray pluglm …`: pre-train and fine-tune encoders with an editable memory, edit it, and show what it does."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from pema_ray.commands.stages import Overrides, add_stages, guarded_command
from pema_ray.errors import UserError
from pema_ray.experiment.configuration import read_config
from pema_ray.pluglm.config import TextConfig
from pema_ray.pluglm.method import PLUGLM
from pema_ray.runtime.cluster import RayConfig, ray_cluster
from pema_ray.runtime.progress import console, track

if TYPE_CHECKING:
    from pema_ray.pluglm.memory.encoding import DocumentEncoder
    from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

app = typer.Typer(help="PlugLM: an encoder whose knowledge is an editable memory.", no_args_is_help=True)
memory_app = typer.Typer(
    help="Build, read and edit a knowledge memory. Every edit publishes a new version; older ones stay readable.",
    no_args_is_help=True,
)
app.add_typer(memory_app, name="memory")

Folder = Annotated[Path, typer.Argument(help="The memory's folder, such as runs/pluglm/pretrain/memory.")]
Model = Annotated[
    Path,
    typer.Option("--model", "-m", help="Folder of the model that encodes, such as runs/pluglm/pretrain/model."),
]
OnlyOn = Annotated[int | None, typer.Option(help="Edit only if this version is current; by default edit any version.")]


add_stages(app, PLUGLM)


@app.command()
@guarded_command
def retrieval(
    file: Annotated[Path, typer.Argument(help="JSON Lines with 'text', or a text a line.")],
    folder: Annotated[Path, typer.Option("--memory", help="The memory's folder.")],
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder of retrieval.json and retrieval.html.")] = Path("."),
    version: Annotated[int | None, typer.Option(help="By default the current one.")] = None,
) -> None:
    """Which entries, from which source, each memory layer uses for texts: a page and its figures."""
    from pema_ray.pluglm.retrieval import report_of_file

    console.print(f"{report_of_file(file, folder, model, version).write(out)}")


@app.command("edit-key")
@guarded_command
def edit_key() -> None:
    """Make a key for editing a served memory. Prints it once; its hash belongs into serve_configs/pluglm.yaml."""
    from pema_ray.pluglm.service.editor_keys import new_key

    key, digest = new_key()
    console.print(f"key, for the editor: {key}\nhash, for service.editors: {digest}", highlight=False, soft_wrap=True)


@app.command()
@guarded_command
def demo(
    out: Annotated[Path, typer.Option(help="Folder of models, memories and the page.")] = Path("runs/pluglm_demo"),
    seed: Annotated[int, typer.Option(help="Seed of facts, weights and edits.")] = 0,
    faithful: Annotated[bool, typer.Option(help="Train the published objective too, for comparison.")] = True,
    overrides: Overrides = None,
) -> None:
    """Train on synthetic facts, edit the memory, and show that answers follow without a change of weights."""
    from pema_ray.pluglm.demonstration.demo import ROWS, run_demo
    from pema_ray.pluglm.demonstration.learning import FactsSettings
    from pema_ray.runtime.hardware import set_threads

    set_threads(1)  # the matrices are too small for more
    settings = read_config(FactsSettings, None, overrides or [])
    with track("demo", settings.steps * (1 + faithful)) as bar:

        def show(mode: str, point: dict[str, float]) -> None:
            bar.advance(int(point["step"]) % settings.measure_every or settings.measure_every)
            figures = ", ".join(f"{name} {point[name]:.3f}" for name in ("asked", "held_out", "found"))
            console.print(f"[dim]{mode}, step {point['step']:.0f}: {figures}[/]")

        modes = run_demo(out, seed, settings, faithful, show).modes
    table = Table("figure", *(mode.name for mode in modes), "aim", box=None)
    for name, meaning, aim in ROWS:
        values = (getattr(mode.figures, name) for mode in modes)
        table.add_row(meaning, *(f"{value:.3f}" if isinstance(value, float) else str(value) for value in values), aim)
    console.print(table)
    for problem in modes[0].figures.missed:
        console.print(f"not reached: {problem}", style="red", highlight=False)
    console.print(f"{out / 'demo.html'}. The facts are synthetic; the published +3.95 F1 is not claimed.")


@app.command("demo-text")
@guarded_command
def demo_text(
    target: Annotated[
        str | None,
        typer.Option(help="A domain: kjv, web, a dictionary (.dict.dz), or .jsonl, .parquet, .txt. By default FOLDOC."),
    ] = None,
    other: Annotated[str | None, typer.Option(help="The other domain. By default kjv.")] = None,
    out: Annotated[Path, typer.Option(help="Folder of model, memory and figures.")] = Path("runs/pluglm_text"),
    seed: Annotated[int, typer.Option(help="Seed of weights, masks and the choice of held-out texts.")] = 0,
    overrides: Overrides = None,
) -> None:
    """Two domains of real text: how much does a memory of the same domain improve predictions of held-out texts?"""
    from pema_ray.pluglm.demonstration.domains import DomainsSettings, run_domains, table_rows

    domains = [f"{name}={value}" for name, value in (("target", target), ("other", other)) if value is not None]
    settings = read_config(DomainsSettings, None, [*domains, *(overrides or [])])
    with track("demo-text", settings.steps) as bar:
        result = run_domains(
            out, seed, settings, lambda kind, point: bar.advance(note=f"loss {point['loss']:.3f}", rows=0)
        )
    table = Table("memory", box=None)
    for domain in result.domains:
        table.add_column(f"{domain.domain}: loss", justify="right")
        table.add_column("difference from its own [95 %]", justify="right")
    for row in table_rows(result):
        table.add_row(*row)
    console.print(table)
    for domain in result.domains:
        console.print(
            f"{domain.domain}: {domain.sequences:,} held-out sequences of {domain.texts:,} texts, {domain.masked:,} "
            f"masked tokens (by frequency alone: {domain.by_frequency:.4f}); with both memories "
            f"{domain.own_share:.1%} of the retrieved entries and {domain.own_entries:.1%} of all were its own.",
            highlight=False,
        )
    console.print(f"{out / 'demo-text.json'}. Losses are nats per masked token; no memory holds a held-out text.")


# ── the memory ──────────────────────────────────────────────────────────────


@memory_app.command()
@guarded_command
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
    from pema_ray.pluglm.memory import refresh as refreshing
    from pema_ray.pluglm.memory.entries import VECTOR_DTYPES

    if dtype not in VECTOR_DTYPES:
        raise UserError(f"--dtype {dtype}: use {', '.join(VECTOR_DTYPES)}.")
    texts = TextConfig(
        files=tuple(files), text_column=text_column, document_column=document_column, source_column=source_column,
        source=source,
    )  # fmt: skip
    with ray_cluster(RayConfig()):
        built = refreshing.build(folder, texts, _encoder(model), dtype, entries_per_segment, workers)
    _print_version(built)


@memory_app.command()
@guarded_command
def add(
    folder: Folder,
    model: Model,
    text: Annotated[list[str] | None, typer.Option(help="An entry's text; may be given several times.")] = None,
    file: Annotated[
        Path | None, typer.Option(help="Or JSON Lines with text and, optionally, source, document_id, tags.")
    ] = None,
    source: Annotated[str, typer.Option(help="Where the texts come from.")] = "",
    document_id: Annotated[str, typer.Option(help="The document they were cut from.")] = "",
    tag: Annotated[list[str] | None, typer.Option(help="To choose entries by; may be given several times.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Append entries."""
    from pema_ray.pluglm.memory.entries import NewEntry, read_entries

    entries = [NewEntry(line, source, document_id, tuple(tag or ())) for line in text or []]
    entries += read_entries(file) if file else []
    _print_version(_open(folder).add(entries, _encoder(model), only_on))


@memory_app.command()
@guarded_command
def replace(
    folder: Folder,
    entry_id: Annotated[int, typer.Argument(help="Id of the entry to replace.")],
    model: Model,
    text: Annotated[str, typer.Option(help="The new text.")],
    source: Annotated[str | None, typer.Option(help="By default the old entry's; so for the other options.")] = None,
    document_id: Annotated[str | None, typer.Option(help="The document it was cut from.")] = None,
    tag: Annotated[list[str] | None, typer.Option(help="To choose entries by; may be given several times.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Replace an entry; the new one keeps its id."""
    from pema_ray.pluglm.memory.entries import NewEntry

    memory = _open(folder)
    (old,) = memory.entries([entry_id])
    entry = NewEntry(
        text,
        old.source if source is None else source,
        old.document_id if document_id is None else document_id,
        old.tags if tag is None else tuple(tag),
    )
    _print_version(memory.replace(entry_id, entry, _encoder(model), only_on))


@memory_app.command()
@guarded_command
def delete(
    folder: Folder,
    entry_ids: Annotated[list[int], typer.Argument(help="Ids of the entries.")],
    only_on: OnlyOn = None,
) -> None:
    """Delete entries. Older versions keep them."""
    _print_version(_open(folder).delete(entry_ids, only_on))


@memory_app.command()
@guarded_command
def concat(
    folder: Folder,
    others: Annotated[list[Path], typer.Argument(help="Memories of the same encoder.")],
    only_on: OnlyOn = None,
) -> None:
    """Append the entries of other memories."""
    _print_version(_open(folder).concat([_open(other) for other in others], only_on))


@memory_app.command()
@guarded_command
def swap(
    folder: Folder,
    other: Annotated[Path, typer.Argument(help="A memory of the same encoder; the same folder to go back.")],
    version: Annotated[int | None, typer.Option(help="The other memory's version; by default its current one.")] = None,
    only_on: OnlyOn = None,
) -> None:
    """Replace the memory's contents by another memory or by an older version."""
    source = _open(other, version)
    # Going back to an older version must not open the current one, which may be damaged.
    memory = source if other.resolve() == folder.resolve() else _open(folder)
    _print_version(memory.swap(source, only_on))


@memory_app.command()
@guarded_command
def refresh(
    folder: Folder,
    model: Model,
    workers: Annotated[int, typer.Option(help="Actors that encode; 0: this process.")] = 1,
    only_on: OnlyOn = None,
) -> None:
    """Encode all documents again with a model, by Ray Data."""
    from pema_ray.pluglm.memory import refresh as refreshing

    memory, encoder = _open(folder), _encoder(model)
    cluster = ray_cluster(RayConfig()) if workers else nullcontext()
    with cluster, track("refresh", len(memory.manifest.segments), "segments") as bar:
        refreshed = refreshing.refresh(memory, encoder, workers, only_on=only_on, on_done=bar.advance)
    _print_version(refreshed)


@memory_app.command()
@guarded_command
def show(
    folder: Folder,
    version: Annotated[int | None, typer.Option(help="By default the current one.")] = None,
    entries: Annotated[int, typer.Option(help="Show this many entries, from the first.")] = 10,
    entry: Annotated[list[int] | None, typer.Option(help="Show these entries instead; may be repeated.")] = None,
) -> None:
    """Show a memory's encoder, sources, size and history, and some of its entries."""
    memory = _open(folder, version)
    m = memory.manifest
    size = sum(info.bytes for info in m.files.values())
    sources = Counter(memory.table(["source"])["source"].to_pylist())
    facts = Table(show_header=False, box=None)
    for name, value in {
        "version": f"{m.version} ({m.action})",
        "encoder": m.encoder_label,
        "entries": f"{len(memory):,} with keys of {m.query_size} and values of {m.hidden_size} {m.dtype}",
        "sources": ", ".join(f"{source or '(none)'} {count:,}" for source, count in sources.most_common(8)),
        "files": f"{len(m.files):,}, {size / 2**20:,.1f} MiB",
        "history": ", ".join(f"{edit.version} {edit.action}" for edit in list(memory.history())[-8:]),
    }.items():
        facts.add_row(name, value)
    console.print(facts)
    table = Table("id", "source", "document", "tags", "text", box=None)
    for e in memory.entries(entry) if entry else islice(memory.entries(), entries):
        table.add_row(str(e.entry_id), e.source, e.document_id, ", ".join(e.tags), e.text[:120])
    console.print(table)


@memory_app.command()
@guarded_command
def verify(
    folder: Folder, version: Annotated[int | None, typer.Option(help="By default the current one.")] = None
) -> None:
    """Read every byte of a version, and list all faults (exit code 2)."""
    memory = _open(folder, version)
    with track("verify", len(memory.manifest.files), "files") as bar:
        problems = memory.verify(lambda name: bar.advance())
    for problem in problems:
        console.print(problem, style="red", highlight=False, markup=False)
    if problems:
        raise UserError(f"{memory.name}: {len(problems)} faults. Swap back to a sound version, or rebuild it.")
    console.print(f"{memory.name}: {len(memory):,} entries in {len(memory.manifest.files):,} files, all sound.")


@memory_app.command()
@guarded_command
def prune(
    folder: Folder, keep: Annotated[list[int] | None, typer.Option(help="A version to keep; may be repeated.")] = None
) -> None:
    """Delete all versions but the current one and those to keep, and the files that only they need."""
    from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

    pruned = KnowledgeMemory.prune(folder, keep or [])
    console.print(f"{folder}: {len(pruned)} versions pruned.")


def _open(folder: Path, version: int | None = None) -> KnowledgeMemory:
    from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory

    return KnowledgeMemory.open(folder, version)


def _encoder(folder: Path) -> DocumentEncoder:
    from pema_ray.pluglm.memory.encoding import DocumentEncoder
    from pema_ray.pluglm.model.loading import load_pluglm

    return DocumentEncoder(*load_pluglm(folder), name=folder.resolve().name)


def _print_version(memory: KnowledgeMemory) -> None:
    console.print(f"{memory.folder}: version {memory.version} ({memory.manifest.action}), {len(memory):,} entries.")
