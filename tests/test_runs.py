"""Keys change with what decides a result, files are complete or absent, and units are made once and whole."""

import errno
import json
import multiprocessing
import os
import shutil
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import tiny
from tiny import names, write_folder

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

    def make(folder: Path, checkpoint: Path) -> None:
        made.append(folder)
        (folder / "x").write_text("1")

    assert runs.made(tmp_path / "deep" / "a", make) == runs.made(tmp_path / "deep" / "a", make)
    assert len(made) == 1
    assert made[0] != tmp_path / "deep" / "a"  # it is filled elsewhere first
    assert names(tmp_path / "deep") == ["a"]


def test_a_folder_that_failed_is_absent_and_made_at_the_next_call(tmp_path):
    def fail(folder: Path, checkpoint: Path) -> None:
        (folder / "half").write_text("1")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        runs.made(tmp_path / "a", fail)
    assert names(tmp_path) == []
    runs.made(tmp_path / "a", lambda folder, checkpoint: None)
    assert names(tmp_path) == ["a"]


def test_the_remains_of_a_killed_run_do_not_stop_the_next(tmp_path):
    write_folder(tmp_path / f".a.{os.getpid()}.tmp", half="1")
    runs.made(tmp_path / "a", lambda folder, checkpoint: (folder / "whole").write_text("1"))
    assert names(tmp_path) == ["a"]
    assert names(tmp_path / "a") == ["unit.json", "whole"]


def test_a_checkpoint_outlives_a_failure_and_goes_when_the_folder_is_complete(tmp_path):
    def make(folder: Path, checkpoint: Path) -> None:
        if not checkpoint.exists():
            checkpoint.write_text("half")
            raise ZeroDivisionError
        (folder / "x").write_text(f"{checkpoint.read_text()} and half")

    with pytest.raises(ZeroDivisionError):
        runs.made(tmp_path / "a", make)
    assert names(tmp_path) == [".a.pt"]
    runs.made(tmp_path / "a", make)
    assert names(tmp_path) == ["a"]
    assert (tmp_path / "a" / "x").read_text() == "half and half"


def test_the_seal_says_what_a_folder_holds_and_what_it_cost(tmp_path):
    folder = runs.made(tmp_path / "a", lambda folder, _: write_folder(folder / "deep", x="1", y="2"))
    seal = json.loads((folder / "unit.json").read_text())
    assert seal["files"] == {f"deep/{name}": runs.fingerprint(folder / "deep" / name) for name in "xy"}
    assert 0 <= seal["seconds"] < 60
    assert seal["peak_memory_mb"] > 10


# ---------------------------------------------------------------- broken folders


def cut(path: Path, size: int) -> None:
    path.write_bytes(path.read_bytes()[:size])


def alter(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


DAMAGE = {
    "a file cut": ("x", lambda folder: cut(folder / "deep" / "x", 900)),
    "a file emptied": ("x", lambda folder: cut(folder / "deep" / "x", 0)),
    "a file gone": ("x", lambda folder: (folder / "deep" / "x").unlink()),
    "a folder gone": ("x", lambda folder: shutil.rmtree(folder / "deep")),
    "a byte more": ("x", lambda folder: (folder / "deep" / "x").write_text("0123456789" * 100 + "!")),
    "one bit turned": ("x", lambda folder: alter(folder / "deep" / "x")),
    "the seal cut": ("unit.json", lambda folder: cut(folder / "unit.json", 20)),
    "the seal gone": ("unit.json", lambda folder: (folder / "unit.json").unlink()),
    "the seal of another shape": ("unit.json", lambda folder: (folder / "unit.json").write_text('{"files": []}')),
    "the seal no mapping": ("unit.json", lambda folder: (folder / "unit.json").write_text("[1]")),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_broken_folder_is_named_and_made_again_with_the_same_content(tmp_path, capsys, damage):
    name, harm = DAMAGE[damage]

    def make(folder: Path, checkpoint: Path) -> None:
        write_folder(folder / "deep", x="0123456789" * 100)

    folder = runs.made(tmp_path / "a", make)
    assert runs.is_whole(folder)
    assert capsys.readouterr().err == ""
    harm(folder)
    assert not runs.is_whole(folder)
    told = capsys.readouterr().err
    assert "a is broken" in told and name in told
    assert runs.made(folder, make) == folder
    assert names(tmp_path) == ["a"]
    assert (folder / "deep" / "x").read_text() == "0123456789" * 100
    assert runs.is_whole(folder)


def test_a_folder_that_is_not_there_is_not_whole_and_nothing_is_told(tmp_path, capsys):
    assert not runs.is_whole(tmp_path / "a")
    assert capsys.readouterr().err == ""


# ---------------------------------------------------------------- full disks


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_a_table_on_a_full_disk_is_named_and_the_old_one_stays(small_disk, suffix):
    path = small_disk / f"t.{suffix}"
    runs.write_table(pd.DataFrame({"a": [1]}), path)
    before = path.read_bytes()
    tiny.fill(small_disk)
    with pytest.raises(OSError, match=rf"the disk is full: .*t\.{suffix} was not written") as error:
        runs.write_table(pd.DataFrame({"a": [2]}), path)
    assert error.value.errno == errno.ENOSPC
    assert path.read_bytes() == before
    assert names(small_disk) == ["ballast", path.name]


def test_a_unit_on_a_full_disk_is_named_and_made_when_there_is_room(small_disk, units):
    folder = small_disk / "units"
    (kept,) = run(units[:1], folder)
    ballast = tiny.fill(small_disk)
    with pytest.raises(OSError, match=r"the disk is full: .*/unit-7-\w+ was not written"):
        run(units[:2], folder)
    assert names(folder) == [kept.name]
    assert runs.is_whole(kept)
    ballast.unlink()
    assert len(run(units[:2], folder)) == 2
    assert [tiny.starts(unit) for unit in units] == [1, 2, 0]


def half_written(message: str, number: int | None):
    """A writer that fails half-way, as pandas and PyTorch do on a full disk."""

    def write(table, path: Path, **kwargs) -> None:
        Path(path).write_text("half")
        raise OSError(number, message) if number else RuntimeError(message)

    return write


@pytest.mark.parametrize(
    ("number", "room", "error"),
    [
        (errno.ENOSPC, 10**9, OSError),
        (errno.EDQUOT, 10**9, OSError),
        (None, 0, OSError),
        (None, 10**9, RuntimeError),  # with room left it is another matter, and told as it is
        (errno.EACCES, 10**9, PermissionError),
    ],
)
def test_what_a_full_disk_raises_becomes_one_clear_error(tmp_path, monkeypatch, number, room, error):
    path = tmp_path / "t.csv"
    path.write_text("old")
    monkeypatch.setattr(pd.DataFrame, "to_csv", half_written("failed writing file", number))
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10**9, 10**9 - room, room))
    message = f"the disk is full: {path}" if error is OSError else "failed writing file"
    with pytest.raises(error, match=message):
        runs.write_table(pd.DataFrame({"a": [1]}), path)
    assert names(tmp_path) == ["t.csv"]
    assert path.read_text() == "old"


# ---------------------------------------------------------------- units


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


def test_a_worker_computes_on_one_thread_however_many_it_was_given():
    context = multiprocessing.get_context("forkserver")
    (ours, theirs), started = context.Pipe(), context.Value("i", 0)
    worker = context.Process(target=tiny.count_threads, args=(started, theirs), daemon=True)
    worker.start()
    assert ours.poll(60)
    assert ours.recv() == 1
    worker.join()


def test_reward_models_do_not_depend_on_the_number_of_workers(tmp_path):
    pairs = tiny.save_preferences(tmp_path / "pairs.parquet")
    bases = tiny.save_features(tmp_path / "features.safetensors"), tiny.save_llama(tmp_path / "llama")
    settings = {"steps": 6, "snapshots": 2, "dropout": 0.2}
    members = [
        tiny.reward_run(pairs, base, name=f"m{seed}", data_seed=seed, dropout_passes=1, **settings)
        for base in bases
        for seed in range(2)
    ]
    work = {"work": training.train_reward_model, "code": training.REWARD_RUN_CODE}
    one, two = (runs.run_units(members, folder=tmp_path / str(n), workers=n, **work) for n in (1, 2))
    for table in ("scores.parquet", "log.parquet"):
        assert [(path / table).read_bytes() for path in one] == [(path / table).read_bytes() for path in two]
        assert len({(path / table).read_bytes() for path in one}) == 4


def test_a_failing_unit_raises_and_leaves_no_folder(units, folder):
    with pytest.raises(ValueError, match="seven cannot be done"):
        run(units, folder, tiny.fail_on_seven, workers=2)
    assert [name.rsplit("-", 1)[0] for name in names(folder)] == ["unit-5", "unit-9"]
    run(units, folder)
    assert [tiny.starts(unit) for unit in units] == [1, 2, 1]


def test_the_first_failure_stops_what_is_queued(tmp_path, folder):
    queue = [tiny.Unit(f"unit-{n}", 7 if n == 1 else 5, str(tmp_path / f"{n}.log")) for n in range(10)]
    with pytest.raises(ValueError, match="seven cannot be done"):
        run(queue, folder, tiny.linger_but_fail_on_seven)
    assert [tiny.starts(unit) for unit in queue[:2]] == [1, 1]
    assert sum(tiny.starts(unit) for unit in queue) < 6  # a worker may hold a unit or two already
    assert len(names(folder)) == sum(tiny.starts(unit) for unit in queue) - 1


@pytest.mark.parametrize("damage", ["a file cut", "a file gone", "a byte more", "the seal cut"])
def test_a_broken_unit_is_run_again_and_the_others_are_not(units, folder, capsys, damage):
    broken, *whole = run(units[:2], folder)
    before = (broken / "numbers.parquet").read_bytes()
    {
        "a file cut": lambda: cut(broken / "numbers.parquet", 100),
        "a file gone": (broken / "numbers.parquet").unlink,
        "a byte more": lambda: (broken / "numbers.parquet").write_bytes(before + b"!"),
        "the seal cut": lambda: cut(broken / "unit.json", 20),
    }[damage]()
    times = [path.stat().st_mtime_ns for path in whole]
    assert run(units[:2], folder) == [broken, *whole]
    assert f"{broken.name} is broken" in capsys.readouterr().err
    assert [tiny.starts(unit) for unit in units] == [2, 1, 0]
    assert (broken / "numbers.parquet").read_bytes() == before
    assert [path.stat().st_mtime_ns for path in whole] == times


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


# ---------------------------------------------------------------- what a forecast is told, and where inputs lie


def test_a_forecast_is_asked_for_what_is_to_run_and_told_before_it_does(units, folder, capsys):
    run(units[:1], folder)
    asked = []

    def forecast(todo: list, workers: int) -> str:
        asked.append(([unit.name for unit in todo], workers, names(folder)))
        return "it will take a while"

    settings = {"code": ["losses"], "workers": 8, "forecast": forecast}
    (kept, *_) = runs.run_units(units, tiny.write_numbers, folder, **settings)
    assert asked == [(["unit-7", "unit-9"], 2, [kept.name])]
    assert "it will take a while" in capsys.readouterr().err
    runs.run_units(units, tiny.write_numbers, folder, **settings)
    assert len(asked) == 1


def save_inputs(folder: Path) -> dict[str, Path]:
    """A preference set and a base of either kind."""
    folder.mkdir()
    return {
        "pairs": tiny.save_preferences(folder / "pairs.parquet"),
        "features": tiny.save_features(folder / "features.safetensors"),
        "llama": tiny.save_llama(folder / "llama"),
    }


@pytest.mark.parametrize("base", ["features", "llama"])
def test_the_key_of_a_reward_run_follows_its_files_and_not_where_they_lie(tmp_path, base):
    def key(place: str) -> str:
        return runs.content_key(tiny.reward_run(tmp_path / place / "pairs.parquet", inputs[place][base]))

    inputs = {"here": save_inputs(tmp_path / "here")}
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    inputs["there"] = {name: tmp_path / "there" / path.name for name, path in inputs["here"].items()}
    assert key("here") == key("there")
    weights = inputs["there"][base] / "model.safetensors" if base == "llama" else inputs["there"][base]
    alter(weights)
    altered = key("there")
    shutil.copy(tmp_path / "here" / weights.relative_to(tmp_path / "there"), weights)
    assert key("there") == key("here") != altered
    alter(inputs["there"]["pairs"])
    assert len({key("here"), key("there"), altered}) == 3


def test_a_moved_checkout_keeps_its_units(tmp_path):
    save_inputs(tmp_path / "here")
    settings = {"work": training.train_reward_model, "code": training.REWARD_RUN_CODE, "workers": 1}

    def made_from(place: str) -> Path:
        unit = tiny.reward_run(tmp_path / place / "pairs.parquet", tmp_path / place / "features.safetensors", steps=2)
        (path,) = runs.run_units([unit], folder=tmp_path / place / "units", **settings)
        return path

    made = made_from("here")
    sealed = (made / "unit.json").read_bytes(), (made / "unit.json").stat().st_mtime_ns
    (tmp_path / "here").rename(tmp_path / "there")
    moved = made_from("there")
    assert moved.name == made.name
    assert ((moved / "unit.json").read_bytes(), (moved / "unit.json").stat().st_mtime_ns) == sealed
