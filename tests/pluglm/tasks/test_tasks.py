"""Files of tasks in their usual formats: read, cut into features, answered, scored."""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pema_ray.errors import UserError
from pema_ray.pluglm.finetune_config import TaskSettings
from pema_ray.pluglm.learning.in_task import TAG, entries_of
from pema_ray.pluglm.learning.masking import IGNORED
from pema_ray.pluglm.tasks import make_task


def task_of(kind: str, **settings: Any) -> Any:
    return make_task(TaskSettings(kind=kind, **settings))  # pyright: ignore[reportArgumentType]


def logits_of(rows: list[list[float]]) -> Any:
    return SimpleNamespace(logits=torch.tensor(rows))


def test_a_glue_pair_table(tmp_path, words_tokenizer) -> None:
    path = tmp_path / "mrpc.tsv"
    path.write_text('label\ts1\ts2\n1\tw1 "w2\tw3\n0\tw4\tw5 w6\n')  # a lone quote is a character, as GLUE has it
    task = task_of("classification", text_column="s1", pair_column="s2", metric="glue/mrpc")
    examples = task.read(path)
    task.prepare(examples)
    assert [(example.text, example.pair, example.label) for example in examples] == [
        ('w1 "w2', "w3", "1"),
        ("w4", "w5 w6", "0"),
    ]
    features = task.features(examples, words_tokenizer, 16)
    assert features[1].token_ids == words_tokenizer("w4", "w5 w6")["input_ids"]
    assert features[1].type_ids == [0, 0, 0, 1, 1, 1]
    assert task.collate(features, 9)["labels"].tolist() == [1, 0]
    decoded = task.decode(logits_of([[0.1, 0.9], [0.2, 0.8]]), features, examples)
    answers = task.answers(examples, list(zip([0, 1], decoded)))
    assert answers == {"0": "1", "1": "1"}
    assert task.scores(examples, answers) == pytest.approx({"accuracy": 0.5, "f1": 2 / 3})
    assert task.main == "accuracy"


def test_tables_without_header_and_other_formats(tmp_path) -> None:
    (tmp_path / "cola.tsv").write_text("gj04\t1\t\tOne sentence.\ngj04\t0\t*\tAnother.\n")
    task = task_of("classification", text_column="3", label_column="1", header=False, metric="glue/cola")
    assert [example.text for example in task.read(tmp_path / "cola.tsv")] == ["One sentence.", "Another."]
    (tmp_path / "stsb.jsonl").write_text('{"sentence": "a", "label": 2.5}\n{"sentence": "b", "label": "3"}\n')
    task = task_of("regression")
    examples = task.read(tmp_path / "stsb.jsonl")
    features = task.features(examples, _Plain(), 8)
    assert task.collate(features, 4)["labels"].tolist() == [2.5, 3.0]
    assert task.scores(examples, {"0": 1.0, "1": 2.0}) == {"pearson": pytest.approx(1), "spearmanr": pytest.approx(1)}


class _Plain:
    """One token per character."""

    def __call__(self, texts: list[str], pairs: Any, **_: Any) -> dict[str, Any]:
        return {"input_ids": [[1] * len(text) for text in texts], "token_type_ids": [[0] * len(text) for text in texts]}


def test_tags_of_words_cut_into_windows(tmp_path, words_tokenizer) -> None:
    path = tmp_path / "ner.conll"
    path.write_text("-DOCSTART- O\n\nw1 NN B-X\nw2 NN I-X\n\nw3 NN O\n" + "".join(f"w{n} NN O\n" for n in range(4, 12)))
    task = task_of("tokens")
    examples = task.read(path)
    task.prepare(examples)
    assert [example.words[:2] for example in examples] == [("w1", "w2"), ("w3", "w4")]
    assert task.labels == ["B-X", "I-X", "O"]
    features = task.features(examples, words_tokenizer, 6)  # four words a window
    assert [feature.example for feature in features] == [0, 1, 1, 1]
    assert task.collate(features[:1], 6)["labels"].tolist() == [[IGNORED, 0, 1, IGNORED, IGNORED, IGNORED]]
    logits = torch.zeros(4, 6, 3)
    logits[..., 2] = 1.0  # O
    logits[3, 1, 0] = 2.0  # B-X at the ninth word of the second sentence
    decoded = task.decode(SimpleNamespace(logits=logits), features, examples)
    answers = task.answers(examples, list(zip([feature.example for feature in features], decoded)))
    assert answers["0"] == ["O", "O"]
    assert answers["1"] == ["O"] * 8 + ["B-X"]
    (tmp_path / "same.jsonl").write_text('{"tokens": ["w1", "w2"], "tags": ["B-X", "I-X"]}\n')
    assert task.read(tmp_path / "same.jsonl")[0].label == ["B-X", "I-X"]


def squad(tmp_path, golds: list[tuple[str, int]], context: str, version: str = "1.1") -> Any:
    answers = [{"text": text, "answer_start": start} for text, start in golds]
    paragraph = {"context": context, "qas": [{"id": "q1", "question": "w1 w2", "answers": answers}]}
    path = tmp_path / "squad.json"
    path.write_text(json.dumps({"version": version, "data": [{"title": "t", "paragraphs": [paragraph]}]}))
    return path


def test_spans_of_a_long_passage(tmp_path, words_tokenizer) -> None:
    words = [f"w{n}" for n in range(20, 40)]
    context = " ".join(words)
    start = context.index("w33")
    task = task_of("answers", stride=2)
    examples = task.read(squad(tmp_path, [("w33 w34", start)], context))
    task.prepare(examples)
    features = task.features(examples, words_tokenizer, 12)
    assert len(features) > 2
    with_answer = [feature for feature in features if feature.targets["start_positions"]]
    for feature in with_answer:
        begin, end = (feature.spans[feature.targets[f"{name}_positions"]] for name in ("start", "end"))
        assert context[begin[0] : end[1]] == "w33 w34"
    assert with_answer
    output = SimpleNamespace(
        start_logits=torch.zeros(len(features), 12), end_logits=torch.zeros(len(features), 12)
    )  # equal everywhere but at the answer
    number = features.index(with_answer[0])
    output.start_logits[number, with_answer[0].targets["start_positions"]] = 5.0
    output.end_logits[number, with_answer[0].targets["end_positions"]] = 5.0
    decoded = list(zip([0] * len(features), task.decode(output, features, examples)))
    answers = task.answers(examples, decoded)
    assert answers == {"q1": "w33 w34"}
    assert task.scores(examples, answers) == {"exact_match": 1.0, "f1": 1.0}


def test_a_question_without_an_answer(tmp_path, words_tokenizer) -> None:
    task = task_of("answers")
    examples = task.read(squad(tmp_path, [], "w5 w6", "2.0"))
    task.prepare(examples)
    features = task.features(examples, words_tokenizer, 16)
    assert dict(features[0].targets) == {"start_positions": 0, "end_positions": 0}
    start = torch.tensor([[3.0, 0, 0, 0, 1, 0, 0]])
    decoded = task.decode(SimpleNamespace(start_logits=start, end_logits=start), features, examples)
    answers = task.answers(examples, [(0, decoded[0])])
    assert answers == {"q1": ""}
    assert task.scores(examples, answers) == {"exact_match": 1.0, "f1": 1.0}


BIOASQ = {
    "questions": [
        {"id": "a", "type": "yesno", "body": "w1", "exact_answer": "Yes", "snippets": [{"text": "w2"}, {"text": "w3"}]},
        {"id": "b", "type": "yesno", "body": "w4", "exact_answer": "no", "snippets": [{"text": "w5"}]},
        {"id": "c", "type": "factoid", "body": "w6", "exact_answer": [["W7 w8", "w9"]],
         "snippets": [{"text": "w10 w7 w8"}, {"text": "w11 w12"}, {"text": "w9 w13"}]},
        {"id": "d", "type": "list", "body": "w14", "exact_answer": [["x"]], "snippets": []},
    ]
}  # fmt: skip


def test_bioasq_questions(tmp_path, words_tokenizer) -> None:
    path = tmp_path / "bioasq.json"
    path.write_text(json.dumps(BIOASQ))
    task = task_of("yes_no")
    examples = task.read(path)
    assert [(example.id, example.label, example.pair) for example in examples] == [
        ("a", "yes", "w2 w3"),
        ("b", "no", "w5"),
    ]
    assert task.scores(examples, {"a": "yes", "b": "no"})["macro_f1"] == 1.0
    task = task_of("factoid")
    examples = task.read(path)
    features = task.features(examples, words_tokenizer, 16)
    targets = [tuple(feature.targets.values()) for feature in features]
    assert targets == [(4, 5), (0, 0), (3, 3)]
    logits = torch.zeros(3, 7)
    logits[2, 3] = 4.0  # w9
    logits[0, 3] = 3.0  # w10
    decoded = task.decode(SimpleNamespace(start_logits=logits, end_logits=logits), features, examples)
    answers = task.answers(examples, list(enumerate(decoded)))
    assert answers["c"][:2] == ["w9", "w10"]
    assert len(answers["c"]) == 5
    assert task.scores(examples, answers) == {"strict_accuracy": 1.0, "lenient_accuracy": 1.0, "mrr": 1.0}


def test_a_factoids_answer_is_found_behind_letters_that_grow_in_lower_case(tmp_path) -> None:
    path = tmp_path / "bioasq.json"
    task = task_of("factoid")
    for exact in ("W7", ["W7"], [["W7"]]):
        question = {"id": "a", "type": "factoid", "body": "w1", "exact_answer": exact, "snippets": [{"text": "İİ w7"}]}
        path.write_text(json.dumps({"questions": [question]}))
        (example,) = task.read(path)
        assert (example.label, example.starts, task.label_text(example)) == (["W7"], (3,), "w7")


def test_labels_that_only_look_like_integers_are_sorted_as_text(tmp_path) -> None:
    path = tmp_path / "labels.jsonl"
    for labels, expected in ((("10", "9", "-1"), ["-1", "9", "10"]), (("10", "9", "²"), ["10", "9", "²"])):
        path.write_text("".join(json.dumps({"sentence": "w1", "label": label}) + "\n" for label in labels))
        task = task_of("classification")
        task.prepare(task.read(path))
        assert task.labels == expected


def test_cloze_questions(tmp_path, words_tokenizer) -> None:
    path = tmp_path / "lama.jsonl"
    rows = [
        {"uuid": "x", "masked_sentences": ["w1 [MASK] w2"], "obj_label": "w3"},
        {"masked_sentences": ["w4 [MASK]"], "obj_label": "w5 w6"},  # two tokens: cannot be decoded
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = task_of("cloze")
    examples = task.read(path)
    features = task.features(examples, words_tokenizer, 16)
    vocabulary = words_tokenizer.get_vocab()
    labels = task.collate(features, 5)["labels"]
    assert labels[0].tolist() == [IGNORED, IGNORED, vocabulary["w3"], IGNORED, IGNORED]
    assert bool((labels[1] == IGNORED).all())
    logits = torch.zeros(2, 5, len(vocabulary))
    logits[:, 2, vocabulary["w3"]] = 1.0
    decoded = task.decode(SimpleNamespace(logits=logits), features, examples)
    answers = task.answers(examples, list(enumerate(decoded)))
    assert answers == {"x": "w3", "1": "w3"}
    assert task.scores(examples, answers) == {"p@1": 0.5}


def test_training_examples_as_entries_keep_their_labels(tmp_path, words_tokenizer) -> None:
    path = tmp_path / "train.jsonl"
    texts = [" ".join(f"w{n}" for n in range(30)), "w1 w2", "w1 w2"]
    path.write_text(
        "".join(json.dumps({"sentence": text, "label": f"w{90 + n}"}) + "\n" for n, text in enumerate(texts))
    )
    task = task_of("classification")
    examples = task.read(path)
    entries = entries_of(task, examples, words_tokenizer, 10)
    assert entries[0].text == "w0 w1 w2 w3 w4 w5 w6 w90"  # eight tokens and two special ones
    assert entries[1].text == "w1 w2 w91"
    assert {entry.tags for entry in entries} == {(TAG,)}
    assert entries[1].document_id == entries[2].document_id  # copies must not give each other's labels away
    assert entries[0].document_id != entries[1].document_id
    with pytest.raises(UserError, match="Training example 0: its label leaves no room"):
        entries_of(task, examples, words_tokenizer, 3)


def test_a_long_cloze_sentence_keeps_its_answer_as_an_entry(tmp_path, words_tokenizer) -> None:
    """In eight tokens, two of them special: the words nearest to the answer."""
    task, words = task_of("cloze"), [f"w{n}" for n in range(20)]
    path = tmp_path / "lama.jsonl"
    for place, expected in (
        (0, "w99 w1 w2 w3 w4 w5"),
        (10, "w7 w8 w9 w99 w11 w12"),
        (18, "w14 w15 w16 w17 w99 w19"),
        (19, "w14 w15 w16 w17 w18 w99"),
    ):
        sentence = " ".join([*words[:place], "[MASK]", *words[place + 1 :]])
        path.write_text(json.dumps({"masked_sentences": [sentence], "obj_label": "w99"}) + "\n")
        (entry,) = entries_of(task, task.read(path), words_tokenizer, 8)
        assert entry.text.strip() == expected
        assert len(words_tokenizer(entry.text)["input_ids"]) == 8
    path.write_text('{"sentence": "w1 [MASK] w2", "label": "w3"}\n{"sentence": "w4", "label": "w5"}\n')
    task = task_of("classification")  # where a mask is a word like any other
    assert entries_of(task, task.read(path), words_tokenizer, 8)[0].text == "w1 [MASK] w2 w3"


def test_snippets_of_one_question_are_kept_apart_from_each_other(tmp_path, words_tokenizer) -> None:
    """Otherwise one snippet's entry would reveal the answer to another."""
    path = tmp_path / "bioasq.json"
    path.write_text(json.dumps(BIOASQ))
    task = task_of("factoid")
    entries = entries_of(task, task.read(path), words_tokenizer, 16)
    assert len(entries) == 3
    assert len({entry.document_id for entry in entries}) == 1
    squad_task = task_of("answers")
    other = squad_task.read(squad(tmp_path, [("w5", 0)], "w5 w6"))[0]
    assert other.document_id not in {entry.document_id for entry in entries}


def test_metrics_that_a_task_does_not_have_are_refused_before_it_is_learned(tmp_path) -> None:
    path = tmp_path / "three.jsonl"
    path.write_text("".join(f'{{"sentence": "w1", "label": "{label}"}}\n' for label in "abc"))
    for metric in ("f1", "glue/mrpc"):
        task = task_of("classification", metric=metric)
        with pytest.raises(UserError, match=r"'f1' is of two classes, and the training examples have 3. Use macro_f1"):
            task.prepare(task.read(path))
    task = task_of("classification", metric="pearson")
    with pytest.raises(UserError, match="Metric 'pearson': is not one of classes; use accuracy"):
        task.prepare(task.read(path))
    with pytest.raises(UserError, match="Metric 'accuracy': is not one of numbers; use pearson"):
        task_of("regression", metric="accuracy")


@pytest.mark.parametrize(
    ("kind", "name", "text", "message"),
    [
        ("classification", "a.tsv", "sentence\tlabel\nx\n", r"a.tsv, line 2: 1 columns, expected 2"),
        ("classification", "a.tsv", "sentense\tlabel\nx\t1\n", r"no column 'sentence'.*Did you mean 'sentense'"),
        ("classification", "a.txt", "x", r"a.txt: expected .tsv, .csv, .jsonl or .parquet"),
        ("classification", "a.jsonl", '{"sentence": 3}\n', "example 1: a text is missing"),
        ("classification", "a.jsonl", "{\n", "a.jsonl, line 1: no JSON"),
        ("classification", "a.jsonl", "", "holds no examples"),
        ("tokens", "a.conll", "word\n", "line 1: expected a word and a tag"),
        ("tokens", "a.jsonl", '{"tokens": ["a"], "tags": []}\n', "expected 'tokens' and as many 'tags'"),
        ("answers", "a.json", "[]", "expected a JSON object"),
        ("answers", "a.json", '{"data": [{"paragraphs": [{"qas": [{"id": 1}]}]}]}', "question 1: not as SQuAD has it"),
        ("yes_no", "a.json", '{"questions": []}', "no questions of type 'yesno'"),
        ("yes_no", "a.json", '{"questions": ["x"]}', "question 1: not as BioASQ has it"),
        (
            "factoid",
            "a.json",
            json.dumps(
                {
                    "questions": [
                        {
                            "type": "factoid",
                            "id": "x",
                            "body": "w1",
                            "exact_answer": [[5]],
                            "snippets": [{"text": "w2"}],
                        }
                    ]
                }
            ),
            "question x: not as BioASQ has it",
        ),
        ("cloze", "a.jsonl", '{"masked_sentences": ["x"], "obj_label": "y"}\n', r"expected one \[MASK\]"),
    ],
)
def test_files_that_are_not_as_they_should_be(tmp_path, kind, name, text, message) -> None:
    path = tmp_path / name
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        task_of(kind).read(path)


def test_an_answer_that_is_not_where_it_should_be(tmp_path) -> None:
    with pytest.raises(UserError, match="question q1: answer 'w6' is not at 0"):
        task_of("answers").read(squad(tmp_path, [("w6", 0)], "w5 w6"))
