"""Sheets of attention maps: the right maps in the right places, and no run that depends on them."""

from __future__ import annotations

import errno
import io
import shutil
from types import SimpleNamespace

import pytest
import torch
from record_files import rows_of

from fastkd.models import create_model
from fastkd.report import maps as redraw
from fastkd.training import attention_maps
from fastkd.training.attention_maps import CELL, GAP, GROUP, VARIANTS, sheet
from fastkd.training.examples import examples, stages

QUICK = "--dataset digits --teacher resnet8 --student resnet8 --batch-size 32 --device cpu --epochs 1".split()
NAMES = {f"{stem}.png" for stem in VARIANTS}


def read(content):
    image = pytest.importorskip("matplotlib.image")
    return torch.from_numpy(image.imread(io.BytesIO(content), format="png")[..., :3].copy())


def drawn(maps, images=None):
    """(rows, columns, CELL, CELL, 3): the pictures of a sheet of two stages, without its lettering."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8) if images is None else images
    pixels = read(sheet(images, ["a", "b"], maps, "formula", "title", ""))
    left, above = 34, 106
    models = len(maps)
    places = [0] + [
        CELL + GROUP + i * (CELL + GAP) + stage * (models * (CELL + GAP) - GAP + GROUP)
        for stage in range(2)
        for i in range(models)
    ]
    rows = [above + row * (CELL + GAP) for row in range(2)]
    return torch.stack(
        [torch.stack([pixels[y : y + CELL, left + x : left + x + CELL] for x in places]) for y in rows]
    )


@pytest.fixture
def one_hot():
    """Maps of two models in two stages, with one place of each its own."""
    pytest.importorskip("matplotlib")
    places = {}
    maps = {name: [torch.zeros(2, side, side) for side in (16, 8)] for name in ("teacher", "student")}
    for m, name in enumerate(maps):
        for stage, found in enumerate(maps[name]):
            for row in range(2):
                y, x = (1 + row) * found.shape[1] // 4, (1 + m) * found.shape[1] // 4
                found[row, y, x] = 3.0
                places[row, 1 + 2 * stage + m] = ((y + 0.5) / found.shape[1], (x + 0.5) / found.shape[1])
    return maps, places


def test_each_map_is_in_its_cell_brightest_where_it_is_largest(one_hot):
    maps, places = one_hot
    cells = drawn(maps)
    for (row, column), (y, x) in places.items():
        light = cells[row, column].sum(-1)
        assert light.argmax() >= 0 and (light >= 0.95 * light.max()).nonzero().float().mean(
            0
        ).tolist() == pytest.approx([y * CELL, x * CELL], abs=2.5)
        assert light[-1, -1] < 0.1 * light.max()  # 0 is dark
    assert cells[:, 0].max() < 0.02  # the images are black


def test_a_map_has_a_scale_of_its_own(one_hot):
    maps, _ = one_hot
    louder = {
        "teacher": maps["teacher"],
        "student": [torch.tensor([7.0, 0.5])[:, None, None] * found for found in maps["student"]],
    }
    assert torch.equal(drawn(louder), drawn(maps))


def test_negative_values_take_a_scale_around_white(one_hot):
    maps, places = one_hot
    maps["student"][0][0] *= -1
    cells = drawn(maps, torch.full((2, 3, 32, 32), 255, dtype=torch.uint8))
    height, width = (int(part * CELL) for part in places[0, 2])
    red, _, blue = cells[0, 2, height, width]
    assert blue > red + 0.1
    height, width = (int(part * CELL) for part in places[0, 1])
    red, _, blue = cells[0, 1, height, width]
    assert red > blue + 0.1
    assert cells[0, 1:, -1, -1].min() > 0.95  # 0 is white in every map


def test_images_are_shown_as_they_are(one_hot):
    maps, _ = one_hot
    images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8)
    images[0, 0], images[1, 2] = 255, 255
    cells = drawn(maps, images)
    assert cells[0, 0].mean((0, 1)).tolist() == pytest.approx([1, 0, 0], abs=0.02)
    assert cells[1, 0].mean((0, 1)).tolist() == pytest.approx([0, 0, 1], abs=0.02)


def test_the_three_maps_are_what_they_are_called():
    x = torch.randn(2, 5, 3, 3)
    found = [reduce(x) for _, reduce, _ in VARIANTS.values()]
    expected = [
        torch.einsum("nchw,nchw->nhw", x, x) / 5,
        torch.einsum("nchw,nchw->nhw", x, x),
        torch.einsum("nchw->nhw", x),
    ]
    torch.testing.assert_close(found, expected)


def test_the_first_test_image_of_each_class_is_shown():
    labels = torch.tensor([9, 0, 1, 5, 5, 3, 0, 8, 7])
    images = torch.arange(9, dtype=torch.uint8)[:, None, None, None].expand(9, 3, 32, 32)
    data = SimpleNamespace(name="cifar10", classes=10, test_images=images, test_labels=labels)
    shown, names = examples(data)
    assert shown[:, 0, 0, 0].tolist() == [1, 2, 5, 3, 8, 7] and names == [
        "airplane",
        "automobile",
        "cat",
        "dog",
        "horse",
        "ship",
    ]
    data.name = "another"
    shown, names = examples(data)
    assert shown[:, 0, 0, 0].tolist() == [1, 2, 5, 3, 7] and names == [
        "class 0",
        "class 1",
        "class 3",
        "class 5",
        "class 8",
    ]


def test_features_are_those_of_eval_mode_and_leave_the_model_alone():
    model, batch = create_model("resnet8").train(), torch.randn(3, 3, 32, 32)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = stages(model, batch)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    with torch.no_grad():
        expected = model.eval()(batch, features=True)[0].stages
    assert len(found) == 3 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize(("method", "width"), [("at", 947), ("baseline", 572)])
def test_a_run_leaves_its_sheets_and_they_can_be_drawn_again(
    small_main, tmp_path, monkeypatch, capsys, method, width
):
    pytest.importorskip("matplotlib")
    assert small_main(["--method", method, *QUICK, "--output", str(tmp_path)]) == 0
    folder = tmp_path / rows_of(tmp_path)[-1]["folder"]
    first = {path.name: path.read_bytes() for path in folder.glob("*.png")}
    assert set(first) == NAMES and {path.parent for path in tmp_path.rglob("*.png")} == {folder}
    assert read(first["maps-plain-sum.png"]).shape[1] == pytest.approx(width, abs=2)
    assert (
        read(first["maps-plain-sum.png"]).std() > 0.1
        and first["maps-plain-sum.png"] != first["maps-mean-of-squares.png"]
    )
    for path in folder.glob("*.png"):
        path.unlink()
    # the recipe reports the best epoch
    torch.save({"model": create_model("resnet8").state_dict()}, folder / "last.pt")
    capsys.readouterr()
    assert redraw.main([str(folder)]) == 0
    assert {path.name: path.read_bytes() for path in folder.glob("*.png")} == first
    assert set(capsys.readouterr().out.split()) == {str(folder / name) for name in NAMES}

    (folder / "maps-plain-sum.png").unlink()
    (folder / "maps-plain-sum.png").mkdir()  # which no file can replace
    assert redraw.main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert "pictures: none" in err and "maps-plain-sum.png cannot be written" in err and err.count("\n") == 1
    for teacher in tmp_path.glob("teacher-*"):
        assert redraw.main([str(teacher)]) == 2
        assert "is the run of a teacher, wanted a student's" in capsys.readouterr().err

    monkeypatch.setattr(attention_maps, "available", lambda: False)
    assert redraw.main([str(folder)]) == 2 and "matplotlib" in capsys.readouterr().err
    monkeypatch.undo()
    shutil.rmtree(folder)
    assert redraw.main([str(folder)]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "holds no run" in err


def test_without_matplotlib_the_screen_says_so_and_the_run_is_whole(
    small_main, monkeypatch, tmp_path, capsys
):
    monkeypatch.setattr(attention_maps, "available", lambda: False)
    assert small_main(["--method", "baseline", *QUICK, "--output", str(tmp_path)]) == 0
    assert "no pictures (matplotlib is not installed)" in capsys.readouterr().out
    assert len(rows_of(tmp_path)) == 1 and not list(tmp_path.rglob("*.png"))
    monkeypatch.undo()


def test_no_pictures_are_none(small_main, tmp_path):
    assert small_main(["--method", "baseline", *QUICK, "--output", str(tmp_path), "--no-pictures"]) == 0
    assert len(rows_of(tmp_path)) == 1 and not list(tmp_path.rglob("*.png"))


def test_pictures_that_fail_lose_no_row(small_main, monkeypatch, tmp_path, capsys):
    def full(path, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    pytest.importorskip("matplotlib")
    monkeypatch.setattr(attention_maps, "write", full)
    assert small_main(["--method", "baseline", *QUICK, "--output", str(tmp_path)]) == 0
    out, err = capsys.readouterr()
    assert out.count("No space left on device") == 1 and err == "" and "\nagain    " in out
    assert len(rows_of(tmp_path)) == 1
