"""The published tables that the recipes repeat, and which runs of ours belong beside each figure."""

from __future__ import annotations

import statistics
from dataclasses import dataclass


@dataclass(frozen=True)
class Entry:
    """A published figure and the run that stands for it: ``None`` where the source has none, ``method`` ""
    where no run can stand for it.

    ``figure``: a column of the table of results, "loss" (of all terms) or a term, of the last epoch.
    """

    value: float | None
    method: str
    student: str
    teacher: str = ""
    figure: str = "reported_acc"
    runs: tuple[float, ...] = ()  # of which ``value`` is the mean, where they are published

    def published(self, digits: int) -> str:
        if self.value is None:
            return "n/a"
        value = f"{self.value:.{max(digits, len(repr(self.value).split('.')[1]))}f}"
        return f"{value} ± {statistics.stdev(self.runs):.{digits}f}" if self.runs else value


@dataclass(frozen=True)
class Published:
    """A table: ``columns`` are its heads, ``rows`` pairs of a label and an Entry a column.

    ``variants``: models of ours that may stand for those named in the entries, with what a reader must know
    of them.
    """

    title: str
    source: str
    dataset: tuple[str, ...]  # a column each
    recipe: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Entry, ...]], ...]
    variants: tuple[tuple[str, dict[str, str]], ...] = (("", {}),)
    digits: int = 1


_LETTER = ("resnet_32_20", "resnet_32_20", "resnet_32_110", "resnet_32_110")
_RUNS = {
    "AT": ((91.80, 92.16, 91.79), (68.48, 67.95, 68.76), (93.21, 93.30, 93.41), (72.67, 73.00, 72.28)),
    "FSP": ((91.96, 91.90, 92.29), (68.01, 67.97, 68.12), (92.20, 92.48, 93.47), (73.28, 73.37, 71.91)),
}
_HANKYUL2 = {
    "baseline": ("baseline", (92.0, 67.6, 92.5, 71.6)),
    "AT": ("at", (91.9, 68.4, 93.3, 72.6)),
    "FSP": ("fsp", (92.0, 68.0, 92.7, 72.8)),
    "ST (KD)": ("kd", (92.8, 69.9, 93.9, 74.1)),
    "ST + AT": ("at+kd", (92.6, 68.7, 93.7, 73.7)),
}

SELF = Published(
    "AT and FSP, student and teacher of one architecture: test accuracy in percent, mean of three runs",
    "hankyul2/KnowledgeDistillation",
    ("cifar10", "cifar100", "cifar10", "cifar100"),
    "hankyul2",
    ("ResNet-20, CIFAR-10", "ResNet-20, CIFAR-100", "ResNet-110, CIFAR-10", "ResNet-110, CIFAR-100"),
    tuple(
        (
            label,
            tuple(
                Entry(value, method, model, "" if method == "baseline" else model, runs=runs)
                for value, model, runs in zip(values, _LETTER, _RUNS.get(label, ((),) * 4), strict=True)
            ),
        )
        for label, (method, values) in _HANKYUL2.items()
    ),
    # its code's stem is 7x7, and so are resnet_32_20 and resnet_32_110; its text says CIFAR's usual 3x3
    (("", {}), ("3×3 stem", {"resnet_32_20": "resnet20", "resnet_32_110": "resnet110"})),
)

_T, _S = "wrn_40_2", "wrn_16_2"
NOTE = Published(
    "AT + KD, WRN-16-2 from WRN-40-2, on CIFAR-10",
    "an experiment note that names neither recipe nor data set, with the parameters of CIFAR-10;"
    " ours: recipe hankyul2",
    ("cifar10",) * 4,
    "hankyul2",
    ("teacher", "baseline student", "student, AT + KD", "student, KD"),
    (
        (
            "train loss",
            (
                Entry(0.174, "teacher", _T, "", "loss"),
                Entry(0.23, "baseline", _S, "", "loss"),
                Entry(1.75, "at+kd", _S, _T, "loss"),
                Entry(None, "kd", _S, _T, "loss"),
            ),
        ),
        (
            "train accuracy",
            (
                Entry(94.02, "teacher", _T, "", "train_acc"),
                Entry(90.14, "baseline", _S, "", "train_acc"),
                Entry(90.15, "at+kd", _S, _T, "train_acc"),
                Entry(None, "kd", _S, _T, "train_acc"),
            ),
        ),
        (
            "AT loss",
            (
                Entry(None, "", _T),
                Entry(None, "", _S),
                Entry(1.17, "at+kd", _S, _T, "at"),
                Entry(None, "", _S),
            ),
        ),
        (
            "validation accuracy",
            (
                Entry(89.91, "teacher", _T),
                Entry(88.40, "baseline", _S),
                Entry(88.19, "at+kd", _S, _T),
                Entry(None, "kd", _S, _T),
            ),
        ),
    ),
    digits=2,
)

_PAIRS = (
    ("resnet56", "resnet20"), ("resnet56", "resnet32"), ("resnet110", "resnet32"), ("resnet110", "resnet56"),
    ("wrn_40_2", "wrn_40_1"), ("wrn_40_2", "resnet56"),
)  # fmt: skip
_SAKD: dict[str, tuple[str, tuple[float | None, ...]]] = {
    "teacher": ("teacher", (73.03, 73.03, 74.34, 74.34, 75.76, 75.76)),
    "vanilla student": ("baseline", (69.40, 71.14, 71.14, 73.03, 71.98, 73.03)),
    "KD": ("kd", (70.57, 73.27, 73.24, 75.21, 73.54, 74.97)),
    "FitNet": ("fitnet", (70.67, 73.31, 73.49, 75.34, 72.24, 75.06)),
    "AT": ("at", (70.71, 73.45, 73.41, 75.46, 72.77, 75.16)),
    "OFD": ("ofd", (70.82, 72.92, 73.26, 74.96, 73.86, 75.26)),
    "RKD": ("rkd", (70.43, 71.84, 71.82, 74.77, 72.22, 74.39)),
    "CRD": ("crd", (71.44, 73.87, 73.92, 75.56, 74.14, 75.25)),
    "ReviewKD": ("reviewkd", (71.89, 73.34, 73.89, 74.83, 75.09, None)),
    "SRRL": ("srrl", (70.86, None, None, None, 74.64, None)),
    "AFD": ("afd", (71.16, 73.67, 73.93, 75.82, None, 75.40)),
    "SemCKD": ("semckd", (None, None, None, None, 74.41, None)),
    "SimKD": ("simkd", (None, None, None, None, 75.56, None)),
    "NORM (with KD)": ("norm+kd", (71.61, None, 73.95, None, 75.42, None)),
    "SAKD": ("sakd", (71.92, 74.38, 74.36, 76.24, 74.97, 75.92)),
}


def _sakd(method: str, value: float | None, teacher: str, student: str) -> Entry:
    if method == "teacher":
        return Entry(value, method, teacher)
    return Entry(value, method, student, "" if method == "baseline" else teacher)


SAKD = Published(
    "CIFAR-100, student from teacher: test accuracy in percent",
    "CRGuan/SAKD",
    ("cifar100",) * 6,
    "sakd",
    ("R56→R20", "R56→R32", "R110→R32", "R110→R56", "WRN40-2→40-1", "WRN40-2→R56"),
    tuple(
        (label, tuple(_sakd(method, value, *pair) for value, pair in zip(values, _PAIRS, strict=True)))
        for label, (method, values) in _SAKD.items()
    ),
    digits=2,
)

TABLES = (SELF, NOTE, SAKD)

UNKNOWN = "not stated"


@dataclass(frozen=True)
class Meaning:
    """What a published figure is: of how many runs the mean, whether with a spread, and of which epoch."""

    source: str
    figures: str
    runs: str = UNKNOWN
    spread: str = UNKNOWN
    epoch: str = UNKNOWN


# of the tables above, then of the projects whose presets and recipes are here
MEANINGS = (
    Meaning(SELF.source, "AT, FSP", "3", "each run is published", "best"),
    Meaning(SELF.source, "the other rows", "3", epoch="best"),
    Meaning("experiment note", "all"),
    Meaning(SAKD.source, "SAKD", epoch="best"),
    Meaning(SAKD.source, "the other rows, from several papers"),
    Meaning("HobbitLong/RepDistiller", "its README", "5", epoch="last"),
    Meaning("clovaai/overhaul-distillation", "OFD on CIFAR", "5", epoch="last, the median run"),
    Meaning("megvii-research/mdistiller", "what it prints", epoch="best"),
    Meaning("dvlab-research/ReviewKD", "what it prints", epoch="best"),
    Meaning("DefangChen/SimKD", "what it prints", epoch="best"),
    Meaning("OSVAI/NORM", "NORM: the best of four gamma", "3", epoch="best"),
    Meaning("szagoruyko/attention-transfer, KD-Zoo", "all"),
)
