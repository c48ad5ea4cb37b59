"""The tokenizer of a CTranslate2 directory: from `tokenizer.json`, or rebuilt from the bare list of tokens.

CTranslate2 itself needs only the list (`vocabulary.json` or `vocabulary.txt`, a token an id), so not every directory
holds a `tokenizer.json`. The list is enough: Whisper's merges were learned in the order of their ids, so merging a
token's bytes with the merges of lower ids only ends in the two parts that the token was made of.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

from tokenizers import AddedToken, Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import WhisperTokenizer

from whisper_triton.ctranslate2 import CheckpointError

END_OF_TEXT = "<|endoftext|>"
TIMESTAMPS = [f"<|{i * 0.02:.2f}|>" for i in range(1501)]
VOCABULARIES = ("vocabulary.json", "vocabulary.txt")


def load_tokenizer(directory: Path, vocab_size: int) -> WhisperTokenizer:
    """The tokenizer of the CTranslate2 model in `directory`, with every special and timestamp token at its id.

    Raises:
        CheckpointError: no file to make it from, a corrupt one, or one that does not fit `vocab_size` embeddings.
    """
    path = directory / "tokenizer.json"
    if path.exists():
        backend = _read_tokenizer(path)
    else:
        path = next((directory / name for name in VOCABULARIES if (directory / name).exists()), None)
        if path is None:
            raise CheckpointError(f"{directory}: none of tokenizer.json, {', '.join(VOCABULARIES)} is there")
        backend = _build_tokenizer(path, _read_vocabulary(path))
    # Older files lack the timestamps, which follow the last special token.
    if backend.token_to_id(TIMESTAMPS[0]) is None and backend.get_vocab_size() + len(TIMESTAMPS) <= vocab_size:
        backend.add_tokens([AddedToken(token, normalized=False) for token in TIMESTAMPS])
    highest = max(backend.get_vocab().values(), default=-1)
    if highest >= vocab_size:
        raise CheckpointError(f"{path}: token {highest} is outside the model's vocabulary of {vocab_size}")
    added = sorted(backend.get_added_tokens_decoder().items())
    # In the order of their ids, because transformers takes what follows the last one for the first timestamp.
    special = [token.content for _, token in added if token.special and token.content not in TIMESTAMPS]
    # The pad token is what openai's own tokenizers have; a pipeline with a batch size asks for one.
    tokenizer = WhisperTokenizer(tokenizer_object=backend, extra_special_tokens=special, pad_token=END_OF_TEXT)
    for token in (END_OF_TEXT, "<|startoftranscript|>", "<|startofprev|>", "<|notimestamps|>"):
        token_id(tokenizer, token)
    return tokenizer


def token_id(tokenizer: WhisperTokenizer, token: str) -> int:
    """The id of special token `token`.

    Raises:
        CheckpointError: the tokenizer has no such token.
    """
    ids = tokenizer.get_vocab()
    if token not in ids:
        raise CheckpointError(f"the tokenizer has no token {token}: not Whisper's")
    return ids[token]


def _read_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises plain `Exception`
        raise CheckpointError(f"{path}: not a tokenizer ({' '.join(str(error).split())})") from error


def _read_vocabulary(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8")
        tokens = json.loads(text) if path.suffix == ".json" else text.removesuffix("\n").split("\n")
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # the latter of brackets nested without end
        raise CheckpointError(f"{path}: not a vocabulary ({error})") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens) or END_OF_TEXT not in tokens:
        raise CheckpointError(f"{path}: should list the tokens of Whisper, {END_OF_TEXT} among them")
    return tokens


def _build_tokenizer(path: Path, tokens: list[str]) -> Tokenizer:
    first_special = tokens.index(END_OF_TEXT)
    words, special = tokens[:first_special], tokens[first_special:]
    try:
        model = BPE(vocab={word: i for i, word in enumerate(words)}, merges=_merges(words))
    except Exception as error:  # tokenizers raises plain `Exception`
        raise CheckpointError(f"{path}: not a vocabulary ({' '.join(str(error).split())})") from error
    backend = Tokenizer(model)
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_tokens([AddedToken(t, normalized=False, special=t not in TIMESTAMPS) for t in special])
    if any(backend.token_to_id(token) != i for i, token in enumerate(tokens)):
        raise CheckpointError(f"{path}: a token appears twice")
    return backend


def _merges(words: list[str]) -> list[tuple[str, str]]:
    """The merges that made `words`, which are in the order in which they were learned."""
    ids = {word: i for i, word in enumerate(words)}
    merges = []
    for word in words:
        if len(word) < 2:  # a byte
            continue
        parts = list(word)
        while len(parts) > 2:
            # The earliest learned pair first, as in encoding; the word itself is no candidate while it has three parts.
            ranks = [ids.get(a + b, len(words)) for a, b in pairwise(parts)]
            best = min(range(len(ranks)), key=ranks.__getitem__)
            if ranks[best] == len(words):
                break
            parts[best : best + 2] = [parts[best] + parts[best + 1]]
        if len(parts) == 2:
            merges.append((parts[0], parts[1]))
    return merges
