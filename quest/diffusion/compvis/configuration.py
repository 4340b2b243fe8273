"""Read CompVis's YAML configurations and refuse what this package does not support."""

from pathlib import Path

from quest.runtime.yaml_files import read_yaml

UNCONDITIONAL = "__is_unconditional__"

# Keys of `model.params.unet_config.params` that define the architecture, or that matter only in training.
UNET_KEYS = set(
    "model_channels num_res_blocks channel_mult in_channels out_channels attention_resolutions num_heads "
    "num_head_channels use_spatial_transformer transformer_depth context_dim use_scale_shift_norm resblock_updown "
    "use_new_attention_order legacy image_size dropout use_checkpoint use_fp16".split()
)
AUTOENCODER_KEYS = set(
    "double_z z_channels resolution in_channels out_ch ch ch_mult num_res_blocks attn_resolutions dropout".split()
)


def conditioning(config) -> str:
    """What the model is conditioned on: "none", "class" or "text". Raises ValueError for another condition encoder."""
    stage = parameters(config).get("cond_stage_config", UNCONDITIONAL)
    if stage == UNCONDITIONAL:
        return "none"
    target = target_of(stage, "model.params.cond_stage_config")
    if target == "ClassEmbedder":
        return "class"
    if target == "FrozenCLIPEmbedder":
        return "text"
    raise ValueError(
        f"model.params.cond_stage_config.target: {target} is not known; valid: {UNCONDITIONAL}, ClassEmbedder, "
        "FrozenCLIPEmbedder"
    )


def parameters(config) -> dict:
    """`model.params` of a configuration. Raises ValueError for missing keys and for another noise prediction."""
    if not isinstance(config, dict):
        path = Path(config)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; give the YAML configuration of the checkpoint")
        config = read_yaml(path)
    model = config.get("model") if isinstance(config, dict) else None
    if not isinstance(model, dict) or "target" not in model or not isinstance(model.get("params"), dict):
        raise ValueError("config: no model.target and model.params in it, as CompVis configurations have")
    target, params = target_of(model, "model"), model["params"]
    if target != "LatentDiffusion":
        raise ValueError(f"model.target: {target} is not read; valid: LatentDiffusion")
    needed = ("linear_start", "linear_end", "timesteps", "image_size", "unet_config", "first_stage_config")
    missing = [key for key in needed if key not in params]
    if missing:
        raise ValueError(f"model.params: {', '.join(missing)} missing in the configuration")
    for key, only in (("parameterization", "eps"), ("beta_schedule", "linear")):
        if params.get(key, only) != only:
            raise ValueError(f"model.params.{key}: {params[key]!r} is not read; valid: {only!r}")
    return params


def unet_parameters(config) -> dict:
    """The parameters of the U-Net. Raises ValueError for keys, or combinations of keys, that are not supported."""
    name = "model.params.unet_config"
    stage = parameters(config)["unet_config"]
    if target_of(stage, name) != "UNetModel":
        raise ValueError(f"{name}.target: {stage['target']} is not read; valid: UNetModel")
    params = stage["params"]
    refuse_unknown(params, UNET_KEYS, f"{name}.params")
    if (params.get("num_heads", -1) == -1) == (params.get("num_head_channels", -1) == -1):
        raise ValueError(f"{name}.params: give one of num_heads and num_head_channels")
    transformers = params.get("use_spatial_transformer", False)
    if transformers != (conditioning(config) != "none"):
        raise ValueError(
            f"{name}.params.use_spatial_transformer: {transformers} does not go with cond_stage_config; a model by "
            "class or text has spatial transformers, an unconditional one attention blocks"
        )
    if transformers:
        for key in ("use_scale_shift_norm", "resblock_updown"):
            if params.get(key, False):
                raise ValueError(f"{name}.params.{key}: true is not read together with spatial transformers")
    return params


def attends_by_level(params: dict) -> list[bool]:
    """Whether each level of the U-Net has attention; level k works at 1 / 2^k of the latents' resolution."""
    return [2**level in params["attention_resolutions"] for level in range(len(params["channel_mult"]))]


def target_of(stage: dict, name: str) -> str:
    """The class name at the end of a configuration's `target`; `name` is the key that a ValueError names."""
    if not isinstance(stage, dict) or "target" not in stage:
        raise ValueError(f"{name}: no target in the configuration")
    return stage["target"].rpartition(".")[2]


def refuse_unknown(params: dict, known: set[str], name: str) -> None:
    """Raise ValueError that names the unknown keys and the valid ones."""
    unknown = sorted(set(params) - known)
    if unknown:
        raise ValueError(f"{name}: {', '.join(unknown)} is not read; valid: {', '.join(sorted(known))}")
