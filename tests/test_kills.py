"""Chapters that are killed, damaged or misled: run as their users run them, in copies of the project.

The clock of a kill is the run's own progress (its processes, its units, its figures), so that a slow machine
is killed in the same places as a quick one; the moments are drawn by a seeded generator.
"""

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import get_args

import numpy as np
import pandas as pd
import psutil
import pytest
from PIL import Image

from rmlib import params, records, runs

CODE = ("rmlib", "notebooks", "params", "Snakefile", "Makefile")
WORLD, STRENGTH, ANNOTATED = "00_world_and_data", "01_preference_strength", "01b_annotated_sets"
ROUNDS = "05_iterative_rlhf"
ALL = (WORLD, STRENGTH, ANNOTATED)
MARK = "RMLIB_TESTED_IN"  # in the environment of every process of a copy, so that none is overlooked
PATIENCE = 900  # seconds, for what should take less than 60; a hanging run must not hang the tests
ORPHANS_LAST = 60  # seconds; on a quiet machine they need about two


@dataclass(frozen=True)
class Project:
    """A copy of the project, and how its user runs it."""

    root: Path

    @classmethod
    def copied(cls, source: Path, root: Path, *parts: str) -> "Project":
        """The project at ``source`` moved to ``root`` with its time stamps: some ``parts``, or all.

        Chapters from 02 on stay behind: their runs go through the same code, and would take most of the time.
        """
        for part in parts or [path.name for path in source.iterdir()]:
            whole = (source / part).is_dir()
            (root / part).parent.mkdir(parents=True, exist_ok=True)
            (shutil.copytree if whole else shutil.copy2)(source / part, root / part)
        for later in root.glob("params/smoke/0[2-9]*.yaml"):
            later.unlink()
        return cls(root)

    def set_parameters(self, stem: str, **values: object) -> "Project":
        path = self.root / "params" / "smoke" / f"{stem}.yaml"
        kept = [line for line in path.read_text().splitlines() if line.split(":")[0] not in values]
        path.write_text("\n".join([*kept, *(f"{name}: {json.dumps(value)}" for name, value in values.items())]) + "\n")
        return self

    def without(self, *stems: str) -> "Project":
        """Without the parameters of these chapters, so that they are not run."""
        for stem in stems:
            (self.root / "params" / "smoke" / f"{stem}.yaml").unlink()
        return self

    def start(self, *command: str) -> subprocess.Popen:
        """``python -m`` ``command`` in the background; without one, what ``make book PRESET=smoke`` starts."""
        recipe = re.search(r"\$\(BIN\)/snakemake (.*)", (self.root / "Makefile").read_text()).group(1)
        command = command or ("snakemake", *recipe.replace("$(PRESET)", "smoke").split())
        own = {"PYTHONPATH": str(self.root), "JUPYTER_RUNTIME_DIR": str(self.root / "jupyter"), MARK: str(self.root)}
        environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"} | own
        with (self.root / "output.txt").open("w") as output:
            return subprocess.Popen(
                [sys.executable, "-m", *command],
                cwd=self.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )

    @property
    def output(self) -> str:
        return (self.root / "output.txt").read_text()

    def processes(self) -> dict[int, psutil.Process]:
        """All living processes that this copy started, by their number, orphans too."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get(MARK) == str(self.root) and process.status() != psutil.STATUS_ZOMBIE:
                    found[process.pid] = process
        return found

    def results(self, stem: str) -> Path:
        return self.root / "results" / "smoke" / stem

    def figures(self, stem: str) -> Path:
        return self.root / "figures" / "smoke" / stem

    def units(self) -> dict[str, int]:
        """When every finished unit of chapter 01 was sealed, by its name."""
        seals = self.results(STRENGTH).glob("units/[!.]*/unit.json")
        return {seal.parent.name: seal.stat().st_mtime_ns for seal in seals}

    def executed(self) -> dict[str, int]:
        """When every chapter was run to its end."""
        return {path.stem: path.stat().st_mtime_ns for path in self.root.glob("results/smoke/*/0*.ipynb")}

    def record(self, stem: str) -> dict:
        return json.loads((self.results(stem) / "run.json").read_text())

    def tables(self, *stems: str) -> dict[str, bytes]:
        """Every table of these chapters, byte for byte."""
        places = ("figures/smoke/{}/*.csv", "figures/smoke/{}/*.parquet", "results/smoke/{}/*.parquet")
        found = [path for place in places for stem in stems for path in self.root.glob(place.format(stem))]
        return {str(path.relative_to(self.root)): path.read_bytes() for path in found}

    def left_behind(self) -> list[Path]:
        """Temporary files and checkpoints."""
        hidden = [path for place in ("results", "figures") for path in (self.root / place).rglob(".*")]
        return [path for path in hidden if path.suffix in (".tmp", ".pt")]


def eventually(condition: Callable[[], object], seconds: float = PATIENCE, every: float = 0.05) -> object:
    """What ``condition`` returns as soon as it is true; fails when it does not become true in time."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, f"waited for {seconds} seconds"
        time.sleep(every)
    return value


def run_all(*projects: Project) -> None:
    """Run the book of some copies to the end, side by side."""
    started = [project.start() for project in projects]
    codes = [process.wait(PATIENCE) for process in started]
    assert not any(codes), [project.output[-3000:] for project in projects]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Iterator[Path]:
    """A folder for copies; whatever still runs in it at the end is killed."""
    folder = tmp_path_factory.mktemp("copies")
    yield folder
    for root in folder.iterdir():
        for process in Project(root).processes().values():
            with suppress(psutil.Error):
                process.kill()


@pytest.fixture(scope="module")
def two_runs(place) -> tuple[Project, Project]:
    """Two copies of the project run from nothing, uninterrupted: with two workers and with one."""
    projects = tuple(Project.copied(runs.ROOT, place / name, *CODE) for name in ("two_workers", "one_worker"))
    for project, workers in zip(projects, (2, 1), strict=True):
        project.set_parameters(STRENGTH, workers=workers)
    projects[1].without(ANNOTATED)
    run_all(*projects)
    return projects


@pytest.fixture(scope="module")
def finished(two_runs) -> Project:
    """A copy that ran to its end; do not change it, copy it again for that."""
    return two_runs[0]


# ---------------------------------------------------------------- determinism


def test_a_copy_runs_its_own_code(finished):
    where = [sys.executable, "-P", "-c", "import rmlib; print(rmlib.__file__)"]
    environment = os.environ | {"PYTHONPATH": str(finished.root)}
    answer = subprocess.run(where, env=environment, cwd="/", capture_output=True, text=True, check=True)
    assert Path(answer.stdout.strip()) == finished.root / "rmlib" / "__init__.py"
    assert set(finished.executed()) == set(ALL)
    assert finished.output.count(f"preset smoke has no params/smoke/{ROUNDS}.yaml: chapter 05 is not run\n") == 1
    assert finished.record(STRENGTH)["units"] == len(finished.units()) > 50
    assert finished.left_behind() == []


def test_two_runs_with_one_worker_and_with_two_give_the_same_tables(two_runs):
    two, one = two_runs
    assert [project.record(STRENGTH)["parameters"]["workers"] for project in two_runs] == [2, 1]
    assert two.record(STRENGTH)["id"] != one.record(STRENGTH)["id"]
    assert len(one.tables(WORLD, STRENGTH)) > 30
    assert one.tables(WORLD, STRENGTH) == two.tables(WORLD, STRENGTH)
    assert two.units().keys() == one.units().keys()


@pytest.fixture(scope="module")
def other_world_and_labels(place) -> tuple[Project, Project]:
    """Chapter 00 with another value of ``world_seed``, and with other ``seeds``."""
    projects = tuple(Project.copied(runs.ROOT, place / name, *CODE) for name in ("other_world", "other_labels"))
    for project, change in zip(projects, ({"world_seed": 1}, {"seeds": [2, 3]}), strict=True):
        project.set_parameters(WORLD, **change).without(STRENGTH, ANNOTATED)
    run_all(*projects)
    return projects


def test_another_world_seed_gives_another_world(finished, other_world_and_labels):
    before, after = finished.tables(WORLD), other_world_and_labels[0].tables(WORLD)
    assert len(after) == 10 and after.keys() == before.keys()
    assert [name for name in after if after[name] == before[name]] == []


def test_other_seeds_give_other_labels_on_the_same_world(finished, other_world_and_labels):
    _, labels = other_world_and_labels
    before, after = finished.tables(WORLD), labels.tables(WORLD)
    same = {Path(name).stem for name in before.keys() & after.keys() if before[name] == after[name]}
    assert same == {"prompts", "families", "sft", "judge"}
    drawn = [pd.read_parquet(p.results(WORLD) / f"preferences_{s}.parquet") for p, s in ((finished, 0), (labels, 2))]
    assert len({tuple(part["chosen_id"]) for part in drawn}) == 2
    assert len({tuple(sorted(part["pair_id"])) for part in drawn}) == 1


def test_every_seed_of_chapter_01_gives_other_votes(finished):
    votes = pd.read_parquet(finished.results(STRENGTH) / "strength.parquet")
    first, second = (votes.loc[votes["seed"] == seed, ["mean", "std"]].to_numpy() for seed in (0, 1))
    assert np.mean(first != second) > 0.9
    members = [
        pd.read_parquet(path) for path in finished.root.glob("results/smoke/*/units/s0-member-m*/scores.parquet")
    ]
    assert len(members) == 3
    assert not any(a.equals(b) for a, b in zip(members, [*members[1:], members[0]], strict=True))


# ---------------------------------------------------------------- kills

PARENTS = ("snakemake", "papermill")
FIGURES_AFTER_UNITS = range(9, 14)  # of 15 that chapter 01 draws, seven are drawn before its last units


@dataclass(frozen=True)
class Kill:
    """Who is killed, and when: a while after the run has begun, after a number of units stand, or of figures."""

    victim: str
    stage: str
    after: int
    delay: float  # a share of the time that such a step takes


def draw_kills(rng: np.random.Generator, n_units: int) -> list[Kill]:
    """Ten kills in the order of the run's progress: one before the first unit, two after the last."""
    others = rng.permutation([*PARENTS, *PARENTS, "kernel", "kernel", "kernel"]).tolist()
    victims = [others[0], *rng.permutation([*others[3:], "worker", "worker", "worker"]).tolist(), *others[1:3]]
    units = sorted(rng.choice(np.arange(1, n_units - 15, 4), 7, replace=False).tolist())
    figures = sorted(rng.choice(FIGURES_AFTER_UNITS, 2, replace=False).tolist())
    stages = [("start", 0), *(("units", n) for n in units), *(("figures", n) for n in figures)]
    return [Kill(who, *when, rng.uniform()) for who, when in zip(victims, stages, strict=True)]


def find(project: Project, victim: str) -> list[psutil.Process]:
    """The processes of that kind; of the workers, those with a unit in hand."""
    family = project.processes()
    if victim == "worker":
        busy = [int(path.name.split(".")[-2]) for path in project.results(STRENGTH).glob("units/.*.tmp")]
        return [family[pid] for pid in busy if pid in family]
    module = "ipykernel_launcher" if victim == "kernel" else victim
    return [process for process in family.values() if arguments(process)[1:3] == ["-m", module]]


def arguments(process: psutil.Process) -> list[str]:
    with suppress(psutil.Error):
        return process.cmdline()
    return []


def is_due(kill: Kill, project: Project, began: float) -> bool:
    """Whether the run that began then has come as far as ``kill`` asks."""
    if kill.stage == "start":
        return bool(find(project, "papermill"))
    if kill.stage == "units":
        return len(project.units()) >= kill.after and bool(find(project, "worker"))
    drawn = project.results(STRENGTH).glob("figures/*.png")
    return sum(path.stat().st_mtime > began for path in drawn) >= kill.after


def strike(kill: Kill, project: Project, seconds_of: dict[str, float]) -> None:
    """Run the book, kill it as ``kill`` says, and wait until nothing of it runs."""
    began, process = time.time(), project.start()

    def still(condition: Callable[[], object]) -> object:
        assert process.poll() is None, f"{kill} came too late:\n{project.output[-3000:]}"
        return condition()

    eventually(lambda: still(lambda: is_due(kill, project, began)))
    time.sleep(kill.delay * seconds_of[kill.stage])
    eventually(lambda: still(lambda: find(project, kill.victim)))[0].kill()
    if kill.victim == "snakemake":  # a crash takes papermill as well; what papermill started must end by itself
        for other in project.processes().values():
            if not {"ipykernel_launcher", "multiprocessing"} & set(re.findall(r"\w+", " ".join(arguments(other)))):
                other.kill()
    assert process.wait(PATIENCE) != 0
    eventually(lambda: not project.processes(), ORPHANS_LAST)


@dataclass
class Chain:
    """A copy whose chapter 01 is killed again and again, and at last left to run to its end."""

    project: Project
    kills: list[Kill]
    stood: list[dict[str, int]]  # its units after each time

    def run(self, seconds_of: dict[str, float]) -> None:
        for kill in self.kills:
            strike(kill, self.project, seconds_of)
            self.stood.append(self.project.units())
        half_published = self.project.figures(STRENGTH).with_name(f".{STRENGTH}.1.tmp")
        half_published.mkdir()  # of a kill in the few milliseconds in which figures are published
        run_all(self.project)
        self.stood.append(self.project.units())


@pytest.fixture(scope="module")
def chains(finished, place) -> list[Chain]:
    """Two copies that got the results of chapter 00 and were killed side by side, five times each."""
    if not sys.platform.startswith("linux"):
        pytest.skip("the victims are found in /proc")
    earlier = [f"{place}/smoke/{WORLD}" for place in ("results", "figures")]
    copies = [Project.copied(finished.root, place / f"killed_{n}", *CODE, *earlier).without(ANNOTATED) for n in (0, 1)]
    record = finished.record(STRENGTH)
    first_unit = min(finished.units().values()) / 1e9 - finished.executed()[WORLD] / 1e9
    seconds_of = {"start": 0.2 * first_unit, "units": record["unit_seconds"] / record["units"], "figures": 0.3}
    kills = draw_kills(np.random.default_rng(0), record["units"])
    chains = [Chain(copy, kills[n::2], []) for n, copy in enumerate(copies)]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda chain: chain.run(seconds_of), chains))
    return chains


@pytest.fixture(params=[0, 1], ids=["one_chain", "other_chain"])
def chain(chains, request) -> Chain:
    return chains[request.param]


def test_ten_kills_hit_every_kind_of_process_in_every_stage(chains):
    kills = [kill for chain in chains for kill in chain.kills]
    count = Counter("parent" if kill.victim in PARENTS else kill.victim for kill in kills)
    assert count == {"parent": 4, "kernel": 3, "worker": 3}
    assert Counter(kill.stage for kill in kills) == {"start": 1, "units": 7, "figures": 2}
    assert [len(chain.stood) for chain in chains] == [6, 6]


def test_a_run_killed_again_and_again_gives_the_tables_of_an_uninterrupted_one(finished, chain):
    assert chain.project.tables(STRENGTH) == finished.tables(STRENGTH)
    assert set(chain.project.executed()) == {WORLD, STRENGTH}


def test_what_was_done_before_a_kill_is_not_done_again(finished, chain):
    assert all(before.items() <= after.items() for before, after in pairwise(chain.stood))
    counts = [len(units) for units in chain.stood]
    assert all(n >= kill.after for kill, n in zip(chain.kills, counts, strict=False) if kill.stage == "units")
    assert counts[0] < counts[3] < counts[4] == counts[5]
    assert chain.stood[-1].keys() == finished.units().keys()


def test_the_results_of_chapter_00_are_valid_where_they_were_moved_to(finished, chain):
    assert chain.project.executed()[WORLD] == finished.executed()[WORLD]
    assert chain.project.record(STRENGTH)["stands_on"] == {WORLD: finished.record(WORLD)["id"]}


def test_kills_leave_nothing_behind(chain):
    assert chain.project.left_behind() == []


# ---------------------------------------------------------------- kills amid rounds


@pytest.fixture(scope="module")
def rounds(finished, place) -> tuple[Project, Project, list[int]]:
    """Chapter 05 run uninterrupted, and killed at five random moments (units that stand) before its last run."""
    earlier = [f"{place}/smoke/{WORLD}" for place in ("results", "figures")]
    copies = [Project.copied(finished.root, place / name, *CODE, *earlier) for name in ("rounds", "killed_rounds")]
    for copy in copies:
        shutil.copy2(runs.ROOT / f"params/smoke/{ROUNDS}.yaml", copy.root / "params/smoke")
    straight, killed = copies
    command = ("papermill", f"notebooks/{ROUNDS}.ipynb", "out.ipynb", "-f", f"params/smoke/{ROUNDS}.yaml")
    assert straight.start(*command).wait(PATIENCE) == 0, straight.output[-3000:]
    rng, n_units = np.random.default_rng(1), len(sealed(straight))
    moments = sorted(rng.choice(n_units - 1, 5, replace=False).tolist())
    for n in moments:
        process = killed.start(*command)
        eventually(lambda n=n, process=process: has_come_to(n, killed, process))
        time.sleep(rng.uniform(0, 0.5))
        for each in killed.processes().values():
            with suppress(psutil.Error):
                each.kill()
        assert process.wait(PATIENCE) != 0
        eventually(lambda: not killed.processes(), ORPHANS_LAST)
    assert killed.start(*command).wait(PATIENCE) == 0, killed.output[-3000:]
    return straight, killed, moments


def sealed(project: Project) -> dict[str, int]:
    """When every unit of chapter 05 was sealed."""
    return {seal.parent.name: seal.stat().st_mtime_ns for seal in project.results(ROUNDS).glob("units/[!.]*/unit.json")}


def has_come_to(n: int, project: Project, process: subprocess.Popen) -> bool:
    """Whether ``n`` units of chapter 05 stand and another is in the making; fails if ``process`` has ended before."""
    assert process.poll() is None, f"ended before {n} units stood:\n{project.output[-3000:]}"
    return len(sealed(project)) >= n and any(project.results(ROUNDS).glob("units/.*.tmp"))


def test_the_smoke_preset_takes_every_path_of_the_rounds(rounds):
    straight, *_ = rounds
    parameters = straight.record(ROUNDS)["parameters"]
    assert set(parameters["arms"]) == set(get_args(params.PolicyArm))
    answered = pd.read_csv(straight.figures(ROUNDS) / "table2_rounds.csv")
    ran = {*parameters["arms"], *(f"MetaRM, eta x {factor:g}" for factor in parameters["eta_factors"])}
    assert set(answered["arm"]) == ran > set(parameters["arms"])


def test_rounds_killed_five_times_end_with_the_tables_of_an_uninterrupted_run(rounds):
    straight, killed, moments = rounds
    assert len(moments) == 5
    tables = straight.tables(ROUNDS)
    assert tables and tables == killed.tables(ROUNDS)
    assert sealed(straight).keys() == sealed(killed).keys()


def test_rounds_start_where_the_options_say(rounds, place):
    """A policy that starts from the SFT model is at KL 0 in its first step; one that goes on is not."""
    straight, *_ = rounds
    other = Project.copied(straight.root, place / "other_starts")
    options = {
        "policy_start": "sft",
        "reward_model_start": "previous",
        "arms": ["vanilla", "MetaRM", "vanilla, held out", "MetaRM, held out"],  # the latter ask more questions
        "eta_factors": [],
    }
    shutil.copy2(straight.root / f"params/smoke/{ROUNDS}.yaml", other.root / "params/smoke")
    other.set_parameters(ROUNDS, **options)
    command = ("papermill", f"notebooks/{ROUNDS}.ipynb", "out.ipynb", "-f", f"params/smoke/{ROUNDS}.yaml")
    assert other.start(*command).wait(PATIENCE) == 0, other.output[-3000:]
    kl, quality = {}, {}
    for name, project in (("on", straight), ("anew", other)):
        log = pd.read_csv(project.figures(ROUNDS) / "log.csv").set_index(["arm", "round", "step"])["kl"]
        kl[name] = log["vanilla"].xs(1, level="step")
        models = pd.read_csv(project.figures(ROUNDS) / "fig4_reward_models.csv").set_index(["arm", "round"])
        quality[name] = models.loc["MetaRM", "spread"]
    assert np.allclose(kl["anew"], 0, atol=1e-5)
    assert np.allclose(kl["on"].loc[1], 0, atol=1e-5) and abs(kl["on"].loc[2]) > 1e-3
    assert quality["on"].loc[1] == quality["anew"].loc[1] and quality["on"].loc[2] != quality["anew"].loc[2]


# ---------------------------------------------------------------- damage


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def empty(path: Path) -> None:
    path.write_bytes(b"")


FILES = {
    f"results/smoke/{WORLD}/run.json": [WORLD],
    f"results/smoke/{WORLD}/preferences_1.parquet": [WORLD],
    f"results/smoke/{WORLD}/sft-*/model/model.safetensors": [WORLD],
    f"results/smoke/{STRENGTH}/run.json": [STRENGTH],
    f"results/smoke/{STRENGTH}/annotated.parquet": [STRENGTH],
    f"figures/smoke/{STRENGTH}/fig02_bands.png": [STRENGTH],
    f"figures/smoke/{STRENGTH}/fig02_bands.pdf": [STRENGTH],
    f"figures/smoke/{STRENGTH}/strength.parquet": [STRENGTH],
    f"figures/smoke/{ANNOTATED}/run.json": [ANNOTATED],
    f"results/smoke/{STRENGTH}/units/s0-member-m0-*/scores.parquet": [],  # needed only when its chapter runs
}


def damage(project: Project, pattern: str, how: Callable[[Path], None]) -> Path:
    (path,) = project.root.glob(pattern)
    assert path.stat().st_size > 0
    how(path)
    return path


@pytest.fixture
def moved(finished, tmp_path, monkeypatch) -> Project:
    """What a finished copy left, in another place."""
    monkeypatch.setattr(runs, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(runs, "FIGURES", tmp_path / "figures")
    return Project.copied(finished.root, tmp_path, "results", "figures")


@pytest.mark.parametrize("how", [truncate, empty, Path.unlink], ids=["truncated", "empty", "deleted"])
@pytest.mark.parametrize("pattern", FILES)
def test_a_damaged_file_makes_its_chapter_run_again_and_no_other(moved, pattern, how):
    damage(moved, pattern, how)
    records.forget_broken("smoke")
    stands = [stem for stem in ALL if (moved.results(stem) / "run.json").exists()]
    assert stands == [stem for stem in ALL if stem not in FILES[pattern]]


UNITS = {"s0-member-m1-*": truncate, "s1-slice4-*": empty, "s1-long-*": Path.unlink}


@pytest.fixture(scope="module")
def mended(finished, place) -> tuple[Project, Project]:
    """Two copies run again after damage to what chapters 01 and 01b left, and to what chapter 00 left."""
    late, early = (Project.copied(finished.root, place / name) for name in ("damaged_late", "damaged_early"))
    for name, how in UNITS.items():
        damage(late, f"results/smoke/{STRENGTH}/units/{name}/scores.parquet", how)
    damage(late, f"results/smoke/{STRENGTH}/annotated.parquet", truncate)
    damage(late, f"results/smoke/{STRENGTH}/strength.parquet", Path.unlink)
    damage(late, f"figures/smoke/{STRENGTH}/fig02_bands.png", truncate)
    damage(late, f"figures/smoke/{STRENGTH}/folds.pdf", truncate)
    damage(late, f"figures/smoke/{STRENGTH}/strength.parquet", truncate)
    damage(late, f"results/smoke/{ANNOTATED}/run.json", truncate)
    damage(early, f"results/smoke/{WORLD}/run.json", truncate)
    damage(early, f"results/smoke/{WORLD}/preferences_1.parquet", empty)
    damage(early, f"results/smoke/{WORLD}/sft-*/model/model.safetensors", truncate)
    damage(early, f"results/smoke/{STRENGTH}/run.json", empty)
    early.without(ANNOTATED)
    run_all(late, early)
    return late, early


def changed(before: dict[str, int], after: dict[str, int]) -> set[str]:
    assert before.keys() == after.keys()
    return {name for name in after if before[name] != after[name]}


def published(project: Project, *, pixels: bool = False) -> dict[str, bytes]:
    """What stands in the figures of chapter 01: its files, or what is seen in the images."""
    files = {path.name: path for path in project.figures(STRENGTH).iterdir()}
    if pixels:
        return {name: Image.open(path).tobytes() for name, path in files.items() if path.suffix == ".png"}
    return {name: path.read_bytes() for name, path in files.items()}


def test_damage_to_chapter_01_is_mended_and_chapter_00_is_not_run(finished, mended):
    late, _ = mended
    assert late.tables(*ALL) == finished.tables(*ALL)
    assert changed(finished.executed(), late.executed()) == {STRENGTH, ANNOTATED}
    assert json.loads(published(late)["run.json"]) == late.record(STRENGTH)
    assert published(late, pixels=True) == published(finished, pixels=True)


def test_only_damaged_units_are_made_again(finished, mended):
    late, _ = mended
    again = {name.rsplit("-", 1)[0] for name in changed(finished.units(), late.units())}
    assert again == {name.removesuffix("-*") for name in UNITS}


def test_damage_to_chapter_00_is_mended_and_no_unit_is_made_again(finished, mended):
    _, early = mended
    assert early.tables(*ALL) == finished.tables(*ALL)
    assert changed(finished.executed(), early.executed()) == {WORLD, STRENGTH}
    assert changed(finished.units(), early.units()) == set()
    assert early.record(WORLD)["outputs"] == finished.record(WORLD)["outputs"]


def test_evidence_that_did_not_change_is_not_published_again(finished, mended):
    _, early = mended
    assert published(early) == published(finished)
    assert early.record(STRENGTH)["id"] == finished.record(STRENGTH)["id"]


def test_where_nothing_is_to_do_nothing_runs(mended):
    """After a mend too: what was mended is whole."""
    before = [project.executed() for project in mended]
    run_all(*mended)
    assert [project.executed() for project in mended] == before
    assert [project.left_behind() for project in mended] == [[], []]


# ---------------------------------------------------------------- mistakes in parameters


@pytest.fixture(scope="module")
def misled(place) -> tuple[Project, Project]:
    """Two copies with a parameter that does not exist, in a file and in a call of papermill, run until they stop."""
    file, call = (Project.copied(runs.ROOT, place / name, *CODE) for name in ("mistaken_file", "mistaken_call"))
    file.set_parameters(WORLD, n_trian_prompts=3)
    command = ["papermill", f"notebooks/{STRENGTH}.ipynb", "mine.ipynb", "-k", "python3", "--no-progress-bar"]
    started = [file.start(), call.start(*command, "-p", "preset", "mine", "-p", "n_membres", "3")]
    assert all(process.wait(PATIENCE) for process in started)
    return file, call


def test_a_mistake_in_a_file_stops_before_a_kernel_starts(misled):
    file, _ = misled
    message = f"params/smoke/{WORLD}.yaml: unknown parameter 'n_trian_prompts'; the nearest is 'n_train_prompts'"
    assert message in file.output
    assert "Traceback" not in file.output
    assert not any(path.stat().st_size for path in file.root.glob("results/*/*/*"))  # Snakemake touches the log
    assert not (file.root / "jupyter").exists()


def test_a_mistake_in_a_call_of_papermill_stops_in_the_second_cell(misled):
    _, call = misled
    assert "unknown parameter 'n_membres'; the nearest is 'n_members'" in call.output
    cells = json.loads((call.root / "mine.ipynb").read_text())["cells"]
    ran = [cell for cell in cells if cell["cell_type"] == "code" and cell["execution_count"]]
    assert ["injected-parameters" in cell["metadata"]["tags"] for cell in ran[:2]] == [False, True]
    assert len(ran) == 3 and "params.check" in "".join(ran[2]["source"])
    assert not (call.root / "results").exists() and not (call.root / "figures").exists()
