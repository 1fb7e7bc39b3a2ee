"""Methods, models and data sets of a user's own file or package, by the example of docs/adding.md."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from record_files import rows_of

from fastkd import data, evaluate, methods, models, plugins
from fastkd.training import Settings, config

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "docs" / "adding.md").read_text(encoding="utf-8").partition("## Without a clone")[2]
FILE = re.search(r"```py\n# my_parts.py\n(.*?)```", TEXT, re.DOTALL)[1]
PLAN = "--method logits+kd --student thin --teacher thin --dataset shades --recipe digits".split()
PLAN += "--batch-size 32 --device cpu --no-pictures --epochs 1".split()


@pytest.fixture(autouse=True)
def registries(monkeypatch):
    """What is registered inside a test is gone after it."""
    for module, table, names in (
        (methods, "_KINDS", "METHODS"),
        (models, "_BUILDERS", "MODELS"),
        (data, "_LOADERS", "DATASETS"),
    ):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
        monkeypatch.setattr(module, names, getattr(module, names))
    monkeypatch.setattr(plugins, "_origins", {})
    yield
    plugins.of_file.cache_clear()


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_parts.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def forget():
    """As a new process begins: nothing is registered."""
    plugins.of_file.cache_clear()
    plugins._origins.clear()
    methods._KINDS.pop("logits", None), models._BUILDERS.pop("thin", None), data._LOADERS.pop("shades", None)


def test_a_run_has_all_three_from_one_file(small_main, file, tmp_path, capsys):
    runs, flags = tmp_path / "runs", ["--plugin", str(file), *PLAN]
    assert small_main([*flags, "--output", str(runs)]) == 0, capsys.readouterr().err
    assert "logits+kd" in capsys.readouterr().out
    teacher, row = rows_of(runs)
    origin = plugins.origin("method", "logits")
    assert re.fullmatch(r"my_parts.py [0-9a-f]{8}", origin)
    parts = "dataset shades", "model thin", "method logits"
    assert row["plugins"] == ", ".join(f"{part} of {origin}" for part in parts)
    assert "method" not in teacher["plugins"] and f"model thin of {origin}" in teacher["plugins"]
    folder = runs / row["folder"]
    about = json.loads((folder / "config.json").read_text())
    assert about["identity"]["plugins"]["method logits"] == origin and about["plugins"] == [str(file)]
    assert f"--plugin {file}" in (folder / "command.sh").read_text()
    # resumed by the same file it is finished, by another text it is another run
    assert small_main([*flags, "--output", str(runs), "--resume", "auto"]) == 0
    assert "is finished" in capsys.readouterr().out
    forget()
    with pytest.raises(SystemExit, match="2"):
        small_main([*PLAN, "--output", str(runs), "--resume"])
    error = capsys.readouterr().err
    assert "logits" in error and error.count("\n") == 1
    (runs / "results.csv").unlink()  # as if it had not finished
    file.write_text(FILE.replace("2.0 *", "3.0 *"), encoding="utf-8")
    assert small_main([*flags, "--output", str(runs), "--resume"]) == 2
    error = capsys.readouterr().err
    assert f"the nearest is {folder.name}: dataset shades {origin} instead of my_parts.py " in error
    assert f"method logits {origin} instead of" in error and error.count("\n") == 1
    # a command that tests the run wants the file too
    forget()
    assert evaluate.main([str(folder), "--data", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert f"{folder / 'best.pt'} has dataset shades and model thin and method logits of" in told
    assert told.endswith(f"of a file of its own: give --plugin {file}\n") and told.count("\n") == 1
    assert (
        evaluate.main([str(folder), "--data", str(tmp_path), "--plugin", str(file), "--device", "cpu"]) == 0
    )
    assert "thin on shades" in capsys.readouterr().out
    forget()
    with pytest.raises(models.WeightsError, match="it needs dataset shades of my_parts.py .*, model thin of"):
        models.load_student(folder)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("import missing_module", r"my_parts.py cannot be loaded: ModuleNotFoundError: No"),
        ("raise SystemExit(3)", r"my_parts.py cannot be loaded: SystemExit: 3 \(my_parts.py, line 1\)"),
        ("\n\nx = 1 / 0", r"ZeroDivisionError: division by zero \(my_parts.py, line 3\)"),
        ("def f(:", r"my_parts.py cannot be loaded: invalid syntax \(my_parts.py, line 1\)"),
        ("import fastkd\nfastkd.models.register('resnet20')(print)", "model 'resnet20' is there already"),
        ("from fastkd import methods\nmethods.register('m+n')(methods.Distiller)", "wanted a field 'title'"),
        ("import fastkd\nfastkd.methods.register('m')(print)", "wanted a subclass of"),
        ("from fastkd import data\ndata.register('My set')(print)", "dataset name is 'My set', wanted"),
        ("from fastkd import data\ndata.register('auto')(print)", "dataset name is 'auto', wanted"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_loaded_is_one_line(small_main, tmp_path, capsys, text, words):
    path = tmp_path / "my_parts.py"
    path.write_text(text, encoding="utf-8")
    assert small_main(["--plugin", str(path), "--method", "kd"]) == 2
    error = capsys.readouterr().err
    assert re.search(words, error) and error.count("\n") == 1, error
    assert small_main(["--plugin", str(tmp_path / "none.py"), "--method", "kd"]) == 2
    assert "none.py cannot be loaded: no such file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "plugin '' is no file and no module, wanted my_file.py"),
        (".", "plugin '.' is no file and no module, wanted my_file.py"),
        ("a_folder", "plugin 'a_folder' is a folder, wanted my_file.py"),
        ("none_such", r"No module named 'none_such'$"),
    ],
)
def test_a_plugin_is_a_file_or_a_module(tmp_path, monkeypatch, name, words):
    (tmp_path / "a_folder").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(plugins.UserError, match=words):
        plugins.load(name)


def test_two_files_with_one_name_clash_and_one_file_replaces_itself(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(FILE, encoding="utf-8")
    plugins.load(tmp_path / "a" / "mine.py")
    plugins.of_file.cache_clear()
    plugins.load(tmp_path / "a" / "mine.py")  # as a notebook does
    with pytest.raises(plugins.UserError, match="method 'logits' is there already, from mine.py"):
        plugins.load(tmp_path / "b" / "mine.py")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"images": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, r"train_images is \(4, 3, 8, 8\) .* wanted"),
        ({"labels": torch.tensor([0, 1, 2, 3])}, "labels from 0 to 3, wanted 0 to 2"),
        ({"name": "other"}, "has the name 'other', wanted the one it is registered by"),
        (None, "dataset 'mine' gives NoneType, wanted a fastkd.data.Dataset"),
    ],
)  # fmt: skip
def test_a_set_that_is_none_is_one_line(change, words):
    parts = {"name": "mine", "images": torch.zeros(4, 3, 32, 32, dtype=torch.uint8)}
    parts |= {"labels": torch.tensor([0, 1, 2, 0]), **(change or {})}
    halves = (parts["images"], parts["labels"]) * 2
    three = (0.5,) * 3
    made = data.Dataset(parts["name"], 3, three, three, True, *halves)
    data.register("mine")(lambda root: None if change is None else made)
    with pytest.raises(data.UserError, match=words):
        data.load_dataset("mine", "data")


def test_a_model_that_gives_none_is_one_line():
    models.register("mine")(lambda classes: None)
    with pytest.raises(ValueError, match=r"model 'mine' gives NoneType, wanted a torch.nn.Module"):
        models.create_model("mine")


REGISTERED = """
import fastkd
from torch import nn

@fastkd.models.register("registered")
def registered(num_classes):
    return nn.Sequential(nn.Flatten(), nn.{})
"""


@pytest.mark.parametrize(
    ("layer", "told"),
    [
        ("Linear(3072, 4)", "--student registered gives (2, 4) for 2 images, wanted (2, 10)"),
        ("Linear(300, 10)", "--student registered does not take images (3, 32, 32)"),
        ("LazyLinear(10)", "model 'registered' has lazy parameters (1.weight), wanted parameters with"),
    ],
)
def test_a_registered_model_that_does_not_fit_is_one_line(small_main, file, tmp_path, capsys, layer, told):
    """As that of a file or a library, before anything is trained."""
    file.write_text(REGISTERED.format(layer), encoding="utf-8")
    flags = ["--plugin", str(file), "--student", "registered", "--dataset", "digits"]
    assert small_main(["--method", "baseline", *flags, "--output", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_registered_model_is_compiled_when_asked_alone(file, monkeypatch):
    """It may hold what does not compile as one graph: docs/training.md promises it of fastkd's own."""
    monkeypatch.setattr(config, "WORTH_COMPILING", 1)
    monkeypatch.setattr(config, "can_compile", lambda device: True)
    plugins.load(file)

    def compiled(**more):
        return config.Config(Settings("baseline", "digits", device="cpu", **more)).compiled

    assert compiled(student="resnet8")
    assert not compiled(student="thin") and compiled(student="thin", compile=True)


def test_an_installed_package_registers_by_entry_points(tmp_path, monkeypatch):
    """As pip leaves it: a module, and the metadata of its package."""
    (tmp_path / "their_parts.py").write_text(FILE, encoding="utf-8")
    (tmp_path / "broken_parts.py").write_text("raise RuntimeError('two\\nlines')", encoding="utf-8")
    about = tmp_path / "their_parts-1.2.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: their-parts\nVersion: 1.2\n")
    (about / "entry_points.txt").write_text(
        "[fastkd.methods]\nlogits = their_parts:Logits\nbroken = broken_parts:Broken\n"
        "[fastkd.models]\nthin = their_parts:thin\nother_thin = their_parts:thin\n"
        "[fastkd.data]\nshades = their_parts:shades\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert plugins.known("model") == ["other_thin", "thin"] and "their_parts" not in sys.modules
    assert methods.define("logits+kd").names == ("ce", "logits", "kd")
    assert models.create_model("other_thin", 3)(torch.zeros(2, 3, 32, 32)).shape == (2, 3)
    assert re.fullmatch("their-parts 1.2, their_parts.py [0-9a-f]{8}", plugins.origin("model", "other_thin"))
    assert data.load_dataset("shades", tmp_path).classes == 3 and data.choose_dataset("shades", tmp_path)
    words = r"method 'broken' of their-parts 1.2 .* RuntimeError: two lines \(broken_parts.py, line 1\)"
    with pytest.raises(ValueError, match=words):
        methods.define("broken+at")
    monkeypatch.delitem(sys.modules, "their_parts")


def test_a_sum_has_the_order_of_names_whatever_was_registered_first():
    for name in ("zeta", "alpha"):
        kind = type(
            name, (methods.Distiller,), {"title": name, "presets": {"o": methods.Preset()}, "canonical": "o"}
        )
        methods.register(name)(kind)
    assert methods.define("zeta+sakd+alpha").name == "sakd+alpha+zeta"
    assert methods.METHODS[-2:] == ("alpha", "zeta")
