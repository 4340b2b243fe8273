"""Train a class-conditional denoiser of one-dimensional signals. It takes minutes, so the weights need not ship.

It has Linear layers and convolutions of height 1, and the parts that QuEST names: a time embedding projected into every
residual block, attention to the class and within the signal, and feed-forward layers. Every method of the suite can
quantize it without changes, like a `unet` of diffusers.
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.embeddings import TimestepEmbedding, Timesteps
from diffusers.models.modeling_utils import ModelMixin
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file, save_file
from torch import nn

from quest.diffusion.models import Model
from quest.diffusion.pipelines import ClassEmbedder, LatentDiffusionPipeline
from quest.runtime import command_line
from quest.runtime.files import atomic
from quest.zoo import signals
from quest.zoo.architectures import SCHEDULE
from quest.zoo.training import Average, Progress, constant_then_decay, descend, generator

CONTEXT = 32  # width of a class token
LEARNING_RATE = 2e-3
SEED = 0


class ResidualBlock(nn.Module):
    """Two convolutions of height 1 with the time embedding added in between."""

    def __init__(self, before: int, after: int, embedding: int):
        super().__init__()
        self.norm1, self.norm2 = nn.GroupNorm(8, before), nn.GroupNorm(8, after)
        self.conv1 = nn.Conv2d(before, after, (1, 3), padding=(0, 1))
        self.conv2 = nn.Conv2d(after, after, (1, 3), padding=(0, 1))
        self.time_emb_proj = nn.Linear(embedding, after)
        self.conv_shortcut = nn.Conv2d(before, after, 1) if before != after else None

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = y + self.time_emb_proj(F.silu(embedding))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Transformer(nn.Module):
    """Attention within the signal and to the class tokens."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.GroupNorm(8, width)
        self.block = BasicTransformerBlock(width, 4, width // 4, cross_attention_dim=CONTEXT)

    def forward(self, x: torch.Tensor, context: torch.Tensor) -> torch.Tensor:
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, L, C]
        return x + self.block(tokens, encoder_hidden_states=context).transpose(1, 2).view_as(x)


class SignalDenoiser(ModelMixin, ConfigMixin):
    """Predict the noise [B, 1, 1, L] in sample [B, 1, 1, L] from the timestep and class tokens [B, m, CONTEXT]."""

    @register_to_config
    def __init__(
        self,
        sample_size: tuple[int, int] = (1, signals.LENGTH),
        in_channels: int = 1,
        cross_attention_dim: int = CONTEXT,
        width: int = 32,
    ):
        super().__init__()
        wide, embedding = 2 * width, 4 * width
        self.time_proj = Timesteps(width, True, 0)
        self.time_embedding = TimestepEmbedding(width, embedding)
        self.conv_in = nn.Conv2d(in_channels, width, (1, 3), padding=(0, 1))
        self.down = ResidualBlock(width, width, embedding)
        self.downsamplers = nn.ModuleList([nn.Conv2d(width, width, (1, 3), stride=(1, 2), padding=(0, 1))])
        self.inner = nn.ModuleList([ResidualBlock(width, wide, embedding), ResidualBlock(wide, wide, embedding)])
        self.transformers = nn.ModuleList([Transformer(wide), Transformer(wide)])
        self.upsamplers = nn.ModuleList([nn.Conv2d(wide, wide, (1, 3), padding=(0, 1))])
        self.up = ResidualBlock(wide + width, width, embedding)
        self.norm_out = nn.GroupNorm(8, width)
        self.conv_out = nn.Conv2d(width, in_channels, (1, 3), padding=(0, 1))

    def forward(self, sample, timestep, encoder_hidden_states=None, return_dict: bool = True):
        timestep = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        embedding = self.time_embedding(self.time_proj(timestep).to(sample.dtype))
        x = skip = self.down(self.conv_in(sample), embedding)
        x = self.downsamplers[0](x)
        for block, transformer in zip(self.inner, self.transformers, strict=True):
            x = transformer(block(x, embedding), encoder_hidden_states)
        x = self.upsamplers[0](x.repeat_interleave(2, dim=3))
        x = self.up(torch.cat([x, skip], 1), embedding)
        x = self.conv_out(F.silu(self.norm_out(x)))
        return UNet2DOutput(sample=x) if return_dict else (x,)


def pipeline() -> LatentDiffusionPipeline:
    """The untrained model as a pipeline without an autoencoder."""
    scheduler = DDIMScheduler(**SCHEDULE, steps_offset=1, clip_sample=False, set_alpha_to_one=False)
    embedder = ClassEmbedder(num_classes=len(signals.CLASSES), tokens=2, dim=CONTEXT)
    return LatentDiffusionPipeline(SignalDenoiser(), None, scheduler, embedder).to("cpu")


def model(weights: str | Path) -> Model:
    """The trained model and its protocol."""

    def load(device="cpu"):
        pipe, tensors = pipeline(), load_file(weights)
        for name in ("unet", "class_embedder"):
            state = {k.removeprefix(f"{name}."): v for k, v in tensors.items() if k.startswith(f"{name}.")}
            getattr(pipe, name).load_state_dict(state)
            getattr(pipe, name).eval().requires_grad_(False)
        pipe.set_progress_bar_config(disable=True)
        return pipe.to(device)

    return Model(
        name="signals",
        load=load,
        sampler="ddim",
        steps=20,
        conditioning="class",
        source=lambda split, start, stop: [i % len(signals.CLASSES) for i in range(start, stop)],
        selection="imagenet",
        batch_size=50,
        time_groups=20,
    )


def train(out: str | Path, iterations: int = 2000, batch: int = 32, examples: int = 16_384) -> float:
    """Write the averaged weights to `out`; return the mean error of the last tenth of the batches."""
    torch.manual_seed(SEED)
    pipe = pipeline()
    modules = [pipe.unet, pipe.class_embedder]
    parameters = [p for m in modules for p in m.train().requires_grad_().parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-3)
    average = Average(parameters, 0.998)
    drawn = signals.draw("train", examples)
    values, labels = torch.from_numpy(drawn.values)[:, None, None], torch.from_numpy(drawn.labels)
    alphas = pipe.scheduler.alphas_cumprod
    progress, errors = Progress("signals", 0, iterations, 250), []
    for i in range(iterations):
        g = generator(SEED, i)
        rows, t = torch.randint(len(values), (batch,), generator=g), torch.randint(0, 1000, (batch,), generator=g)
        noise = torch.randn(values[rows].shape, generator=g)
        signal = alphas[t].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * values[rows] + (1 - signal).sqrt() * noise
        loss = F.mse_loss(pipe.unet(noisy, t, pipe.class_embedder(labels[rows])).sample, noise)
        descend(loss, optimizer, LEARNING_RATE * constant_then_decay(i, iterations))
        average.update(i)
        errors.append(loss.item())
        progress(i + 1, error=loss)
    average.swap()
    with atomic(out) as file:
        save_file(
            {
                **{f"unet.{k}": v for k, v in pipe.unet.state_dict().items()},
                **{f"class_embedder.{k}": v for k, v in pipe.class_embedder.state_dict().items()},
            },
            file,
        )
    last = errors[-max(1, iterations // 10) :]
    return sum(last) / len(last)


def main() -> None:
    parser = command_line.parser(__doc__, "file", "threads")
    parser.add_argument("--iterations", type=int, default=2000, help="batches of 32 (default %(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"error of the last batches: {train(arguments.output, arguments.iterations):.4f}", flush=True)


if __name__ == "__main__":
    main()
