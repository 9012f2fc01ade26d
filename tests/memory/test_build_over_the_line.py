"""What goes wrong at the PLM owner's side in mid-build: waited for, or told in one line and gone on from."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.memory.build import run_build
from pema_ray.memory.planning import finished_shards
from pema_ray.memory.shard_worker import ShardWorker
from pema_ray.tasks import EncodedPair
from tests.memory.kit import build, contents, fake_plm, in_this_process, work

MANY = tuple(EncodedPair(i, [10, 20, 30 + i], [4 + j for j in range(1 + i % 4)]) for i in range(40))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    in_this_process(build(folder, MANY))
    run_build(build(folder, MANY), fake_plm())
    return contents(folder)


@pytest.fixture
def faults(tmp_path: Path) -> Path:
    (tmp_path / "faults").mkdir()
    return tmp_path / "faults"


@given(
    window=st.integers(1, 9),
    order=st.permutations(range(5)),
    context=st.sampled_from(["teacher_forced", "generated"]),
    key_dtype=st.sampled_from(["float32", "bfloat16", "int8"]),
)
def test_bytes_depend_neither_on_the_window_nor_on_who_makes_which_shard_when(
    tmp_path_factory, window: int, order: list[int], context: str, key_dtype: str
):
    settings = {"context": context, "key_dtype": key_dtype}
    default, varied_folder = (tmp_path_factory.mktemp(name) for name in ("default", "varied"))
    in_this_process(build(default, **settings))
    varied = build(varied_folder, **settings, requests_in_flight=window)
    in_this_process(varied, [])  # the plan
    assert work(varied, order[:2]) == work(varied, order[2:], fake_plm())[:2] == ["", ""]
    assert contents(default) == contents(varied_folder)


def test_one_event_loop_keeps_so_many_requests_under_way_over_shards(tmp_path: Path):
    """The window is one actor's, not one shard's; requests leave in the order of the shards."""
    one = build(tmp_path, MANY, requests_in_flight=3, examples_per_shard=4, max_batch_tokens=1)
    in_this_process(one, [])
    current, peak, requests = 0, 0, []

    class Slow:
        def __init__(self):
            self.plm = fake_plm()()

        async def extract(self, batch):
            nonlocal current, peak
            current, peak = current + 1, max(peak, current + 1)
            requests.append(batch.token_ids[0])
            for _ in range(20):
                await asyncio.sleep(0)
            current -= 1
            return await self.plm.extract(batch)

    async def calls() -> None:
        worker = ShardWorker([one], Slow)
        batches = [pa.Table.from_pylist([{"build": 0, "shard": number}]) for number in range(2)]
        rows = await asyncio.gather(*(worker(batch) for batch in batches))
        assert [row["error"] for row in rows] == [[""], [""]]

    asyncio.run(calls())
    assert peak == 3 and len(requests) == 8
    assert sorted(requests[:4]) == sorted([[30 + i, *MANY[i].target] for i in range(4)])


@pytest.mark.cluster
def test_quota_and_absence_are_waited_for_and_shown(ray_cluster, undisturbed, faults: Path, tmp_path: Path):
    for name, text in {"busy-0": "2.5", "busy-1": "2.5", "gone-0": "", "gone-1": ""}.items():
        (faults / name).write_text(text)
    waits: list[str] = []
    one = build(tmp_path / "m", MANY, requests_in_flight=2)
    run_build(one, fake_plm(faults), on_wait=waits.append)
    assert contents(tmp_path / "m") == undisturbed and not list(faults.iterdir())
    assert any(text.startswith("waiting for the PLM owner: quota of 200000 rows a minute, 2 s") for text in waits)


@pytest.mark.cluster
def test_patience_ends_the_build_and_the_next_start_goes_on(ray_cluster, undisturbed, faults: Path, tmp_path: Path):
    in_this_process(build(tmp_path / "m", MANY), [0])
    (faults / "busy").write_text("60")
    with pytest.raises(UserError, match="did not answer for 5 s: quota of 200000 rows a minute. Start again when"):
        run_build(build(tmp_path / "m", MANY, patience_seconds=5), fake_plm(faults))
    run_build(build(tmp_path / "m", MANY), fake_plm(faults))
    assert contents(tmp_path / "m") == undisturbed


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        ("revoked", UserError, "https://plm.test: the key was revoked. Ask the PLM owner for a new one."),
        ("other", FingerprintMismatch, "https://plm.test belongs to PLM 'other"),
    ],
)
@pytest.mark.parametrize("context", ["teacher_forced", "generated"])
def test_a_revoked_key_or_another_plm_ends_the_build_which_then_goes_on(
    ray_cluster, faults: Path, tmp_path: Path, fault: str, kind: type[UserError], words: str, context: str
):
    def strike(info) -> None:
        announced.append(info.name)
        (faults / fault).touch()

    announced: list[str] = []
    one = build(tmp_path / "m", MANY, context=context)
    with pytest.raises(UserError) as caught:
        run_build(one, fake_plm(faults, seconds=0.05), on_shard=strike)
    assert type(caught.value) is kind and str(caught.value).startswith(words)
    assert "\n" not in str(caught.value)
    before = {info.name: (one.folder / info.name).stat().st_mtime_ns for info in finished_shards(one.folder)}
    assert 1 <= len(before) < 20 and not (one.folder / "manifest.json").exists()
    with pytest.raises(kind):  # it is still so
        run_build(one, fake_plm(faults))
    (faults / fault).unlink()
    run_build(one, fake_plm(faults))
    assert {name: (one.folder / name).stat().st_mtime_ns for name in before} == before
    in_this_process(build(tmp_path / "alone", MANY, context=context))
    run_build(build(tmp_path / "alone", MANY, context=context), fake_plm())
    assert contents(one.folder) == contents(tmp_path / "alone")


@pytest.mark.cluster
def test_actors_come_as_they_are_needed_and_change_nothing(ray_cluster, undisturbed, tmp_path: Path):
    one = build(tmp_path / "m", MANY, actors=1, max_actors=3, requests_in_flight=1)
    run_build(one, fake_plm(seconds=0.1))
    assert contents(tmp_path / "m") == undisturbed
