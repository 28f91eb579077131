"""Running things: where files lie, content keys, atomic writes, parallel units, and the record of a run.

Long work is cut into *units*. A unit's file is named by a key over its parameters, its input files and the
code it uses, so a rerun skips what stands and redoes what changed; a killed run loses the unit in progress.
"""

import ast
import hashlib
import json
import multiprocessing
import os
import platform
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, is_dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "results", ROOT / "figures"


def data_folder() -> Path:
    """Where data sets that cannot be shipped lie: ``$RMLIB_DATA``, else ``data/`` in the project."""
    return Path(os.environ.get("RMLIB_DATA", ROOT / "data"))


# ---------------------------------------------------------------- content keys


def content_key(*parts: object, code: Sequence[str] = ()) -> str:
    """Hash of ``parts``, of the modules of rmlib named in ``code``, and of the versions that compute.

    Paths stand for the bytes of their file (or of all files in their folder), arrays for their values;
    comments and docstrings of the code do not count.
    """
    digest = hashlib.sha256()
    versions = [version(name) for name in ("torch", "transformers", "tokenizers")]
    for part in [*parts, *(_code_text(name) for name in code), versions]:
        digest.update(_bytes_of(part))
    return digest.hexdigest()[:16]


def _bytes_of(part: object) -> bytes:
    content = _content_of(part)
    return f"{len(content)}:".encode() + content  # so that neighbours cannot run into each other


def _content_of(part: object) -> bytes:
    if isinstance(part, Path):
        paths = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        return b"".join(_file_hash(str(p), p.stat().st_size, p.stat().st_mtime_ns) for p in paths)
    if isinstance(part, np.ndarray):
        return str(part.dtype).encode() + np.ascontiguousarray(part).tobytes()
    if is_dataclass(part):
        return type(part).__name__.encode() + b"".join(_bytes_of(v) for v in vars(part).values())
    if isinstance(part, dict):
        return b"".join(_bytes_of(k) + _bytes_of(v) for k, v in sorted(part.items()))
    if isinstance(part, list | tuple):
        return b"[" + b"".join(_bytes_of(item) for item in part) + b"]"
    return repr(part).encode()


@cache
def _file_hash(path: str, size: int, mtime_ns: int) -> bytes:
    return hashlib.sha256(Path(path).read_bytes()).digest()


@cache
def _code_text(name: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if (
            isinstance(body, list)
            and body
            and isinstance(body[0], ast.Expr)
            and isinstance(body[0].value, ast.Constant)
        ):
            body.pop(0)
    return ast.dump(tree)


# ---------------------------------------------------------------- files


@contextmanager
def atomic(path: Path):
    """Yield a temporary path beside ``path`` that takes its place only if the block succeeds."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _remove(temporary)  # of a killed run with the same process number
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    finally:
        _remove(temporary)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table to Parquet or CSV, atomically."""
    with atomic(path) as temporary:
        if path.suffix == ".csv":
            table.to_csv(temporary, index=False, float_format="%.6g")
        else:
            table.to_parquet(temporary, index=False)


# ---------------------------------------------------------------- units


def made(path: Path, make: Callable[[Path], None]) -> Path:
    """The folder at ``path``, made first by ``make(folder)`` if it does not stand; it is complete or absent."""
    if not path.exists():
        with atomic(path) as temporary:
            temporary.mkdir(parents=True)
            make(temporary)
    return path


def run_units(units: Sequence, work: Callable, folder: Path, *, code: Sequence[str], workers: int = 0) -> list[Path]:
    """Run ``work(unit, folder)`` for every unit that has no folder yet; the unit's folder is complete or absent.

    ``workers`` processes of one thread each run side by side (0: one a core), so results do not depend on
    their number. Returns the folder of every unit, in the order given.
    """
    paths = [folder / f"{unit.name}-{content_key(unit, *unit.inputs(), code=code)}" for unit in units]
    todo = {path: unit for path, unit in zip(paths, units, strict=True) if not path.exists()}
    started = time.perf_counter()
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    if todo:
        print(f"{folder.name}: {len(units) - len(todo)} of {len(units)} units stand, {len(todo)} to run", flush=True)
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([work.__module__])
        with ProcessPoolExecutor(workers, mp_context=context, initializer=_start_worker) as pool:
            jobs = [pool.submit(made, path, partial(work, unit)) for path, unit in todo.items()]
            for n, job in enumerate(as_completed(jobs), 1):
                job.result()
                if n == len(jobs) or n % max(1, len(jobs) // 5) == 0:
                    print(f"  {n}/{len(jobs)} done", file=sys.stderr, flush=True)
        print(f"  took {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return paths


def _start_worker() -> None:
    """One thread a worker, and no worker outlives its parent."""
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


# ---------------------------------------------------------------- the record of a run


@dataclass
class Run:
    """One run of one chapter: its parameters, where it writes, and what it wrote.

    Figures and tables gather in a hidden folder and take the place of the last run's only in ``finish``,
    so ``figures/<preset>/<stem>`` always holds the evidence of exactly one complete run.
    """

    stem: str
    preset: str
    parameters: dict
    started: float = field(default_factory=time.time)
    files: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.id = content_key(self.stem, self.preset, self.parameters, self.started)
        self.results = RESULTS / self.preset / self.stem
        self.figures = FIGURES / self.preset / self.stem
        self.draft = self.results / "figures"
        (self.results / "run.json").unlink(missing_ok=True)
        shutil.rmtree(self.draft, ignore_errors=True)
        self.draft.mkdir(parents=True)

    def outputs_of(self, stem: str) -> dict[str, Path]:
        """Files that another chapter left in this preset. Raises ``FileNotFoundError`` if it has not run."""
        record = RESULTS / self.preset / stem / "run.json"
        if not record.exists():
            raise FileNotFoundError(f"chapter {stem} has no finished run in preset {self.preset!r}: run it first")
        outputs = json.loads(record.read_text(encoding="utf-8"))["outputs"]
        return {name: record.parent / path for name, path in outputs.items()}

    def table(self, name: str, table: pd.DataFrame, suffix: str = ".csv") -> pd.DataFrame:
        """Write ``table`` as evidence (CSV, or Parquet where rows are many) and return it."""
        write_table(table, self.draft / f"{name}{suffix}")
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
        record = {
            "id": self.id,
            "stem": self.stem,
            "preset": self.preset,
            "parameters": self.parameters,
            "versions": {p: version(p) for p in ("torch", "transformers", "datasets", "accelerate", "numpy")},
            "python": platform.python_version(),
            "device": "cuda" if torch.cuda.is_available() else "cpu",
            "seconds": round(time.time() - self.started, 1),
            "peak_memory_mb": _peak_memory_mb(),
            "outputs": {name: str(path.relative_to(self.results)) for name, path in (outputs or {}).items()},
            "files": sorted(self.files),
        }
        (self.draft / "run.json").write_text(json.dumps(record, indent=2, default=str) + "\n")
        if not _same_evidence(self.draft, self.figures):
            with atomic(self.figures) as temporary:
                shutil.copytree(self.draft, temporary)
        with atomic(self.results / "run.json") as temporary:
            shutil.copy(self.draft / "run.json", temporary)
        print(
            f"{len(drawn)} figures and {len(self.files) - 2 * len(drawn)} tables in figures/{self.preset}/{self.stem}"
        )


def _same_evidence(new: Path, old: Path) -> bool:
    """Whether every table and figure of ``new`` stands unchanged in ``old`` (records and PDFs aside)."""

    def contents(folder: Path) -> dict[str, bytes]:
        pixels = {p.name: Image.open(p).tobytes() for p in folder.glob("*.png")}  # the files hold the run's id
        return pixels | {p.name: p.read_bytes() for p in folder.glob("*.csv")}

    names = {p.name for p in new.iterdir()} == {p.name for p in old.iterdir()} if old.is_dir() else False
    same_parameters = (
        names
        and json.loads((old / "run.json").read_text())["parameters"]
        == json.loads((new / "run.json").read_text())["parameters"]
    )
    return bool(same_parameters) and contents(new) == contents(old)


def _peak_memory_mb() -> int:
    usage = [resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return max(usage) // (1024 if sys.platform != "darwin" else 1024**2)
