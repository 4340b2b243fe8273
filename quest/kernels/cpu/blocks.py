"""Fused forms of the blocks of diffusers' U-Nets, for a denoiser whose layers run on integers.

Integer convolutions and products take a third of the time of float ones. Norms, activations and Python then take most
of a step. Here a norm and its activation are one pass over tensors whose channels lie innermost, and no tensor is
copied to another layout. A block whose layers all run on integers is one call of the core (`fused`):

    FusedResnetBlock   norm + SiLU ── conv1 ── norm + modulation + SiLU ── conv2 + residual or shortcut
    FusedTransformer   norm ── proj_in ── FusedTransformerBlock ── proj_out + residual

Results equal those of diffusers' modules except for float rounding. While torch traces or needs gradients, the modules
compute as diffusers does.
"""

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from diffusers.models.unets.unet_2d import UNet2DModel
from diffusers.models.upsampling import Upsample2D
from torch import Tensor, nn
from torch.nn import functional as F

from quest.kernels.cpu import fused
from quest.kernels.cpu.core import block_calls, calls
from quest.kernels.cpu.integer import bare, computes, fuses, on_integers, plus


def group_norm(x: Tensor, norm: nn.GroupNorm, silu: bool, **more: Tensor | None) -> Tensor:
    """Compute the group norm of x, and then SiLU if `silu`. more: `shift`, `modulation` (see `calls.group_norm`)."""
    return calls.group_norm(x, norm.num_groups, norm.weight, norm.bias, norm.eps, silu=silu, **more)


class FusedGroupNorm(nn.GroupNorm):
    """A group norm in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        return group_norm(x, self, silu=False) if computes(x) and x.ndim in (3, 4) else super().forward(x)


class FusedLayerNorm(nn.LayerNorm):
    """A layer norm in one pass."""

    def forward(self, x: Tensor) -> Tensor:
        if not computes(x) or len(self.normalized_shape) != 1:
            return super().forward(x)
        return calls.layer_norm(x, self.weight, self.bias, self.eps)


class FusedGEGLU(GEGLU):
    """The gated layer of a feed-forward: the product and its gelu are one call."""

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        if not fuses(self.proj, hidden_states):
            return super().forward(hidden_states, *args, **kwargs)
        return self.proj(hidden_states, gated=True)


def alone(x: Tensor, context: Tensor | None, *args, **kwargs) -> bool:
    """Return whether the core can read x and context, and nothing else is given that changes the output."""
    given = [value for name, value in kwargs.items() if name not in ("timestep", "class_labels", "return_dict")]
    return all(v is None for v in (*args, *given)) and computes(x) and (context is None or computes(context))


class FusedTransformerBlock(BasicTransformerBlock):
    """A transformer block in one call: norms, one or two attentions, and the feed-forward."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        *args,
        **kwargs,
    ) -> Tensor:
        plain = attention_mask is None and alone(hidden_states, encoder_hidden_states, *args, **kwargs)
        struct = fused.struct_of(self, transformer_block) if plain else None
        if struct is None:
            return super().forward(hidden_states, attention_mask, encoder_hidden_states, *args, **kwargs)
        return block_calls.transformer_block(struct, hidden_states, encoder_hidden_states)


def transformer_block(block: FusedTransformerBlock) -> fused.Block | None:
    """Return what the core needs to compute the block; None if it cannot."""
    modules = [a for a in (block.attn1, block.attn2) if a is not None]
    plain = (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and all(isinstance(a, Attention) and not a.residual_connection for a in modules)
        and len(block.ff.net) == 3
        and type(block.ff.net[0]) is FusedGEGLU
        and fused.idle(block.ff.net[1])
        and all(type(norm) is FusedLayerNorm for norm in (block.norm1, block.norm2, block.norm3) if norm is not None)
    )
    attentions = [fused.attention(a) for a in modules] if plain else [None]
    if None in attentions or not on_integers(block.ff.net[0].proj, block.ff.net[2]):
        return None
    layers = block.ff.net[0].proj, block.ff.net[2]
    norms = block.norm1, block.norm2 if len(modules) == 2 else block.norm1, block.norm3

    def struct():
        return block_calls.TransformerBlock(
            tuple(map(fused.norm, norms)),
            tuple(a.make() for a in attentions),
            len(attentions),
            bool(block.only_cross_attention),
            *map(fused.layer, layers),
        )

    inside = [part for a in attentions for part in a.parts]
    return fused.Block(struct, (block, *norms, *inside, block.ff, block.ff.net, *block.ff.net, layers[0]))


class FusedResnetBlock(ResnetBlock2D):
    """A residual block in one call, or, if it resamples or has other convolutions, with norm and SiLU in one pass."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args, **kwargs) -> Tensor:
        # diffusers allows an embedding of one sample for all samples; the core does not.
        plain = computes(input_tensor) and (temb is None or (computes(temb) and len(temb) == len(input_tensor)))
        struct = fused.struct_of(self, resnet_block) if plain else None
        if struct is None and not (plain and self.known()):
            return super().forward(input_tensor, temb, *args, **kwargs)
        embedding = None
        if self.time_emb_proj is not None and temb is not None:
            embedding = (temb if self.skip_time_act else F.silu(temb)).contiguous()
        if struct is not None:
            input_tensor = input_tensor.contiguous(memory_format=torch.channels_last)
            residual = None
            if not struct.shortcut.weight:
                residual = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
            return block_calls.resnet_block(struct, input_tensor, embedding, residual, self.conv2.operand.shape[0])
        hidden = group_norm(input_tensor, self.norm1, silu=True)
        resample = self.upsample if self.upsample is not None else self.downsample
        if resample is not None:
            input_tensor, hidden = resample(input_tensor), resample(hidden)
        hidden = self.conv1(hidden)
        if embedding is not None:
            embedding = self.time_emb_proj(embedding).contiguous()
        added = "modulation" if self.time_embedding_norm == "scale_shift" else "shift"
        hidden = group_norm(hidden, self.norm2, True, **{added: embedding})
        if self.conv_shortcut is not None:
            input_tensor = self.conv_shortcut(input_tensor)
        output = plus(self.conv2, hidden, input_tensor)
        return output if self.output_scale_factor == 1 else output / self.output_scale_factor

    def known(self) -> bool:
        """Return whether norms, activation and dropout are of the kinds computed here, without hooks."""
        return (
            self.time_embedding_norm in ("default", "scale_shift")
            and type(self.norm1) is type(self.norm2) is FusedGroupNorm
            and type(self.nonlinearity) is nn.SiLU
            and fused.idle(self.dropout)
            and bare(self.norm1, self.norm2, self.nonlinearity, self.dropout)
        )


def resnet_block(block: FusedResnetBlock) -> fused.Block | None:
    """Return what the core needs to compute the block; None if it cannot."""
    layers = [block.conv1, block.conv2] + ([] if block.time_emb_proj is None else [block.time_emb_proj])
    if not block.known() or not on_integers(*layers):
        return None
    same = [(c.kernel_size, c.stride, c.padding, c.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1)) for c in layers[:2]]
    resampled = block.upsample is not None or block.downsample is not None
    if resampled or block.output_scale_factor != 1 or not all(same) or layers[0].out_channels != layers[1].out_channels:
        return None
    shortcut = [block.conv_shortcut] if projects(block.conv_shortcut, nn.Conv2d) else []

    def struct():
        embedding = layers[2] if len(layers) == 3 else layers[0]  # the core does not read it if there is none
        return block_calls.ResnetBlock(
            (fused.norm(block.norm1), fused.norm(block.norm2)),
            *map(fused.layer, (block.conv1, embedding, block.conv2)),
            fused.layer(shortcut[0]) if shortcut else block_calls.Layer(),
            block.time_embedding_norm == "scale_shift",
        )

    norms = block.norm1, block.norm2
    return fused.Block(struct, (block, *norms, block.nonlinearity, block.dropout, *layers, *shortcut))


def projects(layer: nn.Module | None, kind: type[nn.Module]) -> bool:
    """Return whether a layer is of this kind, runs on integers, and computes each pixel or token by itself."""
    if layer is None or not on_integers(layer) or not isinstance(layer, kind):
        return False
    return kind is nn.Linear or (layer.kernel_size, layer.stride, layer.padding) == ((1, 1), (1, 1), (0, 0))


class FusedUpsample(Upsample2D):
    """Upsampling that keeps channels innermost."""

    def forward(self, hidden_states: Tensor, output_size=None, *args, **kwargs) -> Tensor:
        plain = self.norm is None and self.interpolate and not self.use_conv_transpose
        if not computes(hidden_states) or not plain or output_size is not None:
            return super().forward(hidden_states, output_size, *args, **kwargs)
        # diffusers changes the layout of large batches here, because a function for GPUs cannot handle theirs.
        hidden_states = F.interpolate(hidden_states, scale_factor=2.0, mode="nearest")
        if not self.use_conv:
            return hidden_states
        return (self.conv if self.name == "conv" else self.Conv2d_0)(hidden_states)


class FusedUNet2DModel(UNet2DModel):
    """A U-Net whose dtype is looked up fast."""

    @property
    def dtype(self) -> torch.dtype:
        # diffusers searches all modules for the dtype in each forward pass.
        return next(self.parameters()).dtype


class FusedTransformer(Transformer2DModel):
    """A transformer in one call, or, if it has other layers or several blocks, with channels innermost around them."""

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, *args, **kwargs):
        plain = alone(hidden_states, encoder_hidden_states, *args, **kwargs)
        struct = fused.struct_of(self, transformer) if plain else None
        if struct is None:
            return super().forward(hidden_states, encoder_hidden_states, *args, **kwargs)
        output = block_calls.transformer(struct, hidden_states, encoder_hidden_states)
        return Transformer2DModelOutput(sample=output) if kwargs.get("return_dict", True) else (output,)

    def _get_output_for_continuous_inputs(self, hidden_states, residual, batch_size, height, width, inner_dim):
        if not self.use_linear_projection and computes(hidden_states):
            # diffusers would copy the tensor to another layout here.
            hidden_states = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
            return plus(self.proj_out, hidden_states, residual)
        return super()._get_output_for_continuous_inputs(hidden_states, residual, batch_size, height, width, inner_dim)


def transformer(module: FusedTransformer) -> fused.Block | None:
    """Return what the core needs to compute the transformer; None if it cannot."""
    if not module.is_input_continuous or len(module.transformer_blocks) != 1:
        return None
    norm, layers, block = module.norm, (module.proj_in, module.proj_out), module.transformer_blocks[0]
    kind = nn.Linear if module.use_linear_projection else nn.Conv2d
    inner = transformer_block(block) if type(block) is FusedTransformerBlock else None
    if inner is None or type(norm) is not FusedGroupNorm or not all(projects(layer, kind) for layer in layers):
        return None
    # diffusers adds the residual to the output of a linear layer; the core adds it to the sum of the first group.
    specs = module.proj_out.weight_quantizer.spec, module.proj_out.input_quantizer.spec
    if kind is nn.Linear and any(spec.group is not None for spec in specs):
        return None

    def struct():
        first, last = map(fused.layer, layers)
        return block_calls.Transformer(fused.norm(norm), first, inner.make(), last)

    return fused.Block(struct, (module, norm, *layers, module.transformer_blocks, *inner.parts))


FUSED = {
    nn.GroupNorm: FusedGroupNorm,
    nn.LayerNorm: FusedLayerNorm,
    GEGLU: FusedGEGLU,
    BasicTransformerBlock: FusedTransformerBlock,
    ResnetBlock2D: FusedResnetBlock,
    Upsample2D: FusedUpsample,
    Transformer2DModel: FusedTransformer,
    UNet2DModel: FusedUNet2DModel,
}


def fuse(denoiser: nn.Module) -> None:
    """Give every module of a class in FUSED its fused class: other code, the same weights."""
    fused.forget(denoiser)
    for module in denoiser.modules():
        module.__class__ = FUSED.get(type(module), type(module))


def unfuse(denoiser: nn.Module) -> None:
    """Give every module its class in diffusers again."""
    fused.forget(denoiser)
    plain = {mine: kind for kind, mine in FUSED.items()}
    for module in denoiser.modules():
        module.__class__ = plain.get(type(module), type(module))
