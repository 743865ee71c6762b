"""Token by token without Python between the layers: a model's weights and state for :class:`mm_rec.ops.step.StepPlan`.

A decoder reads a model's weights where they are, so training in place goes on under it; weights that were replaced
are noticed, and so are those changed in place of which a packed copy is read. The states that it returns are views of
memory that is laid out for the next step: the ring has room behind its last row, so that a new token is appended and
nothing moves. A state that it did not return last is copied once.
"""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import ModelConfig
from mm_rec.ops import backend
from mm_rec.ops.step import VECTORS, PackedMatrix, StepPlan, StepShape, Weight
from mm_rec.state import BlockState, MemoryState, ModelState

if TYPE_CHECKING:
    from mm_rec.model import MMRecModel

__all__ = ["Decoder", "find_decoder"]

_decoders: weakref.WeakKeyDictionary[nn.Module, dict[str | None, Decoder]] = weakref.WeakKeyDictionary()
_DTYPES = (torch.float32, torch.bfloat16)


def find_decoder(model: MMRecModel, domain: str | None) -> Decoder | None:
    """The decoder of ``model`` for an expert, or for all fused, if the native back end can run it on this machine.

    Raises:
        NativeUnavailableError: native kernels are forced and not there.
    """
    weight = model.embedding.weight
    if hasattr(model, "reshard"):  # FSDP: the weights have no lasting place
        return None
    if weight.device.type != "cpu" or not _native(model) or not backend.runs_native("step", weight):
        return None
    known = _decoders.setdefault(model, {})
    decoder = known.get(domain)
    if decoder is None or not decoder.is_current(model):
        try:
            decoder = known[domain] = Decoder(model, domain)
        except ValueError:  # a mix of types that the kernels don't have
            return None
    return decoder


def _native(model: MMRecModel) -> bool:
    return all(block.backend != "reference" for name in model.config.experts for block in _blocks(model, name))


def _blocks(model: MMRecModel, expert: str) -> list[MMRecBlock]:
    return [module for module in model.experts[expert].modules() if isinstance(module, MMRecBlock)]


class Decoder:
    """Steps of one model; safe to call from several threads, which then wait for each other.

    Args:
        model: on the CPU.
        domain: the expert that runs; None fuses all.

    Raises:
        ValueError: if the weights are not of types that the kernels have.
    """

    def __init__(self, model: MMRecModel, domain: str | None) -> None:
        self.config = model.config
        self.experts = model.config.experts if domain is None else (domain,)
        self.dtype = model.dtype
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        fused = len(self.experts) > 1
        modules: list[tuple[str, nn.Module]] = [("embedding", model.embedding)]
        blocks = [[(f"experts.{e}.blocks.{i}", b) for i, b in enumerate(_blocks(model, e))] for e in self.experts]
        modules += [block for expert in blocks for block in expert]
        modules += [("fusion", model.fusion)] if fused else []
        # Where the weights are looked up again at each step, and where they were.
        self._sources = [(module._parameters, name) for _, module in modules for name in module._parameters]
        self._addresses = self._find()
        self._packed = model.packed
        self._copies: list[tuple[dict[str, nn.Parameter | None], str, PackedMatrix]] = []  # of weights, at the sources

        def weights(prefix: str, module: nn.Module) -> dict[str, Weight]:
            found: dict[str, Weight] = {}
            for name, parameter in module._parameters.items():
                assert parameter is not None
                _check(parameter, self.dtype if name not in VECTORS else torch.float32)
                packed = model.packed.get(f"{prefix}.{name}")
                if f"{prefix}.{name}" in model.int8:
                    found[name] = model.int8[f"{prefix}.{name}"]
                elif packed is not None and packed.holds(parameter):
                    found[name] = packed
                    self._copies.append((module._parameters, name, packed))
                else:
                    found[name] = parameter.detach()
            return found

        fusion = weights("fusion", model.fusion) if fused else {}
        self._plan = StepPlan(
            StepShape(self.config.n_heads, self.config.window, self.config.slots, self.config.rotary_base),
            [[weights(*block) for block in expert] for expert in blocks],
            weights("embedding", model.embedding)["weight"],
            (fusion["gate"], fusion["mix"]) if fused else None,
            self.dtype,
        )

    def _find(self) -> list[int]:
        return [parameters[name].data_ptr() for parameters, name in self._sources]  # type: ignore[union-attr]

    def is_current(self, model: MMRecModel) -> bool:
        """Whether the model's weights still lie where they were, and those read from copies are what they were."""
        return (
            model.packed is self._packed
            and self._find() == self._addresses
            and all(packed.holds(parameters[name]) for parameters, name, packed in self._copies)  # type: ignore[arg-type]
        )

    def step(self, tokens: Tensor, state: ModelState, donate: bool) -> tuple[Tensor, ModelState]:
        """As :meth:`mm_rec.model.MMRecModel.step`."""
        if tokens.shape != state.position.shape:
            raise ValueError(f"{len(tokens)} tokens do not fit a state of {len(state.position)} rows")
        with self._lock:
            stream = self._stream
            if stream is None or not stream.issued(state):
                stream = self._stream = _Stream(self.config, self.experts, self.dtype, state)
            return stream.step(self._plan, tokens.long().contiguous(), state.position.contiguous(), donate)


def _check(weight: Tensor, dtype: torch.dtype) -> None:
    if weight.dtype != dtype or dtype not in _DTYPES or not weight.is_contiguous() or weight.device.type != "cpu":
        raise ValueError(f"a {weight.dtype} weight on {weight.device} beside {dtype}")


class _Stream:
    """The memory behind the newest state of a batch of sequences.

    Earlier states stay as they were: h goes to new memory, the slots are copied before a write, and a row that was
    appended to the ring lies outside of the windows of before. Only what is donated is overwritten.
    """

    def __init__(self, config: ModelConfig, experts: tuple[str, ...], dtype: torch.dtype, state: ModelState) -> None:
        self.config = config
        self.experts = experts
        self._issued: list[weakref.ref[Tensor]] = []
        self._shared = False  # whether the slots are also those of a state that may still be used
        blocks = [block for name in experts for block in state.experts[name]]
        memories = [block.memory for block in blocks if block.memory is not None]
        rows, window, heads, d = len(state.position), config.window, config.n_heads, config.head_dim
        self.h = torch.stack([block.h for block in blocks]).float()
        self.offset = 0
        self.ring = torch.empty(len(memories), 2, rows, window + config.window // 2, heads, d, dtype=dtype)
        sizes = (len(memories), rows, heads, config.slots)
        self.slots = torch.empty(*sizes, d), torch.empty(*sizes, d), torch.empty(*sizes)
        for index, memory in enumerate(memories):
            for place, tensor in zip(self.ring[index], (memory.k, memory.v), strict=True):
                place[:, :window] = tensor
            for slot, tensor in zip(self.slots, memory[2:], strict=True):
                slot[index] = tensor

    def issued(self, state: ModelState) -> bool:
        """Whether ``state`` is the one that this stream returned last, tensor by tensor."""
        tensors = _tensors(state, self.experts)
        return len(tensors) == len(self._issued) and all(
            reference() is tensor for reference, tensor in zip(self._issued, tensors, strict=True)
        )

    def step(self, plan: StepPlan, tokens: Tensor, position: Tensor, donate: bool) -> tuple[Tensor, ModelState]:
        """One token, whose positions are (B,)."""
        window, block = self.config.window, self.config.window // 2
        if self.offset + window == self.ring.shape[3]:
            kept, self.ring = self.ring[:, :, :, self.offset :], torch.empty_like(self.ring)
            self.ring[:, :, :, :window] = kept
            self.offset = 0
        writes = any(at >= window and at % block == 0 for at in position.tolist())
        if writes and (self._shared or not donate):
            key, value, mass = self.slots
            self.slots, self._shared = (key.clone(), value.clone(), mass.clone()), False
        elif not donate:
            self._shared = True
        h = self.h if donate else torch.empty_like(self.h)
        logits = plan.step(tokens, position, self.h, h, self.ring, self.offset, self.slots)
        self.h = h
        self.offset += 1
        return logits, self._issue(position + 1)

    def _issue(self, position: Tensor) -> ModelState:
        """The state as views of this memory."""
        window = self.ring[:, :, :, self.offset : self.offset + self.config.window].flatten(0, 1).unbind(0)
        memories = iter(zip(window[::2], window[1::2], *(slot.unbind(0) for slot in self.slots), strict=True))
        h = iter(self.h.unbind(0))
        experts = {
            name: [
                BlockState(next(h), MemoryState(*next(memories)) if self.config.is_memory_block(index) else None)
                for index in range(self.config.n_layers)
            ]
            for name in self.experts
        }
        state = ModelState(position, experts)
        self._issued = [weakref.ref(tensor) for tensor in _tensors(state, self.experts)]
        return state


def _tensors(state: ModelState, experts: tuple[str, ...]) -> list[Tensor]:
    """Every tensor of a state but the position, which is read anew at each step."""
    found = []
    for name in experts:
        for block in state.experts[name]:
            found.append(block.h)
            if block.memory is not None:
                found += block.memory
    return found
