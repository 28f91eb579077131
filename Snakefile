# The graph of notebooks: `snakemake --cores all --config preset=default`.
# A chapter reruns when its notebook, its parameters, an earlier chapter or a module it uses has changed.
import os
import sys
from pathlib import Path

from rmlib import params
from rmlib.notebooks import parameters_cell
from rmlib.records import forget_broken
from rmlib.runs import data_folder

PRESET = config.get("preset", "default")
PLACE = ["__init__", "runs", "records", "params", "figures", "evaluation", "data", "sources"]
CORE = [*PLACE, "models", "training", "losses", "contrastive", "metarm", "world"]
CHAPTERS = {
    "00_world_and_data": {"modules": CORE, "after": []},
    "01_preference_strength": {"modules": [*CORE, "voting", "denoising", "claims"], "after": ["00_world_and_data"]},
    "02_denoising": {
        "modules": [*CORE, "voting", "denoising", "claims"],
        "after": ["00_world_and_data", "01_preference_strength"],
    },
    "02b_policies": {
        "modules": [*CORE, "ppo", "policies", "claims"],
        "after": ["00_world_and_data", "02_denoising"],
    },
    "03_contrastive": {
        "modules": [*CORE, "voting", "claims"],
        "after": ["00_world_and_data", "01_preference_strength"],
    },
    "03b_contrastive_policies": {
        "modules": [*CORE, "ppo", "policies", "claims"],
        "after": ["00_world_and_data", "03_contrastive"],
    },
    "04_metarm": {"modules": [*CORE, "voting", "ppo", "policies", "claims"], "after": ["00_world_and_data"]},
    "05_iterative_rlhf": {"modules": [*CORE, "voting", "ppo", "dpo", "policies", "claims"], "after": ["00_world_and_data"]},
    "01b_annotated_sets": {"modules": [*PLACE, "voting"], "after": ["01_preference_strength"]},
}
# A preset runs the chapters for which it has a file of parameters.
if not os.path.isdir(f"params/{PRESET}"):
    sys.exit(f"no preset {PRESET!r} in params/; there are {', '.join(sorted(os.listdir('params')))}")
FILES = {stem: Path(f"params/{PRESET}/{stem}.yaml") for stem in CHAPTERS}
CHAPTERS = {stem: chapter for stem, chapter in CHAPTERS.items() if FILES[stem].exists()}
if strays := {path.stem for path in Path(f"params/{PRESET}").glob("*.y*ml")} - set(params.CHAPTERS):
    sys.exit(f"params/{PRESET}: no chapter is named {', '.join(sorted(strays))}; there are {', '.join(params.CHAPTERS)}")
if not CHAPTERS:
    sys.exit(f"params/{PRESET} holds no file of parameters; chapters are {', '.join(params.CHAPTERS)}")
for stem in sorted(set(FILES) - set(CHAPTERS)):
    print(f"preset {PRESET} has no {FILES[stem]}: chapter {stem.split('_')[0]} is not run", file=sys.stderr)


def wanted(stem):
    """The parameters that a chapter is to run with; what is wrong with them, its rule says."""
    try:
        return params.read_yaml(stem, FILES[stem], parameters_cell(f"notebooks/{stem}.ipynb")).model_dump()
    except ValueError:
        return None


PARAMETERS = {stem: wanted(stem) for stem in CHAPTERS}
forget_broken(PRESET, PARAMETERS)  # what broke or has changed is made again


def record(stem):
    return f"results/{PRESET}/{stem}/run.json"


def data_files(stem):
    """Local files that a chapter's parameters name: of a data set, or of a checkpoint."""
    given = PARAMETERS[stem] or {}
    places = [data_folder() / given["data_path"]] if given.get("data_path") else []
    places += [Path(given[key]) for key in ("base_model", "encoder") if given.get(key)]
    inside = [file for place in places if place.is_dir() for file in place.rglob("*")]
    return sorted(str(file) for file in [*places, *inside] if file.is_file())


rule book:
    input:
        [record(stem) for stem in CHAPTERS],


for stem, chapter in CHAPTERS.items():

    rule:
        name:
            f"chapter_{stem.split('_')[0]}"
        input:
            notebook=f"notebooks/{stem}.ipynb",
            parameters=f"params/{PRESET}/{stem}.yaml",
            modules=[f"rmlib/{name}.py" for name in chapter["modules"]],
            language=["rmlib/world.yaml", "rmlib/paper.csv", "rmlib/claims.yaml"],
            people=data_files(stem),
            earlier=[record(earlier) for earlier in chapter["after"] if earlier in CHAPTERS],
        output:
            record=record(stem),
            notebook=f"results/{PRESET}/{stem}/{stem}.ipynb",
        log:
            notebook=f"results/{PRESET}/{stem}/last_attempt.ipynb",
        params:
            python=sys.executable,
            stem=stem,
        threads: workflow.cores
        shell:
            # checked before a kernel starts; the executed notebook survives a failure as the log;
            # a run that drew no figure leaves no record, and then the rule fails
            "{params.python:q} -m rmlib.notebooks check {params.stem} {input.parameters}"
            " && {params.python:q} -m papermill {input.notebook} {log.notebook} -f {input.parameters}"
            " -k python3 --no-progress-bar --log-output --log-level WARNING"
            " && cp {log.notebook} {output.notebook}"
