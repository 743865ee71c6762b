"""AdamW with float32 masters, clipping and gradient accumulation in one step.

Decoupled weight decay as in Loshchilov and Hutter, arXiv 1711.05101. What differs from ``torch.optim.AdamW``:
parameters may be bfloat16 while their master weights, moments and summed gradients stay float32; the global
norm is clipped inside the step; a step whose norm is not finite leaves everything as it was, without a host
synchronisation on CUDA; and the state goes in and out as flat, named tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

__all__ = ["AdamW", "is_decayed"]


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to the addresses of the long-term slots."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "address"


@dataclass
class _Slot:
    """One parameter and all that the optimizer keeps for it; ``total`` is the gradient summed so far."""

    name: str
    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    step: Tensor
    decayed: bool
    total: Tensor | None = None
    buffer: Tensor | None = None

    def add_gradient(self) -> None:
        """Move ``parameter.grad`` into ``total``, widened to the type of the master."""
        gradient = self.parameter.grad
        if gradient is None:
            return
        self.parameter.grad = None
        if self.total is not None:
            self.total.add_(gradient)
        elif gradient.dtype == self.master.dtype:
            self.total = gradient
        else:
            if self.buffer is None:
                self.buffer = torch.empty_like(self.master)
            self.total = self.buffer.copy_(gradient)


class AdamW:
    """AdamW over named parameters, on any device.

    A parameter that got no gradient since the last step is not touched: no decay, no change of its moments,
    and its own step count (which sets its bias correction) stands still.

    Args:
        named_parameters: as from ``model.named_parameters()``; float32 parameters are their own masters.
        betas, eps, weight_decay: of AdamW.
        decayed: says by name and parameter whether weight decay applies.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> optimizer = AdamW(layer.named_parameters())
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> round(optimizer.step(lr=0.1, max_norm=1.0).item(), 4)
        1.7321
    """

    def __init__(
        self,
        named_parameters: Iterable[tuple[str, nn.Parameter]],
        *,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        decayed: Callable[[str, Tensor], bool] = is_decayed,
    ) -> None:
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self._slots: list[_Slot] = []
        for name, parameter in named_parameters:
            data = parameter.detach()
            master = data.float() if data.dtype in (torch.bfloat16, torch.float16) else data
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            moments = torch.zeros_like(master), torch.zeros_like(master)
            self._slots.append(_Slot(name, parameter, master, *moments, step, decayed(name, parameter)))
        if not self._slots:
            raise ValueError("there are no parameters to optimize")

    def accumulate(self) -> None:
        """Add every ``.grad`` to the float32 sum for the next step and clear it; call after each micro-batch."""
        for slot in self._slots:
            slot.add_gradient()

    def zero_grad(self) -> None:
        """Forget the gradients, those already accumulated included."""
        for slot in self._slots:
            slot.parameter.grad = slot.total = None

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> Tensor:
        """Clip, update and clear the gradients (the accumulated ones and what ``.grad`` still holds).

        Args:
            lr: learning rate of this step.
            max_norm: the gradient is scaled down to this global norm if it is larger; 0 never clips.

        Returns:
            The global norm before clipping, float32 of shape (), on the parameters' device. Where it is not
            finite nothing was updated.
        """
        self.accumulate()
        active = [slot for slot in self._slots if slot.total is not None]
        norm = _global_norm([slot.total for slot in active if slot.total is not None], self._slots[0].master.device)
        divisor = (norm / max_norm).clamp(min=1.0) if max_norm else torch.ones_like(norm)
        skip = 1.0 - norm.isfinite().float()
        for slots, decay in (
            ([slot for slot in active if slot.decayed], self.weight_decay),
            ([slot for slot in active if not slot.decayed], 0.0),
        ):
            if slots:
                self._update(slots, lr, decay, divisor, skip)
        for slot in active:
            if slot.parameter.dtype != slot.master.dtype:
                slot.parameter.copy_(slot.master)
            slot.total = None
        return norm

    def _update(self, slots: list[_Slot], lr: float, weight_decay: float, divisor: Tensor, skip: Tensor) -> None:
        """One AdamW update of ``slots`` with gradients divided by ``divisor``; none where ``skip`` is 1."""
        adamw(
            [slot.master for slot in slots],
            [slot.total for slot in slots if slot.total is not None],
            [slot.exp_avg for slot in slots],
            [slot.exp_avg_sq for slot in slots],
            [],
            [slot.step for slot in slots],
            fused=True,
            grad_scale=divisor,
            found_inf=skip,
            amsgrad=False,
            beta1=self.betas[0],
            beta2=self.betas[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=self.eps,
            maximize=False,
        )

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by name (``exp_avg.NAME``, ``exp_avg_sq.NAME``, ``step.NAME``), not copied."""
        state: dict[str, Tensor] = {}
        for slot in self._slots:
            state[f"exp_avg.{slot.name}"] = slot.exp_avg
            state[f"exp_avg_sq.{slot.name}"] = slot.exp_avg_sq
            state[f"step.{slot.name}"] = slot.step
        return state

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_tensors` gave; a ValueError if it is of other parameters."""
        _copy_all(self.state_tensors(), state, "optimizer state")

    def master_tensors(self) -> dict[str, Tensor]:
        """The weights in full precision by parameter name, not copied: what a checkpoint stores."""
        return {slot.name: slot.master for slot in self._slots}

    @torch.no_grad()
    def load_master_tensors(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`master_tensors` gave, and set the parameters from it."""
        _copy_all(self.master_tensors(), weights, "weights")
        for slot in self._slots:
            if slot.parameter.dtype != slot.master.dtype:
                slot.parameter.copy_(slot.master)


def _global_norm(gradients: list[Tensor], device: torch.device) -> Tensor:
    """Euclidean norm of all gradients together, float32 of shape (): the same bits for the same gradients.

    Tensors are taken in a fixed order and their squared norms added in float64.
    """
    if not gradients:
        return torch.zeros((), device=device)
    norms = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients])
    total: Tensor = torch.linalg.vector_norm(norms.double())
    return total.float()


@torch.no_grad()
def _copy_all(targets: Mapping[str, Tensor], sources: Mapping[str, Tensor], what: str) -> None:
    """Copy tensors by name; nothing is copied unless all names and shapes agree."""
    wrong = sorted(targets.keys() ^ sources.keys())
    wrong = wrong or [name for name in targets if targets[name].shape != sources[name].shape]
    if wrong:
        raise ValueError(f"the {what} does not fit the model: {', '.join(wrong[:5])}")
    for name, target in targets.items():
        target.copy_(sources[name])
