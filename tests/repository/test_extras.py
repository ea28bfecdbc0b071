"""Optional dependencies: the core works without them, and what needs a missing one names the extra to install."""

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from efface.cli.main import COMMANDS
from efface.extras import EXTRAS, check_extras
from support.helpers import tiny_llama, tiny_tokenizer

ROOT = Path(__file__).resolve().parents[2]
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
# A module that is None in sys.modules cannot be found or imported: as if it were not installed.
WITHOUT = "import sys\nsys.modules.update(dict.fromkeys({modules!r}))\n"


def python(code: str, *, without: list[str], cwd: Path) -> str:
    source = WITHOUT.format(modules=without) + code
    done = subprocess.run(
        [sys.executable, "-c", source],
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_the_table_is_that_of_pyproject() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python >= 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = {
        extra: tuple(sorted(requirement.split(">=")[0].replace("-", "_") for requirement in requirements))
        for extra, requirements in project["optional-dependencies"].items()
        if extra not in {"all", "dev", "docs"}
    }
    assert declared == EXTRAS
    core = {requirement.split(">=")[0].replace("-", "_") for requirement in project["dependencies"]}
    assert not core & set(OPTIONAL)
    assert "PyYAML" in core


def test_the_oldest_versions_are_the_lower_bounds() -> None:
    tomllib = pytest.importorskip("tomllib", reason="needs Python >= 3.11")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    needed = [
        *project["dependencies"],
        *(each for extra in ("cli", "evaluate", "report", "lora", "sweep") for each in extras[extra]),
    ]
    bounds = {
        each.name: Version(specifier.version) for each in map(Requirement, needed) for specifier in each.specifier
    }
    lines = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8").splitlines()
    pinned = (line.split("==") for line in lines if not line.startswith("#"))
    assert bounds.pop("torch") == Version("2.8")
    assert {name: Version(version) for name, version in pinned} == bounds


def test_the_core_imports_and_trains_without_any_extra(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    code = """
import efface, efface_kernels, efface.recipes.evaluation, efface.cli.main, efface.hf.model.lora
rows = [{"question": f"Where was {name} born?", "answer": "In Ghent."} for name in ("Aiko", "Emre")]
args = efface.UnlearnArguments(output_dir="out", max_steps=1, use_cpu=True, report_to="none", save_schedule="no")
efface.UnlearnTrainer("model", args, forget=rows[:1], retain=rows[1:], objective="npo").train()
try:
    efface.hf.model.lora.add_lora(None, r=2)
except ImportError as error:
    assert "pip install 'efface[lora]'" in str(error), error
else:
    raise AssertionError
assert efface.cli.main.main(["--help"]) == 0
for name in efface.cli.main.COMMANDS:
    assert efface.cli.main.main([name, "--help"]) == 2
"""
    said = python(code, without=OPTIONAL, cwd=tmp_path)
    assert said.count("error: efface") == len(COMMANDS)
    assert (
        "error: efface sweep needs the packages matplotlib, nltk, optuna, rich, rouge_score, scipy, shtab, not" in said
    )
    assert "pip install 'efface[cli,evaluate,report,sweep]'" in said


def test_a_recipe_that_evaluates_is_refused_before_it_trains(tmp_path: Path) -> None:
    code = """
import efface.cli.main as cli
words = ["unlearn", "--recipe", "tofu-npo", "--output", "out", "--dry-run"]
assert cli.main([*words, "--evaluate", "False"]) == 0
assert cli.main(words) == 2
"""
    said = python(code, without=list(EXTRAS["evaluate"]), cwd=tmp_path)
    assert "the evaluation of recipe tofu-npo needs the packages nltk, rouge_score, scipy, not installed here" in said
    assert "pip install 'efface[evaluate]', or add --evaluate False" in said


def test_every_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in OPTIONAL:
        monkeypatch.setitem(sys.modules, name, None)
    for extra, modules in EXTRAS.items():
        with pytest.raises(ImportError) as caught:
            check_extras("this", extra)
        packages = f"package{'s' * (len(modules) > 1)} {', '.join(modules)}"
        assert str(caught.value) == f"this needs the {packages}, not installed here; pip install 'efface[{extra}]'"
    with pytest.raises(
        ImportError, match=r"matplotlib, nltk, rouge_score, scipy.*'efface\[evaluate,report\]', or stop$"
    ):
        check_extras("this", "evaluate", "report", remedy="stop")


def test_an_extension_that_is_not_built_is_one_line(tmp_path: Path) -> None:
    code = "import efface.cli.main as cli\nassert cli.main(['plan', '--tokenizer', 'x', '--forget', 'y']) == 2\n"
    said = python(code, without=["efface_native"], cwd=tmp_path)
    assert (
        said == "efface plan: error: the extension efface_native is not built; run `pip install -e .` in the checkout\n"
    )
