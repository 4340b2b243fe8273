"""A CLIP tokenizer with one token for every word of the captions; other words are split into pieces."""

from collections import Counter
from itertools import pairwise

from transformers import CLIPTokenizer

from quest.diffusion import scenes
from quest.zoo import pictures

# Number of tokens of the longest caption, with the start and end tokens.
MAX_LENGTH = {"scenes": 20, "emoji": 24}
END_OF_WORD = "</w>"


def learn_merges(words):
    """Byte-pair merges that make each word one token: the most frequent pair first, ties in alphabetical order."""
    pieces = [[*word[:-1], word[-1] + END_OF_WORD] for word in words]
    pairs = Counter(pair for p in pieces for pair in pairwise(p))
    merges = []
    while pairs:
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        for i, p in enumerate(pieces):
            if best in pairwise(p):
                pairs.subtract(pairwise(p))
                pieces[i] = _merge(p, best)
                pairs.update(pairwise(pieces[i]))
        pairs = +pairs  # drops pairs that no longer occur in any word
    return merges


def _merge(pieces, pair):
    out = []
    for piece in pieces:
        if out and (out[-1], piece) == pair:
            out[-1] += piece
        else:
            out.append(piece)
    return out


def caption_words(captions, at_least=2):
    """Words and punctuation marks that occur at least `at_least` times, sorted; rarer ones are split into pieces."""
    counts = Counter(word for caption in captions for word in pictures.words(caption))
    return sorted(word for word, count in counts.items() if count >= at_least and word.isascii())


def build_tokenizer(words=None, max_length=MAX_LENGTH["scenes"]):
    """A stock CLIPTokenizer of `words` (default: those of the scenes); the empty prompt is a start and an end token."""
    letters = [chr(c) for c in range(ord("!"), ord("~") + 1)]
    merges = learn_merges(scenes.vocabulary() if words is None else words)
    tokens = letters + [c + END_OF_WORD for c in letters] + ["".join(pair) for pair in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return CLIPTokenizer(vocab={token: i for i, token in enumerate(tokens)}, merges=merges, model_max_length=max_length)


def encode(tokenizer, captions):
    """Token ids, int64 [N, L] for a tokenizer of up to L tokens."""
    return tokenizer(
        captions, padding="max_length", max_length=tokenizer.model_max_length, truncation=True, return_tensors="pt"
    ).input_ids
