"""Image sets: every layout, every kind of damage, and the augmentation against one image at a time."""

from __future__ import annotations

import os
import pickle
import sys
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from support_data import stand_in, write_binary, write_idx, write_pickle

from fastkd.data import cifar
from fastkd.training import UserError, choose_dataset, load_dataset

TRAIN_FILES = [f"data_batch_{i}" for i in range(1, 6)]


@pytest.fixture(scope="module")
def binary_root(tmp_path_factory):
    """CIFAR-10 and CIFAR-100 in the binary version; file number i begins with label i."""
    root = tmp_path_factory.mktemp("binary")
    for i, name in enumerate([*TRAIN_FILES, "test_batch"], 1):
        write_binary(root / "cifar-10-batches-bin" / f"{name}.bin", 10_000, 1, i)
    write_binary(root / "cifar-100-binary" / "train.bin", 50_000, 2, 98)
    write_binary(root / "cifar-100-binary" / "test.bin", 10_000, 2, 99)
    return root


def check_first_images(data, train_starts, labels):
    assert (
        data.train_images.dtype == data.test_images.dtype == torch.uint8
        and data.train_labels.dtype == torch.int64
    )
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    picture = (torch.arange(3072) % 251).to(torch.uint8).view(3, 32, 32)
    for start in train_starts:
        assert torch.equal(data.train_images[start], picture)
    assert torch.equal(data.test_images[0], picture) and not data.train_images[1].any()
    assert [*data.train_labels[train_starts].tolist(), data.test_labels[0].item()] == labels


def test_binary_cifar_is_read_in_order(binary_root):
    check_first_images(
        load_dataset("cifar10", binary_root), [0, 10_000, 20_000, 30_000, 40_000], [1, 2, 3, 4, 5, 6]
    )
    check_first_images(load_dataset("cifar100", binary_root), [0], [98, 99])


def test_pickled_cifar_is_read_in_order(tmp_path):
    for i, name in enumerate([*TRAIN_FILES, "test_batch"], 1):
        write_pickle(
            tmp_path / "cifar-10-batches-py" / name,
            10_000,
            "labels",
            i,
            protocol=i % 3 + 2,
            keys_as_bytes=i == 4,
        )
    check_first_images(
        load_dataset("cifar10", tmp_path), [0, 10_000, 20_000, 30_000, 40_000], [1, 2, 3, 4, 5, 6]
    )
    write_pickle(
        tmp_path / "cifar-100-python" / "train", 50_000, "fine_labels", 98, coarse_labels=[1] * 50_000
    )
    write_pickle(tmp_path / "cifar-100-python" / "test", 10_000, "fine_labels", 99)
    check_first_images(load_dataset("cifar100", tmp_path), [0], [98, 99])


def test_pickles_of_python_2_are_read():
    """The official files: byte strings, and numpy.core under its old name."""
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR(K\x01(K\x02K\x03t"
    array += b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xff"
    array += b"K\x00tb\x89U\x06AB\xffDEFtb"
    import io

    found = cifar._ArraysOnly(
        io.BytesIO(b"\x80\x02}(U\x04data" + array + b"U\x06labels](K\x01K\x02eu."), encoding="latin1"
    ).load()
    assert found["labels"] == [1, 2]
    assert found["data"].tolist() == [[65, 66, 255], [68, 69, 70]]


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["FASTKD_TEST_EVIL"],))


def damaged_pickle(kind, path):
    good = np.zeros((10_000, 3072), np.uint8)
    content = {
        "code": Evil(),
        "not a dict": [1],
        "no labels": {"data": good},
        "too few": {"data": good[:9_999], "labels": [0] * 9_999},
        "floats": {"data": good.astype(np.float32), "labels": [0] * 10_000},
        "range": {"data": good, "labels": [10] * 10_000},
        "truncated": {"data": good, "labels": [0] * 10_000},
    }[kind]
    raw = pickle.dumps(content, 4)
    path.write_bytes(raw[:-1000] if kind == "truncated" else raw)


@pytest.mark.parametrize(
    "kind", ["code", "not a dict", "no labels", "too few", "floats", "range", "truncated"]
)
def test_a_damaged_pickle_is_told_in_one_line_and_runs_no_code(tmp_path, monkeypatch, kind):
    monkeypatch.setenv("FASTKD_TEST_EVIL", str(tmp_path / "evil"))
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in [*TRAIN_FILES, "test_batch"]:
        (folder / name).touch()
    damaged_pickle(kind, folder / "data_batch_1")
    with pytest.raises(UserError, match=r"data_batch_1 is damaged") as caught:
        load_dataset("cifar10", tmp_path)
    assert "\n" not in str(caught.value) and not (tmp_path / "evil").exists()


@pytest.mark.parametrize(
    ("kind", "words"),
    [("short", "is damaged: 30,729,999 bytes, wanted 30,730,000"), ("range", "labels from 0 to 11")],
)
def test_a_damaged_binary_file_is_told_in_one_line(binary_root, tmp_path, kind, words):
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for name in [*TRAIN_FILES, "test_batch"]:
        os.link(binary_root / folder.name / f"{name}.bin", folder / f"{name}.bin")
    path = folder / "data_batch_1.bin"
    path.unlink()
    write_binary(path, 10_000, 1, 11 if kind == "range" else 1)
    if kind == "short":
        os.truncate(path, 30_729_999)
    with pytest.raises(UserError, match=words) as caught:
        load_dataset("cifar10", tmp_path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def fashion(root, pack=True):
    raw = root / "FashionMNIST" / "raw"
    for part, count in (("train", 60_000), ("t10k", 10_000)):
        images = np.zeros((count, 28, 28), np.uint8)
        images[0] = np.arange(784).reshape(28, 28) % 251
        write_idx(raw / f"{part}-images-idx3-ubyte{'.gz' * pack}", images, pack)
        write_idx(
            raw / f"{part}-labels-idx1-ubyte{'.gz' * pack}", (np.arange(count) % 10).astype(np.uint8), pack
        )
    return raw


@pytest.mark.parametrize("pack", [True, False])
def test_fashion_mnist_is_padded_and_repeated(tmp_path, pack):
    fashion(tmp_path, pack)
    data = load_dataset("fashion-mnist", tmp_path)
    assert data.train_images.shape == (60_000, 3, 32, 32) and data.test_images.shape == (10_000, 3, 32, 32)
    picture = (torch.arange(784) % 251).to(torch.uint8).view(28, 28)
    for channel in data.test_images[0]:
        assert torch.equal(channel[2:30, 2:30], picture) and channel.sum() == picture.sum()
    assert data.train_labels[:12].tolist() == [*range(10), 0, 1]


def test_what_is_missing_of_an_unpacked_set_is_told_by_name(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision.datasets", None)
    (fashion(tmp_path, pack=False) / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(UserError, match=r"FashionMNIST/raw lacks t10k-labels-idx1-ubyte, and to download"):
        load_dataset("fashion-mnist", tmp_path)


@pytest.mark.parametrize("kind", ["truncated gz", "no gz", "short", "dimensions"])
def test_a_damaged_idx_file_is_told_in_one_line(tmp_path, kind):
    raw = fashion(tmp_path)
    path = raw / "t10k-labels-idx1-ubyte.gz"
    if kind == "truncated gz":
        path.write_bytes(path.read_bytes()[:-20])
    elif kind == "no gz":
        path.write_bytes(b"labels")
    else:
        write_idx(path, np.zeros(9_999 if kind == "short" else (100, 100), np.uint8))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte") as caught:
        load_dataset("fashion-mnist", tmp_path)
    assert "\n" not in str(caught.value)


def test_digits_are_the_documented_split():
    from sklearn.datasets import load_digits

    data, source = load_dataset("digits", None), load_digits()
    assert (
        data.train_images.shape == (1437, 3, 32, 32)
        and data.test_images.shape == (360, 3, 32, 32)
        and not data.flip
    )
    assert data.test_labels.tolist() == source.target[-360:].tolist()
    shrunk = F.avg_pool2d(data.test_images.float(), 4)[:, 1] * (16 / 255)  # a coarse look at the same picture
    assert (
        torch.corrcoef(
            torch.stack([shrunk.flatten(), torch.from_numpy(source.images[-360:]).float().flatten()])
        )[0, 1]
        > 0.97
    )
    assert data.train_images.max() == 255


def test_auto_takes_cifar10_if_it_is_there_and_never_downloads(binary_root, tmp_path):
    assert choose_dataset("auto", binary_root)[0] == "cifar10"
    name, why = choose_dataset("auto", tmp_path)
    assert name == "digits" and "no CIFAR-10" in why
    for function in (choose_dataset, load_dataset):
        with pytest.raises(UserError, match=r"imagenet.*cifar10"):
            function("imagenet", tmp_path)


@pytest.mark.parametrize("name", ["cifar10", "cifar100", "fashion-mnist"])
def test_a_missing_set_without_torchvision_is_told_in_one_line(monkeypatch, tmp_path, name):
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(UserError, match=rf"{name}: (neither|.* lacks) .* takes torchvision") as caught:
        load_dataset(name, tmp_path)
    assert (
        "torchvision" in str(caught.value) and "--data" in str(caught.value) and "\n" not in str(caught.value)
    )


def test_a_missing_set_is_downloaded_through_torchvision(monkeypatch, tmp_path, capsys):
    def make(name, root):
        assert name == "CIFAR100" and root == tmp_path
        write_pickle(root / "cifar-100-python" / "train", 50_000, "fine_labels", 98)
        write_pickle(root / "cifar-100-python" / "test", 10_000, "fine_labels", 99)

    stand_in(monkeypatch, make)
    check_first_images(load_dataset("cifar100", tmp_path), [0], [98, 99])
    assert "downloading" in capsys.readouterr().out


@pytest.mark.parametrize(
    "error",
    [
        URLError("no route\nto host"),
        RuntimeError("File not found or corrupted."),
        PermissionError(13, "Permission denied"),
    ],
)
def test_a_failed_download_is_told_in_one_line(monkeypatch, tmp_path, error):
    def make(name, root):
        raise error

    stand_in(monkeypatch, make)
    (tmp_path / "cifar-10-batches-bin").mkdir()
    write_binary(tmp_path / "cifar-10-batches-bin" / "test_batch.bin", 10_000, 1, 0)
    with pytest.raises(UserError, match=r"lacks data_batch_1.bin.*download failed") as caught:
        load_dataset("cifar10", tmp_path)
    assert "\n" not in str(caught.value)
