"""Builds the compiled core of the integer kernels; everything else is in pyproject.toml.

The core is a plain C library, not a Python module (see quest/kernels/cpu/integer.py). Where it does not compile, the
installation continues without it, and quantized layers run on the reference kernel.
"""

from glob import glob
from runpy import run_path

from setuptools import Extension, setup

core = Extension(
    "quest.kernels.cpu._core",
    sorted(glob("quest/kernels/cpu/csrc/*.cpp")),
    depends=glob("quest/kernels/cpu/csrc/*.h"),
    language="c++",
    define_macros=[("QUEST_ABI", f'"{run_path("quest/kernels/cpu/core/abi.py")["digest"]()}"')],
    extra_compile_args=["-O3", "-std=c++17", "-pthread", "-fwrapv"],
    extra_link_args=["-pthread"],
    optional=True,
)
setup(ext_modules=[core])
