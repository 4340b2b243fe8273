"""Quantized attention: a diffusers attention processor that quantizes q, k, v and the softmax probabilities.

    x ───────── to_q ── q ─┐
                           ├─ q k^T * scale ── softmax ── p ─┐
    context ─┬─ to_k ── k ─┘                                 ├─ p v ── to_out
             └─ to_v ── v ───────────────────────────────────┘

The three projections and `to_out` are quantized layers. The tensors named q, k, v and p each have a quantizer here.
"""

from dataclasses import replace
from types import ModuleType

import torch
from torch import Tensor, nn

from quest import kernels
from quest.affine import QParams, QuantSpec, fake_quantize
from quest.kernels import reference
from quest.kernels.cpu import fused
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


class QuantAttention(nn.Module):
    """Replaces diffusers' `AttnProcessor`. The computation is the same, but the kernel computes both matrix products.

    Probabilities lie in [0, 1]. Their range is [0, max] with zero point 0, as in Q-Diffusion. They usually have 8 bits,
    whatever the bits of other activations.
    """

    kernel_name = "reference"
    masked = False  # whether the last call had a mask; only the reference kernel computes with one

    @property
    def kernel(self) -> ModuleType:
        return kernels.get(self.kernel_name)

    def __init__(self, spec: QuantSpec, probability_spec: QuantSpec, groups: TimeGroups | None = None):
        super().__init__()
        self.q, self.k, self.v = (Quantizer(spec, groups=groups) for _ in range(3))
        if spec.dynamic:  # q and k are summed over channels, p and v over tokens
            self.v = Quantizer(replace(spec, axis=-2), groups=groups)
        self.p = Quantizer(probability_spec, groups=groups)
        self.p.may_be_constant = True  # the probability of a single token (the class in ImageNet's LDM-4) is always 1

    # diffusers inspects the signature of `__call__` to find out which arguments a processor takes.
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attend from hidden_states, [B, C, H, W] or [B, n, C], to encoder_hidden_states [B, m, C'] or to itself.

        attention_mask [B, 1, m] is added to the logits. Returns a tensor of the shape of hidden_states; joint attention
        (SD3) returns both of its streams. Raises NotImplementedError for an attention with spatial or cross norms.
        """
        if attn.spatial_norm is not None or attn.norm_cross:
            raise NotImplementedError("quantized attention has no spatial norms or cross norms")
        if attn.added_kv_proj_dim is not None and encoder_hidden_states is not None:
            return self.joint(attn, hidden_states, encoder_hidden_states)
        given = hidden_states
        if given.ndim == 4:
            hidden_states = given.flatten(2).transpose(1, 2)
        rows = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        x = None
        if attention_mask is None and attn.norm_q is None and attn.norm_k is None:
            x = fused.attended(attn, hidden_states, context, rows if attn.residual_connection else None)
        if x is not None:
            # Channels lie innermost. torch expects the strides of this layout even for a single image.
            return x if given.ndim == 3 else x.unflatten(1, given.shape[2:]).permute(0, 3, 1, 2)
        mask = attn.prepare_attention_mask(attention_mask, context.shape[1], context.shape[0])  # [B * heads, 1, m]
        x = attn.to_out[1](attn.to_out[0](self.attended(attn, hidden_states, context, mask)))
        if given.ndim == 4:
            x = x.transpose(1, 2).reshape(given.shape)
        if attn.residual_connection:
            x = x + given
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor

    def attended(self, attn: nn.Module, x: Tensor, context: Tensor, mask: Tensor | None = None) -> Tensor:
        """x [B, n, C], context [B, m, C'] -> [B, n, heads * d], before the last layer."""
        q, k, v = _heads(attn, attn.to_q(x), attn.to_k(context), attn.to_v(context), attn.norm_q, attn.norm_k)
        return self.products(q, k, v, attn.scale, mask)

    def joint(self, attn: nn.Module, x: Tensor, context: Tensor) -> tuple[Tensor, Tensor]:
        """Attend from two streams, x [B, n, C] and context [B, m, C], to both of them (SD3, arXiv:2403.03206)."""
        own = _heads(attn, attn.to_q(x), attn.to_k(x), attn.to_v(x), attn.norm_q, attn.norm_k)
        added = (attn.add_q_proj(context), attn.add_k_proj(context), attn.add_v_proj(context))
        added = _heads(attn, *added, attn.norm_added_q, attn.norm_added_k)
        q, k, v = (torch.cat(pair, 2) for pair in zip(own, added, strict=True))
        x, context = self.products(q, k, v, attn.scale).split((x.shape[1], context.shape[1]), 1)
        if not attn.context_pre_only:
            context = attn.to_add_out(context)
        return attn.to_out[1](attn.to_out[0](x)), context

    @property
    def formats(self) -> list[QuantSpec]:
        """What a checkpoint's header says: the formats of q and p, or those of q, k, v and p if q, k and v differ."""
        q, k, v, p = (quantizer.spec for quantizer in (self.q, self.k, self.v, self.p))
        same = q == k and v == (replace(q, axis=-2) if q.dynamic else q)
        return [q, p] if same else [q, k, v, p]

    @classmethod
    def of_formats(cls, formats: list[QuantSpec], groups: TimeGroups | None) -> "QuantAttention":
        """Return a processor with these `formats`."""
        new = cls(formats[0], formats[-1], groups)
        if len(formats) > 2:
            new.q.spec, new.k.spec, new.v.spec = formats[:3]
        return new

    def products(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """q [B, heads, n, d], k and v [B, heads, m, d] -> [B, n, heads * d].

        They run through `nn.Module.__call__`, so hooks and block reconstruction see the two products as one module.
        """
        self.masked = mask is not None
        if self.masked or self.kernel_name == "reference":
            flat = (t.flatten(0, 1) for t in (q, k, v))  # [B * heads, n, d]
            masks = () if mask is None else (mask,)
            x = nn.Module.__call__(self, *flat, scale, *masks).unflatten(0, (q.shape[0], -1))
        else:  # other kernels read strided rows, so nothing is copied
            x = nn.Module.__call__(self, q, k, v, scale)
        return x.transpose(1, 2).flatten(2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """The two products: q [B * heads, n, d], k and v [B * heads, m, d] -> [B * heads, n, d].

        Kernels other than the reference also take [B, heads, n, d]. With a mask, the reference kernel computes.
        """
        formats = [self.q(q), self.k(k), self.v(v)]
        if self.p.choose is not None:
            self.p.calibrate(self.observed(q, k, v, scale, mask), self.p.choose)
        formats.append(self.p.qparams)
        if mask is None:
            return self.kernel.attention(q, k, v, formats, scale)
        return reference.attention(q, k, v, [_as_tensors(one) for one in formats], scale, mask)

    def observed(self, q: Tensor, k: Tensor, _v: Tensor, scale: float, mask: Tensor | None = None) -> Tensor:
        """The probabilities from which their range is chosen, see `reference.observed_probabilities`."""
        q, k = fake_quantize(q, self.q.qparams), fake_quantize(k, self.k.qparams)
        return reference.observed_probabilities(q, k, scale, mask)


def _heads(attn: nn.Module, q: Tensor, k: Tensor, v: Tensor, norm_q, norm_k) -> list[Tensor]:
    """Split projections [B, n, heads * d] into [B, heads, n, d], and normalize q and k if the attention does."""
    q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))
    return [q if norm_q is None else norm_q(q), k if norm_k is None else norm_k(k), v]


def _as_tensors(parameters: QParams) -> QParams:
    """Return the parameters as tensors; the integer kernel has them as plain numbers."""
    scale, zero_point = (torch.as_tensor(value, dtype=torch.float32) for value in parameters[:2])
    return QParams(scale, zero_point, parameters.spec)


fused.PROCESSORS.append(QuantAttention)
