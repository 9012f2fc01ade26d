"""SIGKILL at seeded moments, of every kind of process: no row is lost, none comes twice, no manifest is torn.

Together these tests kill some 20 times, and with the slow ones more; each asserts that its kills did strike a living
process. `make soak` runs them ten times over, at other moments every time.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from pema_ray.data_owner.adapter.pema import AdapterConfig, PemaAdapter
from pema_ray.data_owner.training.config import TrainConfig
from pema_ray.data_owner.training.ray_training import AdapterTrainingJob, fit
from pema_ray.data_owner.training.trainer import AdapterHistory, AdapterTrainer
from pema_ray.errors import UserError
from pema_ray.line import LMHeadBundle
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import run_build
from pema_ray.memory.manage import verify
from pema_ray.memory.specification import MemoryBuild
from pema_ray.tasks import EncodedPair
from tests.data_owner.conftest import make_rows  # noqa: F401  a fixture
from tests.data_owner.training.test_ray_training import write_memory
from tests.memory import kit
from tests.memory.kit import CARD, contents, fake_plm
from tests.training_kit import train

pytestmark = pytest.mark.cluster
MANY = pytest.param(4, marks=pytest.mark.slow)  # as often in one run
EXAMPLES = [EncodedPair(i, [10, 20, 30 + i], [4 + j for j in range(1 + i % 4)]) for i in range(60)]


def build(folder: Path, **changes) -> MemoryBuild:
    return kit.build(folder, EXAMPLES, **{"actors": 2, **changes})


@pytest.fixture(autouse=True)
def soak_round(request: pytest.FixtureRequest) -> Iterator[None]:
    """Other moments in every round of a soak."""
    global _round
    _round = getattr(request, "param", 0)
    yield
    _round = 0


_round = 0


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """With `--soak N`, every test runs N times."""
    if rounds := metafunc.config.getoption("--soak"):
        metafunc.parametrize("soak_round", range(rounds), indirect=True)


def moments(seed: int) -> random.Random:
    """Draws the moments of a test's kills."""
    return random.Random(seed + 1000 * _round)


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_build(build(folder), fake_plm())
    return contents(folder)


def assert_whole(folder: Path, undisturbed: dict[str, bytes]) -> None:
    """Byte for byte what an undisturbed build leaves, and in itself without fault."""
    assert contents(folder) == undisturbed
    assert verify(folder) == []
    rows = ExternalMemory.open(folder, CARD).load()
    assert len(rows) == sum(len(e.target) + 1 for e in EXAMPLES)
    assert len(set(zip(rows.example_id.tolist(), rows.position.tolist()))) == len(rows)


def workers(title: str) -> list[psutil.Process]:
    """This test run's Ray workers of a title, without those of other clusters on the machine."""
    processes = []
    for process in psutil.Process().children(recursive=True):
        try:
            if process.cmdline() and process.cmdline()[0].startswith(f"ray::{title}"):
                processes.append(process)
        except psutil.Error:
            continue
    return processes


@contextmanager
def striking(strike: Callable[[list[int], threading.Event], None]) -> Iterator[list[int]]:
    """During the block, runs `strike(killed_pids, over)` in a thread; `over` ends it."""
    killed_pids: list[int] = []
    over = threading.Event()
    thread = threading.Thread(target=strike, args=(killed_pids, over), daemon=True)
    thread.start()
    try:
        yield killed_pids
    finally:
        over.set()
        thread.join()


def killing(title: str, seed: int, kills: int, pause: tuple[float, float], after: Path | None = None):
    """During the block, kills workers of a title at random moments, at most `kills` times, once `after` exists."""
    draw = moments(seed)

    def strike(killed_pids: list[int], over: threading.Event) -> None:
        while len(killed_pids) < kills and not over.wait(draw.uniform(*pause)):
            if after is not None and not after.exists():
                continue
            candidates = [process for process in workers(title) if process.pid not in killed_pids]
            if candidates:
                victim = draw.choice(sorted(candidates, key=lambda process: process.pid))
                with suppress(psutil.Error):  # it ended by itself: no kill
                    victim.send_signal(signal.SIGKILL)
                    killed_pids.append(victim.pid)

    return striking(strike)


@pytest.mark.parametrize("seed", [1, 2])
def test_data_actors_are_killed(undisturbed, tmp_path: Path, seed: int):
    with killing("MapWorker", seed, 5, (0.2, 0.6)) as killed_pids:
        run_build(build(tmp_path), fake_plm(seconds=0.3))
    assert len(killed_pids) >= 4
    assert_whole(tmp_path, undisturbed)


@pytest.mark.parametrize("kills", [2, MANY])
def test_drivers_are_killed(undisturbed, tmp_path: Path, kills: int):
    """Each start takes up what the one before left, until one is left alone."""
    program = textwrap.dedent(
        f"""
        import sys, ray
        from pathlib import Path
        from tests.faults.test_kills import build, fake_plm
        from pema_ray.memory.build import run_build
        folder = Path({str(tmp_path / "m")!r})
        ray.init(address="local", num_cpus=4, object_store_memory=90 * 2**20, include_dashboard=False)
        print("up", flush=True)
        run_build(build(folder), fake_plm(seconds=0.05), lambda info: print(info.name, flush=True))
        """
    )
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    draw, killed, announced = moments(3), 0, []
    for attempt in range(kills + 2):
        driver = subprocess.Popen(
            [sys.executable, "-c", program], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, start_new_session=True,
        )  # fmt: skip
        assert driver.stdout is not None
        if attempt < kills:
            while driver.stdout.readline().strip() not in ("up", ""):
                pass
            for _ in range(draw.randint(0, 12 // kills)):  # so many of 30 shards later, or at once
                announced.append(driver.stdout.readline().strip())
            time.sleep(draw.uniform(0, 0.1))
            if driver.poll() is None:
                killed += 1
        else:
            driver.wait(120)
        with suppress(ProcessLookupError):
            os.killpg(driver.pid, signal.SIGKILL)  # the driver and the Ray it started: a machine that loses power
        driver.wait()
        manifest = tmp_path / "m" / "manifest.json"
        assert not manifest.exists() or verify(tmp_path / "m") == []
        if driver.returncode == 0:
            break
    assert killed >= kills
    assert_whole(tmp_path / "m", undisturbed)


@pytest.mark.parametrize("kills", [4])
def test_nodes_are_killed(undisturbed, tmp_path: Path, kills: int):
    """A driver on a cluster of three nodes; actors live on two of them, which are killed and replaced in turn."""
    program = textwrap.dedent(
        f"""
        import os, random, threading, time, ray
        from pathlib import Path
        from ray.cluster_utils import Cluster
        from tests.faults.test_kills import build, fake_plm
        from pema_ray.memory.build import run_build
        small = {{"object_store_memory": 90 * 2**20}}
        cluster = Cluster(initialize_head=True, connect=True, head_node_args={{"num_cpus": 2, **small}})
        nodes = [cluster.add_node(num_cpus=2, **small) for _ in range(2)]
        def work():
            run_build(build(Path({str(tmp_path / "m")!r}), cpus_per_actor=1, actors=4), fake_plm(seconds=0.7))
        thread = threading.Thread(target=work)  # nodes want to be started by the main thread
        thread.start()
        draw, killed = random.Random({4 + 1000 * _round}), 0
        while thread.is_alive() and killed < {kills}:
            time.sleep(draw.uniform(1.0, 2.0))
            cluster.remove_node(nodes.pop(draw.randrange(2)), allow_graceful=False)
            killed += 1
            nodes.append(cluster.add_node(num_cpus=2, **small))
        thread.join()
        Path({str(tmp_path / "killed")!r}).write_text(str(killed))  # Ray writes to the standard output as well
        ray.shutdown()
        cluster.shutdown()
        os._exit(0)  # killed nodes leave exit handlers behind that fail
        """
    )
    run_program(program, tmp_path)
    assert (tmp_path / "killed").read_text() == str(kills)
    assert_whole(tmp_path / "m", undisturbed)


def run_program(program: str, home: Path) -> None:
    """Runs Python code in a process of its own."""
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled", "HOME": str(home), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", program]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert process.returncode == 0, process.stderr[-3000:]


def training(tiny_source, make_rows, folder: Path, **changes) -> tuple[LMHeadBundle, AdapterTrainingJob]:  # noqa: F811
    """A job of some thousand steps."""
    bundle: LMHeadBundle = tiny_source("llama").lm_head()
    card = bundle.card
    config = TrainConfig(
        rank=6, batch_size=32, epochs=400, validate_every=25, learning_rate=1e-3, dropout=0.1, cpus_per_worker=0.5,
        dtype="float32", patience=1000, max_failures=20,
    )  # fmt: skip
    config = config.model_copy(update=changes)
    adapter = AdapterConfig(card.hidden_size, config.rank, card.name, card.fingerprint, dropout=config.dropout)
    job = AdapterTrainingJob(
        train_memory=write_memory(folder / "train", card, make_rows(640, 1, card.hidden_size), "train"),
        dev_memory=write_memory(folder / "dev", card, make_rows(100, 2, card.hidden_size), "dev"),
        bundle=bundle.save(folder / "lm_head"),
        run_dir=folder / "run",
        adapter=adapter,
        config=config,
    )
    return bundle, job


def undisturbed_training(
    bundle: LMHeadBundle, job: AdapterTrainingJob, folder: Path
) -> tuple[PemaAdapter, AdapterHistory]:
    """The same training in one process without kills."""
    rows = (ExternalMemory.open(path).view() for path in (job.train_memory, job.dev_memory))
    torch.set_num_threads(1)
    return train(AdapterTrainer(job.adapter, job.config, bundle.head, *rows, folder))


@pytest.mark.parametrize("kills", [2, MANY])
def test_train_workers_are_killed(ray_cluster, tiny_source, make_rows, tmp_path: Path, kills: int):  # noqa: F811
    """One worker, float32: the adapter is bit for bit that of an undisturbed run."""
    bundle, job = training(tiny_source, make_rows, tmp_path, epochs=100 * kills)
    pause, after = ((0.2, 0.6), job.run_dir / "checkpoint.safetensors") if kills == 1 else ((3.0, 6.0), None)
    with killing("RayTrainWorker", 5, kills, pause, after) as killed_pids:
        history = fit(job)
    assert len(killed_pids) == kills
    expected, alone = undisturbed_training(bundle, job, tmp_path / "alone")
    adapter = PemaAdapter.from_pretrained(job.run_dir / "adapter", bundle.card)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, adapter.state_dict()[name]), name
    assert history.validation == alone.validation
    assert len(history.train) == history.total_steps


def killed_once_reported(storage: Path, then: Callable[[], object]):
    """During the block, kills the train worker once Ray Train has a checkpoint, and then calls `then`."""

    def strike(killed_pids: list[int], over: threading.Event) -> None:
        while not any(storage.glob("*/checkpoint_manager_snapshot.json")):
            if over.wait(0.05):
                return
        (victim,) = workers("RayTrainWorker")
        victim.send_signal(signal.SIGKILL)
        victim.wait(30)
        then()
        killed_pids.append(victim.pid)

    return striking(strike)


def resumed_after(job: AdapterTrainingJob) -> int:
    """The step that the last start of the training resumed from."""
    lines = (job.run_dir / "progress.jsonl").read_text().splitlines()
    steps = [point["step"] for point in map(json.loads, lines) if point["kind"] == "train"]
    starts = [step for before, step in zip([math.inf, *steps], steps) if step <= before]
    return starts[-1] - 1


def assert_undisturbed(bundle: LMHeadBundle, job: AdapterTrainingJob, history: AdapterHistory, folder: Path) -> None:
    """The adapter is bit for bit that of an undisturbed run, and so are all figures."""
    expected, alone = undisturbed_training(bundle, job, folder)
    adapter = PemaAdapter.from_pretrained(job.run_dir / "adapter", bundle.card)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, adapter.state_dict()[name]), name
    assert history.train == alone.train and history.validation == alone.validation


def test_a_training_that_lost_its_checkpoint_resumes_from_a_copy(ray_cluster, tiny_source, make_rows, tmp_path):  # noqa: F811
    """The worker dies, and its checkpoint file is lost."""
    bundle, job = training(tiny_source, make_rows, tmp_path, epochs=150)
    with killed_once_reported(job.run_dir, (job.run_dir / "checkpoint.safetensors").unlink) as killed_pids:
        history = fit(job)
    assert killed_pids and resumed_after(job) > 0 and resumed_after(job) % job.config.validate_every == 0
    assert_undisturbed(bundle, job, history, tmp_path / "alone")


@pytest.mark.slow
def test_a_training_that_lost_its_folder_resumes_from_its_storage(ray_cluster, tiny_source, make_rows, tmp_path):  # noqa: F811
    """The same command again, on a machine without the first one's files."""
    storage = tmp_path / "bucket"
    changes = {"epochs": 150, "max_failures": 0, "storage_path": storage.as_uri()}
    bundle, job = training(tiny_source, make_rows, tmp_path, **changes)
    with (
        pytest.raises(UserError, match="training stopped after its workers died 1 times"),
        killed_once_reported(storage, lambda: None) as killed_pids,
    ):
        fit(job)
    shutil.rmtree(job.run_dir)
    history = fit(job)
    assert killed_pids and resumed_after(job) > 0 and resumed_after(job) % job.config.validate_every == 0
    assert not (job.run_dir / "ray_train").exists()
    assert_undisturbed(bundle, job, history, tmp_path / "alone")


@pytest.mark.slow
def test_training_goes_on_with_fewer_workers_when_a_node_goes(tiny_source, make_rows, tmp_path: Path):  # noqa: F811
    """Two workers on two nodes; one node dies for good, and the other completes the training."""
    changes = {"dropout": 0.0, "workers": 2, "min_workers": 1, "cpus_per_worker": 1.0}
    bundle, job = training(tiny_source, make_rows, tmp_path, **changes)
    (tmp_path / "job.pickle").write_bytes(pickle.dumps(job))
    program = textwrap.dedent(
        f"""
        import os, pickle, threading, time, ray
        from pathlib import Path
        from ray.cluster_utils import Cluster
        from pema_ray.data_owner.training.ray_training import fit
        folder = Path({str(tmp_path)!r})
        job = pickle.loads((folder / "job.pickle").read_bytes())
        small = {{"num_cpus": 1, "object_store_memory": 90 * 2**20}}
        cluster = Cluster(initialize_head=True, connect=True, head_node_args=small)
        node = cluster.add_node(**small)
        reported = []
        thread = threading.Thread(target=lambda: fit(job, lambda kind, point: reported.append(point["step"])))
        thread.start()
        while not reported or reported[-1] < 200:
            time.sleep(0.1)
        workers = sum("RayTrainWorker" in (actor.class_name or "") and actor.state == "ALIVE"
                      for actor in ray.util.state.list_actors())
        cluster.remove_node(node, allow_graceful=False)
        thread.join()
        (folder / "nodes").write_text(f"{{workers}} {{len(ray.nodes())}} {{sum(n['Alive'] for n in ray.nodes())}}")
        os._exit(0)
        """
    )
    run_program(program, tmp_path)
    assert (tmp_path / "nodes").read_text() == "2 2 1"
    expected, alone = undisturbed_training(bundle, job, tmp_path / "alone")
    history = AdapterHistory.from_dict(json.loads((job.run_dir / "history.json").read_text()))
    assert len(history.train) == history.total_steps == alone.total_steps
    adapter = PemaAdapter.from_pretrained(job.run_dir / "adapter", bundle.card)
    for name, tensor in expected.state_dict().items():
        torch.testing.assert_close(tensor, adapter.state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)
