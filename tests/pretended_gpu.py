"""
A pretended GPU, for tests on machines without one.

A `PretendedTensor` holds its values on the CPU and says that it is on `cuda:0`. Within `pretended_gpu()`

- an operation on tensors of different devices raises, as it does on a GPU;
- `count_syncs()` counts what makes the CPU wait for the GPU, with the line of code that does it;
- `torch.autocast("cuda", ...)` casts by CUDA's lists of operations;
- `record_attention()` records what attention is called with;
- `torch.compile` runs eagerly.

    with pretended_gpu():
        model = to_gpu(model)
        with count_syncs() as syncs:
            model(input_ids=to_gpu(ids)).loss.backward()
    assert not syncs

Results are those of the CPU's kernels. Kernels that exist on a GPU only, streams and memory are not pretended, and
`torch.cuda.is_available()` stays False.
"""

import contextlib
import functools
import operator
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes


GPU = torch.device("cuda", 0)
ROOT = Path(__file__).parents[1]
# Frames of these files are not named as the place of a sync, unless there is no other.
MACHINERY = (str(Path(torch.__file__).parent), __file__, contextlib.__file__)

aten = torch.ops.aten

# Operations whose result has a size or a value that the CPU needs to know.
SYNCS = {
    aten._local_scalar_dense: "item",
    aten.nonzero: "nonzero",
    aten.masked_select: "masked_select",
    aten.equal: "equal",
    aten._unique: "unique",
    aten._unique2: "unique",
    aten.unique_dim: "unique",
    aten.unique_consecutive: "unique",
    aten.bincount: "bincount",
}
INDEXING = (aten.index, aten.index_put, aten.index_put_, aten._unsafe_index, aten._index_put_impl_)

# ATen/autocast_mode.h: operations that run in autocast's dtype, and those that run in float32.
HALF = {
    *("addmm", "addmv", "addr", "matmul", "rmatmul", "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm"),
    *("linalg_vecdot", "multi_dot", "scaled_dot_product_attention"),
}
FLOAT32 = {
    *("acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt"),
    *("sinh", "tan", "pow", "rpow", "softplus", "layer_norm", "rms_norm", "group_norm", "cosine_similarity"),
    *("nll_loss", "kl_div", "l1_loss", "smooth_l1_loss", "huber_loss", "mse_loss", "cross_entropy", "dist", "cdist"),
    *("binary_cross_entropy_with_logits", "logsumexp", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum"),
    *("vector_norm", "matrix_norm", "norm"),
}


@dataclass(frozen=True)
class AttentionCall:
    """One call of `F.scaled_dot_product_attention`: what its caller passed, before autocast."""

    query: torch.dtype
    key: torch.dtype
    value: torch.dtype
    shape: torch.Size
    has_mask: bool
    is_causal: bool
    dropout: float


class PretendedTensor(torch.Tensor):
    """A tensor that says it is on `cuda:0`. Its values are in the CPU tensor `values`."""

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, values: torch.Tensor):
        with torch._C._DisableTorchDispatch(), _disable_current_modes():
            # Autograd would ask a driver about a CUDA tensor, but not about a meta tensor.
            shell = torch.empty_strided(values.shape, values.stride(), dtype=values.dtype, device="meta")
            tensor = torch.Tensor._make_subclass(cls, shell)
        tensor.values = values
        return tensor

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    device = property(lambda self: GPU)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = is_meta = property(lambda self: False)  # type: ignore[assignment]

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.values = new.values

    def tolist(self):
        count("tolist")
        return self.values.tolist()

    def numpy(self, **kwargs):
        raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")

    __array__ = numpy

    def __deepcopy__(self, memo):
        copy = PretendedTensor(self.values.detach().clone())
        copy.requires_grad_(self.requires_grad)
        memo[id(self)] = nn.Parameter(copy, self.requires_grad) if isinstance(self, nn.Parameter) else copy
        return memo[id(self)]

    def __reduce_ex__(self, protocol):
        return PretendedTensor, (self.values.detach(),)

    def __repr__(self):
        return f"PretendedTensor({self.values!r}, device='cuda:0')"


_counters: list[Counter] = []
_recorders: list[list[AttentionCall]] = []


def count(kind: str) -> None:
    for counter in _counters:
        counter[kind, place()] += 1


def place() -> str:
    """Return the innermost line of this repository that is being run, else of any package but torch's."""
    frame, elsewhere = sys._getframe(), None
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(MACHINERY):
            path = Path(file)
            if path.is_relative_to(ROOT):
                return f"{path.relative_to(ROOT)}:{frame.f_lineno}"
            elsewhere = elsewhere or f"{path.parent.name}/{path.name}:{frame.f_lineno}"
        frame = frame.f_back
    return elsewhere or "unknown"


def is_on_gpu(tensor: Any) -> bool:
    return isinstance(tensor, PretendedTensor)


def is_gpu(device: Any) -> bool:
    # C++ code that asks a pretended tensor for its device hears "meta".
    return torch.device(device).type in ("cuda", "meta")


def run(func, args, kwargs):
    """Run one ATen operation on the CPU's values; wrap its results if they would be on the GPU."""
    operation = func.overloadpacket
    if func is torch.ops.prim.device.default:
        return GPU
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | kwargs
    tensors = [leaf for leaf in pytree.tree_leaves(given) if isinstance(leaf, torch.Tensor)]
    on_gpu = any(map(is_on_gpu, tensors))
    returns_gpu = on_gpu if kwargs.get("device") is None else is_gpu(kwargs["device"])
    if operation is aten._to_copy:
        count_copy(given["self"], on_gpu, returns_gpu, kwargs.get("non_blocking", False))
    elif operation is aten.copy_:
        returns_gpu = is_on_gpu(given["self"])
        count_copy(given["src"], is_on_gpu(given["src"]), returns_gpu, given.get("non_blocking", False))
    elif on_gpu:
        check_devices(func, given, tensors)
        count_sync(func, given)

    if kwargs.get("device") is not None:
        kwargs = {**kwargs, "device": "cpu"}
    kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
    values = pytree.tree_map_only(PretendedTensor, operator.attrgetter("values"), (args, kwargs))
    result = func(*values[0], **values[1])

    written = [argument.name for argument in func._schema.arguments if is_written(argument)]
    for name in written:
        for tensor in filter(is_on_gpu, pytree.tree_leaves(given.get(name))):
            if tensor.shape != tensor.values.shape:
                raise NotImplementedError(f"{func} changes the shape of a pretended tensor in place.")
    if written and all(map(is_written, func._schema.returns)):
        # An operation in place returns its arguments.
        returned = [given[name] for name in written[: len(func._schema.returns)]]
        return None if not returned else returned[0] if len(returned) == 1 else tuple(returned)
    return pytree.tree_map_only(torch.Tensor, PretendedTensor, result) if returns_gpu else result


def is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def check_devices(func, given, tensors) -> None:
    """Refuse tensors on both devices, except scalars on the CPU, and indices there, which are copied."""
    written = [given[argument.name] for argument in func._schema.arguments if is_written(argument)]
    written = [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, torch.Tensor)]
    is_fused = func.overloadpacket.__name__.startswith("_fused_")
    if func.overloadpacket in INDEXING:
        tensors = [given["self"]] + ([given["values"]] if "values" in given else [])
    on_cpu = [tensor for tensor in tensors if not is_on_gpu(tensor) and (tensor.ndim > 0 or is_fused)]
    on_cpu += [tensor for tensor in written if not is_on_gpu(tensor)]
    if on_cpu:
        devices = ", ".join(f"{tuple(tensor.shape)} on {tensor.device}" for tensor in tensors)
        raise RuntimeError(f"Expected all tensors to be on the same device, but {func} got {devices}.")


def count_sync(func, given) -> None:
    operation = func.overloadpacket
    if operation in SYNCS:
        count(SYNCS[operation])
    elif operation is aten.repeat_interleave and given.get("output_size") is None:
        count("repeat_interleave")
    elif operation in INDEXING:
        # `x[mask] = number` becomes masked_fill.
        is_fill = "values" in given and given["values"].numel() == 1 and not given.get("accumulate")
        for index in given["indices"]:
            if index is not None and not is_on_gpu(index):
                count("index from the CPU")
            elif index is not None and index.dtype in (torch.bool, torch.uint8) and not is_fill:
                count("boolean index")


def count_copy(source: torch.Tensor, from_gpu: bool, to_gpu: bool, non_blocking: bool = False) -> None:
    if from_gpu != to_gpu and not non_blocking and source.numel() > 0:
        count("blocking copy to the GPU" if to_gpu else "blocking copy to the CPU")


class _Dispatch(TorchDispatchMode):
    """Runs operations on CPU tensors too, which may create or receive pretended ones."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


class _Functions(TorchFunctionMode):
    """Replaces functions that ask C++ for the device or move data, and casts as CUDA's autocast does."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func in (torch.tensor, torch.as_tensor):
            device = kwargs.get("device")
            if device is not None and is_gpu(device) and not is_on_gpu(args[0]):
                return copied_to_gpu(func(*args, **{**kwargs, "device": "cpu"}))
        elif func is torch.Tensor.new_tensor and is_on_gpu(args[0]):
            return copied_to_gpu(args[0].values.new_tensor(*args[1:], **kwargs))
        elif func is torch.Tensor.pin_memory:
            return args[0]
        elif func in (torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.cpu):
            return move(func, *args, **kwargs)
        elif func in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and is_on_gpu(args[0]):
            args = (args[0], index_on_gpu(args[1]), *args[2:])
        name = getattr(func, "__name__", "").strip("_")
        if name == "scaled_dot_product_attention":
            record(*args, **kwargs)
        if torch.is_autocast_enabled("cuda") and (name in HALF or (name in FLOAT32 and kwargs.get("dtype") is None)):
            dtype = torch.get_autocast_dtype("cuda") if name in HALF else torch.float32
            args, kwargs = pytree.tree_map_only(PretendedTensor, functools.partial(cast, dtype=dtype), (args, kwargs))
        return func(*args, **kwargs)


def copied_to_gpu(values: torch.Tensor) -> PretendedTensor:
    count_copy(values, False, True)
    return PretendedTensor(values)


def cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def move(func, tensor: torch.Tensor, *args, **kwargs) -> torch.Tensor:
    """Do what `Tensor.to`, `cuda` and `cpu` do."""
    copy = kwargs.pop("copy", False)
    if func is torch.Tensor.to:
        other = args[0] if args else kwargs.get("other")
        if isinstance(other, torch.Tensor):
            device, dtype, non_blocking = other.device, other.dtype, kwargs.get("non_blocking", False)
        else:
            device, dtype, non_blocking, _ = torch._C._nn._parse_to(*args, **kwargs)
    else:
        device, dtype, non_blocking = func.__name__, None, kwargs.get("non_blocking", False)
    # The tensor may be vmap's, around a pretended one.
    on_gpu = is_gpu(tensor.device)
    to_gpu = on_gpu if device is None else is_gpu(device)
    dtype = dtype or tensor.dtype
    if to_gpu == on_gpu:
        return torch.Tensor.to(tensor, dtype, copy=copy)
    if tensor.requires_grad and torch.is_grad_enabled():
        raise NotImplementedError("A pretended copy between devices has no gradient. Use to_gpu() or detach().")
    count_copy(tensor, on_gpu, to_gpu, non_blocking)
    if to_gpu:
        return PretendedTensor(tensor.detach().to(dtype, copy=True))
    return tensor.values.detach().to(dtype, copy=True)


def index_on_gpu(index):
    """Copy an index's lists to the GPU, as PyTorch does."""
    if isinstance(index, tuple):
        return tuple(map(index_on_gpu, index))
    if isinstance(index, list):
        count("index from the CPU")
        return PretendedTensor(torch.tensor(index))
    return index


def record(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, **kwargs) -> None:
    for calls in _recorders:
        call = AttentionCall(
            query.dtype, key.dtype, value.dtype, query.shape, attn_mask is not None, is_causal, dropout_p
        )
        calls.append(call)


@contextlib.contextmanager
def pretended_gpu() -> Iterator[None]:
    """Pretend that there is a GPU within a `with` block: `device="cuda"` makes pretended tensors."""
    with (
        mock.patch("torch.cuda._lazy_init", lambda: None),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", lambda: False),
        mock.patch("torch.cuda.is_bf16_supported", lambda *args, **kwargs: True),
        torch.compiler.set_stance("force_eager"),
        _Dispatch(),
        _Functions(),
    ):
        yield


def to_gpu(moved: Any) -> Any:
    """
    Move to the pretended GPU, without counting a sync.

    Args:
        moved: a module, which is changed in place and keeps its tied weights; or a tensor, or tensors in lists,
            tuples and dictionaries, which are copied.
    """
    if not isinstance(moved, nn.Module):
        return pytree.tree_map_only(torch.Tensor, lambda x: PretendedTensor(x.detach().clone()), moved)
    on_gpu: dict[int, torch.Tensor] = {}
    for module in moved.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None or is_on_gpu(tensor):
                    continue
                if id(tensor) not in on_gpu:
                    new = PretendedTensor(tensor.detach())
                    is_parameter = isinstance(tensor, nn.Parameter)
                    on_gpu[id(tensor)] = nn.Parameter(new, tensor.requires_grad) if is_parameter else new
                tensors[name] = on_gpu[id(tensor)]
    return moved


def to_cpu(moved: Any) -> Any:
    """Return the values of tensors, in lists, tuples and dictionaries, without counting a sync."""
    return pytree.tree_map_only(PretendedTensor, lambda tensor: tensor.values.detach(), moved)


@contextlib.contextmanager
def count_syncs() -> Iterator[Counter]:
    """Count within a `with` block how often the CPU waits for the GPU, by (kind, "file:line")."""
    counter: Counter = Counter()
    _counters.append(counter)
    try:
        yield counter
    finally:
        _counters.remove(counter)


@contextlib.contextmanager
def record_attention() -> Iterator[list[AttentionCall]]:
    """Record within a `with` block each call of `F.scaled_dot_product_attention`."""
    calls: list[AttentionCall] = []
    _recorders.append(calls)
    try:
        yield calls
    finally:
        _recorders.remove(calls)
