"""How an operator of fastkd is declared: its schema, its fake, its autograd rule for traced graphs.

The schemas live in Python, so they exist without a compiled library; the compiled libraries only implement
them. In eager mode the operations call a thin ``autograd.Function`` instead of the rule registered here, at a
fraction of the host cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd import kernels
from fastkd._implementations import CPP, IN_GRAPH, refuse_second_derivative, tensors_in
from fastkd._private import has_tangent, in_torch_func, transforming


class _Library(torch.library.Library):
    """Operators with autograd rules for reverse mode only: any other derivative is an error, not zero."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            rule, name = fn, f"{self.ns}::{op_name}"

            def fn(keyset: Any, *args: Any, **kwargs: Any) -> Any:
                if transforming():
                    _refuse_other_derivatives(name, args)
                return rule(keyset, *args, **kwargs)

        super().impl(op_name, fn, dispatch_key, **options)


_PART_OF: dict[str, str] = {}
"""For each operator that another operator runs: the public function that both belong to."""


def _refuse_other_derivatives(name: str, args: Sequence[Any]) -> None:
    """Inside torch.func or forward mode AD: raise where a derivative would go through the operator."""
    tensors = tensors_in(args)
    followed = in_torch_func() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if followed or has_tangent(tensors):
        public = _PART_OF.get(name) or name.partition("::")[2].removesuffix("_backward")
        raise RuntimeError(
            f"{name} has no derivative in torch.func and forward mode AD; use fastkd.reference.{public}"
        )


def _one_by_one(run: Callable[..., Any]) -> Callable[..., tuple[Any, Any]]:
    """The rule for vmap of a function of tensors and lists of them: a loop over the samples."""

    def rule(info: Any, in_dims: Any, *args: Any) -> tuple[Any, Any]:
        def pick(i: int, value: Any, dim: Any) -> Any:
            if isinstance(value, (list, tuple)):
                return [pick(i, *pair) for pair in zip(value, dim, strict=True)]
            return value if dim is None else value.select(dim, i)

        def joined(outputs: Sequence[Any]) -> Any:
            first = outputs[0]
            if isinstance(first, Tensor):
                return torch.stack(list(outputs))
            return type(first)(joined(same) for same in zip(*outputs, strict=True))

        samples = (map(functools.partial(pick, i), args, in_dims) for i in range(info.batch_size))
        return joined([run(*sample) for sample in samples]), 0

    return rule


# One operator name serves one implementation a device: of two registered for a dispatch key the later would
# silently win. So Triton's kernels have the names of `fastkd` on CUDA tensors, and those of the CUDA library
# the same names in a namespace of their own.
#
# A process that imports fastkd a second time (a notebook that has dropped its modules) goes on with the
# operators of the first time: PyTorch allows a namespace one definition, and graphs may hold its operators.
_DEFINED_BEFORE = hasattr(torch.ops.fastkd, "attention_map")
_LIBRARIES = {} if _DEFINED_BEFORE else {name: _Library(name, "DEF") for name in IN_GRAPH}


def _libraries(one_namespace: bool) -> Iterator[tuple[str, _Library]]:
    return (
        (namespace, library)
        for namespace, library in _LIBRARIES.items()
        if namespace == "fastkd" or not one_namespace
    )


def define(
    schema: str,
    fake: Callable[..., Any],
    cuda_fake: Callable[..., Any] | None = None,
    one_namespace: bool = False,
) -> None:
    """Declare ``fastkd::<schema>`` and ``fastkd_cuda::<schema>``, each with the function that gives its
    outputs' shapes, dtypes, devices and strides. On CUDA tensors the first is Triton's, the second the CUDA
    library's. ``one_namespace``: there is only the first, for a CPU and, where it has a launcher, for Triton.
    Under vmap an operator runs once a sample.
    """
    name = schema.partition("(")[0]
    for namespace, library in _libraries(one_namespace):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        known = cuda_fake if namespace == "fastkd_cuda" and cuda_fake else fake
        torch.library.register_fake(f"{namespace}::{name}", known, lib=library)
        if "!" not in schema:  # an operator that writes into its arguments has none, see `not_differentiable`
            rule = _one_by_one(getattr(getattr(torch.ops, namespace), name).default)
            torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    if name in kernels.LAUNCHERS and _LIBRARIES:
        _LIBRARIES["fastkd"].impl(name, lambda *args: kernels.launcher(name)(*args), "CUDA")


def part_of(public: str, schema: str, fake: Callable[..., Any]) -> None:
    """Declare an operator without a derivative, which an operator of the function ``public`` runs."""
    define(schema, fake, one_namespace=True)
    name = schema.partition("(")[0]
    _PART_OF[f"fastkd::{name}"] = public
    autograd(
        name, lambda ctx, *grads: refuse_second_derivative(public), lambda ctx, inputs, output: None, True
    )


def implement(name: str, kernel: Callable[..., Any]) -> None:
    """The implementation of ``fastkd::<name>`` for every device, in operations of PyTorch."""
    if _LIBRARIES:
        _LIBRARIES["fastkd"].impl(name, kernel, "CompositeExplicitAutograd")


def autograd(
    name: str, backward: Callable[..., Any], setup_context: Callable[..., None], one_namespace: bool = False
) -> None:
    """The autograd rule of an operator in traced graphs, in both namespaces; ``ctx.impl`` runs operators
    where the forward ran.
    """
    for namespace, library in _libraries(one_namespace):

        def setup(ctx: Any, inputs: tuple, output: Any, namespace: str = namespace) -> None:
            ctx.impl = IN_GRAPH[namespace]
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)


def differentiable_once(name: str, one_namespace: bool = False) -> None:
    """Make a second derivative through ``name`` an error; PyTorch's own default is a silent zero."""
    autograd(
        name,
        lambda ctx, *grads: refuse_second_derivative(name),
        lambda ctx, inputs, output: None,
        one_namespace,
    )


def not_differentiable(name: str, instead: str) -> None:
    """Refuse derivatives and vmap for ``fastkd::<name>``, which writes into its first argument.

    Where none is asked for, it runs, and autograd is told of the change in place.
    """
    if not _LIBRARIES:
        return
    refusal = f"fastkd::{name} has no derivative and no rule for vmap; use {instead}"

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise RuntimeError(refusal)

    def rule(keyset: Any, x: Tensor, *args: Any) -> Tensor:
        tensors = [x, *(y for y in args if isinstance(y, Tensor))]
        followed = torch.is_grad_enabled() and any(y.requires_grad for y in tensors)
        if followed or has_tangent(tensors):
            raise RuntimeError(refusal)
        CPP.run(name, x, *args)
        torch.autograd.graph.increment_version(x)
        return x

    # past what _Library puts before a rule, since this one refuses by itself
    torch.library.Library.impl(_LIBRARIES["fastkd"], name, rule, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"fastkd::{name}", no_vmap, lib=_LIBRARIES["fastkd"])


def wanting_gradients(
    students: Sequence[Any], teachers: Sequence[Any]
) -> tuple[Sequence[int], Sequence[Tensor]]:
    """The places in ``[*students, *teachers]`` of the tensors that autograd records, and those tensors."""
    if not torch.is_grad_enabled():
        return (), ()
    for x in students:  # the common case: all of the student's, and no others
        if not x.requires_grad:
            break
    else:
        for x in teachers:
            if x.requires_grad:
                break
        else:
            return range(len(students)), students
    every = (*students, *teachers)
    needed = [i for i, x in enumerate(every) if x.requires_grad]
    return needed, [every[i] for i in needed]


def smaller(a: Sequence[int], b: Sequence[int]) -> list[int | torch.SymInt]:
    return [torch.sym_min(i, j) for i, j in zip(a, b, strict=True)]


def one_device(tensors: Sequence[Tensor]) -> None:
    """Refuse tensors on several devices in a fake, as kernels do: ``meta`` ones would seem to be traced."""
    if len({x.device for x in tensors}) > 1:
        raise RuntimeError("tensors of one call lie on different devices")
