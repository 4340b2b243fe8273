"""Makes `from_pretrained` of diffusers know our quantized denoisers (`pretrained`), without importing diffusers.

diffusers looks up the `quant_method` of a config.json in two dictionaries of its module `diffusers.quantizers.auto`. If
that module is imported after us, the entries are added at the end of its import.
"""

import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import PathFinder

NAME = "quest-suite"  # our `quant_method`
TABLES = "diffusers.quantizers.auto"


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
    """Finds the module of the dictionaries as Python would, and adds the entries when it is loaded."""

    def find_spec(self, name, path, target=None):
        if name != TABLES or (spec := PathFinder.find_spec(name, path)) is None:
            return None
        load = spec.loader.exec_module

        def exec_module(module):
            load(module)
            _add(module)

        spec.loader.exec_module = exec_module
        return spec


def _add(module) -> None:
    module.AUTO_QUANTIZER_MAPPING[NAME] = quantizer
    module.AUTO_QUANTIZATION_CONFIG_MAPPING[NAME] = Config


def register() -> None:
    """Add the entries now, or when diffusers is imported."""
    if TABLES in sys.modules:
        _add(sys.modules[TABLES])
    elif not any(isinstance(finder, _AfterImport) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AfterImport())
