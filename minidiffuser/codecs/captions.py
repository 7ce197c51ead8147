"""A caption codec of words: every word has a fixed code, and decoding finds the nearest code.

    encode   "red apple" -> [red] [apple] [end] [end] ... -> codes (L, D)
    decode   each of the L vectors -> the nearest code's word, up to the first [end]

Codes are *random*, N(0, I), or *semantic*: half of each code is random and half are the leading
singular vectors of which words stand together in captions (PPMI: Levy & Goldberg, NeurIPS 2014), so
that "left" and "right" are neighbours and "cat" is far away.  (Vectors of company alone would not
do: words that occur once, each in a caption of one word, keep the same company.)  Either way a code
has mean square 1, the variance the diffusion process assumes of data.
"""

import difflib
import json
import re
from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from torch import Tensor

from .base import Codec

END = "[end]"
_CLOSING = ":,!?)”"  # tokens of their own, though they touch the word before
_OPENING = "(“"      # and these the word after


def _tokenizer(vocabulary: dict[str, int]) -> Tokenizer:
    """Words and punctuation marks, from the `tokenizers` library."""
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=None))
    marks = re.escape(_CLOSING + _OPENING)
    pattern = Regex(rf"[{marks}]|[^\s{marks}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(pattern, behavior="removed", invert=True)
    return tokenizer


def words_of(caption: str) -> list[str]:
    """A caption's words and punctuation marks, in order."""
    return [word for word, _ in _SPLITTER.pre_tokenize_str(caption)]


_SPLITTER = _tokenizer({END: 0}).pre_tokenizer


class WordCodec(Codec):
    """Captions <-> (B, length, dim) codes.

    Args:
        tokenizer: a `tokenizers.Tokenizer` over whole words.
        codes: (V, dim) float32, one row per word of its vocabulary.
        length: tokens of a caption, the end not counted.
    """

    kind = "words"

    def __init__(self, tokenizer: Tokenizer, codes: Tensor, length: int):
        self.tokenizer, self.codes, self.length = tokenizer, codes, length
        self.words = [tokenizer.id_to_token(i) for i in range(len(codes))]
        if tokenizer.get_vocab_size() != len(codes) or self.words[0] != END:
            raise ValueError(f"{len(codes)} codes do not fit a vocabulary of "
                             f"{tokenizer.get_vocab_size()} words that begins with {END!r}")
        self._known = set(self.words[1:])  # a caption cannot name the end token
        self._folded: dict[str, str] = {}
        for word in reversed(self.words[1:]):  # where two differ in case only, the first is meant
            self._folded[word.casefold()] = word

    @classmethod
    def fit(
        cls, captions: Sequence[str], length: int, dim: int, codes: str = "semantic", seed: int = 0
    ) -> "WordCodec":
        """Collect the words of training captions and give each a code.

        Raises:
            ValueError: a caption of more than ``length`` tokens, or kind of codes that is unknown.
        """
        split = [words_of(caption) for caption in captions]
        longest = max(split, key=len, default=[])
        if len(longest) > length:
            raise ValueError(f"caption_length={length} is too short: {' '.join(longest)!r} has "
                             f"{len(longest)} tokens")
        words = [END, *sorted({w for caption in split for w in caption})]
        vocabulary = {word: i for i, word in enumerate(words)}
        if codes == "random":
            table = _random_codes(len(words), dim, seed)
        elif codes == "semantic":
            ids = [[vocabulary[w] for w in caption] for caption in split]
            company = _company_codes(ids, len(words), dim // 2)
            table = torch.cat([company, _random_codes(len(words), dim - dim // 2, seed)], dim=1)
        else:
            raise ValueError(f"caption codes are 'semantic' or 'random', got {codes!r}")
        return cls(_tokenizer(vocabulary), table, length)

    @property
    def shape(self) -> tuple[int, int]:
        return (self.length, self.codes.shape[1])

    def encode(self, captions: Sequence[str]) -> Tensor:
        """Captions -> (B, length, dim) float32.

        Raises:
            ValueError: an empty or overlong caption, or unknown words (with the nearest known).
        """
        return self.codes[self.encode_ids(captions)]

    def encode_ids(self, captions: Sequence[str]) -> Tensor:
        """Captions -> token ids (B, length) int64, filled up with the end token."""
        rows = []
        for caption in captions:
            words = self._known_words(caption)
            ids = [self.tokenizer.token_to_id(w) for w in words]
            rows.append(ids + [0] * (self.length - len(ids)))
        return torch.tensor(rows)

    def to_disk(self, captions: Sequence[str]) -> dict[str, Tensor]:
        """What features keep: ``ids`` (B, length) int32, far smaller than codes, and exact."""
        return {"ids": self.encode_ids(captions).int()}

    def from_disk(
        self, name: str, stored: dict[str, Tensor], generators: object = None
    ) -> dict[str, Tensor]:
        """The codes of what :meth:`to_disk` made."""
        return {name: self.codes[stored["ids"].long()]}

    def split(self, caption: str) -> list[str]:
        """A caption's words and marks, known or not."""
        return words_of(caption)

    def refuses(self, caption: str) -> str | None:
        """Why a caption cannot be encoded, in two or three words; None where it can."""
        split = self.split(caption)
        if len(split) > self.length:
            return "caption too long"
        known = all(w in self._known or w.casefold() in self._folded for w in split)
        return None if known else "unknown words"

    def _known_words(self, caption: str) -> list[str]:
        """The caption's tokens, in the vocabulary's own case."""
        if not isinstance(caption, str):
            raise ValueError(f"a caption must be a string, got {type(caption).__name__}")
        split = self.split(caption)
        if not split:
            raise ValueError("the caption is empty: write at least one word")
        known = [w if w in self._known else self._folded.get(w.casefold()) for w in split]
        unknown = [w for w, k in zip(split, known, strict=True) if k is None]
        if unknown:
            hints = "; ".join(self._nearest(w) for w in dict.fromkeys(unknown))
            raise ValueError(f"the model knows {len(self.words) - 1:,} words, but not {hints}")
        if len(split) > self.length:
            raise ValueError(f"the caption has {len(split)} tokens (words and punctuation marks), "
                             f"more than the {self.length} the model reads: {caption!r}")
        return known

    def _nearest(self, word: str) -> str:
        near = difflib.get_close_matches(word.casefold(), self._folded, n=3, cutoff=0.6)
        words = ", ".join(repr(self._folded[w]) for w in near)
        return f"{word!r} (nearest: {words})" if near else f"{word!r} (nothing near it)"

    def decode(self, z: Tensor) -> list[str]:
        """(B, length, dim) -> captions: the nearest word of each vector, up to the first end."""
        ids = torch.cdist(z.float().cpu().flatten(0, 1), self.codes).argmin(1)
        return [self.join([self.words[i] for i in row]) for row in ids.view(len(z), -1).tolist()]

    @staticmethod
    def join(words: Sequence[str]) -> str:
        """Words and marks up to the first end -> text with the usual spaces."""
        text = ""
        for word in words:
            if word == END:
                break
            tight = not text or word in _CLOSING or text[-1] in _OPENING
            text += word if tight else " " + word
        return text

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """What a checkpoint stores: JSON values, and tensors."""
        return ({"length": self.length, "tokenizer": json.loads(self.tokenizer.to_str())},
                {"codes": self.codes})

    @classmethod
    def from_state(cls, config: dict[str, Any], tensors: dict[str, Tensor]) -> "WordCodec":
        try:
            tokenizer = Tokenizer.from_str(json.dumps(config["tokenizer"]))
        except Exception as error:  # the library raises no narrower one
            raise ValueError(f"the stored tokenizer cannot be read: {error}") from None
        return cls(tokenizer, tensors["codes"], config["length"])


def _random_codes(size: int, dim: int, seed: int) -> Tensor:
    return _unit(torch.randn(size, dim, generator=torch.Generator().manual_seed(seed)))


def _company_codes(captions: list[list[int]], size: int, dim: int) -> Tensor:
    """(size, dim) codes from co-occurrence: words in like company get like codes."""
    counts = torch.zeros(size, size, dtype=torch.float64)
    for ids in captions:
        row = torch.tensor([0, *ids])  # every caption holds the end token too
        counts.index_put_((row[:, None], row[None, :]), torch.ones(()).double(), accumulate=True)
    total, per_word = counts.sum(), counts.sum(1, keepdim=True).clamp(min=1)
    ppmi = (counts * total / per_word / per_word.T).log().clamp(min=0)
    u, s, _ = torch.linalg.svd(ppmi.fill_diagonal_(0))
    codes = u[:, :dim] * s[:dim].sqrt()
    sign = codes.gather(0, codes.abs().argmax(0, keepdim=True)).sign()  # SVD leaves signs open
    return _unit((codes * sign).float())


def _unit(codes: Tensor) -> Tensor:
    """Each row scaled to mean square 1; a row of (almost) nothing stays near 0."""
    return codes / codes.square().mean(1, keepdim=True).sqrt().clamp(min=1e-3)
