"""A GPU that is not there: tensors that say they are on `cuda:0` and compute on the processor.

Every operation between a tensor of the processor and one of this device fails, as it would on a machine that has one
(scalars, and indices into a tensor of the device, excepted). So code that leaves something behind is found out here,
and what it computes can be compared with what the processor computes, bit for bit.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

GPU = torch.device("cuda", 0)
aten = torch.ops.aten
CROSSINGS = {aten._to_copy.default, aten.copy_.default}  # what may read one side and write the other
INDEXED = {aten.index.Tensor, aten.index_put_.default}  # stock kernels take their indices from the processor too


ASKING = {Tensor.device.__get__, Tensor.to, Tensor.cpu}  # what has to know that the tensor is away
_inside: list[bool] = []  # not empty while a binding runs that would ask a real GPU's driver to set it


@contextmanager
def _unguarded() -> Iterator[None]:
    _inside.append(True)
    try:
        yield
    finally:
        _inside.pop()


class Away(Tensor):
    """A tensor that says it is on the GPU; `here` holds its numbers."""

    here: Tensor

    @staticmethod
    def __new__(cls, here: Tensor) -> "Away":
        with torch.inference_mode(False):  # a view of a plain tensor is one, wherever it is made
            return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
                cls,
                here.shape,
                strides=here.stride(),
                storage_offset=here.storage_offset(),
                dtype=here.dtype,
                dispatch_device=True,  # asked where it is, it answers below: kernels would look for a real GPU
                requires_grad=here.requires_grad,
            )

    def __init__(self, here: Tensor) -> None:
        self.here = here

    def __repr__(self, **_: Any) -> str:
        return f"Away({self.here!r})"

    @classmethod
    def __torch_function__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:  # its choice of kernel asks for a real GPU
            return _plain_attention(*args, **(kwargs or {}))
        if func is Tensor.tolist:
            return args[0].here.tolist()
        with nullcontext() if func in ASKING else _unguarded(), torch._C.DisableTorchFunctionSubclass():
            return func(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(cls, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


def _plain_attention(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **options: Any
) -> Tensor:
    """What `scaled_dot_product_attention` computes."""
    assert not dropout_p
    if options.get("enable_gqa"):
        key, value = (one.repeat_interleave(query.shape[1] // one.shape[1], dim=1) for one in (key, value))
    scale = options.get("scale") or query.shape[-1] ** -0.5
    logits = query @ key.transpose(-1, -2) * scale
    if options.get("is_causal"):
        attn_mask = torch.ones(logits.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
    return logits.softmax(dim=-1) @ value


def _computed(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    if func is torch.ops.prim.device.default:
        return torch.device("cpu") if _inside else GPU
    leaves = tree_flatten((args, kwargs))[0]
    asked = next((one for one in leaves if isinstance(one, torch.device) and not _inside), None)
    tensors = [one for one in leaves if isinstance(one, Tensor)]
    if func in INDEXED:
        tensors = [args[0], *args[2:3]]
    sides = {isinstance(one, Away) for one in tensors if one.dim() or isinstance(one, Away)}
    if len(sides) == 2 and func not in CROSSINGS:
        raise RuntimeError(f"{func}: tensors on two devices")
    to_gpu = asked.type == "cuda" if asked is not None else any(isinstance(one, Away) for one in tensors)
    here = tree_map(_here, (args, kwargs))
    done = func(*here[0], **here[1])
    written = [one.alias_info for one in func._schema.returns]
    if written and all(info is not None and info.is_write for info in written):  # in place, or into `out`
        return args[0] if func._schema.name.endswith("_") else kwargs["out"]
    return tree_map(lambda one: Away(one) if isinstance(one, Tensor) else one, done) if to_gpu else done


def _here(one: Any) -> Any:
    if isinstance(one, torch.device):
        return torch.device("cpu")
    return one.here if isinstance(one, Away) else one


class _Made(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _computed(func, args, kwargs or {})


class _Copied(TorchFunctionMode):
    """Constructors from numbers copy them without asking anyone: made here, then moved."""

    def __torch_function__(self, func: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        asked = torch.device((kwargs or {}).get("device") or "cpu")
        if func in (torch.tensor, torch.as_tensor, torch.asarray) and asked.type == "cuda":
            return func(*args, **{**kwargs, "device": "cpu"}).to(GPU)
        return func(*args, **(kwargs or {}))


@contextmanager
def pretended() -> Iterator[torch.device]:
    """Tensors can be made on, and moved to, a GPU that is not there."""
    start = torch.cuda._lazy_init
    torch.cuda._lazy_init = lambda: None  # type: ignore[assignment] # what torch calls before it makes a tensor there
    try:
        with _Made(), _Copied():
            yield GPU
    finally:
        torch.cuda._lazy_init = start
