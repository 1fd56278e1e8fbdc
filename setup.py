"""Builds the native CPU kernels, one library per instruction set, and that of packed weights' byte planes; everything
else is in pyproject.toml.

The libraries are plain shared objects that `rekindle.engine.kernels.native_kernels` and
`rekindle.store.codecs.native_planes` load with ctypes, of the kernels the best one that the CPU supports. Each is
optional: without a compiler, or with one too old for an instruction set, the package installs and works without that
library. None is linked against an OpenMP runtime, because the process must use the one that torch brings.
"""

from __future__ import annotations

import platform

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

PACKAGE = "rekindle.engine.kernels.native"
DIRECTORY = "src/rekindle/engine/kernels/native"
SOURCES = ("attention", "linear", "lora", "rowwise", "support")
HEADERS = ("abi", "panel", "parallel", "simd")
FLAGS = (
    "-std=c++17",
    "-O2",
    "-g0",
    "-fopenmp",
    "-fvisibility=hidden",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-ffp-contract=off",  # what is fused is written out, so that every instantiation of a template rounds alike
    "-Wno-psabi",
    "-Wno-uninitialized",  # GCC 12 warns of its own intrinsics
    "-Wno-maybe-uninitialized",
)
AVX2 = ("-mavx2", "-mfma")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq")
VARIANTS: dict[str, tuple[str, ...]] = {"baseline": ()}
if platform.machine() in {"x86_64", "AMD64"}:
    VARIANTS |= {"avx2": AVX2, "avx512": AVX512, "avx512bf16": (*AVX512, "-mavx512bf16")}

PLANES = "src/rekindle/store/codecs/native"
PLANES_FLAGS = ("-std=c++17", "-O3", "-g0", "-fvisibility=hidden")  # as fast with AVX2, so there is one for all CPUs


class BuildVariants(build_ext):
    """Gives each library its own folder of objects, since all are compiled from the same sources."""

    def build_extension(self, ext: Extension) -> None:
        shared = self.build_temp
        self.build_temp = f"{shared}/{ext.name}"
        try:
            super().build_extension(ext)
        finally:
            self.build_temp = shared


setup(
    cmdclass={"build_ext": BuildVariants},
    ext_modules=[
        Extension(
            f"{PACKAGE}._{name}",
            sources=[f"{DIRECTORY}/{source}.cpp" for source in SOURCES],
            depends=[f"{DIRECTORY}/{header}.h" for header in HEADERS],
            extra_compile_args=[*FLAGS, *flags],
            language="c++",
            optional=True,
        )
        for name, flags in VARIANTS.items()
    ]
    + [
        Extension(
            "rekindle.store.codecs.native._planes",
            sources=[f"{PLANES}/{source}.cpp" for source in ("decode", "encode", "frame", "planes")],
            depends=[f"{PLANES}/{header}.h" for header in ("huffman", "planes")],
            extra_compile_args=[*PLANES_FLAGS],
            language="c++",
            optional=True,
        )
    ],
)
