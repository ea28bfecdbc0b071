"""The C++ extension for another Python and an older C library: built here for there, or there beside the rest.

Torch is not imported.
"""

import os
import re
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAME = "efface_native"
GLIBC, GLIBCXX = (2, 34), (3, 4, 30)  # the newest symbols that the borrowed machine's libraries surely have


def command(folder: Path, python: str = sys.executable) -> list[str]:
    """Return what builds the extension for an interpreter into a folder."""
    objects = tempfile.mkdtemp(prefix="efface-objects-")
    return [
        *(python, "setup.py", "--quiet", "build_ext", "--force"),
        *("--build-lib", str(folder.resolve()), "--build-temp", objects),
    ]


def version(python: str) -> str:
    """Return an interpreter's version, "3.12"; empty where it does not run."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip()


def build(folder: Path, python: str) -> Path:
    """Build it for ``python``, whose setuptools and pybind11 may be ours; return the file.

    Raises:
        RuntimeError: the build fails, or the file needs newer libraries than the borrowed machine's.
    """
    ours = sysconfig.get_paths()["purelib"]
    done = subprocess.run(
        command(folder, python),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ours},
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob(f"{NAME}*.so"))
    if done.returncode or not found:
        raise RuntimeError(f"{python}: expected to build {NAME}, got\n{done.stdout}{done.stderr}")
    for symbol, newest in (("GLIBC", GLIBC), ("GLIBCXX", GLIBCXX)):
        needed = newest_symbol(found[0], symbol)
        if needed > newest:
            raise RuntimeError(
                f"{found[0].name}: expected no symbol newer than {symbol}_{_dotted(newest)}, got {_dotted(needed)}; "
                "build it on an older system"
            )
    return found[0]


def newest_symbol(library: Path, name: str) -> tuple[int, ...]:
    """Return the newest version of a library's symbols, "GLIBC" for example, that a shared object asks for."""
    found = re.findall(rb"\b%s_(\d+(?:\.\d+)+)\x00" % name.encode(), library.read_bytes())
    return max((tuple(int(part) for part in version.split(b".")) for version in found), default=(0,))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
