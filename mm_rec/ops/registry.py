"""Registration of the ops with PyTorch, under the name space ``mm_rec``.

``define`` gives an op its schema, the one place that lists its parameters, its fake (meta) implementation and, for
each device type, a kernel that is looked up in the native back end at the first call. ``differentiable`` adds the
autograd formula: a ``torch.autograd.Function`` under the Autograd key, which costs half of what ``register_autograd``
does per call.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from mm_rec.ops import backend

__all__ = ["below_autograd", "define", "differentiable"]

LIBRARY: Any = torch.library.Library("mm_rec", "DEF")
_DISPATCH_KEYS = {"cpu": "CPU", "cuda": "CUDA"}

below_autograd = torch._C._AutoDispatchBelowAutograd


def _lazy(op: str, device_type: str) -> Callable[..., Any]:
    found: Callable[..., Any] | None = None

    def call(*args: Any) -> Any:
        nonlocal found
        if found is None:
            found = backend.kernel(op, device_type)
        return found(*args)

    return call


def _fake(op: Any, like: Callable[[Any], Any]) -> Callable[..., Any]:
    names = [argument.name for argument in op._schema.arguments]

    def call(*args: Any) -> Any:
        results = like(SimpleNamespace(**dict(zip(names, args, strict=True))))
        if isinstance(results, Tensor):
            return results.new_empty(results.shape)
        return tuple(x.new_empty(x.shape) for x in results)

    return call


def define(schema: str, like: Callable[[Any], Any], *, fused: bool = False) -> Any:
    """Define ``mm_rec::<schema>`` and return its overload, callable with positional arguments.

    Schemas have no default values: PyTorch leaves arguments that equal a default out of a kernel's call.

    Args:
        schema: name, parameters and results, in PyTorch's notation.
        like: given an object that has the arguments as attributes, under the names of the schema, returns a tensor
            for each result, which is contiguous and of its shape, type and device. Used for fake tensors only.
        fused: whether the op stands for several others. ``status()`` does not report it where a back end lacks it.
    """
    name = schema[: schema.index("(")]
    if not fused:
        backend.expect(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type, key in _DISPATCH_KEYS.items():
        LIBRARY.impl(name, _lazy(name, device_type), key)
    op = getattr(torch.ops.mm_rec, name).default
    torch.library.register_fake(f"mm_rec::{name}", _fake(op, like), lib=LIBRARY)
    return op


def differentiable(op: Any, function: type[torch.autograd.Function]) -> None:
    """Give ``op`` the gradient of ``function``, whose forward calls ``op`` inside ``below_autograd()``."""
    LIBRARY.impl(op._opname, function.apply, "Autograd")
