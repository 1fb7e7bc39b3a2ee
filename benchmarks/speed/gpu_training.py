"""`python -m speed.gpu_training DATASET [DIR]`: 200 epochs of attention transfer, ResNet-20 from ResNet-20.

The student trains by fastkd's own kernels in a CUDA graph, for as long as benchmarks/gpu.py lets it. Its
teacher trains first, but for a tenth of the epochs: with as many, the minutes before measuring would be over
before the student's last.
Tables and logs lie under runs/ in the folder of $FASTKD_GPU_OUT.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

EPOCHS = 200
TEACHER_EPOCHS = 20
ROOT = Path(__file__).resolve().parents[2]


def trained(output: Path, method: str, epochs: int, *flags: str) -> Path:
    """The best weights of a run of train.py, under ``output``. Raises CalledProcessError if that failed, and
    KeyboardInterrupt, at a SIGINT that went to train.py too, once it has ended.
    """
    command = [sys.executable, str(ROOT / "train.py"), "--method", method, "--epochs", str(epochs)]
    command += ["--no-pictures", "--output", str(output), *flags]
    with subprocess.Popen(command) as process:  # subprocess.run gives it a quarter of a second after a SIGINT
        try:
            status = process.wait()
        except KeyboardInterrupt:
            process.wait()  # it writes what it has; benchmarks/gpu.py kills both if that takes too long
            raise
    if status:
        raise subprocess.CalledProcessError(status, command)
    return max(output.glob("*/best.pt"), key=lambda path: path.stat().st_mtime)


def main() -> int:
    dataset, *folder = sys.argv[1:]
    flags = ["--dataset", dataset]
    flags += ["--data", folder[0]] if folder else []
    if os.environ.get("FASTKD_GPU_REHEARSAL"):
        epochs = teacher_epochs = 1
    else:
        epochs, teacher_epochs = EPOCHS, TEACHER_EPOCHS
        # a compiled step has plain PyTorch's losses compiled into it
        flags += ["--device", "cuda", "--precision", "bf16", "--cuda-graph", "--no-compile"]
    output = Path(os.environ["FASTKD_GPU_OUT"]) / "runs"
    try:
        teacher = trained(output / "teacher", "baseline", teacher_epochs, "--seed", "1", *flags)
        trained(output, "at", epochs, "--teacher-checkpoint", str(teacher), *flags)
    except subprocess.CalledProcessError as error:
        return error.returncode
    except KeyboardInterrupt:
        return 130  # train.py has written what it has
    return 0


if __name__ == "__main__":
    sys.exit(main())
