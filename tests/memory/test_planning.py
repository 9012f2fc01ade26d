"""A plan counts every shard once, holds no examples, and refuses what is bad before the PLM works."""

from __future__ import annotations

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pema_ray.errors import FingerprintMismatch, UserError
from pema_ray.line import ModelCard
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import run_build
from pema_ray.memory.planning import find_or_make_plan, finished_shards, planned_rows, prepare_folder
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.tasks import EncodedPair
from tests.memory.kit import EXAMPLES, build, contents, fake_plm, in_this_process

BAD = {3: EncodedPair(9, [5], []), 4: EncodedPair(12, [5] * 60, [6] * 37), 5: EncodedPair(15, [5] * 99, [6])}
WITH_BAD = [BAD.get(number, example) for number, example in enumerate(EXAMPLES)]
TOO_LONG = "prompt and target have 97 tokens, the PLM allows 96"


def remote_examples(count: int, at_hand: bool = False, refuse_at: int | None = None):
    """Examples that tasks make; a closure, so that they travel by value."""

    def make():
        from pema_ray.errors import UserError
        from pema_ray.tasks import EncodedPair

        class RemoteExamples:
            digest = f"{count}"

            def __len__(self):
                return count

            def read(self, start, stop):
                if refuse_at is not None and start <= refuse_at < stop:
                    raise UserError(f"pair {refuse_at} cannot be worded")
                return [EncodedPair(i, [10, 20, i % 50 + 3], [4] * (1 + i % 3)) for i in range(start, stop)]

        RemoteExamples.at_hand = at_hand
        return RemoteExamples()

    return make()


def build_of(examples, folder: Path, **changes) -> MemoryBuild:
    return replace(build(folder, **changes), examples=examples)


def test_shards_are_ranges_of_the_examples_and_bad_ones_leave_gaps(tmp_path: Path):
    one = build(tmp_path, WITH_BAD, max_rejected=3)
    plan = find_or_make_plan(one)
    assert plan.examples == (2, 1, 0, 2, 2) and plan.rejected == 3
    assert plan.rows == (5, 4, 0, 9, 5) and planned_rows(one) == 23
    in_this_process(one)
    manifest = run_build(one, fake_plm())
    assert [info.name for info in manifest.shards] == [shard_name(number) for number in (0, 1, 3, 4)]
    assert (manifest.rows, manifest.examples, manifest.rejected) == (23, 7, 3)
    assert [info.name for info in finished_shards(tmp_path)] == [info.name for info in manifest.shards]
    rejected = pq.read_table(tmp_path / "rejected.parquet").to_pylist()
    assert [one["example_id"] for one in rejected] == [9, 12, 15]
    assert rejected[1] == {"example_id": 12, "reason": TOO_LONG, "prompt_tokens": 60, "target_tokens": 37}
    assert not {9, 12, 15} & set(ExternalMemory.open(tmp_path).load().example_id.tolist())


@pytest.mark.parametrize("allowed", [0, 2])
def test_more_bad_examples_than_allowed_are_refused_with_the_first_of_them(tmp_path: Path, allowed: int):
    folder = tmp_path / "memory"
    with pytest.raises(UserError) as caught:
        run_build(build(folder, WITH_BAD, max_rejected=allowed), fake_plm())
    assert str(caught.value) == (
        "Split 'train', example 9: the target is empty. (2 more are bad.) "
        "Shorten or remove them, or set build_memory.max_rejected=3 to have them set aside."
    )
    assert not folder.exists()


def test_a_kept_plan_is_held_to_what_is_allowed_now(tmp_path: Path):
    find_or_make_plan(build(tmp_path, WITH_BAD, max_rejected=3))
    with pytest.raises(UserError, match=r"example 9: the target is empty. \(2 more are bad"):
        find_or_make_plan(build(tmp_path, WITH_BAD, max_rejected=1))


def test_a_kept_plan_is_believed_and_nothing_is_tokenised_again(tmp_path: Path, monkeypatch):
    one = build(tmp_path, WITH_BAD, max_rejected=3)
    plan = find_or_make_plan(one)
    monkeypatch.setattr(MemoryBuild, "read", lambda self, number: pytest.fail("examples were read again"))
    assert find_or_make_plan(one) == plan
    assert len(prepare_folder(one)[0]) == 4


def test_a_plan_without_its_counts_or_rejected_examples_is_unreadable(tmp_path: Path):
    one = build(tmp_path, WITH_BAD, max_rejected=3)
    find_or_make_plan(one)
    (tmp_path / "rejected.parquet").unlink()
    with pytest.raises(UserError, match="plan unreadable"):
        find_or_make_plan(one)
    (tmp_path / "plan.json").write_text(json.dumps({"plan_hash": one.plan_hash}))
    with pytest.raises(UserError, match="plan unreadable"):
        find_or_make_plan(one)


def test_a_memory_of_another_plm_is_refused_by_name(tmp_path: Path):
    in_this_process(build(tmp_path))
    run_build(build(tmp_path), fake_plm())
    build_of_other_plm = replace(build(tmp_path), card=ModelCard("other", "d" * 16, 2, 300, 96, (1,)))
    with pytest.raises(FingerprintMismatch, match="counting .* this run uses PLM 'other"):
        prepare_folder(build_of_other_plm)


def test_shards_of_a_memory_whose_removal_was_cut_off_are_not_taken_for_the_new_ones(tmp_path: Path):
    folder = tmp_path / "m"
    folder.mkdir()
    for name in ("shard-00000.parquet", "shard-00000.receipt.json", "manifest.json"):
        (folder / name).write_bytes(b"of another plan")
    find_or_make_plan(build(folder))
    assert [path.name for path in folder.iterdir()] == ["plan.json"] and finished_shards(folder) == []


def test_where_all_examples_are_bad_there_is_no_memory(tmp_path: Path):
    with pytest.raises(UserError, match="Split 'train': all 1 examples are bad"):
        find_or_make_plan(build(tmp_path / "m", [EncodedPair(1, [5], [])], max_rejected=1))


# ── on Ray ──────────────────────────────────────────────────────────────────


@pytest.mark.cluster
def test_tasks_count_what_one_process_counts_and_build_the_same_bytes(ray_cluster, tmp_path: Path):
    counted: list[int] = []
    local = build_of(remote_examples(23, at_hand=True), tmp_path / "local")
    remote = build_of(remote_examples(23), tmp_path / "remote", actors=2)
    assert find_or_make_plan(remote, counted.append) == find_or_make_plan(local)
    assert sum(counted) == 12
    in_this_process(local)
    assert run_build(local, fake_plm()) == run_build(remote, fake_plm())
    assert contents(local.folder) == contents(remote.folder)


@pytest.mark.cluster
def test_actors_that_take_every_cpu_tokenise_themselves(ray_cluster, tmp_path: Path):
    """Tasks would wait for a CPU, and the actors for the tasks."""
    one = build_of(remote_examples(9), tmp_path / "m", actors=2, cpus_per_actor=2)
    assert run_build(one, fake_plm()).examples == 9


@pytest.mark.cluster
def test_a_user_error_in_a_task_comes_out_as_itself(ray_cluster, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        find_or_make_plan(build_of(remote_examples(23, refuse_at=11), tmp_path / "m"))
    assert str(caught.value) == "pair 11 cannot be worded" and not (tmp_path / "m").exists()
    one = build_of(remote_examples(23), tmp_path / "m")  # planned, and then refused in the build itself
    find_or_make_plan(one)
    with pytest.raises(UserError) as caught:
        run_build(replace(one, examples=remote_examples(23, refuse_at=11)), fake_plm())
    assert str(caught.value) == "pair 11 cannot be worded"


@pytest.mark.cluster
def test_the_process_that_builds_holds_no_examples(ray_cluster, tmp_path: Path):
    """Ten times the pairs in as many shards: the same memory, where the pairs themselves would take ten times more."""

    def peak(pairs: int) -> int:
        changes = {"examples_per_shard": pairs // 4, "max_batch_tokens": 4096}
        one = build_of(remote_examples(pairs), tmp_path / f"{pairs}", **changes)
        tracemalloc.start()
        try:
            assert run_build(one, fake_plm()).rows > pairs
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(40)  # what is imported and kept for good
    few, many = peak(400), peak(4000)
    assert many - few < 4000 * 50, (few, many)  # bytes a pair; as Python lists they take some hundred
