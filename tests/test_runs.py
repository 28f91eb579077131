"""Keys change with what decides a result, files are complete or absent, and evidence is that of one whole run."""

import json
import os
from collections.abc import Iterator
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import tiny

from rmlib import runs, training

# ---------------------------------------------------------------- content keys


@dataclass(frozen=True)
class Settings:
    lr: float = 0.1
    rows: tuple[int, ...] = (1, 2)
    name: str | None = None


@dataclass(frozen=True)
class OtherSettings(Settings):
    pass


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Settings(), Settings(lr=0.2)),
        (Settings(), Settings(rows=(1, 3))),
        (Settings(), Settings(name="None")),
        (Settings(), OtherSettings()),
        ({"lr": 1.0}, {"lr": 2.0}),
        ({"lr": 1.0}, {"warmup": 1.0}),
        ([1, 2], [2, 1]),
        ([[1], [2]], [[1, 2]]),
        (1, 1.0),
        (1, "1"),
        (np.array([1, 2]), np.array([1, 3])),
        (np.array([1, 2]), np.array([2, 1])),
        (np.array([0, 0]), np.array([0.0, 0.0])),
    ],
)
def test_the_key_tells_parameters_apart(one, other):
    assert runs.content_key(one) != runs.content_key(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (Settings(), Settings(lr=0.1)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        (np.arange(6).reshape(2, 3).T, np.arange(6).reshape(2, 3).T.copy()),
        ([1, 2], (1, 2)),
    ],
)
def test_the_key_of_equal_parameters_is_the_same(one, other):
    assert runs.content_key(one) == runs.content_key(other)


def test_the_key_is_the_same_in_every_process():
    assert runs.content_key("a", 1, None) == runs.content_key("a", 1, None)
    assert len(runs.content_key("a")) == 16


def test_the_key_keeps_neighbouring_numbers_apart():
    assert runs.content_key(1, 11) != runs.content_key(11, 1)
    one, other = (tiny.reward_run("", "", data_seed=data, head_seed=head) for data, head in ((1, 10), (11, 0)))
    assert runs.content_key(one) != runs.content_key(other)


def test_the_key_of_a_file_follows_its_content_and_not_its_time(tmp_path):
    path = tmp_path / "pairs.parquet"
    path.write_bytes(b"one")
    key = runs.content_key(path)
    os.utime(path, ns=(1, 1))
    assert runs.content_key(path) == key
    path.write_bytes(b"two")
    assert runs.content_key(path) != key
    path.write_bytes(b"one")
    assert runs.content_key(path) == key


def test_the_key_of_a_folder_follows_every_file_in_it(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "weights").write_text("1")
    key = runs.content_key(tmp_path)
    (tmp_path / "deep" / "weights").write_text("2")
    changed = runs.content_key(tmp_path)
    (tmp_path / "config").write_text("3")
    assert len({key, changed, runs.content_key(tmp_path)}) == 3


@pytest.fixture
def key_of_code(tmp_path, monkeypatch):
    """The key of a module of the library with this source."""
    monkeypatch.setattr(runs, "__file__", str(tmp_path / "runs.py"))

    def key(source: str) -> str:
        (tmp_path / "room.py").write_text(source)
        runs._code_text.cache_clear()
        return runs.content_key(code=["room"])

    yield key
    runs._code_text.cache_clear()


CODE = '"""A room."""\n\ndef double(x):\n    """Twice."""\n    return 2 * x  # simple\n\n\nclass A:\n    """Empty."""\n'


@pytest.mark.parametrize(
    "change",
    [('"""A room."""', '"""A hall."""'), ("Twice", "Two times"), ("  # simple", ""), ("\n\n\nclass", "\nclass")],
)
def test_comments_docstrings_and_blank_lines_do_not_change_the_key_of_code(key_of_code, change):
    assert CODE.replace(*change) != CODE
    assert key_of_code(CODE.replace(*change)) == key_of_code(CODE)


@pytest.mark.parametrize(
    "change", [("2 * x", "3 * x"), ("double", "twice"), ("return 2", 'return "" or 2'), ("A:", "B:")]
)
def test_what_code_does_changes_its_key(key_of_code, change):
    assert key_of_code(CODE.replace(*change)) != key_of_code(CODE)


def test_the_key_depends_on_the_modules_named():
    assert len({runs.content_key(1, code=names) for names in ([], ["losses"], ["losses", "voting"])}) == 3


# ---------------------------------------------------------------- files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def test_atomic_puts_a_file_in_its_place_and_makes_the_folders_above(tmp_path):
    with runs.atomic(tmp_path / "a" / "b.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "a" / "b.txt").exists()
    assert (tmp_path / "a" / "b.txt").read_text() == "new"
    assert names(tmp_path / "a") == ["b.txt"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_atomic_leaves_the_old_in_place_and_nothing_behind_when_the_block_fails(tmp_path, kind):
    write_folder(tmp_path / "folder", old="old")
    (tmp_path / "file").write_text("old")
    with pytest.raises(ZeroDivisionError), runs.atomic(tmp_path / kind) as temporary:
        write_folder(temporary, new="half") if kind == "folder" else temporary.write_text("half")
        raise ZeroDivisionError
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert names(tmp_path / "folder") == ["old"]


def test_atomic_replaces_a_folder_whole(tmp_path):
    write_folder(tmp_path / "figures", stale="1", kept="1")
    with runs.atomic(tmp_path / "figures") as temporary:
        write_folder(temporary, kept="2")
    assert names(tmp_path) == ["figures"]
    assert names(tmp_path / "figures") == ["kept"]
    assert (tmp_path / "figures" / "kept").read_text() == "2"


def test_atomic_keeps_the_old_folder_when_the_block_wrote_nothing(tmp_path):
    write_folder(tmp_path / "figures", old="1")
    with pytest.raises(FileNotFoundError), runs.atomic(tmp_path / "figures"):
        pass
    assert names(tmp_path) == ["figures"]


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_tables_are_written_without_their_index(tmp_path, suffix):
    table = pd.DataFrame({"a": [0.5, 1.5]}, index=[7, 8])
    runs.write_table(table, tmp_path / f"t.{suffix}")
    read = pd.read_csv if suffix == "csv" else pd.read_parquet
    assert read(tmp_path / f"t.{suffix}").to_dict("list") == {"a": [0.5, 1.5]}
    assert names(tmp_path) == [f"t.{suffix}"]


def test_a_folder_is_made_once(tmp_path):
    made = []

    def make(folder: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("1")

    assert runs.made(tmp_path / "deep" / "a", make) == runs.made(tmp_path / "deep" / "a", make)
    assert len(made) == 1
    assert made[0] != tmp_path / "deep" / "a"  # it is filled elsewhere first
    assert names(tmp_path / "deep") == ["a"]


def test_a_folder_that_failed_is_absent_and_made_at_the_next_call(tmp_path):
    def fail(folder: Path) -> None:
        (folder / "half").write_text("1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runs.made(tmp_path / "a", fail)
    assert names(tmp_path) == []
    runs.made(tmp_path / "a", lambda folder: None)
    assert names(tmp_path) == ["a"]


def test_the_remains_of_a_killed_run_do_not_stop_the_next(tmp_path):
    write_folder(tmp_path / f".a.{os.getpid()}.tmp", half="1")
    runs.made(tmp_path / "a", lambda folder: (folder / "whole").write_text("1"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["whole"]


# ---------------------------------------------------------------- units


@pytest.fixture(scope="module", autouse=True)
def importable() -> Iterator[None]:
    """The server that forks the workers imports ``tiny`` once, instead of each worker anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture
def units(tmp_path) -> list[tiny.Unit]:
    return [tiny.Unit(f"unit-{value}", value, str(tmp_path / f"{value}.log")) for value in (5, 7, 9)]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "units"


def run(units: list, folder: Path, work=tiny.write_numbers, workers: int = 1) -> list[Path]:
    return runs.run_units(units, work, folder, code=["losses"], workers=workers)


def test_units_are_run_once_and_their_folders_come_in_the_order_given(units, folder):
    paths = run(units, folder)
    assert [path.name.rsplit("-", 1)[0] for path in paths] == ["unit-5", "unit-7", "unit-9"]
    assert [len(pd.read_parquet(path / "numbers.parquet")) for path in paths] == [5, 7, 9]
    assert run(units[::-1], folder) == paths[::-1]
    assert [tiny.starts(unit) for unit in units] == [1, 1, 1]


def test_a_unit_that_changed_is_run_again_and_the_others_are_not(units, folder):
    first = run(units, folder)
    units[1] = replace(units[1], value=8)
    second = run(units, folder)
    assert [a == b for a, b in zip(first, second, strict=True)] == [True, False, True]
    assert [tiny.starts(unit) for unit in units] == [1, 2, 1]


def test_the_code_named_is_part_of_a_units_key(units, folder):
    other = runs.run_units(units[:1], tiny.write_numbers, folder, code=["voting"], workers=1)
    assert run(units[:1], folder) != other
    assert tiny.starts(units[0]) == 2


def test_one_worker_and_two_write_identical_tables(units, tmp_path):
    one, two = (run(units, tmp_path / f"{n}-workers", workers=n) for n in (1, 2))
    for a, b in zip(one, two, strict=True):
        assert (a / "numbers.parquet").read_bytes() == (b / "numbers.parquet").read_bytes()
    assert pd.read_parquet(two[0] / "numbers.parquet")["threads"].tolist() == [1] * 5


def test_reward_models_do_not_depend_on_the_number_of_workers(tmp_path):
    pairs = tiny.save_preferences(tmp_path / "pairs.parquet")
    base = tiny.save_features(tmp_path / "features.safetensors")
    members = [tiny.reward_run(pairs, base, name=f"m{seed}", data_seed=seed) for seed in range(3)]
    settings = {"work": training.train_reward_model, "code": training.REWARD_RUN_CODE}
    one, two = (runs.run_units(members, folder=tmp_path / str(n), workers=n, **settings) for n in (1, 2))
    scores = [[pd.read_parquet(path / "scores.parquet") for path in paths] for paths in (one, two)]
    for a, b in zip(*scores, strict=True):
        pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert not scores[0][0].equals(scores[0][1])


def test_a_failing_unit_raises_and_leaves_no_folder(units, folder):
    with pytest.raises(ValueError, match="seven cannot be done"):
        run(units, folder, tiny.fail_on_seven, workers=2)
    assert [name.rsplit("-", 1)[0] for name in names(folder)] == ["unit-5", "unit-9"]
    run(units, folder)
    assert [tiny.starts(unit) for unit in units] == [1, 2, 1]


def test_the_remains_of_a_killed_worker_are_not_taken_for_a_result(units, folder):
    unit = units[0]
    with pytest.raises(BrokenProcessPool):
        run([unit], folder, tiny.die_at_first)
    (remains,) = folder.iterdir()
    assert names(remains) == ["numbers.parquet"]
    (path,) = run([unit], folder, tiny.die_at_first)
    assert path != remains
    assert tiny.starts(unit) == 2
    assert len(pd.read_parquet(path / "numbers.parquet")) == 5


def test_no_units_are_no_work(folder):
    assert run([], folder) == []
    assert not folder.exists()


# ---------------------------------------------------------------- the record of a run

STEM = "99_toy"


@pytest.fixture(autouse=True)
def places(tmp_path, monkeypatch) -> None:
    """Results and figures of these tests lie in a temporary folder."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "FIGURES", tmp_path / "figures")


def draw(run: runs.Run, name: str, grey: float = 0.5) -> None:
    matplotlib.image.imsave(run.draft / f"{name}.png", np.full((2, 2, 3), grey))


def run_chapter(*figures: str, value: float = 1.0, parameters: dict | None = None, **kwargs) -> runs.Run:
    """A finished run of a chapter that draws ``figures`` from one table."""
    run = runs.Run(STEM, "default", parameters or {"seeds": [0, 1]})
    for name in figures:
        draw(run, name)
    run.table("effects", pd.DataFrame({"value": [value]}))
    run.finish(figures, **kwargs)
    return run


def published() -> Path:
    return runs.FIGURES / "default" / STEM


def test_a_finished_run_publishes_its_figures_tables_and_record():
    run = run_chapter("a", "b")
    assert names(published()) == ["a.png", "b.png", "effects.csv", "run.json"]
    record = json.loads((published() / "run.json").read_text())
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
    run = runs.Run(STEM, "default", {})
    draw(run, "a")
    draw(run, "b")
    with pytest.raises(RuntimeError, match=message):
        run.finish(announced)
    assert not published().exists()
    assert not (run.results / "run.json").exists()


def test_an_empty_figure_counts_as_not_drawn():
    run = runs.Run(STEM, "default", {})
    (run.draft / "a.png").touch()
    with pytest.raises(RuntimeError, match=r"figures not drawn: \['a'\]"):
        run.finish(["a"])


def test_a_figure_of_an_unfinished_run_does_not_count_for_the_next():
    draw(runs.Run(STEM, "default", {}), "a")
    with pytest.raises(RuntimeError, match=r"figures not drawn: \['a'\]"):
        runs.Run(STEM, "default", {}).finish(["a"])


def test_a_stale_figure_of_an_older_run_is_gone():
    run_chapter("a", "stale")
    run_chapter("a", value=2.0)
    assert names(published()) == ["a.png", "effects.csv", "run.json"]
    assert (published() / "effects.csv").read_text() == "value\n2\n"
    assert names(published().parent) == [STEM]


def test_a_failed_rerun_leaves_the_published_evidence_as_it_was():
    run_chapter("a")
    rerun = runs.Run(STEM, "default", {})
    with pytest.raises(RuntimeError):
        rerun.finish(["a"])
    assert names(published()) == ["a.png", "effects.csv", "run.json"]


def test_a_rerun_with_the_same_evidence_leaves_the_published_folder_untouched():
    first = run_chapter("a")
    before = {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in published().iterdir()}
    second = run_chapter("a")
    assert {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in published().iterdir()} == before
    assert first.id != second.id
    assert json.loads((second.results / "run.json").read_text())["id"] == second.id


@pytest.mark.parametrize("change", [{"value": 2.0}, {"parameters": {"seeds": [0, 2]}}])
def test_a_rerun_with_other_numbers_or_parameters_is_published(change):
    run_chapter("a")
    second = run_chapter("a", **change)
    assert json.loads((published() / "run.json").read_text())["id"] == second.id


def test_a_figure_that_looks_otherwise_is_published():
    run_chapter("a")
    run = runs.Run(STEM, "default", {"seeds": [0, 1]})
    draw(run, "a", grey=0.9)
    run.table("effects", pd.DataFrame({"value": [1.0]}))
    run.finish(["a"])
    assert (published() / "a.png").read_bytes() == (run.draft / "a.png").read_bytes()


def test_presets_do_not_touch_one_another():
    run_chapter("a")
    other = runs.Run(STEM, "smoke", {})
    draw(other, "b")
    other.finish(["b"])
    assert names(published()) == ["a.png", "effects.csv", "run.json"]
    assert names(runs.FIGURES / "smoke" / STEM) == ["b.png", "run.json"]


# ---------------------------------------------------------------- what one chapter leaves to another


def test_outputs_of_a_chapter_are_found_by_name():
    results = runs.RESULTS / "default" / STEM
    write_folder(results / "scores-1234", table="1")
    run_chapter("a", outputs={"scores": results / "scores-1234" / "table"})
    later = runs.Run("98_later", "default", {})
    assert later.outputs_of(STEM) == {"scores": results / "scores-1234" / "table"}
    assert later.outputs_of(STEM)["scores"].read_text() == "1"


def test_a_chapter_that_has_not_run_in_this_preset_raises():
    run_chapter("a")
    with pytest.raises(FileNotFoundError, match="chapter 98_later has no finished run in preset 'default'"):
        runs.Run(STEM, "default", {}).outputs_of("98_later")
    with pytest.raises(FileNotFoundError, match="chapter 99_toy has no finished run in preset 'smoke'"):
        runs.Run("98_later", "smoke", {}).outputs_of(STEM)


def test_a_chapter_that_is_being_rerun_is_not_finished():
    run_chapter("a")
    runs.Run(STEM, "default", {"seeds": [0, 1]})
    with pytest.raises(FileNotFoundError, match=STEM):
        runs.Run("98_later", "default", {}).outputs_of(STEM)
