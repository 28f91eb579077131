r"""Policies trained on reward models, and what they are worth: units of work, judged comparisons, over-optimisation.

A policy's distance from the SFT model is $d = \sqrt{\mathrm{KL}}$, KL in nats a response (Gao et al., 2210.10760).
"""

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.special import gammaln
from torch import nn

from rmlib import data, evaluation, models, ppo, records, runs, training, world


@dataclass(frozen=True)
class PolicyRun:
    """One policy: it starts as ``policy``, and is paid by ``reward_model`` for its answers to ``prompts``.

    Rewards are (reward - ``reward_mean``) / ``reward_std``; with a ``committee``, more reward models each with its mean
    and standard deviation, the policy is paid as :func:`rmlib.evaluation.agreed` by ``rule``. KL counts from
    ``reference``, if not from where the policy starts. In the end it answers the prompts ``asked``. ``has_gold`` says
    that the prompts are of the miniature world, so that the true reward can be noted beside.
    """

    name: str
    policy: Path
    reward_model: Path
    prompts: tuple[str, ...]
    asked: tuple[str, ...]
    settings: ppo.Settings
    seed: int
    reward_mean: float = 0.0
    reward_std: float = 1.0
    committee: tuple[tuple[Path, float, float], ...] = ()
    rule: str = "mean"
    reference: Path | None = None
    has_gold: bool = False

    def __post_init__(self):
        evaluation.agreed(np.zeros((1, 1)), self.rule)  # refuses an unknown one before training


@dataclass(frozen=True)
class SampleRun:
    """``n_draws`` answers of ``policy`` to each of ``prompts``; ``sampling`` as in :func:`rmlib.models.generate`."""

    name: str
    policy: Path
    prompts: tuple[str, ...]
    n_draws: int
    sampling: dict
    seed: int = 0


POLICY_RUN_CODE = ("ppo", "policies", "models", "data", "training", "losses", "evaluation", "world")
SAMPLE_RUN_CODE = ("models", "policies", "data")


def gold_of_texts(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """True reward of each response in the miniature world."""
    return [world.gold_reward(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]


def critic_of(reward_model: nn.Module, mean: float = 0.0, std: float = 1.0) -> nn.Module:
    """``reward_model`` as a critic (in place): its head gives (reward - ``mean``) / ``std`` and may learn a bias."""
    head = reward_model.score
    reward_model.score = nn.Linear(head.in_features, 1)
    with torch.no_grad():
        reward_model.score.weight.copy_(head.weight / std)
        reward_model.score.bias.fill_(-mean / std)
    return reward_model


def answer(policy: nn.Module, tokenizer, prompts: Sequence[str], *, seed: int, batch_size: int = 64, **sampling):
    """One sampled response to each prompt, as texts; ``sampling`` as in :func:`rmlib.models.generate`."""
    ends = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    ids, said = data.prompt_ids(list(prompts), tokenizer), [""] * len(prompts)
    for k, rows in enumerate(data.score_batches(np.array([len(p) for p in ids]), np.arange(len(ids)), batch_size)):
        texts = models.generate(policy, [ids[i] for i in rows], **sampling, **ends, seed=seed + k)
        for row, text in zip(rows, tokenizer.batch_decode(texts, skip_special_tokens=True), strict=True):
            said[row] = text
    return said


def train_policy_run(run: PolicyRun, folder: Path, checkpoint: Path | None = None) -> None:
    """Train one policy; write ``log.parquet``, ``samples.parquet``, ``answers.parquet`` and ``model`` to ``folder``."""
    tokenizer, policy = models.load_tokenizer(run.policy), models.load_language_model(run.policy)
    reference = models.load_language_model(run.reference) if run.reference else None
    reward_fn = _reward_fn(run, tokenizer)
    critic = critic_of(models.load_reward_model(run.reward_model), run.reward_mean, run.reward_std)
    given = (policy, critic, tokenizer, list(run.prompts), reward_fn, run.settings)
    about = {"seed": run.seed, "gold_fn": gold_of_texts if run.has_gold else None, "reference": reference}
    record = ppo.train_policy(*given, **about, checkpoint=checkpoint)
    for name in ("log", "samples"):
        runs.write_table(pd.DataFrame(record[name]), folder / f"{name}.parquet")
    leave(policy, tokenizer, run, folder, reward=lambda said: reward_fn(list(run.asked), said))


def _reward_fn(run: PolicyRun, tokenizer) -> ppo.TextReward:
    """What pays the policy of ``run``: one reward model, or all of its committee."""
    device = training.accelerator().device
    members = [
        ppo.reward_of_texts(models.load_reward_model(path).to(device), tokenizer, mean=mean, std=std)
        for path, mean, std in ((run.reward_model, run.reward_mean, run.reward_std), *run.committee)
    ]
    if len(members) == 1:
        return members[0]
    return lambda prompts, said: evaluation.agreed(np.stack([fn(prompts, said) for fn in members]), run.rule)


def leave(policy: nn.Module, tokenizer, run, folder: Path, **columns) -> None:
    """Let a trained ``policy`` answer the prompts of ``run.asked``, and write ``answers.parquet`` and ``model``.

    ``columns`` are functions of the answers. True rewards join them where ``run.has_gold``.
    """
    draw = zlib.crc32(run.name.encode())  # no two policies answer from the same random numbers
    said = answer(policy, tokenizer, run.asked, seed=draw, **run.settings.sampling)
    answers = pd.DataFrame({"prompt": run.asked, "response": said} | {name: of(said) for name, of in columns.items()})
    if run.has_gold:
        answers["gold"] = gold_of_texts(run.asked, said)
    runs.write_table(answers, folder / "answers.parquet")
    policy.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")


def sample(run: SampleRun, folder: Path, checkpoint: Path | None = None) -> None:
    """Write the answers of ``run`` to ``answers.parquet``: ``place`` (of the prompt), ``draw, prompt, response``."""
    model = models.load_language_model(run.policy).to(training.accelerator().device)
    given, places = (model, models.load_tokenizer(run.policy), run.prompts), range(len(run.prompts))
    drawn = [answer(*given, seed=1_000_000 * run.seed + 1000 * k, **run.sampling) for k in range(run.n_draws)]
    said = [{"place": places, "draw": k, "prompt": run.prompts, "response": each} for k, each in enumerate(drawn)]
    runs.write_table(pd.concat(map(pd.DataFrame, said), ignore_index=True), folder / "answers.parquet")


def questions_of(
    inputs: Mapping[str, Path], seed: int, n_asked: int, n_validation: int = 0
) -> tuple[list[str], pd.DataFrame]:
    """Prompts to train policies on, and the questions (kind, subset, prompt) that they are asked in the end.

    ``n_asked`` of each kind, in distribution and out of it, and ``n_validation`` to choose by. Of the miniature world
    they are prompts that no reward model has seen, else those of the preference set. Raises ``ValueError`` if there are
    too few.
    """
    if "prompts" in inputs:
        everything = pd.read_parquet(inputs["prompts"])
        own, other = (everything[everything["split"] == split] for split in ("policy", "ood"))
    else:
        everything = pd.read_parquet(inputs[f"preferences_{seed}"]).drop_duplicates("prompt")
        own, other = everything[everything["split"] == "train"], everything[everything["split"] != "train"]
    if n_asked + n_validation >= len(own) or n_asked > len(other):
        asked = f"n_asked = {n_asked}" + f" and n_validation = {n_validation}" * bool(n_validation)
        raise ValueError(f"{asked}, but there are {len(own)} and {len(other)} prompts")
    training, aside = own.iloc[: -n_asked - n_validation], own.iloc[-n_asked - n_validation :]
    asked = {"in distribution": aside.tail(n_asked), "out of distribution": other.head(n_asked)}
    asked |= {"validation": aside.head(n_validation)} if n_validation else {}
    questions = pd.concat(asked, names=["kind"]).reset_index("kind")[["kind", "subset", "prompt"]]
    return training["prompt"].to_list(), questions.reset_index(drop=True)


def sft_answers(run: records.Run, base: Path, questions: pd.DataFrame, n_draws: int, sampling: dict) -> pd.DataFrame:
    """``n_draws`` answers of the model in ``base`` to every question, drawn once: questions, ``draw, response``."""
    asked = SampleRun("sft-answers", base, tuple(questions["prompt"]), n_draws, sampling)
    said = pd.read_parquet(run.units([asked], sample, code=SAMPLE_RUN_CODE)[0] / "answers.parquet")
    return questions.join(said.set_index("place")[["draw", "response"]]).sort_values("draw", kind="stable")


def pairs_of_answers(answers: pd.DataFrame, split: str, gold: bool) -> list[dict]:
    """Unlabelled pairs for :func:`rmlib.data.draw_labels`, of neighbouring draws among a prompt's ``answers``.

    ``answers`` has rows ``prompt, subset, draw, response``, each prompt once a draw. Two identical answers make no
    pair. True rewards are NaN unless ``gold`` says that the prompts are of the miniature world.
    """
    rows = []
    said = answers.pivot(index=["prompt", "subset"], columns="draw", values="response")
    for n, ((prompt, subset), texts) in enumerate(said.iterrows()):
        about = {"prompt_id": f"{split}-{n}", "prompt": prompt, "subset": subset, "topic": "", "split": split}
        for k in range(0, len(texts) - 1, 2):
            if texts[k] == texts[k + 1]:
                continue
            pair = {"pair_id": f"{split}-{n}-{k}"} | about
            for side, text in zip("ab", texts[k : k + 2], strict=True):
                worth = world.gold_reward(prompt, text) if gold else float("nan")
                pair |= {f"response_{side}": text, f"id_{side}": world.text_id(text), f"gold_{side}": worth}
            rows.append(pair)
    return rows


def reward_scale(said: pd.DataFrame, rewards: Mapping[tuple[int, str], np.ndarray]) -> pd.DataFrame:
    """Mean, and standard deviation within a prompt, of every reward model's ``rewards`` of the answers ``said``.

    Where ``said`` has a column ``gold``, Spearman's correlation with it, over all and within a prompt. Rounded, so that
    no last bit trains another policy.
    """
    rows = []
    for (seed, arm), values in rewards.items():
        both = said.assign(proxy=values)[said["kind"] == "in distribution"]
        row = {"arm": arm, "seed": seed, "mean": both["proxy"].mean()}
        row["std"] = both.groupby("prompt")["proxy"].std().mean()
        if "gold" in said:
            within = both.groupby("prompt")[["proxy", "gold"]].rank()
            row["correlation"] = both["proxy"].corr(both["gold"], "spearman")
            row["within a prompt"] = within["proxy"].corr(within["gold"])
        rows.append(row)
    return pd.DataFrame(rows).round(4)


def read_runs(folders: Mapping[tuple, Path], questions: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Tables ``log, answers, samples`` of finished policies, by their key ``(arm, paid, seed)``."""
    parts = {"log": [], "answers": [], "samples": []}
    for (arm, paid, seed), folder in folders.items():
        for part, tables in parts.items():
            table = pd.read_parquet(folder / f"{part}.parquet").assign(arm=arm, paid=paid, seed=seed)
            if part == "answers":
                table = table.assign(draw=np.arange(len(table)) // len(questions)).merge(questions, on="prompt")
            tables.append(table)
    return {part: pd.concat(tables, ignore_index=True) for part, tables in parts.items()}


def win_tie_lose(judge: world.Judge, gold: np.ndarray, other: np.ndarray) -> dict[str, float]:
    """Shares of prompts on which ``gold`` wins, ties and loses against ``other`` (paper Fig 10)."""
    verdict = judge.compare(gold, other)
    return {name: float(np.mean(verdict == sign)) for name, sign in (("win", 1), ("tie", 0), ("lose", -1))}


def best_of(proxy: np.ndarray, gold: np.ndarray, k: int) -> float:
    """Expected gold of the response that ``proxy`` likes best among ``k`` of the n drawn, both (prompts, n).

    Exact over all subsets of size ``k``. Raises ``ValueError`` for a ``k`` outside 1 to n.
    """
    n = proxy.shape[1]
    if not 1 <= k <= n:
        raise ValueError(f"best of {k} among {n} responses")
    rank = np.arange(n)  # weight of rank i: subsets whose best it is, C(i, k-1) / C(n, k)

    def log_choose(n, k):
        return gammaln(n + 1) - gammaln(k + 1) - gammaln(n - k + 1)

    weight = np.where(rank >= k - 1, np.exp(log_choose(np.maximum(rank, k - 1), k - 1) - log_choose(n, k)), 0.0)
    ordered = np.take_along_axis(gold, np.argsort(proxy, axis=1, kind="stable"), axis=1)
    return float((ordered @ weight).mean())


def best_of_kl(k: int) -> float:
    """KL of best-of-``k`` sampling to the sampled policy, log k - (k - 1) / k nats (an upper bound with ties)."""
    return float(np.log(k) - (k - 1) / k)


def over_optimisation(distance: np.ndarray, gain: np.ndarray, kind: str) -> tuple[float, float]:
    r"""Least-squares $\alpha, \beta$ of Gao et al.'s form of the gold gain at distance $d > 0$.

    ``"rl"``: $d(\alpha - \beta \log d)$; ``"best_of_n"``: $d(\alpha - \beta d)$.
    """
    if kind not in ("rl", "best_of_n"):
        raise ValueError(f"unknown kind {kind!r}; choose from rl, best_of_n")
    second = -distance * (np.log(distance) if kind == "rl" else distance)
    alpha, beta = np.linalg.lstsq(np.stack([distance, second], axis=1), gain, rcond=None)[0]
    return float(alpha), float(beta)


def at_kl(kl: np.ndarray, values: np.ndarray, level: float) -> float:
    """``values`` of a training run where its KL first reaches ``level``, between two steps; NaN if it never does."""
    if not (kl >= level).any() or kl[0] > level:
        return float("nan")
    k = int(np.argmax(kl >= level))
    return float(values[0] if k == 0 else np.interp(level, kl[k - 1 : k + 1], values[k - 1 : k + 1]))
