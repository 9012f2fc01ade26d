"""Rules tidy what they name, touch nothing else, and are off unless a task names them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pema_ray.tasks import list_tasks, load_task
from pema_ray.tasks.postprocess import RULES, tidy


@pytest.mark.parametrize(
    ("rule", "answer", "expected"),
    [
        ("first_line", "\n\n He said.\nAnd then", "He said."),
        ("first_line", "He said.", "He said."),
        ("first_line", "   ", ""),
        ("strip_spaces", "  He \t said\n so ", "He said so"),
        ("cut_echoed_prompt", "He went. And he went unto", "He went."),
        ("cut_echoed_prompt", "And he went unto them", "And he went unto them"),
        ("collapse_repeats", "very very very good", "very good"),
        ("collapse_repeats", "very very good, that that", "very very good, that that"),
        ("cut_small_talk", "He went. I'm not sure", "He went."),
        ("cut_small_talk", "He went ........ on", "He went"),
        ("cut_small_talk", "I'm here", "I'm here"),
    ],
)
def test_a_rule_does_what_its_name_says(rule: str, answer: str, expected: str):
    assert tidy(answer, "And he went", [rule]) == (expected, [rule] if expected != answer else [])


@given(st.text(max_size=60), st.text(max_size=20))
def test_no_rule_is_on_unless_named(answer: str, source: str):
    assert tidy(answer, source, ()) == (answer, [])


@given(st.text(max_size=60), st.text(max_size=20), st.sampled_from(sorted(RULES)))
def test_no_rule_fails_or_lengthens_an_answer(answer: str, source: str, rule: str):
    assert len(tidy(answer, source, [rule])[0]) <= len(answer)


@pytest.mark.parametrize("task", list_tasks())
@pytest.mark.parametrize("answer", ["Wilhelm I. war König.", "I'm sure that 50% agree ...", "Ja ja ja, sagte er."])
def test_the_shipped_rules_leave_valid_text_alone(task: str, answer: str):
    assert tidy(f" {answer}\n", "William I was king.", load_task(task).postprocess)[0] == answer


def test_rules_are_applied_in_the_order_named():
    assert tidy("a\nb", "", ["first_line", "strip_spaces"]) == ("a", ["first_line"])
    assert tidy("a\nb", "", ["strip_spaces", "first_line"]) == ("a b", ["strip_spaces"])
