"""The compiled core of the integer kernels; all else stands in pyproject.toml.

It is no Python module but a plain C library (see quest/kernels/cpu/integer.py). Where it does not compile, the
installation goes on without it and quantized layers run on the reference kernel.
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
