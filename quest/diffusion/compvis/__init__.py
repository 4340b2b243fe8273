"""Convert CompVis's checkpoints of latent diffusion (arXiv:2112.10752) and Stable Diffusion v1 to diffusers.

A configuration is the YAML file that belongs to such a checkpoint; error messages name its keys. Four architectures
are supported, those of QuEST's tables: unconditional with attention blocks (LSUN; Churches also has scale-shift norms
and residual blocks that resample), and with spatial transformers, conditioned on a class (ImageNet) or on text (Stable
Diffusion). Every other configuration is refused, not guessed.

Each tensor of the diffusers modules is looked up under its name in the checkpoint (`names` shows how names map). A
name that is missing and a name that nothing reads are both errors.
"""

import math
import re

import torch
from diffusers import DDIMScheduler, PNDMScheduler, UNet2DModel
from torch import Tensor, nn

from quest.diffusion.compvis.checkpoint import read
from quest.diffusion.compvis.configuration import conditioning, parameters
from quest.diffusion.compvis.names import AVERAGED, DENOISER, autoencoder_sources, denoiser_sources, without_dots
from quest.diffusion.compvis.networks import autoencoder, denoiser
from quest.diffusion.pipelines import ClassEmbedder, LatentDiffusionPipeline, text_pipeline

LISTED = 10  # names of each kind that a message shows; a checkpoint of another model lacks hundreds

# Keys that follow from the schedule or matter only in training. `betas`, `alphas_cumprod` and `scale_factor` are
# compared with the configuration first.
SCHEDULE_KEYS = set(
    "betas alphas_cumprod alphas_cumprod_prev sqrt_alphas_cumprod sqrt_one_minus_alphas_cumprod "
    "log_one_minus_alphas_cumprod sqrt_recip_alphas_cumprod sqrt_recipm1_alphas_cumprod posterior_variance "
    "posterior_log_variance_clipped posterior_mean_coef1 posterior_mean_coef2 lvlb_weights logvar scale_factor "
    "model_ema.decay model_ema.num_updates".split()
)
TRAINING_PREFIXES = ("first_stage_model.loss.",)
TEXT = "cond_stage_model.transformer.text_model."


def load(checkpoint, config, tokenizer=None):
    """A full-precision diffusers pipeline (float32, eval mode) from a CompVis checkpoint and its configuration.

    The averaged weights (`model_ema.*`) are used where the checkpoint has them, unless the configuration says
    `use_ema: false`, and are required where it says true. The scale factor of the latents comes from the checkpoint if
    the configuration says `scale_by_std`, otherwise from the configuration.

    Args:
        checkpoint: a `.ckpt` (its pickle is read as data only) or `.safetensors` file.
        config: the configuration, as a YAML file or its parsed content.
        tokenizer: folder of the CLIP tokenizer; needed if the checkpoint contains a text encoder, as Stable Diffusion's
            do. A text model without a text encoder becomes a pipeline that takes `prompt_embeds`.

    Returns:
        A `StableDiffusionPipeline` with PLMS for a text model; otherwise a `LatentDiffusionPipeline` with DDIM.

    Raises:
        FileNotFoundError: the checkpoint or the configuration does not exist.
        ValueError: a file that is truncated or contains code, a configuration that is not one of the four
            architectures, missing or unknown names, wrong shapes, or another noise schedule; the message says which.
    """
    state = read(checkpoint)
    params = parameters(config)
    kind = conditioning(config)
    _check_schedule(state, params, checkpoint)

    unet, vae = denoiser(config, "meta"), autoencoder(config, "meta", _scale_factor(state, params, checkpoint))
    sources = {id(unet): denoiser_sources(unet, config, state), id(vae): autoencoder_sources(vae)}
    needed = {source for names in sources.values() for source, _ in names.values()}
    modules = [unet, vae]
    embedder = None
    if kind == "class":
        stage = params["cond_stage_config"]["params"]
        classes = stage.get("n_classes", 1000)  # the last class means "no class"
        with torch.device("meta"):
            embedder = ClassEmbedder(num_classes=classes - 1, tokens=1, dim=stage["embed_dim"])
        sources[id(embedder)] = {"embedding.weight": ("cond_stage_model.embedding.weight", None)}
        needed.add("cond_stage_model.embedding.weight")
        modules.append(embedder)
    text = {name for name in state if name.startswith(TEXT)} if kind == "text" else set()
    _check_names(state, needed, text, checkpoint)
    for module in modules:
        _fill(module, sources[id(module)], state, _heads(module), params, checkpoint)

    if kind == "text":
        encoder, tokenizer = _text_encoder({name: state[name] for name in text}, tokenizer, unet, checkpoint)
        return text_pipeline(vae, encoder, tokenizer, unet, scheduler(config))
    return LatentDiffusionPipeline(unet, vae, scheduler(config), embedder)


def scheduler(config) -> DDIMScheduler | PNDMScheduler:
    """The sampler of a configuration's model, with its noise schedule: PLMS for a model by text, else DDIM."""
    params = parameters(config)
    schedule = {
        "beta_start": params["linear_start"],
        "beta_end": params["linear_end"],
        "beta_schedule": "scaled_linear",  # CompVis calls it "linear": it is linear in the square root of beta
        "num_train_timesteps": params["timesteps"],
        "steps_offset": 1,  # timesteps 1, 1 + c, 1 + 2c, ...
        "set_alpha_to_one": False,
        "timestep_spacing": "leading",
    }
    if conditioning(config) == "text":
        return PNDMScheduler(**schedule, skip_prk_steps=True)
    return DDIMScheduler(**schedule, clip_sample=False)


def _scale_factor(state: dict, params: dict, path) -> float:
    """The factor by which latents are multiplied before the denoiser gets them (arXiv:2112.10752, section G)."""
    if params.get("scale_by_std", False):
        if "scale_factor" not in state:
            raise ValueError(f"{path}: key scale_factor is missing; the configuration says scale_by_std")
        return float(state["scale_factor"])
    said = float(params.get("scale_factor", 1.0))
    if "scale_factor" in state and not math.isclose(float(state["scale_factor"]), said, rel_tol=1e-4):
        raise ValueError(
            f"{path}: its scale_factor is {float(state['scale_factor']):.6g}, the configuration's {said:.6g}"
        )
    return said


def _check_schedule(state: dict, params: dict, path) -> None:
    """Raise ValueError if the checkpoint contains betas or their products that differ from the configuration's."""
    ends = torch.tensor([params["linear_start"], params["linear_end"]], dtype=torch.float64).sqrt()
    expected = torch.linspace(ends[0], ends[1], params["timesteps"], dtype=torch.float64) ** 2
    if "alphas_cumprod" in state and not _close(state["alphas_cumprod"].double(), (1 - expected).cumprod(0)):
        raise ValueError(f"{path}: its alphas_cumprod are not those of the configuration's betas")
    if "betas" not in state:
        return
    betas = state["betas"].double()
    if not _close(betas, expected):
        raise ValueError(
            f"{path}: its betas are {len(betas)} from {betas[0]:.6g} to {betas[-1]:.6g}, the configuration's (timesteps"
            f", linear_start, linear_end) {params['timesteps']} from {params['linear_start']} to {params['linear_end']}"
        )


def _close(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-4, atol=0)


def _heads(module: nn.Module) -> dict[str, int]:
    """The number of heads of each attention layer whose q, k and v are one tensor in the checkpoint."""
    if not isinstance(module, UNet2DModel):
        return {}
    return {name: layer.heads for name, layer in module.named_modules() if hasattr(layer, "to_q")}


def _fill(module: nn.Module, sources: dict, state: dict, heads: dict[str, int], params: dict, path) -> None:
    """Load a checkpoint's tensors into a module on the meta device, in float32. Raises ValueError for wrong shapes."""
    together = params["unet_config"]["params"].get("use_new_attention_order", False)
    tensors, differ = {}, []
    for name, expected in module.state_dict().items():
        source, part = sources[name]
        value = state[source].float()
        if part is not None:
            # Rows are ordered [head, q k v, channel], or [q k v, head, channel] with `use_new_attention_order`.
            count = heads[name.partition(".to_")[0]]
            if value.shape[0] == 3 * expected.shape[0]:
                order = (3, count, -1) if together else (count, 3, -1)
                value = value.unflatten(0, order).select(0 if together else 1, part).flatten(0, 1)
        if value.ndim > expected.ndim and set(value.shape[expected.ndim :]) == {1}:
            value = value.flatten(expected.ndim - 1)  # CompVis's 1x1 convolution is a linear layer in diffusers
        if value.shape != expected.shape:
            differ.append(f"{source} is {list(state[source].shape)}, {list(expected.shape)} by the configuration")
        tensors[name] = value.contiguous()
    if differ:
        raise ValueError(f"{path}: other shapes than the configuration's: {_listed(differ, '; ')}")
    module.load_state_dict(tensors, assign=True)
    module.eval()


def _check_names(state: dict, needed: set[str], text: set[str], path) -> None:
    """Raise ValueError that lists the names that the checkpoint lacks and its names that no module reads."""
    missing = sorted(needed - set(state))
    # Either the raw or the averaged weights are used; the checkpoint may contain the other set, too.
    other = {AVERAGED + without_dots(name) for name in needed if name.startswith(DENOISER)}
    flat = {name.removeprefix(AVERAGED) for name in needed if name.startswith(AVERAGED)}
    other |= {name for name in state if name.startswith(DENOISER) and without_dots(name) in flat}
    known = needed | other | text | SCHEDULE_KEYS
    unknown = sorted(name for name in state if name not in known and not name.startswith(TRAINING_PREFIXES))
    problems = [f"{len(missing)} missing: {_listed(missing)}"] * bool(missing)
    problems += [f"{len(unknown)} unknown: {_listed(unknown)}"] * bool(unknown)
    if problems:
        raise ValueError(f"{path} does not fit the configuration; keys {'; '.join(problems)}")


def _listed(names: list[str], separator: str = ", ") -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return separator.join(names[:LISTED]) + more


def _text_encoder(tensors: dict[str, Tensor], tokenizer, unet, path):
    """CLIP's text model, with the sizes of its tensors, and its tokenizer; (None, None) if there are no tensors."""
    if not tensors:
        return None, None
    if tokenizer is None:
        raise ValueError(
            f"tokenizer: {path} holds a text encoder; give the folder of its CLIP tokenizer (tokenizer.json, or "
            "vocab.json and merges.txt)"
        )
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    weights = {name.removeprefix(TEXT): value.float() for name, value in tensors.items()}
    weights.pop("embeddings.position_ids", None)  # 0, 1, 2, ...: a buffer that transformers creates
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    try:
        vocabulary, width = weights["embeddings.token_embedding.weight"].shape
        positions = len(weights["embeddings.position_embedding.weight"])
        inner = len(weights["encoder.layers.0.mlp.fc1.weight"])
    except KeyError as error:
        raise ValueError(f"{path}: key {TEXT}{error.args[0]} is missing") from None
    clip = CLIPTokenizer.from_pretrained(tokenizer)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=inner,
            num_hidden_layers=len(layers),
            num_attention_heads=max(1, width // 64),  # CLIP's heads are 64 wide
            max_position_embeddings=positions,
            projection_dim=width,
            hidden_act="quick_gelu",
            bos_token_id=clip.bos_token_id,
            eos_token_id=clip.eos_token_id,
            pad_token_id=clip.pad_token_id,
        )
    )
    # In some versions of transformers the model's names start with this prefix, in others they do not.
    prefix = "text_model." if any(name.startswith("text_model.") for name in encoder.state_dict()) else ""
    names = {name.removeprefix(prefix) for name in encoder.state_dict()}
    _check_names({TEXT + name: None for name in weights}, {TEXT + name for name in names}, set(), path)
    if width != unet.config.cross_attention_dim:
        raise ValueError(f"{path}: its text encoder is {width} wide, context_dim {unet.config.cross_attention_dim}")
    if len(clip) != vocabulary or clip.model_max_length > positions:
        raise ValueError(
            f"tokenizer: {tokenizer} has {len(clip)} tokens and texts of up to {clip.model_max_length}, the text "
            f"encoder of {path} {vocabulary} and {positions}"
        )
    encoder.load_state_dict({prefix + name: value for name, value in weights.items()})
    return encoder.eval(), clip
