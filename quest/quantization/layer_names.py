"""Layers by their names in denoisers of diffusers: their minimum bits, and the class to which each belongs.

For example, `keep: {"conv_in": 8, "*.conv_shortcut": 32}` means: `conv_in` has at least 8 bits, all shortcuts stay in
float, and all other layers have the bits of the cell. The first pattern that matches counts.
"""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from numbers import Integral

Keep = dict[str, int | list[int]]  # glob over layer names -> minimum bits of weight and input, or [weight, input]


def layer_bits(name: str, w: int, a: int, keep: Keep) -> tuple[int, int]:
    """Return weight and input bits of a layer: at least those of the first glob in `keep` that matches, else (w, a).

    For the `processor` of an attention they are the bits of q, k and v, and those of the probabilities.
    """
    for glob, bits in keep.items():
        if fnmatch(name, glob):
            kept_w, kept_a = bits if isinstance(bits, list | tuple) else (bits, bits)
            return max(kept_w, w), max(kept_a, a)
    return w, a


def fault(keep) -> str | None:
    """Explain why a value is no `Keep`. Returns None for one."""
    if not isinstance(keep, Mapping):
        return f"{keep!r} is no mapping of layer names to bits, such as {{'conv_in': 8}}"
    for glob, bits in keep.items():
        pair = bits if isinstance(bits, list | tuple) else (bits, bits)
        numbers = [n for n in pair if isinstance(n, Integral) and not isinstance(n, bool) and (2 <= n <= 16 or n == 32)]
        if not isinstance(glob, str) or len(pair) != 2 or len(numbers) != 2:
            return f"{glob!r}: {bits!r}; valid: a layer name and its bits, 2 to 16 or 32, or [weight, input] bits"
    return None


# The first and the last layer of U-Nets and of transformers. The released QuEST keeps both at 8 bits.
BOUNDARY = ("conv_in", "conv_out", "pos_embed.proj", "proj_out", "proj_out_2")
KEEP = dict.fromkeys(BOUNDARY, 8)


# Layers that some denoisers lack: residual blocks may resample instead of convolutions, and attention may stand in
# transformers. `keep` may name them for any model.
OPTIONAL = ("*.conv_shortcut", "*.downsamplers.*.conv", "*.attentions.?.to_*", *BOUNDARY[2:])


def check(names: Sequence[str], keep: Keep) -> None:
    """Raise ValueError for a glob that matches none of these layers and processors, unless not every denoiser has such.

    Of KEEP, which names the first and last layers of U-Nets and of transformers, one must be there.
    """
    absent = [glob for glob in keep if not any(fnmatch(name, glob) for name in names)]
    if keep is KEEP and len(absent) == len(keep):
        raise ValueError(f"keep: no first or last layer is named {' or '.join(KEEP)}; say how they are named here")
    for glob in absent:
        if keep is not KEEP and glob not in OPTIONAL:
            raise ValueError(f"keep: no layer is named like {glob!r}; names are such as {', '.join(names[:3])}")


LAYER_CLASSES = (  # first match wins; names are those of diffusers' U-Nets and transformers
    ("boundary", BOUNDARY),
    ("time embedding", ("time_embedding.*", "*time_emb_proj", "*.timestep_embedder.*", "time_text_embed.*")),
    ("time embedding", ("add_embedding.*", "*norm*.linear", "adaln_single.*", "proj_out_1")),
    ("attention q, k, v", ("*.to_q", "*.to_k", "*.to_v", "*.add_?_proj")),
    ("attention output", ("*.to_out.*", "*.to_add_out")),
    ("feed-forward", ("*.ff.net.*", "*.ff_context.net.*")),
    ("transformer in, out", ("*.proj_in", "*.proj_out")),
    ("shortcut", ("*.conv_shortcut",)),
    ("resampling", ("*samplers.*",)),
    ("residual convolution", ("*.conv1", "*.conv2")),
)


def layer_class(name: str) -> str:
    """Return the class of a layer by its name in a denoiser of diffusers, for figures and sensitivity tables."""
    return next((c for c, globs in LAYER_CLASSES if any(fnmatch(name, g) for g in globs)), "other")
