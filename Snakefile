# The graph of notebooks: `snakemake --cores all --config preset=default`.
# A chapter reruns when its notebook, its parameters, an earlier chapter or a module it uses has changed.
import os
import sys
from glob import glob

import yaml

PRESET = config.get("preset", "default")
CORE = ["__init__", "runs", "params", "figures", "data", "models", "training", "losses", "evaluation", "world"]
CHAPTERS = {
    "00_world_and_data": {"modules": CORE, "after": []},
    "01_preference_strength": {"modules": [*CORE, "voting", "claims"], "after": ["00_world_and_data"]},
}


def record(stem):
    return f"results/{PRESET}/{stem}/run.json"


def data_files(stem):
    """Files of a data set that a chapter reads, if its parameters name one."""
    with open(f"params/{PRESET}/{stem}.yaml") as file:
        given = yaml.safe_load(file)
    return sorted(glob(f"{os.environ.get('RMLIB_DATA', 'data')}/{given['data_path']}/*")) if "data_path" in given else []


rule book:
    input:
        [record(stem) for stem in CHAPTERS],


for stem, chapter in CHAPTERS.items():

    rule:
        name:
            f"chapter_{stem[:2]}"
        input:
            notebook=f"notebooks/{stem}.ipynb",
            parameters=f"params/{PRESET}/{stem}.yaml",
            modules=[f"rmlib/{name}.py" for name in chapter["modules"]],
            language=["rmlib/world.yaml", "rmlib/paper.csv"],
            people=data_files(stem),
            earlier=[record(earlier) for earlier in chapter["after"]],
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
