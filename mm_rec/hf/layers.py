"""The matrices of the model as linear layers, where other tools look for them.

Adapters, quantizers and hooks of other libraries know :class:`torch.nn.Linear`; the blocks of :mod:`mm_rec.blocks` keep
bare parameters, which whole kernels read at once. :func:`use_linear_layers` puts each matrix into a linear layer of its
own, and a block then runs as it always does, on the matrix that its layer amounts to: the weight of a plain layer,
W + s B A of a layer with LoRA adapters.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mm_rec.blocks.fusion import Fusion
from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.model import MMRecModel
from mm_rec.state import BlockState
from mm_rec.storage.hf_folder import is_layer

__all__ = [
    "LayeredPart",
    "effective_matrix",
    "initialize_missing",
    "is_plain",
    "matrix_names",
    "use_linear_layers",
]


def is_plain(layer: nn.Module) -> bool:
    """Whether a layer is its weight and nothing else: neither replaced by another class nor hooked."""
    hooked = layer._forward_hooks or layer._forward_pre_hooks or "forward" in vars(layer)
    return type(layer) in (nn.Linear, nn.Embedding) and not hooked


class _LinearLayers(nn.Module):
    """Part of a model whose matrices are linear layers; mixed into the class of the part."""

    def make_layers(self) -> None:
        """Put each matrix into a linear layer under its name."""
        for name, parameter in list(self.named_parameters(recurse=False)):
            if is_layer(name, parameter):
                rows, columns = parameter.shape
                layer = nn.Linear(columns, rows, bias=False, device="meta")
                layer.weight = parameter
                delattr(self, name)
                self.add_module(name, layer)

    def with_matrices(self, dtype: torch.dtype | None = None) -> Any:
        """Returns this part as its own class wrote it, with tensors in place of layers, in ``dtype`` if given."""
        part = object.__new__(type(self))
        vars(part).update(vars(self))
        for name, layer in self.named_children():
            matrix = effective_matrix(layer)
            vars(part)[name] = matrix if dtype is None else matrix.to(dtype)
        return part


class MMRecLayeredBlock(_LinearLayers, MMRecBlock):
    """:class:`MMRecBlock` with linear layers."""

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights, as in :class:`MMRecBlock`."""
        MMRecBlock.reset_parameters(self.with_matrices(), generator)

    def forward(
        self, x: Tensor, n: Tensor, position: Tensor, reset: Tensor | None, state: BlockState
    ) -> tuple[Tensor, Tensor, BlockState]:
        """Run the block over T tokens, as in :class:`MMRecBlock`."""
        with torch.autocast(n.device.type, enabled=False):  # the activations have its type already
            return MMRecBlock.forward(self.with_matrices(n.dtype), x, n, position, reset, state)


class MMRecLayeredFusion(_LinearLayers, Fusion):
    """:class:`Fusion` with linear layers."""

    def reset_parameters(self) -> None:
        """Start as the plain average of the experts."""
        Fusion.reset_parameters(self.with_matrices())

    def forward(self, outputs: list[Tensor]) -> Tensor:
        """Fuse the experts' outputs, as in :class:`Fusion`."""
        with torch.autocast(outputs[0].device.type, enabled=False):
            return Fusion.forward(self.with_matrices(outputs[0].dtype), outputs)


LayeredPart = MMRecLayeredBlock | MMRecLayeredFusion


@torch.no_grad()
def initialize_missing(part: LayeredPart) -> None:
    """Initialise the weights of ``part`` that `transformers` has not marked as loaded."""
    loaded = [parameter for parameter in part.parameters() if getattr(parameter, "_is_hf_initialized", False)]
    if len(loaded) < len(list(part.parameters())):
        values = [parameter.clone() for parameter in loaded]
        part.reset_parameters()
        for parameter, value in zip(loaded, values, strict=True):
            parameter.copy_(value)


def use_linear_layers(model: MMRecModel) -> None:
    """Turn each matrix of ``model``, but for the embedding, into the weight of a linear layer of its name."""
    for module in list(model.modules()):
        for kind in (MMRecLayeredBlock, MMRecLayeredFusion):
            if type(module) is kind.__bases__[1]:
                module.__class__ = kind
                assert isinstance(module, _LinearLayers)
                module.make_layers()


def matrix_names(model: MMRecModel) -> list[str]:
    """Returns the last parts of the names of all matrices that :func:`use_linear_layers` makes layers of."""
    names = {
        name
        for module in model.modules()
        if isinstance(module, MMRecBlock | Fusion)
        for name, parameter in module.named_parameters(recurse=False)
        if is_layer(name, parameter)
    }
    return sorted(names)


def effective_matrix(layer: nn.Module) -> Tensor:
    """Returns the matrix (out, in) that ``layer`` multiplies by, whatever adapters or hooks are around it.

    A dropout of an adapter leaves out the same inputs for all tokens of a pass.

    Raises:
        ValueError: if the layer also adds a bias, for which a block has no place.
    """
    if is_plain(layer):
        return layer.weight  # type: ignore[return-value]
    matrix = _with_lora(layer)
    return _applied_to_identity(layer) if matrix is None else matrix


def _with_lora(layer: Any) -> Tensor | None:
    """Returns W + s B A of a layer with LoRA adapters as PEFT makes it; None for other layers and other variants."""
    base = getattr(layer, "base_layer", None)
    if base is None or not hasattr(layer, "lora_A") or not is_plain(base):
        return None
    if layer._forward_hooks or layer._forward_pre_hooks:
        return None
    weight: Tensor = base.weight
    if layer.disable_adapters or layer.merged:
        return weight
    for name in layer.active_adapters:
        if name not in layer.lora_A:
            continue
        if name in getattr(layer, "lora_variant", ()) or layer.lora_B[name].bias is not None:
            return None
        left, right = layer.lora_B[name].weight, layer.lora_A[name].weight
        right = right * layer.lora_dropout[name](torch.ones_like(right[0]))
        weight = weight + layer.scaling[name] * (left @ right)
    return weight


def _applied_to_identity(layer: nn.Module) -> Tensor:
    """Returns the matrix of any layer that is linear, by what it makes of the unit vectors."""
    biased = [name for name, parameter in layer.named_parameters() if name.endswith("bias") and parameter.ndim == 1]
    if biased:
        raise ValueError(f"MM-Rec's layers have no bias, and an adapter adds {biased[0]}; leave its bias out")
    first = next(layer.parameters())
    dtype = first.dtype if first.is_floating_point() else torch.get_default_dtype()
    units = torch.eye(layer.in_features, dtype=dtype, device=first.device)  # type: ignore[call-overload]
    product: Tensor = layer(units)
    return product.t().contiguous()
