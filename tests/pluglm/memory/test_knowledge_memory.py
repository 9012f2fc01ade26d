"""The memory on disk: edits, versions, several editors, damage."""

from __future__ import annotations

import errno
import json
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.errors import UserError
from pema_ray.pluglm.memory import editing, versions
from pema_ray.pluglm.memory.editing import Change
from pema_ray.pluglm.memory.encoding import DocumentEncoder
from pema_ray.pluglm.memory.entries import Entry, NewEntry
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory
from pema_ray.pluglm.memory.versions import VersionConflict
from pema_ray.pluglm.model.knowledge import document_code


@pytest.fixture
def memory(tmp_path, facts, encoder) -> KnowledgeMemory:
    return KnowledgeMemory.build(tmp_path / "memory", facts, encoder, dtype="float32", entries_per_segment=5)


@pytest.fixture(scope="module")
def edits_encoder(make_model, words_tokenizer) -> DocumentEncoder:
    return DocumentEncoder(make_model(), words_tokenizer)


def texts(memory: KnowledgeMemory) -> dict[int, str]:
    return {entry.entry_id: entry.text for entry in memory.entries()}


# ── edits ───────────────────────────────────────────────────────────────────


def test_entries_come_back_with_text_tags_and_provenance(memory, facts, words_tokenizer, encoder) -> None:
    memory = memory.add([NewEntry("w1 w2", "notes", "n1", ("in-task", "train"))], encoder)
    assert len(memory) == 13
    assert list(memory.entries([12, 0])) == [
        Entry(12, "w1 w2", "notes", "n1", ("in-task", "train"), tuple(words_tokenizer("w1 w2")["input_ids"])),
        Entry(0, facts[0].text, "a", "doc0", (), tuple(words_tokenizer(facts[0].text)["input_ids"])),
    ]


def test_keys_and_values_are_the_encoders(memory, encoder, words_tokenizer, facts) -> None:
    knowledge = memory.load()
    vectors = encoder.encode(words_tokenizer([entry.text for entry in facts])["input_ids"])
    assert torch.allclose(knowledge.key_NQ, vectors.key_MQ, atol=1e-6)
    assert torch.allclose(knowledge.value_ND, vectors.value_MD, atol=1e-6)
    assert knowledge.document_N.tolist() == [document_code(entry.document_id) for entry in facts]


def test_replace_keeps_the_id_and_touches_nothing_else(memory, encoder) -> None:
    before = memory.load()
    edited = memory.replace(7, NewEntry("w99 w98 w97", "b"), encoder)
    after = edited.load()
    assert texts(edited) == {**texts(memory), 7: "w99 w98 w97"}
    assert after.entry_N.tolist() == before.entry_N.tolist()
    same = torch.arange(12) != 7
    for name in ("key_NQ", "value_ND", "document_N"):
        assert torch.equal(getattr(after, name)[same], getattr(before, name)[same])
    assert not torch.equal(after.key_NQ[7], before.key_NQ[7])
    assert edited.entries([7]).__next__().token_ids == tuple(after.tokens(torch.tensor([7])).token_ML[0].tolist())


def test_ids_are_never_given_twice(memory, encoder) -> None:
    memory = memory.delete([11]).add([NewEntry("w1")], encoder)
    assert sorted(texts(memory)) == [*range(11), 12]
    memory = memory.swap(KnowledgeMemory.open(memory.folder, 1)).add([NewEntry("w2")], encoder)
    assert sorted(texts(memory)) == [*range(12), 13]


def test_concat_counts_ids_on_and_swap_restores_exactly(memory, tmp_path, encoder) -> None:
    other = KnowledgeMemory.build(tmp_path / "other", [NewEntry("w50"), NewEntry("w51")], encoder, dtype="float32")
    other = other.replace(0, NewEntry("w52"), encoder)
    combined = memory.concat([other, other])
    assert texts(combined) == {**texts(memory), 12: "w52", 13: "w51", 14: "w52", 15: "w51"}
    swapped = combined.swap(other)
    assert texts(swapped) == {0: "w52", 1: "w51"}
    back = swapped.swap(KnowledgeMemory.open(memory.folder, memory.version))
    assert back.version == 4
    a, b = memory.load(), back.load()
    for name in ("entry_N", "key_NQ", "value_ND", "token", "end_N", "document_N"):
        assert torch.equal(getattr(a, name), getattr(b, name))
    assert not combined.verify() and not swapped.verify() and not back.verify()


def test_memories_that_do_not_fit_together_are_refused(memory, tmp_path, make_model, words_tokenizer, encoder) -> None:
    half = KnowledgeMemory.build(tmp_path / "half", [NewEntry("w1")], encoder, dtype="float16")
    with pytest.raises(UserError, match=r"half: numbers in float16, but .*memory has those of float32"):
        memory.concat([half])
    stranger = DocumentEncoder(make_model(seed=5), words_tokenizer, "stranger")
    foreign = KnowledgeMemory.build(tmp_path / "foreign", [NewEntry("w1")], stranger, dtype="float32")
    with pytest.raises(UserError, match=rf"keys of encoder stranger \({stranger.fingerprint}\), but .* tiny \("):
        memory.swap(foreign)
    assert KnowledgeMemory.open(memory.folder).version == 1


def test_refresh_encodes_the_same_documents_anew(memory, make_model, words_tokenizer) -> None:
    other = DocumentEncoder(make_model(seed=3, query_size=4), words_tokenizer, "other")
    memory = memory.delete([3])
    fresh = memory.refresh(other)
    assert texts(fresh) == texts(memory)
    assert fresh.fingerprint == other.fingerprint
    vectors = other.encode([list(entry.token_ids) for entry in fresh.entries()])
    assert torch.allclose(fresh.load(other.fingerprint).key_NQ, vectors.key_MQ, atol=1e-6)
    assert not fresh.verify()


def test_entries_are_chosen_by_tag_and_source(memory, encoder) -> None:
    memory = memory.add([NewEntry("w1", "c", tags=("x",)), NewEntry("w2", "c", tags=("x", "y"))], encoder)
    assert memory.load(tags=["x"]).entry_N.tolist() == [12, 13]
    assert memory.load(tags=["x"], without_tags=["y"]).entry_N.tolist() == [12]
    assert memory.load(without_tags=["x"]).entry_N.tolist() == list(range(12))
    assert memory.load(sources=["b", "c"]).entry_N.tolist() == [*range(6, 12), 12, 13]


def test_parts_are_the_whole(memory, encoder) -> None:
    memory = memory.replace(2, NewEntry("w5"), encoder).delete([9])
    knowledge = memory.load()
    parts = [memory.load(part=(i, 4)) for i in range(4)]
    for name in ("entry_N", "key_NQ", "value_ND", "token", "document_N"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(knowledge, name))


def test_token_ids_beyond_int16_are_kept(tmp_path, make_model, words_tokenizer) -> None:
    model = make_model(backbone={"vocab_size": 70_000})
    encoder = DocumentEncoder(model, words_tokenizer)
    documents = [[2, 40_000, 69_999, 3], [2, 32_768, 3]]
    encoder.tokenize = lambda texts: documents  # pyright: ignore[reportAttributeAccessIssue]
    memory = KnowledgeMemory.build(tmp_path / "memory", [NewEntry("a"), NewEntry("b")], encoder)
    assert memory.load().tokens(torch.tensor([0, 1])).token_ML.tolist() == [[2, 40_000, 69_999, 3], [2, 32_768, 3, 0]]


def test_numbers_that_float16_cannot_hold_are_refused(tmp_path, make_model, words_tokenizer, facts) -> None:
    model = make_model()
    model.model.knowledge_encoder.value.bias.data[0] = 1e6
    encoder = DocumentEncoder(model, words_tokenizer)
    with pytest.raises(UserError, match=r"a value is not finite in float16\. Use another number format"):
        KnowledgeMemory.build(tmp_path / "half", facts, encoder, dtype="float16")
    assert len(KnowledgeMemory.build(tmp_path / "brain", facts, encoder, dtype="bfloat16")) == 12


# ── readers and editors at once ─────────────────────────────────────────────


def test_an_entry_in_use_may_be_deleted(memory, model, encoder, words_tokenizer) -> None:
    model.attach(memory.load(model.fingerprint()))
    inputs = words_tokenizer("w1 w2", return_tensors="pt", return_token_type_ids=False)
    before = model(**inputs, output_retrieved=True)
    used = before.retrieved[0].entry_BK[0].tolist()
    smaller = memory.delete(used)
    again = model(**inputs, output_retrieved=True)
    assert torch.equal(again.logits, before.logits)  # readers of version 1 keep it
    KnowledgeMemory.prune(memory.folder)
    assert torch.equal(model(**inputs).logits, before.logits)  # even when it is deleted from disk
    model.attach(smaller.load(model.fingerprint()))
    assert not set(used) & set(model(**inputs, output_retrieved=True).retrieved[0].entry_BK[0].tolist())


def test_editors_at_once_lose_nothing(memory, encoder) -> None:
    """Sixteen editors who all begin at version 1."""
    start = threading.Barrier(16)

    def edit(number: int) -> int:
        start.wait()
        if number < 12:
            return memory.add([NewEntry(f"w{number + 60}")], encoder).version
        return memory.delete([number - 12]).version

    with ThreadPoolExecutor(16) as pool:
        published = sorted(pool.map(edit, range(16)))
    assert published == list(range(2, 18))  # every edit has a version of its own
    now = KnowledgeMemory.open(memory.folder)
    assert now.version == 17
    assert set(range(4, 12)) == {number for number in texts(now) if number < 12}
    assert sorted(texts(now)[n] for n in texts(now) if n >= 12) == sorted(f"w{n + 60}" for n in range(12))
    assert not now.verify()


def test_of_two_edits_of_one_entry_the_later_version_holds(memory, encoder) -> None:
    first = memory.replace(3, NewEntry("w90"), encoder)
    second = memory.replace(3, NewEntry("w91"), encoder)  # from version 1 too
    assert (first.version, second.version) == (2, 3)
    assert texts(KnowledgeMemory.open(memory.folder))[3] == "w91"
    assert texts(KnowledgeMemory.open(memory.folder, 2))[3] == "w90"  # and the other one is in the history


def test_an_editor_may_insist_on_a_version(memory, encoder) -> None:
    memory.replace(3, NewEntry("w90"), encoder, only_on=1)
    with pytest.raises(VersionConflict, match="your edit builds on version 1, but version 2 is current by now"):
        memory.replace(3, NewEntry("w91"), encoder, only_on=1)
    assert texts(KnowledgeMemory.open(memory.folder))[3] == "w90"


def test_an_editor_who_insists_loses_the_race_and_is_told(memory, encoder, monkeypatch) -> None:
    """Another editor publishes after the current version was read."""
    publish = versions.publish

    def late(folder, version):
        monkeypatch.setattr(versions, "publish", publish)
        memory.delete([0])
        publish(folder, version)

    monkeypatch.setattr(editing.versions, "publish", late)
    with pytest.raises(VersionConflict):
        memory.delete([1], only_on=1)
    assert sorted(texts(KnowledgeMemory.open(memory.folder))) == list(range(1, 12))


def test_an_entry_that_somebody_deleted_cannot_be_replaced(memory, encoder) -> None:
    memory.delete([3])
    with pytest.raises(UserError, match="version 2 has no entry 3"):
        memory.replace(3, NewEntry("w90"), encoder)
    assert KnowledgeMemory.open(memory.folder).version == 2


def test_edits_meet_a_refresh(memory, encoder, make_model, words_tokenizer) -> None:
    memory.refresh(DocumentEncoder(make_model(seed=9), words_tokenizer, "new"))
    with pytest.raises(UserError, match="its keys were made by encoder 'new"):
        memory.add([NewEntry("w1")], encoder)


def test_an_old_version_is_published_on_by_nobody_once_it_is_pruned(memory, encoder) -> None:
    memory.delete([0])
    memory.delete([1])
    assert KnowledgeMemory.prune(memory.folder) == [1, 2]
    assert memory.add([NewEntry("w1")], encoder).version == 4
    with pytest.raises(UserError, match="version 1 was pruned; version 4 is current"):
        KnowledgeMemory.open(memory.folder, 1)
    assert [edit.version for edit in memory.history()] == [3, 4]


def test_pruning_keeps_what_is_named_and_takes_files_nobody_needs(memory, encoder, make_model, words_tokenizer) -> None:
    fresh = memory.refresh(DocumentEncoder(make_model(seed=4), words_tokenizer, "new"))
    old, new = (set(m.manifest.files) for m in (memory, fresh))
    KnowledgeMemory.prune(memory.folder, keep=[1])
    assert not memory.verify()
    KnowledgeMemory.prune(memory.folder)
    left = {path.name for path in memory.folder.iterdir() if path.is_file()}
    assert left == new
    assert old - new and not (old - new) & left


@given(st.lists(st.tuples(st.sampled_from(["add", "replace", "delete"]), st.integers(0, 30)), max_size=12))
def test_any_sequence_of_edits_is_what_a_dictionary_would_be(tmp_path_factory, facts, edits_encoder, edits) -> None:
    memory = KnowledgeMemory.build(tmp_path_factory.mktemp("edits") / "memory", facts, edits_encoder, "float32", 5)
    encoder = edits_encoder
    expected, next_id = texts(memory), 12
    for number, (what, entry) in enumerate(edits):
        text = f"w{number} w{entry}"
        if what == "add":
            memory, expected[next_id], next_id = memory.add([NewEntry(text)], encoder), text, next_id + 1
        elif entry in expected:
            if what == "delete":
                memory = memory.delete([entry])
                del expected[entry]
            else:
                memory, expected[entry] = memory.replace(entry, NewEntry(text), encoder), text
        else:
            with pytest.raises(UserError, match=f"has no entry {entry}"):
                memory.delete([entry])
    assert texts(memory) == expected
    knowledge = memory.load()
    assert knowledge.entry_N.tolist() == sorted(expected)
    expected_vectors = encoder.encode(encoder.tokenize([expected[n] for n in sorted(expected)]))
    assert np.allclose(knowledge.key_NQ, expected_vectors.key_MQ, atol=1e-6)


# ── bad input and damage ────────────────────────────────────────────────────


def test_what_cannot_be_edited_is_named(memory, encoder, tmp_path, facts) -> None:
    for work, message in (
        (lambda: memory.delete([4, 77]), "version 1 has no entry 77"),
        (lambda: memory.replace(-1, NewEntry("w1"), encoder), "has no entry -1"),
        (lambda: memory.add([], encoder), "nothing to add"),
        (lambda: memory.add([NewEntry("w1"), NewEntry("  ")], encoder), "entry 1 has no text"),
        (lambda: list(memory.entries([3, 99])), "has no entry 99"),
        (lambda: memory.load().vectors(torch.tensor([99])), "has no entry 99"),
        (lambda: KnowledgeMemory.build(tmp_path / "none", [], encoder), "needs entries, and none were given"),
        (lambda: KnowledgeMemory.build(memory.folder, facts, encoder), "a knowledge memory is here already"),
        (lambda: KnowledgeMemory.open(tmp_path / "nowhere"), "no knowledge memory here"),
        (lambda: KnowledgeMemory.open(memory.folder, 9), "no version 9; there are 1 to 1"),
    ):
        with pytest.raises(UserError, match=message):
            work()
    assert KnowledgeMemory.open(memory.folder).version == 1


def test_damage_is_found_and_named(memory) -> None:
    segment = memory.manifest.segments[1]
    path = memory.folder / segment.vectors.name
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    assert memory.verify() == [f"{path}: damaged (its checksum is not the version's)"]
    path.write_bytes(raw[:-4])
    with pytest.raises(UserError, match="damaged: .* bytes, the version says"):
        memory.load()
    path.unlink()
    with pytest.raises(UserError, match="this file of the memory is missing"):
        memory.load()
    assert memory.verify() == [f"{path}: missing"]


def test_a_damaged_manifest_is_named_and_older_versions_are_still_there(memory) -> None:
    memory.delete([0])
    path = memory.folder / "versions" / "00000002.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "next_id": 99}))
    with pytest.raises(UserError, match=r"00000002.json: damaged: its checksum is not that of its contents"):
        KnowledgeMemory.open(memory.folder)
    path.write_text("{")
    with pytest.raises(UserError, match=r"00000002.json: damaged"):
        KnowledgeMemory.open(memory.folder)
    assert len(KnowledgeMemory.open(memory.folder, 1)) == 12


def test_a_damaged_current_manifest_is_mended_by_a_swap(memory, encoder) -> None:
    memory.add([NewEntry("w1"), NewEntry("w2")], encoder)
    path = memory.folder / "versions" / "00000002.json"
    path.write_bytes(path.read_bytes()[:-20] + b"\xff" * 20)
    with pytest.raises(versions.DamagedVersion, match=r"memory swap .*memory .*memory --version 1"):
        memory.delete([0])
    old = KnowledgeMemory.open(memory.folder, 1)
    back = old.swap(old)
    assert (back.version, texts(back)) == (3, texts(memory))
    assert not back.verify()
    assert [edit.version for edit in back.history()] == [1, 3]
    added = back.add([NewEntry("w5")], encoder)
    assert max(texts(added)) >= 14  # 12 and 13 were given in the version that is lost
    KnowledgeMemory.prune(memory.folder)
    assert not added.verify()


def test_where_no_older_version_is_sound_nothing_is_promised(memory) -> None:
    memory.delete([0])
    for number in (1, 2):
        (memory.folder / "versions" / f"{number:08d}.json").write_text("{")
    with pytest.raises(versions.DamagedVersion, match="No older version is left to publish again"):
        KnowledgeMemory.open(memory.folder)


def test_a_disk_without_locks_is_named_and_nothing_is_published(memory, encoder, monkeypatch) -> None:
    def refuse(file, operation: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    for edit in (lambda: memory.add([NewEntry("w1")], encoder), lambda: KnowledgeMemory.prune(memory.folder)):
        with pytest.raises(UserError, match=r"\.lock: cannot be locked: No locks available. Nothing was changed."):
            edit()
    assert versions.numbers(memory.folder) == [1]
    assert not KnowledgeMemory.open(memory.folder).verify()


def test_damaged_files_are_not_taken_for_finished_ones(memory, encoder, make_model, words_tokenizer) -> None:
    """Damaged files of an interrupted refresh or an older version are written again, with the same bytes."""
    other = DocumentEncoder(make_model(seed=4), words_tokenizer, "new")
    fresh = memory.refresh(other)
    for segment, damage in zip(fresh.manifest.segments, (lambda raw: raw[:-8] + bytes(8), lambda raw: raw[:40])):
        path = memory.folder / segment.vectors.name
        path.write_bytes(damage(path.read_bytes()))
    assert len(fresh.verify()) == 2
    again = fresh.refresh(other)
    assert again.manifest.segments == fresh.manifest.segments
    assert not again.verify() and not fresh.verify()
    added = again.add([NewEntry("w7 w8")], other)
    segment = added.manifest.segments[-1]
    for info in (segment.documents, segment.vectors):
        path = memory.folder / info.name
        raw = bytearray(path.read_bytes())
        raw[len(raw) // 2] ^= 255
        path.write_bytes(raw)
    assert added.verify()
    twice = added.add([NewEntry("w7 w8")], other)
    assert not twice.verify()
    assert [entry.text for entry in twice.entries([12, 13])] == ["w7 w8"] * 2


def test_several_changes_are_one_version_or_none(memory, encoder) -> None:
    changes = [Change((3,), (NewEntry("w99"),)), Change((4, 5)), Change(entries=(NewEntry("w98"),)), Change((12,))]
    edited = memory.edit(changes, encoder)
    assert edited.version == 2
    assert texts(edited) == {n: "w99" if n == 3 else text for n, text in texts(memory).items() if n not in (4, 5)}
    for wrong, message in (
        ([changes[0], Change((4,))], "has no entry 4"),
        ([changes[0], Change(entries=(NewEntry(" "),))], "has no text"),
        ([], "nothing to do"),
    ):
        with pytest.raises(UserError, match=message):
            edited.edit(wrong, encoder)
    with pytest.raises(UserError, match="8 entries would be left, the model retrieves 9"):
        edited.edit([Change((0, 1))], None, least=9)
    assert KnowledgeMemory.open(memory.folder).version == 2


def test_pruning_waits_for_an_edit_that_names_a_file_of_an_old_version(memory, encoder, monkeypatch) -> None:
    """The edit reuses a file that only version 2 has; pruning that version must not delete it."""
    added = memory.add([NewEntry("w7 w8")], encoder)
    added.delete([12])
    publish, pruned = versions.publish, []
    pruning = threading.Thread(target=lambda: pruned.append(KnowledgeMemory.prune(memory.folder)))

    def slow(folder, version):
        pruning.start()
        pruning.join(0.3)  # it must be waiting
        assert not pruned
        publish(folder, version)

    monkeypatch.setattr(versions, "publish", slow)
    again = memory.add([NewEntry("w7 w8")], encoder)
    pruning.join(30)
    assert pruned == [[1, 2, 3]]
    assert not again.verify()
    assert texts(again)[13] == "w7 w8"


def test_two_builds_of_the_same_are_the_same_bytes(memory, tmp_path, facts, encoder) -> None:
    again = KnowledgeMemory.build(tmp_path / "again", facts, encoder, dtype="float32", entries_per_segment=5)
    assert again.manifest == memory.manifest
