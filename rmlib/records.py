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
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType

import pandas as pd
from PIL import Image

from rmlib import runs

_LOCKS: dict[Path, int] = {}  # one handle a file: closing a second one would let go of the lock

EXPECTED = ("default", "full", "convarg")  # presets whose numbers must lie where the book says
COMMITTED = (*EXPECTED, "full_quiet", "full_noisy")  # those whose evidence belongs to the book


class Run:
    """One run of one chapter: its parameters, where it writes, and what it wrote.

    Raises ``RuntimeError`` while another process runs the same chapter in the same preset.
    """

    def __init__(self, stem: str, preset: str, parameters: dict):
        self.stem, self.preset, self.parameters = stem, preset, parameters
        self.started = time.time()
        self.id = runs.content_key(stem, preset, parameters, self.started)
        self.results = runs.RESULTS / preset / stem
        self.figures = runs.FIGURES / preset / stem
        self.draft = self.results / "figures"
        self.files: list[str] = []
        self.made_of: set[Path] = set()
        self.notes: dict[str, object] = {}
        self.results.mkdir(parents=True, exist_ok=True)
        self._lock()
        (self.results / "run.json").unlink(missing_ok=True)
        half_published = self.figures.parent.glob(f".{stem}.*.tmp")
        for left_by_a_killed_run in [self.draft, *self.results.rglob(".*.tmp"), *half_published]:
            runs.remove(left_by_a_killed_run)
        self.draft.mkdir()

    def _lock(self) -> None:
        path = self.results / ".lock"
        if not path.exists() or path not in _LOCKS:
            _LOCKS[path] = os.open(path, os.O_RDWR | os.O_CREAT)
        try:  # the system lets go of it when the process ends, however
            fcntl.lockf(_LOCKS[path], fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(
                f"another process runs {self.stem} in preset {self.preset!r}: wait for it, shut its kernel down, "
                "or choose another name for preset"
            ) from None

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

    def outputs_of(self, stem: str) -> dict[str, Path]:
        """Files that another chapter left in this preset.

        Raises ``FileNotFoundError`` if it has not run to its end, or what it left is broken.
        """
        record = runs.RESULTS / self.preset / stem / "run.json"
        if problem := _problem(record):
            raise FileNotFoundError(f"chapter {stem} in preset {self.preset!r}: {problem}; run it first")
        found = _read(record)
        self.notes.setdefault("stands_on", {})[stem] = found["id"]
        return {name: record.parent / item["path"] for name, item in found["outputs"].items()}

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
        drawn = {path.stem for path in self.draft.glob("*.png") if path.stat().st_size > 0}
        if drawn != set(figures):
            raise RuntimeError(
                f"figures not drawn: {sorted(set(figures) - drawn)}; not announced: {sorted(drawn - set(figures))}"
            )
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
            "id": self.id,
            "stem": self.stem,
            "preset": self.preset,
            "parameters": self.parameters,
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


def forget_broken(preset: str, parameters: Mapping[str, dict] = MappingProxyType({})) -> None:
    """Remove the record of every chapter that must run again, so that it does.

    Its outputs or evidence are not whole, or it ran with other parameters than ``parameters[stem]``.
    """
    for record in sorted((runs.RESULTS / preset).glob("*/run.json")):
        problem = _problem(record)
        wanted = parameters.get(record.parent.name)
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
        evidence = [published / name for name in [*found["files"], "run.json"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return "its record run.json cannot be read"
    missing = [path.name for path in [*evidence, *(path for path, _ in outputs.values())] if not path.exists()]
    if missing:
        return f"missing: {', '.join(missing)}"
    broken = [name for name, (path, digest) in outputs.items() if runs.fingerprint(path) != digest]
    broken += _changed(published)
    return f"changed since it was written: {', '.join(broken)}" if broken else ""


def _changed(published: Path) -> list[str]:
    """Files of published evidence that are no longer what the run left that published them."""
    try:
        digests = _read(published / "run.json").get("sha256", {})
        return [name for name, digest in digests.items() if runs.fingerprint(published / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        return [str(error)]


def _read(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def _write(record: dict, path: Path) -> None:
    path.write_text(json.dumps(record, indent=2, default=str) + "\n", encoding="utf-8")


def _commit() -> str:
    """The commit that the code stands at, with a plus sign if files differ from it; empty outside of git."""

    def git(*command: str) -> str:
        answer = subprocess.run(["git", "-C", str(runs.ROOT), *command], capture_output=True, text=True, check=False)
        return answer.stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "rmlib", "params")
        return git("rev-parse", "HEAD") + "+" * bool(changed)
    except FileNotFoundError:
        return ""


def _same_evidence(new: Path, old: Path) -> bool:
    """Whether every table and figure of ``new`` stands unchanged in ``old`` (records and PDFs aside)."""

    def contents(folder: Path) -> dict[str, bytes]:
        pixels = {p.name: Image.open(p).tobytes() for p in folder.glob("*.png")}  # the files hold the run's id
        return pixels | {p.name: p.read_bytes() for p in folder.iterdir() if p.suffix in (".csv", ".parquet")}

    try:
        same_names = {p.name for p in new.iterdir()} == {p.name for p in old.iterdir()}
        same_parameters = _read(old / "run.json")["parameters"] == _read(new / "run.json")["parameters"]
        return same_names and same_parameters and not _changed(old) and contents(new) == contents(old)
    except (OSError, ValueError, KeyError):
        return False
