"""The demonstration on real text: formats of domains, held-out texts, intervals. Tiny texts."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pema_ray.errors import UserError
from pema_ray.pluglm.demonstration.corpora import read_domain
from pema_ray.pluglm.demonstration.domains import MEMORIES, OWN, DomainsSettings, compared, run_domains, table_rows
from pema_ray.pluglm.memory.knowledge_memory import KnowledgeMemory


def paragraphs(kind: str, count: int = 20) -> list[str]:
    return [f"{kind} {number} holds {kind} {number * 7 % count} and more of {kind}" for number in range(count)]


def write_dictionary(folder, texts: list[str]):
    """In dictd's format: places and lengths in base 64; a text may have several headwords."""
    digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/"

    def number(value: int) -> str:
        return digits[value] if value < 64 else number(value // 64) + digits[value % 64]

    body, rows = b"about this dictionary\n", [f"00databaseinfo\tA\t{number(22)}"]
    for place, text in enumerate(texts):
        one = f"{text}\n".encode()
        rows += [f"{word}{place}\t{number(len(body))}\t{number(len(one))}" for word in ("word", "also")]
        body += one
    with gzip.open(folder / "small.dict.dz", "wb") as file:
        file.write(body)
    (folder / "small.index").write_text("\n".join(rows) + "\n")
    return folder / "small.dict.dz"


def test_domains_are_read_as_people_have_them(tmp_path) -> None:
    texts = paragraphs("é")
    (tmp_path / "a.txt").write_text("\n\n".join(text.replace(" and", "\nand") for text in texts))
    (tmp_path / "b.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in [*texts, texts[0], " "]))
    pq.write_table(pa.table({"text": texts}), tmp_path / "c.parquet")
    named = [str(tmp_path / name) for name in ("a.txt", "b.jsonl", "c.parquet")]
    domains = [read_domain(name, 0.25, 3) for name in (*named, str(write_dictionary(tmp_path, texts)))]
    assert [domain.name for domain in domains] == ["a", "b", "c", "small"]
    for domain in domains:
        assert (domain.learned, domain.held_out) == (domains[0].learned, domains[0].held_out)
    assert len(domains[0].held_out) == 5
    assert sorted(domains[0].learned + domains[0].held_out) == sorted(texts)
    assert domains[0] != read_domain(named[0], 0.25, 4)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.txt", None, r"a.txt: no such file. A domain is kjv, web"),
        ("a.txt", "one", "a.txt: 1 different texts, too few to hold 10% of them out"),
        ("a.doc", "one", "a.doc: expected .jsonl"),
        ("a.jsonl", '{"body": "one"}\n', "a.jsonl: cannot be read as rows with 'text'"),
        ("a.dict", "one", "a.dict: no dictionary of dictd's format with a.index beside it"),
    ],
)
def test_what_is_no_domain_is_named(tmp_path, name, text, message) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read_domain(str(tmp_path / name), 0.1, 0)


def test_two_small_domains_are_learned_and_measured(tmp_path) -> None:
    for name in ("fish", "birds"):
        (tmp_path / f"{name}.txt").write_text("\n\n".join(paragraphs(name)))
    kinds = []
    settings = DomainsSettings(
        target=str(tmp_path / "fish.txt"), other=str(tmp_path / "birds.txt"), held_out=0.2, vocabulary=60, layers=2,
        hidden_size=16, heads=2, query_size=8, memory_feed_forward=8, top_k=3, max_tokens=24, steps=4, batch_size=8,
        contrastive_steps=2, refresh_every=2, resamples=100,
    )  # fmt: skip
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("not of the demonstration")
    demo = run_domains(tmp_path / "out", 0, settings, lambda kind, point: kinds.append(kind))
    assert (tmp_path / "out" / "mine.txt").exists()
    assert kinds == ["train"] * 4
    assert [domain.domain for domain in demo.domains] == ["fish", "birds"]
    assert demo.learned == {"fish": 16, "birds": 16}
    memory = KnowledgeMemory.open(tmp_path / "out" / "memory")
    assert memory.version == 3  # built, refreshed twice
    for domain in demo.domains:
        assert (domain.texts, domain.own_entries) == (4, 0.5)
        assert [figures.memory for figures in domain.memories] == list(MEMORIES)
        assert 0 < domain.by_frequency < np.log(60)
        own = domain.memories[0]
        assert (own.memory, own.difference, own.low, own.high) == (OWN, 0, 0, 0)
        for figures in domain.memories:
            assert figures.loss - own.loss == pytest.approx(figures.difference)
            assert figures.low <= figures.high
        assert domain.memories[MEMORIES.index("none")].difference != 0
    held_out = set(read_domain(settings.target, 0.2, 0).held_out)
    assert not held_out & {entry.text for entry in memory.entries()}
    assert json.loads((tmp_path / "out" / "demo-text.json").read_text())["seed"] == 0
    assert len(table_rows(demo)) == len(MEMORIES)


def test_two_domains_of_one_name_are_refused(tmp_path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.txt").write_text("\n\n".join(paragraphs("fish")))
    settings = DomainsSettings(target=str(tmp_path / "a/x.txt"), other=str(tmp_path / "b/x.txt"), held_out=0.2)
    with pytest.raises(UserError, match="both domains would be called 'x'"):
        run_domains(tmp_path / "out", 0, settings)
    assert not (tmp_path / "out").exists()


def test_intervals_are_of_texts_and_paired() -> None:
    """A difference shared by all texts has an interval of no width; one due to a single text has a wide one."""
    random = np.random.default_rng(0)
    own_S, masked_S, text_S = random.random(60) * 50, np.full(60, 5), np.repeat(np.arange(20), 3)
    same = compared("same", own_S + 1.0, own_S, masked_S, text_S, 500, 0)
    assert (same.difference, same.low, same.high) == pytest.approx((0.2, 0.2, 0.2))
    one = compared("one", own_S + 20.0 * (text_S == 7), own_S, masked_S, text_S, 500, 0)
    assert one.difference == pytest.approx(0.2)
    assert one.low == 0.0
    assert one.high > 0.3
