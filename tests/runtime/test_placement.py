"""Actors and workers run on the nodes that `placement` names, and a placement that no node fulfils is refused."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pema_ray.data_owner.decoding import GenerationRequest
from pema_ray.data_owner.decoding.offline import GenerationJob, generate
from pema_ray.data_owner.decoding.unrolling import UnrollingSchedule
from pema_ray.errors import UserError
from pema_ray.memory.build import run_build
from pema_ray.pema.config import load_config
from pema_ray.runtime.cluster import RayConfig
from pema_ray.runtime.cluster import ray_cluster as ours
from pema_ray.runtime.placement import ANYWHERE, PlacementConfig, for_tasks, ray_options
from pema_ray.training.config import TrainingConfig
from pema_ray.training.ray_loop import run_workers
from tests.memory.kit import build, fake_plm

FAR = PlacementConfig(labels={"pool": "far"})
FAST = PlacementConfig(accelerator_type="H100")


@pytest.mark.parametrize(
    ("selector", "accepted"),
    [
        ("gpu", ["gpu"]),
        ("!gpu", ["cpu", "spot", None]),
        ("in(gpu, cpu)", ["gpu", "cpu"]),
        ("in(gpu,spot)", ["gpu", "spot"]),
        ("!in(gpu, cpu)", ["spot", None]),
    ],
)
def test_labels_are_matched_as_ray_matches_them(selector: str, accepted: list[str | None]):
    placement = PlacementConfig(labels={"pool": selector})
    values = ["gpu", "cpu", "spot", None]
    nodes = [{"zone": "a"} if value is None else {"zone": "a", "pool": value} for value in values]
    assert [value for value, labels in zip(values, nodes) if placement.accepts(labels)] == accepted
    assert not PlacementConfig(labels={"pool": selector, "zone": "b"}).accepts({"pool": str(accepted[0]), "zone": "a"})


@pytest.mark.parametrize("selector", ["", "in()", "!!gpu", "in(gpu", "-gpu", "gpu cpu", ">3"])
def test_a_label_that_ray_would_not_understand_is_refused(selector: str):
    with pytest.raises(UserError, match=r"'placement.labels': pool: .* is no value, !value, in\(a, b\) or !in\(a, b\)"):
        load_config(None, [f"placement.labels={{pool: '{selector}'}}"])


def test_a_placement_becomes_rays_own_options():
    constrained = PlacementConfig(accelerator_type="A100", labels={"zone": "a"}, strategy="SPREAD")
    assert ray_options(constrained) == {"accelerator_type": "A100", "label_selector": {"zone": "a"}}
    assert ray_options(for_tasks(constrained)) == {"label_selector": {"zone": "a"}}
    assert ray_options(ANYWHERE) == {}


@pytest.fixture(scope="module")
def far_node(ray_cluster) -> Iterator[str]:
    """The id of a second node with a label and, as Ray believes, an H100."""
    import ray

    before = {node["NodeID"] for node in ray.nodes()}
    command = [str(Path(sys.executable).with_name("ray")), "start", "--block", "--num-cpus=2", "--labels=pool=far"]
    command += [f"--address={ray.get_runtime_context().gcs_address}", "--object-store-memory=80000000"]
    command += ["--resources", json.dumps({"accelerator_type:H100": 1})]
    node = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def added() -> list[str]:
        return [node["NodeID"] for node in ray.nodes() if node["Alive"] and node["NodeID"] not in before]

    try:
        wait_for(lambda: bool(added()))
        yield added()[0]
    finally:
        node.terminate()
        node.wait(60)
        wait_for(lambda: not added())


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def noting(folder: Path, make: Callable) -> Callable:
    """`make`, and a note of the node where it was called; a closure, so that it travels to an actor by value."""

    def noted():
        import ray

        (folder / ray.get_runtime_context().get_node_id()).touch()
        return make()

    return noted


def nodes_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def examples_that_note(folder: Path):
    """Examples that tasks make, with a note of the node where they do; a closure, so that they travel by value."""

    def make():
        import ray

        from pema_ray.tasks import EncodedPair

        class Noting:
            digest, at_hand = "noting", False

            def __len__(self):
                return 10

            def read(self, start, stop):
                (folder / ray.get_runtime_context().get_node_id()).touch()
                return [EncodedPair(i, [10, 20, i + 3], [4, 5]) for i in range(start, stop)]

        return Noting()

    return make()


@pytest.mark.cluster
@pytest.mark.parametrize("placement", [FAR, FAST], ids=["label", "accelerator"])
def test_a_build_runs_where_it_is_placed(placement: PlacementConfig, far_node: str, tmp_path: Path):
    for name in ("actors", "tasks", "memory"):
        (tmp_path / name).mkdir()
    plain = replace(build(tmp_path / "memory"), examples=examples_that_note(tmp_path / "tasks"))
    placed = replace(plain, placement=placement)
    assert run_build(placed, noting(tmp_path / "actors", fake_plm())).rows == 30
    assert nodes_in(tmp_path / "actors") == {far_node}
    if placement is FAR:  # tasks need no accelerator
        assert nodes_in(tmp_path / "tasks") == {far_node}
    assert placed.plan_hash == plain.plan_hash


@pytest.mark.cluster
def test_actors_that_generate_run_where_they_are_placed(far_node: str, tiny_source, tiny_plm_folder, tmp_path: Path):
    from pema_ray.line.plm_config import PLMConfig
    from pema_ray.pema.plm import connector

    bundle = tiny_source("llama").lm_head().save(tmp_path / "lm_head")
    plm = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu")
    (tmp_path / "notes").mkdir()
    connect = noting(tmp_path / "notes", connector(plm, None, 1))
    requests = [GenerationRequest([0, 40, 77], 3, UnrollingSchedule(0.0))] * 3
    job = GenerationJob("plm", [0, 1, 2], requests, None)
    (answers,) = generate([job], connect, bundle, 3, cpus_per_actor=0.5, device="cpu", placement=FAR)
    assert len(answers) == 3 and nodes_in(tmp_path / "notes") == {far_node}


def make_note() -> Callable[[str], dict]:
    """Makes the work of a worker; a closure, so that it travels by value."""

    def note(folder: str) -> dict:
        import ray
        import ray.train

        name = f"{ray.train.get_context().get_world_rank()} {ray.get_runtime_context().get_node_id()}"
        (Path(folder) / name).touch()
        return {}

    return note


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("placement", "nodes"),
    [(PlacementConfig(labels=FAR.labels, accelerator_type="H100"), 1), (PlacementConfig(strategy="STRICT_SPREAD"), 2)],
    ids=["node", "strategy"],
)
def test_training_workers_run_where_they_are_placed(
    placement: PlacementConfig, nodes: int, far_node: str, tmp_path: Path
):
    (tmp_path / "notes").mkdir()
    config = TrainingConfig(cpus_per_worker=0.5, workers=2)
    run_workers(make_note(), str(tmp_path / "notes"), tmp_path / "run", config, placement=placement)
    ranks, where = zip(*(name.split() for name in nodes_in(tmp_path / "notes")))
    assert sorted(ranks) == ["0", "1"]
    assert far_node in where and len(set(where)) == nodes


@pytest.mark.cluster
def test_a_placement_without_a_node_is_refused_with_what_there_is(far_node: str):
    for placement, complaint in (
        ({"labels": {"pool": "near"}}, "no node of the Ray cluster has pool=near; its nodes have pool=far. Correct"),
        ({"labels": {"zone": "a"}}, "no node of the Ray cluster has zone=a; its nodes have none of these. Correct"),
        ({"accelerator_type": "A100"}, "no node of the Ray cluster has A100; its nodes have H100. Correct"),
        (
            {"accelerator_type": "H100", "labels": {"pool": "!far"}},
            "no node of the Ray cluster has H100 and pool=!far; its nodes have H100, pool=far. Correct",
        ),
    ):
        with (
            pytest.raises(UserError, match=f"^placement: {complaint}"),
            ours(RayConfig(), placement=PlacementConfig(**placement)),
        ):
            pass


@pytest.mark.cluster
def test_only_nodes_of_the_placement_count(far_node: str):
    refusal = r"3 workers ask for 3 CPU, the Ray cluster has 2 on nodes with pool=far in all\. Lower"
    with pytest.raises(UserError, match=refusal), ours(RayConfig(), cpus=1, workers=3, placement=FAR):
        pass
    refusal = r"One actor asks for 3 CPU, the Ray cluster has 2 on nodes with H100 in all\. Lower"
    with pytest.raises(UserError, match=refusal), ours(RayConfig(), cpus=3, readers=1, placement=FAST):
        pass
    with ours(RayConfig(), cpus=2, readers=1, placement=FAST):  # Ray Data reads on the other node
        pass


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("strategy", "cpus", "complaint"),
    [
        (
            "STRICT_SPREAD",
            1,
            "3 workers need a node each, the Ray cluster has 2 such. Lower train.workers, or take SPR",
        ),
        ("STRICT_PACK", 2, "3 workers need one node with room for all, the Ray cluster has 0 such"),
    ],
)
def test_a_strategy_that_the_nodes_cannot_fulfil_is_refused(strategy, cpus: int, complaint: str, far_node: str):
    placement = PlacementConfig(strategy=strategy)
    with (
        pytest.raises(UserError, match=f"^placement.strategy={strategy}: {complaint}"),
        ours(RayConfig(), cpus=cpus, workers=3, placement=placement),
    ):
        pass


@pytest.mark.cluster
def test_nodes_that_the_autoscaler_may_start_are_waited_for(ray_cluster, monkeypatch, capsys):
    monkeypatch.setattr("pema_ray.runtime.cluster._largest_resources", lambda: {"CPU": 1000})
    with ours(RayConfig(), cpus=4, placement=PlacementConfig(accelerator_type="B200")):
        said = " ".join(capsys.readouterr().out.split())
    assert "no node of the Ray cluster has B200 now: waiting for its autoscaler" in said
