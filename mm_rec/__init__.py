"""MM-Rec: a small language model with a memory of fixed size, trained on the machine you have.

Example::

    import mm_rec

    model = mm_rec.load("checkpoints")
    print(model.generate("The ", max_new_tokens=50))

    run = mm_rec.train("books.txt", preset="small", max_steps=200)
    print(run.metrics[-1], run.folder)

The names below are imported when they are first used, so ``import mm_rec`` loads the standard library alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mm_rec.api.model import Model, TokenLogits, load
    from mm_rec.api.train import TrainedRun, train
    from mm_rec.config import ModelConfig
    from mm_rec.errors import UserError
    from mm_rec.inference.chat_session import ChatSession
    from mm_rec.inference.sampling import Sampling
    from mm_rec.model import MMRecModel

__version__ = "0.1.0"

__all__ = [
    "ChatSession",
    "MMRecModel",
    "Model",
    "ModelConfig",
    "Sampling",
    "TokenLogits",
    "TrainedRun",
    "UserError",
    "__version__",
    "load",
    "train",
]

_MODULES = {
    "ChatSession": "mm_rec.inference.chat_session",
    "MMRecModel": "mm_rec.model",
    "Model": "mm_rec.api.model",
    "ModelConfig": "mm_rec.config",
    "Sampling": "mm_rec.inference.sampling",
    "TokenLogits": "mm_rec.api.model",
    "TrainedRun": "mm_rec.api.train",
    "UserError": "mm_rec.errors",
    "load": "mm_rec.api.model",
    "train": "mm_rec.api.train",
}
"""Where each public name lives."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    from mm_rec.errors import find_missing_package

    try:
        value = getattr(importlib.import_module(_MODULES[name]), name)
    except ModuleNotFoundError as error:
        raise find_missing_package(error, f"mm_rec.{name}") or error from None
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
