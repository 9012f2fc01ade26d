"""Reads task files as people have them: GLUE tables, CoNLL, SQuAD, BioASQ and LAMA JSON. Knows no model.

Every fault is a `UserError` that names the file and the place in it.
"""

from __future__ import annotations

import csv
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from pema_ray.errors import UserError, nearest


@dataclass(frozen=True, slots=True)
class TaskExample:
    """One example of any task.

    Attributes:
        text: what is judged; a question; a sentence with a mask.
        pair: the second sentence, or the passage that a question is about.
        label: a class, a number, a tag for each word, gold answers; None: not known.
        words: of token classification.
        starts: where gold answers begin in `pair`.
        group: examples that share an answer (the snippets of one question).
    """

    id: str
    text: str
    label: Any = None
    pair: str = ""
    words: tuple[str, ...] = ()
    starts: tuple[int, ...] = ()
    group: str = ""

    @property
    def document_id(self) -> str:
        """Names what the example says, its label apart, so that neither it nor its copies retrieve themselves.

        What belongs to a question is named by the question alone: its snippets would give each other's answers away.
        """
        said = json.dumps([self.text] if self.group else [self.text, self.pair, self.words], ensure_ascii=False)
        return f"example {hashlib.blake2b(said.encode(), digest_size=12).hexdigest()}"


def read_table(path: Path, text: str, pair: str | None, label: str, header: bool = True) -> list[TaskExample]:
    """Examples from .tsv (as GLUE's: tabs, nothing quoted), .csv, .jsonl or .parquet; `label` may be absent.

    Args:
        header: of .tsv and .csv; without one, columns are named "0", "1", …
    """
    rows = _rows(path, header)
    if not rows:
        raise UserError(f"{path}: holds no examples.")
    for column in (text, *([pair] if pair else [])):
        if column not in rows[0]:
            known = list(rows[0])
            raise UserError(f"{path}: no column '{column}'; it has {', '.join(known)}.{nearest(column, known)}")
    found = []
    for number, row in enumerate(rows):
        values = [row.get(one) for one in (text, *([pair] if pair else []))]
        if any(not isinstance(value, str) for value in values):
            raise UserError(f"{path}, example {number + 1}: a text is missing.")
        found.append(TaskExample(str(number), str(values[0]), row.get(label), str(values[1]) if pair else ""))
    return found


def read_words(path: Path) -> list[TaskExample]:
    """Sentences with a tag a word: JSON Lines (`tokens`, `tags`), or CoNLL: word first, tag last, blank lines apart."""
    found = []
    if path.suffix == ".jsonl":
        for number, row in enumerate(read_json_lines(path)):
            tokens, tags = row.get("tokens"), row.get("tags")
            if not isinstance(tokens, list) or (tags is not None and len(tags) != len(tokens)):
                raise UserError(f"{path}, example {number + 1}: expected 'tokens' and as many 'tags'.")
            found.append(_words(number, tokens, tags))
    else:
        sentence: list[list[str]] = []
        for line_number, line in enumerate([*_text(path).splitlines(), ""], 1):
            if line.strip() and not line.startswith("-DOCSTART-"):
                sentence.append(line.split())
                if len(sentence[-1]) < 2:
                    raise UserError(f"{path}, line {line_number}: expected a word and a tag, got {line!r}.")
            elif sentence:
                found.append(_words(len(found), [row[0] for row in sentence], [row[-1] for row in sentence]))
                sentence = []
    if not found:
        raise UserError(f"{path}: holds no sentences.")
    return found


def read_squad(path: Path) -> list[TaskExample]:
    """SQuAD 1.1 or 2.0: one example a question; its gold answers, none where it cannot be answered."""
    found = []
    for number, (paragraph, question) in enumerate(_squad_questions(path)):
        try:
            answers = question.get("answers", [])
            golds, starts = [one["text"] for one in answers], [int(one["answer_start"]) for one in answers]
            context = paragraph["context"]
            found.append(
                TaskExample(
                    str(question["id"]), question["question"], golds, context, starts=tuple(starts),
                    group=str(question["id"]),
                )
            )  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, question {number + 1}: not as SQuAD has it: {error!r}.") from None
        for gold, start in zip(golds, starts):
            if context[start : start + len(gold)] != gold:
                raise UserError(f"{path}, question {question['id']}: answer {gold!r} is not at {start} of its context.")
    if not found:
        raise UserError(f"{path}: holds no questions.")
    return found


def read_bioasq(path: Path, kind: str) -> list[TaskExample]:
    """BioASQ's questions of type `yesno` or `factoid`: one example a question, or for factoid one a snippet.

    A factoid's label is its gold answers' synonyms, in one list.
    """
    found = []
    for question in _json(path).get("questions", []):
        if question.get("type") != kind:
            continue
        try:
            key, body, exact = str(question["id"]), question["body"], question.get("exact_answer")
            snippets = [one["text"] for one in question["snippets"]]
        except (KeyError, TypeError) as error:
            raise UserError(f"{path}, question {question.get('id')}: not as BioASQ has it: {error!r}.") from None
        if not snippets:
            raise UserError(f"{path}, question {key}: has no snippets.")
        if kind == "yesno":
            label = exact.lower() if isinstance(exact, str) else None
            if label not in ("yes", "no", None):
                raise UserError(f"{path}, question {key}: exact_answer {exact!r}: expected yes or no.")
            found.append(TaskExample(key, body, label, " ".join(snippets), group=key))
            continue
        listed = [] if exact is None else [[gold] if isinstance(gold, str) else gold for gold in exact]
        golds = [one for group in listed for one in group] or None  # none: a question to be answered, not scored
        for number, snippet in enumerate(snippets):
            places = [(gold, snippet.lower().find(gold.lower())) for gold in golds or ()]
            starts = tuple(place for _, place in places if place >= 0)
            found.append(TaskExample(f"{key}.{number}", body, golds, snippet, starts=starts, group=key))
    if not found:
        raise UserError(f"{path}: holds no questions of type '{kind}'.")
    return found


def read_lama(path: Path) -> list[TaskExample]:
    """LAMA's JSON Lines: `masked_sentences` (the first is used) with [MASK], and `obj_label`."""
    found = []
    for number, row in enumerate(read_json_lines(path)):
        sentences, answer = row.get("masked_sentences"), row.get("obj_label")
        if not isinstance(sentences, list) or not sentences or not isinstance(answer, str):
            raise UserError(f"{path}, line {number + 1}: expected 'masked_sentences' and 'obj_label'.")
        if sentences[0].count("[MASK]") != 1:
            raise UserError(f"{path}, line {number + 1}: expected one [MASK] in {sentences[0]!r}.")
        found.append(TaskExample(str(row.get("uuid", number)), sentences[0], answer))
    if not found:
        raise UserError(f"{path}: holds no sentences.")
    return found


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Objects, one a line."""
    found = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            found.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}.") from None
        if not isinstance(found[-1], dict):
            raise UserError(f"{path}, line {number}: expected a JSON object.")
    return found


def _rows(path: Path, header: bool) -> Sequence[Mapping[str, Any]]:
    if path.suffix == ".jsonl":
        return read_json_lines(path)
    if path.suffix == ".parquet":
        _require(path)
        try:
            return pq.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}.") from None
    if path.suffix not in (".tsv", ".csv"):
        raise UserError(f"{path}: expected .tsv, .csv, .jsonl or .parquet.")
    plain = path.suffix == ".tsv"
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if plain else {}
    rows = [row for row in csv.reader(_text(path).splitlines(), **options) if row]
    names = rows.pop(0) if header and rows else [str(number) for number in range(len(rows[0]) if rows else 0)]
    for number, row in enumerate(rows, 2 if header else 1):
        if len(row) != len(names):
            raise UserError(f"{path}, line {number}: {len(row)} columns, expected {len(names)}.")
    return [dict(zip(names, row)) for row in rows]


def _words(number: int, words: Sequence[str], tags: Sequence[str] | None) -> TaskExample:
    return TaskExample(str(number), " ".join(words), None if tags is None else list(tags), words=tuple(words))


def _squad_questions(path: Path) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    try:
        for article in _json(path)["data"]:
            for paragraph in article["paragraphs"]:
                for question in paragraph["qas"]:
                    yield paragraph, question
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not as SQuAD has it: {error!r}.") from None


def _json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}.") from None
    if not isinstance(found, dict):
        raise UserError(f"{path}: expected a JSON object.")
    return found


def _text(path: Path) -> str:
    _require(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
