"""A build gives the same bytes however many actors make it and however often it is stopped."""

from __future__ import annotations

import os
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from pema_ray.errors import UserError
from pema_ray.line import ModelCard
from pema_ray.line.plm_config import PLMConfig
from pema_ray.memory import ExternalMemory
from pema_ray.memory.build import await_shard, run_build
from pema_ray.memory.config import BuildMemoryConfig
from pema_ray.memory.examples import ListedExamples
from pema_ray.memory.manage import verify
from pema_ray.memory.planning import prepare_folder
from pema_ray.memory.specification import MemoryBuild, shard_name
from pema_ray.pema.plm import connector
from pema_ray.tasks import EncodedPair
from tests.memory.kit import CARD, EXAMPLES, SETTINGS, build, contents, fake_plm, in_this_process, work

# ── without Ray ─────────────────────────────────────────────────────────────


def test_rows_of_prompts_lie_before_those_of_targets(tmp_path: Path):
    """What all prompts begin with (here one token) has no rows; whoever asks for no prompts sees none."""
    in_this_process(build(tmp_path / "plain"))
    in_this_process(build(tmp_path / "with-prompts", prompts=True))
    manifest = run_build(build(tmp_path / "with-prompts", prompts=True), fake_plm())
    assert (manifest.rows, manifest.prompt_from) == (33, 1)
    assert sum(info.prompt_rows for info in manifest.shards) == 10
    run_build(build(tmp_path / "plain"), fake_plm())
    plain, with_prompts = ExternalMemory.open(tmp_path / "plain").load(), ExternalMemory.open(tmp_path / "with-prompts")
    targets = with_prompts.load()
    assert all(
        np.array_equal(getattr(plain, name), getattr(targets, name)) for name in ("target", "example_id", "position")
    )
    assert np.array_equal(plain.key[:], targets.key[:])
    first = next(with_prompts.shards(prompts=True))
    assert first.position[:3].tolist() == [-1, 0, 1] and first.target[:3].tolist() == [30, 4, 1]
    assert first.key[:2].tolist() == [[30.0, 1.0], [60.0, 2.0]]
    assert verify(tmp_path / "with-prompts") == []


def test_rows_of_prompts_need_whole_sequences():
    for settings in ({"context": "generated"}, {"deduplicate": True}):
        with pytest.raises(ValueError, match="prompts keeps whole sequences"):
            BuildMemoryConfig(prompts=True, **settings)


def test_the_parts_of_a_finished_memory_agree(tmp_path: Path):
    in_this_process(build(tmp_path))
    manifest = run_build(build(tmp_path), fake_plm())  # nothing is left to do, so Ray is not needed
    assert manifest.rows == sum(len(e.target) + 1 for e in EXAMPLES) == 33
    assert (manifest.examples, len(manifest.shards)) == (10, 5)
    assert (manifest.fingerprint, manifest.eos_token_id, manifest.hidden_size) == (CARD.fingerprint, 1, 2)
    rows = ExternalMemory.open(tmp_path, CARD).load()
    assert list(dict.fromkeys(rows.example_id.tolist())) == [e.example_id for e in EXAMPLES]
    assert rows.key[:1].tolist() == [[60.0, 2.0]] and rows.target[:2].tolist() == [4, 1]


def test_a_finished_shard_is_skipped_and_one_that_lacks_its_file_or_receipt_is_not(tmp_path: Path):
    in_this_process(build(tmp_path))
    names = [shard_name(number) for number in range(5)]
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).with_suffix(".receipt.json").unlink()
    (tmp_path / names[2]).write_bytes((tmp_path / names[2]).read_bytes()[:-5])
    (tmp_path / names[3]).with_suffix(".receipt.json").write_text('{"name": "sh')
    (tmp_path / f".{names[0]}.99.tmp").write_text("left by a process that was killed")
    todo, done = prepare_folder(build(tmp_path))
    assert todo == [0, 1, 2, 3]
    assert [info.name for info in done] == names[4:]
    assert not list(tmp_path.glob(".*.tmp"))


@pytest.mark.parametrize(
    "change",
    [{"key_dtype": "float16"}, {"examples_per_shard": 3}, {"max_batch_tokens": 17}],
    ids=lambda c: next(iter(c)),
)
def test_other_settings_are_refused_unless_overwrite(change: dict, tmp_path: Path):
    in_this_process(build(tmp_path))
    before = contents(tmp_path)
    with pytest.raises(UserError, match="holds a memory built from other examples or with other settings"):
        prepare_folder(build(tmp_path, **change))
    assert contents(tmp_path) == before
    todo, done = prepare_folder(build(tmp_path, **change, overwrite=True))
    assert not done and len(todo) == -(-10 // change.get("examples_per_shard", 2))
    assert os.listdir(tmp_path) == ["plan.json"]


def test_another_plm_is_other_work_and_more_actors_are_not(tmp_path: Path):
    one = build(tmp_path)
    changed = replace(one, card=ModelCard("x", "d" * 16, 2, 300, 96, (1,)))
    assert one.plan_hash != changed.plan_hash
    how_fast = {"actors": 4, "max_actors": 8, "cpus_per_actor": 2, "requests_in_flight": 9, "patience_seconds": 1}
    assert one.plan_hash == build(tmp_path, **how_fast, overwrite=True).plan_hash


@pytest.mark.parametrize("damage", ["", "{", "[]", "{}"])
def test_a_damaged_plan_is_refused_like_other_settings(damage: str, tmp_path: Path):
    in_this_process(build(tmp_path), [0])
    (tmp_path / "plan.json").write_text(damage)
    with pytest.raises(UserError, match="plan unreadable.*build_memory.overwrite=true"):
        prepare_folder(build(tmp_path))
    assert len(prepare_folder(build(tmp_path, overwrite=True))[0]) == 5


@pytest.mark.parametrize(
    ("examples", "complaint"),
    [
        ([], "Split 'train' has no examples"),
        ([EncodedPair(4, [5], [])], "example 4: the target is empty"),
        ([EncodedPair(4, [5] * 60, [6] * 37)], "example 4: prompt and target have 97 tokens, the PLM allows 96"),
    ],
)
def test_examples_the_plm_cannot_take_are_refused_before_anything_is_made(examples, complaint: str, tmp_path: Path):
    folder = tmp_path / "memory"
    with pytest.raises(UserError, match=complaint):
        run_build(build(folder, examples), fake_plm())
    assert not folder.exists()


def test_a_full_disk_in_an_actor_is_a_message_and_finished_shards_stay(tmp_path: Path, monkeypatch):
    in_this_process(build(tmp_path), [0, 1])
    before = contents(tmp_path)

    def full(*_args, **_kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("pema_ray.memory.shards.pq.write_table", full)
        (error,) = work(build(tmp_path), [2])
    assert "No space left on device. Start again when it can; what is finished is kept." in error
    assert contents(tmp_path) == before
    in_this_process(build(tmp_path))
    assert run_build(build(tmp_path), fake_plm()).rows == 33


def test_equal_rows_become_one_row_with_a_weight(tmp_path: Path):
    again = [EncodedPair(e.example_id + 100, e.prompt, e.target) for e in EXAMPLES[:4]]
    forked = EncodedPair(200, EXAMPLES[3].prompt, [*EXAMPLES[3].target[:2], 77])
    examples = [*EXAMPLES, *again, forked]

    def one(folder: str, split: str = "train", **changes) -> MemoryBuild:
        return build(tmp_path / folder, examples, split, **changes)

    in_this_process(one("all"))
    in_this_process(one("once", deduplicate=True))
    in_this_process(one("test", split="test", deduplicate=True))
    manifests = {name: run_build(one(name), fake_plm()) for name in ("all",)}
    manifests["once"] = run_build(one("once", deduplicate=True), fake_plm())
    manifests["test"] = run_build(one("test", split="test", deduplicate=True), fake_plm())
    assert manifests["all"].rows == manifests["all"].represents == manifests["once"].represents
    assert manifests["once"].rows == 33 + 2  # the fork's own: its last token, and the EOS after it
    assert manifests["test"].rows == manifests["all"].rows  # measured on, not trained on
    every, once = (ExternalMemory.open(tmp_path / name, CARD).load() for name in ("all", "once"))
    assert every.weight is None and once.weight.dtype == np.int32

    def counted(rows) -> Counter:
        weight = np.ones(len(rows), int) if rows.weight is None else rows.weight
        counts: Counter = Counter()
        for key, target, times in zip(rows.key[:].tolist(), rows.target.tolist(), weight.tolist(), strict=True):
            counts[(*key, target)] += times
        return counts

    assert counted(every) == counted(once)
    assert verify(tmp_path / "once") == [] and one("once").plan_hash != one("once", deduplicate=True).plan_hash
    assert len(ExternalMemory.open(tmp_path / "once").load(max_examples=4)) == sum(
        len(e.target) + 1 for e in EXAMPLES[:4]
    )


# ── on Ray ──────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def undisturbed(ray_cluster, tmp_path_factory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("undisturbed")
    run_build(build(folder), fake_plm())
    return contents(folder)


@pytest.mark.cluster
def test_one_actor_two_actors_and_one_process_write_the_same_bytes(undisturbed, tmp_path: Path):
    run_build(build(tmp_path / "two", actors=2), fake_plm())
    in_this_process(build(tmp_path / "none"))
    run_build(build(tmp_path / "none"), fake_plm())
    assert contents(tmp_path / "two") == contents(tmp_path / "none") == undisturbed
    assert len(undisturbed) == 5 * 2 + 2  # shards with receipts, the plan, the manifest


@pytest.mark.cluster
def test_a_stopped_build_resumes_to_the_same_bytes(undisturbed, tmp_path: Path):
    in_this_process(build(tmp_path), [1, 3])
    finished = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("shard-*")}
    announced: list[str] = []

    def stop(info):
        announced.append(info.name)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_build(build(tmp_path), fake_plm(), on_shard=stop)
    assert not (tmp_path / "manifest.json").exists()
    assert announced and announced[0] not in finished
    run_build(build(tmp_path), fake_plm(), on_shard=lambda info: announced.append(info.name))
    assert contents(tmp_path) == undisturbed
    assert len(announced) == len(set(announced)) and not set(announced) & set(finished)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in finished} == finished


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("factory", "message"),
    [
        (fake_plm(fail_on=33), "token 33 is not spoken here"),
        (fake_plm(refuse="no such model"), "no such model"),
    ],
    ids=["while extracting", "while loading"],
)
def test_a_user_error_in_an_actor_comes_out_as_itself(ray_cluster, factory, message: str, tmp_path: Path):
    with pytest.raises(UserError) as caught:
        run_build(build(tmp_path), factory)
    assert str(caught.value) == message
    assert not (tmp_path / "manifest.json").exists()


@pytest.mark.cluster
def test_two_actors_with_a_real_model_write_what_one_process_would(
    ray_cluster, tiny_source, tiny_plm_folder, tmp_path: Path
):
    card = tiny_source("llama").describe().card
    config = PLMConfig(name=tiny_plm_folder("llama"), dtype="float32", device="cpu")
    factory = connector(config, card, 1)
    settings = BuildMemoryConfig(**SETTINGS, actors=2)
    examples = ListedExamples(EXAMPLES)
    local, remote = (
        MemoryBuild(tmp_path / name, examples, card, "task", "train", settings) for name in ("local", "remote")
    )
    in_this_process(local, factory=factory)
    assert run_build(local, factory) == run_build(remote, factory)
    assert contents(local.folder) == contents(remote.folder)
    assert ExternalMemory.open(remote.folder, card).load().key.shape == (33, 32)


def test_nodes_that_share_no_disk_are_told_apart_by_name(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("pema_ray.memory.build._ARRIVAL_SECONDS", 0.3)
    shard = tmp_path / "shard-00000.parquet"
    with pytest.raises(UserError, match=r"shard-00000.parquet: was written on node gpu-7, but is not visible from"):
        await_shard(shard, "gpu-7")
    late = threading.Timer(0.1, shard.touch)  # a network disk shows a new file after a while
    late.start()
    await_shard(shard, "gpu-7")
    late.join()
