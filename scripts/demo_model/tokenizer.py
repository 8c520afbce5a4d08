"""Builds the demo checkpoint's CLIP tokenizer, in which each known word is one token."""

import json
import re
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Final

from transformers import CLIPTokenizer

MAX_TOKENS: Final = 77
_START, _END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"
# How CLIP cuts plain lower-case text before any merge. Each word is then encoded by itself, so a
# cache of words is exact.
_PIECES = re.compile(r"[a-z]+|[0-9]|[^\sa-z0-9]+")


def write_tokenizer(words: Iterable[str], folder: Path) -> CLIPTokenizer:
    """Write vocab.json, merges.txt and what transformers adds to them; return the tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    merges = learn_merges(words)
    letters = _byte_letters()
    tokens = [*letters, *(letter + _WORD_END for letter in letters)]
    tokens += list(dict.fromkeys(a + b for a, b in merges))
    vocabulary = {token: index for index, token in enumerate([*tokens, _START, _END])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False))
    lines = ["#version: 0.2", *(f"{a} {b}" for a, b in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n")
    tokenizer = CLIPTokenizer(
        vocab=vocabulary, merges=merges, model_max_length=MAX_TOKENS, pad_token=_END
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Merge the commonest neighbours until each word is one token (Sennrich et al., 2016)."""
    spelt = [[*word[:-1], word[-1] + _WORD_END] for word in words]
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for word in spelt for pair in pairwise(word)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        spelt = [_merge(word, best) for word in spelt]
    return merges


class WordCache:
    """Encodes captions like the tokenizer it was made from, a few microseconds each."""

    def __init__(self, tokenizer: CLIPTokenizer, captions: Iterable[str]) -> None:
        words = sorted({word for text in captions for word in _PIECES.findall(text.lower())})
        bare = tokenizer(words, add_special_tokens=False)["input_ids"]
        self._ids = dict(zip(words, bare, strict=True))
        self.start, self.end = tokenizer.bos_token_id, tokenizer.eos_token_id

    def encode(self, caption: str) -> list[int]:
        """Return MAX_TOKENS ids: start, the words, end, and ends for padding as CLIP has it."""
        ids = [self.start]
        for word in _PIECES.findall(caption.lower()):
            ids += self._ids[word]
        ids = ids[: MAX_TOKENS - 1]
        return ids + [self.end] * (MAX_TOKENS - len(ids))


def _merge(word: list[str], pair: tuple[str, str]) -> list[str]:
    merged: list[str] = []
    for piece in word:
        if merged and (merged[-1], piece) == pair:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def _byte_letters() -> list[str]:
    """Return the 256 printable letters that stand for bytes in GPT-2's and CLIP's vocabularies."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
