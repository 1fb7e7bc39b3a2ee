"""What steps wait for image files: python benchmarks/waiting.py [--workers 1] [--image-size 64]

Makes a folder of JPEGs of 500x375, as ImageNet's are on average, and trains one epoch on it by the loop of
``train.py``: AT, torchvision's ResNet-18 from its ResNet-34, float32, one thread. Prints the share of the
epoch's time in which its steps waited for images, and the line of the run that says so, if there is one.

``--paces 200,400``: instead, for each of these numbers of images a second, steps that only sleep, as where a
GPU computes. So one sees up to which pace the workers suffice.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent)]

import torch  # noqa: E402

from fastkd.data.streaming import StreamedBatches  # noqa: E402
from fastkd.models import create_model  # noqa: E402
from fastkd.training.config import Config  # noqa: E402
from fastkd.training.phases import phase_trainer  # noqa: E402
from fastkd.training.progress import Progress  # noqa: E402
from fastkd.training.settings import Settings  # noqa: E402


def make_folder(root: Path, count: int, size: tuple[int, int] = (500, 375)) -> float:
    """``count`` training images and two test images of two classes; returns the mean size of a file in kB."""
    from PIL import Image

    numbers, written = random.Random(0), 0
    for i in range(count + 2):
        part = "train" if i < count else "val"
        path = root / part / ("one", "other")[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        # large shapes and a little noise: files are then as long as those of photographs
        small = Image.frombytes("RGB", (24, 18), numbers.randbytes(24 * 18 * 3)).resize(
            size, Image.Resampling.BICUBIC
        )
        noise = Image.effect_noise(size, 40).convert("RGB")
        Image.blend(small, noise, 0.1).save(path, quality=85)
        written += path.stat().st_size
    return written / (count + 2) / 1000


def trained(config: Config) -> tuple[float, float, list[str]]:
    """One epoch: (the share of its time that was waiting, seconds a step, the lines of the run about it)."""
    torch.manual_seed(0)
    teacher = create_model(config.models.teacher, config.data.classes)
    phase, batches = config.phases(config.method)[-1], config.batches("student")
    trainer = phase_trainer(config, "student", phase, config.new_model("student"), teacher, batches)
    trainer.train_epoch(1, Progress("", trainer.steps, silent=True))
    seconds = trainer.history[-1]["seconds"] / len(trainer.batches)
    return trainer.reading.share, seconds, trainer.reading.lines()


def slept(batches: StreamedBatches, pace: float) -> tuple[float, float]:
    """An epoch of steps that sleep: (the share of its time that was waiting, images a second)."""
    begun, seen = 0.0, 0
    for drawn in batches.draw(1):
        begun = begun or time.perf_counter()  # the first batch is waited for by any number of workers
        batches.inputs(drawn)
        seen += len(drawn)
        time.sleep(len(drawn) / pace)
    seconds = time.perf_counter() - begun
    return batches.waited / seconds, seen / seconds


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--teacher", default="torchvision:resnet34")
    parser.add_argument("--student", default="torchvision:resnet18")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--image-size", type=int, default=64)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--paces", type=lambda text: [float(pace) for pace in text.split(",")], default=[])
    flags = parser.parse_args(words)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        size = make_folder(Path(folder), flags.images)
        config = Config(
            Settings(
                "at",
                "folder",
                data=Path(folder),
                teacher=flags.teacher,
                student=flags.student,
                image_size=flags.image_size,
                workers=flags.workers,
                device="cpu",
                compile=False,
                output=Path(folder) / "runs",
                overrides={"epochs": 1, "batch_size": flags.batch_size},
            )
        )
        what = f"{flags.images} JPEGs of {size:.0f} kB, batch {flags.batch_size}, {flags.workers} workers"
        print(f"{what}, images of {flags.image_size} pixels a side", flush=True)
        for pace in flags.paces:
            batches = config.batches("student")[0]
            assert isinstance(batches, StreamedBatches)
            share, images = slept(batches, pace)
            print(
                f"steps of {pace:g} images/s: {100 * share:.1f} % waiting, {images:.0f} images/s", flush=True
            )
        if not flags.paces:
            share, seconds, lines = trained(config)
            spent = f"{seconds * 1000:.0f} ms a step, of which {100 * share:.2f} % waiting"
            print(f"{flags.student} from {flags.teacher}: {spent}")
            print("\n".join(lines) or "the run says nothing of it")
    return 0


if __name__ == "__main__":
    sys.exit(main())
