"""Tests of the driver of a borrowed GPU: good, silent, failing and hanging sections, and the prepared folder."""

import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs process groups")

MODULES = {
    "good": "def run(run):\n    run.row('all well', figure=1.5)\n    run.row(figure=2.5, named=run.arguments)\n",
    "silent": "def run(run):\n    print('nothing to say')\n",
    "failing": "def run(run):\n    run.row(figure=1)\n    raise ArithmeticError('2 + 2 = 5')\n",
    "absent": "import a_package_that_nobody_has\n",
    "dying": "import os, signal\ndef run(run):\n    run.row(figure=1)\n    os.kill(os.getpid(), signal.SIGSEGV)\n",
    "hanging": """
import signal, subprocess, sys, time
def run(run):
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])
    run.row('before it hangs', child=child.pid)
    time.sleep(600)
""",
    "counting": """
def run(run):
    for number in range(500):
        run.row(f'the {number}.' if number % 5 == 0 else '', figure=number)
""",
    "wordy": """
def run(run):
    run.row('much ' * 9999)
    print('noise ' * 99999)
    raise ValueError('x' * 9999)
""",
    "timed": "import time\ndef run(run):\n    run.row(left=run.deadline - time.monotonic())\n",
}


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """The package, with a prepared folder and modules of sections in the test's folder."""
    monkeypatch.syspath_prepend(ROOT)
    from benchmarks.gpu import driver, prepare, sections

    monkeypatch.setattr(prepare, "CARRIED", tmp_path / "carried")
    monkeypatch.setattr(prepare, "EXTENSION", "json")  # importable on every machine
    for name, text in MODULES.items():
        (tmp_path / "modules" / "sections").mkdir(parents=True, exist_ok=True)
        (tmp_path / "modules" / "sections" / f"{name}.py").write_text(text)
    return Namespace(driver=driver, sections=sections, prepare=prepare, modules=tmp_path / "modules")


def run(gpu: Any, folder: Path, *names: str, seconds: float = 60, limit: float = 30, **changes: Any) -> list[Any]:
    sections = tuple(gpu.sections.Section(name, limit, f"sections.{name}", **changes) for name in names)
    made = gpu.driver.Driver(folder, smoke=True, path=[gpu.modules])
    ended: list[Any] = made.run(gpu.sections.Call(seconds, sections))
    return ended


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def test_a_section_that_fails_does_not_stop_the_others(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ended = run(gpu, tmp_path / "out", "silent", "failing", "absent", "dying", "good")
    assert [each.status for each in ended] == ["ended", "failed, exit 1", "failed, exit 1", "failed, exit -11", "ended"]
    assert [each.rows for each in ended] == [0, 1, 0, 1, 2]
    assert [each.good for each in ended] == [False, False, False, False, True]
    found = rows(tmp_path / "out")
    assert [row["section"] for row in found] == ["failing", "dying", "good", "good"]
    assert found[2]["figure"] == 1.5
    assert all(row["commit"] == gpu.prepare.commit() and row["gpu"] == "" and row["time"] for row in found)
    printed = capsys.readouterr().out
    assert "all well" in printed
    assert "2 + 2 = 5" in printed
    table = printed.splitlines()[-6:]
    assert table[0].split()[:2] == ["section", "rows"]
    assert table[1].endswith("measured nothing")
    assert "nothing to say" in (tmp_path / "out" / "silent.log").read_text()


def test_a_section_that_hangs_is_ended_with_all_that_it_started(gpu: Any, tmp_path: Path) -> None:
    begin = time.monotonic()
    hanging, good = run(gpu, tmp_path / "out", "hanging", "good", limit=4)
    assert time.monotonic() - begin < 30
    assert hanging.status == "stopped at its limit"
    assert hanging.rows == 1  # rows written before it was stopped are kept
    assert not hanging.good
    assert good.good
    assert not alive(rows(tmp_path / "out")[0]["child"])


def test_no_section_outlasts_the_call(gpu: Any, tmp_path: Path) -> None:
    timed, late = run(gpu, tmp_path / "out", "timed", "good", seconds=5, limit=1000)
    assert timed.good
    assert 0 < rows(tmp_path / "out")[0]["left"] <= 5
    assert late.good
    hanging, late = run(gpu, tmp_path / "again", "hanging", "good", seconds=5, limit=1000)
    assert hanging.status == "stopped at its limit"
    assert late.status == "no time left"
    assert not late.good


def test_sections_end_with_the_driver(gpu: Any, tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from benchmarks.gpu import __main__, driver, sections as plan\n"
        "section = plan.Section('hanging', 60, 'sections.hanging')\n"
        "plan.CALLS[1] = plan.Call(60, (section, plan.Section('good', 60, 'sections.good')))\n"
        f"sys.argv = ['gpu', '1', '--smoke', '--out', {str(tmp_path / 'out')!r}]\n"
        "sys.exit(__main__.main())\n"
    )
    path = os.pathsep.join([str(ROOT), str(gpu.modules)])
    process = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path})
    results = tmp_path / "out" / "results.jsonl"
    for _ in range(600):
        if results.exists() and results.read_text().endswith("\n"):
            break
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == 130
    assert not alive(rows(tmp_path / "out")[0]["child"])


def test_a_section_ends_by_itself_where_the_driver_was_killed(gpu: Any, tmp_path: Path) -> None:
    code = (
        "import sys, time; sys.path.insert(0, sys.argv.pop()); from benchmarks.gpu import section\n"
        "section._LATE = 0.0\n"
        "section.main(*sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), "hanging", "sections.hanging", str(gpu.modules)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "EFFACE_GPU_SMOKE": "1"}
    process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE)
    process.communicate(b"1.5\n", timeout=30)
    assert process.returncode == -signal.SIGALRM
    (row,) = rows(tmp_path)
    os.kill(row["child"], signal.SIGKILL)


def test_a_process_that_cannot_be_ended_does_not_hold_the_driver(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(timeout: float) -> int:
        raise subprocess.TimeoutExpired("a kernel that hangs", timeout)

    monkeypatch.setattr(gpu.driver, "_GRACE", 0.01)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    process = subprocess.Popen(command, preexec_fn=os.setpgrp)  # noqa: PLW1509 - as the driver does
    with monkeypatch.context() as held:
        held.setattr(process, "wait", never)
        gpu.driver.end(process)
    assert process.wait(30) < 0


def test_printed_output_is_bounded(gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (wordy,) = run(gpu, tmp_path / "out", "wordy")
    assert wordy.status == "failed, exit 1"
    printed = capsys.readouterr().out
    assert len(printed) < 6000
    assert "ValueError: xxx" in printed
    assert len(rows(tmp_path / "out")[0]["said"]) == 5 * 9999  # complete in the results


def test_rows_without_text_do_not_count_as_printed_lines(
    gpu: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (counting,) = run(gpu, tmp_path / "out", "counting")
    assert counting.rows == 500
    printed = capsys.readouterr().out
    assert "the 295." in printed  # the 60th
    assert "the 300." not in printed


def test_a_truncated_line_loses_no_other(gpu: Any, tmp_path: Path) -> None:
    (tmp_path / "results.jsonl").write_text('{"section": "good", "fig')
    (good,) = run(gpu, tmp_path, "good")
    assert good.rows == 2
    cut, *whole = (tmp_path / "results.jsonl").read_text().splitlines()
    assert cut == '{"section": "good", "fig'
    assert [json.loads(line)["section"] for line in whole] == ["good", "good"]


def test_a_folder_that_cannot_be_written_is_an_options_error(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from benchmarks.gpu import __main__ as program

    (tmp_path / "file").touch()
    monkeypatch.setattr(sys, "argv", ["gpu", "1", "--smoke", "--out", str(tmp_path / "file" / "out")])
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    assert program.main() == 2
    assert "python -m benchmarks.gpu 1: --out: " in capsys.readouterr().err


def test_a_missing_extension_is_built_by_the_driver(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(gpu.prepare, "EXTENSION", "efface_nowhere")
    made = "open({!r}, 'w').close()"
    monkeypatch.setattr(
        gpu.prepare,
        "build_command",
        lambda folder: [sys.executable, "-c", made.format(str(folder / "efface_nowhere.cpython-312.so"))],
    )
    (good,) = run(gpu, tmp_path / "out", "good", native=True)
    assert good.good
    assert "prepare --extension" in capsys.readouterr().out
    assert (gpu.prepare.CARRIED / "site" / "efface_nowhere.cpython-312.so").is_file()
    monkeypatch.setattr(gpu.prepare, "build_command", lambda folder: [sys.executable, "-c", "raise SystemExit(3)"])
    (good,) = run(gpu, tmp_path / "again", "good", native=True)
    assert good.good  # for a section that needs it, the import reports what is missing
    assert "could not be built: exit 3" in capsys.readouterr().out


def test_the_commit_is_known_with_and_without_git(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prepare, source = gpu.prepare, tmp_path / "tree" / "kernels" / "a.py"
    source.parent.mkdir(parents=True)
    source.write_text("a = 1\n")
    digest = prepare.digest(tmp_path / "tree")
    monkeypatch.setattr(prepare, "ROOT", tmp_path / "tree")
    monkeypatch.setattr(prepare, "digest", lambda found=prepare.digest: found(tmp_path / "tree"))
    assert prepare.commit() == "unknown"
    prepare.CARRIED.mkdir()
    (prepare.CARRIED / "prepared.json").write_text(json.dumps({"commit": "abc", "sources": digest}))
    assert prepare.commit() == "abc"
    source.write_text("a = 2\n")
    assert prepare.commit() == "abc+changes"
    if shutil.which("git"):
        git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org"]
        for command in (["init", "-q"], ["add", "kernels"], ["commit", "-qm", "one"]):
            subprocess.run([*git, *command], cwd=tmp_path / "tree", check=True)
        assert len(prepare.commit()) == 40


def test_the_prepared_folder(gpu: Any, tmp_path: Path) -> None:
    prepare = gpu.prepare
    assert not prepare.copy_rows(tmp_path / "nowhere", tmp_path / "rows")
    for name in prepare.ROWS:
        (tmp_path / name).write_text('{"question": "q", "answer": "a"}\n')
    assert prepare.copy_rows(tmp_path, tmp_path / "rows")
    assert {path.name for path in (tmp_path / "rows").iterdir()} == set(prepare.ROWS)
    prepare.write_stub(tmp_path)
    (stub,) = importlib.metadata.distributions(name="efface", path=[str(tmp_path)])
    assert stub.version == importlib.metadata.version("efface")


def test_a_wrong_option_keeps_the_prepared_folder(gpu: Any, tmp_path: Path) -> None:
    from benchmarks.harness.shared import BadOption

    gpu.prepare.CARRIED.mkdir()
    (gpu.prepare.CARRIED / "prepared.json").write_text("{}")
    with pytest.raises(BadOption, match="--extension: expected a file of"):
        gpu.prepare.run(Namespace(extension=tmp_path / "absent.so", python=None, tofu=tmp_path))
    assert (gpu.prepare.CARRIED / "prepared.json").is_file()


def test_an_extension_for_another_python_or_a_newer_library_is_refused(
    gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from benchmarks.harness.shared import BadOption

    options = Namespace(extension=None, python=sys.executable)
    monkeypatch.setattr(gpu.prepare, "PYTHON", "2.7")
    with pytest.raises(BadOption, match=r"--python: expected an interpreter of Python 2.7, got"):
        gpu.prepare.extension_into(tmp_path, options)
    assert "no python2.7 here" in gpu.prepare.extension_into(tmp_path, Namespace(extension=None, python=None))[0]
    with pytest.raises(BadOption, match="--extension: expected a file of"):
        gpu.prepare.extension_into(tmp_path, Namespace(extension=tmp_path / "absent.so", python=None))
    built = importlib.util.find_spec("efface_native")
    if built is not None and built.origin is not None and sys.platform == "linux":
        assert (2, 2, 5) <= gpu.prepare.newest_symbol(Path(built.origin), "GLIBC") < (3,)
    (tmp_path / "x.so").write_bytes(b"\0GLIBC_2.4\0GLIBC_2.34\0GLIBC_2.4\0GLIBC_PRIVATE\0")
    assert gpu.prepare.newest_symbol(tmp_path / "x.so", "GLIBC") == (2, 34)
    assert gpu.prepare.newest_symbol(tmp_path / "x.so", "GLIBCXX") == (0,)


def test_every_section_of_the_plan_is_there(gpu: Any) -> None:
    from benchmarks.__main__ import parsed

    assert sorted(gpu.sections.CALLS) == [1, 2, 3]
    assert sum(call.seconds for call in gpu.sections.CALLS.values()) <= 605  # of 900, with three starts
    for call in gpu.sections.CALLS.values():
        names = [section.name for section in call.sections]
        assert len(set(names)) == len(names)
        for section in call.sections:
            module, _, function = section.imported.partition(":")
            spec = importlib.util.find_spec(module)
            assert spec is not None
            assert f"\ndef {function or 'run'}(run: Run)" in Path(str(spec.origin)).read_text()
            if section.module == "suite":
                options, suite = parsed([*section.arguments, "--device", "cuda"])
                assert suite is not None
                assert all(name.startswith("GPU: ") for name in options.shape)
                if section.arguments[0] == "loss":
                    suite._check_without(options)


def cached(folder: Path) -> dict[str, bytes]:
    """Return the files of a Triton cache, without its group files, whose times differ."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*") if path.is_file()}


def test_a_packed_cache_works_in_another_folder(gpu: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks.gpu import precompile

    cache, packed = tmp_path / "cache", gpu.prepare.CARRIED / "triton"
    (cache / "KEY").mkdir(parents=True)
    (cache / "KEY" / "a.cubin").write_bytes(b"\x7fELF")
    (cache / "KEY" / "a.lock").write_bytes(b"")
    group = {"child_paths": {"a.cubin": str(cache / "KEY" / "a.cubin")}, "more": 1}
    (cache / "KEY" / "__grp__a.json").write_text(json.dumps(group))
    precompile.pack(cache, packed)
    shutil.rmtree(cache)
    assert not any(str(tmp_path) in path.read_text() for path in packed.rglob("*.json"))
    monkeypatch.delenv("TRITON_CACHE_DIR", raising=False)
    given = Path(gpu.driver.environment(smoke=False)["TRITON_CACHE_DIR"])
    again = json.loads((given / "KEY" / "__grp__a.json").read_text())
    assert again == {"child_paths": {"a.cubin": str(given / "KEY" / "a.cubin")}, "more": 1}
    assert Path(again["child_paths"]["a.cubin"]).read_bytes() == b"\x7fELF"
    assert {path.name for path in (given / "KEY").iterdir()} == {"a.cubin", "__grp__a.json"}
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    assert gpu.driver.environment(smoke=False)["TRITON_CACHE_DIR"] == "mine"


@pytest.mark.slow
def test_kernels_compiled_here_are_found_there(tmp_path: Path) -> None:
    """Without a GPU. A second run with the packed cache compiles nothing."""
    pytest.importorskip("triton")
    from benchmarks.gpu import precompile

    def fill(cache: Path) -> dict[str, bytes]:
        environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        path = os.pathsep.join(str(ROOT / name) for name in ("engine", "kernels", "."))
        environment |= {"PYTHONPATH": path, "TRITON_CACHE_DIR": str(cache), "TRITON_STORE_BINARY_ONLY": "1"}
        command = [sys.executable, "-m", "benchmarks.gpu.precompile", "--dtype", "float32", "--cases", "0"]
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
        assert re.search(r"[1-9]\d* launches compiled", done.stdout)
        return cached(cache)

    first = fill(tmp_path / "here")
    assert {name.rpartition(".")[2] for name in first} >= {"cubin", "json"}
    precompile.pack(tmp_path / "here", tmp_path / "packed")
    shutil.rmtree(tmp_path / "here")
    precompile.unpack(tmp_path / "packed", tmp_path / "there")
    expected = cached(tmp_path / "there")
    assert fill(tmp_path / "there") == expected
    assert first.keys() == expected.keys()


def test_kernels_that_cannot_be_compiled_are_lacking(gpu: Any, tmp_path: Path) -> None:
    for python, said in (("", "No such file"), (str(tmp_path / "absent"), "No such file")):
        if shutil.which(python or "python3.12"):
            continue
        (lack,) = gpu.prepare.kernels_into(tmp_path / "packed", tmp_path, python)
        assert lack.startswith("compiled kernels")
        assert said in lack
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho more >&2; echo 'ModuleNotFoundError: triton' >&2; exit 1\n")
    failing.chmod(0o755)
    (lack,) = gpu.prepare.kernels_into(tmp_path / "packed", tmp_path, str(failing))
    assert lack.endswith("ModuleNotFoundError: triton")
    assert not (tmp_path / "packed").exists()
