"""Training of LoRA adapters: thin matrices A and B in place of the model's matrices (Hu et al., arXiv 2106.09685).

The model runs as it always does, on W + s B A, which is put into its matrices after each step. The gradient at such a
matrix gives those of A and B, so neither the model nor its kernels know of adapters.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_rec.optim import check_shapes
from mm_rec.storage.adapter import LowRank
from mm_rec.storage.hf_folder import is_layer
from mm_rec.training.ddp import ReplicatedAdamW

__all__ = ["LoraAdamW"]


@dataclass
class _Matrix:
    """A matrix of the model, what it was before training in float32, and its adapter."""

    name: str
    parameter: nn.Parameter
    base: Tensor
    down: nn.Parameter
    up: nn.Parameter
    scale: float

    @torch.no_grad()
    def take_gradient(self) -> None:
        """Move ``parameter.grad`` on to A and B."""
        if self.parameter.grad is None:
            return
        gradient = self.parameter.grad.float()
        self.parameter.grad = None
        for parameter, product in (
            (self.down, self.up.t() @ gradient),
            (self.up, gradient @ self.down.t()),
        ):
            product *= self.scale
            parameter.grad = product if parameter.grad is None else parameter.grad.add_(product)

    def low_rank(self) -> LowRank:
        """Returns the change of the matrix."""
        return LowRank(self.down.detach(), self.up.detach(), self.scale)

    def adapted(self) -> Tensor:
        """Returns W + s B A in float32."""
        return self.base + self.low_rank().change()


class LoraAdamW(ReplicatedAdamW):
    """AdamW of adapters of all matrices in the blocks; the rest of the model stays as it is.

    With several processes, each holds the whole model. A starts as in PEFT and B at zero, so training starts from the
    model as it was.

    Args:
        named_parameters: as from ``model.named_parameters()``.
        rank: of the adapters, columns of B.
        alpha: s = alpha / rank.
        seed: of the initial A.
        betas, weight_decay: as for :class:`AdamW`.
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        rank: int,
        alpha: float,
        seed: int,
        betas: tuple[float, float],
        weight_decay: float,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._matrices: list[_Matrix] = []
        self._frozen: dict[str, tuple[nn.Parameter, Tensor]] = {}
        for name, parameter in named_parameters:
            base = parameter.detach().float()
            if not (name.startswith("experts.") and is_layer(name, parameter)):
                self._frozen[name] = (parameter, base)
                continue
            if base.data_ptr() == parameter.data_ptr():
                base = base.clone()
            down = nn.Parameter(torch.empty(rank, parameter.shape[1]))
            nn.init.kaiming_uniform_(down, a=math.sqrt(5), generator=generator)
            down.data = down.data.to(parameter.device)
            up = nn.Parameter(torch.zeros(parameter.shape[0], rank, device=parameter.device))
            matrix = _Matrix(name, parameter, base, down, up, alpha / rank)
            self._matrices.append(matrix)
            if parameter.device.type == "cpu":  # a whole gradient lives no longer than it takes to be moved on
                parameter.register_post_accumulate_grad_hook(lambda _, one=matrix: one.take_gradient())
        adapters = {f"{one.name}.{side}": getattr(one, side) for one in self._matrices for side in ("down", "up")}
        super().__init__(adapters.items(), betas=betas, weight_decay=weight_decay)

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` of the model needs a gradient."""
        return name not in self._frozen

    def accumulate(self) -> None:
        """Add the gradients of the adapters to the sums for the next step; call after each micro-batch."""
        for one in self._matrices:
            one.take_gradient()
        super().accumulate()

    def zero_grad(self) -> None:
        """Forget the gradients, those already accumulated included."""
        super().zero_grad()
        for one in self._matrices:
            one.parameter.grad = None

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> Tensor:
        """Update the adapters, as :meth:`AdamW.step` does, and the model's matrices with them."""
        norm = super().step(lr, max_norm)
        self._put()
        return norm

    @torch.no_grad()
    def _put(self) -> None:
        """Put the adapted matrices into the model."""
        for one in self._matrices:
            one.parameter.copy_(one.adapted())

    def adapter(self) -> dict[str, LowRank]:
        """Returns the adapters by the names of the matrices."""
        return {one.name: one.low_rank() for one in self._matrices}

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts of the adapters, the adapters and the matrices that they started from."""
        return super().state_tensors() | self._own_state()

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_tensors` gave; a ValueError if it is of other parameters."""
        own = self._own_state()
        missing = sorted(own.keys() - state.keys())
        if missing:
            raise ValueError(f"the optimizer state does not fit the model: {', '.join(missing[:5])}")
        super().load_state_tensors({name: tensor for name, tensor in state.items() if name not in own})
        for name, held in own.items():
            held.copy_(state[name])
        self._put()

    def _own_state(self) -> dict[str, Tensor]:
        adapters = {f"adapter.{slot.name}": slot.master for slot in self._slots}
        return adapters | {f"base.{one.name}": one.base for one in self._matrices}

    def master_tensors(self) -> dict[str, Tensor]:
        """The weights in full precision by parameter name, adapters merged: what a checkpoint stores."""
        merged = {one.name: one.adapted() for one in self._matrices}
        return {name: base for name, (_, base) in self._frozen.items()} | merged

    @torch.no_grad()
    def load_master_tensors(self, weights: Mapping[str, Tensor]) -> None:
        """Take ``weights`` as those that the adapters change."""
        known = {name: base.shape for name, (_, base) in self._frozen.items()}
        known |= {one.name: one.base.shape for one in self._matrices}
        check_shapes(known, weights, "weights")
        for name, (parameter, base) in self._frozen.items():
            base.copy_(weights[name])
            parameter.copy_(base)
        for one in self._matrices:
            one.base.copy_(weights[one.name])
        self._put()
