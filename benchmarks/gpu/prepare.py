"""``python -m benchmarks.gpu prepare``: all that a borrowed machine lacks, into ``build/gpu``, which git ignores.

The packages that it has not, TOFU's rows, the C++ extension for its Python, compiled Triton kernels, and the commit.
Carry the folder there beside the working tree; the driver finds it.
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
CACHE = ROOT / "build" / "gpu-kernels"  # kept: what did not change is not compiled again
PYTHON = "3.12"
EXTENSION = "efface_native"
GLIBC, GLIBCXX = (2, 34), (3, 4, 30)  # the newest symbols that the borrowed machine's libraries surely have
# Pure Python, none of them brings another torch. quack-kernels does not import there: its CUDA libraries are others.
PACKAGES = (
    *("datasets", "dill", "multiprocess", "rouge-score", "nltk", "shtab"),
    *("liger-kernel", "cut-cross-entropy"),
)
ROWS = ("forget10.json", "retain90.json")  # of TOFU
SOURCES = ("benchmarks", "bindings", "csrc", "engine", "kernels", "tests")
MIB = 1 << 20
LARGEST = 64 * MIB  # of what travels, the working tree included


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what can be asked."""
    parser.add_argument(
        "--python", help=f"an interpreter {PYTHON} to build the extension for (default: python{PYTHON})"
    )
    parser.add_argument("--extension", type=Path, help="a file that an earlier call built there and handed back")
    parser.add_argument("--tofu", type=Path, default=ROOT.parent / "shared" / "tofu", help="the folder of TOFU's rows")


def run(options: argparse.Namespace) -> int:
    """Fill the folder anew, and say what it holds and what it lacks."""
    site = CARRIED / SITE
    with tempfile.TemporaryDirectory() as built:  # first: a wrong option costs nothing of what was prepared before
        without = extension_into(Path(built), options)
        shutil.rmtree(CARRIED, ignore_errors=True)
        shutil.copytree(built, site)
    install(site, PACKAGES)
    write_stub(site)
    copied = copy_rows(options.tofu, CARRIED / TOFU)
    lacks = [] if copied else [f"no TOFU rows ({options.tofu}): made-up ones of the same lengths take their place"]
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
    """Install packages without what they need, as that machine's Python would, in the versions that we have.

    Raises:
        RuntimeError: a package that is not pure Python, or cannot be had.
    """
    ours = {each.name.lower().replace("_", "-"): each.version for each in importlib.metadata.distributions()}
    with tempfile.TemporaryDirectory() as folder:
        for name in packages:
            wanted = f"{name}=={ours[name]}" if name in ours else name
            there = ("--only-binary", ":all:", "--python-version", PYTHON, "--implementation", "py")
            refused = _pip("download", *there, "--dest", folder, wanted)
            if refused:  # no wheel is published: made of the source, by any Python
                refused = _pip("wheel", "--wheel-dir", folder, wanted)
            if refused:
                raise RuntimeError(f"{wanted}: expected a wheel for any machine, got\n{refused}")
        for wheel in sorted(Path(folder).glob("*.whl")):
            if not wheel.stem.endswith("-none-any"):
                raise RuntimeError(f"{wheel.name}: expected a wheel for any machine; leave the package out")
            with zipfile.ZipFile(wheel) as file:
                file.extractall(site)


def _pip(command: str, *arguments: str) -> str:
    """Run pip; return what it said where it failed."""
    whole = [sys.executable, "-m", "pip", command, "--quiet", "--no-deps", "--disable-pip-version-check", *arguments]
    done = subprocess.run(whole, capture_output=True, text=True, check=False)
    return done.stderr or f"exit {done.returncode}" if done.returncode else ""


def write_stub(site: Path) -> None:
    """Write the distribution that says efface's version: the sources themselves are on the path, not installed."""
    stub = site / "efface-0.1.0.dist-info"
    stub.mkdir(exist_ok=True)
    (stub / "METADATA").write_text("Metadata-Version: 2.1\nName: efface\nVersion: 0.1.0\n", encoding="utf-8")


def copy_rows(source: Path, target: Path) -> bool:
    """Copy TOFU's rows; False where they are not there."""
    files = [source / name for name in ROWS]
    if not all(file.is_file() for file in files):
        return False
    target.mkdir(parents=True, exist_ok=True)
    for file in files:
        (target / file.name).write_bytes(file.read_bytes())  # without the source's write bits
    return True


def extension_into(site: Path, options: argparse.Namespace) -> Sequence[str]:
    """Put the extension there, from a file or built; return why it is lacking, if it is."""
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
        where = "the driver builds it there, beside the first sections, and hands it back for --extension"
        return [f"the extension: no python{PYTHON} here (--python); {where}"]
    if version != PYTHON:
        raise BadOption(
            f"--python: expected an interpreter of Python {PYTHON}, got {options.python!r}, {version or 'none'}"
        )
    build_extension(site, python)
    return []


def build_command(folder: Path, python: str = sys.executable) -> list[str]:
    """Return what builds the extension for an interpreter into a folder."""
    objects = tempfile.mkdtemp(prefix="efface-objects-")
    return [
        *(python, "setup.py", "--quiet", "build_ext", "--force"),
        *("--build-lib", str(folder.resolve()), "--build-temp", objects),
    ]


def version_of(python: str) -> str:
    """Return an interpreter's version, "3.12"; empty where it does not run."""
    code = "import sys; print('{}.{}'.format(*sys.version_info))"
    try:
        asked = subprocess.run([python, "-c", code], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return asked.stdout.strip()


def build_extension(folder: Path, python: str) -> Path:
    """Build it for ``python``, whose setuptools and pybind11 may be ours; return the file.

    Raises:
        RuntimeError: the build fails, or the file needs newer libraries than the borrowed machine's.
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
    """Return the newest version of a library's symbols, "GLIBC" for example, that a shared object asks for."""
    found = re.findall(rb"\b%s_(\d+(?:\.\d+)+)\x00" % name.encode(), library.read_bytes())
    return max((tuple(int(part) for part in version.split(b".")) for version in found), default=(0,))


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def kernels_into(packed: Path, site: Path, python: str) -> Sequence[str]:
    """Compile the Triton kernels by an interpreter that has that machine's Triton; return why they are lacking."""
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
        return [f"compiled kernels, which take a minute of the first call there: {said}"]
    precompile.pack(CACHE, packed)
    return []


def digest(root: Path = ROOT) -> str:
    """Return a hash of the sources, by which the driver knows whether they are those of the commit it was told."""
    found = hashlib.sha256()
    files = (
        path for name in SOURCES for path in (root / name).rglob("*") if path.suffix in (".py", ".cpp", ".hpp", ".inl")
    )
    for path in sorted(files):
        found.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()


def commit() -> str:
    """Return the commit that was prepared, "+changes" where the sources are no longer its; git's without a folder."""
    try:
        record = json.loads((CARRIED / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        record = None
    if record is not None and record["sources"] == digest():
        return str(record["commit"])
    try:
        asked = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    except OSError:  # no git
        asked = None
    if asked is not None and asked.returncode == 0:
        return asked.stdout.strip()
    return "unknown" if record is None else record["commit"].removesuffix("+changes") + "+changes"
