"""A tiny language, tiny models and tiny units of work: enough to train a reward model in a second."""

import contextlib
import json
import os
import signal
import tempfile
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, pre_tokenizers, processors
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BertConfig,
    BertModel,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rmlib import models, records, runs, training

FILLER = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
WORDS = [*FILLER, "good", "bad"]

SHORTCUT = ("llama", "mistral", "qwen2")  # the last layer runs at the scored tokens only
GENERAL = ("gpt_neox", "gpt2")
CONFIGS = {
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "gpt_neox": GPTNeoXConfig,
    "gpt2": GPT2Config,
}


def paired(prompts: list[dict]) -> list[dict]:
    """The prompts whose splits hold pairs."""
    return [row for row in prompts if row["split"] not in ("sft", "policy")]


# ---------------------------------------------------------------- checkpoints


def tokenizer() -> PreTrainedTokenizerFast:
    return models.word_tokenizer(WORDS)


def shake(model: nn.Module) -> nn.Module:
    """Large random weights in every place, so that a wrong formula shows in the scores."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    return model


def save_causal(folder: Path, kind: str = "llama", layers: int = 2, **changes) -> Path:
    """A causal LM of ``kind`` with its tokenizer; the head of a reward model on it has weights around 1."""
    words = tokenizer()
    special = {f"{name}_token_id": getattr(words, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    sizes = {"hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 4, "initializer_range": 1.0}
    family = {"intermediate_size": 32} | ({"num_key_value_heads": 2} if kind in SHORTCUT else {})
    family = ({} if kind == "gpt2" else family) | changes
    config = CONFIGS[kind](vocab_size=len(words), **sizes, **special, **family)
    shake(AutoModelForCausalLM.from_config(config)).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def save_llama(folder: Path) -> Path:
    """A Llama as the miniature world makes it, untrained."""
    words = tokenizer()
    models.small_llama(words, hidden_size=16, layers=2, heads=2, max_length=64, seed=0).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


def causal_reward_model() -> nn.Module:
    """A reward model on the Llama of ``save_llama``, untrained."""
    with tempfile.TemporaryDirectory() as folder:
        return models.reward_model(save_llama(Path(folder)), head_seed=0)


def save_encoder(folder: Path) -> Path:
    """A BERT that reads ``[CLS] prompt [SEP] response [SEP]``, with its tokenizer."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate([*special, *WORDS])}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name.strip('[]').lower()}_token": name for name in special}
    words = PreTrainedTokenizerFast(tokenizer_object=core, **names)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    shake(BertModel(BertConfig(vocab_size=len(words), initializer_range=1.0, **sizes))).save_pretrained(folder)
    words.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- preferences


def preferences(n: int = 48, seed: int = 0) -> Dataset:
    """A separable preference set: the chosen response says *good*, the rejected one *bad*."""
    rng = np.random.default_rng(seed)

    def text(*said: str) -> str:
        return " ".join(rng.permutation([*said, *rng.choice(FILLER, rng.integers(1, 6))]))

    return Dataset.from_list(
        [
            {
                "pair_id": f"pair-{i}",
                "prompt_id": f"prompt-{i}",
                "prompt": text(),
                "chosen": text("good"),
                "rejected": text("bad"),
                "chosen_id": f"{i}-chosen",
                "rejected_id": f"{i}-rejected",
            }
            for i in range(n)
        ]
    )


def save_preferences(path: Path, n: int = 48) -> Path:
    preferences(n).to_pandas().to_parquet(path)
    return path


def responses(n: int, k: int = 4) -> pd.DataFrame:
    """A meta set: ``k`` texts of ``preferences(48)`` for each of its first ``n`` prompts, with their ids."""
    rows = preferences()
    said = [(rows[f"{side}"][i], rows[f"{side}_id"][i]) for i in range(48) for side in ("chosen", "rejected")]
    asked = [rows["prompt"][i] for i in range(n) for _ in range(k)]
    return pd.DataFrame([(prompt, *text) for prompt, text in zip(asked, said, strict=False)]).set_axis(
        ["prompt", "response", "response_id"], axis=1
    )


def save_features(path: Path, n: int = 48) -> Path:
    """Cached features of the responses of ``preferences(n)``; the first one tells chosen from rejected."""
    rows = preferences(n)
    features = torch.randn(2 * n, 8, generator=torch.Generator().manual_seed(0))
    features[:n, 0], features[n:, 0] = 2.0, -2.0
    models.save_features(features, [*rows["chosen_id"], *rows["rejected_id"]], path)
    return path


def reward_run(preferences: Path, base: Path | str, n: int = 48, **changes) -> training.RewardRun:
    """A reward model trained on the first two thirds of ``n`` pairs, scored on all."""
    rows = np.arange(n)
    settings = {
        "name": "toy",
        "optimisation": training.Optimisation(lr=1.0e-2, batch_size=8, schedule="constant", warmup_ratio=0.0),
        "rows": rows[: 2 * n // 3],
        "score_rows": rows,
        "data_seed": 0,
        "head_seed": 0,
    }
    return training.RewardRun(preferences=preferences, base=base, **(settings | changes))


# ---------------------------------------------------------------- files


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True)
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def fill(disk: Path) -> Path:
    """A file that takes all the room that is left."""
    with (disk / "ballast").open("wb", buffering=0) as ballast, contextlib.suppress(OSError):
        while True:
            ballast.write(bytes(4096))
    return disk / "ballast"


# ---------------------------------------------------------------- units of work


@dataclass(frozen=True)
class Unit:
    """A unit that writes ``value`` random numbers; each start is noted in the file ``log``."""

    name: str
    value: int
    log: str


def starts(unit: Unit) -> int:
    log = Path(unit.log)
    return len(log.read_text().split()) if log.exists() else 0


def write_numbers(unit: Unit, folder: Path, checkpoint: Path) -> None:
    with Path(unit.log).open("a") as log:
        log.write(f"{unit.name}\n")
    numbers = np.random.default_rng(unit.value).normal(size=unit.value)
    pd.DataFrame({"number": numbers, "threads": torch.get_num_threads()}).to_parquet(folder / "numbers.parquet")


def fail_on_seven(unit: Unit, folder: Path, checkpoint: Path) -> None:
    write_numbers(unit, folder, checkpoint)
    if unit.value == 7:
        raise ValueError("seven cannot be done")


def linger_but_fail_on_seven(unit: Unit, folder: Path, checkpoint: Path) -> None:
    fail_on_seven(unit, folder, checkpoint)
    time.sleep(0.2)


def die_at_first(unit: Unit, folder: Path, checkpoint: Path) -> None:
    """The first start is killed half-way, with its table written; later ones are not."""
    write_numbers(unit, folder, checkpoint)
    if starts(unit) == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def save_every_step(run: training.RewardRun, folder: Path, checkpoint: Path) -> list[int]:
    """Train with a checkpoint at every step; returns the steps made."""
    fit, steps = training.fit, []

    def fit_and_count(*args, after_step, **kwargs):
        def note(row: dict) -> None:
            steps.append(row["step"])
            after_step(row)

        return fit(*args, after_step=note, checkpoint_seconds=0, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "fit", fit_and_count)
        training.train_reward_model(run, folder, checkpoint)
    return steps


def die_in_training(run: training.RewardRun, folder: Path, checkpoint: Path) -> None:
    """The first start is killed at its seventh step, six of them saved; the next notes which steps it makes."""
    save, first, saved = training.save_state, not checkpoint.exists(), []

    def save_and_die(*args) -> None:
        if first and len(saved) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        saved.append(args)
        save(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "save_state", save_and_die)
        steps = save_every_step(run, folder, checkpoint)
    (folder / "steps.json").write_text(json.dumps(steps))


def hold_chapter(results: Path, stem: str, preset: str, line: Connection) -> None:
    """Another process that begins a chapter, says how that went, and holds on to it."""
    runs.RESULTS = results
    try:
        records.Run(stem, preset, {})
        line.send("")
    except RuntimeError as error:
        line.send(str(error))
    line.recv()


def count_threads(started, line: Connection) -> None:
    """How many threads a worker computes on that had two when it began."""
    torch.set_num_threads(2)
    runs._start_worker(started)
    line.send(torch.get_num_threads())
