"""Build of the extension module ``efface_native``. All other build settings are in pyproject.toml."""

import os
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_py import build_py

WARNINGS = ["-Wall", "-Wextra", "-Wconversion", "-Werror"]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-g", "-O1"]

# `make sanitize` builds the same sources under AddressSanitizer and UndefinedBehaviorSanitizer.
sanitize = SANITIZERS if os.environ.get("EFFACE_SANITIZE") == "1" else []
# -Wconversion applies to our sources only: pybind11's headers are included as system headers (below).
flags = [] if os.name == "nt" else [*WARNINGS, *(sanitize or ["-O3"])]

extension = Pybind11Extension(
    "efface_native",
    sources=[*map(str, sorted(Path("csrc").glob("*.cpp"))), *map(str, sorted(Path("bindings").glob("*.cpp")))],
    depends=[*map(str, sorted(Path("csrc").glob("*.hpp"))), *map(str, sorted(Path("csrc").glob("*.inl")))],
    include_dirs=["csrc"],
    cxx_std=20,
    extra_compile_args=flags,
    extra_link_args=[*sanitize, *(["-ldl"] if sys.platform == "linux" else [])],
)
# Move pybind11's headers from -I to -isystem, so that -Werror applies to our code and not to the library's.
if os.name != "nt":
    import pybind11

    extension.include_dirs = [d for d in extension.include_dirs if d != pybind11.get_include()]
    extension.extra_compile_args = ["-isystem", pybind11.get_include(), *extension.extra_compile_args]


class BuildPy(build_py):
    """Build step that adds the extension's type stubs as the stub-only package ``efface_native-stubs`` (PEP 561)."""

    def run(self) -> None:
        """Copy the Python files, then the stub."""
        super().run()
        if not self.editable_mode:
            stubs = Path(self.build_lib, "efface_native-stubs")
            self.mkpath(str(stubs))
            self.copy_file("bindings/efface_native.pyi", str(stubs / "__init__.pyi"))


ParallelCompile(default=0).install()  # all cores
setup(ext_modules=[extension], cmdclass={"build_py": BuildPy})
