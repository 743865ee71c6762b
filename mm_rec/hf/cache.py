"""The state of a model in the place where `transformers` keeps keys and values."""

from __future__ import annotations

from torch import Tensor
from transformers.cache_utils import Cache

from mm_rec.state import ModelState, map_state

__all__ = ["MMRecCache"]


class MMRecCache(Cache):  # type: ignore[misc]
    """Holds the state of an MM-Rec model, of fixed size, where other models have a key-value cache.

    Attributes:
        state: None before the first token.
        n_seen: tokens read so far, padding included.
    """

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.state: ModelState | None = None
        self.n_seen = 0

    def update_state(self, state: ModelState, n_tokens: int) -> None:
        """Take the state after ``n_tokens`` more tokens."""
        self.state = state
        self.n_seen += n_tokens

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns the number of tokens read so far, padding included."""
        return self.n_seen

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """Returns -1: there is no longest text."""
        return -1

    @property
    def batch_size(self) -> int:
        """Rows of the state; -1 before the first token."""
        return -1 if self.state is None else len(self.state.position)

    @property
    def is_croppable(self) -> bool:
        """False: what was read cannot be unread."""
        return False

    def crop(self, tokens_to_remove: int) -> None:
        """Raises ValueError: what was read cannot be unread. Copy the cache before reading what may have to go."""
        raise ValueError("the memory of an MM-Rec model cannot go back; copy.deepcopy the cache before you read on")

    def reset(self) -> None:
        """Forget everything."""
        self.state, self.n_seen = None, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keeps the rows at ``indices``, in that order."""
        if self.state is not None:
            self.state = map_state(self.state, lambda tensor: tensor[indices.to(tensor.device)])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeats every row ``repeats`` times, the copies one after the other."""
        if self.state is not None:
            self.state = map_state(self.state, lambda tensor: tensor.repeat_interleave(repeats, dim=0))
