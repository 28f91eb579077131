"""What a training step costs with a contrast (chapter 03) or a look ahead (chapter 04), relative to a plain one.

``python docs/race/steps.py`` reads the results of ``make book`` (preset ``default``), trains all arms by turns, one
step each, in one process on one thread, and writes ``steps.csv`` and the table between the marks in ``README.md``.
"""

import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator

from rmlib import contrastive, metarm, training
from rmlib.runs import RESULTS

HERE = Path(__file__).parent
PRESET, STEPS, WARM_UP = RESULTS / "default", 60, 5
CONTRASTS = {
    "control": contrastive.Contrast("none"),
    "SimCSE": contrastive.Contrast("simcse"),
    "SimCSE-diff": contrastive.Contrast("simcse", items="differences"),
    "SwAV": contrastive.Contrast("swav", temperature=0.1, beta=0.1),
    "SwAV-diff": contrastive.Contrast("swav", items="differences", n_prototypes=20, temperature=0.1, beta=0.5),
}
META_PROMPTS = (8, 16)  # those of chapter 04 and of the paper


def output(name: str) -> Path:
    """A file that chapter 00 left for later chapters."""
    folder = PRESET / "00_world_and_data"
    return folder / json.loads((folder / "run.json").read_text(encoding="utf-8"))["outputs"][name]["path"]


def reward_run(**changes: object) -> training.RewardRun:
    """A reward model of chapters 03 and 04 on the first seed's labels, 16 pairs a step."""
    train = np.flatnonzero(pd.read_parquet(output("preferences_0"))["split"] == "train")
    optimisation = training.Optimisation(lr=1e-3, batch_size=16)
    where = output("preferences_0"), output("base")
    return training.RewardRun("step", *where, optimisation, train, train[:10], 1, 0, **changes)


def no_look_ahead(*_: object) -> nullcontext:
    """The plain step: the gradient is taken where the weights are."""
    return nullcontext()


def arms() -> dict[str, tuple[training.RewardRun, object]]:
    """Every arm's run, and what surrounds its backward pass."""
    answers = next((PRESET / "04_metarm" / "units").glob("s0-meta-policy*/answers.parquet"))
    found = {"plain": (reward_run(), no_look_ahead)}
    for name, contrast in CONTRASTS.items():
        found[name] = reward_run(contrast=contrast, dropout=0.05), no_look_ahead
    for prompts in META_PROMPTS:
        meta = metarm.Meta(answers, eta=1e-4, batch_size=prompts)
        ahead = metarm.look_ahead(meta, metarm.MetaSet(answers, output("base"), 256), 0)
        found[f"MetaRM, {prompts} prompts"] = reward_run(), ahead
    return found


def main() -> None:
    """Train by turns and write what a step costs: median seconds, and the median ratio to the plain step beside it."""
    if not (PRESET / "04_metarm" / "run.json").exists():
        sys.exit(f"{PRESET} has no finished chapter 04: run `make book` first")
    torch.set_num_threads(1)
    machine, compared = Accelerator(cpu=True), arms()
    plain, _ = compared["plain"]
    pairs = training.tokenized(plain.preferences, plain.base, 256)
    batches, nobody = training.run_batches(plain, pairs.lengths), np.zeros(len(pairs.chosen), bool)
    models = {name: training._new_model(run).train() for name, (run, _) in compared.items()}
    optimisers = {name: torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True) for name, model in models.items()}
    rows = []
    for step in range(STEPS):
        batch = pairs.collate(batches[step % len(batches)], nobody)
        for name, (run, ahead) in compared.items():
            start = time.perf_counter()
            optimisers[name].zero_grad()
            with ahead(models[name], step, machine):
                training._reward_loss(run, models[name], batch).backward()
            optimisers[name].step()
            rows.append({"arm": name, "step": step, "seconds": time.perf_counter() - start})
    seconds = pd.DataFrame(rows).pivot(index="step", columns="arm", values="seconds")[list(compared)].iloc[WARM_UP:]
    ratios = seconds.div(seconds["plain"], axis=0)
    quartiles = ratios.quantile([0.25, 0.75])
    table = pd.DataFrame(
        {"ms": 1e3 * seconds.median(), "ratio": ratios.median(), "low": quartiles.iloc[0], "high": quartiles.iloc[1]}
    )
    table.rename_axis("arm").reset_index().to_csv(HERE / "steps.csv", index=False, float_format="%.3g")
    lines = ["| arm | ms a step | relative to plain: median [quartiles] |", "| --- | --- | --- |"]
    lines += [
        f"| {row.Index} | {row.ms:.0f} | **{row.ratio:.2f}** [{row.low:.2f}, {row.high:.2f}] |"
        for row in table.itertuples()
    ]
    readme = HERE / "README.md"
    text = readme.read_text(encoding="utf-8")
    body = "\n".join(["<!-- steps -->", *lines, "<!-- steps -->"])
    readme.write_text(re.sub("<!-- steps -->.*<!-- steps -->", lambda _: body, text, flags=re.S), encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
