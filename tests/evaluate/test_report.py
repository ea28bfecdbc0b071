"""Tests of reports: the table's numbers, which files belong to which run, broken runs, and escaped text."""

import ast
import json
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

from efface.cli.main import main
from efface.evaluate import forget_quality, model_utility, read_log, report
from efface.evaluate.report.find import find_log, find_runs
from efface.evaluate.report.plots import largest_gap
from efface.evaluate.report.runs import read_settings

# ---- run folders as the tools write them, with synthetic rows

PARTS = {"retain": "Q_A_Prob", "ra": "Q_A_Prob_normalised", "wf": "Q_A_Prob_normalised", "forget": "Q_A_Prob"}


def evaluation(seed: int, *, shift: float = 0.0, rows: int = 20, text: str = "it is {}") -> dict[str, Any]:
    """Return TOFU_EVAL.json of a model whose truth ratios on the forget rows are around exp(shift)."""
    draw = np.random.default_rng(seed)
    content: dict[str, Any] = {}
    for prefix, probability in PARTS.items():
        around = shift if prefix == "forget" else -1.0
        ratios = np.exp(draw.normal(around, 0.5, rows)).tolist()
        columns = {
            f"{prefix}_{probability}": ("prob", draw.uniform(0.3, 1, rows).tolist()),
            f"{prefix}_Q_A_ROUGE": ("rougeL_recall", draw.uniform(0.1, 1, rows).tolist()),
            "forget_truth_ratio" if prefix == "forget" else f"{prefix}_Truth_Ratio": ("score", ratios),
        }
        for name, (field, values) in columns.items():
            content[name] = {
                "agg_value": float(np.mean(values)),
                "value_by_index": {str(i): {field: value} for i, value in enumerate(values)},
            }
        for i, row in content[f"{prefix}_Q_A_ROUGE"]["value_by_index"].items():
            row |= {"input": f"what is {i}?", "ground_truth": f"it is {i}", "generation": ""}
            row["generation"] = text.format(i) if prefix == "forget" else f"it is {i}"
    content["extraction_strength"] = {"agg_value": 0.125}
    return content


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content))
    return path


def write_evaluation(folder: Path, content: dict[str, Any]) -> Path:
    summary = {name: metric["agg_value"] for name, metric in content.items()}
    write(folder / "TOFU_SUMMARY.json", summary)
    return write(folder / "TOFU_EVAL.json", content)


def write_run(
    folder: Path, seed: int, *, lr: float = 1e-5, checkpoints: int = 2, rows: int = 20, **options: Any
) -> Path:
    """Write a folder of ``efface unlearn`` with evaluated checkpoints and a training log."""
    identity = {
        "objective": {"name": "npo", "beta": 0.1, "alpha": 1.0},
        "arguments": {"learning_rate": lr, "num_train_epochs": 5.0, "max_steps": -1},
        "plan": {"seed": seed},
    }
    write(folder / "run.json", {"finished": True, "identity": identity})
    history = [{"step": step, "epoch": step / 10, "loss": 1 / step, "forget_loss": 2 / step} for step in (10, 20, 30)]
    write(folder / "trainer_state.json", {"global_step": 30, "log_history": history})
    for step in range(1, checkpoints + 1):
        content = evaluation(100 * seed + step, shift=-1.0 + step / 3, rows=rows, **options)
        write_evaluation(folder / f"checkpoint-{10 * step}" / "evals", content)
    write_evaluation(folder / "evals", evaluation(seed, rows=rows, **options))
    return folder


def write_audit(path: Path) -> Path:
    def view(mean: float) -> dict[str, Any]:
        figures = {
            "rows": 20,
            "left_out": 0,
            "mean": mean,
            "best": mean,
            "leaked": None,
            "labels": {"de": {"mean": mean}},
        }
        return {"figures": figures, "records": []}

    models = {name: {"path": name, "views": {"direct": view(mean)}} for name, mean in (("full", 0.75), ("npo", 0.25))}
    return write(path, {"rows": 20, "models": models})


# ---- the report


class Page(HTMLParser):
    """A page's tables by row name, its elements, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.elements: list[str] = []
        self.rows: list[list[tuple[str, str | None]]] = []
        self.heads: list[str] = []
        self.text = ""
        self.handlers: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append(tag)
        self.handlers += [name for name, _ in attrs if name.startswith("on")]
        if tag == "tr":
            self.rows.append([])
        elif tag == "td":
            self.rows[-1].append(("", dict(attrs).get("data-value")))
        elif tag == "button":
            self.heads.append("")

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.elements[-1:] == ["td"] and self.rows[-1]:
            text, value = self.rows[-1][-1]
            self.rows[-1][-1] = (text + data, value)
        elif self.elements[-1:] == ["button"]:
            self.heads[-1] += data

    def handle_endtag(self, tag: str) -> None:
        self.elements.append(f"/{tag}")

    def figures(self, run: str) -> dict[str, str]:
        """Return the row of a run in the first table: numbers with full precision, otherwise the text."""
        row = next(row for row in self.rows if len(row) > 1 and row[1][0] == run)
        return {head: text if value is None else value for head, (text, value) in zip(self.heads, row, strict=False)}

    @property
    def order(self) -> list[str]:
        """Names of the ranked runs."""
        return [row[1][0] for row in self.rows if len(row) > 2 and row[0][1] is not None and row[0][0].isdecimal()]


def runs(tmp_path: Path, count: int = 2, **options: Any) -> Path:
    for seed in range(count):
        write_run(tmp_path / "runs" / f"npo-{seed}", seed, lr=(1 + seed) * 1e-5, **options)
    return tmp_path / "runs"


def test_numbers_of_real_logs_are_forget_quality_and_model_utility(tofu_eval_logs: Path, tmp_path: Path) -> None:
    full, retain = (tofu_eval_logs / f"llama2-7b_{name}.json" for name in ("full", "retain90"))
    page = Page(report([full, retain], tmp_path / "r.html", retain_log=retain))
    # the retain log is not a run, full is one
    assert page.order == ["llama2-7b_full"]
    shown = page.figures("llama2-7b_full")
    log, retain_log = read_log(full), read_log(retain)
    assert float(shown["Forget Quality"]) == forget_quality(log, retain_log)
    utility = model_utility(log)
    assert float(shown["Model Utility"]) == utility["Model Utility"]
    assert float(shown["ra_Q_A_Prob_normalised"]) == utility["Prob. Real Authors"]
    assert float(shown["wf_Truth_Ratio"]) == utility["Truth Ratio Real World"]
    assert float(shown["forget ROUGE"]) == pytest.approx(0.9854, abs=1e-4)
    assert float(page.figures("retain model")["Model Utility"]) == model_utility(retain_log)["Model Utility"]
    assert page.figures("retain model")["Forget Quality"] == "-"
    # the drawing shows the statistic, and a leak shows its texts, truth and generation in the right columns
    gap = largest_gap(log.rows("forget", "truth_ratio"), retain_log.rows("forget", "truth_ratio"))
    assert f"D = {gap.statistic:.3f}" in page.text
    content = json.loads(full.read_text())["eval_log_forget.json"]
    rows = {row[0][0]: [text for text, _ in row] for row in page.rows if len(row) == 6 and row[0][0].isdecimal()}
    for index, (_, recall, retain_recall, question, truth, generation) in rows.items():
        assert [question, generation, truth] == content["generated_text"][index]
        assert float(recall) == pytest.approx(content["rougeL_recall"][index], abs=6e-4)
        assert float(recall) > float(retain_recall)
    assert len(rows) == 20


def test_the_largest_gap_is_where_the_distribution_functions_differ_most() -> None:
    draw = np.random.default_rng(0)
    for first, second in (
        (draw.normal(size=50), draw.normal(0.5, 1, 30)),
        (draw.integers(0, 5, 40).astype(float), draw.integers(1, 6, 25).astype(float)),  # ties
        (np.array([1.0]), np.array([2.0, 2.0])),
        (np.array([3.0, 4.0]), np.array([1.0])),
        (np.zeros(4), np.zeros(3)),
    ):
        gap = largest_gap(first, second)
        differences = {x: abs(np.mean(first <= x) - np.mean(second <= x)) for x in (*first, *second)}
        assert gap.statistic == pytest.approx(max(differences.values()))
        assert differences[gap.location] == pytest.approx(gap.statistic)
        assert gap.heights == (np.mean(first <= gap.location), np.mean(second <= gap.location))
        assert abs(gap.heights[0] - gap.heights[1]) == pytest.approx(gap.statistic)


def test_a_folder_of_runs(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    full = write_evaluation(tmp_path / "full", evaluation(7, shift=-1))
    retain = write_evaluation(tmp_path / "runs" / "retain" / "evals", evaluation(8))
    path = report(
        tmp_path, tmp_path / "r.html", markdown=tmp_path / "r.md", full=tmp_path / "full", retain_log=retain, floor=0.5
    )
    page = Page(path)
    assert sorted(page.order) == ["runs/npo-0", "runs/npo-1"] or sorted(page.order) == ["npo-0", "npo-1"]
    name = page.order[0]
    seed = int(name[-1])
    log = read_log(folder / f"npo-{seed}" / "evals" / "TOFU_EVAL.json")
    assert float(page.figures(name)["Forget Quality"]) == forget_quality(log, read_log(retain))
    assert float(page.figures(name)["extraction_strength"]) == 0.125
    # settings that all runs share are listed once, differing ones are in the table
    assert "All runs: npo, beta 0.1, alpha 1, epochs 5." in page.text
    assert page.figures(name)["settings"] == f"lr {(1 + seed) * 1e-5:g}, seed {seed}"
    assert all(drawn in page.text for drawn in ("forget_quality", "forget_loss", "optimizer step"))
    assert full.exists()
    text = (tmp_path / "r.md").read_text()
    assert all(f"(<r-pictures/{path.name}>)" in text for path in (tmp_path / "r-pictures").iterdir())
    assert len(list((tmp_path / "r-pictures").iterdir())) == 4
    quality = float(page.figures(name)["Forget Quality"])
    assert f"| {quality:.3g} |" in text
    # a report with fewer plots removes the old pictures
    report(folder / "npo-0", tmp_path / "r.html", markdown=tmp_path / "r.md", details=0)
    assert [path.name for path in (tmp_path / "r-pictures").iterdir()] == ["curves.svg"]


def test_a_checkpoint_is_used_for_a_run_without_a_final_evaluation(tmp_path: Path) -> None:
    for step in (5, 10):
        write_evaluation(tmp_path / "run" / f"checkpoint-{step}", evaluation(step))
    page = Page(report(tmp_path / "run", tmp_path / "r.html"))
    assert page.order == ["run (checkpoint-10)"]
    assert "forget_Q_A_Prob" in page.text
    write(tmp_path / "logged" / "trainer_state.json", {
        "global_step": 2,
        "log_history": [{"step": s, "model_utility": s / 4, "learning_rate": 1.0} for s in (1, 2)],
    })  # fmt: skip
    page = Page(report([tmp_path / "run", tmp_path / "logged"], tmp_path / "r.html"))
    assert float(page.figures("logged")["Model Utility"]) == 0.5
    assert "not evaluated" in page.text
    assert "learning_rate" not in page.text


def test_runs_under_the_utility_floor_come_last(tmp_path: Path) -> None:
    ruined = evaluation(1)
    for row in ruined["retain_Q_A_Prob"]["value_by_index"].values():
        row["prob"] = 1e-3
    write_evaluation(tmp_path / "runs" / "ruined", ruined)
    write_evaluation(tmp_path / "runs" / "kept", evaluation(2, shift=-0.4))
    full, retain = (
        write_evaluation(tmp_path / "full", evaluation(3)),
        write_evaluation(tmp_path / "retain", evaluation(1)),
    )
    options: dict[str, Any] = {"full": full, "retain_log": retain}
    page = Page(report(tmp_path / "runs", tmp_path / "r.html", **options))
    assert page.order == ["kept", "ruined"]
    assert "0.9 times that of the full model" in page.text
    assert Page(report(tmp_path / "runs", tmp_path / "r.html", floor=0, **options)).order == ["ruined", "kept"]
    page = Page(report(tmp_path / "runs", tmp_path / "r.html", retain_log=retain))
    assert page.order == ["ruined", "kept"]
    assert "the utility floor is not applied" in page.text


def test_missing_values_are_listed(tmp_path: Path) -> None:
    content = evaluation(1)
    del content["forget_Q_A_ROUGE"], content["wf_Truth_Ratio"]
    write_evaluation(tmp_path / "run", content)
    page = Page(report(tmp_path / "run", tmp_path / "r.html"))
    shown = page.figures("run")
    assert (shown["Forget Quality"], shown["Model Utility"], shown["forget ROUGE"]) == ("-", "-", "-")
    assert float(shown["forget probability"]) > 0
    assert "--retain-log" in page.text
    assert "efface evaluate --model RETAIN_MODEL" in page.text
    assert "the log has no rows of forget_Q_A_ROUGE, wf_Truth_Ratio" in page.text
    # a summary alone gives metrics but no rows
    write(tmp_path / "summary" / "TOFU_SUMMARY.json", {"forget_quality": 0.25, "model_utility": 0.5})
    page = Page(report(tmp_path / "summary", tmp_path / "r.html"))
    assert page.figures("summary")["Forget Quality"] == "0.25"
    assert "the value that each evaluation stored" in page.text
    assert "a summary without rows" in page.text
    page = Page(
        report(tmp_path / "summary", tmp_path / "r.html", retain_log=write_evaluation(tmp_path / "x", evaluation(2)))
    )
    assert "which may refer to another retain log" in page.text


def test_the_retain_model_that_was_evaluated_with_a_run_is_found(tmp_path: Path) -> None:
    log = write_evaluation(tmp_path / "run" / "evaluation", evaluation(1))
    retain = write_evaluation(tmp_path / "run" / "evaluation" / "retain_model", evaluation(2))
    page = Page(report(tmp_path / "run", tmp_path / "r.html", markdown=tmp_path / "r.md"))
    assert page.order == ["run"]
    assert float(page.figures("run")["Forget Quality"]) == forget_quality(read_log(log), read_log(retain))
    assert f"compares with `{retain}`, which" in (tmp_path / "r.md").read_text()
    assert f"Forget Quality compares with {retain}" in page.text
    other = write_evaluation(tmp_path / "retain", evaluation(3))
    page = Page(report(tmp_path / "run", tmp_path / "r.html", retain_log=other))
    assert page.order == ["run"]
    assert float(page.figures("run")["Forget Quality"]) == forget_quality(read_log(log), read_log(other))


def test_runs_with_retain_models_of_their_own_keep_what_their_evaluations_stored(tmp_path: Path) -> None:
    for seed in (1, 2):
        folder = tmp_path / "runs" / f"run-{seed}" / "evaluation"
        retain = write_evaluation(folder / "retain_model", evaluation(10 + seed))
        write_evaluation(folder, {**evaluation(seed), "forget_quality": {"agg_value": seed / 10}})
    page = Page(report(tmp_path / "runs", tmp_path / "r.html"))
    assert [float(page.figures(f"run-{seed}")["Forget Quality"]) for seed in (1, 2)] == [0.1, 0.2]
    # two copies of the same retain model are not ambiguous
    (tmp_path / "runs" / "run-1" / "evaluation" / "retain_model" / retain.name).write_bytes(retain.read_bytes())
    page = Page(report(tmp_path / "runs", tmp_path / "r.html"))
    log = read_log(tmp_path / "runs" / "run-1" / "evaluation" / retain.name)
    assert float(page.figures("run-1")["Forget Quality"]) == forget_quality(log, read_log(retain))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_not_shown_as_numbers(value: float, tmp_path: Path) -> None:
    content = evaluation(1)
    content["forget_truth_ratio"]["value_by_index"]["3"]["score"] = value
    content["retain_Q_A_Prob"]["value_by_index"]["3"]["prob"] = value
    content["privleak"] = {"agg_value": value}
    content["forget_quality"], content["model_utility"] = {"agg_value": 0.5}, {"agg_value": 0.5}
    write_evaluation(tmp_path / "run", content)
    retain = write_evaluation(tmp_path / "retain", evaluation(2))
    page = Page(report(tmp_path / "run", tmp_path / "r.html", retain_log=retain))
    shown = page.figures("run")
    assert {shown[name] for name in ("Forget Quality", "Model Utility", "forget truth ratio", "retain_Q_A_Prob")} == {
        "-"
    }
    assert "privleak" not in shown
    assert f"expected finite truth_ratio for the forget split, got {value} at row 3" in page.text
    assert f"privleak is stored as {value}" in page.text


def test_a_broken_run_does_not_sink_the_others(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    (folder / "cut").mkdir()
    (folder / "cut" / "TOFU_EVAL.json").write_text('{"forget_truth_ratio": {')
    write(folder / "list" / "TOFU_EVAL.json", [1])
    write(folder / "other" / "TOFU_EVAL.json", {"accuracy": 1})
    write(folder / "odd" / "TOFU_EVAL.json", {"forget_truth_ratio": {"value_by_index": {"0": 3}}})
    write(folder / "empty" / "TOFU_SUMMARY.json", {})
    write(folder / "state" / "trainer_state.json", {"log_history": 3, "global_step": 1})
    write(folder / "audit" / "AUDIT.json", {"models": 3})
    (folder / "bytes").mkdir()
    (folder / "bytes" / "TOFU_EVAL.json").write_bytes(b"\xff\xfe\x00")
    page = Page(report(folder, tmp_path / "r.html", markdown=tmp_path / "r.md"))
    assert {"npo-0", "npo-1", "cut", "list", "other", "odd", "empty", "state", "bytes"} <= set(page.order)
    assert set(page.order[:2]) == {"npo-0", "npo-1"}
    assert page.figures("cut")["Model Utility"] == "-"
    for said in ("cut/TOFU_EVAL.json': expected a JSON file", "list/TOFU_EVAL.json': expected a JSON object of metrics",
                 "other/TOFU_EVAL.json': expected the keys", "odd/TOFU_EVAL.json': expected rows in the format",
                 "empty/TOFU_SUMMARY.json': expected metrics", "state/trainer_state.json': expected a trainer's state",
                 "AUDIT.json': expected an audit", "bytes/TOFU_EVAL.json': expected a JSON file"):  # fmt: skip
        assert said in page.text


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)> --> `a|b` $x^2$ \ud800 {{ 7 * 7 }} &amp; {}"


def test_texts_of_models_and_names_of_runs_stay_text(tmp_path: Path) -> None:
    name = "<script>alert(3)<\u2215script> --> $x_{$ &lt;"
    text = HOSTILE.replace("{}", "").replace("{", "{{").replace("}", "}}") + "{}"
    write_run(tmp_path / "runs" / name, 1, text=text)
    write_run(tmp_path / "runs" / "plain", 2, text=text)
    path = report(tmp_path / "runs", tmp_path / "r.html", markdown=tmp_path / "r.md")
    page = Page(path)
    assert page.elements.count("script") == 1
    assert "img" not in page.elements
    assert not page.handlers
    assert name in page.order
    generations = [row[-1][0] for row in page.rows if row and "alert(1)" in row[-1][0]]
    assert generations
    assert all("{{ 7 * 7 }} &amp; " in shown and "</script><script>" in shown for shown in generations)
    assert not any(link in path.read_text() for link in ('src="http', 'href="http', "url(http", "@import"))
    markdown = (tmp_path / "r.md").read_text()
    assert "<script" not in markdown
    assert "<img" not in markdown
    assert "a\\|b" in markdown


def test_the_same_files_give_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = runs(tmp_path, 3)
    options: dict[str, Any] = {"retain_log": write_evaluation(tmp_path / "retain", evaluation(9))}
    first = report(folder, tmp_path / "a.html", **options).read_bytes()
    monkeypatch.setitem(mpl.rcParams, "axes.facecolor", "black")  # a user's style
    backend = mpl.rcParams["backend"]
    assert report([folder], tmp_path / "deep" / "b.html", **options).read_bytes() == first
    assert mpl.rcParams["axes.facecolor"] == "black"
    assert mpl.rcParams["backend"] == backend
    assert b"202" not in first.split(b"<svg", 1)[1].split(b"</svg>", 1)[0].split(b"<style")[0]  # no date


def test_a_hundred_runs(tmp_path: Path) -> None:
    texts = [json.dumps(evaluation(seed, rows=400, text="x" * 900 + "{}")) for seed in range(5)]
    for run in range(100):
        folder = tmp_path / "runs" / f"lr{run % 3}" / f"run-{run}"
        folder.mkdir(parents=True)
        (folder / "TOFU_EVAL.json").write_text(texts[run % 5])
        history = [{"step": step, "loss": run / step, "forget_loss": step} for step in range(1, 500)]
        write(folder / "trainer_state.json", {"global_step": 500, "log_history": history})
    retain = write_evaluation(tmp_path / "retain", evaluation(50, rows=400))
    began = time.process_time()
    path = report(tmp_path / "runs", tmp_path / "r.html", retain_log=retain)
    assert time.process_time() - began < 60
    assert path.stat().st_size < 3e6
    page = Page(path)
    assert len(page.order) == 100
    assert page.order[0].startswith("lr")
    assert "92 more" in page.text


def test_audits_are_shown_side_by_side(tmp_path: Path) -> None:
    folder = runs(tmp_path)
    for seed in (0, 1):
        write_audit(folder / f"npo-{seed}" / "audit" / "AUDIT.json")
    page = Page(report(folder, tmp_path / "r.html"))
    rows = [[text for text, _ in row] for row in page.rows if len(row) == 5 and row[1][0] in ("full", "npo")]
    first, second = sorted(page.order)
    high, low = ["0.750"] * 3, ["0.250"] * 3
    assert rows == [[first, "full", *high], [first, "npo", *low], [second, "npo", *low]]
    assert {"direct", "direct: best", "direct: de"} <= set(page.heads)
    assert "Leak audit" in page.text
    # an audit of several models is not a run, and is also shown without any run
    path = write_audit(tmp_path / "alone" / "audit" / "AUDIT.json")
    page = Page(report([folder, path.parents[1]], tmp_path / "r.html"))
    assert sorted(page.order) == ["npo-0", "npo-1"]
    page = Page(report(path.parents[1], tmp_path / "r.html", markdown=tmp_path / "r.md"))
    assert page.order == []
    assert [row[2][0] for row in page.rows if row] == ["0.750", "0.250"]
    assert "Forget Quality" not in page.text


def test_files_are_found_where_tools_leave_them(tmp_path: Path) -> None:
    def put(*places: str) -> None:
        for place in places:
            write(tmp_path / place, {})

    put("a/evals/TOFU_EVAL.json", "a/evals/TOFU_SUMMARY.json", "a/checkpoint-6/evals/TOFU_SUMMARY.json")
    put("a/checkpoint-12/trainer_state.json", "a/checkpoint-6/trainer_state.json", "a/audit/AUDIT.json")
    put("b/c/eval_results/ds_size300/eval_log_aggregated.json", "b/.hidden/TOFU_EVAL.json")
    put("run-10/TOFU_EVAL.json", "run-2/TOFU_EVAL.json", "run-2/evals/TOFU_EVAL.json", "full/TOFU_EVAL.json")
    put("full/TOFU_SUMMARY.json", "full/checkpoint-3/TOFU_SUMMARY.json", "odd.json")
    found = {
        run.name: run
        for run in find_runs([tmp_path, tmp_path / "odd.json"], without=[tmp_path / "full/TOFU_EVAL.json"])
    }
    assert list(found) == ["a", "b/c", "odd", "run-2", "run-2/evals", "run-10"]
    a = found["a"]
    assert {step: path.relative_to(tmp_path).as_posix() for step, path in a.logs.items()} == {
        None: "a/evals/TOFU_EVAL.json",
        6: "a/checkpoint-6/evals/TOFU_SUMMARY.json",
    }
    assert a.history == (tmp_path / "a/checkpoint-12/trainer_state.json").resolve()
    assert a.audit is not None
    assert find_log(tmp_path / "a").name == "TOFU_EVAL.json"
    assert find_log(tmp_path / "full").parent.name == "full"
    # names are as short as possible, also if the folders are given one by one
    assert [run.name for run in find_runs([tmp_path / "run-2/evals", tmp_path / "b"])] == ["b/c", "run-2/evals"]
    assert [run.name for run in find_runs([tmp_path / "a"])] == ["a"]


def test_settings_are_read_from_what_is_in_the_folder(tmp_path: Path) -> None:
    assert read_settings(tmp_path) == {}
    hydra = "trainer:\n  handler: NPO\n  method_args: {beta: 0.1, alpha: 2}\n  args: {learning_rate: 1e-5, seed: 0}\n"
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(hydra)
    assert read_settings(tmp_path) == {"objective": "NPO", "beta": "0.1", "alpha": "2", "lr": "1e-5", "seed": "0"}
    recipe = {"objective": {"name": "simnpo"}, "arguments": {"max_steps": 7, "num_train_epochs": 3.0}, "plan": {}}
    (tmp_path / "README.md").write_text(f"---\nefface: {json.dumps(recipe)}\n---\n\n# card\n")
    assert read_settings(tmp_path) == {"objective": "simnpo", "steps": "7"}
    (tmp_path / "run.json").write_text("{}")  # from another program
    assert read_settings(tmp_path)["objective"] == "simnpo"
    # an evaluation outside of the run's folder names its model and data
    facts = {"model": str(tmp_path), "split": "forget05", "protocol": {"name": "tofu"}}
    write(tmp_path / "evaluation" / "EVAL_CONFIG.json", facts)
    settings = read_settings(tmp_path / "evaluation", tmp_path / "evaluation")
    assert settings == {"objective": "simnpo", "steps": "7", "split": "forget05", "protocol": "tofu"}


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs(tmp_path)
    words = ["report", str(folder), "--output", str(tmp_path / "r.html"), "--markdown", str(tmp_path / "r.md")]
    assert main(words) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'r.html'}, {tmp_path / 'r.md'}\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["r-pictures", "r.html", "r.md", "runs"]
    page = (tmp_path / "r.html").read_bytes()
    assert main([*words, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["written"] == [str(tmp_path / "r.html"), str(tmp_path / "r.md")]
    names = [run["name"] for run in found["runs"]]
    assert names
    assert [names, page] == [[name for name in names if name.encode() in page], (tmp_path / "r.html").read_bytes()]
    assert all({"figures", "settings", "below_floor", "notes"} <= run.keys() for run in found["runs"])
    (tmp_path / "nothing").mkdir()
    for given, said in (
        ([str(tmp_path / "gone")], "gone' does not exist"),
        ([str(tmp_path / "nothing")], "expected TOFU_EVAL.json, "),
        ([str(folder), "--floor", "2"], "`floor`: expected a share"),
        ([str(folder), "--details", "-1"], "`details`: expected"),
        ([str(folder), "--output", "log.json"], "`output`: expected a file that ends in .html"),
        ([str(folder), "--markdown", "r.html"], "`markdown`: expected a file that ends in .md"),
        ([str(folder), "--full", str(tmp_path / "nothing")], "expected an evaluation log, or a folder with one of"),
        ([str(folder / "npo-0"), "--full", str(folder / "npo-0")], "expected at least one run in addition to the full"),
        ([str(folder), "--retain-log", str(folder / "npo-0" / "run.json")], "expected the keys of TOFU's"),
    ):  # fmt: skip
        assert main(["report", *given]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "log.json").exists()


def test_evaluating_loads_no_plots() -> None:
    """``efface.evaluate`` does not import matplotlib and jinja2; they are imported by the first report."""
    source = Path(str(sys.modules["efface.evaluate.report"].__file__)).read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        assert not isinstance(node, ast.Import)
        if isinstance(node, ast.ImportFrom):
            assert node.module in ("collections.abc", "pathlib", "efface.extras")
