"""Quantized denoisers in the folder layout of diffusers: `save_pretrained` writes them, `from_pretrained` reads them.

    config.json                           the architecture, and quantization_config: {"quant_method": "quest-suite"}
    diffusion_pytorch_model.safetensors   the file that `quest.save` writes (`checkpoint`), without the scheduler

`from_pretrained` does what `quest.load` does with the same file, so outputs are equal bit for bit. It knows no
scheduler: whether a sampler stays within the time groups shows in the first call that leaves them.
"""

from enum import StrEnum

import diffusers
import torch
from diffusers.quantizers.base import DiffusersQuantizer
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn

from quest.quantization.registry import NAME
from quest.runtime.files import dumps

SUPPORTED = hasattr(DiffusersQuantizer, "get_state_dict_and_metadata")  # since diffusers 0.40


class Method(StrEnum):
    """Our `quant_method`. diffusers asks for the `value` of an enum."""

    QUEST = NAME


class Config(QuantizationConfigMixin):
    """The `quantization_config` of a config.json. The header of the weights' file says everything else."""

    def __init__(self, quant_method: str = NAME, **other):
        """Raise ValueError for a field that this version does not know: a denoiser would be read without it."""
        if other:
            raise ValueError(f"quantization_config: unknown: {', '.join(map(str, other))}; valid: quant_method alone")
        self.quant_method = Method(quant_method)

    def to_diff_dict(self) -> dict:
        """The fields that `repr` shows."""
        return self.to_dict()


class Quantizer(DiffusersQuantizer):
    """What diffusers calls while it loads or saves a quantized denoiser, in the order of the methods.

    Attribute `model`: the denoiser, once it is quantized.
    """

    requires_calibration = True  # so from_pretrained refuses to quantize a float denoiser
    is_serializable = SUPPORTED
    is_trainable = False

    def __init__(self, config: Config, model: nn.Module | None = None, **settings):
        super().__init__(config, **settings)
        self.model = model

    def validate_environment(self, torch_dtype=None, device_map=None, **_) -> None:
        """Raise ValueError for arguments of `from_pretrained` that a quantized denoiser cannot follow."""
        if not SUPPORTED:
            raise ValueError(f"diffusers {diffusers.__version__}: from_pretrained of {NAME} needs 0.40 or newer")
        if torch_dtype not in (None, torch.float32):
            raise ValueError(f"torch_dtype: {torch_dtype}; a quantized denoiser computes in torch.float32")
        if device_map is not None:
            raise ValueError(f"device_map: {device_map!r}; load without it, then move the pipeline by .to(device)")

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str]) -> list[str]:
        """Note the file. diffusers loads none of its tensors itself; `_process_model_after_weight_loading` does."""
        if len(checkpoint_files) > 1:
            raise ValueError(
                f"{checkpoint_files[0]}: one of {len(checkpoint_files)} files; valid: one file, which save_pretrained "
                "writes with a larger max_shard_size"
            )
        (self.path,) = checkpoint_files
        return []

    def _process_model_before_weight_loading(self, model, **_) -> None:
        pass

    def maybe_update_state_dict(self, state_dict: dict) -> dict:
        return {}

    def update_missing_keys(self, model, missing_keys: list[str], prefix: str) -> list[str]:
        return []

    def _process_model_after_weight_loading(self, model, **_) -> None:
        """Quantize a model on the meta device by its file. Raises ValueError as `checkpoint.load` does."""
        from quest.quantization import checkpoint

        header, tensors = checkpoint.read(self.path)
        if any(name.startswith(checkpoint.SCHEDULER) for name in tensors):
            raise ValueError(f"{self.path}: it also corrects the sampler; valid: quest.load(full_precision_pipe, path)")
        _allocate(model, checkpoint.coded(header, tensors))
        checkpoint.restore(model, header, tensors, self.path)
        self.model = model

    def get_state_dict_and_metadata(self, state_dict: dict, safe_serialization: bool = False) -> tuple[dict, dict]:
        """The content of the file that `save_pretrained` writes. Raises ValueError unless it is safetensors."""
        from quest.quantization import checkpoint

        if not safe_serialization:
            raise ValueError("safe_serialization: False; valid: True, since the file's header is part of the model")
        tensors, header = checkpoint.content(self.model)
        return tensors, {"quest": dumps(header)}


def attach(denoiser: nn.Module) -> None:
    """Let `save_pretrained` of a quantized denoiser write its codes, or raise ValueError if diffusers is too old.

    A denoiser that is no model of diffusers has no `save_pretrained` and stays as it is.
    """
    if not hasattr(denoiser, "register_to_config"):
        return
    denoiser.register_to_config(quantization_config=Config())
    denoiser.hf_quantizer = Quantizer(denoiser.config.quantization_config, denoiser)


def _allocate(denoiser: nn.Module, coded: set[str]) -> None:
    """Give every parameter memory but those that are coded, and all the strides of a tensor that is read from a file.

    diffusers made them on the meta device, where the weight of a 1x1 convolution has other strides.
    """
    for place, module in denoiser.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            device = "meta" if f"{place}.{name}" in coded else "cpu"
            empty = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
            setattr(module, name, nn.Parameter(empty, requires_grad=False))
