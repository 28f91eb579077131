# The graph of notebooks: `snakemake --cores all --config preset=default`.
# A chapter reruns when its notebook, its parameters, an earlier chapter or a module it uses has changed.
import os
import sys
from glob import glob

import yaml

from rmlib.records import forget_broken

PRESET = config.get("preset", "default")
PLACE = ["__init__", "runs", "records", "params", "figures", "evaluation", "data", "sources"]
CORE = [*PLACE, "models", "training", "losses", "world"]
CHAPTERS = {
    "00_world_and_data": {"modules": CORE, "after": []},
    "01_preference_strength": {"modules": [*CORE, "voting", "claims"], "after": ["00_world_and_data"]},
    "01b_annotated_sets": {"modules": [*PLACE, "voting"], "after": ["01_preference_strength"]},
}
# A preset runs the chapters for which it has a file of parameters.
CHAPTERS = {stem: chapter for stem, chapter in CHAPTERS.items() if os.path.exists(f"params/{PRESET}/{stem}.yaml")}
if not CHAPTERS:
    sys.exit(f"no preset {PRESET!r} in params/; there are {', '.join(sorted(os.listdir('params')))}")
forget_broken(PRESET)  # what a crash left half-written is made again


def record(stem):
    return f"results/{PRESET}/{stem}/run.json"


def data_files(stem):
    """Files of a data set that a chapter reads, if its parameters name one."""
    with open(f"params/{PRESET}/{stem}.yaml") as file:
        path = yaml.safe_load(file).get("data_path") or "hub:"
    if path.startswith("hub:"):
        return []
    place = os.path.join(os.environ.get("RMLIB_DATA") or "data", path)
    return sorted(name for name in glob(f"{place}/**", recursive=True) if os.path.isfile(name))


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
            language=["rmlib/world.yaml", "rmlib/paper.csv"],
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
            "{params.python} -m rmlib.notebooks check {params.stem} {input.parameters}"
            " && {params.python} -m papermill {input.notebook} {log.notebook} -f {input.parameters}"
            " -k python3 --no-progress-bar --log-output --log-level WARNING"
            " && cp {log.notebook} {output.notebook}"
