"""On which nodes of a Ray cluster actors, tasks and training workers run, in Ray's own options. Knows no stage."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import field_validator

from pema_ray.runtime.settings import Section

_LABEL = r"[A-Za-z0-9](?:[A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?"
_LABEL_SELECTOR = re.compile(rf"(!?)(?:in\(({_LABEL}(?:, ?{_LABEL})*)\)|({_LABEL}))")  # the syntax of Ray's selectors


class PlacementConfig(Section):
    """Nodes for the actors of build-memory and generate and for training workers; none: wherever Ray has room."""

    accelerator_type: str | None = None
    """Accelerator that a node must have, as Ray names it: `H100`, `A100`, `L4` …"""
    labels: dict[str, str] = {}
    """Labels that a node must have (`ray start --labels`): label → `value`, `!value`, `in(a, b)` or `!in(a, b)`."""
    strategy: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Of training workers: pack them on few nodes or spread them over many; `STRICT_`: all on one node, or each on its
    own. Ray Data spreads actors by itself."""

    @field_validator("labels")
    @classmethod
    def _are_selectors(cls, labels: dict[str, str]) -> dict[str, str]:
        for label, value in labels.items():
            if not _LABEL_SELECTOR.fullmatch(value):
                raise ValueError(f"{label}: '{value}' is no value, !value, in(a, b) or !in(a, b)")
        return labels

    def accepts(self, labels: Mapping[str, str]) -> bool:
        """Whether Ray accepts a node with these labels; `!` accepts a node without the label."""
        return all(_accepts(selector, labels.get(label)) for label, selector in self.labels.items())


def _accepts(selector: str, value: str | None) -> bool:
    match = _LABEL_SELECTOR.fullmatch(selector)
    assert match is not None
    excludes, several, one = match.groups()
    return (value in (re.split(", ?", several) if several else [one])) != bool(excludes)


ANYWHERE = PlacementConfig()
"""No constraint."""

_ACCELERATOR = "accelerator_type:"  # before an accelerator's name, in the resources of a node


def for_tasks(placement: PlacementConfig) -> PlacementConfig:
    """The placement of work that needs no accelerator: nodes with the labels."""
    return placement.model_copy(update={"accelerator_type": None})


def ray_options(placement: PlacementConfig) -> dict[str, Any]:
    """Options of Ray's tasks, actors and data sets, and of Ray Train's `ScalingConfig`."""
    options: dict[str, Any] = {"label_selector": dict(placement.labels)} if placement.labels else {}
    if placement.accelerator_type is not None:
        options["accelerator_type"] = placement.accelerator_type
    return options


def matching_nodes(placement: PlacementConfig) -> list[dict[str, float]]:
    """Resources of every living node with the labels and the accelerator. Ray must be running."""
    accelerator = placement.accelerator_type
    return [
        node["Resources"]
        for node in _living_nodes()
        if placement.accepts(node["Labels"])
        and (accelerator is None or _ACCELERATOR + accelerator in node["Resources"])
    ]


def matching_resource(placement: PlacementConfig, resource: str) -> float:
    """The total of a resource (`CPU`, `GPU`) on these nodes."""
    return sum(node.get(resource, 0.0) for node in matching_nodes(placement))


def describe(placement: PlacementConfig) -> str:
    """Required accelerator and labels, for messages; empty without constraint."""
    accelerator = [placement.accelerator_type] if placement.accelerator_type else []
    return " and ".join([*accelerator, *(f"{label}={value}" for label, value in placement.labels.items())])


def describe_nodes(placement: PlacementConfig) -> str:
    """Accelerators of the cluster's nodes, and their values of the labels that `placement` names."""
    values: set[str] = set()
    for node in _living_nodes():
        if placement.accelerator_type:
            values |= {name.removeprefix(_ACCELERATOR) for name in node["Resources"] if name.startswith(_ACCELERATOR)}
        values |= {f"{label}={value}" for label, value in node["Labels"].items() if label in placement.labels}
    return ", ".join(sorted(values)) or "none of these"


def _living_nodes() -> list[dict[str, Any]]:
    import ray

    return [node for node in ray.nodes() if node["Alive"]]
