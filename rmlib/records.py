"""The record of a run: what it was given, on which machine, what it cost, and the evidence it leaves.

Figures and tables gather in a hidden folder and take the place of the last run's only when all is done, so
``figures/<preset>/<stem>`` holds the evidence of one complete run, or for an instant, none.
"""

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path

import pandas as pd
from PIL import Image

from rmlib import notebooks, params, runs

EXPECTED = ("default", "full", "convarg")  # presets whose numbers must lie where the book says
COMMITTED = (*EXPECTED, "full_quiet", "full_noisy")  # those whose evidence belongs to the book
_LOCKS: dict[Path, int] = {}  # one handle a file: closing a second one would let go of the lock


class Run:
    """One run of one chapter: its parameters, where it writes, and what it wrote.

    Raises ``RuntimeError`` while another process runs the same chapter in the same preset, and ``ParameterError`` where
    that preset's file sets other values: its results would be replaced by those of another run.
    """

    def __init__(self, stem: str, preset: str, parameters: dict):
        _check_filed(stem, preset, parameters)
        self.stem, self.preset, self.parameters = stem, preset, parameters
        self.started = time.time()
        self.id = runs.content_key(stem, preset, parameters, self.started)
        self.results, self.figures = runs.RESULTS / preset / stem, runs.FIGURES / preset / stem
        self.draft = self.results / "figures"
        self.files: list[str] = []
        self.made_of: set[Path] = set()
        self.notes: dict[str, object] = {}
        self.results.mkdir(parents=True, exist_ok=True)
        lock = self.results / ".lock"
        if not lock.exists() or lock not in _LOCKS:
            _LOCKS[lock] = os.open(lock, os.O_RDWR | os.O_CREAT)
        try:  # the system lets go of it when the process ends, however
            fcntl.lockf(_LOCKS[lock], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            problem = f"another process runs {stem} in preset {preset!r}: wait, end its kernel, or name another preset"
            raise RuntimeError(problem) from None
        (self.results / "run.json").unlink(missing_ok=True)
        half_published = self.figures.parent.glob(f".{stem}.*.tmp")
        for left_by_a_killed_run in [self.draft, *self.results.rglob(".*.tmp"), *half_published]:
            runs.remove(left_by_a_killed_run)
        self.draft.mkdir()

    def units(self, units: Sequence, work: Callable, **kwargs) -> list[Path]:
        """``runs.run_units`` in this chapter's results; the units become part of the record."""
        done = runs.run_units(units, work, self.results / "units", **kwargs)
        self.made_of |= set(done)
        return done

    def made(self, name: str, make: Callable[[Path, Path], None]) -> Path:
        """``runs.made`` in this chapter's results; the folder becomes part of the record."""
        folder = runs.made(self.results / name, make)
        self.made_of.add(folder)
        return folder

    def kept(self, name: str, table: pd.DataFrame) -> Path:
        """The path of ``table`` (Parquet), written once to this chapter's results."""
        name = f"{name}-{runs.content_key(table.to_csv())}"
        return self.made(name, lambda folder, _: runs.write_table(table, folder / "table.parquet")) / "table.parquet"

    def outputs_of(self, stem: str) -> dict[str, Path]:
        """Files that another chapter left in this preset; raises as :meth:`parameters_of`."""
        outputs = self._finished(stem)["outputs"]
        return {name: runs.RESULTS / self.preset / stem / item["path"] for name, item in outputs.items()}

    def parameters_of(self, stem: str) -> dict[str, object]:
        """Parameters that another chapter ran with in this preset.

        Raises ``FileNotFoundError`` if it has not run to its end, or what it left is broken.
        """
        return self._finished(stem)["parameters"]

    def _finished(self, stem: str) -> dict:
        """The record of another chapter, on which this one stands from now on."""
        record = runs.RESULTS / self.preset / stem / "run.json"
        if problem := _problem(record):
            raise FileNotFoundError(f"chapter {stem} in preset {self.preset!r}: {problem}; run it first")
        found = _read(record)
        self.notes.setdefault("stands_on", {})[stem] = found["id"]
        return found

    def table(self, name: str, table: pd.DataFrame, suffix: str = ".csv") -> pd.DataFrame:
        """Write ``table`` as evidence (CSV, or Parquet where rows are many) and return it."""
        runs.write_table(table, self.draft / f"{name}{suffix}")
        self.files.append(f"{name}{suffix}")
        return table

    def finish(self, figures: Iterable[str], outputs: Mapping[str, Path] | None = None) -> None:
        """Check that every figure was drawn in this run, write the record, and publish the evidence.

        ``outputs`` names the files in this chapter's results folder that later chapters read.
        Raises ``RuntimeError`` naming the figures that are missing, unannounced or empty.
        """
        wanted, drawn = set(figures), {path.stem for path in self.draft.glob("*.png") if path.stat().st_size > 0}
        if drawn != wanted:
            raise RuntimeError(f"figures not drawn: {sorted(wanted - drawn)}; not announced: {sorted(drawn - wanted)}")
        record = self._record(outputs or {})
        _write(record, self.draft / "run.json")
        if _same_evidence(self.draft, self.figures):
            record["id"] = _read(self.figures / "run.json")["id"]  # the evidence stands as that run published it
        else:
            with runs.atomic(self.figures) as temporary:
                shutil.copytree(self.draft, temporary)
        with runs.atomic(self.results / "run.json") as temporary:
            _write(record, temporary)
        fcntl.lockf(_LOCKS[self.results / ".lock"], fcntl.LOCK_UN)
        tables = len(self.files) - 2 * len(drawn)
        print(f"{len(drawn)} figures and {tables} tables in figures/{self.preset}/{self.stem}")

    def _record(self, outputs: Mapping[str, Path]) -> dict:
        import torch  # here, so that the Snakefile, which reads this module, starts without it

        seals = [_read(folder / runs.SEAL) for folder in self.made_of]
        gpu = torch.cuda.is_available()
        return {
            **{name: getattr(self, name) for name in ("id", "stem", "preset", "parameters")},
            "seeds": self.parameters.get("seeds", []),
            **self.notes,
            "commit": _commit(),
            "versions": {p: version(p) for p in (*runs.COMPUTES, "datasets", "pandas")},
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name() if gpu else f"cpu ({platform.machine()})",
            "dtype": "bfloat16 autocast" if gpu and torch.cuda.is_bf16_supported() else "float32",
            "seconds": round(time.time() - self.started, 1),
            "units": len(seals),
            "unit_seconds": round(sum(seal["seconds"] for seal in seals), 1),
            "peak_memory_mb": max([runs.peak_memory_mb(), *(seal["peak_memory_mb"] for seal in seals)]),
            "outputs": {
                name: {"path": str(path.relative_to(self.results)), "sha256": runs.fingerprint(path)}
                for name, path in outputs.items()
            },
            "files": sorted(self.files),
            "sha256": {name: runs.fingerprint(self.draft / name) for name in sorted(self.files)},
        }


def forget_broken(preset: str, parameters: Mapping[str, dict] | None = None) -> None:
    """Remove the record of chapters that are not whole or ran with other than ``parameters[stem]``; they run again."""
    for record in sorted((runs.RESULTS / preset).glob("*/run.json")):
        problem, wanted = _problem(record), (parameters or {}).get(record.parent.name)
        if not problem and wanted is not None and wanted != _read(record).get("parameters"):
            problem = "its last run had other parameters than its file"
        if problem:
            print(f"{record.parent.name}: {problem}; it will run again", file=sys.stderr)
            record.unlink()


def _problem(record: Path) -> str:
    """What is wrong with a finished chapter; empty if nothing is."""
    if not record.exists():
        return "it has no finished run"
    try:
        found = _read(record)
        found["id"]
        outputs = {name: (record.parent / item["path"], item["sha256"]) for name, item in found["outputs"].items()}
        published = runs.FIGURES / found["preset"] / found["stem"]
        files = [published / name for name in [*found["files"], "run.json"]] + [path for path, _ in outputs.values()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its record run.json cannot be read"
    if missing := [path.name for path in files if not path.exists()]:
        return f"missing: {', '.join(missing)}"
    broken = [name for name, (path, digest) in outputs.items() if runs.fingerprint(path) != digest]
    broken += runs.broken(published, "run.json", "sha256")
    return f"changed since it was written: {', '.join(broken)}" if broken else ""


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(record: dict, path: Path) -> None:
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def _check_filed(stem: str, preset: str, parameters: dict) -> None:
    """Raise ``ParameterError`` naming the keys by which ``parameters`` differ from the preset's file, if it has one."""
    path = runs.ROOT / "params" / preset / f"{stem}.yaml"
    if path.exists():
        defaults = notebooks.parameters_cell(runs.ROOT / "notebooks" / f"{stem}.ipynb")
        filed = params.read_yaml(stem, path, defaults).model_dump()
        if changed := [
            f"{key} = {parameters[key]!r} (there {filed[key]!r})" for key in filed if parameters[key] != filed[key]
        ]:
            problem = f"not the values of {path}, whose results these would replace: {', '.join(changed)}"
            raise params.ParameterError(
                f"{problem}; start from it with papermill's -f, or give preset a name of your own"
            )


def _commit() -> str:
    """The commit that the code stands at, with a plus sign if files differ from it; empty outside of git."""
    git = partial(subprocess.run, cwd=runs.ROOT, capture_output=True, text=True)
    try:
        changed = git(["git", "status", "--porcelain", "--untracked-files=no", "--", "rmlib", "params"]).stdout
        return git(["git", "rev-parse", "HEAD"]).stdout.strip() + "+" * bool(changed)
    except FileNotFoundError:
        return ""


def _same_evidence(new: Path, old: Path) -> bool:
    """Whether every table and figure of ``new`` stands unchanged in ``old`` (records and PDFs aside)."""

    def contents(folder: Path) -> tuple[dict, dict]:
        files = dict.fromkeys((p.name for p in folder.iterdir()), b"")
        files |= {p.name: Image.open(p).tobytes() for p in folder.glob("*.png")}  # the file holds the run's id
        files |= {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".parquet")}
        return files, _read(folder / "run.json")["parameters"]

    try:
        return not runs.broken(old, "run.json", "sha256") and contents(new) == contents(old)
    except (OSError, ValueError, KeyError):
        return False
