"""A CLIP tokenizer for the scenes: every word of the captions is one token, anything else falls apart into bytes."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from quest.diffusion import scenes

MAX_LENGTH = 20  # the longest caption has 15 words
END_OF_WORD = "</w>"


def learn_merges(words):
    """Byte-pair merges that make each word one token: the most frequent pair first, ties in alphabetical order."""
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    merges = []
    while any(len(p) > 1 for p in pieces):
        pairs = Counter(pair for p in pieces for pair in pairwise(p))
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        pieces = [_merge(p, best) for p in pieces]
    return merges


def _merge(pieces, pair):
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def build_tokenizer():
    """A stock CLIPTokenizer; the empty prompt is a start and an end token."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = learn_merges(scenes.vocabulary())
    tokens = letters + [c + END_OF_WORD for c in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=MAX_LENGTH)


def encode(tokenizer, captions):
    """Token ids, int64 [N, 20]."""
    return tokenizer(
        captions, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids
