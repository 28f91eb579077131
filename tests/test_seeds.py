"""Every seed that the library takes repeats what it draws, and another one draws something else."""

import importlib
import inspect
from dataclasses import is_dataclass

import numpy as np
import pandas as pd
import pytest
import tiny
import torch

from rmlib import data, dpo, metarm, models, policies, ppo, training, voting, world
from rmlib.runs import ROOT

ELSEWHERE = {"__init__", "sources"}  # the seeds that split data from outside have their tests in test_sources
IDS = np.array([f"text-{i}" for i in range(40)])


def prompt_ids() -> list[np.ndarray]:
    return data.prompt_ids(["one two three", "seven"] * 8, tiny.tokenizer())


def vector(model: torch.nn.Module) -> list[float]:
    return torch.nn.utils.parameters_to_vector(model.parameters()).tolist()


def small_llama(seed: int) -> torch.nn.Module:
    return models.small_llama(tiny.tokenizer(), hidden_size=16, layers=1, heads=2, max_length=64, seed=seed)


def generate(seed: int) -> list[list[int]]:
    special = {"eos_id": tiny.tokenizer().eos_token_id, "pad_id": tiny.tokenizer().pad_token_id}
    return models.generate(small_llama(0), prompt_ids(), max_new_tokens=8, seed=seed, **special)


def train_sft(seed: int) -> list[float]:
    answers = data.response_ids(["good one two"] * 16, tiny.tokenizer())
    texts = data.Responses(prompt_ids(), answers, tiny.tokenizer().pad_token_id)
    optimisation = training.Optimisation(lr=1.0e-2, batch_size=4)
    return vector(training.train_sft(small_llama(0), texts, optimisation, epochs=1, seed=seed)[0])


PROMPTS = ("one two three", "seven") * 4


def count_words(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(text.split())) for text in responses]


def train_policy(seed: int) -> list[float]:
    settings = ppo.Settings(steps=2, lr=1.0e-2, critic_lr=1.0e-2, max_new_tokens=6, batch_size=4)
    critic = policies.critic_of(tiny.causal_reward_model())
    given = (small_llama(0), critic, tiny.tokenizer(), list(PROMPTS), count_words, settings)
    return [row["kl"] for row in ppo.train_policy(*given, seed=seed)["log"]] + vector(given[0])


def rollout(seed: int) -> list[str]:
    settings, llama = ppo.Settings(steps=1, lr=1.0, critic_lr=1.0, max_new_tokens=6), small_llama(0)
    given = (llama, llama, tiny.causal_reward_model(), tiny.tokenizer(), list(PROMPTS), count_words, settings)
    return ppo.rollout(*given, seed=seed).responses


def answer(seed: int) -> list[str]:
    return policies.answer(small_llama(0), tiny.tokenizer(), PROMPTS, seed=seed, max_new_tokens=6)


def fold_plan(seed: int) -> list[list[int]]:
    ids = {"rows": np.arange(40), "chosen": IDS, "rejected": np.roll(IDS, 1), "group": IDS}
    return [score.tolist() for _, score in voting.fold_plan(**ids, by="pair", n_folds=4, seed=seed)]


@pytest.fixture
def drawn(tmp_path, tiny_prompts, tiny_pairs):
    """What each function draws, by the seed it is given."""
    pairs = tiny.save_preferences(tmp_path / "pairs.parquet")
    base = tiny.save_features(tmp_path / "features.safetensors")

    def rewards(**seeds: int) -> list[float]:
        run = tiny.reward_run(pairs, base, steps=4, **seeds)
        training.train_reward_model(run, tmp_path)
        return pd.read_parquet(tmp_path / "scores.parquet")["reward_chosen"].tolist()

    def policy_run(seed: int) -> list[str]:
        language_model, reward_model = tiny.save_llama(tmp_path / "sft"), tmp_path / "rm"
        models.save_reward_model(models.reward_model(language_model, head_seed=0), reward_model)
        settings = ppo.Settings(steps=1, lr=1.0e-2, critic_lr=1.0e-2, max_new_tokens=6, batch_size=4)
        run = policies.PolicyRun("toy", language_model, reward_model, PROMPTS, PROMPTS, settings, seed)
        policies.train_policy_run(run, tmp_path)
        return pd.read_parquet(tmp_path / "answers.parquet")["response"].tolist()

    def dpo_run(seed: int) -> list[float]:
        llama, rows = tiny.save_llama(tmp_path / "sft"), np.arange(16)
        optimisation = training.Optimisation(lr=1.0e-2, batch_size=4, schedule="constant", warmup_ratio=0.0)
        settings = ppo.Settings(steps=1, lr=0.0, critic_lr=0.0, max_new_tokens=4)
        given = (llama, llama, pairs, rows, optimisation)
        run = dpo.DPORun("toy", *given, beta=0.5, steps=2, seed=seed, asked=PROMPTS[:2], settings=settings)
        dpo.train_dpo_run(run, tmp_path)
        return pd.read_parquet(tmp_path / "log.parquet")["loss"].tolist()

    def look_ahead(seed: int) -> list[float]:
        tiny.responses(8).to_parquet(tmp_path / "meta.parquet")
        meta = metarm.Meta(tmp_path / "meta.parquet", eta=0.1, ascent="random", batch_size=2)
        model, meta_set = models.reward_model(base, head_seed=0), metarm.MetaSet(meta.responses, base, 64)
        with metarm.look_ahead(meta, meta_set, seed)(model, 1, training.accelerator()) as seen:
            return [seen["difference_loss"], *vector(model)]

    def sample_run(seed: int) -> list[str]:
        sampling = {"max_new_tokens": 6, "temperature": 1.0}
        run = policies.SampleRun("toy", tiny.save_llama(tmp_path / "sft"), PROMPTS, 2, sampling, seed)
        policies.sample(run, tmp_path)
        return pd.read_parquet(tmp_path / "answers.parquet")["response"].tolist()

    def strength(seed: int) -> list[float]:
        table = pd.DataFrame({"pair_id": ["a", "b"] * 5, "seed": np.repeat(range(5), 2), "std": 1.0})
        table.assign(mean=np.arange(10.0)).to_parquet(tmp_path / "strength.parquet")
        return voting.read_strength(tmp_path / "strength.parquet", ["a", "b"], seed=seed)["mean"].tolist()

    def questions(seed: int) -> list[str]:
        inputs = {f"preferences_{s}": tmp_path / f"set-{s}" for s in (3, 4)}
        for s, path in inputs.items():
            rows = [(f"{split} {s} {i}", split, "x") for split in ("train", "ood") for i in range(3)]
            pd.DataFrame(rows, columns=["prompt", "split", "subset"]).to_parquet(path)
        return policies.questions_of(inputs, seed, 1)[0]

    return {
        "data.draw_labels(seed)": lambda seed: data.draw_labels(tiny_pairs, seed).to_list(),
        "dpo.DPORun(seed)": dpo_run,
        "metarm.look_ahead(seed)": look_ahead,
        "models.small_llama(seed)": lambda seed: vector(small_llama(seed)),
        "models.reward_model(head_seed)": lambda seed: vector(models.reward_model(base, head_seed=seed)),
        "models.generate(seed)": generate,
        "policies.PolicyRun(seed)": policy_run,
        "policies.SampleRun(seed)": sample_run,
        "policies.answer(seed)": answer,
        "policies.questions_of(seed)": questions,
        "ppo.rollout(seed)": rollout,
        "ppo.train_policy(seed)": train_policy,
        "training.train_sft(seed)": train_sft,
        "training.RewardRun(data_seed)": lambda seed: rewards(data_seed=seed),
        "training.RewardRun(head_seed)": lambda seed: rewards(head_seed=seed),
        "voting.fold_plan(seed)": fold_plan,
        "voting.read_strength(seed)": strength,
        "world.write_prompts(seed)": lambda seed: world.write_prompts(dict.fromkeys(world.SPLITS, 6), seed),
        "world.write_pairs(seed)": lambda seed: world.write_pairs(tiny_prompts, seed),
    }


def seeds_taken() -> list[str]:
    """Every argument of a public function or dataclass of the library that is called a seed."""
    rooms = sorted({path.stem for path in (ROOT / "rmlib").glob("*.py")} - ELSEWHERE)
    return [
        f"{room}.{thing}({argument})"
        for room in rooms
        for thing, found in vars(importlib.import_module(f"rmlib.{room}")).items()
        if (inspect.isfunction(found) or is_dataclass(found))
        and found.__module__ == f"rmlib.{room}"
        and thing[0] != "_"
        for argument in inspect.signature(found).parameters
        if argument.endswith("seed")
    ]


@pytest.mark.parametrize("what", seeds_taken())
def test_a_seed_repeats_what_it_draws_and_another_draws_something_else(drawn, what):
    first = drawn[what](3)
    torch.rand(7)
    np.random.seed(1)  # noqa: NPY002 (whatever was drawn before does not count)
    assert drawn[what](3) == first
    assert drawn[what](4) != first


def test_every_seed_is_tried(drawn):
    assert set(seeds_taken()) == set(drawn)
