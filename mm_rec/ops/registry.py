"""Registration of the ops with PyTorch, under the name space ``mm_rec``.

``define`` gives an op its schema, its fake (meta) implementation and, for each device type, a kernel that is
looked up in the native back end at the first call. ``differentiable`` adds the autograd formula: a
``torch.autograd.Function`` under the Autograd key, which costs half of what ``register_autograd`` does per call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from mm_rec.ops import backend

__all__ = ["NATIVE_OPS", "below_autograd", "define", "differentiable"]

LIBRARY: Any = torch.library.Library("mm_rec", "DEF")
NATIVE_OPS: list[str] = []  # every op that a native back end should serve
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


def define(schema: str, fake: Callable[..., Any], *, fused: bool = False) -> Any:
    """Define ``mm_rec::<schema>`` and return its overload, callable with positional arguments.

    Schemas have no default values: PyTorch leaves arguments that equal a default out of a kernel's call. A ``fused``
    op stands for several others, which run where a back end lacks it.
    """
    name = schema[: schema.index("(")]
    if not fused:
        NATIVE_OPS.append(name)
    LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    for device_type, key in _DISPATCH_KEYS.items():
        LIBRARY.impl(name, _lazy(name, device_type), key)
    torch.library.register_fake(f"mm_rec::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.mm_rec, name).default


def differentiable(op: Any, function: type[torch.autograd.Function]) -> None:
    """Give ``op`` the gradient of ``function``, whose forward calls ``op`` inside ``below_autograd()``."""
    LIBRARY.impl(op._opname, function.apply, "Autograd")
