"""How an operator of fastkd is declared: its schema, its fake, its autograd rule for traced graphs.

The schemas live in Python, so they exist without a compiled library; the compiled libraries only implement them. In eager mode the
operations call a thin ``autograd.Function`` instead of the rule registered here, at a fraction of the host cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor

from fastkd import backends, kernels


class _Library(torch.library.Library):
    """Operators whose autograd rules, for reverse mode alone, let no other derivative pass as zero."""

    def impl(self, op_name: Any, fn: Callable[..., Any], dispatch_key: str = "", **options: Any) -> None:
        if dispatch_key == "Autograd":
            rule, name = fn, f"{self.ns}::{op_name}"

            def fn(keyset: Any, *args: Any, **kwargs: Any) -> Any:
                if backends.transforming():
                    _refuse_other_derivatives(name, args)
                return rule(keyset, *args, **kwargs)

        super().impl(op_name, fn, dispatch_key, **options)


def _refuse_other_derivatives(name: str, args: Sequence[Any]) -> None:
    """Inside torch.func or forward mode AD: raise where a derivative would go through the operator."""
    tensors = [x for x in _flat(args) if isinstance(x, Tensor)]
    followed = backends.in_torch_func() and torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
    if followed or backends.has_tangent(tensors):
        operator = name.partition("::")[2]
        public = _PUBLIC.get(operator, operator)
        raise RuntimeError(f"{name} has no derivative in torch.func and forward mode AD; use fastkd.reference.{public}")


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


def _flat(args: Sequence[Any]) -> list[Any]:
    """The arguments, lists among them opened."""
    return [x for arg in args for x in (arg if isinstance(arg, (list, tuple)) else (arg,))]


# One operator name serves one implementation a device: of two registered for a dispatch key the later would silently win. So Triton's
# kernels have the names of `fastkd` on CUDA tensors, and those of the CUDA library the same names in a namespace of their own.
#
# A process that imports fastkd a second time (a notebook that has dropped its modules) goes on with the operators of the first time:
# PyTorch allows a namespace one definition, and graphs may hold its operators.
_DEFINED_BEFORE = hasattr(torch.ops.fastkd, "attention_map")
_LIBRARIES = {} if _DEFINED_BEFORE else {name: _Library(name, "DEF") for name in ("fastkd", "fastkd_cuda")}


def _libraries(twin: bool) -> Iterator[tuple[str, _Library]]:
    return ((namespace, library) for namespace, library in _LIBRARIES.items() if twin or namespace == "fastkd")


def define(schema: str, fake: Callable[..., Any], twins_fake: Callable[..., Any] | None = None, twin: bool = True) -> None:
    """Declare ``fastkd::<schema>`` and its twin ``fastkd_cuda::<schema>``, each with the function that gives its outputs' shapes, dtypes,
    devices and strides. On CUDA tensors the first is Triton's, the second the CUDA library's. ``twin`` False: there is only the first.
    Under vmap an operator runs once a sample.
    """
    name = schema.partition("(")[0]
    for namespace, library in _libraries(twin):
        library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        known = twins_fake if namespace == "fastkd_cuda" and twins_fake else fake
        torch.library.register_fake(f"{namespace}::{name}", known, lib=library)
        if "!" not in schema:  # what writes into its arguments does not, see `not_differentiable`
            rule = _one_by_one(getattr(getattr(torch.ops, namespace), name).default)
            torch.library.register_vmap(f"{namespace}::{name}", rule, lib=library)
    if name in kernels.LAUNCHERS and _LIBRARIES:
        _LIBRARIES["fastkd"].impl(name, lambda *args: kernels.launcher(name)(*args), "CUDA")


def autograd(name: str, backward: Callable[..., Any], setup_context: Callable[..., None], twin: bool = True) -> None:
    """The autograd rule of an operator and of its twin in traced graphs; ``ctx.call`` runs operators where the forward ran."""
    for namespace, library in _libraries(twin):
        run = in_cuda if namespace == "fastkd_cuda" else call

        def setup(ctx: Any, inputs: tuple, output: Any, run: Callable[..., Any] = run) -> None:
            ctx.call = run
            setup_context(ctx, inputs, output)

        torch.library.register_autograd(f"{namespace}::{name}", backward, setup_context=setup, lib=library)


def differentiable_once(name: str, public: str, twin: bool = True) -> None:
    """Make a second derivative through the backward operator ``name`` an error; PyTorch's own default is a silent zero."""

    _PUBLIC[name] = public
    autograd(name, lambda ctx, *grads: _refuse(public), lambda ctx, inputs, output: None, twin)


def not_differentiable(name: str, instead: str) -> None:
    """Refuse derivatives and vmap for ``fastkd::<name>``, which writes into its first argument.

    Where it is called without, autograd is told of the change in place.
    """
    if not _LIBRARIES:
        return
    operator = getattr(torch.ops.fastkd, name).default
    refusal = f"fastkd::{name} has no derivative and no rule for vmap; use {instead}"

    def no_vmap(info: Any, in_dims: Any, *args: Any) -> NoReturn:
        raise RuntimeError(refusal)

    def rule(keyset: Any, x: Tensor, *args: Any) -> Tensor:
        tensors = [x, *(y for y in args if isinstance(y, Tensor))]
        followed = torch.is_grad_enabled() and any(y.requires_grad for y in tensors)
        if followed or backends.has_tangent(tensors):
            raise RuntimeError(refusal)
        _call_kernel(operator, x, *args)
        torch.autograd.graph.increment_version(x)
        return x

    # past what _Library puts before a rule, since this one refuses by itself
    torch.library.Library.impl(_LIBRARIES["fastkd"], name, rule, "Autograd", with_keyset=True)
    torch.library.register_vmap(f"fastkd::{name}", no_vmap, lib=_LIBRARIES["fastkd"])


_PUBLIC: dict[str, str] = {}


def _refuse(public: str) -> NoReturn:
    raise RuntimeError(f"{public} has no second derivative: use fastkd.reference.{public}, which is differentiable twice")


def call(operator: Callable[..., Any], *args: Any) -> Any:
    """Run an operator inside an ``autograd.Function``: straight to its kernel, unless a graph of the backward pass is wanted."""
    return operator(*args) if torch.is_grad_enabled() else _call_kernel(operator, *args)


def twin(operator: Any) -> Any:
    """The operator of the CUDA library that does what ``operator`` does."""
    return getattr(torch.ops.fastkd_cuda, operator._opname).default


def in_cuda(operator: Any, *args: Any) -> Any:
    """As ``call``, by the CUDA library."""
    return call(twin(operator), *args)


def traced(backend: str, operator: Any) -> Any:
    """The operator that stands in a traced graph for a call that ``backend`` serves."""
    return twin(operator) if backend == "cuda" else operator


def _call_kernel(operator: Callable[..., Any], *args: Any) -> Any:
    # past autograd's rule, which would be entered only to find that there is nothing to record
    with torch._C._AutoDispatchBelowAutograd():
        return operator(*args)


def recorded(tensors: Sequence[Tensor]) -> bool:
    """Whether autograd has anything to do with a call over these tensors. If not, an ``autograd.Function`` would cost 3 µs for nothing."""
    if torch.is_grad_enabled():
        for x in tensors:
            if x.requires_grad:
                return True
    return False


def _run_launcher(name: str, args: tuple) -> Any:
    """Run an operator by its Triton launcher; resolve negative views, as the dispatcher does for the other backends."""
    try:
        return kernels.launcher(name)(*args)
    except kernels.NegativeView:
        return kernels.launcher(name)(*[_without_negative_views(arg) for arg in args])


def _without_negative_views(arg: Any) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_without_negative_views(x) for x in arg]
    return arg.resolve_neg() if isinstance(arg, Tensor) else arg


class _Once(torch.autograd.Function):
    """``apply(operator, args, *tensors)``: a backward operator run by its launcher, in a graph that cannot be differentiated.

    ``tensors`` are those among the arguments: autograd looks for them no deeper.
    """

    @staticmethod
    def forward(ctx: Any, operator: str, args: tuple, *tensors: Tensor) -> Any:
        ctx.operator = operator
        out = _run_launcher(operator, args)
        return out if isinstance(out, Tensor) else tuple(out)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        _refuse(_PUBLIC[ctx.operator])


# Whether a mode of PyTorch's, such as FlopCounterMode, looks at what the dispatcher is asked for.
_watched: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 0)


def launch(operator: Any, *args: Any) -> Any:
    """As ``call``, by Triton: straight to the launcher, past the dispatcher and its host cost."""
    if _watched() and not kernels.interpreting():
        return call(operator, *args)
    name = operator._opname
    if not torch.is_grad_enabled():
        return _run_launcher(name, args)
    flat = _flat(args)
    if not any(isinstance(x, Tensor) and x.requires_grad for x in flat):
        return _run_launcher(name, args)
    return _Once.apply(name, args, *[x for x in flat if isinstance(x, Tensor)])


def caller(example: Tensor) -> Callable[..., Any]:
    """How to run operators over such tensors, inside a call that ``backends.choose`` has not given to the reference."""
    if example.is_cuda or (kernels.interpreting() and backends.current() == "triton"):
        return launch
    return call


def call_unrecorded(backend: str, example: Tensor, operator: Callable[..., Any], *args: Any) -> Any:
    """Run an operator over such tensors where nothing is :func:`recorded`."""
    if backend == "cuda":
        return _call_kernel(twin(operator), *args)
    return (launch if caller(example) is launch else _call_kernel)(operator, *args)


def by_reference(formula: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor) -> list[Tensor | None]:
    """The gradients of ``formula(*inputs)``, plain PyTorch, in its result's dtype; None where ``needs`` says so.

    For a ``grad`` that stands for several (``backends.batched``): PyTorch's operators know of that, kernels do not.
    """
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        wide = [x.to(accumulator(inputs)) for x in inputs]
        wanted = [x for x, need in zip(wide, needs, strict=True) if need]
        found = iter(torch.autograd.grad(formula(*wide), wanted, grad, create_graph=again))
    return [next(found) if need else None for need in needs]


def one_for_all(run: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """``run`` for the backward operator of a loss and such a ``grad``: once, since its results are linear in it."""

    def scaled(operator: Any, grad: Tensor, features: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        one = torch.ones((), dtype=grad.dtype, device=grad.device)
        return [dx * grad for dx in run(operator, one, [x.to(accumulator([x])) for x in features], *rest)]

    return scaled


def accumulator(tensors: Sequence[Tensor]) -> torch.dtype:
    """The dtype in which a call over these tensors accumulates and answers."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def smaller(a: Sequence[int], b: Sequence[int]) -> list[int | torch.SymInt]:
    return [torch.sym_min(i, j) for i, j in zip(a, b, strict=True)]


def one_device(tensors: Sequence[Tensor]) -> None:
    """Refuse, in a fake, what the kernels refuse: a mix with ``meta`` tensors would otherwise pass for a traced call."""
    if len({x.device for x in tensors}) > 1:
        raise RuntimeError("tensors of one call lie on different devices")
