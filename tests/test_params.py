"""Parameters: every file is checked against its notebook, and every kind of mistake is named."""

from pathlib import Path

import pytest
import yaml

from rmlib import params
from rmlib.notebooks import parameters_cell
from rmlib.runs import ROOT

STEMS = list(params.CHAPTERS)
OURS = {"default", "full", "convarg", "hh", "paper", "released", "smoke", "smoke_convarg", "smoke_hh"}
FILES = sorted((ROOT / "params").glob("*/*.yaml"))


def cell(stem: str) -> dict:
    return parameters_cell(ROOT / "notebooks" / f"{stem}.ipynb")


@pytest.mark.parametrize("stem", STEMS)
def test_parameters_cell_passes_its_own_check(stem):
    assert params.check(stem, cell(stem)).model_dump() == cell(stem)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_every_parameter_file_fits_its_notebook(path):
    assert params.read_yaml(path.stem, path, cell(path.stem)).preset == path.parent.name


@pytest.mark.parametrize("stem", STEMS)
def test_default_file_equals_the_parameters_cell(stem):
    written = yaml.safe_load((ROOT / "params" / "default" / f"{stem}.yaml").read_text())
    assert written == cell(stem)


@pytest.mark.parametrize(
    "path", [path for path in FILES if path.parent.name in OURS], ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_field_says_why(path):
    bare = [
        line for line in path.read_text().splitlines() if ":" in line and not line.startswith("#") and "#" not in line
    ]
    assert bare in ([], [f"preset: {path.parent.name}"], [f"preset: {path.parent.name}", "source: convarg"])


@pytest.mark.parametrize("stem", STEMS)
def test_no_comment_hides_a_parameter_from_papermill(stem):
    """Papermill passes over a line whose comment holds a second equals sign."""
    from papermill.inspection import inspect_notebook

    seen = inspect_notebook(str(ROOT / "notebooks" / f"{stem}.ipynb"))
    assert set(seen) == set(cell(stem))
    assert all(entry["help"] for entry in seen.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_membres": 3}, "unknown parameter 'n_membres'; the nearest is 'n_members'"),
        ({"lr": "3e-5"}, "lr = '3e-5'"),
        ({"lr": 0.0}, "lr = 0.0"),
        ({"n_members": 1}, "n_members = 1"),
        ({"n_members": 2.5}, "n_members = 2.5"),
        ({"n_members": "10"}, "n_members = '10'"),
        ({"vary_head": 1}, "vary_head = 1"),
        ({"schedule": "cosine"}, "schedule = 'cosine'"),
        ({"growing_shares": [0.5, 1.5]}, "growing_shares.1 = 1.5"),
        ({"seeds": []}, "seeds = []"),
        ({"seeds": 3}, "seeds = 3"),
        ({"preset": "../elsewhere"}, "preset = '../elsewhere'"),
    ],
)
def test_mistakes_are_named_with_key_and_file(tmp_path: Path, change: dict, message: str):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump(change))
    with pytest.raises(params.ParameterError) as error:
        params.read_yaml("01_preference_strength", path, cell("01_preference_strength"))
    assert message in str(error.value) and str(path) in str(error.value)


def test_a_missing_parameter_is_named():
    values = cell("01_preference_strength")
    del values["lr"]
    with pytest.raises(params.ParameterError, match="parameter 'lr' is missing"):
        params.check("01_preference_strength", values)


def test_yaml_reads_a_number_without_a_dot_as_text_and_we_say_so(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("lr: 3e-5\n")
    with pytest.raises(params.ParameterError, match="lr = '3e-5'"):
        params.read_yaml("01_preference_strength", path, cell("01_preference_strength"))


def test_notebook_globals_beside_the_parameters_are_passed_over():
    around = {"In": [], "Out": {}, "_i1": "", "Path": Path, "yaml": yaml, "exit": exit}
    assert params.check("01_preference_strength", cell("01_preference_strength") | around)


def test_the_second_cell_may_be_run_again_amid_what_the_notebook_has_made_since():
    values = cell("01_preference_strength")
    p = params.check("01_preference_strength", values)
    since = {"p": p, "run": object(), "pairs": [], "is_world": True, "_": None, "_i12": "", "_12": 3, "_oh": {}}
    assert params.check("01_preference_strength", values | since) == p
    assert params.check("01_preference_strength", values | since | {"n_members": 4}).n_members == 4
    with pytest.raises(params.ParameterError, match="n_members = 1"):
        params.check("01_preference_strength", values | since | {"n_members": 1})


@pytest.mark.parametrize("name", ["_lr", "_", "_i1", "_oh", "_exit_code", "__name__"])
def test_a_name_with_an_underscore_is_passed_over_only_if_ipython_makes_it(name):
    values = cell("01_preference_strength") | {name: 3.0e-5}
    if name != "_lr":
        assert params.check("01_preference_strength", values)
        return
    with pytest.raises(params.ParameterError, match="unknown parameter '_lr'; the nearest is 'lr'"):
        params.check("01_preference_strength", values)


def test_a_file_that_is_no_mapping_is_named(tmp_path: Path):
    path = tmp_path / "mine.yaml"
    path.write_text("- lr\n")
    with pytest.raises(params.ParameterError, match=r"mine\.yaml: expected 'key: value' lines, got list"):
        params.read_yaml("01_preference_strength", path, cell("01_preference_strength"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_people_s_votes_come_with_the_place_of_their_files(path):
    """The graph of notebooks watches the files that a parameter file names."""
    given = yaml.safe_load(path.read_text())
    assert given.get("source") != "convarg" or "data_path" in given
