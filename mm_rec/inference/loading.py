"""A trained model from a checkpoint, ready to use."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from mm_rec.config import WEIGHTS
from mm_rec.errors import UserError
from mm_rec.inference.quantize import pack_matrices, quantize_int8
from mm_rec.machine.device import apply_precision, available_memory, select_device, select_precision
from mm_rec.model import MMRecModel
from mm_rec.stages import STAGES
from mm_rec.state import flatten_state, initial_state
from mm_rec.storage import checkpoint
from mm_rec.storage.adapter import ADAPTER_FOLDER, merged, read_adapter
from mm_rec.storage.best import best_or_newest, resolve
from mm_rec.storage.files import format_bytes
from mm_rec.storage.hub.models import find_model
from mm_rec.storage.resume import require_checkpoints
from mm_rec.storage.run_config import CHECKPOINTS, COMPLETED, list_runs, require_configs
from mm_rec.text.tokenizer import Tokenizer
from mm_rec.translation import Translatable

__all__ = ["Loaded", "find_checkpoint", "load_model"]

ROUTED_TOKENS = 1024
"""Of a prompt, by which the expert that answers it is chosen."""


class Loaded(NamedTuple):
    """A model with its tokenizer.

    Attributes:
        model: in its precision, on its device.
        tokenizer: the one it was trained with.
        domain: what to pass as ``domain`` if the user names none: None, which fuses the experts, once fusion
            is trained, else the first expert; :meth:`choose_domain` knows better where there is a prompt.
        path: the checkpoint.
        weights: of :data:`mm_rec.config.WEIGHTS`, as they were loaded.
        stage: the stage that trained it last; None if that is not known.
        sha256: that of :class:`mm_rec.storage.checkpoint.Checkpoint`, before an adapter is added.
    """

    model: MMRecModel
    tokenizer: Tokenizer
    domain: str | None
    path: Path
    weights: str
    stage: str | None = None
    sha256: str = ""

    @property
    def learned_to_chat(self) -> bool | None:
        """Whether it was taught to answer in conversations; None if that is not known."""
        stage = STAGES.get(self.stage or "")
        return None if stage is None else stage.conversations

    @property
    def untaught_notice(self) -> Translatable | None:
        """What to say to who wants to chat with it if it never learned to, and what to run."""
        if self.learned_to_chat is not False:
            return None
        return Translatable(
            "this model never learned to chat ({stage} taught it to continue texts), so its answers mean little; teach "
            "it with `mm-rec finetune --task instruct --init_from {path} --pairs_from DOCUMENTS` or --data "
            "CONVERSATIONS",
            stage=self.stage,
            path=self.path,
        )

    def choose_domain(self, requested: str | None, prompt: str = "") -> str | None:
        """Returns the domain that a user asks for: an expert, None (all fused) for ``all``, the default for None.

        Where no fusion is trained yet, the default for a prompt is the expert that reads it in the fewest bits.

        Raises:
            UserError: if there is no such expert.
        """
        experts = self.model.config.experts
        if requested is None:
            if self.is_routed and prompt:
                return self.best_expert([self.tokenizer.bos_id, *self.tokenizer.encode(prompt)])
            return self.domain
        if requested not in (*experts, "all"):
            raise UserError(
                "there is no expert {requested!r}; use --domain {experts} or all",
                requested=requested,
                experts=", ".join(experts),
            )
        return None if requested == "all" else requested

    @property
    def is_routed(self) -> bool:
        """Whether the prompt decides who answers: there are several experts, and no fusion is trained yet."""
        experts = self.model.config.experts
        return len(experts) > 1 and self.domain == experts[0] and not self.model.fusion.is_trained

    @torch.no_grad()
    def best_expert(self, ids: Sequence[int]) -> str:
        """Returns the expert that reads the first tokens of a prompt in the fewest bits; of equal ones the first.

        Args:
            ids: the prompt, BOS first; ROUTED_TOKENS of it are read.
        """
        if len(ids) < 2:  # nothing but BOS
            return self.model.config.experts[0]
        tokens = torch.tensor([list(ids[: ROUTED_TOKENS + 1])], device=self.model.embedding.weight.device)
        losses = {
            name: self.model(tokens[:, :-1], None, name, targets=tokens[:, 1:])[0].loss.item()
            for name in self.model.config.experts
        }
        return min(losses, key=losses.__getitem__)


def find_checkpoint(path: Path) -> Path:
    """Returns the checkpoint at ``path``: a checkpoint, a run folder (its best by validation) or a folder of runs.

    A path that does not exist can be the name of a model on the hub: :func:`mm_rec.storage.hub.models.find_model`.

    In a folder of runs it is that of the newest run of the last stage that has completed one. Where there was no
    validation, or the best one is damaged, the newest valid one takes its place. A run
    that was stopped before its first step is taken only if there is no other. Each damaged checkpoint, and each such
    run, that is passed over is a warning.

    Raises:
        UserError: if there is none, or a later run has lost its checkpoints or its configuration.
    """
    path = find_model(path)
    if not path.is_dir():
        raise UserError(
            "there is no folder {path}; name a checkpoint, a run folder, a folder of runs, or OWNER/NAME on the hub",
            path=path,
        )
    untrained: list[Path] = []
    for stage in reversed(STAGES):
        for entry in reversed(list_runs(path, stage)):
            require_configs([entry])
            _, run, config = entry
            if config is None:
                continue
            newest = best_or_newest(run, _warn)
            if newest is None:
                require_checkpoints(run, config)
            elif checkpoint.checkpoint_step(newest) == 0 and not config.get(COMPLETED):
                untrained.append(newest)
            else:
                for one in untrained:
                    _warn(
                        Translatable(
                            "passed over {parent}, which was stopped before its first step", parent=one.parent.parent
                        )
                    )
                return newest
    return untrained[0] if untrained else resolve(path, _warn)


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


def _adapted(base: checkpoint.Checkpoint, adapter: Path, folder: Path) -> Mapping[str, Tensor]:
    """Returns the weights of ``base`` with the adapter in ``folder`` added, which a user names ``adapter``.

    Raises:
        UserError: if it is no adapter of this model, or was trained in a run that started from another checkpoint.
    """
    changes = read_adapter(folder)
    started_from = checkpoint.started_from(_checkpoint_of_adapter(folder))
    if started_from not in (None, base.sha256) and checkpoint.is_of_a_run(base.path):
        raise UserError(
            "the adapter in {adapter} was not trained on {path}; name with --model the "
            "checkpoint that its training started from, since later ones hold it already",
            adapter=adapter,
            path=base.path,
        )
    return merged(base.weights, changes, folder)


def load_model(
    path: Path,
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str = "full",
    adapter: Path | None = None,
) -> Loaded:
    """Loads the model at ``path``; see :func:`find_checkpoint`.

    Args:
        path: checkpoint, run folder or folder of runs, or ``owner/name`` on the hub.
        device: as for :func:`mm_rec.machine.device.select_device`.
        precision: type of the matrices, as for :func:`mm_rec.machine.device.select_precision`.
        weights: ``full``, or ``int8`` to round the matrices; see :func:`mm_rec.inference.quantize.quantize_int8`.
        adapter: a LoRA adapter to add to the weights: a folder of PEFT, or a run or checkpoint of ``finetune --lora``.

    Raises:
        UserError: if there is no valid checkpoint, no such device, precision or kind of weights, or the adapter is
            not of this model or was trained on another checkpoint.
    """
    if weights not in WEIGHTS:
        raise UserError(
            "there are no weights {weights!r}; use {choices}", weights=weights, choices=" or ".join(WEIGHTS)
        )
    place = select_device(device)
    found = checkpoint.load(find_checkpoint(path), weights_only=True)
    checkpoint.check_shape(found)
    if adapter is None:
        values, last = found.weights, found.path
    else:
        folder = resolve(adapter, _warn) if (adapter / CHECKPOINTS).is_dir() else adapter
        values, last = _adapted(found, adapter, folder), _checkpoint_of_adapter(folder)
    try:
        with torch.device("meta"):
            model = MMRecModel(found.config)
        model.load_state_dict(values, assign=True)
    except (RuntimeError, KeyError) as error:  # KeyError: the name of an expert is one of PyTorch's own
        raise UserError("the weights in {path} are not of the model in its config.json", path=found.path) from error
    tokenizer = found.load_tokenizer()
    if tokenizer.vocab_size > found.config.vocab_size:
        raise UserError(
            "the tokenizer in {path} has {tokens} tokens and the model {rows}; resize "
            "the model with model.resize_token_embeddings(len(tokenizer)) and save it again",
            path=found.path,
            tokens=tokenizer.vocab_size,
            rows=found.config.vocab_size,
        )
    _check_state(model)
    apply_precision(model, select_precision(precision, place))
    if weights == "int8":
        quantize_int8(model)
    model.to(place).eval()
    if weights == "full":
        pack_matrices(model)
    return Loaded(model, tokenizer, found.domain, found.path, weights, checkpoint.stage_of(last), found.sha256)


def _checkpoint_of_adapter(folder: Path) -> Path:
    """The checkpoint that the folder of an adapter lies in; a folder of PEFT lies in none."""
    return folder.parent if folder.name == ADAPTER_FOLDER else folder


def _check_state(model: MMRecModel) -> None:
    """Refuse a model whose memory of a text does not fit; no weights tell how large that is.

    Raises:
        UserError: naming what is needed and what there is.
    """
    state = initial_state(model.config, 1, model.config.experts, device="meta")
    needed = sum(tensor.nbytes for tensor in flatten_state(state).values())
    available = available_memory(torch.device("cpu"))
    if needed > available:
        raise UserError(
            "the model's memory of one text takes {needed} and {available} are free; its "
            "config.json asks for too large a window or too many slots",
            needed=format_bytes(needed),
            available=format_bytes(available),
        )
