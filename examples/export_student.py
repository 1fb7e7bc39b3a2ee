"""The trained student as one file that needs no fastkd: python examples/export_student.py student.pt2"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fastkd


def form(images: Tensor) -> str:
    """What the code of an exported network takes for granted."""
    by_channel = images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous()
    order = "channels_last" if by_channel else "contiguous" if images.is_contiguous() else "strided"
    return f"{order} {images.dtype} on {images.device.type}, (N, {', '.join(map(str, images.shape[1:]))})"


class Exported:
    """An exported network ``run`` that refuses images of another form than those it was exported with.

    Without that, AOTInductor reads their memory as if it were of that form, and answers wrongly in silence.
    """

    def __init__(self, run: Callable[[Tensor], Any], like: Tensor):
        self.run, self.form = run, form(like)

    def __call__(self, images: Tensor) -> Any:
        if form(images) != self.form:
            raise ValueError(f"images are {form(images)}, wanted {self.form}: bring them to that form first")
        return self.run(images)


def export(student: nn.Module, like: Tensor, file: str) -> Exported:
    """Compiles ``student`` for any number of images ``like`` these, two at least, and loads it again."""
    batch = torch.export.Dim("batch", min=2)
    with torch.no_grad():
        program = torch.export.export(student.eval(), (like,), dynamic_shapes=({0: batch},))
        torch._inductor.aoti_compile_and_package(program, package_path=file)
    return Exported(torch._inductor.aoti_load_package(file), like)


def main(file: str = "student.pt2") -> Exported:
    torch.manual_seed(0)
    student, teacher = fastkd.models.create_model("resnet8"), fastkd.models.create_model("resnet20")
    distillation = fastkd.Distillation(student, teacher, "kd")  # and a loop, as in plain_loop.py
    exported = export(distillation.student, torch.randn(4, 3, 32, 32), file)
    images = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        print(f"differs by {(exported(images) - student(images)).abs().max():.1e}")
    return exported


if __name__ == "__main__":
    main(*sys.argv[1:])
