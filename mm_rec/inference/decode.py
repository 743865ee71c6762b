"""Single tokens through a model, in one native call each where the native back end is there.

:func:`step` reads one token of each row. It takes a :class:`Decoder`, which holds a model's weights and state as
:class:`mm_rec.ops.inference.StepPlan` reads them, and the model's forward pass where no decoder can run.

A decoder reads a model's weights where they are, so training in place goes on under it; weights that were replaced
are noticed, and so are those changed in place of which a packed copy is read. The states that it returns are views of
memory that is laid out for the next step: the ring has room behind its last row, so that a new token is appended and
nothing moves. A state that it did not return last is copied once.

Matrices in int8 or 12 bits are no part of a model: :func:`use_compressed` keeps them here, for as long as the model
lives. A copy of the model has none, and steps with its parameters.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import chain, islice
from operator import is_, is_not
from types import MappingProxyType
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from mm_rec.blocks.mm_rec_block import MMRecBlock
from mm_rec.config import KEY_TAPS, ModelConfig
from mm_rec.model import MMRecModel
from mm_rec.ops.inference import VECTORS, Int8Matrix, PackedMatrix, StepPlan, StepShape, Weight, runs_native
from mm_rec.state import BlockState, MemoryState, ModelState

__all__ = ["Compressed", "Decoder", "compressed_matrices", "find_decoder", "step", "use_compressed"]

Compressed = Mapping[str, Int8Matrix | PackedMatrix]
"""Matrices of fewer bytes, by the names of the parameters that they stand for."""

_DTYPES = (torch.float32, torch.bfloat16)


class _Known(NamedTuple):
    """What is kept for a model: the matrices to read in place of its own, and its decoders by domain."""

    compressed: Compressed
    decoders: dict[str | None, Decoder]


_models: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()


@torch.no_grad()
def step(
    model: MMRecModel, tokens: Tensor, state: ModelState, domain: str | None = None, *, donate: bool = False
) -> tuple[Tensor, ModelState]:
    """Reads one token per row, in one native call where the native back end is there.

    What a row gets then depends neither on the other rows nor on the number of threads.

    Args:
        model: on any device.
        tokens: (B,) int64.
        state: what the rows have seen so far; stays as it is unless donated.
        domain: the expert to run; None runs all and fuses them.
        donate: ``state`` is not used again, so its memory may become that of the next one.

    Returns:
        Logits (B, V) float32 (float64 of a float64 model), and the state after the token.

    Raises:
        ValueError: for an unknown domain or a state that lacks an expert.
    """
    model.running_experts(state, domain)
    decoder = find_decoder(model, domain)
    if decoder is not None:
        return decoder.step(tokens, state, donate)
    logits, after = model(tokens[:, None], state, domain)
    return logits[:, 0].to(torch.promote_types(logits.dtype, torch.float32)), after


def use_compressed(model: MMRecModel, matrices: Compressed) -> None:
    """Makes steps of ``model`` read ``matrices`` in place of its parameters, and no others that were given before."""
    _models[model] = _Known(MappingProxyType(dict(matrices)), {})


def compressed_matrices(model: MMRecModel) -> Compressed:
    """Returns the matrices that :func:`use_compressed` was given for ``model``; empty if it was given none."""
    known = _models.get(model)
    return {} if known is None else known.compressed


def find_decoder(model: MMRecModel, domain: str | None) -> Decoder | None:
    """Returns the decoder of ``model`` for an expert, or for all fused; None if the native back end can't run it here.

    Raises:
        NativeUnavailableError: native kernels are forced and not there.
    """
    known = _models.get(model)
    if known is None:
        known = _models[model] = _Known({}, {})
    decoder = known.decoders.get(domain)
    if decoder is not None and decoder.is_current(model):
        return decoder if runs_native("step", decoder.weight) else None
    known.decoders.pop(domain, None)
    weight = model.embedding.weight
    if hasattr(model, "reshard"):  # FSDP: the weights have no lasting place
        return None
    if weight.device.type != "cpu" or not _native(model) or not runs_native("step", weight):
        return None
    try:
        decoder = known.decoders[domain] = Decoder(model, domain, known.compressed)
    except ValueError:  # a mix of types that the kernels don't have
        return None
    return decoder


def _native(model: MMRecModel) -> bool:
    return all(block.backend != "reference" for name in model.config.experts for block in _blocks(model, name))


def _blocks(model: MMRecModel, expert: str) -> list[MMRecBlock]:
    return [module for module in model.experts[expert].modules() if isinstance(module, MMRecBlock)]


class Decoder:
    """Reads tokens with one model; safe to call from several threads, which then wait for each other.

    Args:
        model: on the CPU.
        domain: the expert that runs; None fuses all.
        compressed: matrices to read in place of parameters of the model.

    Raises:
        ValueError: if the weights are not of types that the kernels have.
    """

    def __init__(self, model: MMRecModel, domain: str | None, compressed: Compressed) -> None:
        self.config = model.config
        self.experts = model.config.experts if domain is None else (domain,)
        self.dtype = model.dtype
        self.weight = model.embedding.weight
        self._lock = threading.Lock()
        self._stream: _Stream | None = None
        fused = len(self.experts) > 1
        modules: list[tuple[str, nn.Module]] = [("embedding", model.embedding)]
        blocks = [[(f"experts.{e}.blocks.{i}", b) for i, b in enumerate(_blocks(model, e))] for e in self.experts]
        modules += [block for expert in blocks for block in expert]
        modules += [("fusion", model.fusion)] if fused else []
        # What is looked up again at each step, and as what it was found. All of it is out of the processor's caches by
        # then, so no line of Python stands between one weight and the next.
        self._sources = [
            cast(dict[str, nn.Parameter], part._parameters) for _, module in modules for part in _parts(module)
        ]
        self._addresses = self._find()
        self._class = type(model)
        self._copied: list[tuple[dict[str, nn.Parameter], str]] = []  # sources of which packed copies are read
        self._versions: list[int] = []

        def weights(prefix: str, module: nn.Module) -> dict[str, Weight]:
            found: dict[str, Weight] = {}
            for name, parameters, key in _held(module):
                parameter = parameters[key]
                _check(parameter, self.dtype if name not in VECTORS else torch.float32)
                matrix = compressed.get(f"{prefix}.{name}")
                if isinstance(matrix, Int8Matrix):
                    found[name] = matrix
                elif matrix is not None and matrix.holds(parameter):
                    found[name] = matrix
                    self._copied.append((parameters, key))
                    self._versions.append(matrix.version)
                else:
                    found[name] = parameter.detach()
            return found

        fusion = weights("fusion", model.fusion) if fused else {}
        self._plan = StepPlan(
            StepShape(self.config.n_heads, self.config.window, self.config.kept_pairs, self.config.rotary_base),
            [[weights(*block) for block in expert] for expert in blocks],
            weights("embedding", model.embedding)["weight"],
            (fusion["gate"], fusion["mix"]) if fused else None,
            self.dtype,
        )

    def _find(self) -> list[int]:
        weights = chain.from_iterable(map(dict.values, self._sources))
        return list(map(Tensor.data_ptr, filter(partial(is_not, None), weights)))  # a layer's bias is None

    def is_current(self, model: MMRecModel) -> bool:
        """Returns whether the weights still lie where they were, and those read from copies are unchanged."""
        return (
            type(model) is self._class
            and self._find() == self._addresses
            and [parameters[name]._version for parameters, name in self._copied] == self._versions
        )

    def step(self, tokens: Tensor, state: ModelState, donate: bool) -> tuple[Tensor, ModelState]:
        """Reads one token per row, as the function :func:`step` does."""
        if tokens.shape != state.position.shape:
            raise ValueError(f"{len(tokens)} tokens do not fit a state of {len(state.position)} rows")
        with self._lock:
            stream = self._stream
            if stream is None or not stream.issued(state):
                stream = self._stream = _Stream(self.config, self.experts, self.dtype, state)
            return stream.step(self._plan, tokens.long().contiguous(), state.position.contiguous(), donate)


def _parts(module: nn.Module) -> list[nn.Module]:
    """A module that holds weights, and the linear layers in it that hold the rest of them (:mod:`mm_rec.hf`)."""
    return [module, *module.children()]


def _held(module: nn.Module) -> Iterator[tuple[str, dict[str, nn.Parameter], str]]:
    """Yields the name of every weight of a module, the parameters that it is among and its key there."""
    for name, part in [("", module), *module.named_children()]:
        parameters = cast(dict[str, nn.Parameter], part._parameters)
        for key, parameter in parameters.items():
            if parameter is not None:
                yield name or key, parameters, key


def _check(weight: Tensor, dtype: torch.dtype) -> None:
    if weight.dtype != dtype or dtype not in _DTYPES or not weight.is_contiguous() or weight.device.type != "cpu":
        raise ValueError(f"a {weight.dtype} weight on {weight.device} beside {dtype}")


class _Stream:
    """Holds the memory of the newest state of a batch of sequences.

    Earlier states stay as they were: h and the kept pairs go to new memory, and a row that was appended to the ring
    lies outside of the windows of before. Only what is donated is overwritten.
    """

    def __init__(self, config: ModelConfig, experts: tuple[str, ...], dtype: torch.dtype, state: ModelState) -> None:
        self.config = config
        self.experts = experts
        self._issued: list[BlockState] = []
        self._has_memory = [config.is_memory_block(index) for index in range(config.n_layers)] * len(experts)
        blocks = [block for name in experts for block in state.experts[name]]
        memories = [block.memory for block in blocks if block.memory is not None]
        rows, window, heads, d = len(state.position), config.window, config.n_heads, config.head_dim
        capacity = window + (window + 1) // 2
        self.h = torch.stack([block.h for block in blocks]).float()
        self.offset = 0
        # Of each memory: keys, values and own keys, and their scores; keys and values that are kept, and their scores.
        self.ring = torch.empty(3 * len(memories), rows, capacity, heads, d, dtype=dtype)
        self.scores = torch.empty(len(memories), rows, capacity, heads)
        self.kept = torch.empty(2 * len(memories), rows, heads, config.kept_pairs, d, dtype=dtype)
        self.kept_score = torch.empty(len(memories), rows, heads, config.kept_pairs)
        for index, memory in enumerate(memories):
            for place, tensor in zip(self.ring[3 * index :], (memory.k, memory.v, memory.own), strict=False):
                place[:, window - tensor.shape[1] : window] = tensor
            self.scores[index, :, :window] = memory.score
            self.kept[2 * index], self.kept[2 * index + 1] = memory.kept_k, memory.kept_v
            self.kept_score[index] = memory.kept_score
        self._views = self._view()

    def _view(self) -> tuple[list[Tensor], ...]:
        """Returns views of the recurrence of every block, and of what every memory block keeps."""
        return tuple(list(x.unbind(0)) for x in (self.h, self.kept, self.kept_score))

    def issued(self, state: ModelState) -> bool:
        """Returns whether ``state`` is the one that this stream returned last, tensor by tensor."""
        blocks = [block for name in self.experts for block in state.experts[name]]
        if len(blocks) != len(self._issued):
            return False
        return all(map(is_, blocks, self._issued)) or all(map(is_, _tensors(blocks), _tensors(self._issued)))

    def step(self, plan: StepPlan, tokens: Tensor, position: Tensor, donate: bool) -> tuple[Tensor, ModelState]:
        """Reads one token of each row, whose positions are (B,)."""
        window = self.config.window
        if self.offset + window == self.ring.shape[2]:
            self.ring, self.scores = (self._moved(x) for x in (self.ring, self.scores))
            self.offset = 0
        before = self.h
        if not donate:
            self.h, self.kept, self.kept_score = torch.empty_like(before), self.kept.clone(), self.kept_score.clone()
            self._views = self._view()
        logits = plan.step(
            tokens, position, before, self.h, self.ring, self.scores, self.offset, self.kept, self.kept_score
        )
        self.offset += 1
        return logits, self._issue(position + 1)

    def _moved(self, ring: Tensor) -> Tensor:
        """Returns other memory in which the window comes first."""
        moved = torch.empty_like(ring)
        moved[:, :, : self.config.window] = ring[:, :, self.offset :]
        return moved

    def _issue(self, position: Tensor) -> ModelState:
        """Returns the state as views of this memory."""
        h, kept, kept_score = self._views
        rows, pairs = (iter(x) for x in (self._window(self.ring), kept))
        memories = (
            MemoryState(k, v, own[:, 1 - KEY_TAPS :], score, kept_k, kept_v, of_kept)
            for k, v, own, score, kept_k, kept_v, of_kept in zip(
                rows, rows, rows, self._window(self.scores), pairs, pairs, kept_score, strict=True
            )
        )
        self._issued = [
            BlockState(x, next(memories) if has else None) for x, has in zip(h, self._has_memory, strict=True)
        ]
        blocks = iter(self._issued)
        return ModelState(position, {name: list(islice(blocks, self.config.n_layers)) for name in self.experts})

    def _window(self, ring: Tensor) -> Sequence[Tensor]:
        return ring.narrow(2, self.offset, self.config.window).unbind(0)


def _tensors(blocks: list[BlockState]) -> Iterator[Tensor | None]:
    """Yields every tensor of the blocks' states."""
    for h, memory in blocks:
        yield h
        yield from memory or (None,)
