"""The record says what a run was and what it left; evidence is that of one whole run, and one process at a time."""

import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import tiny
from PIL import Image
from tiny import names, write_folder

from rmlib import figures, params, records, runs
from rmlib.notebooks import parameters_cell

STEM, LATER, ANNOTATED = "99_toy", "98_later", "01b_annotated_sets"
pytestmark = pytest.mark.usefixtures("places")


def draw(run: records.Run, name: str, grey: float = 0.5) -> None:
    matplotlib.image.imsave(run.draft / f"{name}.png", np.full((2, 2, 3), grey))


def run_chapter(*figures: str, value: float = 1.0, parameters: dict | None = None, **kwargs) -> records.Run:
    """A finished run of a chapter that draws ``figures`` from one table."""
    run = records.Run(STEM, "default", parameters or {"seeds": [0, 1]})
    for name in figures:
        draw(run, name)
    run.table("effects", pd.DataFrame({"value": [value]}))
    run.finish(figures, **kwargs)
    return run


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def published() -> Path:
    return runs.FIGURES / "default" / STEM


def test_a_finished_run_publishes_its_figures_tables_and_record():
    run = run_chapter("a", "b")
    assert names(published()) == ["a.png", "b.png", "effects.csv", "run.json"]
    record = read(published() / "run.json")
    assert (record["id"], record["stem"], record["preset"]) == (run.id, STEM, "default")
    assert record["parameters"] == {"seeds": [0, 1]}
    assert record["files"] == ["effects.csv"]
    assert record["peak_memory_mb"] > 10
    assert (run.results / "run.json").read_text() == (published() / "run.json").read_text()


@pytest.mark.parametrize(
    ("announced", "message"),
    [
        (["a", "b", "c"], r"figures not drawn: \['c'\]; not announced: \[\]"),
        (["a"], r"figures not drawn: \[\]; not announced: \['b'\]"),
        (["a", "c"], r"figures not drawn: \['c'\]; not announced: \['b'\]"),
    ],
)
def test_figures_missing_or_unannounced_stop_the_run_and_publish_nothing(announced, message):
    run = records.Run(STEM, "default", {})
    draw(run, "a")
    draw(run, "b")
    with pytest.raises(RuntimeError, match=message):
        run.finish(announced)
    assert not published().exists()
    assert not (run.results / "run.json").exists()


def test_an_empty_figure_counts_as_not_drawn():
    run = records.Run(STEM, "default", {})
    (run.draft / "a.png").touch()
    with pytest.raises(RuntimeError, match=r"figures not drawn: \['a'\]"):
        run.finish(["a"])


def test_a_figure_of_an_unfinished_run_does_not_count_for_the_next():
    draw(records.Run(STEM, "default", {}), "a")
    with pytest.raises(RuntimeError, match=r"figures not drawn: \['a'\]"):
        records.Run(STEM, "default", {}).finish(["a"])


def test_a_stale_figure_of_an_older_run_is_gone():
    run_chapter("a", "stale")
    run_chapter("a", value=2.0)
    assert names(published()) == ["a.png", "effects.csv", "run.json"]
    assert (published() / "effects.csv").read_text() == "value\n2\n"
    assert names(published().parent) == [STEM]


def test_a_failed_rerun_leaves_the_published_evidence_as_it_was():
    run_chapter("a")
    rerun = records.Run(STEM, "default", {})
    with pytest.raises(RuntimeError):
        rerun.finish(["a"])
    assert names(published()) == ["a.png", "effects.csv", "run.json"]


def test_a_rerun_with_the_same_evidence_leaves_the_published_folder_untouched():
    first = run_chapter("a")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in published().iterdir()}
    second = run_chapter("a")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in published().iterdir()} == before
    assert first.id != second.id
    assert read(second.results / "run.json")["id"] == first.id, "later chapters stand on what is published"


@pytest.mark.parametrize("change", [{"value": 2.0}, {"parameters": {"seeds": [0, 2]}}])
def test_a_rerun_with_other_numbers_or_parameters_is_published(change):
    run_chapter("a")
    second = run_chapter("a", **change)
    assert read(published() / "run.json")["id"] == second.id


def test_a_figure_that_looks_otherwise_is_published():
    run_chapter("a")
    run = records.Run(STEM, "default", {"seeds": [0, 1]})
    draw(run, "a", grey=0.9)
    run.table("effects", pd.DataFrame({"value": [1.0]}))
    run.finish(["a"])
    assert (published() / "a.png").read_bytes() == (run.draft / "a.png").read_bytes()


def test_a_long_table_with_other_rows_is_published():
    for value in (1.0, 2.0):
        run = records.Run(STEM, "default", {})
        run.table("scores", pd.DataFrame({"value": [value]}), suffix=".parquet")
        run.finish([])
    assert pd.read_parquet(published() / "scores.parquet")["value"].tolist() == [2.0]
    assert read(published() / "run.json")["id"] == run.id


def test_what_a_killed_run_left_is_swept_away_but_for_units_and_checkpoints():
    results = runs.RESULTS / "default" / STEM
    write_folder(results / "figures", **{"old.png": "1"})
    write_folder(results / "units" / "whole", table="1")
    write_folder(results / "units" / ".half.17.tmp" / ".deep.17.tmp", table="1")
    write_folder(results / "other", **{".half.pt": "1", ".t.csv.17.tmp": "1"})
    records.Run(STEM, "default", {})
    assert names(results) == [".lock", "figures", "other", "units"]
    assert [names(results / name) for name in ("figures", "units", "other")] == [[], ["whole"], [".half.pt"]]


def test_a_rerun_mends_published_evidence_that_was_changed_by_hand():
    run_chapter("a")
    (published() / "effects.csv").write_text("value\n7\n")
    run_chapter("a")
    assert (published() / "effects.csv").read_text() == "value\n1\n"


def test_presets_do_not_touch_one_another():
    run_chapter("a")
    other = records.Run(STEM, "smoke", {})
    draw(other, "b")
    other.finish(["b"])
    assert names(published()) == ["a.png", "effects.csv", "run.json"]
    assert names(runs.FIGURES / "smoke" / STEM) == ["b.png", "run.json"]


# ---------------------------------------------------------------- what one chapter leaves to another


def test_outputs_of_a_chapter_are_found_by_name():
    results = runs.RESULTS / "default" / STEM
    write_folder(results / "scores-1234", table="1")
    run_chapter("a", outputs={"scores": results / "scores-1234" / "table"})
    later = records.Run(LATER, "default", {})
    assert later.outputs_of(STEM) == {"scores": results / "scores-1234" / "table"}
    assert later.outputs_of(STEM)["scores"].read_text() == "1"


def test_parameters_of_a_chapter_are_those_of_its_last_run():
    run_chapter("a")
    later = records.Run(LATER, "default", {})
    assert later.parameters_of(STEM) == read(runs.RESULTS / "default" / STEM / "run.json")["parameters"] != {}
    assert later.notes["stands_on"] == {STEM: read(runs.RESULTS / "default" / STEM / "run.json")["id"]}
    with pytest.raises(FileNotFoundError, match="run it first"):
        records.Run("other", "default", {}).parameters_of(LATER)


def test_a_kept_table_is_written_once_and_another_one_elsewhere():
    run, table = records.Run(STEM, "default", {}), pd.DataFrame({"x": [1, 2]})
    path = run.kept("mine", table)
    written = path.stat().st_mtime_ns
    assert run.kept("mine", table) == path and path.stat().st_mtime_ns == written
    assert pd.read_parquet(path).equals(table) and path.parent in run.made_of
    assert run.kept("mine", table + 1) != path


def test_a_chapter_that_has_not_run_in_this_preset_raises():
    run_chapter("a")
    with pytest.raises(FileNotFoundError, match=f"{LATER} in preset 'default': it has no finished run; run it first"):
        records.Run(STEM, "default", {}).outputs_of(LATER)
    with pytest.raises(FileNotFoundError, match=f"{STEM} in preset 'smoke': it has no finished run; run it first"):
        records.Run(LATER, "smoke", {}).outputs_of(STEM)


def test_a_chapter_that_is_being_rerun_is_not_finished():
    run_chapter("a")
    records.Run(STEM, "default", {"seeds": [0, 1]})
    with pytest.raises(FileNotFoundError, match=STEM):
        records.Run(LATER, "default", {}).outputs_of(STEM)


# ---------------------------------------------------------------- what the record holds


@pytest.fixture
def record(tmp_path) -> dict:
    """The record of a chapter that stands on another, ran three units, and left a table."""
    first = run_chapter("a")
    run = records.Run(LATER, "default", {"seeds": [3, 4], "lr": 1.0e-3})
    run.outputs_of(STEM)
    run.notes["decided"] = "by hand"
    units = [tiny.Unit(f"unit-{value}", value, str(tmp_path / f"{value}.log")) for value in (5, 9)]
    paths = run.units(units, tiny.write_numbers, code=["losses"], workers=1)
    paths.append(run.made("scores", lambda folder, _: runs.write_table(pd.DataFrame({"x": [1]}), folder / "t.parquet")))
    run.units(units, tiny.write_numbers, code=["losses"], workers=1)  # a second time, they count once
    run.finish([], outputs={"scores": paths[-1] / "t.parquet", "units": paths[-1]})
    seals = [read(path / "unit.json") for path in paths]
    return read(run.results / "run.json") | {"made": run, "first": first, "seals": seals}


def test_the_record_holds_every_field_that_is_promised(record):
    types = {
        **dict.fromkeys(["id", "stem", "preset", "commit", "python", "device", "dtype"], str),
        **dict.fromkeys(["parameters", "stands_on", "versions", "outputs", "sha256"], dict),
        **dict.fromkeys(["seeds", "files"], list),
        **dict.fromkeys(["seconds", "unit_seconds"], float),
        **dict.fromkeys(["units", "peak_memory_mb"], int),
    }
    assert {name: type(record.get(name)) for name in types} == types
    assert all(record[name] for name in ("id", "python", "device", "parameters", "stands_on", "versions", "outputs"))


def test_the_record_says_what_was_run_and_on_what(record):
    assert (record["id"], record["stem"], record["preset"]) == (record["made"].id, LATER, "default")
    assert record["parameters"] == {"seeds": [3, 4], "lr": 1.0e-3}
    assert record["seeds"] == [3, 4]
    assert record["stands_on"] == {STEM: record["first"].id}
    assert record["decided"] == "by hand"
    assert record["versions"]["torch"] == version("torch")
    assert record["dtype"] in ("float32", "bfloat16 autocast")


def test_the_record_counts_each_unit_once_with_its_cost(record):
    assert record["units"] == 3
    assert record["unit_seconds"] == pytest.approx(sum(seal["seconds"] for seal in record["seals"]), abs=0.06)
    assert record["peak_memory_mb"] >= max(seal["peak_memory_mb"] for seal in record["seals"]) > 10
    assert record["seconds"] > 0


def test_the_record_names_outputs_by_place_and_content(record):
    results = record["made"].results
    assert {name: item["path"] for name, item in record["outputs"].items()} == {
        "scores": "scores/t.parquet",
        "units": "scores",
    }
    assert record["outputs"]["scores"]["sha256"] == runs.fingerprint(results / "scores" / "t.parquet")
    assert re.fullmatch("[0-9a-f]{64}", record["outputs"]["units"]["sha256"])


def test_a_figure_names_its_run_as_picture_and_as_pdf(monkeypatch):
    monkeypatch.setattr(plt, "show", lambda: None)
    run = records.Run(STEM, "default", {"seeds": [0]})
    figure, _ = plt.subplots()
    figures.save(run, figure, "a", pd.DataFrame({"x": [1]}))
    plt.close(figure)
    run.finish(["a"])
    with Image.open(published() / "a.png") as picture:
        assert picture.info["Description"] == f"run {run.id}"
    assert f"/Subject (run {run.id})".encode() in (published() / "a.pdf").read_bytes()
    record = read(published() / "run.json")
    assert record["files"] == ["a.csv", "a.pdf", "a.png"]
    assert record["sha256"] == {name: runs.fingerprint(published() / name) for name in record["files"]}


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with one commit, as the place of the project."""
    if shutil.which("git") is None:
        pytest.skip("git is not installed")
    folder = write_folder(tmp_path / "project" / "rmlib", **{"a.py": "1"}).parent
    (folder / "README.md").write_text("1")
    who = ["-c", "user.name=Nobody", "-c", "user.email=nobody@example.org", "-c", "commit.gpgsign=false"]
    for command in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "First"]):
        subprocess.run(["git", "-C", str(folder), *command], check=True)
    monkeypatch.setattr(runs, "ROOT", folder)
    return folder


def test_the_commit_has_a_plus_where_code_differs_from_it(checkout):
    clean = records._commit()
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (checkout / "README.md").write_text("2")
    assert records._commit() == clean
    (checkout / "rmlib" / "a.py").write_text("2")
    assert records._commit() == f"{clean}+"


def test_outside_of_a_repository_there_is_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(runs, "ROOT", tmp_path)
    assert records._commit() == ""
    monkeypatch.setenv("PATH", str(tmp_path))  # and without git
    assert records._commit() == ""


# ---------------------------------------------------------------- one process at a time


@pytest.fixture
def elsewhere():
    """Begins a chapter in another process; returns that process and what it said, nothing if all was well."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tiny"])
    started = []

    def begin(stem: str, preset: str) -> tuple[multiprocessing.Process, str]:
        ours, theirs = context.Pipe()
        process = context.Process(target=tiny.hold_chapter, args=(runs.RESULTS, stem, preset, theirs), daemon=True)
        process.start()
        started.append((process, ours))
        assert ours.poll(60)
        return process, ours.recv()

    yield begin
    for process, ours in started:
        process.kill()
        process.join()
        ours.close()


def test_a_second_process_of_the_same_chapter_and_preset_is_refused_and_touches_nothing(elsewhere):
    run = records.Run(STEM, "default", {})
    draw(run, "a")
    _, said = elsewhere(STEM, "default")
    assert f"another process runs {STEM} in preset 'default'" in said
    run.finish(["a"])
    assert names(published()) == ["a.png", "run.json"]


def test_another_preset_and_another_chapter_are_free(elsewhere):
    records.Run(STEM, "default", {})
    assert elsewhere(STEM, "smoke")[1] == ""
    assert elsewhere(LATER, "default")[1] == ""


def test_a_finished_run_lets_go_of_its_chapter(elsewhere):
    run_chapter("a")
    assert elsewhere(STEM, "default")[1] == ""


def test_a_chapter_begun_anew_in_the_same_process_stays_its_own(elsewhere):
    run = records.Run(STEM, "default", {})
    run = records.Run(STEM, "default", {})  # as a cell run twice does: the first is collected, its lock is not lost
    assert "another process" in elsewhere(STEM, "default")[1]
    run.finish([])
    assert elsewhere(STEM, "default")[1] == ""


def test_a_killed_process_lets_go_of_its_chapter(elsewhere):
    process, said = elsewhere(STEM, "default")
    assert said == ""
    with pytest.raises(RuntimeError, match=f"another process runs {STEM} in preset 'default'"):
        records.Run(STEM, "default", {})
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    assert records.Run(STEM, "default", {}).preset == "default"


# ---------------------------------------------------------------- records that no longer hold


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def no_record(content: bytes) -> Callable[[Path, Path], None]:
    return lambda results, evidence: (results / "run.json").write_bytes(content) and None


DAMAGE = {
    "an output cut": (lambda results, evidence: cut(results / "scores.csv", 3), "changed since it was written: scores"),
    "an output longer": (lambda results, evidence: (results / "scores.csv").write_text("12345!"), "changed since"),
    "an output changed": (lambda results, evidence: (results / "scores.csv").write_text("12346"), "changed since"),
    "an output gone": (lambda results, evidence: (results / "scores.csv").unlink(), "missing: scores.csv"),
    "a table gone": (lambda results, evidence: (evidence / "effects.csv").unlink(), "missing: effects.csv"),
    "a table cut": (lambda results, evidence: cut(evidence / "effects.csv", 3), "effects.csv"),
    "a table edited": (lambda results, evidence: (evidence / "effects.csv").write_text("value\n2\n"), "effects.csv"),
    "its record gone": (lambda results, evidence: (evidence / "run.json").unlink(), "missing: run.json"),
    "its record cut": (lambda results, evidence: cut(evidence / "run.json", 50), "changed since"),
    "all evidence gone": (lambda results, evidence: shutil.rmtree(evidence), "missing: effects.csv"),
    "a record cut": (lambda results, evidence: cut(results / "run.json", 50), "cannot be read"),
    "an empty record": (no_record(b""), "cannot be read"),
    "a record that is no JSON": (no_record(b"run"), "cannot be read"),
    "a record that is no text": (no_record(b"\xff\xfe"), "cannot be read"),
    "a record that is no mapping": (no_record(b"[1]"), "cannot be read"),
    "a record of nothing": (no_record(b"null"), "cannot be read"),
    "a record without fields": (no_record(b"{}"), "cannot be read"),
    "a record of another shape": (
        no_record(b'{"id": "a", "preset": "default", "stem": "99_toy", "outputs": {"scores": 1}, "files": []}'),
        "cannot be read",
    ),
    "a record without its id": (
        no_record(b'{"preset": "default", "stem": "99_toy", "outputs": {}, "files": []}'),
        "cannot be read",
    ),
}


@pytest.fixture
def finished() -> tuple[Path, Path]:
    """Results and evidence of a chapter that left one output."""
    results = runs.RESULTS / "default" / STEM
    write_folder(results, **{"scores.csv": "12345"})
    run_chapter("a", outputs={"scores": results / "scores.csv"})
    return results, published()


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_record_that_no_longer_holds_is_removed_and_told(finished, capsys, damage):
    harm, problem = DAMAGE[damage]
    harm(*finished)
    capsys.readouterr()
    with pytest.raises(FileNotFoundError, match=f"chapter {STEM} in preset 'default': .*{problem}.*; run it first"):
        records.Run(LATER, "default", {}).outputs_of(STEM)
    records.forget_broken("default")
    told = capsys.readouterr().err
    assert told.startswith(f"{STEM}: ") and problem in told
    assert not (finished[0] / "run.json").exists()


def test_whole_records_and_those_of_other_chapters_and_presets_are_kept(finished, capsys):
    for stem, preset in ((LATER, "default"), (STEM, "smoke")):
        records.Run(stem, preset, {}).finish([])
    before = {path: path.read_bytes() for path in runs.RESULTS.glob("*/*/run.json")}
    assert len(before) == 3
    capsys.readouterr()
    records.forget_broken("default")
    assert capsys.readouterr().err == ""
    (finished[0] / "scores.csv").unlink()
    records.forget_broken("smoke")
    assert {path: path.read_bytes() for path in runs.RESULTS.glob("*/*/run.json")} == before
    records.forget_broken("default")
    assert set(runs.RESULTS.glob("*/*/run.json")) == set(before) - {finished[0] / "run.json"}


def test_a_preset_without_results_has_nothing_to_forget(capsys):
    records.forget_broken("nobody")
    assert capsys.readouterr().err == ""


def test_a_preset_s_results_are_not_replaced_by_those_of_other_values():
    """``-p preset full`` alone takes the default's values; under its name only those of its own file may stand."""
    file = runs.ROOT / "params" / "full" / f"{ANNOTATED}.yaml"
    defaults = parameters_cell(runs.ROOT / "notebooks" / f"{ANNOTATED}.ipynb")
    filed = params.read_yaml(ANNOTATED, file, defaults).model_dump()
    with pytest.raises(params.ParameterError, match=f"not the values of .*full/{ANNOTATED}.yaml.*n_bands = 7 .there"):
        records.Run(ANNOTATED, "full", filed | {"n_bands": 7})
    assert not (runs.RESULTS / "full").exists()
    assert records.Run(ANNOTATED, "full", filed).parameters == filed
    assert records.Run(ANNOTATED, "mine", filed | {"n_bands": 7}).preset == "mine"
