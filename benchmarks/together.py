"""Students side by side against each of them alone: python benchmarks/together.py --data DIR [--setting a]

Training steps on CIFAR-100, float32, not compiled. In every round each student takes a step of a training of
its own, then all of them take one side by side, with one pass of the teacher. One thread, seconds of
processor time: the least of the rounds, and the ratio in each round. What is left of a run, such as its
tests, costs the same in both.

``--memory`` instead: the peak of this process's memory after a few steps, each case in a process of its own.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

import torch  # noqa: E402

from fastkd.models import create_model, fingerprint  # noqa: E402
from fastkd.training.config import Config  # noqa: E402
from fastkd.training.passes import Passes  # noqa: E402
from fastkd.training.phases import phase_trainer  # noqa: E402
from fastkd.training.progress import Progress  # noqa: E402
from fastkd.training.settings import Settings  # noqa: E402
from fastkd.training.trainer import Trainer  # noqa: E402

METHODS = "kd,fitnet,at,rkd,crd,srrl,simkd,norm"


def trainers(configs: Sequence[Config], fold: bool) -> Iterator[Trainer]:
    """What trains the student of each of ``configs``, from the same untrained teacher."""
    batches = configs[0].batches("student")
    torch.manual_seed(0)
    teacher = create_model(configs[0].models.teacher, configs[0].data.classes)
    for config in configs:
        phase = config.phases(config.method)[-1]
        yield phase_trainer(config, "student", phase, config.new_model("student"), teacher, batches, fold)


def alone(trainer: Trainer) -> Callable[[], None]:
    """A step of a training of its own."""
    steps = trainer.train_steps(1, Progress("", 1, silent=True))
    next(steps)
    return lambda: (next(steps), None)[1]


def together(all_of_them: Sequence[Trainer]) -> Callable[[], None]:
    """A step of all, side by side."""
    passes, steps = Passes(), [each.train_steps(1, Progress("", 1, silent=True)) for each in all_of_them]
    wanted = [next(each) for each in steps]
    assert all_of_them[0].teacher is not None
    weights = fingerprint(all_of_them[0].teacher)

    def step() -> None:
        batch = passes.batch([(want, weights) for want in wanted])
        wanted[:] = [each.send(part) for each, part in zip(steps, batch, strict=True)]

    return step


def seconds(call: Callable[[], None]) -> float:
    begun = time.process_time()
    call()
    return time.process_time() - begun


def compare(configs: Sequence[Config], rounds: int) -> None:
    names = [config.settings.method for config in configs]
    single = [alone(trainer) for trainer in trainers(configs, fold=True)]
    shared = together(list(trainers(configs, fold=False)))
    for call in (*single, shared):
        call()  # what is made once
    spent = [[*(seconds(call) for call in single), seconds(shared)] for _ in range(rounds)]
    least = [min(column) for column in zip(*spent, strict=True)]
    for name, value in zip(names, least, strict=False):
        print(f"{name:10} {value * 1000:8.1f} ms a step alone")
    ratios = [row[-1] / sum(row[:-1]) for row in spent]
    print(f"all alone  {sum(least[:-1]) * 1000:8.1f} ms")
    print(f"together   {least[-1] * 1000:8.1f} ms, {least[-1] / sum(least[:-1]):.3f} of it")
    spread = f"{min(ratios):.3f} to {max(ratios):.3f}"
    print(f"ratio of a round: median {statistics.median(ratios):.3f}, {spread} in {rounds} rounds")


def peak(configs: Sequence[Config]) -> None:
    """Prints the largest amount of memory, in MB, that this process has had after three steps."""
    if len(configs) == 1:
        step = alone(next(trainers(configs, fold=True)))
    else:
        step = together(list(trainers(configs, fold=False)))
    for _ in range(3):
        step()
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=Path("data"))
    parser.add_argument("--setting", default="a")
    parser.add_argument("--methods", default=METHODS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(1)
    methods = flags.methods.split(",")
    if flags.memory:
        cases = [*methods, flags.methods]
        for case in cases:
            words = [sys.executable, __file__, *sys.argv[1:], "--peak", "--methods", case]
            words.remove("--memory")
            done = subprocess.run(words, capture_output=True, text=True, check=True)
            print(f"{case}: {done.stdout.strip()} MB", flush=True)
        return
    configs: list[Config] = []
    with tempfile.TemporaryDirectory() as output:
        for method in methods:
            settings = Settings(
                method,
                setting=flags.setting,
                data=flags.data,
                device="cpu",
                compile=False,
                output=Path(output),
                overrides={"batch_size": flags.batch_size},
            )
            configs.append(Config(settings, configs[0].data if configs else None))
    if flags.peak:
        peak(configs)
        return
    models, threads = configs[0].models, torch.get_num_threads()
    print(f"{models.student} from {models.teacher}, batch {flags.batch_size}, {threads} thread")
    compare(configs, flags.rounds)


if __name__ == "__main__":
    main()
