"""A memory in Ray's object store, for jobs to come: published once, read by any job without copying.

Disk is the truth, the object store the fast copy. Holders are detached actors, spread over the nodes; each puts its
shards into its node's object store and keeps them there. One that dies starts again and reads its shards from the
folder, which every node must therefore see. A register, one more actor, knows who holds what.
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
_FOREVER: dict[str, Any] = {
    "namespace": NAMESPACE,
    "lifetime": "detached",
    "num_cpus": 0,
    "max_restarts": -1,
    "max_task_retries": -1,
}
_PATIENCE = 120.0  # seconds that a reader waits for one shard: for a holder that died to be there again and read it
_GLANCE = 10.0  # seconds that `list` waits for a holder


class _Register:
    """What a name stands for."""

    def __init__(self, folder: str, manifest: str, holders: Mapping[str, list[str]]) -> None:
        self._entry = {"folder": folder, "manifest": manifest, "holders": dict(holders)}

    def entry(self) -> dict[str, Any]:
        return self._entry


class _Holder:
    """Keeps some shards of one memory in the object store of its node; one that started again reads as it is asked."""

    def __init__(self, folder: str, shards: Sequence[str]) -> None:
        self._folder, self._shards = folder, list(shards)
        self._memory: ExternalMemory | None = None
        self._held: dict[str, tuple[Any, int]] = {}

    def load(self) -> None:
        """Read all shards now."""
        for name in self._shards:
            self._read(name)

    def ref(self, shard: str) -> list[Any]:
        """A reference to a shard's rows, in a list: a bare one would be fetched on its way."""
        return [self._read(shard)]

    def state(self) -> dict[str, Any]:
        import ray

        where = ray.get_runtime_context().get_node_id()
        return {"node": where, "shards": len(self._held), "bytes": sum(size for _, size in self._held.values())}

    def _read(self, name: str) -> Any:
        import ray

        if name not in self._held:
            self._memory = self._memory or ExternalMemory.open(self._folder)
            (info,) = (info for info in self._memory.manifest.shards if info.name == name)
            rows = self._memory.shard(info, prompts=True)
            self._held[name] = ray.put(rows), rows.nbytes
        return self._held[name][0]


@dataclass(frozen=True, slots=True)
class Published:
    """One published memory, as `pema-ray memory list` shows it."""

    name: str
    folder: str
    manifest: Manifest
    nbytes: int
    """In the object store (or spilled from it)."""
    nodes: int
    holders: int
    missing: int = 0
    """Holders that did not answer: they are being started again, or have no node to live on."""


@dataclass(frozen=True, slots=True)
class StoreState:
    """The cluster's object stores, in bytes."""

    capacity: int
    used: int
    spilled: int
    """Written to disk for want of room, since the cluster started."""


class PublishedMemory(ExternalMemory):
    """A memory whose shards come from the object store, zero-copy and read-only."""

    def __init__(self, name: str, entry: Mapping[str, Any]) -> None:
        super().__init__(Path(entry["folder"]), Manifest.model_validate_json(entry["manifest"]))
        self.name = name
        self._holder_of = {shard: holder for holder, shards in entry["holders"].items() for shard in shards}
        self._actors: dict[str, Any] = {}

    def shard(self, info: ShardInfo, verify: bool = True, prompts: bool = False) -> MemoryRows:
        """One shard's rows. They were checked when their holder read them; `verify` changes nothing.

        Raises:
            UserError: the holder is gone, or does not come back in time.
        """
        import ray
        from ray.exceptions import RayError, RayTaskError

        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                holder = self._holder(self._holder_of[info.name])
                (ref,) = ray.get(holder.ref.remote(info.name), timeout=_PATIENCE)
                rows: MemoryRows = ray.get(ref, timeout=_PATIENCE)
                return rows if prompts else rows.of_targets
            except RayTaskError as error:
                if isinstance(error.cause, UserError):  # a holder that started again found its shard damaged
                    raise error.cause from None
                raise
            except RayError as error:  # it died with its objects: a new one comes, unless it was dropped
                self._actors.clear()
                if time.monotonic() > deadline:
                    raise UserError(
                        f"{SCHEME}{self.name}: shard {info.name} is out of reach for {_PATIENCE:.0f} s "
                        f"({type(error).__name__}). Is a node gone that nothing has replaced? Publish the memory again."
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
        known = ", ".join(_names()) or "none"
        raise NotPublished(
            f"{SCHEME}{name}: no memory of that name is published on this cluster (the one you mean? "
            f"ray.address, --address); there: {known}."
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
        warn: told when the memory will not fit, before anything is loaded.

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
    need, state = sum(info.bytes for info in memory.manifest.shards), store_state()
    free = state.capacity - state.used
    if need > free:
        warn(
            f"{folder} takes {need / 2**20:,.0f} MiB, the object stores have {free / 2**20:,.0f} of "
            f"{state.capacity / 2**20:,.0f} MiB free: Ray will spill the rest to disk, and reading it back is as slow "
            "as the disk. Train on it with train.shuffle=window, which needs only a few shards at a time."
        )
    for leftover in _holders(name):  # of a publication that was killed before its register stood
        ray.kill(ray.get_actor(leftover, NAMESPACE))
    alive = [node for node in ray.nodes() if node["Alive"]]
    count = max(1, min(holders or len(alive), len(memory.manifest.shards)))
    names = [info.name for info in memory.manifest.shards]
    parts = {f"{_HOLDER}{name}/{number}": names[number::count] for number in range(count)}
    actors = []
    try:
        for actor, shards in parts.items():
            options = {**_FOREVER, "name": actor, "scheduling_strategy": "SPREAD"}
            actors.append(_actor(_Holder, options).remote(str(folder), shards))
        ray.get([actor.load.remote() for actor in actors])
        manifest = memory.manifest.model_dump_json()
        register = _actor(_Register, {**_FOREVER, "name": _REGISTER + name}).remote(str(folder), manifest, parts)
        ray.get(register.entry.remote())
    except BaseException as error:
        for actor in actors:
            ray.kill(actor)
        refusal = error.cause if isinstance(error, RayTaskError) else None
        if isinstance(refusal, UserError):
            raise refusal from None
        raise
    return open_published(name)


def drop(name: str) -> None:
    """Take a published memory out of the object stores; its folder stays.

    Raises:
        UserError: no memory of that name is published.
    """
    import ray

    name = name.removeprefix(SCHEME)
    held = _holders(name)
    if not held:
        open_published(name)  # says that there is none
    for actor in [*held, _REGISTER + name]:  # the register last: what is left of a stopped drop can be dropped again
        with suppress(ValueError):  # gone already
            ray.kill(ray.get_actor(actor, NAMESPACE))


def list_published() -> list[Published]:
    """What is published on this cluster, by name; what somebody drops meanwhile is passed over."""
    from ray.exceptions import RayActorError

    memories = []
    for name in _names():
        with suppress(NotPublished, RayActorError):
            memories.append(describe(open_published(name)))
    return memories


def describe(memory: PublishedMemory) -> Published:
    """How a published memory lies in the object stores now."""
    import ray
    from ray.exceptions import RayError

    states, missing = [], 0
    for holder in sorted(set(memory._holder_of.values())):
        try:
            states.append(ray.get(memory._holder(holder).state.remote(), timeout=_GLANCE))
        except RayError:
            missing += 1
    nodes, nbytes = len({state["node"] for state in states}), sum(state["bytes"] for state in states)
    folder, manifest = str(memory.folder), memory.manifest
    return Published(memory.name, folder, manifest, nbytes, nodes, len(states) + missing, missing)


def store_state() -> StoreState:
    """How full the cluster's object stores are, and what they have spilled to disk."""
    import ray
    from ray._private.internal_api import get_memory_info_reply, get_state_from_address

    address = ray.get_runtime_context().gcs_address  # else Ray looks for any cluster on this machine
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
    """Names of all actors that published memories are made of."""
    import ray

    actors: Any = ray.util.list_named_actors(all_namespaces=True)
    return [actor["name"] for actor in actors if actor["namespace"] == NAMESPACE]
