"""Tiny random-weight pipelines, one per kind of model, and their `Model` rows.

Built once per session: copy a pipeline before changing it (`model.load()` gives a fresh copy).
"""

import copy
import gc
import json

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
    UNet2DModel,
)
from diffusers.models.attention_processor import Attention
from safetensors.torch import save_file
from tokenizers.pre_tokenizers import ByteLevel
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from quest.affine import FLOAT, QuantSpec
from quest.diffusion.models import Model
from quest.diffusion.pipelines import ClassEmbedder, LatentDiffusionPipeline
from quest.quantization import cost
from quest.quantization import header as headers
from quest.quantization.layer_names import layer_bits
from quest.quantization.layers import quant_layers

torch.set_num_threads(1)


def pytest_collection_finish():
    """Keep what was imported and collected out of garbage collections, which measurements of memory ask for often."""
    gc.freeze()


@pytest.fixture(scope="session")
def write_checkpoint():
    """A function that writes a checkpoint of no layers whose header says so and what it is told."""
    empty = dict.fromkeys(("splits", "layers", "shapes", "attentions", "hashes"), {})
    empty["granularity"] = {"weights": "channel", "activations": "tensor"}
    empty |= {"weights": "codes", "denoiser": "UNet2DModel", "time_groups": None}

    def write(path, **told):
        save_file({"x": torch.zeros(1)}, path, {"quest": json.dumps(headers.sealed(empty | told))})

    return write


@pytest.fixture(scope="session")
def undeclared():
    """A function that lists what in a denoiser has other bits than w, a and `keep` say: "name: bits, not bits".

    A Linear, Conv2d or attention that is not quantized at all is in the list too. Weights whose output channels have
    bits of their own are right if their mean over all such layers is at most w.
    """

    def attention_bits(attention):
        q, k, v, p = (getattr(getattr(attention.processor, n, None), "spec", QuantSpec(FLOAT)).bits for n in "qkvp")
        return max(q, k, v), p

    def wrong(denoiser, w, a, keep, softmax_bits=8):
        layers, (mean, mixed) = dict(quant_layers(denoiser)), cost.mixed_bits(denoiser)
        found = [f"bits of each output channel: {mean:.3f} on average, not {w}"] if mixed and mean > w else []
        for name, module in denoiser.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                whole = name.removesuffix(".hidden").removesuffix(".skip")  # of a split convolution
                bits, expected = (FLOAT, FLOAT), layer_bits(whole, w, a, keep)
                if layer := layers.get(name):
                    activation = layer.output_quantizer or layer.input_quantizer
                    bits = (expected[0] if name in mixed else layer.weight_quantizer.spec.bits, activation.spec.bits)
            elif isinstance(module, Attention):
                name = f"{name}.processor"
                bits, expected = attention_bits(module), layer_bits(name, a, max(softmax_bits, a), keep)
            else:
                continue
            if bits != expected:
                found.append(f"{name}: {bits}, not {expected}")
        return found

    return wrong


def pytest_addoption(parser):
    parser.addoption("--write-pins", action="store_true", help="write tests/pins.json anew; see tests/test_pins.py")


LATENT_CHANNELS = 4
CLASSES = 5
WORDS = ("red", "green", "blue", "circle", "square", "star")
SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def _vae() -> AutoencoderKL:
    torch.manual_seed(1)
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=64,
        mid_block_add_attention=False,
        scaling_factor=8.0,  # untrained samples are wide; keeps the pixels of the decoded images off 0 and 255
    )


def _denoiser(kind: type, **config) -> UNet2DModel | UNet2DConditionModel:
    torch.manual_seed(2)
    denoiser = kind(
        sample_size=8,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        layers_per_block=1,
        block_out_channels=(32, 64),
        norm_num_groups=8,
        **config,
    )
    with torch.no_grad():
        # An untrained denoiser predicts almost nothing; a trained one predicts noise of unit variance.
        denoiser.conv_out.weight.mul_(4)
        for name, parameter in denoiser.named_parameters():
            if "attn2.to_v" in name or "attn2.to_out" in name:
                parameter.mul_(4)  # so that the condition shows in the image
    return denoiser


def _conditional() -> UNet2DConditionModel:
    return _denoiser(
        UNet2DConditionModel,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,  # the number of heads, in diffusers' UNet2DConditionModel
    )


def _tokenizer() -> CLIPTokenizer:
    """A byte-level CLIP tokenizer without merges: one token per letter, any text works."""
    alphabet = sorted(ByteLevel.alphabet())
    tokens = [*alphabet, *(f"{letter}</w>" for letter in alphabet), "<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=32)


def _text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    torch.manual_seed(3)
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def _finish(pipe):
    for module in (pipe.unet, pipe.vae, getattr(pipe, "text_encoder", None), getattr(pipe, "class_embedder", None)):
        if module is not None:
            module.eval()
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="session")
def uncond_pipe() -> LatentDiffusionPipeline:
    denoiser = _denoiser(
        UNet2DModel,
        down_block_types=("AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D"),
        attention_head_dim=8,  # channels per head, in diffusers' UNet2DModel
        resnet_time_scale_shift="scale_shift",
        downsample_type="resnet",
        upsample_type="resnet",
    )
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return _finish(LatentDiffusionPipeline(denoiser, _vae(), scheduler))


@pytest.fixture(scope="session")
def class_pipe() -> LatentDiffusionPipeline:
    denoiser = _conditional()
    torch.manual_seed(4)
    embedder = ClassEmbedder(num_classes=CLASSES, tokens=2, dim=32)
    scheduler = DDIMScheduler(**SCHEDULE, clip_sample=False, set_alpha_to_one=False)
    return _finish(LatentDiffusionPipeline(denoiser, _vae(), scheduler, embedder))


@pytest.fixture(scope="session")
def text_pipe() -> StableDiffusionPipeline:
    tokenizer = _tokenizer()
    pipe = StableDiffusionPipeline(
        unet=_conditional(),
        vae=_vae(),
        scheduler=PNDMScheduler(**SCHEDULE, skip_prk_steps=True, set_alpha_to_one=False),
        text_encoder=_text_encoder(tokenizer),
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    return _finish(pipe)


def _labels(split: str, start: int, stop: int) -> list[int]:
    return [index % CLASSES for index in range(start, stop)]


def _captions(split: str, start: int, stop: int) -> list[str]:
    return [f"a {WORDS[index % 3]} {WORDS[3 + index // 3 % 3]}" for index in range(start, stop)]


def _model(name: str, pipe, **fields) -> Model:
    def load(device="cpu"):
        return copy.deepcopy(pipe).to(device)

    return Model(name=name, load=load, steps=6, batch_size=4, time_groups=3, trajectories=4, **fields)


@pytest.fixture(scope="session")
def uncond_model(uncond_pipe) -> Model:
    return _model("tiny-uncond", uncond_pipe, sampler="ddim", eta=1.0, conditioning="none", selection="lsun")


@pytest.fixture(scope="session")
def class_model(class_pipe) -> Model:
    return _model(
        "tiny-class",
        class_pipe,
        sampler="ddim",
        guidance=3.0,
        conditioning="class",
        source=_labels,
        selection="imagenet",
    )


@pytest.fixture(scope="session")
def text_model(text_pipe) -> Model:
    return _model(
        "tiny-text",
        text_pipe,
        sampler="plms",
        guidance=3.0,
        conditioning="text",
        source=_captions,
        selection="sd",
    )


def _calibration(pipe, model):
    from quest.diffusion.calibration_set import collect

    return collect(pipe, model, "calibration", 4)


@pytest.fixture(scope="session")
def uncond_calibration(uncond_pipe, uncond_model):
    return _calibration(uncond_pipe, uncond_model)


@pytest.fixture(scope="session")
def class_calibration(class_pipe, class_model):
    return _calibration(class_pipe, class_model)


@pytest.fixture(scope="session")
def text_calibration(text_pipe, text_model):
    return _calibration(text_pipe, text_model)


@pytest.fixture(scope="session")
def first_calls():
    """first_calls(calibration): its first two steps, for tests in which more steps only take longer."""
    return lambda calibration: calibration.subset((calibration.call < 2).nonzero().flatten())


@pytest.fixture(scope="session")
def layer_of():
    """Makes a quantized layer of a weight, with its MSE ranges."""
    from torch import nn

    from quest.affine import QuantSpec
    from quest.quantization import ranges
    from quest.quantization.layers import quantized

    def make(weight, bits):
        linear = weight.ndim == 2
        new = nn.Linear(weight.shape[1], len(weight)) if linear else nn.Conv2d(weight.shape[1], len(weight), 3)
        new.weight.data = weight.clone()
        q = quantized(new.requires_grad_(False), QuantSpec(bits, axis=0), QuantSpec(32), None)
        q.choose_weight_range(ranges.mse)
        return q

    return make
