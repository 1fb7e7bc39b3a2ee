"""Tests trained weights: accuracy, parameters and speed.

python -m fastkd.evaluate runs/kd-digits-resnet8-seed0-...      a run: its network, method and data set
python -m fastkd.evaluate resnet56.pth --model resnet56 --dataset cifar100      other weights

Exit status 0; 2 for what the caller can mend, with one line on stderr.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd import data as datasets
from fastkd import plugins
from fastkd.data import choose_dataset, load_dataset
from fastkd.data.feed import AnyDataset, Feed, testing
from fastkd.errors import UserError
from fastkd.io.arguments import OneLineParser, whole
from fastkd.io.console import screens
from fastkd.io.files import as_path
from fastkd.models import WeightsError, create_model, load_student, load_weights, read_checkpoint
from fastkd.models.normalization import Normalization
from fastkd.models.specs import declared_normalization, is_spec
from fastkd.training.device import find_device
from fastkd.training.evaluation import check_logits, evaluate, placed
from fastkd.training.recipes import NORMALIZATIONS, normalization_of
from fastkd.training.teacher_images import identity_of, in_words, parsed, recorded, written


class Result(NamedTuple):
    """``accuracy`` in percent of the ``images`` of a test set; ``speed`` in images/s, loading included."""

    model: str
    dataset: str
    accuracy: float
    images: int
    parameters: int
    speed: float
    normalized: str = ""  # the images' mean and deviation, where they are not the set's own


def test(
    file: str | Path,
    *,
    model: str | None = None,
    dataset: str | None = None,
    data: str | Path = "data",
    device: str | None = None,
    batch_size: int = 250,
    normalization: str | None = None,
    image_size: int | None = None,
    workers: int = 0,
) -> Result:
    """Tests the weights in ``file``: of a run, which may be given by its folder, or of the network ``model``.

    The student of a run includes the modules that its method has added: SimKD's projector and classifier,
    NORM's pair. ``dataset``, ``normalization`` (the name of a recipe's constants, or "MEAN/STD") and
    ``image_size`` (of a folder's images) are by default those of the run. For weights of no run they are the
    normalization that timm or torchvision declares for the network, else the set's own, and 224. Raises
    UserError, one line.
    """
    path = as_path(file)
    path = path / "best.pt" if path.is_dir() else path
    for flag, number, least in (
        ("batch-size", batch_size, 1),
        ("image-size", image_size, 8),
        ("workers", workers, 0),
    ):
        if number is not None and number < least:
            raise UserError(f"--{flag} is {number}, wanted at least {least}")
    try:
        found = read_checkpoint(path).get("config")
        about = found if isinstance(found, dict) else {}
        known = identity_of(about)
        name, dataset = model or known.get("model"), dataset or known.get("dataset")
        if name is None or dataset is None:
            flag = "--model" if name is None else "--dataset"
            raise UserError(f"{path} is of no run, wanted {flag}")
        _check_plugins(path, about, known)
        whole = load_dataset(choose_dataset(dataset, data)[0], data)
        side = image_size or int(known.get("image_size") or 224)
        network = _network(path, name, whole.classes, bool(known) and model in (None, known.get("model")))
    except WeightsError as error:
        raise UserError(str(error)) from None
    constants = _constants(normalization, about, whole, declared_normalization(network, name, path))
    where = find_device(device)
    network = placed(network, where)
    feed = Feed((side,), workers, advice="")  # a damaged image is not left out here
    batches = testing(whole, constants, feed, batch_size=batch_size, device=where)
    autocast = torch.autocast(where.type, enabled=False)
    check_logits(network, next(batches.test())[0], whole.classes, f"{name} from {path}")
    begun = time.perf_counter()
    accuracy = evaluate(network, batches, autocast)  # which reads the counts, so the device has finished
    seconds = time.perf_counter() - begun
    count = len(whole.test_labels)
    parameters = sum(parameter.numel() for parameter in network.parameters())
    normalized = "" if written(constants) == written((whole.mean, whole.std)) else in_words(constants)
    return Result(name, whole.name, accuracy, count, parameters, count / seconds, normalized)


def _constants(
    asked: str | None, about: dict[str, Any], data: AnyDataset, declared: Normalization | None
) -> Normalization:
    """(mean, std) of the images. Raises UserError."""
    if asked is not None and "/" in asked:
        try:
            return parsed(asked) or (data.mean, data.std)
        except ValueError:
            raise UserError(
                f"--normalization is {asked!r}, wanted MEAN/STD: 0.5,0.5,0.5/0.5,0.5,0.5"
            ) from None
    known = identity_of(about)
    found = recorded(about, data) if known else declared
    if asked is None and found is not None:
        return found
    name = asked or known.get("normalization") or "own"
    if name != "own" and (name, data.name) not in NORMALIZATIONS:
        raise UserError(
            f"--normalization is {name}, which has no constants for {data.name}: wanted own, or MEAN/STD"
        )
    return normalization_of(name, data)


def _check_plugins(path: Path, about: dict[str, Any], known: dict[str, Any]) -> None:
    """That the files that a run was given by --plugin are there. None of them is imported for its name in a
    checkpoint; the file of a network is. Raises UserError.
    """
    added = known.get("plugins")
    missing = [
        key
        for key in (added if isinstance(added, dict) else ())
        if not is_spec(key)
        and plugins.origin(*key.split(" ", 1)) is None
        and key.split(" ", 1)[1] not in plugins.known(key.split(" ", 1)[0])
    ]
    if missing and about.get("plugins"):
        flags = " ".join(f"--plugin {file}" for file in about["plugins"])
        raise UserError(f"{path} has {' and '.join(missing)} of a file of its own: give {flags}")


def _network(path: Path, name: str, classes: int, of_run: bool) -> nn.Module:
    if of_run:
        return load_student(path.parent, file=path.name)
    try:
        network = create_model(name, classes)
    except ValueError as error:
        raise UserError(f"--{error}" if f"{error}".startswith("model ") else f"--model: {error}") from None
    load_weights(network, path)
    return network


@screens()
def main(arguments: list[str] | None = None) -> int:
    parser = OneLineParser(
        prog="python -m fastkd.evaluate", description="Tests trained weights.", allow_abbrev=False
    )
    parser.add_argument(
        "file", type=Path, metavar="FILE", help="a run's folder, its best.pt or last.pt, or weights alone"
    )
    parser.add_argument("--model", metavar="NAME", help="the network, if FILE is not of a run")
    parser.add_argument(
        "--dataset",
        metavar="NAME",
        help=f"default: that of the run; known: auto, {', '.join(datasets.DATASETS)}",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of the data sets (default: data)",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    parser.add_argument(
        "--normalization",
        metavar="NAME|MEAN/STD",
        help="own, ofd, repdistiller, or 0.5,0.5,0.5/0.5,0.5,0.5; default: that of the run, else what timm or"
        " torchvision declares for the network, else the set's own",
    )
    parser.add_argument(
        "--image-size",
        type=whole,
        metavar="N",
        help="side of a folder's images; default: that of the run, or 224",
    )
    parser.add_argument(
        "--workers", type=whole, default=0, metavar="N", help="processes that read a folder's images"
    )
    plugin = "a file that registers the run's method, model or data set; may be repeated"
    parser.add_argument("--plugin", action="append", default=[], metavar="FILE.py", help=plugin)
    parser.add_argument("--batch-size", type=whole, default=250, metavar="N")
    flags: dict[str, Any] = vars(parser.parse_args(arguments))
    try:
        for file in flags.pop("plugin"):
            plugins.load(file)
        found = test(flags.pop("file"), **flags)
    except UserError as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    normalized = f"; images normalized by {found.normalized}" if found.normalized else ""
    print(
        f"{found.model} on {found.dataset}: {found.accuracy:.2f} % of {found.images:,} test images,"
        f" {found.parameters:,} parameters, {found.speed:,.0f} images/s{normalized}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
