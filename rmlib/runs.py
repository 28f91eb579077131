"""Long work: where files lie, content keys, atomic writes, and units that run side by side.

A *unit* is a folder named by a key over its parameters, its input files and the code it uses, so a rerun
skips what stands and redoes what changed or broke; a killed run goes on from the unit's last checkpoint.
"""

import ast
import errno
import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import is_dataclass
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).resolve().parent.parent
RESULTS, FIGURES = ROOT / "results", ROOT / "figures"
SEAL = "unit.json"
COMPUTES = ("torch", "transformers", "tokenizers", "accelerate", "numpy")


def data_folder() -> Path:
    """Where data sets that cannot be shipped lie: ``$RMLIB_DATA``, else ``data/`` in the project."""
    return Path(os.environ.get("RMLIB_DATA") or ROOT / "data")


def content_key(*parts: object, code: Sequence[str] = ()) -> str:
    """Hash of ``parts``, of the modules of rmlib named in ``code``, and of versions and kind of device.

    Paths stand for the bytes of their files wherever they lie, arrays for their values; comments and docstrings of the
    code do not count.
    """
    import torch  # here, so that the Snakefile, which reads this module, starts without it

    computer = [*map(version, COMPUTES), "cuda" if torch.cuda.is_available() else "cpu"]
    everything = [*parts, *map(_code_text, code), computer]
    return hashlib.sha256(b"".join(map(_bytes_of, everything))).hexdigest()[:16]


def fingerprint(path: Path) -> str:
    """SHA-256 of a file's bytes, or of the bytes of all files in a folder."""
    return hashlib.sha256(_content_of(path)).hexdigest()


def broken(folder: Path, seal: str, key: str) -> list[str]:
    """Files of ``folder`` that are not what its JSON file ``seal`` says under ``key``, or what is wrong with that."""
    try:
        noted = json.loads((folder / seal).read_text(encoding="utf-8"))[key].items()
        return [name for name, old in noted if not (folder / name).exists() or fingerprint(folder / name) != old]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return [f"{seal}: {error}"]


def _bytes_of(part: object) -> bytes:
    content = _content_of(part)
    return f"{len(content)}:".encode() + content  # so that neighbours cannot run into each other


def _content_of(part: object) -> bytes:
    if isinstance(part, Path):
        paths = sorted(p for p in part.rglob("*") if p.is_file()) if part.is_dir() else [part]
        files = [(str(p.relative_to(part)).encode(), p, p.stat()) for p in paths]
        return b"".join(name + _file_hash(p, stat.st_size, stat.st_mtime_ns) for name, p, stat in files)
    if isinstance(part, np.ndarray):
        return f"{part.dtype}{part.shape}".encode() + np.ascontiguousarray(part).tobytes()
    if is_dataclass(part):
        return type(part).__name__.encode() + b"".join(_bytes_of(v) for v in vars(part).values())
    if isinstance(part, dict):
        return b"".join(_bytes_of(k) + _bytes_of(v) for k, v in sorted(part.items()))
    if isinstance(part, list | tuple):
        return b"[" + b"".join(_bytes_of(item) for item in part) + b"]"
    return repr(part).encode()


@cache
def _file_hash(path: Path, size: int, mtime_ns: int) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


@cache
def _code_text(name: str) -> str:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        match node:
            case ast.AST(body=[ast.Expr(ast.Constant()), *_]):  # a docstring
                node.body.pop(0)
    return ast.dump(tree)


@contextmanager
def atomic(path: Path):
    """Yield a temporary path beside ``path`` that takes its place only if the block succeeds.

    Raises ``OSError`` that names ``path`` when the disk is full; what stood at ``path`` stays.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        remove(temporary)  # of a killed run with the same process number
        yield temporary
        if not temporary.exists():
            raise FileNotFoundError(f"nothing was written for {path}")
        if path.is_dir():
            shutil.rmtree(path)
        os.replace(temporary, path)
    except Exception as error:
        said_full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
        if said_full or shutil.disk_usage(path.parent).free < 2**16:  # libraries that write in C++ do not say so
            raise OSError(errno.ENOSPC, f"the disk is full: {path} was not written; make room and run again") from error
        raise
    finally:
        remove(temporary)


def remove(path: Path) -> None:
    """Remove a file or a whole folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)


def write_table(table: pd.DataFrame, path: Path) -> None:
    """Write a table to Parquet or CSV, atomically."""
    with atomic(path) as temporary:
        write = partial(table.to_csv, float_format="%.6g") if path.suffix == ".csv" else table.to_parquet
        write(temporary, index=False)


def made(path: Path, make: Callable[[Path, Path], None]) -> Path:
    """The folder at ``path``, made first by ``make(folder, checkpoint)`` unless it stands whole.

    It is complete or absent; ``checkpoint`` is a file that outlives a killed run until the folder is complete.
    """
    checkpoint = path.with_name(f".{path.name}.pt")
    if not is_whole(path):
        started = time.time()
        with atomic(path) as temporary:
            temporary.mkdir(parents=True)
            make(temporary, checkpoint)
            files = [file for file in temporary.rglob("*") if file.is_file()]
            digests = {str(file.relative_to(temporary)): fingerprint(file) for file in files}
            seal = {"seconds": round(time.time() - started, 2), "peak_memory_mb": peak_memory_mb(), "files": digests}
            (temporary / SEAL).write_text(json.dumps(seal, indent=1))
    checkpoint.unlink(missing_ok=True)
    return path


def is_whole(folder: Path) -> bool:
    """Whether a unit's folder holds the very files it was sealed with; says which one is broken."""
    if not folder.exists():
        return False
    if damage := broken(folder, SEAL, "files"):
        print(f"{folder.name} is broken ({', '.join(damage)}) and will be made again", file=sys.stderr, flush=True)
    return not damage


def run_units(
    units: Sequence,
    work: Callable,
    folder: Path,
    *,
    code: Sequence[str],
    workers: int = 0,
    forecast: Callable[[Sequence, int], str] | None = None,
) -> list[Path]:
    """Run ``work(unit, folder, checkpoint)`` for every unit that does not stand yet; see :func:`made`.

    ``workers`` processes run side by side (0: one a GPU, else one a core), of one thread each on a CPU, so
    results do not depend on their number. ``forecast(units, workers)`` says beforehand what they will cost.
    Returns the folder of every unit, in the order given; the first failure stops the rest.
    """
    paths = [folder / f"{unit.name}-{content_key(unit, code=code)}" for unit in units]
    todo = {path: unit for path, unit in zip(paths, units, strict=True) if not is_whole(path)}
    if not todo:
        return paths
    import torch  # here, so that the Snakefile, which reads this module, starts without it

    started, workers = time.perf_counter(), min(workers or torch.cuda.device_count() or os.cpu_count() or 1, len(todo))
    print(f"{folder.name}: {len(units) - len(todo)} of {len(units)} units stand, {len(todo)} to run", flush=True)
    if forecast:
        print(f"  {forecast(list(todo.values()), workers)}", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    with ProcessPoolExecutor(workers, context, _start_worker, (context.Value("i", 0),)) as pool:
        jobs = [pool.submit(made, path, partial(work, unit)) for path, unit in todo.items()]
        try:
            for n, job in enumerate(as_completed(jobs), 1):
                job.result()
                if n == len(jobs) or n % max(1, len(jobs) // 5) == 0:
                    print(f"  {n}/{len(jobs)} done", file=sys.stderr, flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    print(f"  took {time.perf_counter() - started:.0f} s", file=sys.stderr, flush=True)
    return paths


def _start_worker(started) -> None:
    """A GPU of its own, or one thread of the CPU; and no worker outlives its parent."""
    import torch

    with started.get_lock():
        place, started.value = started.value, started.value + 1
    if torch.cuda.is_available():
        torch.cuda.set_device(place % torch.cuda.device_count())
    torch.set_num_threads(1)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def peak_memory_mb() -> int:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform != "darwin" else 1024**2)
