"""The report's figure of accuracy by method and its HTML page."""

from __future__ import annotations

import base64
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from record_files import rows_of

from fastkd import methods
from fastkd.report import bars, page
from fastkd.report import command as report
from fastkd.training.results import COLUMNS, table

RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "experiments"
RUN = {
    "method": "at",
    "dataset": "cifar100",
    "student": "resnet20",
    "teacher": "resnet56",
    "recipe": "sakd",
    "nepoch": "2",
    "overrides": "epochs=2",
    "precision": "bf16",
    "seed": "0",
    "acc": "30.00",
    "reported_acc": "30.00",
    "folder": "at-run",
}
BASELINE = {**RUN, "method": "baseline", "teacher": "", "acc": "25.00", "folder": "base"}
SEED = {**RUN, "seed": "1", "acc": "32.00", "folder": "at-run-1"}
KD = {**RUN, "method": "kd", "acc": "28.00", "folder": "kd-run"}


class Page(HTMLParser):
    """Which elements are open, the text of cells, and what is referred to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.cells: list[str] = []
        self.targets: list[str] = []
        self.anchors: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        given = dict(attributes)
        self.targets += [given[name] for name in ("src", "href") if name in given]
        self.anchors += [given["id"]] if "id" in given else []
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_a_panel_has_the_methods_of_one_pair_from_the_worst_to_the_best():
    other = {**KD, "student": "resnet32"}
    teacher = {**RUN, "method": "teacher", "student": "resnet56", "teacher": ""}
    found = bars.places([RUN, KD, SEED, BASELINE, other, teacher])
    assert [place for place, _ in found] == [("cifar100", "resnet20", "sakd", "2", "bf16", "resnet56")]
    assert [group.key["method"] for group in found[0][1]] == ["baseline", "kd", "at"]
    assert found[0][1][-1].spread("acc") == "31.00 ± 1.41"
    assert bars.places([RUN, {**KD, "nepoch": "3"}]) == []


def test_bars_are_the_means_and_the_baseline_is_marked(monkeypatch):
    pytest.importorskip("matplotlib")
    from matplotlib.axes import Axes

    widths, marks = [], []
    drawn, marked = Axes.barh, Axes.axvline
    monkeypatch.setattr(
        Axes, "barh", lambda self, y, w, **o: (widths.append((y, w)), drawn(self, y, w, **o))[1]
    )
    monkeypatch.setattr(Axes, "axvline", lambda self, x, **o: (marks.append(x), marked(self, x, **o))[1])
    figure = bars.figure([RUN, KD, SEED, BASELINE])
    assert widths == [(0, 25.0), (1, 28.0), (2, 31.0)] and marks == [25.0]
    assert "2 of 240 epochs" in figure.axes[0].get_title()


@pytest.fixture
def output(tmp_path):
    folder = tmp_path / "runs & more"
    folder.mkdir()
    rows = [RUN, {**KD, "overrides": "epochs=2 lr=<b>"}, BASELINE]
    (folder / "results.csv").write_text(table(COLUMNS, rows))
    for name in ("at-run", "kd-run"):
        (folder / name).mkdir()
        (folder / name / "epochs.csv").write_text("epoch,loss,train_acc,test_acc\n1,3,20,21\n2,2,25,30\n")
    for name in ("maps-mean-of-squares.png", "maps-plain-sum.png"):
        (folder / "at-run" / name).write_bytes(b"\x89PNG")
    return folder


def test_the_page_is_whole_and_asks_for_nothing(output, tmp_path):
    pytest.importorskip("matplotlib")
    path = tmp_path / "report.html"
    assert report.main([str(output), "--html", str(path), "--bars", str(tmp_path / "bars.svg")]) == 0
    text = path.read_text(encoding="utf-8")
    found = Page(text)
    assert found.open == []
    local = [target for target in found.targets if target.startswith("#")]
    assert {target[1:] for target in local} == set(found.anchors) and len(local) == 5
    images = [target for target in found.targets if not target.startswith("#")]
    assert all(target.startswith("data:image/") for target in images)
    assert [re.match("data:image/([^;]*)", target)[1] for target in images] == ["svg+xml", "svg+xml", "png"]
    assert "maps-plain-sum.png" in text and "runs &amp; more" in text
    assert "<b>" not in text and any("lr=<b>" in cell for cell in found.cells)  # what a row says is text
    assert any(cell == "ours, bf16, 2 of 240 epochs" for cell in found.cells)
    assert b"<svg" in (tmp_path / "bars.svg").read_bytes()


@pytest.mark.parametrize(("part", "figures"), [(".", 2), ("cifar100", 2), ("fashion-mnist", 1)])
def test_the_committed_results_make_a_page(part, figures, tmp_path):
    pytest.importorskip("matplotlib")
    folder, path = RESULTS / part, tmp_path / "report.html"
    assert report.main([str(folder), "--html", str(path)]) == 0
    found, rows = Page(path.read_text(encoding="utf-8")), rows_of(folder)
    assert found.open == [] and len(rows) > 1
    cells = {*found.cells}
    for row in rows:  # one seed each, so that its accuracy is no mean
        titles = [methods._KINDS[name].title for name in row["method"].split("+") if name in methods._KINDS]
        assert {row["reported_acc"], "+".join(titles) or row["method"]} <= cells, row["folder"]
    images = [target for target in found.targets if not target.startswith("#")]
    kinds = [re.match("data:image/([^;]*);base64,(.*)", target) for target in images]
    assert all(kinds)
    drawn = [base64.b64decode(kind[2]) for kind in kinds if kind[1] == "svg+xml"]
    assert len(drawn) == figures  # curves; accuracy by method where there are two
    assert all(b"<svg" in picture and len(picture) > 10_000 for picture in drawn)


def test_each_file_that_was_written_is_named(output, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    names = {"--into": "into.md", "--plot": "curves.svg", "--bars": "bars.svg", "--html": "report.html"}
    (tmp_path / "into.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    flags = [word for flag, name in names.items() for word in (flag, str(tmp_path / name))]
    assert report.main([str(output), *flags]) == 0
    assert capsys.readouterr().out == "".join(f"written: {tmp_path / name}\n" for name in names.values())
    assert report.main([str(output), "--html", str(tmp_path / "report.html")]) == 0
    assert capsys.readouterr().out.endswith(f"\n\nwritten: {tmp_path / 'report.html'}\n")


def test_without_runs_and_without_matplotlib_it_says_so(tmp_path, monkeypatch):
    import sys

    text = page.page([], [tmp_path], {})
    assert "There are no finished runs." in text and "attention maps." in text and Page(text).open == []
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    assert page.page([], [tmp_path], {}).count("Figures take matplotlib (pip install matplotlib).") == 2


def test_a_log_that_cannot_be_read_is_named(output, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    (output / "at-run" / "epochs.csv").write_text("epoch,loss\n1,many\n")
    assert report.main([str(output), "--html", str(tmp_path / "x.html")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "at-run" in err and "epochs.csv cannot be read" in err
    assert not (tmp_path / "x.html").exists()


def test_bars_of_one_method_are_one_line(output, capsys, tmp_path):
    pytest.importorskip("matplotlib")
    wanted = ["--only", "method=at", "--bars", str(tmp_path / "x.png")]
    assert report.main([str(output), *wanted]) == 2
    err = capsys.readouterr().err
    assert (
        err
        == "python -m fastkd.report: error: --bars: no two methods with the same data set, networks, recipe"
        " and length\n"
    )
    assert report.main([str(output), "--bars", str(tmp_path / "x.docx")]) == 2
    assert "docx" in capsys.readouterr().err and not (tmp_path / "x.docx").exists()


def test_columns_of_numbers_stand_right_and_long_texts_take_several_lines():
    lines = [["at", "31.0 ± 0.2 [1 2] (+0.5)", "epochs=2 " * 5], ["kd", "n/a", "–"]]
    text = page.table(("A & B", ["method", "accuracy", "changed"], lines))
    assert "<caption><span>A &amp; B</span></caption>" in text
    assert '<th scope="col">method</th><th scope="col" class="number">accuracy</th>' in text
    assert text.count('<td class="number">') == 2 and text.count('<td class="long">') == 1


def test_pictures_of_the_page_say_what_they_show(output):
    pytest.importorskip("matplotlib")
    rows = [RUN, KD, BASELINE]
    text = page.page(rows, [output], {})
    assert re.findall(r'<img src="[^"]*" alt="([^"]*)">', text)[:2] == [
        "accuracy of each method",
        "accuracy and losses by epoch",
    ]
