"""The private names of PyTorch that fastkd uses because no public one exists. Of Triton it uses none.

Floor 0 of docs/architecture.md. Importing fastkd with a PyTorch that lacks a required name raises ImportError
in one sentence: going on without it could make a derivative silently wrong.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.utils._python_dispatch
import torch.utils._pytree
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx.experimental import proxy_tensor
from torch.nn.modules import module as _modules

F = TypeVar("F", bound=Callable[..., Any])


def find(owner: Any, path: str) -> Any:
    """``owner.path``, or ImportError that names it."""
    value = owner
    for name in path.split("."):
        if not hasattr(value, name):
            owned_by = getattr(owner, "__name__", type(owner).__name__)
            raise ImportError(
                f"fastkd needs {owned_by}.{path}, which PyTorch {torch.__version__} does not have: "
                "install a PyTorch from 2.11 to 2.15, or a newer fastkd"
            )
        value = getattr(value, name)
    return value


# A context in which the dispatcher skips autograd's rules. They take time even where they have nothing to
# record.
BelowAutograd = find(torch, "_C._AutoDispatchBelowAutograd")
# Whether a transform of torch.func (grad, vmap, jvp, functionalize, ...) is active.
in_torch_func: Callable[[], bool] = find(torch, "_C._are_functorch_transforms_active")
# Batched gradients of torch.autograd use an older vmap, which is recognized by the type of its tensors alone.
_in_older_vmap: Callable[[Tensor], bool] = find(torch, "_C._functorch.is_legacy_batchedtensor")
_top_hooks: Callable[[bool], Any] = find(torch, "_C._autograd._top_saved_tensors_default_hooks")
_keep_graph: Callable[[], bool] = getattr(
    torch._C._autograd, "_get_current_graph_task_keep_graph", lambda: True
)
_dispatch_modes: Callable[[], int] = find(torch, "_C._len_torch_dispatch_stack")
# Objects stored for a thread. Autograd copies them to the threads that run backward passes started in it.
_stash: Callable[[str, Any], None] = find(torch, "_C._stash_obj_in_tls")
_stashed: Callable[[str], Any] = find(torch, "_C._get_obj_in_tls")
_is_stashed: Callable[[str], bool] = find(torch, "_C._is_key_in_tls")
_drop: Callable[[str], None] | None = getattr(torch._C, "_remove_obj_from_tls", None)
# Hooks of all modules, registered by torch.nn.modules.module.register_module_forward_hook and so on.
_GLOBAL_HOOKS = [
    find(_modules, f"_global_{kind}_hooks") for kind in ("forward", "forward_pre", "backward", "backward_pre")
]
_get_proxy_mode: Callable[[], Any] = find(proxy_tensor, "get_proxy_mode")
# Applies a function to each tensor of nested tuples, named tuples included.
map_tensors: Callable[..., Any] = find(torch.utils, "_pytree.tree_map")
# The base class of modes that see each operator that the dispatcher runs.
if TYPE_CHECKING:
    from torch.utils._python_dispatch import TorchDispatchMode as TorchDispatchMode
else:
    TorchDispatchMode = find(torch.utils, "_python_dispatch.TorchDispatchMode")
# An assertion that torch.fx writes into its graphs.
assert_in_graph: Callable[[Any, str], None] = find(torch, "_assert")
# Gives a named tuple the name under which torch.export.save writes it.
_register_named_tuple: Callable[..., None] = find(torch.utils, "_pytree._register_namedtuple")
for _name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_apply"):
    find(nn.Module(), _name)
find(torch.autograd.Function, "_backward_cls.apply")
find(forward_ad, "_current_level")  # read by each call


def few_frames(function: type[torch.autograd.Function]) -> type[torch.autograd.Function]:
    """Decorates an ``autograd.Function`` that never runs inside torch.func, to save time on the host.

    Its ``apply`` and its backward pass skip the Python functions that PyTorch puts around them. Those handle
    torch.func, unwrap tensors of transforms that have ended, and support other ways to write a Function.
    """
    function.apply = super(torch.autograd.Function, function).apply  # type: ignore[misc]
    function._backward_cls.apply = function.backward  # type: ignore[attr-defined]
    return function


def transforming() -> bool:
    """Whether torch.func or forward-mode AD is active. Neither can differentiate a compiled operator.

    False while a graph is traced: the query would become a node of the graph, which PyTorch would not cache.
    """
    return not torch.compiler.is_compiling() and eagerly_transforming()


def eagerly_transforming() -> bool:
    """As :func:`transforming`, to be called only while no graph is traced."""
    return in_torch_func() or forward_ad._current_level >= 0


def is_wrapper(x: object) -> bool:
    """Whether a tensor wraps others, as a DTensor does: such classes support PyTorch's own operators only."""
    return type(x) is not Tensor and hasattr(type(x), "__tensor_flatten__")


def has_tangent(tensors: Iterable[Tensor]) -> bool:
    """Whether any of ``tensors`` carries a tangent of forward-mode AD."""
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(x).tangent is not None for x in tensors)


def batched(grad: Tensor | None, other: Tensor | None = None) -> bool:
    """Whether the gradients given to a backward pass may be batches, as with ``is_grads_batched=True``."""
    return (
        in_torch_func()
        or (grad is not None and _in_older_vmap(grad))
        or (other is not None and _in_older_vmap(other))
    )


def handed_over(key: str) -> tuple[Any, ...]:
    """The values last given to :func:`hand_over` under ``key``, by this thread or, during a backward pass, by
    the thread that started it; () if there are none.
    """
    found: tuple[Any, ...] = _stashed(key) if _is_stashed(key) else ()
    return found


def hand_over(key: str, values: tuple[Any, ...]) -> None:
    """Stores ``values`` under ``key`` for this thread and for the backward passes that it starts from now on,
    whichever threads autograd runs those in. Before PyTorch 2.13 it works in the main thread only.
    """
    if _drop is None:
        # This PyTorch takes no reference of its own, but drops one when the thread ends, for which it takes
        # the interpreter's lock. A thread that ends while the interpreter shuts down would abort the process,
        # so that only the main thread stores anything.
        if threading.get_ident() == threading.main_thread().ident:
            ctypes.pythonapi.Py_IncRef(ctypes.py_object(values))
            _stash(key, values)
    elif values:
        _stash(key, values)
    else:
        _drop(key)


def saved_tensors_hooked() -> bool:
    """Whether tensors saved now go through hooks, as in checkpointing (two forward passes) or offloading."""
    return _top_hooks(False) is not None


def keeps_graph() -> bool:
    """Whether the running backward pass keeps its graph for another one; True if that is not known."""
    return _keep_graph()


def dispatch_watched() -> bool:
    """Whether a dispatch mode, such as FlopCounterMode, sees the operators that are called."""
    return _dispatch_modes() > 0


def exporting() -> bool:
    """Whether a graph is traced for torch.export."""
    # the public function says True in every graph that PyTorch 2.11 traces
    flag: bool | None = getattr(torch.compiler, "_is_exporting_flag", None)
    return torch.compiler.is_exporting() if flag is None else flag


def recorded_elsewhere() -> bool:
    """Whether this call is recorded for a program that must run without fastkd or be rewritten:
    torch.jit.trace, ONNX, TensorBoard, make_fx, functionalize, torch.export. (torch.compile is not among
    them: its graphs hold the operators.)
    """
    if torch.compiler.is_compiling():
        return exporting()
    return bool(torch.jit.is_tracing()) or in_torch_func() or _get_proxy_mode() is not None  # type: ignore[attr-defined]


def has_hooks(module: nn.Module) -> bool:
    """Whether hooks of this module, or of all modules, see what goes in or comes out."""
    own = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return bool(own) or any(_GLOBAL_HOOKS)


def is_compiled(module: nn.Module) -> bool:
    """Whether calls of ``module`` run what torch.compile made of it."""
    return hasattr(module, "_orig_mod") or getattr(module, "_compiled_call_impl", None) is not None


def casts_are_kept() -> bool:
    """Whether inductor rounds where a graph casts to fewer bits and back."""
    from torch._inductor import config

    return bool(config.emulate_precision_casts)


def saveable(x: Any) -> Any:
    """``x`` with copies of the tensors that were made under ``torch.inference_mode``, in nested tuples too:
    autograd cannot save such tensors.
    """
    if torch.compiler.is_compiling() or torch.is_inference_mode_enabled():
        return x
    if isinstance(x, tuple):
        parts = [saveable(part) for part in x]
        return type(x)(*parts) if hasattr(x, "_fields") else tuple(parts)
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def version(x: Tensor) -> int | None:
    """The count of changes in place; None for a tensor of ``torch.inference_mode``, which has no count."""
    return None if x.is_inference() else x._version


def operator_call(operator: Any) -> Callable[..., Any]:
    """The function behind ``torch.ops.<namespace>.<name>.default``; calling it saves a Python frame."""
    call: Callable[..., Any] = getattr(operator, "_op", operator)
    return call


def constant_in_graphs(function: F) -> F:
    """Decorates a function whose result a graph holds as a constant, from when it was traced.

    ``torch.compiler.assume_constant_result`` does no more than this, and imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def register_named_tuple(kind: type, name: str) -> None:
    """``torch.export.save`` writes ``kind`` under ``name``; a program that loads it must import fastkd."""
    _register_named_tuple(kind, serialized_type_name=name)


def forward_hooks(module: nn.Module) -> list[Any]:
    """The hooks that see what goes into a module, then those that see what comes out."""
    return [*module._forward_pre_hooks.values(), *module._forward_hooks.values()]
