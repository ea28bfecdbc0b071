"""The sdist and the wheel build, and work in an environment that has never seen this checkout."""

import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(*command: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_sdist_and_wheel_build_and_import_in_a_clean_environment(tmp_path: Path) -> None:
    dist = tmp_path / "dist"
    # the wheel is built from the sdist, so a file that the sdist forgets is noticed
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", dist, ROOT, cwd=tmp_path)
    (wheel,) = dist.glob("efface-*.whl")
    assert len(list(dist.glob("efface-*.tar.gz"))) == 1
    names = zipfile.ZipFile(wheel).namelist()
    assert "efface/__init__.py" in names
    assert "efface_kernels/linear_loss/README.md" in names
    templates = {path.name for path in (ROOT / "engine/efface/evaluate/report/templates").iterdir()}
    assert {f"efface/evaluate/report/templates/{name}" for name in templates} <= set(names)
    assert {"efface/recipes/tofu-npo.yaml", "efface/recipes/idk.txt"} <= set(names)
    assert any(name.startswith("efface_native.") for name in names)
    assert "efface_native-stubs/__init__.pyi" in names
    assert not any(name.startswith(("tests", "benchmarks", "csrc", "engine", "kernels/")) for name in names)

    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False)
    python = environment / "bin" / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    run(sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    # The dependencies come from here; a path in a .pth file does not run the .pth files there, so this checkout's
    # editable install stays unseen.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    code = "import efface, efface_kernels as k, efface_native as n; print(efface.__file__, k.__file__, n.__file__)"
    places = run(python, "-c", code, cwd=tmp_path).split()
    assert all(place.startswith(str(site)) for place in places), places
    version = run(python, "-m", "efface", "--version", cwd=tmp_path)
    assert version.startswith("efface ")
    run(python, "-c", "import efface; efface.UnlearnTrainer, efface.evaluate.read_log", cwd=tmp_path)
