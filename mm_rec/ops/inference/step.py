"""Runs one token of each sequence through a whole model, by the plan that ``mm_rec/cpp/src/step.h`` reads.

A plan is a flat table of pointers to the weights, built once; a step is then one call, without Python or PyTorch
between the layers. It runs on the CPU alone and has no reference of its own: the model's forward pass defines it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mm_rec.ops import backend
from mm_rec.ops.inference.matrices import Int8Matrix, PackedMatrix, Weight, shape_of
from mm_rec.ops.reference import rotary_angles

__all__ = ["MATRICES", "VECTORS", "StepPlan", "StepShape"]

_PACKED = 3  # the code of a PackedMatrix; the others follow
_TYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.int8: 2}
MATRICES = ("in_proj", "decay_proj", "out_proj", "qkv_proj", "attention_out", "score_proj", "ffn_up", "ffn_down")
VECTORS = ("decay_bias", "gate_bias", "w_g", "key_taps", "score_bias")


@dataclass(frozen=True)
class StepShape:
    """The sizes that the weights' shapes don't tell.

    Attributes:
        heads: H.
        window: W, tokens of the short-term memory.
        slots: K, pairs that a head keeps of the tokens before.
        rotary_base: see :func:`mm_rec.ops.rotate`.
    """

    heads: int
    window: int
    slots: int
    rotary_base: float


class _Matrix(ctypes.Structure):
    _fields_ = (("data", ctypes.c_void_p), ("scale", ctypes.c_void_p), ("type", ctypes.c_int64))


class _Packed(ctypes.Structure):
    _fields_ = tuple((name, ctypes.c_void_p) for name in ("plain", "data", "base", "start"))


class _Block(ctypes.Structure):
    _fields_ = (*((name, _Matrix) for name in MATRICES), *((name, ctypes.c_void_p) for name in VECTORS))


_SIZES = (
    "type", "width", "heads", "hidden", "decay_width", "vocabulary", "window", "slots", "reach", "blocks",
    "memory_blocks", "experts",
)  # fmt: skip


class _Plan(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in _SIZES),
        *((name, _Matrix) for name in ("embedding", "fusion_gate", "fusion_mix")),
        *((name, ctypes.c_void_p) for name in ("block", "cosine", "sine")),
    )


class _State(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("position", "h", "h_after", "ring", "scores")),
        *((name, ctypes.c_int64) for name in ("capacity", "offset")),
        *((name, ctypes.c_void_p) for name in ("kept", "kept_score")),
    )


class StepPlan:
    """Holds the pointers to a model's weights for :meth:`step`, and keeps the weights alive.

    Args:
        shape: sizes.
        experts: for each expert its blocks, each a mapping of the names in ``MATRICES`` and ``VECTORS`` to weights,
            of memory blocks all, of others without those of the memories. Matrices are float32, bfloat16,
            :class:`PackedMatrix` or :class:`Int8Matrix`, the rest is float32; all contiguous, on the CPU.
        embedding: (V, D), also the output head.
        fusion: W_f (E, E D) and W_m (D, D) of more than one expert.
        dtype: of the activations and of the ring: float32 or bfloat16.

    Raises:
        NativeUnavailableError: there is no native library.
    """

    def __init__(
        self,
        shape: StepShape,
        experts: Sequence[Sequence[Mapping[str, Weight]]],
        embedding: Weight,
        fusion: tuple[Weight, Weight] | None,
        dtype: torch.dtype,
    ) -> None:
        self._kernel = backend.kernel("step", "cpu")
        self._scratch_size = backend.kernel("step_scratch", "cpu")
        self._kept: list[object] = []
        self._scratch, self._scratch_for = torch.empty(0), (0, 0)  # the second: for how many sequences and threads
        blocks = [block for expert in experts for block in expert]
        table = (_Block * len(blocks))(*map(self._block, blocks))
        first = blocks[0]
        vocabulary, width = shape_of(embedding)
        angle = rotary_angles(torch.arange(shape.window), width // shape.heads, shape.rotary_base)
        self._plan = _Plan(
            type=_TYPE_CODES[dtype],
            width=width,
            heads=shape.heads,
            hidden=shape_of(first["ffn_up"])[0],
            decay_width=shape_of(first["decay_proj"])[1],
            vocabulary=vocabulary,
            window=shape.window,
            slots=shape.slots,
            reach=max((shape_of(block["key_taps"])[2] for block in experts[0] if "key_taps" in block), default=0),
            blocks=len(experts[0]),
            memory_blocks=sum("w_g" in block for block in experts[0]),
            experts=len(experts),
            embedding=self._matrix(embedding),
            block=ctypes.addressof(table),
            cosine=self._pointer(angle.cos().float()),
            sine=self._pointer(angle.sin().float()),
        )
        if fusion is not None:
            self._plan.fusion_gate, self._plan.fusion_mix = map(self._matrix, fusion)
        self._kept.append(table)

    def _pointer(self, tensor: Tensor) -> int:
        self._kept.append(tensor)
        return tensor.data_ptr()

    def _matrix(self, weight: Weight) -> _Matrix:
        if isinstance(weight, Int8Matrix):
            return _Matrix(self._pointer(weight.data), self._pointer(weight.scale), _TYPE_CODES[torch.int8])
        if isinstance(weight, PackedMatrix):
            packed = _Packed(*map(self._pointer, (weight.plain, weight.data, weight.base, weight.start)))
            self._kept.append(packed)
            return _Matrix(ctypes.addressof(packed), None, _PACKED)
        return _Matrix(self._pointer(weight), None, _TYPE_CODES[weight.dtype])

    def _block(self, weights: Mapping[str, Weight]) -> _Block:
        block = _Block()
        for name, weight in weights.items():
            if name in VECTORS:
                assert isinstance(weight, Tensor)
                setattr(block, name, self._pointer(weight))
            else:
                setattr(block, name, self._matrix(weight))
        return block

    def step(
        self,
        tokens: Tensor,
        position: Tensor,
        h: Tensor,
        h_after: Tensor,
        ring: Tensor,
        scores: Tensor,
        offset: int,
        kept: Tensor,
        kept_score: Tensor,
    ) -> Tensor:
        """Advance each sequence by one token.

        Args:
            tokens, position: (B,) int64; a token and its place in its document.
            h, h_after: (N, B, D) float32, the recurrences of all blocks before, and where they go; may be the same.
            ring: (3 M, B, C, H, d) in the activation type: of each memory block the keys, the values and the own
                keys. Rows ``offset`` to ``offset`` + W - 1 hold the last W tokens; the new one is written behind them,
                so C is larger.
            scores: (M, B, C, H) float32, the scores of the same tokens.
            offset: see ``ring``.
            kept: (2 M, B, H, K, d) in the activation type: of each memory block the keys and the values that its heads
                keep, changed in place.
            kept_score: (M, B, H, K) float32, their scores, changed in place; -inf for an empty slot.

        Returns:
            Logits (B, V) float32.

        Raises:
            IndexError: for a token that is not in the vocabulary.
            ValueError: for a negative position.
        """
        plan, threads = self._plan, torch.get_num_threads()
        if self._scratch_for != (len(tokens), threads):
            size = self._scratch_size(ctypes.addressof(plan), len(tokens), threads)
            self._scratch, self._scratch_for = torch.empty(size), (len(tokens), threads)
        state = _State(
            position.data_ptr(), h.data_ptr(), h_after.data_ptr(), ring.data_ptr(), scores.data_ptr(), ring.shape[2],
            offset, kept.data_ptr(), kept_score.data_ptr(),
        )  # fmt: skip
        logits = torch.empty(len(tokens), plan.vocabulary)
        result = self._kernel(
            ctypes.addressof(plan), ctypes.addressof(state), len(tokens), tokens.data_ptr(), logits.data_ptr(),
            self._scratch.data_ptr(), threads,
        )  # fmt: skip
        if result == 2:
            raise ValueError("position must not be negative")
        if result == 3:
            raise IndexError(f"a token is not in the vocabulary of {plan.vocabulary}")
        return logits
