"""The page: one file, complete, true to the numbers it is made from, readable by people and by machines."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import numpy as np
import pytest

from prelar import finetune
from prelar.config import Config, load_config
from prelar.control.rollout import Episode
from prelar.report import page as report
from prelar.report.catalog import EVALUATION_CURVES, PRETRAINING_CURVES
from prelar.report.charts import number
from prelar.report.runs import read_curves, workspace_files
from prelar.report.sections import curve_figures, loss_figures, params_groups
from prelar.utils.errors import UserError
from prelar.utils.tables import write_tsv
from tests.conftest import ROOT
from tests.fake_results import METRICS, make_results

VOID = {"meta", "link", "img", "br", "hr", "input", "source", "wbr"}
VALIDATION = "validation/ssv2/index.html"
PAGES = (VALIDATION, "simulator.html")
ADDRESSES = {"src", "href", "poster", "srcset", "data", "action", "xlink:href"}


class Page(HTMLParser):
    """Checks that elements are closed in order, and collects them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.shown: dict[str, str] = {}
        self._metric: str | None = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        assert len(found) == len(attrs), f"<{tag}> repeats an attribute"
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if "data-metric" in found:
            self._metric = found["data-metric"]

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes another element"
        self._metric = None

    def handle_data(self, data: str) -> None:
        if self._metric:
            self.shown[self._metric] = data

    def all(self, *tags: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.elements if tag in tags]


@pytest.fixture
def config() -> Config:
    return load_config(ROOT / "params.yaml")


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("results")
    make_results(root)
    return root


@pytest.fixture
def text(results: Path, config: Config) -> str:
    return report.render(config, results)


def test_the_page_parses_and_every_reference_stays_inside(text: str) -> None:
    page = Page(text)
    for _, attributes in page.elements:
        for name in ADDRESSES & attributes.keys():
            if attributes[name] not in PAGES:
                assert re.match(r"(data:|#)", attributes[name] or ""), f"{name} leaves the page"
    assert not page.all("script", "iframe", "object", "embed", "base")
    style = text.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style and "@import" not in style and "@font-face" not in style
    assert "http:" not in text and "https:" not in text


def test_landmarks_labels_and_texts_for_what_is_seen(text: str) -> None:
    page = Page(text)
    assert [len(page.all(tag)) for tag in ("header", "nav", "main", "footer", "h1")] == [1] * 5
    assert page.all("html")[0]["lang"] == "en"
    identifiers = [a["id"] for _, a in page.elements if "id" in a]
    assert len(identifiers) == len(set(identifiers))
    for attributes in page.all("img"):
        assert len(attributes["alt"] or "") > 20
    assert len(page.all("img")) == 6
    videos = page.all("video")
    assert len(videos) == 3
    assert all("controls" in v and v["aria-label"] and "poster" in v and "autoplay" not in v for v in videos)
    for chart in page.all("svg"):
        assert chart["role"] == "img"
        assert set((chart["aria-labelledby"] or "").split()) <= set(identifiers)
    for link in page.all("a"):
        assert (link["href"] or "")[1:] in identifiers or link["href"] in PAGES


def test_numbers_shown_are_those_measured(text: str, results: Path) -> None:
    page = Page(text)
    values = {a["data-metric"]: a["value"] for a in page.all("data")}
    assert values.keys() >= {"success_rate", "return", "prediction_error", "prediction_error_copy"}
    measured = json.loads((results / "reports/evaluate/metrics.json").read_text())
    for name, value in values.items():
        assert name is not None and value is not None
        assert json.loads(value) == measured[name] == METRICS[name]
        expected = number(100 * measured[name]) + "%" if name == "success_rate" else number(measured[name])
        assert page.shown[name] == expected


def test_the_probe_is_shown_over_gaps_where_it_was_measured(
    tmp_path: Path, text: str, results: Path, config: Config
) -> None:
    for source in ("probe", "probe-demonstrations"):
        shown = text.split(f'id="{source}-gaps-d">')[1].split("</desc>")[0]
        assert "latent action: from 0.2" in shown and "to 0.550 at 8 frames apart" in shown
        assert "untrained encoder: from \u22120.1" in shown and "raw frame difference: from 0.1" in shown
    shutil.copytree(results, tmp_path / "before")
    for table in (tmp_path / "before/reports/evaluate").glob("*_gaps.tsv"):
        table.unlink()
    before = report.render(config, tmp_path / "before")
    assert "-gaps-d" not in before and "Latent-action probe" in before


def test_the_page_is_a_function_of_its_inputs(text: str, results: Path, config: Config) -> None:
    assert report.render(config, results) == text
    assert str(results) not in text and str(ROOT) not in text


def test_what_stands_in_the_data_is_text_not_markup(text: str) -> None:
    assert "not a video &lt;script&gt;" in text and "not a video <script>" not in text


def test_every_parameter_of_the_run_is_shown(text: str, config: Config) -> None:
    for key in ("beta_a", "action_window", "ssv2.min_frames", "cnn_depth", "observed"):
        assert re.search(rf'<td class="mono">{re.escape(key)}</td>', text), key
    assert "demos.keep_failures" not in text
    shown = {k for values in params_groups(config).values() for k in values}
    assert {k for k, v in config.model_dump().items() if not isinstance(v, dict)} <= shown


@pytest.mark.parametrize("method", ["dreamerv2", "prelar"])
def test_a_run_without_pretraining_says_so(tmp_path: Path, config: Config, method: str) -> None:
    make_results(tmp_path, pretrained=False)
    page = report.render(config.model_copy(update={"method": method}), tmp_path)
    Page(page)
    assert ("DreamerV2 has no pre-training" in page) == (method == "dreamerv2")
    assert ("no losses in <code>reports/pretrain" in page) == (method == "prelar")
    assert '<data value="0.0021"' in page


def test_a_page_of_bare_metrics(tmp_path: Path, config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.json").write_text("{}")
    report.run(config, tmp_path)
    assert capsys.readouterr().out == f"report: {tmp_path / report.PAGE}\n"
    text = (tmp_path / report.PAGE).read_text()
    Page(text)
    for sentence in ("Not measured", "No learning curve", "wrote no description of the store", "No dvc.lock"):
        assert sentence in text


def test_the_data_of_a_mixture_are_those_of_its_members(config: Config) -> None:
    mixed = Config.model_validate(
        config.model_dump()
        | {"sources": {"more": {"kind": "demos"}}, "mixtures": {"both": {"ssv2": 1, "more": 2}}}
        | {"dataset": "both"}
    )
    shown = params_groups(mixed)["Data"]
    assert {"mixtures.both.more", "ssv2.min_frames", "demos.episodes", "sources.more.kind"} <= shown.keys()
    assert not [key for key in params_groups(config)["Data"] if not key.startswith(("ssv2.", "sample."))]


def test_each_task_is_told_to_be_of_its_own_suite(text: str, tmp_path: Path, config: Config) -> None:
    assert "Meta-World’s <i>reach</i>" in text and "half of the scripted expert" in text
    assert "which lie between 0 and 10" in text
    make_results(tmp_path)
    path = tmp_path / "reports/evaluate/summary.json"
    summary = json.loads(path.read_text(encoding="utf-8"))
    summary["episodes"]["policies"].pop()
    path.write_text(json.dumps(summary), encoding="utf-8")
    for task, shown in (
        ("dmc/walker-walk", "DeepMind Control’s <i>dmc/walker-walk</i>"),
        ("mine:Env", "on <i>mine:Env</i>"),
    ):
        own = config.model_copy(update={"task": task, "dataset": "demos"})
        page = report.render(own, tmp_path).split('<section id="action"')[0]
        assert shown in page and "Meta-World" not in page
        assert "scripted expert" not in page and "between 0 and 10" not in page


def test_the_checks_of_the_store_are_shown(text: str, tmp_path: Path, config: Config) -> None:
    assert "The clips in the store: 1 of 2 checks passed on 77 rows" in text
    assert "<td>at most 1.00% of the clips are bad</td><td>passed</td>" in text
    assert "failed: 3 &lt;b&gt;" in text and f'href="{VALIDATION}"' in text
    (tmp_path / "metrics.json").write_text("{}")
    assert "results of the store’s checks are not available" in report.render(config, tmp_path)


def test_nothing_private_in_the_parameters_is_shown(results: Path, config: Config) -> None:
    private = {
        "source": ["https://me:hush@host.org:81/parts/20bn-00?token=hush", "https://host.org/20bn-01#hush"],
        "labels": "/home/hush/labels.zip",
        "ffmpeg": "~hush/bin/ffmpeg",
    }
    config = config.model_copy(update={"ssv2": config.ssv2.model_copy(update=private)})
    text = report.render(config, results)
    assert "hush" not in text
    shown = params_groups(config)["Data"]
    assert shown["ssv2.source"] == '["https://host.org:81/parts/20bn-00", "https://host.org/20bn-01"]'
    assert (shown["ssv2.labels"], shown["ssv2.ffmpeg"]) == ("…/labels.zip", "…/ffmpeg")
    assert shown["ssv2.min_frames"] == "8"


def test_the_learning_curves_are_those_that_finetuning_logs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    played = [Episode(np.ones(3, np.float32), np.zeros((3, 4), np.float32), True, None)]
    monkeypatch.setattr(finetune, "Agent", MagicMock())
    monkeypatch.setattr(finetune, "play_episodes", lambda *arguments, **options: played)
    for name, value in finetune.curve(MagicMock(), MagicMock(), MagicMock(eval_episodes=1), 0)(500).items():
        path = tmp_path / EVALUATION_CURVES.parent / f"{name}.tsv"
        write_tsv(path, {"step": [500], path.stem: [value]})
    write_tsv(tmp_path / EVALUATION_CURVES / "success_rate.tsv", {"step": [7], "success_rate": [0.7]})
    success, total = curve_figures(read_curves(workspace_files(tmp_path)), "success", "return")
    assert (success.rows, total.rows) == ((("500", "1"),), (("500", "3"),))


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"dataset": "ssv2"}, "not clips of Something-Something V2"),
        ({"dataset": "demos"}, "not of RLBench"),
    ],
)
def test_data_that_stand_in_for_others_are_called_so(
    results: Path, config: Config, changes: dict[str, Any], expected: str
) -> None:
    page = report.render(config.model_copy(update=changes), results)
    assert expected in page and "(stand-in)" in page


def test_real_data_are_not_called_a_stand_in(results: Path, config: Config) -> None:
    real = config.ssv2.model_copy(update={"source": "/data/parts"})
    assert "stand-in" not in report.render(config.model_copy(update={"ssv2": real}), results)


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "has no metrics.json; run it"), ("{", "its metrics.json cannot be read; run it")],
)
def test_missing_and_broken_metrics_end_in_one_line(
    tmp_path: Path, config: Config, content: str | None, expected: str
) -> None:
    if content:
        (tmp_path / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=expected):
        report.run(config, tmp_path)


def test_curves_with_a_diverged_value_are_still_drawn(tmp_path: Path) -> None:
    folder = tmp_path / PRETRAINING_CURVES / "loss"
    folder.mkdir(parents=True)
    (folder / "image.tsv").write_text("step\timage\n10\t900\n20\tnan\n30\t5\n")
    (folder / "kl.tsv").write_text("step\tkl\n")
    (figure,) = loss_figures(workspace_files(tmp_path)).values()
    assert figure.rows == (("10", "900"), ("30", "5"))
    assert "nan" not in figure.svg and "of an image (log)" in figure.svg


def contrast(first: str, second: str) -> float:
    """Contrast ratio of two colours #rrggbb (WCAG 2.2)."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(first), luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_text_and_lines_have_contrast_in_light_and_dark() -> None:
    style = (report.TEMPLATES / "report.css").read_text()
    themes: list[dict[str, Any]] = []
    for block in re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL):
        themes.append(dict(re.findall(r"--([\w]+): (#[0-9a-f]{6});", block)))
    assert len(themes) == 2 and themes[0].keys() == themes[1].keys()
    for theme in themes:
        for ground in ("paper", "panel"):
            for ink in ("ink", "muted", "accent", "warn", "s0", "s1", "s2", "s3", "s4", "s5"):
                assert contrast(theme[ink], theme[ground]) >= 4.5, (ink, ground, theme[ink])
