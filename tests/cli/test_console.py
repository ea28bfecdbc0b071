"""Where commands speak: a pipe shows whole tables, and so does a terminal of 80 columns."""

from types import SimpleNamespace

import pytest
from rich.console import Console

from efface.cli import tiny as command
from efface.cli.progress import PIPE_WIDTH, open_console


@pytest.mark.parametrize(("columns", "width"), [("72", PIPE_WIDTH), ("300", 300)])
def test_a_pipe_is_wide(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert open_console().width == width
    assert open_console(stderr=True).stderr


def test_figures_of_a_recipe_are_whole_on_a_narrow_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    figures = dict(
        zip(command._COLUMNS.values(), [1.46e-13, 0.9291, 5.22e-05, 0.0411, 0.558, 0.0353, 0.285], strict=True)
    )
    model = SimpleNamespace(name="unlearned", note="", figures=figures)
    run = SimpleNamespace(recipe="r", data="d", changed={}, overrides=[], revisions=[], models=[model])
    command.show(run, Console(width=80))  # type: ignore[arg-type]
    shown = capsys.readouterr().out
    for value in figures.values():
        assert f"{value:.3g}" in shown
    assert "…" not in shown
