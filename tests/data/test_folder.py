"""A folder of images: what is found in it, what is made of an image, in which order and by which chance."""

from __future__ import annotations

import shutil
import time

import pytest
import torch
from image_folders import cut_short, make_images

from fastkd.data import files, folder, load_dataset
from fastkd.data.streaming import StreamedBatches, _Images
from fastkd.errors import UserError

Image = pytest.importorskip("PIL.Image")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return make_images(tmp_path_factory.mktemp("images"))


def batches_of(root, **fields):
    data = folder.load(root)
    common = {"batch_size": 4, "sides": (16,), "seed": 3}
    return StreamedBatches(data.train, data.train_labels, data.mean, data.std, **{**common, **fields})


def drawn(batches, epoch=1):
    """(index, images) of all batches of an epoch, one after the other."""
    found = [(x.index, batches.inputs(x)[0]) for x in batches.draw(epoch)]
    return torch.cat([index for index, _ in found]), torch.cat([x for _, x in found])


def test_files_are_found_by_class_in_order(tmp_path):
    root = make_images(tmp_path / "set", ("b", "a"), train=2, test=1, tested="test")
    (root / "train" / "a" / "deeper").mkdir()
    shutil.copy(root / "train" / "a" / "0.jpg", root / "train" / "a" / "deeper" / "x.JPEG")
    (root / "train" / "a" / "notes.txt").touch()
    (root / "train" / ".ipynb_checkpoints").mkdir()
    data = load_dataset("folder", root)
    assert data.class_names == ("a", "b") and data.title == "folder:set"
    names = [data.train[i].removeprefix(f"{root}/train/") for i in range(len(data.train))]
    assert names == ["a/0.jpg", "a/1.jpg", "a/deeper/x.JPEG", "b/0.jpg", "b/1.jpg"]
    assert data.train_labels.tolist() == [0, 0, 0, 1, 1] and data.test_labels.tolist() == [0, 1]
    moved = root.rename(tmp_path / "moved")
    assert load_dataset("folder", moved).fingerprint == data.fingerprint
    (moved / "train" / "b" / "1.jpg").rename(moved / "train" / "b" / "2.jpg")
    assert load_dataset("folder", moved).fingerprint != data.fingerprint


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda root: shutil.rmtree(root / "train"), "has no folder train: wanted"),
        (lambda root: shutil.rmtree(root / "val"), "has no folder val or test: wanted"),
        (lambda root: shutil.rmtree(root), "has no folder train and no val or test: wanted"),
        (lambda root: [(root / "train" / "new").mkdir()], "train/new has no image in it"),
        (
            lambda root: [shutil.rmtree(root / part / "dog") for part in ("train", "val")],
            "has one class, cat:",
        ),
        (
            lambda root: shutil.copytree(root / "train" / "dog", root / "train" / "elk"),
            "train and val have other classes: train alone has elk",
        ),
        (lambda root: [shutil.rmtree(path) for path in (root / "val").iterdir()], "val has no folder in it"),
    ],
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path, spoil, told):
    root = make_images(tmp_path / "set", ("cat", "dog"), train=1, test=1)
    spoil(root)
    with pytest.raises(UserError, match=told) as error:
        load_dataset("folder", root)
    assert "\n" not in str(error.value) and str(root) in str(error.value)


def test_a_test_image_has_the_bits_of_torchvisions(images, torchvision):
    from torchvision.transforms import v2

    for name in ("0.jpg", "5.jpg"):
        for turned in (False, True):
            image = files.read(str(images / "train" / "cat" / name))
            image = image.transpose(Image.Transpose.ROTATE_90) if turned else image
            wanted = v2.Compose([v2.Resize(round(16 * 256 / 224)), v2.CenterCrop(16), v2.PILToTensor()])(
                image
            )
            assert torch.equal(files.for_testing(image, 16).permute(2, 0, 1), wanted)


def test_a_training_image_is_a_random_part_of_it_resized(images, torchvision):
    from torchvision.transforms import v2

    image = files.read(str(images / "train" / "cat" / "5.jpg"))
    flips = 0
    for seed in range(40):
        left, top, right, bottom = files.crop_of(*image.size, torch.Generator().manual_seed(seed))
        width, height = right - left, bottom - top
        assert 0 <= left < right <= image.width and 0 <= top < bottom <= image.height
        assert 0.05 < width * height / (image.width * image.height) <= 1 and 0.6 < width / height < 1.6
        pixels = v2.functional.pil_to_tensor(image)
        wanted = v2.functional.resized_crop(pixels, top, left, height, width, [16, 16])
        one, both = (
            files.for_training(image, sides, torch.Generator().manual_seed(seed), True)
            for sides in ([16], [16, 32])
        )
        found = one[0].permute(2, 0, 1).float()
        flipped = (found.flip(2) - wanted).abs().mean() < (found - wanted).abs().mean()
        flips += int(flipped)
        # of a tensor torchvision rounds otherwise than Pillow
        assert ((found.flip(2) if flipped else found) - wanted).abs().max() <= 2
        # another size for the teacher: the same crop and flip
        assert torch.equal(one[0], both[0])
        small = torch.nn.functional.avg_pool2d(both[1].permute(2, 0, 1).float(), 2)
        assert (small - found).abs().mean() < (small.flip(2) - found).abs().mean()
    assert 8 < flips < 32
    long = [files.crop_of(400, 2, torch.Generator().manual_seed(seed)) for seed in range(30)]
    assert (199, 0, 202, 2) in long or (198, 0, 201, 2) in long  # the centre, where no part fits


def test_order_and_crops_depend_on_seed_epoch_and_index_alone(images):
    alone = batches_of(images)
    index, found = drawn(alone, 2)
    assert sorted(index.tolist()) == [*range(18)] and index.tolist() != [*range(18)]
    assert found.shape == (18, 3, 16, 16) and found.is_contiguous(memory_format=torch.channels_last)
    working = batches_of(images, workers=2)
    for epoch in (1, 2):  # workers that last: the second epoch is as if it were the first
        places, images_of = drawn(working, epoch)
    assert torch.equal(places, index) and torch.equal(images_of, found)
    for other in (batches_of(images, seed=4), batches_of(images, stream="teacher")):
        assert not torch.equal(drawn(other, 2)[1], found)
    halves = [drawn(batches_of(images, batch_size=2, share=(rank, 2)), 2) for rank in (0, 1)]
    order = torch.cat([torch.cat([part[0][i : i + 2] for part in halves]) for i in range(0, 9, 2)])
    assert torch.equal(order, index[:16])  # the last step has not two images for each of them
    rows = {int(i): x for part in halves for i, x in zip(*part)}
    assert all(torch.equal(rows[int(i)], x) for i, x in zip(index[:16], found))
    labels = torch.cat([alone.inputs(x)[1] for x in alone.draw(2)])
    assert torch.equal(labels, alone.labels[index])


def test_each_image_has_a_crop_of_its_own_in_each_epoch(images):
    same = files.Paths(images / "train", ["cat/0.jpg"] * 6)
    batches = StreamedBatches(
        same, torch.zeros(6, dtype=torch.int64), folder.MEAN, folder.STD, batch_size=6, sides=(16,)
    )
    first, second = drawn(batches, 1)[1], drawn(batches, 2)[1]
    found = [x for part in (first, second) for x in part]
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_the_test_pass_goes_through_all_images_in_order(images):
    found = [*batches_of(images, workers=2).test()]
    assert [len(y) for _, y in found] == [4, 4, 4, 4, 2]
    one = (files.for_testing(files.read(batches_of(images).paths[7]), 16) / 255).permute(2, 0, 1)
    mean, std = (torch.tensor(x)[:, None, None] for x in (folder.MEAN, folder.STD))
    torch.testing.assert_close(found[1][0][3], (one - mean) / std, rtol=1e-5, atol=1e-5)
    shares = [[*batches_of(images).test((rank, 2))] for rank in (0, 1)]
    assert torch.equal(shares[1][0][0], found[1][0]) and [len(x) for x in shares] == [3, 2]
    reverse = batches_of(images, order=torch.arange(17, -1, -1), drop_last=True)
    assert torch.cat([y for _, y in reverse.test()]).tolist() == [2] * 6 + [1] * 6 + [0] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_a_damaged_image_is_named_and_counted_or_stops_the_run(tmp_path, capsys, workers):
    root = make_images(tmp_path / "set")
    spoilt = half, text, gone = tuple(root / "train" / "dog" / f"{i}.jpg" for i in (1, 2, 3))
    data = folder.load(root)
    cut_short(half)
    text.write_text("no image")
    gone.unlink()
    common = {"batch_size": 6, "sides": (16,), "workers": workers}
    skipping = StreamedBatches(data.train, data.train_labels, data.mean, data.std, on_bad="skip", **common)
    for epoch in (1, 2):
        index, found = drawn(skipping, epoch)
        bad = {7, 8, 9}
        # every step is whole: others stand in, each with its own index
        assert len(index) == len(found) == 18 and not bad & set(index.tolist()) and skipping.skipped == 3
        assert set(index.tolist()) == {*range(18)} - bad
    # the next image of the batch that can be read, and after the last one the first
    images = _Images(data.train, (16,), 0, "data", True)
    assert images.__getitems__([(1, i) for i in (7, 0, 8, 1, 9)]).places.tolist() == [0, 0, 1, 1, 0]
    told = capsys.readouterr().out
    assert told.count("image skipped: ") == 3 and all(told.count(str(path)) == 1 for path in spoilt)
    assert "truncated" in told and "No such file" in told
    assert sum(len(y) for _, y in skipping.test()) == 15
    stopping = StreamedBatches(data.train, data.train_labels, data.mean, data.std, **common)
    with pytest.raises(UserError, match=r"dog/\d\.jpg: .*; --on-bad-image skip goes on without it") as error:
        drawn(stopping)
    assert "\n" not in str(error.value)
    for path in (root / "train").rglob("*.jpg"):
        path.write_text("no image")
    with pytest.raises(UserError, match="nor can any other image of its batch be read"):
        drawn(skipping, 3)


@pytest.mark.parametrize("ending", ["jpg", "png"])
@pytest.mark.parametrize("filled", [False, True])
def test_half_an_image_is_damaged_though_pillow_may_fill_it_up(tmp_path, monkeypatch, ending, filled):
    """Somebody's file may tell Pillow so, and the lower half would be grey or black."""
    module, path = pytest.importorskip("PIL.ImageFile"), tmp_path / f"half.{ending}"
    Image.effect_noise((64, 64), 90).convert("RGB").save(path)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    monkeypatch.setattr(module, "LOAD_TRUNCATED_IMAGES", filled)
    with pytest.raises(ValueError, match=f"half.{ending}: .*truncated"):
        files.read(str(path))
    assert module.LOAD_TRUNCATED_IMAGES is filled


def test_the_time_that_steps_wait_is_measured(images, monkeypatch):
    batches, read = batches_of(images), files.read
    drawn(batches)  # what a first image alone takes
    monkeypatch.setattr(files, "read", lambda path: (time.sleep(0.01), read(path))[1])
    begun = time.perf_counter()
    drawn(batches)
    took = time.perf_counter() - begun
    assert 0.14 <= batches.waited <= took - 0.04  # 14 of 18 images: the first batch does not count
    begun = time.perf_counter()
    for _ in batches.draw(1):
        time.sleep(0.02)  # a step's own time is no waiting
    assert batches.waited < time.perf_counter() - begun - 0.08
