"""The example that exports a student: it refuses images that the exported code would misread."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest
import torch

EXAMPLE = runpy.run_path(str(Path(__file__).resolve().parents[2] / "examples" / "export_student.py"))
LAST = torch.channels_last


@pytest.mark.parametrize(
    ("spoil", "told"),
    [
        (lambda x: x.to(memory_format=LAST), "images are channels_last torch.float32 on cpu, (N, 3, 4, 5)"),
        (lambda x: x.to(torch.float64), "images are contiguous torch.float64"),
        (lambda x: x.to(torch.bfloat16), "images are contiguous torch.bfloat16"),
        (lambda x: x[:, :, :, ::2], "images are strided torch.float32"),
        (lambda x: x[:, :2].contiguous(), "images are contiguous torch.float32 on cpu, (N, 2, 4, 5)"),
    ],
)
def test_images_of_another_form_are_one_line(spoil, told):
    given = []
    exported, images = EXAMPLE["Exported"](given.append, torch.zeros(2, 3, 4, 5)), torch.zeros(6, 3, 4, 5)
    exported(images)
    with pytest.raises(
        ValueError, match="wanted contiguous torch.float32 on cpu, .N, 3, 4, 5.: bring"
    ) as error:
        exported(spoil(images))
    assert len(given) == 1 and str(error.value).startswith(told) and "\n" not in str(error.value)


def test_a_student_exported_in_channels_last_wants_that():
    exported = EXAMPLE["Exported"](torch.Tensor.sum, torch.zeros(2, 3, 4, 5).to(memory_format=LAST))
    assert exported(torch.ones(6, 3, 4, 5).to(memory_format=LAST)) == 360
    with pytest.raises(ValueError, match="images are contiguous .* wanted channels_last"):
        exported(torch.ones(6, 3, 4, 5))


@pytest.mark.slow  # it compiles
def test_the_example_exports_a_student_that_answers_alike(tmp_path, capsys):
    exported = EXAMPLE["main"](str(tmp_path / "student.pt2"))
    assert float(capsys.readouterr().out.split()[-1]) < 1e-4
    with pytest.raises(ValueError, match="images are channels_last"):
        exported(torch.randn(4, 3, 32, 32).to(memory_format=LAST))
