"""The MM-Rec language model: shared embedding, experts, fusion, tied head, one state."""

from __future__ import annotations

from typing import Any, NamedTuple, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mm_rec import ops
from mm_rec.blocks.expert import Expert
from mm_rec.blocks.fusion import Fusion
from mm_rec.config import ModelConfig
from mm_rec.state import ModelState, initial_state

__all__ = ["EMBEDDING_STD", "LossOutput", "MMRecModel", "document_positions"]

EMBEDDING_STD = 0.02


class LossOutput(NamedTuple):
    """Loss: scalar sum of weight * nll, and nll: (B, T) in nats, without gradient, 0 where the weight is 0."""

    loss: Tensor
    nll: Tensor


def document_positions(start: Tensor, reset: Tensor | None, time: int) -> Tensor:
    """Position of every token of a chunk in its document.

    Args:
        start: (B,) int64, the position of each row's first token unless it is a reset.
        reset: (B, T) bool, True at a document's first token; None for nowhere.
        time: T.

    Returns:
        (B, T) int64.
    """
    index = torch.arange(time, device=start.device)
    running = start[:, None] + index
    if reset is None:
        return running
    last_reset = torch.where(reset, index, -1).cummax(dim=1).values
    return torch.where(last_reset >= 0, index - last_reset, running)


class _TiedEmbedding(torch.autograd.Function):
    """Rows of the embedding and the embedding itself, for the head, whose gradient then takes in that of the rows.

    Left to autograd, the two gradients would be added up in new memory, however few rows the one has.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(weight, tokens)
        return F.embedding(tokens, weight), weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, drows: Tensor | None, dhead: Tensor | None) -> tuple[Tensor | None, None]:
        if drows is None:
            return dhead, None
        weight, tokens = ctx.saved_tensors
        dhead = torch.zeros_like(weight) if dhead is None else dhead
        return dhead.index_add_(0, tokens.flatten(), drows.flatten(0, -2)), None


class MMRecModel(nn.Module):
    """MM-Rec as ARCHITECTURE.md describes it.

    Parameters may be float32 throughout, or matrices bfloat16 and the rest float32; activations take the
    type of the embedding, the state's recurrence and scores stay float32.

    Args:
        config: sizes and the experts' names.
        seed: of the initial weights.
        use_native: force the native kernels (True) or the reference (False); None takes what is there.
    """

    def __init__(self, config: ModelConfig, *, seed: int = 0, use_native: bool | None = None) -> None:
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        # Without initial values by PyTorch: on the device "meta" they import its compiler, which takes two seconds.
        table = torch.empty(config.vocab_size, config.d_model)
        self.embedding: nn.Embedding = nn.Embedding.from_pretrained(table, freeze=False)
        self.experts = nn.ModuleDict({name: Expert(config, use_native) for name in config.experts})
        self.fusion = Fusion(config)
        if self.embedding.weight.device.type != "meta":
            self.reset_parameters(torch.Generator().manual_seed(seed))

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialise all weights; the same generator state gives the same weights."""
        self.embedding.weight.normal_(0, EMBEDDING_STD, generator=generator)
        for expert in self.experts.values():
            assert isinstance(expert, Expert)
            expert.reset_parameters(generator)
        self.fusion.reset_parameters()

    @property
    def dtype(self) -> torch.dtype:
        """Type of the activations."""
        return self.embedding.weight.dtype

    def _domains(self, domain: str | None) -> tuple[str, ...]:
        if domain is None:
            return self.config.experts
        if domain not in self.config.experts:
            raise ValueError(f"unknown domain {domain!r}; the experts are {', '.join(self.config.experts)}")
        return (domain,)

    def running_experts(self, state: ModelState, domain: str | None) -> tuple[str, ...]:
        """Returns the names of the experts that run for ``domain``; None runs all.

        Raises:
            ValueError: for an unknown domain or a state that lacks an expert.
        """
        names = self._domains(domain)
        missing = [name for name in names if name not in state.experts]
        if missing:
            raise ValueError(f"the state holds {', '.join(state.experts)}, not {', '.join(missing)}")
        return names

    def initial_state(self, batch_size: int, domain: str | None = None) -> ModelState:
        """The empty state of ``batch_size`` rows; with ``domain``, of that expert alone."""
        weight = self.embedding.weight
        return initial_state(self.config, batch_size, self._domains(domain), dtype=self.dtype, device=weight.device)

    @overload
    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        domain: str | None = None,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, ModelState]: ...

    @overload
    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        domain: str | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor,
        weight: Tensor | None = None,
    ) -> tuple[LossOutput, ModelState]: ...

    def forward(
        self,
        tokens: Tensor,
        state: ModelState | None = None,
        domain: str | None = None,
        reset: Tensor | None = None,
        *,
        targets: Tensor | None = None,
        weight: Tensor | None = None,
    ) -> tuple[Tensor | LossOutput, ModelState]:
        """Run the model over T more tokens of each row.

        Gradients flow through the returned state; detach it (:func:`mm_rec.state.detach_state`) to cut.

        Args:
            tokens: (B, T) int64, T at least 1.
            state: what the rows have seen so far; None for nothing.
            domain: the expert to run; None runs all and fuses them, if there are several.
            reset: (B, T) bool, True where a token is the first of a document; None for nowhere.
            targets: (B, T) int64; if given, the loss is returned in place of logits.
            weight: (B, T) float32, of each target in the loss; None means 1 / (B T).

        Returns:
            Logits (B, T, V), or the loss; and the state after the last token.

        Raises:
            ValueError: for an unknown domain or a state that lacks an expert.
        """
        y, head, next_state = self._run(tokens, state, domain, reset, with_loss=targets is not None)
        if targets is None:
            return F.linear(y, head), next_state
        loss, nll = ops.linear_cross_entropy(
            y.flatten(0, 1),
            head,
            targets.reshape(-1),
            None if weight is None else weight.reshape(-1),
        )
        return LossOutput(loss, nll.view(targets.shape)), next_state

    def features(
        self, tokens: Tensor, state: ModelState | None = None, domain: str | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, ModelState]:
        """What the output head reads, (B, T, D), and the state after the last token; arguments as in :meth:`forward`.

        The logits are the product with the embedding's transpose.
        """
        y, _, next_state = self._run(tokens, state, domain, reset, with_loss=False)
        return y, next_state

    def _embed(self, tokens: Tensor, with_loss: bool) -> tuple[Tensor, Tensor]:
        """Rows of the embedding, and the embedding for the head."""
        weight = self.embedding.weight
        if with_loss and weight.device.type == "cpu" and not torch.compiler.is_compiling():
            return _TiedEmbedding.apply(weight, tokens)  # type: ignore[no-any-return, no-untyped-call]
        return self.embedding(tokens), weight

    def _run(
        self, tokens: Tensor, state: ModelState | None, domain: str | None, reset: Tensor | None, *, with_loss: bool
    ) -> tuple[Tensor, Tensor, ModelState]:
        batch, time = tokens.shape
        if state is None:  # on the device of the tokens: offloaded weights are on "meta" until they are needed
            state = initial_state(self.config, batch, self._domains(domain), dtype=self.dtype, device=tokens.device)
        names = self.running_experts(state, domain)
        position = document_positions(state.position, reset, time)
        residual_type = torch.promote_types(self.dtype, torch.float32)
        rows, head = self._embed(tokens, with_loss)
        x = ops.rms_norm(rows, residual_type)
        outputs, after = [], {}
        for name in names:
            y, after[name] = self.experts[name](
                x,
                position,
                reset,
                state.experts[name],
                dtype=self.dtype,
                gradient_checkpointing=self.gradient_checkpointing,
            )
            outputs.append(y)
        y = outputs[0] if len(outputs) == 1 else self.fusion(outputs)
        return y, head, ModelState(position[:, -1] + 1, after)
