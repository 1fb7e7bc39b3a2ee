"""What tests/packaging/aarch64.py sees in the assembly of the kernels for aarch64."""

from __future__ import annotations

import runpy
from pathlib import Path

import pytest

CODE = """{name}:
\tldr\td0, [x0]
{body}
\tb.ne\t.L3
\tret
\t.size\t{name}, .-{name}
"""
HALF, TILE = "_ZN6fastkd4neonL5rowsINS_4HalfEfEEvPKT_", "_ZN6fastkd4neonL9gemm_tileIfLi12EEEvv"
SINGLE = "_ZN6fastkd4neonL9hcl_lanesILb1ELb0ENS_4HalfEfEEdv"
SCALAR = "fcvt\ts0, h0\n\tfcvt\ts1, h1\n\tins\tv0.s[1], v1.s[0]\n\tfadd\tv0.4s, v0.4s, v2.4s"
SOFTWARE = "ushll\tv0.4s, v0.4h, 0\n\tfmul\tv0.4s, v0.4s, v1.4s"
SUMS = "fmla\tv0.4s, v1.4s, v2.s[0]\n\t" * 4


@pytest.mark.parametrize(
    ("name", "body", "wanted"),
    [
        (HALF, "\tfcvtl\tv0.4s, v0.4h\n\tfadd\tv0.4s, v0.4s, v1.4s", []),
        (HALF, "\tfcvtl\tv4.4s, v4.4h\n.L3:\n\t" + SCALAR, ["number by number"]),
        (HALF, "\t" + SOFTWARE, ["without fcvtl"]),
        (SINGLE, "\t" + SOFTWARE, []),  # what fills no vector
        (HALF, "\tfcvt\ts0, h0\n\tfadd\ts0, s0, s1", []),  # the last numbers of a row, one at a time
        (TILE, "\t" + SUMS + "\n\tb.ne\t.L4\n\tstp\tq0, q1, [sp, 16]", []),
        (TILE, "\t" + SUMS + "str\tq3, [sp, 16]", ["keeps sums in memory"]),
    ],
)
def test_scalar_conversions_and_spilled_sums_are_found(name: str, body: str, wanted: list[str]) -> None:
    faults = runpy.run_path(str(Path(__file__).with_name("aarch64.py")))["faults"]
    found = faults(CODE.format(name=name, body=body))
    assert len(found) == len(wanted) and all(word in fault for word, fault in zip(wanted, found)), found
