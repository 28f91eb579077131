"""What all tests share: no network, one thread, losses whose shape annotations are executed, small sets."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"

import subprocess
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from jaxtyping import install_import_hook

with install_import_hook(["rmlib.losses", "rmlib.metarm"], "beartype.beartype"):
    import rmlib.losses
    import rmlib.metarm  # noqa: F401

import tiny

from rmlib import data, models, runs, training, world

torch.set_num_threads(1)
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
hypothesis.settings.load_profile("repeatable")

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session", autouse=True)
def importable() -> Iterator[None]:
    """The server that forks the workers imports ``tiny`` once, instead of each worker anew."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(Path(__file__).parent), prepend=os.pathsep)
        yield


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """Results and figures of a test lie in a temporary folder."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "FIGURES", tmp_path / "figures")
    return tmp_path


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A disk of its own with one megabyte of room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    try:
        mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)]
        done = subprocess.run(mount, capture_output=True, text=True, check=False)
    except OSError as error:
        pytest.skip(f"no disk can be mounted: {error}")
    if done.returncode != 0:
        pytest.skip(f"no disk can be mounted: {done.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


@pytest.fixture
def half_precision(monkeypatch) -> Iterator[None]:
    """Training as on a device that computes in bf16."""
    AcceleratorState._reset_state(True)
    monkeypatch.setattr(training, "accelerator", lambda: Accelerator(mixed_precision="bf16", cpu=True))
    yield
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def tokenizer():
    """The tokenizer of the miniature world; do not change it, build your own for that."""
    return models.word_tokenizer(world.vocabulary())


@pytest.fixture(scope="session")
def default_prompts() -> list[dict]:
    """Prompts in the sizes that the parameters cell of chapter 00 sets."""
    from rmlib.notebooks import parameters_cell

    defaults = parameters_cell(ROOT / "notebooks" / "00_world_and_data.ipynb")
    return world.write_prompts({split: defaults[f"n_{split}_prompts"] for split in world.SPLITS}, seed=0)


@pytest.fixture(scope="session")
def many_pairs(default_prompts) -> list[dict]:
    """Thousands of unlabelled pairs of the world, for shares that need them."""
    return world.write_pairs(tiny.paired(default_prompts), seed=1)


@pytest.fixture(scope="session")
def tiny_prompts() -> list[dict]:
    """Six prompts in each split, two of each family."""
    return world.write_prompts(dict.fromkeys(world.SPLITS, 6), seed=0)


@pytest.fixture(scope="session")
def tiny_pairs(tiny_prompts) -> list[dict]:
    """Two unlabelled pairs for each of the tiny prompts that belong to preferences: 48."""
    return world.write_pairs(tiny.paired(tiny_prompts), seed=1)


@pytest.fixture(scope="session")
def tiny_preferences(tiny_pairs):
    """The tiny pairs, labelled."""
    return data.draw_labels(tiny_pairs, seed=0)
