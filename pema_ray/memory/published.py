"""A memory in Ray's object store: published once, read by any later job without copying.

The files on disk are authoritative, the object store is a fast copy. Holders are detached actors, spread over the
nodes; each keeps its shards in its node's object store. A holder that dies restarts and reads its shards from the
folder, which every node must therefore see. One more actor, the register, maps shards to holders.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pema_ray.errors import UserError
from pema_ray.line import ModelCard
from pema_ray.memory.external_memory import ExternalMemory
from pema_ray.memory.manifest import Manifest, ShardInfo
from pema_ray.memory.shards import MemoryRows

NAMESPACE = "pema-ray"
SCHEME = "ray://"
_REGISTER, _HOLDER = "memory/", "holder/"
_DETACHED: dict[str, Any] = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "num_cpus": 0,
    "max_restarts": -1,
    "max_task_retries": -1,
}
_SHARD_TIMEOUT = 120.0  # seconds that a reader waits for one shard: a holder that died has to restart and read it
_STATE_TIMEOUT = 10.0  # seconds that `list` waits for a holder


class _Register:
    """The folder, manifest and holders of a published name."""

    def __init__(self, folder: str, manifest: str, holders: Mapping[str, list[str]]) -> None:
        self._entry = {"folder": folder, "manifest": manifest, "holders": dict(holders)}

    def entry(self) -> dict[str, Any]:
        return self._entry


class _Holder:
    """Keeps some shards of one memory in the object store of its node; after a restart, reads them on demand."""

    def __init__(self, folder: str, shards: Sequence[str]) -> None:
        self._folder, self._shards = folder, list(shards)
        self._memory: ExternalMemory | None = None
        self._loaded: dict[str, tuple[Any, int]] = {}  # shard → reference and bytes

    def load(self) -> None:
        """Read all shards now."""
        for name in self._shards:
            self._read(name)

    def ref(self, shard: str) -> list[Any]:
        """A reference to a shard's rows, in a list: Ray would replace a bare one by its value."""
        return [self._read(shard)]

    def state(self) -> dict[str, Any]:
        import ray

        node = ray.get_runtime_context().get_node_id()
        return {"node": node, "shards": len(self._loaded), "bytes": sum(size for _, size in self._loaded.values())}

    def _read(self, name: str) -> Any:
        import ray

        if name not in self._loaded:
            self._memory = self._memory or ExternalMemory.open(self._folder)
            (info,) = (info for info in self._memory.manifest.shards if info.name == name)
            rows = self._memory.shard(info, prompts=True)
            self._loaded[name] = ray.put(rows), rows.nbytes
        return self._loaded[name][0]


@dataclass(frozen=True, slots=True)
class Published:
    """One published memory, for `pema-ray memory list`."""

    name: str
    folder: str
    manifest: Manifest
    nbytes: int
    """In the object store (or spilled from it)."""
    nodes: int
    holders: int
    missing: int = 0
    """Holders that did not answer: they are restarting, or have no node."""


@dataclass(frozen=True, slots=True)
class StoreState:
    """The cluster's object stores, in bytes."""

    capacity: int
    used: int
    spilled: int
    """Written to disk for lack of room, since the cluster started."""


class PublishedMemory(ExternalMemory):
    """A memory whose shards come from the object store, zero-copy and read-only."""

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        super().__init__(Path(entry["folder"]), Manifest.model_validate_json(entry["manifest"]))
        self.name = name
        self._holder_of = {shard: holder for holder, shards in entry["holders"].items() for shard in shards}
        self._actors: dict[str, Any] = {}

    def shard(self, info: ShardInfo, verify: bool = True, prompts: bool = False) -> MemoryRows:
        """One shard's rows. Their holder checked them when it read them; `verify` has no effect.

        Raises:
            UserError: the holder was dropped, or does not restart in time.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        deadline = time.monotonic() + _SHARD_TIMEOUT
        while True:
            try:
                holder = self._holder(self._holder_of[info.name])
                (ref,) = ray.get(holder.ref.remote(info.name), timeout=_SHARD_TIMEOUT)
                rows: MemoryRows = ray.get(ref, timeout=_SHARD_TIMEOUT)
                return rows if prompts else rows.of_targets
            except RayTaskError as error:
                if isinstance(error.cause, UserError):  # a restarted holder found its shard damaged
                    raise error.cause from None
                raise
            except RayError as error:  # it died with its objects, and restarts unless it was dropped
                self._actors.clear()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{SCHEME}{self.name}: shard {info.name} is out of reach for {_SHARD_TIMEOUT:.0f} s "
                        f"({type(error).__name__}). Was a node lost and not replaced? Publish the memory again."
                    ) from None
                time.sleep(0.5)

    def _holder(self, name: str) -> Any:
        import ray

        if name not in self._actors:
            try:
                self._actors[name] = ray.get_actor(name, NAMESPACE)
            except ValueError:
                raise UserError(f"{SCHEME}{self.name}: has been dropped. Publish it again.") from None
        return self._actors[name]


class NotPublished(UserError):
    """No memory of this name is published on the cluster."""


def open_published(name: str, card: ModelCard | None = None) -> PublishedMemory:
    """The memory that was published under `name` on the cluster this process is connected to.

    Raises:
        NotPublished: there is no such name.
        UserError: Ray is not running here.
        FingerprintMismatch: it was built by another PLM than `card`'s.
    """
    import ray

    name = name.removeprefix(SCHEME)
    if not ray.is_initialized():
        raise UserError(f"{SCHEME}{name}: connect to the cluster first (ray.address, or submit as a job).")
    try:
        register = ray.get_actor(_REGISTER + name, NAMESPACE)
    except ValueError:
        published = ", ".join(_names()) or "none"
        raise NotPublished(
            f"{SCHEME}{name}: no memory of that name is published on this cluster (is it the right one? "
            f"ray.address, --address); there: {published}."
        ) from None
    entry: Any = ray.get(register.entry.remote())
    memory = PublishedMemory(name, entry)
    memory.check_owner(card)
    return memory


def publish(
    folder: str | Path, name: str, holders: int | None = None, warn: Callable[[str], None] = lambda text: None
) -> PublishedMemory:
    """Put a finished memory into the cluster's object stores, under a name, until it is dropped.

    Args:
        holders: actors that hold it; by default one for each node.
        warn: called, before anything is loaded, if the memory will not fit.

    Raises:
        UserError: the name is taken, or a shard is damaged.
    """
    import ray
    from ray.exceptions import RayTaskError

    folder = Path(folder).resolve()
    memory = ExternalMemory.open(folder)
    if not name or "/" in name:
        raise UserError(f"'{name}' cannot name a published memory: use letters, digits and -_. .")
    if name in _names():
        raise UserError(f"{SCHEME}{name}: is published already. Drop it first, or choose another name.")
    required, state = sum(info.bytes for info in memory.manifest.shards), store_state()
    free = state.capacity - state.used
    if required > free:
        warn(
            f"{folder} takes {required / 2**20:,.0f} MiB, the object stores have {free / 2**20:,.0f} of "
            f"{state.capacity / 2**20:,.0f} MiB free: Ray will spill the rest to disk, and reading it back is as slow "
            "as the disk. Train on it with train.shuffle=window, which needs only a few shards at a time."
        )
    for holder in _holders(name):  # of a publication that was killed before it made its register
        ray.kill(ray.get_actor(holder, NAMESPACE))
    living_nodes = sum(node["Alive"] for node in ray.nodes())
    count = max(1, min(holders or living_nodes, len(memory.manifest.shards)))
    names = [info.name for info in memory.manifest.shards]
    parts = {f"{_HOLDER}{name}/{number}": names[number::count] for number in range(count)}
    actors = []
    try:
        for actor, shards in parts.items():
            options = {**_DETACHED, "name": actor, "scheduling_strategy": "SPREAD"}
            actors.append(_actor(_Holder, options).remote(str(folder), shards))
        ray.get([actor.load.remote() for actor in actors])
        manifest = memory.manifest.model_dump_json()
        register = _actor(_Register, {**_DETACHED, "name": _REGISTER + name}).remote(str(folder), manifest, parts)
        ray.get(register.entry.remote())
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        if isinstance(error, RayTaskError) and isinstance(error.cause, UserError):
            raise error.cause from None
        raise
    return open_published(name)


def drop(name: str) -> None:
    """Take a published memory out of the object stores; its folder stays.

    Raises:
        UserError: no memory of that name is published.
    """
    import ray

    name = name.removeprefix(SCHEME)
    holders = _holders(name)
    if not holders:
        open_published(name)  # raises that there is none
    for actor in [*holders, _REGISTER + name]:  # the register last: an interrupted drop can then be repeated
        with suppress(ValueError):  # no such actor any more
            ray.kill(ray.get_actor(actor, NAMESPACE))


def list_published() -> list[Published]:
    """The memories published on this cluster, by name, without those that are dropped meanwhile."""
    from ray.exceptions import RayActorError

    memories = []
    for name in _names():
        with suppress(NotPublished, RayActorError):
            memories.append(describe(open_published(name)))
    return memories


def describe(memory: PublishedMemory) -> Published:
    """Size, nodes and holders of a published memory now."""
    import ray
    from ray.exceptions import RayError

    states, missing = [], 0
    for holder in sorted(set(memory._holder_of.values())):
        try:
            states.append(ray.get(memory._holder(holder).state.remote(), timeout=_STATE_TIMEOUT))
        except RayError:
            missing += 1
    nodes, nbytes = len({state["node"] for state in states}), sum(state["bytes"] for state in states)
    folder, manifest = str(memory.folder), memory.manifest
    return Published(memory.name, folder, manifest, nbytes, nodes, len(states) + missing, missing)


def store_state() -> StoreState:
    """Capacity, use and spilled bytes of the cluster's object stores."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address  # else Ray takes any cluster on this machine
    stats = get_memory_info_reply(get_state_from_address(address)).store_stats
    return StoreState(stats.object_store_bytes_avail, stats.object_store_bytes_used, stats.spilled_bytes_total)


def _actor(kind: type, options: Mapping[str, Any]) -> Any:
    import ray

    return ray.remote(kind).options(**options)


def _names() -> list[str]:
    return sorted(name.removeprefix(_REGISTER) for name in _actors() if name.startswith(_REGISTER))


def _holders(name: str) -> list[str]:
    return sorted(actor for actor in _actors() if actor.startswith(f"{_HOLDER}{name}/"))


def _actors() -> list[str]:
    """Names of all holders and registers."""
    import ray

    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
