"""`pema-ray memory …`: look at finished memories, make new ones of them, publish them.

A thin skin over `memory.manage` and `memory.published`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from pema_ray.experiment.process import guarded
from pema_ray.memory.codec import KeyDtype

app = typer.Typer(
    help="Look at finished external memories (folders with a manifest.json), and make new ones of them. Nothing is "
    "changed in place; a new memory needs a folder of its own.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(help="A memory's folder, such as runs/quickstart/build_memory/train.")]
New = Annotated[Path, typer.Argument(help="The new memory's folder: not there yet, or empty.")]


@app.command()
def describe(folder: Folder) -> None:
    """What a memory is: PLM, task, rows, number format, bytes."""

    def work() -> None:
        from rich.table import Table

        from pema_ray.memory import ExternalMemory
        from pema_ray.runtime.progress import console

        manifest = ExternalMemory.open(folder).manifest
        size, prompts = (sum(getattr(shard, name) for shard in manifest.shards) for name in ("bytes", "prompt_rows"))
        table = Table(show_header=False, box=None)
        for name, value in {
            "PLM": manifest.plm_label,
            "task, split": f"{manifest.task}, {manifest.split}",
            "context": manifest.context,
            "rows": f"{manifest.rows:,} of {manifest.hidden_size} {manifest.key_dtype}",
            "rows of prompts": f"{prompts:,}",
            "examples": f"{manifest.examples:,}, {manifest.rejected:,} set aside",
            "shards": f"{len(manifest.shards):,}",
            "bytes": f"{size:,} ({size / max(1, manifest.rows + prompts):,.0f} a row)",
        }.items():
            table.add_row(name, value)
        console.print(table)

    raise typer.Exit(guarded(work))


@app.command()
def verify(folder: Folder) -> None:
    """Read every byte of a memory, and name everything that is wrong with it (exit code 2)."""

    def work() -> None:
        from pema_ray.errors import UserError
        from pema_ray.memory import ExternalMemory, manage
        from pema_ray.runtime.progress import console, track

        manifest = ExternalMemory.open(folder).manifest
        with track("verify", len(manifest.shards), "shards") as bar:
            problems = manage.verify(folder, lambda info: bar.advance(1, info.rows))
        for problem in problems:
            console.print(problem, style="red", highlight=False, markup=False)
        if problems:
            raise UserError(f"{folder}: {len(problems)} faults. Delete damaged shards and run build-memory again.")
        console.print(f"{folder}: {manifest.rows:,} rows in {len(manifest.shards):,} shards, all sound.")

    raise typer.Exit(guarded(work))


@app.command()
def convert(
    folder: Folder,
    new: New,
    key_dtype: Annotated[KeyDtype, typer.Option(help="Number format of the new memory's keys.")] = "int8",
) -> None:
    """Write the same rows with keys in another number format."""

    def work() -> None:
        from pema_ray.memory import ExternalMemory, manage
        from pema_ray.runtime.progress import track

        with track("convert", len(ExternalMemory.open(folder).manifest.shards), "shards") as bar:
            manifest = manage.convert(folder, new, key_dtype, lambda info: bar.advance(1, info.rows))
        _tell(new, manifest)

    raise typer.Exit(guarded(work))


@app.command()
def merge(
    new: New, folders: Annotated[list[Path], typer.Argument(help="Two memories or more, of one PLM and number format.")]
) -> None:
    """Write the rows of several memories of one PLM into a new one."""

    def work() -> None:
        from pema_ray.memory import ExternalMemory, manage
        from pema_ray.runtime.progress import track

        shards = sum(len(ExternalMemory.open(folder).manifest.shards) for folder in folders)
        with track("merge", shards, "shards") as bar:
            manifest = manage.merge(folders, new, lambda info: bar.advance(1, info.rows))
        _tell(new, manifest)

    raise typer.Exit(guarded(work))


@app.command("import")
def import_(
    keys: Annotated[Path, typer.Argument(help="The published code's dstore_keys.npy: raw numbers [N, H].")],
    targets: Annotated[Path, typer.Argument(help="Its dstore_vals.npy: raw token ids [N, 1].")],
    new: New,
    rows: Annotated[int, typer.Option(help="N, the number of rows.")],
    bundle: Annotated[Path, typer.Option(help="The LM-head bundle of the PLM that made them (export-head).")],
    keys_dtype: Annotated[
        str | None, typer.Option(help="Number format of the keys.", show_default="as the file's size says")
    ] = None,
    targets_dtype: Annotated[
        str | None, typer.Option(help="Number format of the token ids.", show_default="as the file's size says")
    ] = None,
    key_dtype: Annotated[KeyDtype, typer.Option(help="Number format of the new memory's keys.")] = "float32",
) -> None:
    """Make a memory of the raw arrays that the published PEMA code leaves."""

    def work() -> None:
        from pema_ray.line import LMHeadBundle
        from pema_ray.memory import manage
        from pema_ray.runtime.progress import track

        card = LMHeadBundle.load(bundle).card
        with track("import", rows, "rows") as bar:
            manifest = manage.import_memmaps(
                keys, targets, rows, card, new, keys_dtype, targets_dtype, key_dtype,
                lambda info: bar.advance(info.rows, info.rows),
            )  # fmt: skip
        _tell(new, manifest)

    raise typer.Exit(guarded(work))


Address = Annotated[
    str | None, typer.Option(help="The Ray cluster; by default RAY_ADDRESS, or the one running on this machine.")
]


@app.command()
def publish(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="What it is called from now on: jobs open it as ray://<name>.")],
    holders: Annotated[int | None, typer.Option(help="Actors that hold it; by default one for each node.")] = None,
    address: Address = None,
) -> None:
    """Put a memory into the object stores of a running cluster, for jobs to come (train.published=<name>)."""

    def work() -> None:
        from pema_ray.memory import published
        from pema_ray.runtime.cluster import running_cluster
        from pema_ray.runtime.progress import console

        with running_cluster(address):
            memory = published.publish(folder, name, holders, lambda text: console.print(text, style="yellow"))
            entry = published.describe(memory)
            console.print(
                f"ray://{name}: {len(memory):,} rows, {entry.nbytes / 2**20:,.1f} MiB on {entry.nodes} nodes. "
                f"It stays until the cluster stops, or: pema-ray memory drop {name}"
            )

    raise typer.Exit(guarded(work))


@app.command("list")
def list_(address: Address = None) -> None:
    """What is published on a cluster, and how full its object stores are."""

    def work() -> None:
        from rich.table import Table

        from pema_ray.memory import published
        from pema_ray.runtime.cluster import running_cluster
        from pema_ray.runtime.progress import console

        with running_cluster(address):
            table = Table("name", "rows", "MiB", "nodes", "PLM", "folder", box=None)
            for entry in published.list_published():
                m = entry.manifest
                where = f"{entry.nodes}" + (f" ({entry.missing} holders do not answer)" if entry.missing else "")
                row = (f"{m.rows:,}", f"{entry.nbytes / 2**20:,.1f}", where, m.plm_label, entry.folder)
                table.add_row(entry.name, *row)
            console.print(table)
            state = published.store_state()
            used, capacity, spilled = (n / 2**20 for n in (state.used, state.capacity, state.spilled))
            console.print(
                f"Object stores: {used:,.0f} of {capacity:,.0f} MiB in use, {spilled:,.0f} MiB spilled so far."
            )

    raise typer.Exit(guarded(work))


@app.command()
def drop(name: Annotated[str, typer.Argument(help="A published memory.")], address: Address = None) -> None:
    """Take a published memory out of the object stores. Its folder stays."""

    def work() -> None:
        from pema_ray.memory import published
        from pema_ray.runtime.cluster import running_cluster
        from pema_ray.runtime.progress import console

        with running_cluster(address):
            published.drop(name)
            console.print(f"ray://{name} is dropped.")

    raise typer.Exit(guarded(work))


def _tell(folder: Path, manifest) -> None:
    from pema_ray.runtime.progress import console

    size = sum(shard.bytes for shard in manifest.shards)
    console.print(
        f"{folder}: {manifest.rows:,} rows of {manifest.hidden_size} {manifest.key_dtype}, {size / 2**20:,.1f} MiB."
    )
