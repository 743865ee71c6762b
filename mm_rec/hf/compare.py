"""Compares a model with what `transformers` loads of the folder that it was exported to."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mm_rec.errors import UserError
from mm_rec.inference.loading import Loaded
from mm_rec.storage import hf_folder
from mm_rec.text.conversation import ROLES, Message, clean, encode_conversation
from mm_rec.translation import Translatable

__all__ = ["compare"]

COMPARED_TOKENS = 300
TEXTS = ("def f(x):\n    return {'a': 1}\n", "Çok güzel 😀 漢字 <|end|>", "  two  spaces\r\n\ttab")


def compare(folder: Path, loaded: Loaded) -> list[str]:
    """Load ``folder`` with `transformers`, where this package has registered the model, and compare all of it.

    Returns:
        What was compared, in lines for people.

    Raises:
        UserError: if anything differs.
    """
    transformers.utils.logging.disable_progress_bar()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ours, own = loaded.model, loaded.tokenizer
    expected, weights = hf_folder.module_names(ours.state_dict()), theirs.state_dict()
    _expect("weights", all(torch.equal(tensor, weights[name]) for name, tensor in expected.items()))
    ids = torch.randint(own.vocab_size, (1, COMPARED_TOKENS), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        for domain in (*ours.config.experts, None):
            logits, _ = ours(ids, None, domain)
            _expect("logits", torch.equal(theirs(ids, domain=domain or "all").logits, logits))
    for text in TEXTS:
        _expect("tokens", tokenizer.encode(clean(text), add_special_tokens=False) == own.encode(clean(text)))
    messages = [Message(role, text) for role in ROLES for text in TEXTS]
    said = tokenizer.apply_chat_template([message._asdict() for message in messages], return_dict=False)
    _expect("chat format", said == encode_conversation(own, messages)[0])
    return [
        Translatable(
            "{count} weights, the logits of {compared_tokens} tokens by each expert and by all",
            count=len(expected),
            compared_tokens=COMPARED_TOKENS,
        ),
        Translatable("the tokens of {count} texts and of a conversation", count=len(TEXTS)),
    ]


def _expect(what: str, holds: bool) -> None:
    if not holds:
        raise UserError(
            "transformers gives other {what} than mm-rec; nothing was exported, please report this", what=what
        )
