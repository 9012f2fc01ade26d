"""`pema-ray memory …`: inspect finished memories, make new ones of them, publish them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pema_ray.commands.stages import guarded_command
from pema_ray.errors import UserError
from pema_ray.memory import ExternalMemory, manage, published
from pema_ray.memory.codec import KeyDtype
from pema_ray.memory.manifest import Manifest
from pema_ray.runtime.cluster import running_cluster
from pema_ray.runtime.progress import console, track

app = typer.Typer(
    help="Inspect finished external memories (folders with a manifest.json), and make new ones of them. Nothing is "
    "changed in place; a new memory needs a folder of its own.",
    no_args_is_help=True,
)
Folder = Annotated[Path, typer.Argument(help="A memory's folder, such as runs/quickstart/build_memory/train.")]
New = Annotated[Path, typer.Argument(help="The new memory's folder: missing or empty.")]


@app.command()
@guarded_command
def describe(folder: Folder) -> None:
    """Show a memory's PLM, task, rows, number format and bytes."""
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


@app.command()
@guarded_command
def verify(folder: Folder) -> None:
    """Read every byte of a memory, and list all faults (exit code 2)."""
    manifest = ExternalMemory.open(folder).manifest
    with track("verify", len(manifest.shards), "shards") as bar:
        problems = manage.verify(folder, lambda info: bar.advance(1, info.rows))
    for problem in problems:
        console.print(problem, style="red", highlight=False, markup=False)
    if problems:
        raise UserError(f"{folder}: {len(problems)} faults. Delete damaged shards and run build-memory again.")
    console.print(f"{folder}: {manifest.rows:,} rows in {len(manifest.shards):,} shards, all sound.")


@app.command()
@guarded_command
def convert(
    folder: Folder,
    new: New,
    key_dtype: Annotated[KeyDtype, typer.Option(help="Number format of the new memory's keys.")] = "int8",
) -> None:
    """Write the same rows with keys in another number format."""
    with track("convert", len(ExternalMemory.open(folder).manifest.shards), "shards") as bar:
        manifest = manage.convert(folder, new, key_dtype, lambda info: bar.advance(1, info.rows))
    _print_memory(new, manifest)


@app.command()
@guarded_command
def merge(
    new: New, folders: Annotated[list[Path], typer.Argument(help="Two memories or more, of one PLM and number format.")]
) -> None:
    """Write the rows of several memories of one PLM into a new one."""
    shards = sum(len(ExternalMemory.open(folder).manifest.shards) for folder in folders)
    with track("merge", shards, "shards") as bar:
        manifest = manage.merge(folders, new, lambda info: bar.advance(1, info.rows))
    _print_memory(new, manifest)


@app.command("import")
@guarded_command
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
    from pema_ray.line import LMHeadBundle

    card = LMHeadBundle.load(bundle).card
    with track("import", rows, "rows") as bar:
        manifest = manage.import_memmaps(
            keys, targets, rows, card, new, keys_dtype, targets_dtype, key_dtype,
            lambda info: bar.advance(info.rows, info.rows),
        )  # fmt: skip
    _print_memory(new, manifest)


Address = Annotated[
    str | None, typer.Option(help="The Ray cluster; by default RAY_ADDRESS, or the one running on this machine.")
]


@app.command()
@guarded_command
def publish(
    folder: Folder,
    name: Annotated[str, typer.Argument(help="Its name: jobs open it as ray://<name>.")],
    holders: Annotated[int | None, typer.Option(help="Actors that hold it; by default one for each node.")] = None,
    address: Address = None,
) -> None:
    """Load a memory into the object stores of a running cluster, for later jobs (train.published=<name>)."""
    with running_cluster(address):
        memory = published.publish(folder, name, holders, lambda text: console.print(text, style="yellow"))
        entry = published.describe(memory)
        console.print(
            f"ray://{name}: {len(memory):,} rows, {entry.nbytes / 2**20:,.1f} MiB on {entry.nodes} nodes. "
            f"It stays until the cluster stops, or: pema-ray memory drop {name}"
        )


@app.command("list")
@guarded_command
def list_(address: Address = None) -> None:
    """List the memories published on a cluster, and the use of its object stores."""
    with running_cluster(address):
        table = Table("name", "rows", "MiB", "nodes", "PLM", "folder", box=None)
        for entry in published.list_published():
            m = entry.manifest
            nodes = f"{entry.nodes}" + (f" ({entry.missing} holders do not answer)" if entry.missing else "")
            row = (f"{m.rows:,}", f"{entry.nbytes / 2**20:,.1f}", nodes, m.plm_label, entry.folder)
            table.add_row(entry.name, *row)
        console.print(table)
        state = published.store_state()
        used, capacity, spilled = (n / 2**20 for n in (state.used, state.capacity, state.spilled))
        console.print(f"Object stores: {used:,.0f} of {capacity:,.0f} MiB in use, {spilled:,.0f} MiB spilled so far.")


@app.command()
@guarded_command
def drop(name: Annotated[str, typer.Argument(help="A published memory.")], address: Address = None) -> None:
    """Remove a published memory from the object stores. Its folder stays."""
    with running_cluster(address):
        published.drop(name)
        console.print(f"ray://{name} is dropped.")


def _print_memory(folder: Path, manifest: Manifest) -> None:
    size = sum(shard.bytes for shard in manifest.shards)
    console.print(
        f"{folder}: {manifest.rows:,} rows of {manifest.hidden_size} {manifest.key_dtype}, {size / 2**20:,.1f} MiB."
    )
