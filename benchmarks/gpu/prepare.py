"""``python -m benchmarks.gpu prepare``: collects in ``build/gpu`` everything that a borrowed machine lacks.

That is the missing packages, TOFU's rows, the C++ extension for its Python, compiled Triton kernels, and the commit.
Copy the folder to that machine with the working tree, where the driver finds it. Git ignores ``build/gpu``.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.gpu import precompile
from benchmarks.harness.shared import BadOption

ROOT = Path(__file__).resolve().parents[2]
CARRIED = ROOT / "build" / "gpu"
SITE, TOFU, KERNELS, RECORD = "site", "tofu", "triton", "prepared.json"
CACHE = ROOT / "build" / "gpu-kernels"  # kept between calls, so that unchanged kernels are not compiled again
PYTHON = "3.12"
EXTENSION = "efface_native"
GLIBC, GLIBCXX = (2, 34), (3, 4, 30)  # the newest symbol versions that the borrowed machine certainly has
# All are pure Python and none depends on another torch. quack-kernels is not listed: it fails to import there, because
# the machine has other CUDA libraries.
PACKAGES = (
    *("datasets", "dill", "multiprocess", "rouge-score", "nltk", "shtab"),
    *("liger-kernel", "cut-cross-entropy"),
)
ROWS = ("forget10.json", "retain90.json")  # of TOFU
SOURCES = ("benchmarks", "bindings", "csrc", "engine", "kernels", "tests")
MIB = 1 << 20
LARGEST = 64 * MIB  # upper bound for the transfer, including the working tree


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--python", help=f"a Python {PYTHON} interpreter to build the extension with (default: python{PYTHON})"
    )
    parser.add_argument(
        "--extension", type=Path, help="an extension that an earlier call built on the borrowed machine"
    )
    parser.add_argument(
        "--tofu", type=Path, default=ROOT.parent / "shared" / "tofu", help="the folder with TOFU's rows"
    )


def run(options: argparse.Namespace) -> int:
    """Fill the folder, and print its contents and what is missing."""
    site = CARRIED / SITE
    with tempfile.TemporaryDirectory() as built:  # before the old folder is deleted, in case an option is invalid
        without = extension_into(Path(built), options)
        shutil.rmtree(CARRIED, ignore_errors=True)
        shutil.copytree(built, site)
    install(site, PACKAGES)
    write_stub(site)
    copied = copy_rows(options.tofu, CARRIED / TOFU)
    lacks = [] if copied else [f"no TOFU rows ({options.tofu}): synthetic rows of the same lengths are used instead"]
    lacks += without
    lacks += kernels_into(CARRIED / KERNELS, site, options.python or shutil.which(f"python{PYTHON}") or "")
    asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True)
    changed = subprocess.run(["git", "status", "--porcelain"], cwd=ROOT, capture_output=True, text=True, check=True)
    record = {
        "commit": asked.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "sources": digest(),
        "date": time.strftime("%Y-%m-%d"),
        "packages": sorted(
            f"{each.name} {each.version}" for each in importlib.metadata.distributions(path=[str(site)])
        ),
        "lacks": lacks,
    }
    (CARRIED / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    size = sum(path.stat().st_size for path in CARRIED.rglob("*") if path.is_file())
    print(f"{CARRIED.relative_to(ROOT)}: {size / MIB:.1f} MiB, commit {record['commit']}")
    print("\n".join([*record["packages"], *(f"lacks: {each}" for each in lacks)]))
    if size > LARGEST:
        print(f"expected at most {LARGEST / MIB:.0f} MiB, got {size / MIB:.0f}", file=sys.stderr)
        return 1
    return 0


def install(site: Path, packages: Iterable[str]) -> None:
    """Install packages without their dependencies, for the other machine's Python, in the versions installed here.

    Raises:
        RuntimeError: a package is not pure Python or cannot be downloaded.
    """
    ours = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    with tempfile.TemporaryDirectory() as folder:
        for name in packages:
            wanted = f"{name}=={ours[name]}" if name in ours else name
            there = ("--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "py")
            refused = _pip("download", *there, "--dest", folder, wanted)
            if refused:  # no wheel is published: build one from the source with the current Python
                refused = _pip("wheel", "--wheel-dir", folder, wanted)
            if refused:
                raise RuntimeError(f"{wanted}: expected a wheel for any machine, got\n{refused}")
        for wheel in sorted(Path(folder).glob("*.whl")):
            if not wheel.stem.endswith("-none-any"):
                raise RuntimeError(f"{wheel.name}: expected a wheel for any machine; leave the package out")
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)


def _pip(command: str, *arguments: str) -> str:
    """Run pip; return its error output if it failed."""
    whole = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    return done.stderr or f"exit {done.returncode}" if done.returncode else ""


def write_stub(site: Path) -> None:
    """Write metadata with efface's version: the sources are on the import path but not installed."""
    stub = site / "efface-0.1.0.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: efface\nVersion: 0.1.0\n", encoding="utf-8")


def copy_rows(source: Path, target: Path) -> bool:
    """Copy TOFU's rows; return False if they do not exist."""
    files = [source / name for name in ROWS]
    if not all(file.is_file() for file in files):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        (target / file.name).write_bytes(file.read_bytes())  # unlike a copy, this does not inherit a read-only mode
    return True


def extension_into(site: Path, options: argparse.Namespace) -> Sequence[str]:
    """Put the extension into ``site``, from a file or a new build; return the reason if there is none."""
    if options.extension is not None:
        tag = f"cpython-{PYTHON.replace('.', '')}-"
        if not options.extension.is_file() or tag not in options.extension.name:
            raise BadOption(
                f"--extension: expected a file of {EXTENSION} with {tag!r} in its name, got {options.extension}"
            )
        shutil.copyfile(options.extension, site / options.extension.name)
        return []
    python = options.python or shutil.which(f"python{PYTHON}") or ""
    version = version_of(python)
    if options.python is None and version != PYTHON:
        where = "the driver builds it there, in parallel with the first sections, for --extension next time"
        return [f"the extension: no python{PYTHON} here (--python); {where}"]
    if version != PYTHON:
        raise BadOption(
            f"--python: expected an interpreter of Python {PYTHON}, got {options.python!r}, {version or 'none'}"
        )
    build_extension(site, python)
    return []


def build_command(folder: Path, python: str = sys.executable) -> list[str]:
    """Return the command that builds the extension with ``python`` into a folder."""
    objects = tempfile.mkdtemp(prefix="efface-objects-")
    return [
        *(python, "setup.py", "--quiet", "build_ext", "--force"),
        *("--build-lib", str(folder.resolve()), "--build-temp", objects),
    ]


def version_of(python: str) -> str:
    """Return an interpreter's version, such as "3.12", or an empty string if it does not run."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip()


def build_extension(folder: Path, python: str) -> Path:
    """Build the extension with ``python`` and return the file. It can use our setuptools and pybind11.

    Raises:
        RuntimeError: the build fails, or the file needs newer libraries than the borrowed machine has.
    """
    ours = sysconfig.get_paths()["purelib"]
    done = subprocess.run(
        build_command(folder, python),
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ours},
        capture_output=True,
        text=True,
        check=False,
    )
    found = sorted(folder.glob(f"{EXTENSION}*.so"))
    if done.returncode or not found:
        raise RuntimeError(f"{python}: expected to build {EXTENSION}, got\n{done.stdout}{done.stderr}")
    for symbol, newest in (("GLIBC", GLIBC), ("GLIBCXX", GLIBCXX)):
        needed = newest_symbol(found[0], symbol)
        if needed > newest:
            raise RuntimeError(
                f"{found[0].name}: expected no symbol newer than {symbol}_{_dotted(newest)}, got {_dotted(needed)}; "
                "build it on an older system"
            )
    return found[0]


def newest_symbol(library: Path, name: str) -> tuple[int, ...]:
    """Return the newest version of a library's symbols, such as "GLIBC", that a shared object requires."""
    found = re.findall(rb"\b%s_(\d+(?:\.\d+)+)\x00" % name.encode(), library.read_bytes())
    return max((tuple(int(part) for part in version.split(b".")) for version in found), default=(0,))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def kernels_into(packed: Path, site: Path, python: str) -> Sequence[str]:
    """Compile the Triton kernels with an interpreter that has the right Triton; return the reason if that fails."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "engine", ROOT / "kernels", ROOT, site))),
        "TRITON_CACHE_DIR": str(CACHE),
        "TRITON_STORE_BINARY_ONLY": "1",  # a tenth of the size
    }
    command = [python or f"python{PYTHON}", "-m", "benchmarks.gpu.precompile"]
    try:
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        said = "" if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit {done.returncode}"])[-1]
    except OSError as error:
        said = str(error)
    if said:
        return [f"compiled kernels (the first call will spend about a minute to compile them): {said}"]
    precompile.pack(CACHE, packed)
    return []


def digest(root: Path = ROOT) -> str:
    """Return a hash of the sources, with which the driver checks that they are those of the prepared commit."""
    found = hashlib.sha256()
    files = (
        path for name in SOURCES for path in (root / name).rglob("*") if path.suffix in (".py", ".cpp", ".hpp", ".inl")
    )
    for path in sorted(files):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def commit() -> str:
    """Return the prepared commit, with "+changes" if the sources differ from it; without a record, git's commit."""
    try:
        record = json.loads((CARRIED / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = None
    if record is not None and record["sources"] == digest():
        return str(record["commit"])
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # git is not installed
        asked = None
    if asked is not None and asked.returncode == 0:
        return asked.stdout.strip()
    return "unknown" if record is None else record["commit"].removesuffix("+changes") + "+changes"
