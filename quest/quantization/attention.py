"""Quantized attention: a diffusers attention processor that quantizes q, k, v and the softmax probabilities."""

from types import ModuleType

from torch import Tensor, nn

from quest import kernels
from quest.affine import QuantSpec, fake_quantize
from quest.kernels import reference
from quest.kernels.cpu import fused
from quest.quantization.quantizer import Quantizer
from quest.quantization.timegroups import TimeGroups


class QuantAttention(nn.Module):
    """Stands in for `AttnProcessor`: the same computation, with both matrix products through the kernel.

    Probabilities lie in [0, 1] and take the range [0, max] with zero point 0, as in Q-Diffusion; their width is usually
    8 bits whatever the activations have.
    """

    kernel_name = "reference"

    @property
    def kernel(self) -> ModuleType:
        return kernels.get(self.kernel_name)

    def __init__(self, spec: QuantSpec, probability_spec: QuantSpec, groups: TimeGroups | None = None):
        super().__init__()
        self.q, self.k, self.v = (Quantizer(spec, groups=groups) for _ in range(3))
        self.p = Quantizer(probability_spec, groups=groups)
        self.p.may_be_constant = True  # attention to a single token (a class, in ImageNet's LDM-4) has probability 1

    # diffusers reads the processor's arguments off `__call__`.
    def __call__(
        self,
        attn: nn.Module,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """hidden_states [B, C, H, W] or [B, n, C], encoder_hidden_states [B, m, C'] -> as hidden_states."""
        if attention_mask is not None or attn.spatial_norm is not None or attn.norm_cross:
            raise NotImplementedError("quantized attention has no masks, spatial norms or cross norms")
        given = hidden_states
        if given.ndim == 4:
            hidden_states = given.flatten(2).transpose(1, 2)
        rows = hidden_states
        if attn.group_norm is not None:
            hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
        context = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        x = fused.attended(attn, hidden_states, context, rows if attn.residual_connection else None)
        if x is not None:
            # With the strides of channels that lie innermost, which torch asks for, of a single image, too.
            return x if given.ndim == 3 else x.unflatten(1, given.shape[2:]).permute(0, 3, 1, 2)
        x = attn.to_out[1](attn.to_out[0](self.attended(attn, hidden_states, context)))
        if given.ndim == 4:
            x = x.transpose(1, 2).reshape(given.shape)
        if attn.residual_connection:
            x = x + given
        return x if attn.rescale_output_factor == 1 else x / attn.rescale_output_factor

    def attended(self, attn: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        """x [B, n, C], context [B, m, C'] -> [B, n, heads * d], before the last layer."""
        q, k, v = attn.to_q(x), attn.to_k(context), attn.to_v(context)
        # Module's own call: hooks and block reconstruction meet the two products as a module of its own.
        if self.kernel_name == "reference":
            q, k, v = map(attn.head_to_batch_dim, (q, k, v))  # [B * heads, n, d]
            return attn.batch_to_head_dim(nn.Module.__call__(self, q, k, v, attn.scale))
        # Other kernels read rows where they are: no copies.
        q, k, v = (t.unflatten(2, (attn.heads, -1)).transpose(1, 2) for t in (q, k, v))  # [B, heads, n, d]
        return nn.Module.__call__(self, q, k, v, attn.scale).transpose(1, 2).flatten(2)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """The two products: q [B * heads, n, d], k and v [B * heads, m, d] -> [B * heads, n, d].

        Kernels other than the reference also take [B, heads, n, d].
        """
        q_params, k_params, v_params = self.q(q), self.k(k), self.v(v)
        if self.p.choose is not None:
            p = reference.observed_probabilities(fake_quantize(q, q_params), fake_quantize(k, k_params), scale)
            self.p.calibrate(p, self.p.choose)
        return self.kernel.attention(q, k, v, q_params, k_params, v_params, self.p.qparams, scale)


fused.PROCESSORS.append(QuantAttention)
