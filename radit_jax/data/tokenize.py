"""Tokenizers of checkpoints, through the ``tokenizers`` library alone.

``transformers`` would do as well, but importing it takes seconds, and PyTorch with it
where that is installed; every data worker would pay for both.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing

FAST = "tokenizer.json"
SENTENCEPIECE = "tokenizer.model"
WORDPIECE = "vocab.txt"

# SentencePiece's ModelProto (sentencepiece_model.proto).
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE = 2


class Tokenizer:
    """Text to token ids and back; no padding, and no truncation but what is asked for.

    It can be pickled, so data workers may carry it.

    Attributes:
        bos_id: begins a sequence ([CLS] of an encoder); None when there is no such.
        eos_id: ends a sequence ([SEP] of an encoder).
        pad_id: fills up rows; the eos when the checkpoint has none of its own.
        vocab_size: one more than the largest id.
        add_bos: whether the checkpoint's metadata says that texts begin with bos.
    """

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        bos_id: int | None,
        eos_id: int,
        pad_id: int,
        add_bos: bool,
    ):
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.pad_id = pad_id
        self.add_bos = add_bos
        self.vocab_size = max(backend.get_vocab(with_added_tokens=True).values()) + 1
        self._set_backend(backend)

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        state["_backend"] = state["_backend"].to_str()
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        backend = tokenizers.Tokenizer.from_str(state.pop("_backend"))
        self.__dict__.update(state)
        self._set_backend(backend)

    def _set_backend(self, backend: tokenizers.Tokenizer) -> None:
        # Some checkpoints ship with both switched on.
        backend.no_padding()
        backend.no_truncation()
        # A passage that spells "<|im_end|>" or "[SEP]" holds these characters, not a
        # token that ends it.
        backend.encode_special_tokens = True
        self._backend = backend

    def encode(self, text: str) -> list[int]:
        """Token ids of a text, without special tokens."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(
        self,
        texts: Sequence[str],
        max_length: int | None = None,
        add_special_tokens: bool = False,
    ) -> list[list[int]]:
        """Token ids of several texts, in parallel.

        Args:
            texts: any number of them.
            max_length: longest result in tokens; a text is cut at its end, the special
                tokens around it stay.
            add_special_tokens: as the checkpoint does it ([CLS] ... [SEP]).

        Raises:
            ValueError: ``max_length`` leaves no room for any text.
        """
        encodings = self._backend.encode_batch(
            list(texts), add_special_tokens=add_special_tokens
        )
        added = self._backend.num_special_tokens_to_add(False)
        least = 1 + (added if add_special_tokens else 0)
        if max_length is not None and max_length < least:
            raise ValueError(
                f"max_length: expected at least {least} tokens, found {max_length}"
            )
        rows = []
        for encoding in encodings:
            ids = encoding.ids
            if max_length is not None and len(ids) > max_length:
                tail = _trailing(encoding.special_tokens_mask)
                ids = ids[: max_length - tail] + ids[len(ids) - tail :]
            rows.append(ids)
        return rows

    def ends(self, text: str, tokens: int) -> tuple[str, str] | None:
        """The stretches of a text that its first and its last tokens cover.

        Args:
            text: any.
            tokens: how many at most on either side, special tokens apart; a word that
                would be cut is left out.

        Returns:
            Both, as they stand in the text; None where they would overlap or one of
            them has no whole word.
        """
        encoding = self._backend.encode(text, add_special_tokens=False)
        size, words = len(encoding.ids), encoding.word_ids
        if size < 2 * tokens:
            return None
        stop, start = tokens, size - tokens
        while stop > 0 and stop < size and words[stop] == words[stop - 1]:
            stop -= 1
        while start < size and start > 0 and words[start] == words[start - 1]:
            start += 1
        if stop == 0 or start == size:
            return None
        offsets = encoding.offsets
        return text[: offsets[stop - 1][1]], text[offsets[start][0] :]

    def decode(self, ids: Sequence[int], special: bool = False) -> str:
        """Text of token ids; special tokens leave no trace in it unless asked for."""
        return self._backend.decode(
            [int(id) for id in ids], skip_special_tokens=not special
        )


def _trailing(mask: Sequence[int]) -> int:
    """How many ones a list ends in."""
    count = 0
    while count < len(mask) and mask[len(mask) - 1 - count]:
        count += 1
    return count


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a Hugging Face folder.

    It is read from ``tokenizer.json``, else from ``tokenizer.model`` (SentencePiece
    BPE, as Llama 1 and 2 were published), else from ``vocab.txt`` (WordPiece, BERT).

    Args:
        folder: of a language model or an encoder.

    Raises:
        FileNotFoundError: no folder, or none of the three files in it.
        ValueError: a file is damaged, or no token ends a sequence.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    named: dict[str, Any] = {}
    # Of two files that name the same token the later one in this list holds.
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            options = _read_json(folder / name)
            named |= {k: v for k, v in options.items() if v is not None}
    for name, build in (
        (FAST, lambda file: _from_json(file)),
        (SENTENCEPIECE, lambda file: _from_sentencepiece(file)),
        (WORDPIECE, lambda file: _from_vocabulary(file, named)),
    ):
        if (folder / name).exists():
            backend = build(folder / name)
            break
    else:
        found = sorted(path.name for path in folder.iterdir())
        raise FileNotFoundError(
            f"{folder}: none of {FAST}, {SENTENCEPIECE}, {WORDPIECE}; the folder holds "
            + (", ".join(found[:8]) or "nothing")
        )
    ids = _special_ids(folder, backend, named)
    if ids["eos"] is None:
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: eos_token: expected the token that "
            "ends a sequence, found none; fine-tuning teaches the model to stop with it"
        )
    bos, eos = ids["bos"], ids["eos"]
    add_bos = named.get("add_bos_token")
    if add_bos is None:
        # Newer checkpoints say it by how they frame a text; padding is no frame.
        backend.no_padding()
        add_bos = bos is not None and backend.encode("").ids[:1] == [bos]
    pad = eos if ids["pad"] is None else ids["pad"]
    return Tokenizer(backend, bos, eos, pad, bool(add_bos))


def _special_ids(
    folder: Path, backend: tokenizers.Tokenizer, named: Mapping[str, Any]
) -> dict[str, int | None]:
    """Ids of bos, eos and pad: by the tokenizer's name for it, else by the model's."""
    model: dict[str, Any] = {}
    for name in ("config.json", "generation_config.json"):
        if (folder / name).exists():
            model |= {
                k: v for k, v in _read_json(folder / name).items() if v is not None
            }
    ids: dict[str, int | None] = {}
    for role, fields in (
        ("bos", ("bos_token", "cls_token")),
        ("eos", ("eos_token", "sep_token")),
        ("pad", ("pad_token",)),
    ):
        field = next((field for field in fields if named.get(field)), None)
        if field is None:
            id = model.get(f"{role}_token_id")
            # Chat models list several ends, the plain one first.
            first = id[0] if isinstance(id, list) and id else id
            ids[role] = first if isinstance(first, int) else None
            continue
        token = named[field]
        content = token["content"] if isinstance(token, dict) else token
        ids[role] = backend.token_to_id(content)
        if ids[role] is None:
            raise ValueError(
                f"{folder}: {field}: expected a token of the vocabulary, found "
                f"{content!r}, which is not in it"
            )
    return ids


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file}: expected a JSON object")
    return content


def _from_json(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no narrower class
        raise ValueError(f"{file}: not a tokenizer: {error}") from error


def _from_vocabulary(file: Path, named: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """BERT's WordPiece from a vocabulary, one token per line."""
    vocab = {
        token: id
        for id, token in enumerate(file.read_text(encoding="utf-8").splitlines())
    }
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    missing = [token for token in special[1:4] if token not in vocab]
    if missing:
        raise ValueError(f"{file}: not a vocabulary of BERT: no {', '.join(missing)}")
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    lowercase = named.get("do_lower_case", True)
    backend.normalizer = normalizers.BertNormalizer(
        handle_chinese_chars=named.get("tokenize_chinese_chars", True),
        strip_accents=named.get("strip_accents"),
        lowercase=lowercase,
    )
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(prefix="##")
    backend.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocab[token]) for token in ("[CLS]", "[SEP]")],
    )
    backend.add_special_tokens([token for token in special if token in vocab])
    return backend


def _from_sentencepiece(file: Path) -> tokenizers.Tokenizer:
    """BPE with byte fallback from SentencePiece's file, as of Llama 1 and 2."""
    try:
        proto = list(_fields(file.read_bytes()))
        pieces = [
            _piece(dict(_fields(value))) for number, value in proto if number == 1
        ]
        trainer = dict(_fields(next((v for n, v in proto if n == 2), b"")))
        normalizer = dict(_fields(next((v for n, v in proto if n == 3), b"")))
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{file}: not a SentencePiece model, or truncated: {error}"
        ) from error
    if not pieces:
        raise ValueError(f"{file}: not a SentencePiece model: it has no pieces")
    if trainer.get(3, 1) != _BPE:
        raise ValueError(
            f"{file}: model_type: expected BPE ({_BPE}), as Llama has, found "
            f"{trainer.get(3, 1)}"
        )
    vocab = {piece: id for id, (piece, _, _) in enumerate(pieces)}
    unknown = next((p for p, _, kind in pieces if kind == _UNKNOWN), None)
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab,
            _merges(pieces, vocab),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=any(kind == _BYTE for _, _, kind in pieces),
        )
    )
    replace = normalizers.Replace(" ", "▁")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.get(3, 1):  # add_dummy_prefix
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), replace])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = replace
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(
        [
            AddedToken(piece, normalized=False, special=True)
            for piece, _, kind in pieces
            if kind in (_UNKNOWN, _CONTROL)
        ]
    )
    backend.add_tokens(
        [
            AddedToken(piece, normalized=False)
            for piece, _, kind in pieces
            if kind == _USER_DEFINED
        ]
    )
    return backend


def _merges(
    pieces: Sequence[tuple[str, float, int]], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Merges in order: SentencePiece keeps only the score of each merge's result."""
    found = []
    for piece, score, kind in pieces:
        if kind != _NORMAL:
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-score, vocab[left], vocab[right], left, right))
    return [(left, right) for *_, left, right in sorted(found)]


def _piece(fields: Mapping[int, Any]) -> tuple[str, float, int]:
    """Text, score and kind of a piece."""
    (score,) = memoryview(fields.get(2, b"\0\0\0\0")).cast("f")
    return fields[1].decode("utf-8"), score, fields.get(3, _NORMAL)


def _fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Number and value of each field of a protocol-buffers message.

    https://protobuf.dev/programming-guides/encoding
    """
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                return value

    while at < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        if wire not in (1, 2, 5):
            raise ValueError(f"wire type {wire} at byte {at}")
        size = varint() if wire == 2 else {1: 8, 5: 4}[wire]
        if at + size > len(data):
            raise ValueError(f"field {number} ends after the file")
        yield number, data[at : at + size]
        at += size
