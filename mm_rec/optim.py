"""AdamW with float32 masters, clipping and gradient accumulation in one step, and Muon for the blocks' matrices.

Decoupled weight decay as in Loshchilov and Hutter, arXiv 1711.05101. What differs from ``torch.optim.AdamW``:
parameters may be bfloat16 while their master weights, moments and summed gradients stay float32; the global
norm is clipped inside the step; a step whose norm is not finite leaves everything as it was, without a host
synchronisation on CUDA; and the state goes in and out as flat, named tensors.

Each parameter has a rule. Where :class:`Muon` is given, the large matrices of the blocks take orthogonalised updates
(:func:`mm_rec.ops.muon_`), whose only state is the momentum, and everything else takes AdamW's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mm_rec import ops

__all__ = [
    "ELEMENTS_AT_ONCE",
    "MOMENTUM",
    "AdamW",
    "Muon",
    "ParameterSlot",
    "check_shapes",
    "is_decayed",
    "is_orthogonalized",
]

MOMENTUM = 0.95
"""Of Muon; 0.9 does as well, and 0.98 is worse by 0.01 bits per byte (measured: docs/LOG.md)."""

ELEMENTS_AT_ONCE = 2**25
"""Elements of the matrices that are orthogonalised in one go, which takes memory for each of them."""

ORTHOGONALIZED = frozenset({"in_proj", "decay_proj", "out_proj", "qkv_proj", "attention_out", "ffn_up", "ffn_down"})
"""Matrices of a block that take orthogonalised updates: all through which its width goes. The embedding, the fusion,
the gates of the memory (a few rows, each for itself) and what acts on float32 states do not."""


def is_orthogonalized(name: str) -> bool:
    """Whether the parameter ``name`` of a model takes orthogonalised updates where Muon is used.

    >>> is_orthogonalized("experts.text.blocks.0.ffn_up"), is_orthogonalized("embedding.weight")
    (True, False)
    """
    return name.startswith("experts.") and name.rpartition(".")[2] in ORTHOGONALIZED


@dataclass(frozen=True)
class Muon:
    """Orthogonalised updates for the matrices that :func:`is_orthogonalized` names.

    Attributes:
        rate_factor: their learning rate over AdamW's.
        momentum: of their gradients.
    """

    rate_factor: float
    momentum: float = MOMENTUM


def is_decayed(name: str, parameter: Tensor) -> bool:
    """Whether weight decay applies: to matrices, but not to the weights that mix the keys of the memory."""
    return parameter.ndim >= 2 and name.rpartition(".")[2] != "key_taps"


@dataclass
class ParameterSlot:
    """One parameter and all that the optimizer keeps for it; ``total`` is the gradient summed so far.

    A parameter that is ``orthogonalized`` has no second moment and no step count.
    """

    name: str
    parameter: nn.Parameter
    master: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor | None
    step: Tensor | None
    decayed: bool
    total: Tensor | None = None
    buffer: Tensor | None = None

    @property
    def orthogonalized(self) -> bool:
        """Whether the update is orthogonalised; AdamW's otherwise."""
        return self.exp_avg_sq is None

    @property
    def own(self) -> Tensor:
        """What this process holds of the parameter: all of it, unless it is sharded."""
        return _own(self.parameter.detach())

    @property
    def has_own_master(self) -> bool:
        """Whether the parameter is of lower precision than its master, and not the same tensor."""
        return self.parameter.dtype != self.master.dtype

    @property
    def gradient(self) -> Tensor:
        """The gradient of a parameter that has got one."""
        assert self.total is not None
        return self.total

    def add_gradient(self) -> None:
        """Move ``parameter.grad`` into ``total``: the first as it is, in float32 from the second on."""
        assert self.parameter.grad is not None
        gradient = _own(self.parameter.grad)
        self.parameter.grad = None
        if self.total is None:
            self.total = gradient.contiguous()
            return
        if self.total.dtype != torch.float32:
            self.total = self.wide_buffer().copy_(self.total)
        self.total.add_(gradient)

    def wide_buffer(self) -> Tensor:
        """Memory for the gradient in float32, made once."""
        if self.buffer is None:
            self.buffer = torch.empty_like(self.master)
        return self.buffer


class AdamW:
    """AdamW over named parameters, or Muon for some and AdamW for the others, on any device.

    A parameter that got no gradient since the last step is not touched: no decay, no change of its moments,
    and its own step count (which sets its bias correction) stands still.

    Args:
        named_parameters: as from ``model.named_parameters()``, float32 or bfloat16, on one device; float32
            parameters are their own masters.
        betas, eps, weight_decay: of AdamW.
        decayed: says by name and parameter whether weight decay applies.
        muon: how the matrices of the blocks are updated; None for as everything else.

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
        muon: Muon | None = None,
    ) -> None:
        self.betas, self.eps, self.weight_decay, self.muon = betas, eps, weight_decay, muon
        self._slots: list[ParameterSlot] = []
        self._norm: Tensor | None = None  # of the gradients as they are, and the updates that they make
        self._updates: ops.Updates | None = None
        for name, parameter in named_parameters:
            master = _own(parameter.detach()).float()  # the parameter itself if it is float32
            second = step = None
            if muon is None or not is_orthogonalized(name):
                second, step = torch.zeros_like(master), master.new_zeros(())
            slot = ParameterSlot(
                name, parameter, master, torch.zeros_like(master), second, step, decayed(name, parameter)
            )
            self._slots.append(slot)
        if not self._slots:
            raise ValueError("there are no parameters to optimize")

    def trains(self, name: str) -> bool:
        """Whether the parameter ``name`` of the model needs a gradient."""
        return True

    def accumulate(self) -> None:
        """Add every ``.grad`` to the float32 sum for the next step and clear it; call after each micro-batch."""
        learned = [slot for slot in self._slots if slot.parameter.grad is not None]
        if learned:
            self._norm = None
        for slot in learned:
            slot.add_gradient()

    def adapter(self) -> Mapping[str, tuple[Tensor, Tensor, float]]:
        """Returns A, B and s of the changes s B A that are trained, by parameter name; none where weights are."""
        return {}

    def zero_grad(self) -> None:
        """Forget the gradients, those already accumulated included."""
        self._norm = self._updates = None
        for slot in self._slots:
            slot.parameter.grad = slot.total = None

    @torch.no_grad()
    def gradient_norm(self) -> Tensor:
        """The global norm of the gradients of the step that comes, so that it can be judged before it is taken.

        Returns:
            The norm before clipping, float32 of shape (), on the parameters' device; 0 where there is no gradient.
        """
        self.accumulate()
        if self._norm is None:
            active = self._active()
            self._norm = self._total_norm(active) if active else self._slots[0].master.new_zeros(())
            updates = [self._update(slot) for slot in active if not slot.orthogonalized]
            self._updates = ops.Updates(updates) if updates else None
        return self._norm

    def _total_norm(self, slots: list[ParameterSlot]) -> Tensor:
        """Norm of the summed gradients of ``slots``, float32 of shape ()."""
        return ops.sum_of_squares([slot.gradient for slot in slots]).sqrt().float()

    @torch.no_grad()
    def step(self, lr: float, max_norm: float) -> Tensor:
        """Clip, update and clear the gradients (the accumulated ones and what ``.grad`` still holds).

        Args:
            lr: learning rate of this step; that of orthogonalised matrices follows from it.
            max_norm: the gradient is scaled down to this global norm if it is larger; 0 never clips.

        Returns:
            The global norm before clipping, float32 of shape (), on the parameters' device. Where it is not
            finite nothing was updated.
        """
        norm = self.gradient_norm()
        if self._updates is not None:
            beta1, beta2 = self.betas
            ops.adamw_(self._updates, norm, lr=lr, beta1=beta1, beta2=beta2, eps=self.eps, max_norm=max_norm)
        for slots in _portions([slot for slot in self._active() if slot.orthogonalized]):
            self._muon_step(slots, norm, lr, max_norm)
        self.zero_grad()
        return norm

    def _muon_step(self, slots: list[ParameterSlot], norm: Tensor, lr: float, max_norm: float) -> None:
        assert self.muon is not None, "without it no parameter is orthogonalised"
        ops.muon_(
            [self._muon_update(slot) for slot in slots],
            norm,
            lr=lr * self.muon.rate_factor,
            momentum=self.muon.momentum,
            max_norm=max_norm,
            orthogonalize=lambda matrices: self._orthogonalize(slots, matrices),
        )

    def _orthogonalize(self, slots: list[ParameterSlot], matrices: list[Tensor]) -> None:
        """Replace what this process holds of the matrices of ``slots`` by the same of their polar factors."""
        ops.orthogonalize_(matrices)

    def _active(self) -> list[ParameterSlot]:
        return [slot for slot in self._slots if slot.total is not None]

    def _update(self, slot: ParameterSlot) -> ops.Update:
        assert slot.exp_avg_sq is not None, "AdamW keeps a second moment"
        assert slot.step is not None, "and counts its steps"
        out, decay = self._target(slot)
        return ops.Update(slot.master, slot.exp_avg, slot.exp_avg_sq, slot.gradient, out, slot.step, decay)

    def _muon_update(self, slot: ParameterSlot) -> ops.MuonUpdate:
        rows, columns = slot.parameter.shape  # of the whole, of which this process may hold a part
        out, decay = self._target(slot)
        scale = ops.muon_scale(rows, columns)
        return ops.MuonUpdate(slot.master, slot.exp_avg, slot.gradient, out, scale, decay)

    def _target(self, slot: ParameterSlot) -> tuple[Tensor | None, float]:
        """The weights of lower precision that an update sets beside the master, if any, and its weight decay."""
        return slot.own if slot.has_own_master else None, self.weight_decay if slot.decayed else 0.0

    def state_tensors(self) -> dict[str, Tensor]:
        """Moments and step counts by name, not copied.

        ``exp_avg.NAME`` of every parameter; ``exp_avg_sq.NAME`` and ``step.NAME`` of those that AdamW updates.
        """
        return {name: self._whole(slot, held) for name, (slot, held) in self._state().items()}

    def load_state_tensors(self, state: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`state_tensors` gave; a ValueError if it is of other parameters."""
        self._copy_all(self._state(), state, "optimizer state")

    def master_tensors(self) -> dict[str, Tensor]:
        """The weights in full precision by parameter name, not copied: what a checkpoint stores."""
        return {name: self._whole(slot, held) for name, (slot, held) in self._masters().items()}

    def load_master_tensors(self, weights: Mapping[str, Tensor]) -> None:
        """Take over what :meth:`master_tensors` gave, and set the parameters from it."""
        self._copy_all(self._masters(), weights, "weights")
        _round(self._slots)

    def _state(self) -> dict[str, tuple[ParameterSlot, Tensor]]:
        return {
            f"{kind}.{slot.name}": (slot, held)
            for slot in self._slots
            for kind in ("exp_avg", "exp_avg_sq", "step")
            if (held := getattr(slot, kind)) is not None
        }

    def _masters(self) -> dict[str, tuple[ParameterSlot, Tensor]]:
        return {slot.name: (slot, slot.master) for slot in self._slots}

    @torch.no_grad()
    def _copy_all(
        self, targets: Mapping[str, tuple[ParameterSlot, Tensor]], sources: Mapping[str, Tensor], what: str
    ) -> None:
        """Copy tensors by name; nothing is copied unless all names and shapes agree."""
        shapes = {name: slot.parameter.shape if held.ndim else held.shape for name, (slot, held) in targets.items()}
        check_shapes(shapes, sources, what)
        for name, (slot, held) in targets.items():
            held.copy_(self._part(slot, sources[name]))

    def _whole(self, slot: ParameterSlot, held: Tensor) -> Tensor:
        """The tensor of a parameter of which this process holds ``held``."""
        return held

    def _part(self, slot: ParameterSlot, whole: Tensor) -> Tensor:
        """What this process holds of the tensor ``whole`` of a parameter."""
        return whole


def check_shapes(wanted: Mapping[str, torch.Size], tensors: Mapping[str, Tensor], what: str) -> None:
    """Raises ValueError, naming some, unless ``tensors`` have the names and shapes that are ``wanted``.

    A mapping that reads its tensors only when they are asked for has their ``shapes`` as an attribute.
    """
    shapes = getattr(tensors, "shapes", None) or {name: tensor.shape for name, tensor in tensors.items()}
    wrong = sorted(wanted.keys() ^ shapes.keys()) or [name for name in wanted if wanted[name] != shapes[name]]
    if wrong:
        raise ValueError(f"this is not the {what} of the model: {', '.join(wrong[:5])}")


def _own(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds; a plain tensor as it is."""
    own: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return own


def _portions(slots: list[ParameterSlot]) -> Iterator[list[ParameterSlot]]:
    """Split ``slots``, in order, into lists of at most ELEMENTS_AT_ONCE elements, or of one matrix that has more."""
    portion: list[ParameterSlot] = []
    elements = 0
    for slot in slots:
        if portion and elements + slot.parameter.numel() > ELEMENTS_AT_ONCE:
            yield portion
            portion, elements = [], 0
        portion.append(slot)
        elements += slot.parameter.numel()
    if portion:
        yield portion


@torch.no_grad()
def _round(slots: list[ParameterSlot]) -> None:
    """Set the parameters from their masters."""
    narrow = [slot for slot in slots if slot.has_own_master]
    if narrow:
        torch._foreach_copy_([slot.own for slot in narrow], [slot.master for slot in narrow])
