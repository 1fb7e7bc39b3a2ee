"""The flags of ``python train.py``, with their types and their help."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any, NoReturn

from fastkd.io.arguments import OneLineParser, natural, number, whole
from fastkd.training.command import program
from fastkd.training.launch import is_first


class FirstsParser(OneLineParser):
    """Of several processes the first alone says what is wrong."""

    def error(self, message: str) -> NoReturn:
        if is_first():
            super().error(message)
        self.exit(2)


def build_parser() -> argparse.ArgumentParser:
    from fastkd import plugins
    from fastkd.data import DATASETS
    from fastkd.methods import METHODS
    from fastkd.training import PRECISIONS, RECIPES, SETTINGS, Recipe
    from fastkd.training.own_flags import add_networks, add_own

    text = "Train a teacher, distil a student from it, record the result."
    parser = FirstsParser(prog=program(), description=text, allow_abbrev=False)
    parser.add_argument(
        "--method",
        required=True,
        type=method_names,
        metavar="NAME[,NAME...]",
        help=f"{', '.join(METHODS)}, or a sum such as at+kd; several are trained side by side",
    )
    parser.add_argument(
        "--dataset",
        choices=("auto", *DATASETS, *plugins.known("dataset")),
        help="auto (default): CIFAR-10 if under --data, else digits",
    )
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data"),
        metavar="DIR",
        help="folder of the data sets; missing ones are downloaded to it (default: data)",
    )
    letters = ", ".join(f"{letter} {teacher} > {student}" for letter, (teacher, student) in SETTINGS.items())
    parser.add_argument(
        "--setting", choices=tuple(SETTINGS), help=f"teacher > student on cifar100 by recipe sakd: {letters}"
    )
    add_networks(parser)
    parser.add_argument(
        "--student-checkpoint",
        type=Path,
        metavar="FILE",
        help="weights with which the student's training starts",
    )
    plugin = "a file to import first: it may register methods, models and data sets; may be repeated"
    parser.add_argument(
        "--plugin", action="append", default=[], dest="plugins", metavar="FILE.py", help=plugin
    )
    parser.add_argument(
        "--recipe",
        choices=tuple(RECIPES),
        help="default hankyul2, digits on digits, imagenet on a folder; flags below override its fields",
    )
    parser.add_argument(
        "--seed", type=natural, default=0, metavar="N", help="of all random numbers (default: 0)"
    )
    parser.add_argument(
        "--teacher-seed", type=natural, metavar="N", help="of the teacher's training (default: --seed)"
    )
    parser.add_argument(
        "--repeats",
        type=whole,
        default=1,
        metavar="R",
        help="train R students of one teacher with the seeds N, N+1, ...: mean and standard deviation",
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda if there is one")
    faster = (
        "fp32 (default); auto: bf16 where the device has instructions for it (a CPU: AMX or AVX512-BF16),"
        " else fp32"
    )
    parser.add_argument("--precision", default="fp32", choices=("auto", *PRECISIONS), help=faster)
    parser.add_argument(
        "--deterministic",
        action="store_true",
        help="PyTorch's deterministic algorithms: on a GPU runs repeat bit by bit",
    )
    parser.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="compile the training step (default: in long runs)",
    )
    graph = "run the training step as a CUDA graph (default: in one process on a GPU)"
    parser.add_argument("--cuda-graph", action=argparse.BooleanOptionalAction, default=None, help=graph)
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("runs"),
        metavar="DIR",
        help="folder for tables, runs and teachers (default: runs)",
    )
    resume = (
        "continue the unfinished run of the same flags, or the one in FOLDER; auto: start it if there is none"
        " and do nothing if it is finished"
    )
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER|auto", help=resume)
    pictures = argparse.BooleanOptionalAction
    parser.add_argument(
        "--pictures",
        action=pictures,
        default=True,
        help="draw attention maps at the end (default, if matplotlib is installed)",
    )
    option = (
        "an option of the method, may be repeated: at.beta=500, or beta=500 if only one term has it; 0.5:0.75"
        " is a tuple, at.beta=250,500 a grid with a run for each value"
    )
    parser.add_argument(
        "--option", action="append", default=[], dest="options", metavar="NAME=VALUE", help=option
    )
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="print the plan, the sizes of features, memory and time of a step; writes nothing",
    )
    add_own(parser.add_argument_group("networks and images of your own"))
    group = parser.add_argument_group("fields of the recipe")
    for field in dataclasses.fields(Recipe):
        add_field(group, field)
    return parser


def method_names(text: str) -> str:
    from fastkd.methods import full_name

    try:
        return ",".join(map(full_name, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_field(group: argparse._ArgumentGroup, field: dataclasses.Field) -> None:
    """A flag for one field of the recipe, with its type and its help."""
    flag, text = "--" + field.name.replace("_", "-"), field.metadata["help"]
    if field.type == "bool":
        group.add_argument(flag, action=argparse.BooleanOptionalAction, default=None, help=text)
    else:
        kinds = {"int": whole, "float": number, "str": str, "tuple[float, ...]": fractions}
        kind: Any = kinds[str(field.type)]
        choices = field.metadata["choices"]
        group.add_argument(flag, type=kind, choices=choices, metavar=None if choices else "X", help=text)


def fractions(text: str) -> tuple[float, ...]:
    """0.5,0.75 as a tuple; nothing is an empty one."""
    try:
        return tuple(float(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}, wanted fractions with commas: 0.5,0.75") from None
