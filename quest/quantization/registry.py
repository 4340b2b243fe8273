"""Makes diffusers know our quantized denoisers, without importing it.

`from_pretrained` looks up the `quant_method` of a config.json in two dictionaries of `diffusers.quantizers.auto`, to
which `pretrained` is added. Functions of `diffusers.hooks` would move or cast the layers of a denoiser one by one; for
a quantized one they raise an error. If such a module is imported after us, it is changed at the end of its import.
"""

import functools
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

NAME = "quest-suite"  # our `quant_method`
TABLES = "diffusers.quantizers.auto"
MOVING = ("group_offloading", "lazy_prefetch_group_offloading", "layerwise_casting")  # names of hooks of diffusers


class Config:
    """The entry for the configuration. `pretrained` imports models of diffusers, which import the dictionaries."""

    @staticmethod
    def from_dict(fields: dict):
        from quest.quantization import pretrained

        return pretrained.Config.from_dict(fields)


def quantizer(config, **settings):
    """The entry for the quantizer."""
    from quest.quantization import pretrained

    return pretrained.Quantizer(config, **settings)


class _AfterImport(MetaPathFinder):
    """Finds a module of CHANGES as Python would, and changes it when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name not in CHANGES or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            CHANGES[name](module)

        spec.loader.exec_module = exec_module
        return spec


def _add(module) -> None:
    module.AUTO_QUANTIZER_MAPPING[NAME] = quantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = Config


def _refuse(module) -> None:
    """Let no hook of MOVING be registered with a module that has quantized layers."""
    register_hook = module.HookRegistry.register_hook

    @functools.wraps(register_hook)
    def guarded(self, hook, name):
        from quest.quantization.layers import ONE_DEVICE, is_quantized

        if name in MOVING and is_quantized(self._module_ref):
            raise ValueError(f"{name}: {ONE_DEVICE}, in torch.float32")
        return register_hook(self, hook, name)

    module.HookRegistry.register_hook = guarded


CHANGES = {TABLES: _add, "diffusers.hooks.hooks": _refuse}


@functools.cache
def register() -> None:
    """Change these modules now, or when they are imported."""
    for name in CHANGES.keys() & sys.modules.keys():
        CHANGES[name](sys.modules[name])
    sys.meta_path.insert(0, _AfterImport())
