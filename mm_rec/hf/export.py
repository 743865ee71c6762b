"""A model in a folder that `transformers` loads, compared with the model that it was made of."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from mm_rec.errors import UserError
from mm_rec.inference.loading import Loaded, load_model
from mm_rec.storage import checkpoint, files, hf_folder
from mm_rec.text.conversation import ROLES, Message, clean, encode_conversation

__all__ = ["export"]

WEIGHTS = "model.safetensors"
SMALL_FILES_BYTES = 16_000_000
COMPARED_TOKENS = 300
TEXTS = ("def f(x):\n    return {'a': 1}\n", "Çok güzel 😀 漢字 <|end|>", "  two  spaces\r\n\ttab")


def export(source: Path, output: Path, domain: str | None = None, adapter: Path | None = None) -> list[str]:
    """Write the model that ``source`` names to the folder ``output``, load it with `transformers` and compare.

    Nothing is left behind if the loaded model differs. The folder has a manifest, so that the commands of this
    package take it for a checkpoint.

    Args:
        source: checkpoint, run folder or folder of runs.
        output: must not exist.
        domain: the expert that is to answer by default, ``all`` for all fused; None keeps what training reached.
        adapter: folder of a LoRA adapter to merge.

    Returns:
        What was compared, in lines for people.

    Raises:
        UserError: if there is no such model or expert, the disk is full, or what was
            loaded is not what was written.
    """
    loaded = load_model(source, device="cpu", precision="fp32", adapter=adapter)
    weights = loaded.model.state_dict()
    n_bytes = sum(tensor.nbytes for tensor in weights.values())
    with files.atomic_folder(output, n_bytes + SMALL_FILES_BYTES) as folder:
        hf_folder.write_model_files(folder, loaded.model.config, loaded.tokenizer, loaded.choose_domain(domain))
        checkpoint.write_tensors(folder / WEIGHTS, hf_folder.module_names(weights))
        return _compare(folder, loaded)


def _compare(folder: Path, loaded: Loaded) -> list[str]:
    """Load ``folder`` with `transformers`, where the package hf has registered the model, and compare all of it."""
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
        f"{len(expected)} weights, the logits of {COMPARED_TOKENS} tokens by each expert and by all",
        f"the tokens of {len(TEXTS)} texts and of a conversation",
    ]


def _expect(what: str, holds: bool) -> None:
    if not holds:
        raise UserError(f"transformers gives other {what} than mm-rec; nothing was exported, please report this")
