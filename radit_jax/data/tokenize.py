"""Tokenizers of the language model and the encoder, as light as possible.

``tokenizer.json`` is read by the ``tokenizers`` library alone, in milliseconds; a
folder with nothing but SentencePiece's ``tokenizer.model`` goes through
``transformers``.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers


class Tokenizer:
    """A fast tokenizer with its special tokens; picklable, for data workers.

    Attributes:
        bos_id: id of <bos>, None if there is none.
        eos_id: id of <eos>.
        pad_id: id of padding, <eos> if there is none.
        add_bos: whether the checkpoint's own metadata begin a text with <bos>.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        add_bos: bool,
    ):
        backend.no_padding()
        backend.no_truncation()
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.add_bos = add_bos
        self._backend = backend
        self._special = len(backend.encode("", add_special_tokens=True).ids)

    @property
    def vocab_size(self) -> int:
        """One more than the largest id, added tokens included."""
        return max(self._backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        add_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Token ids of many texts, cut to ``max_length`` with special tokens kept."""
        found = self._backend.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        rows = [encoding.ids for encoding in found]
        if max_length is None:
            return rows
        if not add_special_tokens:
            return [row[:max_length] for row in rows]
        # The template closes with [SEP]; keep what stands behind the text.
        return [
            row if len(row) <= max_length else [*row[: max_length - 1], row[-1]]
            for row in rows
        ]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of token ids, special tokens left out."""
        return self._backend.decode(list(ids), skip_special_tokens=True)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    Raises:
        FileNotFoundError: no folder, or no tokenizer in it.
        ValueError: a file that is not a tokenizer, or one without an end token.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such tokenizer folder")
    file = folder / "tokenizer.json"
    if file.is_file():
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # tokenizers raises plain Exception
            raise ValueError(f"{file}: not a tokenizer ({error})") from error
    elif (folder / "tokenizer.model").is_file():
        backend = _from_sentencepiece(folder)
    else:
        raise FileNotFoundError(f"{folder}: expected tokenizer.json or tokenizer.model")
    said = _json(folder / "tokenizer_config.json")
    config = _json(folder / "config.json")

    def special(*names: str) -> int | None:
        for name in names:
            token = said.get(f"{name}_token")
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and backend.token_to_id(token) is not None:
                return backend.token_to_id(token)
            id = config.get(f"{name}_token_id")
            if id is not None:
                return id[0] if isinstance(id, list) else id
        return None

    eos = special("eos", "sep")
    if eos is None:
        raise ValueError(
            f"{folder}: tokenizer_config.json names no eos_token and config.json no "
            "eos_token_id; generation would not know where to stop"
        )
    pad = special("pad")
    return Tokenizer(
        backend,
        bos_id=special("bos", "cls"),
        eos_id=eos,
        pad_id=eos if pad is None else pad,
        add_bos=bool(said.get("add_bos_token", False)),
    )


def _from_sentencepiece(folder: Path) -> tokenizers.Tokenizer:
    # Imported here: it takes seconds, and few folders need it.
    from transformers import AutoTokenizer

    found = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    return found.backend_tokenizer


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        return json.loads(file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file}: not valid JSON ({error})") from error
