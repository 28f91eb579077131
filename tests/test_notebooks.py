"""The committed notebooks and their evidence: whole, clean, and checked by a test that can fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from rmlib import claims, figures, params
from rmlib.notebooks import clean
from rmlib.runs import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
RECORDS = sorted((ROOT / "figures").glob("*/*/run.json"))


def name(path: Path) -> str:
    return "/".join(path.parts[-3:-1]) if path.name == "run.json" else path.stem


def test_every_notebook_is_a_chapter_with_parameters():
    assert [path.stem for path in NOTEBOOKS] == list(params.CHAPTERS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_is_clean_and_whole(path):
    notebook = nbformat.read(path, as_version=4)
    tags = [tag for cell in notebook.cells for tag in cell.metadata.get("tags", [])]
    text = path.read_text()
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec"}
    assert tags.count("parameters") == 1 and "injected-parameters" not in tags
    assert not re.search(r"(?<![\w.])/(home|root|work|tmp|opt|Users)/", text), "a path of some machine"
    assert "Warning" not in text and "sys.exit" not in text
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_holds_outputs_in_order_and_no_error(path):
    code = [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [o for cell in code for o in cell.outputs if o.output_type == "error" or o.get("name") == "stderr"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=name)
def test_notebook_has_cells_that_nbval_can_fail_on(path):
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    assert sum("NBVAL_CHECK_OUTPUT" in source for source in sources) >= 2
    assert sum(bool(re.search(r"^\s*assert ", source, re.M)) for source in sources) >= 3


@pytest.mark.parametrize("path", RECORDS, ids=name)
def test_committed_evidence_is_one_whole_run(path):
    record = json.loads(path.read_text())
    there = {file.name for file in path.parent.iterdir()} - {"run.json"}
    assert there == set(record["files"])
    assert all((path.parent / file).stat().st_size > 0 for file in there)


def test_default_evidence_is_committed_for_every_chapter():
    assert {name(path) for path in RECORDS} >= {f"default/{stem}" for stem in params.CHAPTERS}


def run_nbval(notebook: nbformat.NotebookNode, folder: Path) -> int:
    path = folder / "trial.ipynb"
    nbformat.write(notebook, path)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "--nbval-lax",
        "--nbval-current-env",
        "-p",
        "no:cacheprovider",
        path,
    ]
    return subprocess.run(command, cwd=folder, capture_output=True, check=False).returncode


def checked(source: str, output: str) -> nbformat.NotebookNode:
    stream = new_output("stream", text=output)
    return new_notebook(cells=[new_code_cell(f"# NBVAL_CHECK_OUTPUT\n{source}", execution_count=1, outputs=[stream])])


def test_nbval_passes_a_right_output(tmp_path):
    assert run_nbval(checked("print(2 + 2)", "4\n"), tmp_path) == 0


def test_nbval_catches_a_wrong_output(tmp_path):
    assert run_nbval(checked("print(2 + 2)", "5\n"), tmp_path) == 1


def test_nbval_catches_a_failed_assertion(tmp_path):
    failing = new_notebook(cells=[new_code_cell("assert 2 + 2 == 5", execution_count=1)])
    assert run_nbval(failing, tmp_path) == 1


def test_clean_drops_what_changes_from_run_to_run():
    noise = [new_output("stream", name="stderr", text="Warning"), new_output("stream", text=f"{ROOT}/results\n")]
    cells = [new_code_cell("x = 1", metadata={"tags": ["injected-parameters"]}),
             new_code_cell("x", metadata={"papermill": {"duration": 1.0}}, outputs=noise)]  # fmt: skip
    tidy = clean(new_notebook(cells=cells, metadata={"papermill": {"start": "now"}}))
    assert [cell.source for cell in tidy.cells] == ["x"]
    assert [output.text for output in tidy.cells[0].outputs] == ["results\n"]
    assert not tidy.cells[0].metadata and set(tidy.metadata) == {"kernelspec"}


JUDGED = [path for preset in claims.COMMITTED for path in sorted((ROOT / "figures" / preset).glob("*/claims.csv"))]


@pytest.mark.parametrize("path", JUDGED, ids=lambda path: "-".join(path.parts[-3:-1]))
def test_committed_claims_were_judged_by_the_rules_that_stand(path):
    table = pd.read_csv(path, dtype={"claim": str}).set_index("claim")
    for claim, rule in claims.RULES[path.parent.name].items():
        row = table.loc[claim]
        assert (row["says"], row["effect"], row["source"]) == (rule.says, rule.effect, rule.source)


def test_readme_shows_the_committed_claims():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert claims.with_ledger(readme, ROOT / "figures") == readme


def quoted(preset: str, arm: str, stem: str = "02_denoising", measure: str = "accuracy, truth") -> str:
    """An arm's gain on the truth as the README writes it: ``+.027 [.011, .043]``."""
    table = pd.read_csv(ROOT / "figures" / preset / stem / "arms_forest.csv")
    row = table[(table["arm"] == arm) & (table["measure"] == measure)].iloc[0]
    mean, low, high = (f"{row[name]:.3f}".replace("0.", ".") for name in ("mean", "low", "high"))
    return f"{'+' * bool(row['mean'] > 0)}{mean} [{low}, {high}]"


@pytest.mark.parametrize(
    ("preset", "arm"),
    [
        *(
            ("full", arm)
            for arm in (
                *("margin", "flip 10%", "soft + margin", "wrong labels flipped", "committee of voters"),
                *("soft label", "random flips"),
            )
        ),
        *(
            (preset, arm)
            for preset in ("full_quiet", "full_noisy")
            for arm in ("flip 10%", "soft + margin", "soft + margin, reading B", "committee of voters")
        ),
        *(("convarg", arm) for arm in ("wrong labels flipped", "known flip rate", "soft label")),
    ],
)
def test_readme_quotes_the_committed_arms(preset, arm):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert quoted(preset, arm) in text


OUT, IN = "truth, out of distribution", "truth, in distribution"
CONTRASTIVE = ("SimCSE", "SimCSE-diff", "SwAV", "SwAV-diff")
CONTRASTS = [(preset, arm, where) for preset, where in (("convarg", OUT), ("full", IN)) for arm in CONTRASTIVE]


@pytest.mark.parametrize(("preset", "arm", "where"), CONTRASTS)
def test_readme_quotes_the_committed_contrasts(preset, arm, where):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert quoted(preset, arm, "03_contrastive", where) in text


@pytest.mark.parametrize("arm", ["MetaRM", "fresh labels"])
@pytest.mark.parametrize("preset", ["full", "convarg"])
def test_readme_quotes_the_committed_look_ahead(preset, arm):
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert quoted(preset, arm, "04_metarm", "truth, policy") in text


LAST_ROUND = [("MetaRM", "helpful"), ("vanilla", "helpful"), ("MetaRM", "summary"), ("MetaRM", "harmless")]


@pytest.mark.parametrize(("arm", "family"), LAST_ROUND)
def test_readme_quotes_the_committed_rounds(arm, family):
    table = pd.read_csv(ROOT / "figures" / "full" / "05_iterative_rlhf" / "table2_rounds.csv")
    of = (table["kind"] == "in distribution") & (table["arm"] == arm) & (table["family"] == family)
    last = table[of & (table["round"] == table["round"].max())]
    mean, low, high = (f"{value:+.2f}".replace("0.", ".") for value in figures.over_seeds(last["lead"].to_numpy()))
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert f"{mean} [{low}, {high.removeprefix('+')}]" in text
