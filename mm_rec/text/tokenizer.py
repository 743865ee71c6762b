"""Byte-level BPE: text to token ids and back, exact for every Unicode string.

The `tokenizers` library does the work. What this module adds is the guarantee that control tokens never come out of
text (:meth:`Tokenizer.encode`), and a folder that `transformers` loads as it is (:meth:`Tokenizer.save`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers, processors, trainers

from mm_rec.errors import UserError
from mm_rec.regular_file import read_regular
from mm_rec.text.chat_template import CHAT_TEMPLATE
from mm_rec.translation import Translatable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["CONTROL_TOKENS", "MIN_VOCAB_SIZE", "Tokenizer", "train_tokenizer"]

CONTROL_TOKENS = ("<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")

MIN_VOCAB_SIZE = 256 + len(CONTROL_TOKENS)
"""Every byte and every control token has an id; a smaller vocabulary could not write every text."""

# How text is cut before merging, first alternative that matches. English contractions; a word with the one sign or
# space before it (".append", "_name", " the"); up to three digits; a run of signs with the line break and indentation
# after it (":\n        " is one token in Python); other line breaks with their indentation; white space, leaving
# the last blank to the word after it. On English books and Python files it gives 4.25 and 4.01 bytes a token at 32k,
# where GPT-2's pattern gives 4.09 and 3.44.
_WORDS = "|".join(
    (
        r"'(?:[sdmt]|ll|ve|re)",
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+(?:[\r\n]+[ \t]*)?",
        r"[\r\n]+[ \t]*",
        r"\s+(?!\S)",
        r"\s+",
    )
)


MAX_BYTES = 256_000_000
"""Far above the size of any tokenizer's file."""

_LONGEST_REASON = 300
_SAMPLE = "Aa 09 ışık, 漢字 🙂\r\n\tdef f(x):\n        return ' x'\n"

_LONGEST_TRAINED = 256
"""Characters of a word that training looks at in one piece. It takes time by the square of the longest word, and a
script without spaces or a sequence of DNA can be one word of millions; no token becomes as long as this."""


def _byte_signs() -> dict[str, int]:
    """How GPT-2 and all byte-level vocabularies since write bytes: printable Latin-1 as it is, the rest from U+0100."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (byte for byte in range(256) if byte not in printable)
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTE_OF_SIGN = _byte_signs()


class Tokenizer:
    """A trained tokenizer. Ids 0 to 6 are the control tokens, in the order of :data:`CONTROL_TOKENS`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        """Wrap ``backend``; raises UserError if it lacks a control token."""
        ids = backend.get_vocab()
        missing = [token for token in CONTROL_TOKENS if token not in ids]
        if missing:
            raise UserError("this tokenizer has no {missing}; train one with `mm-rec tokenizer`", missing=missing[0])
        backend.no_padding()  # what other tools set for their batches is saved with the tokenizer
        backend.no_truncation()
        # In this mode the library reads control tokens in a text as the plain characters that they are.
        backend.encode_special_tokens = True
        self._backend = backend
        self.control_ids: dict[str, int] = {token: ids[token] for token in CONTROL_TOKENS}
        self.bos_id = self.control_ids["<|bos|>"]
        self.eos_id = self.control_ids["<|eos|>"]
        self.pad_id = self.control_ids["<|pad|>"]
        self.end_id = self.control_ids["<|end|>"]
        self.vocab_size: int = backend.get_vocab_size()
        self.sha256: str = hashlib.sha256(backend.to_str().encode()).hexdigest()

    @property
    def padded_vocab_size(self) -> int:
        """The vocabulary rounded up to a multiple of 64, the number of rows of the embedding."""
        return (self.vocab_size + 63) // 64 * 64

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``: no BOS is added, and no control id comes out, whatever the text.

        Raises ValueError for a string that is not Unicode text (one with lone surrogates), TypeError for what is none.
        """
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """:meth:`encode` of many texts, on all cores."""
        try:
            encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        except TypeError:  # what the library raises for a string that has no UTF-8 form
            for text in texts:
                if not isinstance(text, str):
                    raise TypeError(f"a text is a string, not of type {type(text).__name__}") from None
            raise ValueError("only strings without lone surrogates can be encoded") from None
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``. Control tokens leave no trace; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    @cached_property
    def token_bytes(self) -> tuple[bytes, ...]:
        """The UTF-8 bytes that each id stands for, which may end inside a character; none for control tokens."""
        found = {i: bytes(_BYTE_OF_SIGN[sign] for sign in name) for name, i in self._backend.get_vocab(False).items()}
        found |= {i: token.content.encode() for i, token in self._backend.get_added_tokens_decoder().items()}
        found |= dict.fromkeys(self.control_ids.values(), b"")
        return tuple(found.get(i, b"") for i in range(self.vocab_size))

    @cached_property
    def token_sizes(self) -> NDArray[np.int64]:
        """(V,) the number of bytes that each id stands for."""
        import numpy as np

        return np.array([len(one) for one in self.token_bytes], dtype=np.int64)

    def save(self, folder: Path) -> None:
        """Write ``tokenizer.json``, ``tokenizer_config.json`` and ``chat_template.jinja`` into ``folder``.

        `transformers` loads the folder with ``AutoTokenizer.from_pretrained``.
        """
        folder.mkdir(parents=True, exist_ok=True)
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": "<|bos|>",
            "eos_token": "<|eos|>",
            "pad_token": "<|pad|>",
            "model_max_length": int(1e30),  # as transformers writes that there is no longest text
            "padding_side": "left",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        }
        (folder / "tokenizer.json").write_text(self._backend.to_str(pretty=True), encoding="utf-8", newline="\n")
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, indent=2) + "\n", encoding="utf-8", newline="\n"
        )
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Read ``folder/tokenizer.json``; raises UserError if it is missing or broken."""
        path = Path(folder) / "tokenizer.json"
        try:
            if path.stat().st_size > MAX_BYTES:
                raise UserError(
                    "{path} has more than {megabytes} MB, which is no tokenizer",
                    path=path,
                    megabytes=MAX_BYTES // 1_000_000,
                )
            content = read_regular(path)
        except FileNotFoundError:
            raise UserError("there is no {path}; train a tokenizer with `mm-rec tokenizer`", path=path) from None
        except OSError as error:
            raise UserError("{path} cannot be read: {error}", path=path, error=error) from None
        return cls.parse(content, path)

    @classmethod
    def parse(cls, content: bytes, path: Path) -> Tokenizer:
        """Returns the tokenizer in the ``content`` of the file ``path``; raises UserError if there is none in it."""
        try:
            parts = json.loads(content)
            _check_parts(parts)
            tokenizer = cls(tokenizers.Tokenizer.from_str(json.dumps(parts)))  # what was checked, and nothing else
            tokenizer._check()
        except UserError:
            raise
        except BaseException as error:  # the library raises bare Exception, and where it fails no Exception at all
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())[:_LONGEST_REASON]
            raise UserError(
                "{path} is not a tokenizer ({reason}); train it anew with `mm-rec tokenizer`", path=path, reason=reason
            ) from None
        return tokenizer

    def _check(self) -> None:
        """Raises ValueError unless ids are 0 to V - 1, tokens stand for bytes, and a text comes back as it was."""
        if sorted(self._backend.get_vocab().values()) != list(range(self.vocab_size)):
            raise ValueError(Translatable("its ids are not the numbers from 0 on"))
        trained = self._backend.get_vocab(with_added_tokens=False).keys() - set(CONTROL_TOKENS)
        if any(sign not in _BYTE_OF_SIGN for name in trained for sign in name):
            raise ValueError(Translatable("its tokens do not stand for bytes"))
        if self.decode(self.encode(_SAMPLE)) != _SAMPLE:
            raise ValueError(Translatable("it does not give a text back as it was"))


def _check_parts(parts: dict[str, Any]) -> None:
    """Raises ValueError unless a tokenizer.json has the parts that :func:`train_tokenizer` gives it.

    Others may hold regular expressions, of which some take exponential time on some texts. A tokenizer of ours has no
    normalizer, as that would change texts.
    """
    if parts["normalizer"] is not None:
        raise ValueError(Translatable("it has a normalizer"))
    for name, kind in (("model", "BPE"), ("decoder", "ByteLevel")):
        if parts[name]["type"] != kind:
            raise ValueError(
                Translatable(
                    "its {name} is of the kind {found!r}, not {kind}", name=name, found=parts[name]["type"], kind=kind
                )
            )
    cutting = parts["pre_tokenizer"]
    for one in cutting["pretokenizers"] if cutting["type"] == "Sequence" else [cutting]:
        if one["type"] != "ByteLevel" and (one["type"], one.get("pattern")) != ("Split", {"Regex": _WORDS}):
            raise ValueError(Translatable("its pre_tokenizer cuts texts in another way than tokenizers trained here"))


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on ``texts``.

    The same texts in the same order give the same tokenizer. ``vocab_size`` is an upper bound: too little text leaves
    a smaller vocabulary, since a pair of tokens has to occur twice to be merged.

    Raises ValueError if ``vocab_size`` is below :data:`MIN_VOCAB_SIZE`.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(
            Translatable(
                "vocab_size must be at least {min_vocab_size}, got {vocab_size}",
                min_vocab_size=MIN_VOCAB_SIZE,
                vocab_size=vocab_size,
            )
        )
    backend = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    pieces = pre_tokenizers.Split(Regex(rf"[\s\S]{{{_LONGEST_TRAINED}}}"), "isolated")
    signs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, pieces, signs])
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        show_progress=False,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in CONTROL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(iter(texts), trainer)
    backend.pre_tokenizer = pre_tokenizers.Sequence([words, signs])
    # For programs that load the folder with transformers: every document starts with BOS.
    bos_id = backend.token_to_id("<|bos|>")
    backend.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", bos_id)])
    return Tokenizer(backend)
