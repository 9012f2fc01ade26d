"""Reads task files in their usual formats: GLUE tables, CoNLL, SQuAD, BioASQ and LAMA JSON. Knows no model.

Every fault is a `UserError` that names the file and the place in it.
"""

from __future__ import annotations

import csv
import hashlib
import json
import re
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
        text: a sentence, a question, or a sentence with a mask.
        pair: the second sentence, or the question's passage.
        label: a class, a number, a tag for each word, gold answers; None: unknown.
        words: of token classification.
        starts: starts of the gold answers in `pair`.
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
        """A hash of the example without its label, so that neither it nor its copies retrieve themselves.

        Snippets share their question's id: otherwise they would reveal each other's answers.
        """
        content = json.dumps([self.text] if self.group else [self.text, self.pair, self.words], ensure_ascii=False)
        return f"example {hashlib.blake2b(content.encode(), digest_size=12).hexdigest()}"


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
            columns = list(rows[0])
            raise UserError(f"{path}: no column '{column}'; it has {', '.join(columns)}.{nearest(column, columns)}")
    examples = []
    for number, row in enumerate(rows):
        texts = [row.get(text), row.get(pair) if pair else ""]
        if any(not isinstance(value, str) for value in texts):
            raise UserError(f"{path}, example {number + 1}: a text is missing.")
        examples.append(TaskExample(str(number), str(texts[0]), row.get(label), str(texts[1])))
    return examples


def read_words(path: Path) -> list[TaskExample]:
    """Sentences of tagged words: JSON Lines (`tokens`, `tags`), or CoNLL: word first, tag last, blank lines between."""
    examples = []
    if path.suffix == ".jsonl":
        for number, row in enumerate(read_json_lines(path)):
            tokens, tags = row.get("tokens"), row.get("tags")
            if not isinstance(tokens, list) or (tags is not None and len(tags) != len(tokens)):
                raise UserError(f"{path}, example {number + 1}: expected 'tokens' and as many 'tags'.")
            examples.append(_words(number, tokens, tags))
    else:
        sentence: list[list[str]] = []
        for line_number, line in enumerate([*_text(path).splitlines(), ""], 1):
            if line.strip() and not line.startswith("-DOCSTART-"):
                sentence.append(line.split())
                if len(sentence[-1]) < 2:
                    raise UserError(f"{path}, line {line_number}: expected a word and a tag, got {line!r}.")
            elif sentence:
                examples.append(_words(len(examples), [row[0] for row in sentence], [row[-1] for row in sentence]))
                sentence = []
    return _nonempty(path, examples, "sentences")


def read_squad(path: Path) -> list[TaskExample]:
    """SQuAD 1.1 or 2.0: one example per question; without gold answers, it cannot be answered."""
    examples = []
    for number, (paragraph, question) in enumerate(_squad_questions(path)):
        try:
            answers = question.get("answers", [])
            golds = [answer["text"] for answer in answers]
            starts = tuple(int(answer["answer_start"]) for answer in answers)
            key, context = str(question["id"]), paragraph["context"]
            examples.append(TaskExample(key, question["question"], golds, context, starts=starts, group=key))
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"{path}, question {number + 1}: not as SQuAD has it: {error!r}.") from None
        for gold, start in zip(golds, starts):
            if context[start : start + len(gold)] != gold:
                raise UserError(f"{path}, question {question['id']}: answer {gold!r} is not at {start} of its context.")
    return _nonempty(path, examples, "questions")


def read_bioasq(path: Path, kind: str) -> list[TaskExample]:
    """BioASQ's questions of type `yesno` (one example per question) or `factoid` (one per snippet).

    A factoid's label is one list of all synonyms of its gold answers.
    """
    examples = []
    for number, question in enumerate(_json(path).get("questions") or [], 1):
        try:
            if question.get("type") != kind:
                continue
            key, body, exact = str(question["id"]), question["body"], question.get("exact_answer")
            snippets = [snippet["text"] for snippet in question["snippets"]]
            passage = " ".join(snippets)
            answers = [] if kind == "yesno" else [exact] if isinstance(exact, str) else exact or []
            golds = [gold for group in answers for gold in ([group] if isinstance(group, str) else group)]
            patterns = [re.compile(re.escape(gold), re.IGNORECASE) for gold in golds]
        except (KeyError, TypeError, AttributeError) as error:
            name = question.get("id", number) if isinstance(question, dict) else number
            raise UserError(f"{path}, question {name}: not as BioASQ has it: {error!r}.") from None
        if not snippets:
            raise UserError(f"{path}, question {key}: has no snippets.")
        if kind == "yesno":
            label = exact.lower() if isinstance(exact, str) else None
            if label not in ("yes", "no", None):
                raise UserError(f"{path}, question {key}: exact_answer {exact!r}: expected yes or no.")
            examples.append(TaskExample(key, body, label, passage, group=key))
            continue
        for place, snippet in enumerate(snippets):
            starts = tuple(match.start() for pattern in patterns if (match := pattern.search(snippet)))
            # without gold answers (None) a question is answered, not scored
            examples.append(TaskExample(f"{key}.{place}", body, golds or None, snippet, starts=starts, group=key))
    return _nonempty(path, examples, f"questions of type '{kind}'")


def read_lama(path: Path) -> list[TaskExample]:
    """LAMA's JSON Lines: `masked_sentences` (the first is used) with [MASK], and `obj_label`."""
    examples = []
    for number, row in enumerate(read_json_lines(path)):
        sentences, answer = row.get("masked_sentences"), row.get("obj_label")
        if not isinstance(sentences, list) or not sentences or not isinstance(answer, str):
            raise UserError(f"{path}, line {number + 1}: expected 'masked_sentences' and 'obj_label'.")
        if sentences[0].count("[MASK]") != 1:
            raise UserError(f"{path}, line {number + 1}: expected one [MASK] in {sentences[0]!r}.")
        examples.append(TaskExample(str(row.get("uuid", number)), sentences[0], answer))
    return _nonempty(path, examples, "sentences")


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """One object per line."""
    rows = []
    for number, line in enumerate(_text(path).splitlines(), 1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON: {error}.") from None
        if not isinstance(rows[-1], dict):
            raise UserError(f"{path}, line {number}: expected a JSON object.")
    return rows


def _nonempty(path: Path, examples: list[TaskExample], words: str) -> list[TaskExample]:
    if not examples:
        raise UserError(f"{path}: holds no {words}.")
    return examples


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
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
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
        content = json.loads(_text(path))
    except ValueError as error:
        raise UserError(f"{path}: no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object.")
    return content


def _text(path: Path) -> str:
    _require(path)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}.") from None


def _require(path: Path) -> None:
    if not path.is_file():
        raise UserError(f"{path}: no such file.")
