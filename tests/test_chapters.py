"""Chapters run end to end by papermill on data that is not the world, in a copy of the project.

Everything is tiny: the numbers say nothing, and a chapter must finish all the same.
"""

import hashlib
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import tiny
import torch
import yaml
from safetensors.torch import load_file, save_file

from rmlib import data, models, notebooks, params, records, runs

WORLD, STRENGTH, ANNOTATED = "00_world_and_data", "01_preference_strength", "01b_annotated_sets"
ROUNDS = "05_iterative_rlhf"
SMALL = {
    WORLD: {"seeds": [0], "validation_share": 0.4, "encoder_max_length": 32, "max_length": 48, "n_samples": 4}
    | {"sft_lr": 1.0e-3, "sft_batch_size": 64, "sft_epochs": 1},
    STRENGTH: {"seeds": [0], "n_members": 2, "batch_size": 32, "max_length": 48, "slice_epochs": 1.0, "long_epochs": 2}
    | {"growing_shares": [0.5], "n_response_folds": 3, "fold_members": 1, "dropout_passes": 2, "bias_members": 0}
    | {"n_evaluations": 1, "workers": 1},
    ANNOTATED: {"n_bands": 4, "n_judged_bands": 3},
}
TRUTHLESS = {"official_loss", "fig01_histograms", "fig02_bands", "fig04_slices", "fig04_slice_curves", "fig05_flipped"}
TRUTHLESS |= {"fig19_training", "fig20_inflation", "fig21_22_growing", "dropping", "claims_forest"}
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{{ m.content }} {% endfor %}{% if add_generation_prompt %}one{% endif %}"
)


# ---------------------------------------------------------------- the copy


@dataclass(frozen=True)
class Copy:
    """A copy of the project with a data folder beside it."""

    root: Path

    @property
    def data(self) -> Path:
        return self.root / "sets"

    def environment(self) -> dict[str, str]:
        own = {"PYTHONPATH": str(self.root), "RMLIB_DATA": str(self.data), "JUPYTER_RUNTIME_DIR": str(self.root / "j")}
        return os.environ | own

    def write(self, preset: str, stem: str, text: str) -> Path:
        path = self.root / "params" / preset / f"{stem}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(text)
        return path

    def run(self, preset: str, *stems: str, **source: object) -> None:
        """Chapters one after another; chapter 00 reads ``source``."""
        for stem in stems:
            given = {"preset": preset} | SMALL[stem] | (source if stem == WORLD else {})
            path = self.write(preset, stem, yaml.safe_dump(given))
            notebook = self.root / f"{preset}_{stem}.ipynb"
            command = [f"notebooks/{stem}.ipynb", notebook, "-f", path, "-k", "python3", "--no-progress-bar"]
            done = self.call("papermill", *command)
            assert done.returncode == 0, done.stderr[-3000:]

    def call(self, *command: object) -> subprocess.CompletedProcess:
        line = [sys.executable, "-m", *map(str, command)]
        return subprocess.run(
            line, cwd=self.root, env=self.environment(), capture_output=True, text=True, check=False, timeout=600
        )

    def results(self, preset: str, stem: str) -> Path:
        return self.root / "results" / preset / stem

    def record(self, preset: str, stem: str) -> dict:
        return json.loads((self.results(preset, stem) / "run.json").read_text())

    def figures(self, preset: str, stem: str) -> set[str]:
        return {path.stem for path in (self.root / "figures" / preset / stem).glob("*.png")}

    def table(self, preset: str, stem: str, name: str) -> pd.DataFrame:
        return pd.read_csv(self.root / "figures" / preset / stem / f"{name}.csv")

    def preferences(self, preset: str) -> pd.DataFrame:
        return pd.read_parquet(self.results(preset, WORLD) / "preferences_0.parquet")

    def printed(self, preset: str, stem: str) -> str:
        cells = nbformat.read(self.root / f"{preset}_{stem}.ipynb", as_version=4).cells
        return "".join(out.get("text", "") for cell in cells for out in cell.get("outputs", []))


# ---------------------------------------------------------------- the data


def texts(n: int) -> list[str]:
    """Different texts of three words that the tiny tokenizers know."""
    return [" ".join(words) for words in itertools.islice(itertools.product(tiny.FILLER, repeat=3), n)]


def table(n_prompts: int = 40, **columns) -> list[dict]:
    """Two pairs a prompt; ``columns`` are functions of the row's number."""
    rows = [{"prompt": prompt} for prompt in texts(n_prompts) for _ in range(2)]
    for n, (row, text) in enumerate(zip(rows, texts(len(rows)), strict=True)):
        row |= {"chosen": f"good {text}", "rejected": f"bad {text}"} | {name: of(n) for name, of in columns.items()}
    return rows


def lines(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turned(row: dict) -> dict:
    roles = {"prompt": "user", "chosen": "assistant", "rejected": "assistant"}
    return {name: [{"role": role, "content": row[name]}] for name, role in roles.items()}


def pandalm(n: int = 60) -> list[dict]:
    rng = np.random.default_rng(0)
    return [
        {"idx": i, "motivation_app": ("Gmail", "IMDB")[i % 2], "instruction": text, "input": ("", "one two")[i % 2]}
        | {"response1": f"good {text}", "response2": f"bad {text}", "cmp_key": "a_b"}
        | {f"annotator{k}": int(rng.integers(0, 3)) if k > 1 else 1 + i % 2 for k in (1, 2, 3)}
        for i, text in enumerate(texts(n))
    ]


def change_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] += 1.0
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


# ---------------------------------------------------------------- the runs


@pytest.fixture(scope="module")
def copy(tmp_path_factory) -> Copy:
    copy = Copy(tmp_path_factory.mktemp("chapters"))
    for part in ("rmlib", "notebooks", "params"):
        shutil.copytree(runs.ROOT / part, copy.root / part)
    shutil.copy2(runs.ROOT / "Snakefile", copy.root)
    copy.data.mkdir()
    return copy


@pytest.fixture(scope="module")
def ran(copy) -> Copy:
    """Every preset below has run; two chains side by side."""
    llama, chat = (str(tiny.save_llama(copy.root / name)) for name in ("llama", "chat"))
    encoder = str(tiny.save_encoder(copy.root / "encoder"))
    words = tiny.tokenizer()
    words.chat_template = TEMPLATE
    words.save_pretrained(chat)
    rng = np.random.default_rng(0)
    judged = {"subset": lambda n: ("tea", "milk")[n // 2 % 2], "votes": lambda n: rng.choice([1, 1, -1, 0], 3).tolist()}
    lines(copy.data / "voted.jsonl", table(**judged))
    lines(copy.data / "bare.jsonl", [{name: row[name] for name in ("chosen", "rejected")} for row in table()])
    gold = {"gold_chosen": lambda n: 9.0 - n / 4, "gold_rejected": lambda n: n / 4 - 9.0}
    pd.DataFrame(table(**gold)).to_csv(copy.data / "gold.csv", index=False)
    lines(copy.data / "turns.jsonl", [turned(row) for row in table(10)])
    (copy.data / "testset-v1.json").write_text(json.dumps(pandalm()))

    def trained() -> None:
        copy.run("voted", WORLD, STRENGTH, ANNOTATED, source="table", data_path="voted.jsonl", base_model=llama)
        copy.run("chat", WORLD, source="table", data_path="turns.jsonl", base_model=chat)
        change_a_weight(Path(chat))
        copy.run("chat", WORLD, source="table", data_path="turns.jsonl", base_model=chat)

    def frozen() -> None:
        bare = {"data_path": "bare.jsonl", "prompt_column": None}
        copy.run("bare", WORLD, STRENGTH, source="table", encoder=encoder, **bare)
        copy.run("mine", WORLD, STRENGTH, ANNOTATED, source="pandalm", data_path="testset-v1.json", encoder=encoder)
        copy.run("gold", WORLD, source="table", data_path="gold.csv", encoder=encoder)

    with ThreadPoolExecutor() as pool:
        for chain in [pool.submit(trained), pool.submit(frozen)]:
            chain.result()
    return copy


def test_a_voted_table_trains_whole_models_through_all_chapters(ran):
    record = ran.record("voted", WORLD)
    digest = runs.fingerprint(ran.data / "voted.jsonl")
    assert record["data"] == {"path": "voted.jsonl", "revision": "main", "sha256": digest}
    assert record["chat_template"] == ""
    assert {name for name in record["outputs"]} == {"preferences_0", "base"}
    assert ran.figures("voted", WORLD) == {"data", "annotators", "sft"}
    assert ran.figures("voted", STRENGTH) == TRUTHLESS | {"fig03_confirmed", "scorers", "folds"}
    assert ran.figures("voted", ANNOTATED) == {"fig01_histograms", "fig02_bands", "fig03_confirmed"}
    assert set(ran.table("voted", STRENGTH, "by_subset")["subset"]) == {"tea", "milk"}


def test_a_voted_table_is_split_by_prompt(ran):
    rows = ran.preferences("voted")
    assert rows.groupby("prompt_id")["split"].nunique().max() == 1
    assert rows["split"].value_counts().to_dict() == {"train": 48, "validation": 32}


@pytest.mark.parametrize("preset", ["voted", "bare", "mine"])
def test_one_seed_leaves_every_claim_open(ran, preset):
    verdicts = ran.table(preset, STRENGTH, "claims")
    assert set(verdicts["verdict"]) == {"open"} and set(verdicts["seeds"]) == {1}


def test_a_table_without_truth_and_prompts_gives_what_needs_neither(ran):
    assert ran.figures("bare", WORLD) == {"data"}
    assert ran.figures("bare", STRENGTH) == TRUTHLESS
    assert "no truth: nobody can say" in ran.printed("bare", WORLD)
    assert "The labels have no truth beside them" in ran.printed("bare", STRENGTH)
    rows = ran.preferences("bare")
    assert set(rows["prompt"]) == {""} and rows["prompt_id"].is_unique
    assert {"votes", "gold_chosen"}.isdisjoint(rows)


def test_true_rewards_of_any_size_are_counted_and_drawn(ran):
    drawn = ran.table("gold", WORLD, "data")["truth"]
    expected = [18.0 - n / 2 for n in range(80)]
    assert sorted(drawn) == sorted(expected) and drawn.abs().max() > 9
    error = ran.table("gold", WORLD, "label_error").query("subset == 'all'")
    assert error["pairs"].item() == 80
    assert error["label_error"].item() == pytest.approx(sum(t < 0 for t in expected) / sum(t != 0 for t in expected))
    assert ran.figures("gold", WORLD) == {"data", "annotators"}


def test_people_s_verdicts_finish_whatever_their_numbers(ran):
    assert ran.record("mine", WORLD)["data"]["sha256"] == runs.fingerprint(ran.data / "testset-v1.json")
    assert ran.figures("mine", WORLD) == {"data", "annotators"}
    assert ran.figures("mine", STRENGTH) == TRUTHLESS | {"fig03_confirmed", "scorers", "folds"}
    assert ran.record("mine", ANNOTATED)["stands_on"] == {STRENGTH: ran.record("mine", STRENGTH)["id"]}
    assert set(ran.preferences("mine")["subset"]) == {"Gmail", "IMDB"}


def test_a_chat_template_is_recorded_and_its_beginning_of_text_is_not_doubled(ran):
    digest = hashlib.sha256(TEMPLATE.encode()).hexdigest()[:16]
    assert ran.record("chat", WORLD)["chat_template"] == digest
    prompts = ran.preferences("chat")["prompt"].tolist()
    assert all(prompt.startswith("<bos>") and prompt.endswith("one") for prompt in prompts)
    words = models.load_tokenizer(ran.root / "chat")
    ids = data.prompt_ids(prompts, words)
    assert {(row.tolist().count(words.bos_token_id), row[0]) for row in ids} == {(1, words.bos_token_id)}


def test_a_base_model_with_another_weight_is_fine_tuned_anew(ran):
    folders = sorted(ran.results("chat", WORLD).glob("sft-*"))
    assert len(folders) == 2
    first, second = (load_file(folder / "model" / "model.safetensors") for folder in folders)
    assert not torch.equal(first["model.norm.weight"], second["model.norm.weight"])


def test_the_checkout_is_left_alone(ran):
    for preset in ("voted", "chat", "bare", "gold"):
        assert not (runs.RESULTS / preset).exists() and not (runs.FIGURES / preset).exists()


# ---------------------------------------------------------------- what makes a chapter run again


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_the_identity_of_a_local_model_follows_every_byte_of_it(tmp_path, file):
    folder = tiny.save_llama(tmp_path / "llama")
    key = runs.content_key(models.identity(str(folder)))
    shutil.copytree(folder, tmp_path / "moved")
    assert runs.content_key(models.identity(str(tmp_path / "moved"))) == key
    content = bytearray((folder / file).read_bytes())
    content[-2] ^= 1
    later = (folder / file).stat().st_mtime_ns + 10**9
    (folder / file).write_bytes(content)
    os.utime(folder / file, ns=(later, later))
    assert runs.content_key(models.identity(str(folder))) != key


def finished(copy: Copy, preset: str, file: Path) -> None:
    """A record as chapter 00 leaves it after a run with that file, of nothing."""
    cell = notebooks.parameters_cell(runs.ROOT / "notebooks" / f"{WORLD}.ipynb")
    parameters = params.read_yaml(WORLD, file, cell).model_dump()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs, "RESULTS", copy.root / "results")
        patch.setattr(runs, "FIGURES", copy.root / "figures")
        records.Run(WORLD, preset, parameters).finish([])
    (copy.results(preset, WORLD) / f"{WORLD}.ipynb").touch()


def plan(copy: Copy, preset: str) -> subprocess.CompletedProcess:
    """What Snakemake says that it would run."""
    done = copy.call("snakemake", "-n", "--cores", 1, "--nolock", "--config", f"preset={preset}")
    assert done.returncode == 0, done.stderr
    return done


def planned(copy: Copy, preset: str) -> bool:
    """Whether chapter 00 would run."""
    done = plan(copy, preset)
    told = done.stdout + done.stderr
    assert ("rule chapter_00:" in told) != ("Nothing to be done" in told), told
    return "rule chapter_00:" in told


def test_an_edit_of_the_reader_s_data_or_model_makes_chapter_00_run_again(copy):
    model = tiny.save_llama(copy.root / "own")
    data_file = lines(copy.data / "own.jsonl", table())
    given = {"preset": "own", "source": "table", "data_path": "own.jsonl", "base_model": str(model)}
    finished(copy, "own", copy.write("own", WORLD, yaml.safe_dump(given)))
    assert not planned(copy, "own")
    now = time.time()  # and seconds later: no clock of files is that coarse
    for n, watched in enumerate((data_file, model / "model.safetensors", model / "tokenizer.json")):
        watched.write_bytes(watched.read_bytes() + b"\n")
        os.utime(watched, (now + 2 * n + 1,) * 2)
        assert planned(copy, "own"), watched.name
        for output in copy.results("own", WORLD).iterdir():
            os.utime(output, (now + 2 * n + 2,) * 2)
        assert not planned(copy, "own"), watched.name


# ---------------------------------------------------------------- chapters that are left out


@pytest.mark.parametrize(
    ("preset", "left_out"),
    [("convarg", ["02b_policies", "03b_contrastive_policies", ROUNDS]), ("default", [])],
)
def test_the_graph_of_notebooks_tells_once_which_chapters_a_preset_leaves_out(copy, preset, left_out):
    told = [line for line in plan(copy, preset).stderr.splitlines() if line.startswith("preset ")]
    assert told == [
        f"preset {preset} has no params/{preset}/{stem}.yaml: chapter {stem.split('_')[0]} is not run"
        for stem in left_out
    ]


def begin_rounds(base: Path) -> None:
    """Run chapter 05, up to and with the cell that reads what chapter 00 left: this ``base``."""
    records.Run(WORLD, "own", {}).finish([], {"base": base})
    cells = nbformat.read(runs.ROOT / "notebooks" / f"{ROUNDS}.ipynb", as_version=4).cells
    given, check, begin, *_ = (cell.source for cell in cells if cell.cell_type == "code")
    values: dict[str, object] = {}
    for source in (given, 'preset = "own"', check, begin):
        exec(source, values)


def test_rounds_refuse_a_frozen_encoder_at_once(places):
    base = runs.RESULTS / "own" / WORLD / "features.safetensors"
    base.parent.mkdir(parents=True)
    says = "preset 'own' reads texts through a frozen encoder, and chapter 05 trains policies: take one with a causal"
    with pytest.raises(ValueError, match=says):
        begin_rounds(tiny.save_features(base))
    assert not (runs.RESULTS / "own" / ROUNDS / "units").exists()


def test_rounds_begin_on_a_causal_base(places):
    begin_rounds(tiny.save_llama(runs.RESULTS / "own" / WORLD / "sft"))


STRANGE = {
    "": "preset = 'default', but the file lies in params/strange",
    "# all as it is\n": "preset = 'default', but the file lies in params/strange",
    "- source: table\n": "expected 'key: value' lines, got list",
    "table\n": "expected 'key: value' lines, got str",
    "source: [": "cannot be read as YAML",
    "preset: 3\n": "preset = 3",
}


@pytest.mark.parametrize("text", STRANGE)
def test_a_file_of_no_parameters_is_named(tmp_path, text):
    path = tmp_path / "params" / "strange" / f"{WORLD}.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.raises(params.ParameterError) as error:
        notebooks.main("check", WORLD, str(path))
    assert f"{path}: {STRANGE[text]}" in str(error.value)


@pytest.mark.parametrize("text", ["", "source: ["])
def test_the_graph_of_notebooks_leaves_a_file_of_no_parameters_to_the_check(copy, text):
    copy.write("strange", WORLD, text)
    done = copy.call("snakemake", "--cores", 1, "--nolock", "--quiet", "rules", "--config", "preset=strange")
    told = done.stdout + done.stderr
    assert done.returncode != 0 and f"{WORLD}.yaml: {STRANGE[text]}" in told and "Traceback" not in told
    assert not list(copy.results("strange", WORLD).glob("*.parquet"))
