"""What a run reads from outside its folder, identified by content. Knows no method and no Ray."""

from __future__ import annotations

import hashlib
import json
from functools import cached_property
from pathlib import Path
from typing import Any

from pema_ray.runtime.files import atomic_file, sha256_of


class InputFiles:
    """Checksums of files and folders. A file is read again when its size or its time has changed.

    `<run folder>/inputs.json` keeps size, time (ns) and sha256 of each. A file that is gone counts as it was when the
    last stage finished.
    """

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "inputs.json"
        self._is_saved = True

    @cached_property
    def _recorded(self) -> dict[str, dict[str, Any]]:
        try:
            return json.loads(self._path.read_text())
        except (OSError, ValueError):
            return {}

    def sha256(self, path: Path | str) -> str | None:
        """Of a file, or of a folder's file names and their checksums; None: it is gone and was never seen."""
        path = Path(path).absolute()
        return self._of_folder(path) if path.is_dir() else self._of_file(path)

    def _of_folder(self, folder: Path) -> str:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        lines = [f"{self._of_file(folder / name)} {name}\n" for name in names]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    def _of_file(self, path: Path) -> str | None:
        recorded = self._recorded.get(str(path), {})
        if not path.is_file():
            return recorded.get("sha256")
        stat = path.stat()
        seen = {"size": stat.st_size, "time": stat.st_mtime_ns}
        if recorded.items() >= seen.items() and "sha256" in recorded:
            return recorded["sha256"]
        self._recorded[str(path)] = {**seen, "sha256": sha256_of(path)}
        self._is_saved = False
        return self._recorded[str(path)]["sha256"]

    def save(self) -> None:
        """Keep what was computed since the last time."""
        if not self._is_saved:
            with atomic_file(self._path) as temporary:
                temporary.write_text(json.dumps(self._recorded, indent=1) + "\n")
            self._is_saved = True
