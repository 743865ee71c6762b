"""The Python interface to a trained model.

Example::

    import mm_rec

    model = mm_rec.load("checkpoints")
    print(model.generate("The ", max_new_tokens=50))

``import mm_rec`` has these names and imports nothing until one is used. Keywords are named as on the command line.
What a caller gets wrong is a :class:`mm_rec.errors.UserError`, a ValueError or a TypeError of one line.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Unpack

import numpy as np
import torch
from torch import Tensor

from mm_rec.evaluation.bits_per_byte import Documents, evaluate
from mm_rec.inference.chat_session import ChatSession
from mm_rec.inference.folder_memory import read_folder
from mm_rec.inference.generate import PROMPT_CHUNK, generate
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.inference.sampling import Sampling, SamplingOptions
from mm_rec.state import ModelState

__all__ = ["Model", "TokenLogits", "load"]


class TokenLogits(NamedTuple):
    """What :meth:`Model.logits` returns for T tokens.

    Attributes:
        ids: (T,) int64, the tokens that were read, on the CPU.
        logits: (T, V) float32; row t holds those of the token after ``ids[t]``. V is the number of rows of the
            embedding, of which the first ``model.tokenizer.vocab_size`` have a token.
        state: what the model remembers after the last token.
    """

    ids: Tensor
    logits: Tensor
    state: ModelState


def load(
    path: str | os.PathLike[str],
    *,
    device: str = "auto",
    precision: str = "auto",
    weights: str = "full",
    adapter: str | os.PathLike[str] | None = None,
) -> Model:
    """Loads a trained model.

    Args:
        path: a checkpoint, a run folder (its best one) or a folder of runs (that of the last stage). Where there
            is no such folder, a model on the hub: "owner/name", or "owner/name@revision" (branch, tag or commit).
        device: "cpu", "cuda", "cuda:N", or "auto": CUDA if it is there.
        precision: type of the matrices, "bf16", "fp32", or "auto": bf16 where it is fast.
        weights: "full", or "int8": fewer bytes, so faster on the CPU, at a small loss of quality.
        adapter: folder of a LoRA adapter to add to the weights, as PEFT or ``mm-rec finetune --lora`` writes it.

    Raises:
        UserError: if there is no valid checkpoint, or no such device, precision or kind of weights.

    Example::

        model = mm_rec.load("checkpoints", device="cpu")
    """
    added = None if adapter is None else Path(adapter)
    return Model(load_model(Path(path), device=device, precision=precision, weights=weights, adapter=added))


class Model:
    """A trained model with its tokenizer; :func:`load` makes one.

    A method's ``domain`` is the name of an expert, or "all" to fuse them; None takes the default: all once fusion
    is trained; before, the expert that reads the prompt in the fewest bits, or the first one where there is no
    prompt. Sampling keywords are those of :class:`mm_rec.inference.sampling.Sampling`: ``max_new_tokens``,
    ``temperature``, ``top_k``, ``top_p``, ``min_p``, ``repetition_penalty``, ``stop`` and ``seed``.

    Attributes:
        module: the PyTorch module.
        tokenizer: the tokenizer that the model was trained with.
        path: the checkpoint.

    Example::

        model = mm_rec.load("checkpoints")
        print(model, model.domains)
    """

    def __init__(self, loaded: Loaded) -> None:
        self._loaded = loaded
        self.module = loaded.model
        self.tokenizer = loaded.tokenizer
        self.path = loaded.path

    def __repr__(self) -> str:
        count = sum(parameter.numel() for parameter in self.module.parameters())
        return f"<mm_rec.Model of {count:,} parameters from {self.path}>"

    @property
    def domains(self) -> tuple[str, ...]:
        """The names of the experts."""
        return self.module.config.experts

    def generate(
        self,
        prompt: str,
        *,
        domain: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> str:
        """Continues ``prompt`` and returns the new text, without the prompt.

        Args:
            prompt: text to continue, a new document from its start; may be empty.
            domain: see :class:`Model`.
            json_schema: let the text be JSON that follows this schema; needs the extra ``json``.
            **sampling: see :class:`Model`.

        Raises:
            UserError: for an unknown domain, a setting out of its range, or a schema that can't be followed.

        Example::

            text = model.generate("The ", max_new_tokens=50, temperature=0.7, stop=".")
        """
        return "".join(self.stream(prompt, domain=domain, json_schema=json_schema, **sampling))

    def stream(
        self,
        prompt: str,
        *,
        domain: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]:
        """Continues ``prompt`` as :meth:`generate` does and yields the text in pieces, never a part of a character.

        Example::

            for piece in model.stream("The ", max_new_tokens=50):
                print(piece, end="", flush=True)
        """
        settings = Sampling.from_options(sampling)
        chosen = self._loaded.choose_domain(domain, prompt)
        return generate(self.module, self.tokenizer, prompt, settings, chosen, json_schema)

    def chat(
        self,
        *,
        system: str = "",
        messages: Iterable[Mapping[str, Any]] = (),
        domain: str | None = None,
        memory: str | os.PathLike[str] | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> ChatSession:
        """Starts a conversation.

        Args:
            system: the system prompt; empty for none.
            messages: what was said before, as in OpenAI's requests: objects with role and content.
            domain: see :class:`Model`.
            memory: a file or folder of documents that is read first; what is remembered of it is kept for later.
            **sampling: see :class:`Model`.

        Raises:
            UserError: for an unknown domain, a setting out of its range, or a folder without documents.
            ValueError: if one of ``messages`` is no message.

        Example::

            session = model.chat(system="Be brief.", max_new_tokens=40)
            print(session.answer("Hello! Who are you?"))
            for piece in session.reply("What can you do for me?"):
                print(piece, end="", flush=True)
            session.save("talk.safetensors")
        """
        settings = Sampling.from_options(sampling)
        state = None
        if memory is None:
            chosen = self._loaded.choose_domain(domain)
        else:
            state, chosen, _ = read_folder(Path(memory), self._loaded, domain)
        return ChatSession.start(
            self.module,
            self.tokenizer,
            sampling=settings,
            domain=chosen,
            system=system,
            messages=messages,
            memory=state,
        )

    def resume_chat(self, path: str | os.PathLike[str], **sampling: Unpack[SamplingOptions]) -> ChatSession:
        """Continues the conversation saved in ``path``, bitwise as if it had never stopped.

        Args:
            path: a file of :meth:`mm_rec.inference.chat_session.ChatSession.save` or of ``mm-rec chat``.
            **sampling: settings to change; those not given are as they were.

        Raises:
            UserError: if the file is missing or damaged, or was made with another model, precision or tokenizer.

        Example::

            session = model.resume_chat("talk.safetensors")
            print(session.answer("And now?"))
        """
        session = ChatSession.load(Path(path), self.module, self.tokenizer)
        session.sampling = Sampling.from_options(sampling, session.sampling)
        return session

    @torch.no_grad()
    def logits(
        self, text: str | Sequence[int] | Tensor, *, state: ModelState | None = None, domain: str | None = None
    ) -> TokenLogits:
        """Reads a text and returns the logits after each of its tokens, and the state after the last.

        Args:
            text: a string, or token ids (T,), which are read as they are. A string without a state begins a
                document, so BOS comes first; with a state it goes on.
            state: what was read before, from an earlier call with the same domain; stays as it is.
            domain: see :class:`Model`.

        Raises:
            UserError: for an unknown domain.
            ValueError: if there is nothing to read, or an id is not in the vocabulary.

        Example::

            first = model.logits("def add(a, b):")
            more = model.logits(" return", state=first.state)
            next_id = int(more.logits[-1].argmax())
        """
        chosen = self._loaded.choose_domain(domain)
        if isinstance(text, str):
            ids = torch.tensor([self.tokenizer.bos_id] * (state is None) + self.tokenizer.encode(text))
        else:
            ids = torch.as_tensor(text).cpu()
        if ids.dim() != 1 or not len(ids):
            raise ValueError("give a text or a list of token ids, at least one token")
        size = self.tokenizer.vocab_size
        if ids.is_floating_point() or int(ids.min()) < 0 or int(ids.max()) >= size:
            raise ValueError(f"token ids are whole numbers from 0 to {size - 1}")
        ids = ids.long()
        pieces = []
        for chunk in ids.split(PROMPT_CHUNK):
            read = chunk[None].to(self.module.embedding.weight.device)
            logits, state = self.module(read, state, chosen)
            pieces.append(logits[0].float())
        assert state is not None
        return TokenLogits(ids, torch.cat(pieces), state)

    def bits_per_byte(self, text: str, *, domain: str | None = None) -> float:
        """Returns the bits that the model needs for each UTF-8 byte of ``text``; less is better.

        Args:
            text: a document, not empty.
            domain: see :class:`Model`.

        Raises:
            UserError: for an unknown domain.
            ValueError: for an empty text.

        Example::

            print(model.bits_per_byte("The cat sat on the mat."))
        """
        if not text:
            raise ValueError("an empty text has no bytes to spread bits over")
        ids = np.array([self.tokenizer.bos_id, *self.tokenizer.encode(text)])
        documents = Documents([ids], len(text.encode()))
        return evaluate(self.module, documents, self._loaded.choose_domain(domain)).bits_per_byte
