"""Every Triton kernel compiled as its launcher would on a GPU: `triton_compile.py` does it, in a process of
its own. One file, since all its tests look at the same two minutes of compiling.
"""

from __future__ import annotations

import importlib.util

import pytest
from triton_expected import COPIES, FSP_WIDE, PRODUCTS, WIDE
from triton_reports import CAPABILITIES, REPORTS, beforehand

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed", allow_module_level=True)


def is_fsp(case: str) -> bool:
    return case.startswith(("fsp", "matrix"))


def one_stage(case: str, capability: int) -> bool:
    """Of a loss: `spills` and `TILES` of fsp/view.py say why."""
    from fastkd.kernels.fsp.view import SHALLOW

    mode = PRODUCTS.get(case, "tf32x3"), case.split()[-1]
    return (capability == 80 and "tf32x3" in mode) or (not SHALLOW and mode[0] is None)


@pytest.fixture(params=CAPABILITIES, ids=lambda c: f"sm_{c}")
def cases(request):
    if not REPORTS:
        request.config.add_cleanup(beforehand())
    return REPORTS[0].result(timeout=1800)[request.param]


@pytest.mark.slow
def test_kernels_fit_and_do_not_spill(cases):
    seen = set()
    for name, case in cases.items():
        assert case["kernels"] or case["launches"], name
        for kernel in case["kernels"]:
            seen.add(kernel["name"])
            used = kernel["resources"]
            # Nothing is local. The stack's few bytes (24 at most with Triton 3.6, 8 with 3.9) come with the
            # calls of float64's division; Triton 3.6 gives FSP for sm_100 half of the registers, and 64 bytes
            # of stack
            assert used["LOCAL"] == 0 and used["STACK"] <= (
                64 if is_fsp(name) and kernel["capability"] == 100 else 24
            ), (name, kernel)
            assert kernel["shared"] <= kernel["shared_limit"] and used["REG"] <= (
                255 if is_fsp(name) else 168
            ), (name, kernel)
            assert kernel["fp_fusion"] is True
    fsp = {"fsp_matrix_kernel", "fsp_loss_kernel", "fsp_gradient_kernel", "_spread"}
    assert seen == {
        "loss_kernel",
        "gradient_kernel",
        "map_kernel",
        "map_gradient_kernel",
        "_pool",
        "_unpool",
        *fsp,
    }


@pytest.mark.slow
def test_features_are_read_and_written_sixteen_bytes_at_a_time(cases):
    for case, wanted in WIDE.items():
        for kernel in cases[case]["kernels"] if case in cases else ():
            for way, least in wanted[kernel["name"]].items():
                assert kernel["accesses"].get(f"{way} 128", 0) >= least, (
                    case,
                    kernel["name"],
                    kernel["accesses"],
                )
            # numbers of half precision are features' alone
            assert not {"ld 16", "st 16"} & kernel["accesses"].keys(), (
                case,
                kernel["name"],
                kernel["accesses"],
            )


@pytest.mark.slow
def test_what_is_read_for_the_last_time_leaves_the_cache_first(cases):
    """Attention transfer's student is read twice, so the forward pass leaves it in the second-level cache;
    the teacher's features, and the student's in the backward pass, need not stay. A gradient kernel's loads
    of 16 bytes are its features, all of them given up first; of the loss kernel's half are the teacher's.
    What a map's kernels read again keeps its place.
    """
    for case in WIDE.keys() & cases.keys():
        for kernel in cases[case]["kernels"]:
            least = WIDE[case][kernel["name"]]["ld"]
            wanted = {"gradient_kernel": least, "loss_kernel": least // 2}.get(kernel["name"], 0)
            assert kernel["given_up_first"] == wanted, (case, kernel["name"], kernel["given_up_first"])


@pytest.mark.slow
def test_launches_are_few_and_skip_the_binder_from_the_second_call_on(cases):
    for name, case in cases.items():
        assert case["relaunched"], name
        if "map" in name:
            forward, backward = "map_kernel", "map_gradient_kernel"
            assert case["launches"] == [forward, backward, forward, backward, backward], name
        elif name == "matrix tf32":
            assert case["launches"] == ["fsp_matrix_kernel", "fsp_gradient_kernel"], name
        elif is_fsp(name):
            assert case["launches"] == ["fsp_loss_kernel", "fsp_gradient_kernel"] or name in (
                "fsp columns",
                "fsp again",
                "fsp pooled",
                "fsp unaligned",
                "fsp without gradients",
            ), name
        elif name not in ("pooled", "unaligned"):
            assert case["launches"] == ["loss_kernel", "gradient_kernel"], name


@pytest.mark.slow
def test_an_unaligned_tensor_gets_a_kernel_of_its_own(cases):
    """The second call skips Triton's binder, which would have seen it."""
    for case in ("unaligned", "fsp unaligned"):
        if case in cases:
            aligned, other = cases[case]["kernels"]
            wide = [
                k["accesses"].get("ld 128", 0) + k["accesses"].get("copy 128", 0) for k in (aligned, other)
            ]
            assert wide[0] > wide[1]


@pytest.mark.slow
def test_a_loss_with_gradients_is_a_kernel_of_its_own(cases):
    """The second call skips Triton's binder, which would have seen that there is more to write."""
    for name in {"fsp without gradients"} & cases.keys():
        for kernel in ("fsp_loss_kernel", "loss_kernel"):
            without, with_them = [
                sum(count for way, count in k["accesses"].items() if way.startswith("st"))
                for k in cases[name]["kernels"]
                if k["name"] == kernel
            ]
            assert without < with_them


@pytest.mark.slow
def test_a_ticket_is_taken_between_barriers(cases):
    """What orders the partial sums of all threads before the ticket, and the ticket before the reading of
    others' sums.
    """
    for case in cases.values():
        for kernel in case["kernels"]:
            if kernel["name"] in ("loss_kernel", "fsp_loss_kernel"):
                # of AT's samples and of all; of FSP's all, and of the columns of its three pairs or of sums
                # over parts of the channels
                low_rank = case["case"].startswith(("fsp resnet50", "fsp wide"))
                count = (
                    4
                    if case["case"].endswith("columns")
                    else 2
                    if low_rank or kernel["name"] == "loss_kernel"
                    else 1
                )
                assert kernel["tickets"] == ["bar", "atom.acq_rel.gpu", "bar"] * count, (
                    case["case"],
                    kernel["tickets"],
                )


@pytest.mark.slow
def test_partial_sums_are_read_by_all_threads_before_one_writes_their_total(cases):
    """A block of fewer positions than threads is held several times over; who reads late must not read the
    total.
    """
    for case in cases.values():
        for kernel in case["kernels"]:
            if kernel["name"] in ("loss_kernel", "map_kernel"):
                assert kernel["unguarded"] == 0, (case["case"], kernel)


@pytest.mark.slow
def test_products_run_on_tensor_cores(request, cases):
    capability = int(request.node.callspec.id.removeprefix("sm_"))
    for name, dtype in PRODUCTS.items():
        for kernel in cases[name]["kernels"] if name in cases else ():
            if kernel["name"].startswith("fsp"):
                used = {kind.split()[0]: kind.split()[1] for kind in kernel["products"]}
                # tcgen05 knows of bfloat16 as f16; tiles of few rows are left to mma everywhere
                wanted = (
                    {80: "mma", 90: "wgmma", 100: "tcgen05"}[capability]
                    if "cifar" not in name and dtype
                    else "mma"
                )
                if dtype is None:
                    assert not used, (name, kernel["name"], used)
                else:
                    assert wanted in used and set(used.values()) <= {dtype, "f16"}, (
                        name,
                        kernel["name"],
                        used,
                    )


@pytest.mark.slow
def test_warps_do_not_repeat_each_others_products(cases):
    """Triton gives a warp no fewer than 16 rows or 8 columns of a tile, whatever their number."""
    for name, case in cases.items():
        for kernel in case["kernels"]:
            needed, made = kernel["work"]
            assert made <= needed, (name, kernel["name"], kernel["work"])


@pytest.mark.slow
def test_numbers_are_rounded_to_tf32_in_one_instruction_from_sm_90_on(cases):
    for name in {"fsp resnet50 tf32", "fsp resnet32x4 tf32", "matrix tf32"} & cases.keys():
        for kernel in cases[name]["kernels"]:
            if kernel["name"].startswith("fsp"):
                assert (kernel["roundings"] > 0) == (kernel["capability"] >= 90), (name, kernel)


@pytest.mark.slow
def test_fsp_loads_the_next_blocks_while_it_multiplies(cases):
    for name, least in COPIES.items():
        for kernel in cases[name]["kernels"] if name in cases else ():
            wanted = {"fsp_loss_kernel": least[0], "fsp_gradient_kernel": least[1]}.get(kernel["name"])
            if kernel["capability"] == 100 and (name, kernel["name"]) == (
                "fsp resnet50 channels_last bf16",
                "fsp_gradient_kernel",
            ):
                wanted = None
            if kernel["name"] == "fsp_loss_kernel" and one_stage(name, kernel["capability"]):
                wanted = None
            assert wanted is None or kernel["copies"] >= wanted, (name, kernel["name"], kernel["copies"])
            if kernel["capability"] < 100:  # ptxas has kept them
                assert kernel["machine_copies"] >= kernel["copies"], (name, kernel)


@pytest.mark.slow
def test_fsp_reads_sixteen_bytes_at_a_time_beside_a_feature_that_is_pooled(cases):
    """In each of two pairs; the second has 14x14 positions, no multiple of 16: the mask of its second feature
    comes from that feature's own size.
    """
    for name, least, ways in (
        ("fsp resnet50", 40, ("ld 128", "copy 128")),  # with partial sums of squares, 24
        ("fsp resnet50 tf32", 8, ("copy 128",)),
    ):
        (kernel,) = [k for k in cases[name]["kernels"] if k["name"] == "fsp_loss_kernel"]
        assert sum(kernel["accesses"].get(way, 0) for way in ways) >= least, (name, kernel["accesses"])


@pytest.mark.slow
def test_fsp_reads_and_writes_sixteen_bytes_at_a_time(cases):
    for name, (least_read, least_written, most) in FSP_WIDE.items():
        for kernel in cases[name]["kernels"] if name in cases else ():
            found = kernel["accesses"]
            # those that go to shared memory without a register between
            read = found.get("ld 128", 0) + found.get("copy 128", 0)
            assert read >= least_read and found.get("st 128", 0) >= least_written, (
                name,
                kernel["name"],
                found,
            )
            assert kernel["name"] == "fsp_loss_kernel" or not {"st 64", "st 32"} & found.keys(), (
                name,
                kernel["name"],
                found,
            )
            assert (
                found.get("ld 32", 0) + found.get("st 32", 0) <= most
                and not {"ld 16", "st 16"} & found.keys()
            ), (name, found)
