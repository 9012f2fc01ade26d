"""`pema-ray two-owners`: two organisations, two Ray clusters, TLS and a key; the data owner never gets the weights.

The PLM owner starts its service and hands over a key. The data owner runs an experiment against the URL, and serves its
adapter. The data owner's copy of this package has no `plm_owner` folder, so that its processes cannot load a PLM.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Any

import yaml

import pema_ray
from pema_ray.errors import UserError
from pema_ray.pema.config import load_config
from pema_ray.pema.demonstration.organisation import Organisation, self_signed_certificate, two_organisations
from pema_ray.runtime.progress import console

PLM_PORT, _API_PORT = 8443, 8001


def run(config: Path, folder: Path, overrides: Iterable[str] = ()) -> dict[str, Any]:
    """Run the demonstration and print what crossed the line.

    Args:
        config: the experiment; `plm` names the PLM owner's model.
        folder: gets one folder for each organisation.

    Returns:
        The counts of the PLM owner's audit log, the served answer, and the tensors in the data owner's folder.
    """
    started = time.perf_counter()
    folder, plm = folder.absolute(), load_config(config, list(overrides)).plm
    if not plm.is_own:
        raise UserError(f"{plm.label}: in this demonstration, the PLM owner loads the PLM itself: set plm.name.")
    sites = {"data_owner": _site_without_plm_owner(folder)}
    with two_organisations(folder, sites) as (plm_owner, data_owner, separation):
        console.print(f"[bold]two-owners[/]    {separation}", highlight=False)
        service = set_up_plm_owner(plm_owner, plm.model_dump())
        experiment = _set_up_data_owner(data_owner, plm_owner, config.absolute(), overrides)
        answers = partial(_plm_owner_answers, data_owner, experiment)
        with plm_owner.service(answers, "serve", "--topology", str(service), RAY_ADDRESS="local"):
            data_owner.run("quickstart", "--config", str(experiment))
            answer = _serve_and_ask(data_owner, experiment)
    crossed = {**_audit(plm_owner.folder / "audit.jsonl"), "answer": answer}
    crossed |= _received_tensors(data_owner.folder / "run")
    _report(crossed, plm_owner, time.perf_counter() - started)
    return crossed


# ── the PLM owner ───────────────────────────────────────────────────────────────


def set_up_plm_owner(owner: Organisation, plm: dict[str, Any], adaptation: str = "none") -> Path:
    """Write its certificate and the Serve config of its service; returns the config's path.

    Args:
        adaptation: as `PLMOwnerArgs` takes it.
    """
    certificate, private = self_signed_certificate(owner.folder, owner.address)
    arguments = {
        "plm": {**{name: value for name, value in plm.items() if value is not None}, "threads": os.cpu_count() or 1},
        "engine": {"max_tokens": 2048},
        "keys": str(owner.folder / "keys.yaml"),
        "adaptation": adaptation,
        "audit": str(owner.folder / "audit.jsonl"),
        "plm_owner": {"cpus": 0.5},
        "api_cpus": 0.25,
    }
    import_path = "pema_ray.plm_owner.service.application:plm_owner"
    application = {"name": "plm-owner", "import_path": import_path, "args": arguments}
    tls = {"ssl_certfile": str(certificate), "ssl_keyfile": str(private)}
    service = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": owner.address, "port": PLM_PORT, **tls},
        "applications": [{**application, "route_prefix": "/"}],
    }
    path = owner.folder / "service.yaml"
    path.write_text(yaml.safe_dump(service, sort_keys=False))
    return path


def _set_up_data_owner(owner: Organisation, plm_owner: Organisation, config: Path, overrides: Iterable[str]) -> Path:
    """Store what the PLM owner hands over (key and certificate), and write the experiment; returns its path."""
    key = plm_owner.output("serve-key", str(plm_owner.folder / "keys.yaml"), "data owner")
    (owner.folder / "plm_key").write_text(key + "\n")
    (owner.folder / "plm_key").chmod(0o600)
    shutil.copy(plm_owner.folder / "server.crt", owner.folder / "plm.crt")
    experiment = load_config(config, list(overrides)).model_dump(mode="json")
    experiment["run_dir"] = str(owner.folder / "run")
    experiment["plm"] = {
        "url": f"https://{plm_owner.address}:{PLM_PORT}",
        "key_file": str(owner.folder / "plm_key"),
        "ca_file": str(owner.folder / "plm.crt"),
    }
    path = owner.folder / "experiment.yaml"
    path.write_text(yaml.safe_dump(experiment, sort_keys=False))
    return path


# ── the data owner ──────────────────────────────────────────────────────────────


def _site_without_plm_owner(folder: Path) -> Path:
    """A copy of this package without the PLM owner's code."""
    site = folder / "data_owner" / "site"
    shutil.rmtree(site, ignore_errors=True)
    ignored = shutil.ignore_patterns("plm_owner", "plm_owner.py", "__pycache__")
    shutil.copytree(Path(pema_ray.__file__).parent, site / "pema_ray", ignore=ignored)
    # An editable installation would find it in the sources; this module hides it.
    (site / "pema_ray" / "plm_owner.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'pema_ray.plm_owner'\")\n"
    )
    return site


def _serve_and_ask(owner: Organisation, experiment: Path) -> dict[str, str]:
    """Serve the trained adapter and answer one source text of the test split."""
    import pyarrow.parquet as pq

    (row,) = pq.read_table(owner.folder / "run" / "prepare" / "test.parquet").slice(0, 1).to_pylist()
    url = f"http://{owner.address}:{_API_PORT}"
    arguments = ("serve", "--config", str(experiment), "--host", owner.address, "--port", str(_API_PORT))
    with owner.service(lambda: owner.request(f"{url}/healthz"), *arguments):
        body = {"model": load_config(experiment, []).task.name, "source": row["source"], "max_tokens": 64}
        answer = owner.request(f"{url}/v1/completions", json.dumps(body))
    if answer is None:
        raise UserError(f"{owner.name}: its service did not answer; see {owner.folder / 'serve.log'}")
    return {"source": row["source"], "text": json.loads(answer)["choices"][0]["text"]}


def _plm_owner_answers(data_owner: Organisation, experiment: Path) -> str | None:
    """The service's answer to this key, which it gives once the PLM is loaded."""
    plm = load_config(experiment, []).plm
    assert plm.url is not None
    assert plm.key_file is not None
    return data_owner.request(f"{plm.url}/v1/model", "", Path(plm.key_file).read_text().strip(), plm.ca_file or "")


def _received_tensors(run: Path) -> dict[str, Any]:
    """The names of the tensors in the data owner's LM-head bundle, and in its other files."""
    from safetensors import safe_open

    names_by_file: dict[str, list[str]] = {}
    for path in run.rglob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names_by_file[path.relative_to(run).as_posix()] = sorted(file.keys())
    head = names_by_file.pop("export_head/lm_head/lm_head.safetensors")
    return {"lm_head": head, "own_tensors": names_by_file}


# ── what crossed ────────────────────────────────────────────────────────────────


def _audit(path: Path) -> dict[str, Any]:
    """Sums over the PLM owner's audit log."""
    sums: dict[str, Counter[str]] = {}
    for line in path.read_text().splitlines():
        entry = json.loads(line)
        counts = sums.setdefault(entry["what"], Counter())
        counts["requests"] += 1
        for name in ("tokens", "rows", "received_bytes", "sent_bytes"):
            counts[name] += entry.get(name, 0)
    return {"audit": {request: dict(counts) for request, counts in sums.items()}}


def _report(crossed: dict[str, Any], plm_owner: Organisation, seconds: float) -> None:
    from rich.table import Table

    table = Table(title="What crossed the line, by the PLM owner's audit log")
    for column in ("request", "count", "tokens up", "rows down", "MiB up", "MiB down"):
        table.add_column(column, justify="left" if column == "request" else "right")
    for request, counts in crossed["audit"].items():
        sizes = (f"{counts[name] / 2**20:,.2f}" for name in ("received_bytes", "sent_bytes"))
        table.add_row(request, *(f"{counts[name]:,}" for name in ("requests", "tokens", "rows")), *sizes)
    console.print(table)
    console.print(f"Audit log, without contents: {plm_owner.folder / 'audit.jsonl'}", highlight=False)
    console.print(f"The PLM's tensors that the data owner has: {', '.join(crossed['lm_head'])}", highlight=False)
    console.print(f"Served answer: {crossed['answer']['source']!r} → {crossed['answer']['text']!r}", highlight=False)
    console.print(f"{seconds:,.0f} s in all", highlight=False)
