"""The Triton kernels of losses of embeddings compiled as their launchers would on a GPU, as
test_triton_compile.py does it with those of features.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)

pytestmark = pytest.mark.slow
LAUNCHES = {
    "crd": ["crd_odds_kernel", "crd_loss_kernel", "crd_sum_kernel"],
    "rkd": ["rkd_pairs_kernel", "rkd_triples_kernel", "rkd_gradient_kernel"],
    "rkd large": [
        "rkd_pairs_kernel",
        "rkd_sums_kernel",
        "rkd_triples_kernel",
        "rkd_sums_kernel",
        "rkd_gradient_kernel",
    ],
}
# registers of a thread at most: with 96 five programs of 128 threads share a multiprocessor's 65536
REGISTERS = {"crd": 96, "crd bf16": 96, "crd fp16, student": 96}
# accesses of 16 bytes that a thread makes for a tile of CRD's rows: 4 of float32 numbers, 2 of half precision
WIDE = {"crd": 4, "crd bf16": 2, "crd fp16, student": 2, "crd loss": 4, "crd wide": 8}


@functools.cache
def report(capability: int) -> dict[str, dict]:
    env = {**os.environ, "TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    script = Path(__file__).parents[1] / "helpers" / "triton_compile.py"
    done = subprocess.run(
        [sys.executable, str(script), str(capability), "vectors"], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return {case["case"]: case for case in json.loads(done.stdout)}


@pytest.fixture(params=(80, 90, 100), ids=lambda c: f"sm_{c}")
def cases(request):
    return report(request.param)


def test_kernels_fit_and_do_not_spill(cases):
    for name, case in cases.items():
        # another batch size of RKD's is no new kernel
        assert bool(case["kernels"]) == (name != "rkd small"), name
        for kernel in case["kernels"]:
            used = kernel["resources"]
            # CRD's few bytes come with the calls of float64's logarithm and division
            stack = 24 if name.startswith("crd") else 0
            assert used["LOCAL"] == 0 and used["STACK"] <= stack, (name, kernel)
            # RKD's numbers that are to cancel are not contracted with others
            fused = not name.startswith("rkd")
            assert kernel["shared"] <= kernel["shared_limit"] and kernel["fp_fusion"] is fused, (name, kernel)
            most = 255 if kernel["name"] == "rkd_triples_kernel" else 168
            assert used["REG"] <= REGISTERS.get(name, most), (name, kernel)


def test_launches_are_few_and_skip_the_binder_from_the_second_call_on(cases):
    for name, case in cases.items():
        assert case["relaunched"], name
        assert case["launches"] == LAUNCHES.get(name, LAUNCHES[name.split()[0]]), name


def test_rows_of_a_bank_are_read_sixteen_bytes_at_a_time(cases):
    for name, least in WIDE.items():
        for kernel in cases[name]["kernels"]:
            if kernel["name"] in ("crd_loss_kernel", "crd_odds_kernel"):
                found = kernel["accesses"]
                assert found.get("ld 128", 0) >= least, (name, kernel["name"], found)
                # a positive's row may have a number a thread
                assert found.get("ld 16", 0) <= 1, (name, kernel["name"], found)


def test_rkd_has_no_atomics_and_contracts_squares_and_products_with_the_matrix_alone(cases):
    wanted = {"rkd_pairs_kernel": True, "rkd_gradient_kernel": True}  # by "fma" of its own
    for name, case in cases.items():
        for kernel in case["kernels"] if name.startswith("rkd") else ():
            assert not kernel["tickets"] and not kernel["products"], (name, kernel)
            assert kernel["contracted"]["f32"] == 0, (name, kernel)
            if name != "rkd loss":  # whose last launch only adds up
                assert (kernel["contracted"]["f64"] > 0) == wanted.get(kernel["name"], False), (name, kernel)
