"""The PPO race: a step of TRL's ``PPOTrainer`` against one of ``rmlib.ppo`` (``README.md`` says how to run it).

Same weights at the start, prompts, response length, batch, epochs, rates, coefficients, threads and fp32; both run in
one process, taking turns. Every step answers all prompts once, so both answer the same ones. The special tokens are
impossible (a bias of -1e4 on their logits): no response ends early on either side, and each survives being a text.
Before the race, rmlib repeats an update of TRL's on TRL's responses: log-probabilities, values, rewards and the weights
afterwards must agree. Writes ``ppo_race.csv`` beside this file and prints the table.

Only TRL: every pass is padded to the step's longest prompt and runs all layers at all positions, the policy's and the
reference's logits at prompt tokens too, all hidden states kept (rmlib pads so while sampling; elsewhere 16 responses of
similar length at a time, last layer and logits at response tokens); garbage is collected twice a step.
Only rmlib: a pass for the policy's log-probabilities (TRL keeps its logits of sampling); responses to text and back for
the reward model, which reads their end token too; gradients gathered over 4 micro-batches; the gradients' norm.
TRL whitens with the unbiased variance, 1 in 4000 off in scale.
"""

import argparse
import io
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import torch
import trl
from datasets import Dataset
from race import HEADS, INNER, LAYERS, THREADS, VOCABULARY, WIDTH, matrix_rate
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PrinterCallback, TrainerCallback

from rmlib import data, models, ppo

if not trl.__version__.startswith("1.12."):
    raise SystemExit(f"the last TRL with a PPOTrainer is 1.12.0, this is {trl.__version__}: see docs/race/README.md")

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # it calls itself experimental
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

HERE = Path(__file__).parent
BATCH, EPOCHS, NEW_TOKENS, PROMPT = 64, 4, 32, (16, 64)  # prompt tokens, both ends included
RATE = 1e-4
TOKENIZER = models.word_tokenizer([f"w{i}" for i in range(VOCABULARY - len(models.SPECIAL))])
NAMES = {"trl": "TRL PPOTrainer", "rmlib": "rmlib"}
PARTS = ("generation", "scoring", "measuring", "learning", "other")
COEFFICIENTS = {"kl_coef": 0.05, "vf_coef": 0.1, "cliprange": 0.2, "cliprange_value": 0.2, "gamma": 1.0, "lam": 0.95}


def settings(steps: int) -> ppo.Settings:
    """What TRL does is switched on: whitened advantages, and no bound on gradients."""
    sizes = {"max_new_tokens": NEW_TOKENS, "batch_size": BATCH, "num_ppo_epochs": EPOCHS, "num_mini_batches": 1}
    same = {"whiten_advantages": True, "max_grad_norm": None}
    return ppo.Settings(steps=steps, lr=RATE, critic_lr=RATE, **sizes, **COEFFICIENTS, **same)


def make_prompts() -> list[str]:
    """Random words; tokens count the two that the tokenizer's reader adds."""
    rng = np.random.default_rng(1)
    lengths = rng.integers(PROMPT[0], PROMPT[1] + 1, BATCH) - 2
    return [" ".join(f"w{i}" for i in rng.integers(0, VOCABULARY - len(models.SPECIAL), n)) for n in lengths]


def config() -> LlamaConfig:
    """Size and special tokens of all four models."""
    size = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "max_position_embeddings": 512}
    size |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS, "num_labels": 1}
    ends = {f"{name}_token_id": getattr(TOKENIZER, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    return LlamaConfig(**size, **ends, tie_word_embeddings=True)


def language_model(seed: int) -> LlamaForCausalLM:
    """A language model that cannot say a special token."""
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config())
    bias = torch.zeros(VOCABULARY)
    bias[: len(models.SPECIAL)] = -1e4
    model.lm_head.bias = nn.Parameter(bias, requires_grad=False)
    return model


def reward_model(seed: int) -> LlamaForSequenceClassification:
    """A critic or a reward model."""
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(config()).eval()


def fresh(reference_seed: int = 0) -> dict[str, nn.Module]:
    """The same four models at every call."""
    policies = {"policy": language_model(0), "reference": language_model(reference_seed).eval()}
    return policies | {"critic": reward_model(1), "reward": reward_model(2)}


class Clock:
    """Seconds spent in wrapped functions, and when each was last entered and left."""

    def __init__(self):
        self.spent: dict[str, float] = defaultdict(float)
        self.entered: dict[str, float] = {}
        self.left: dict[str, float] = {}

    def wrap(self, function: Callable, name_of: Callable | str, keep: Callable = lambda result: None) -> Callable:
        """``function``, timed under a name that may depend on its arguments; ``keep`` is shown its results."""

        def timed(*args, **kwargs):
            name = name_of if isinstance(name_of, str) else name_of(*args)
            self.entered[name] = time.perf_counter()
            result = function(*args, **kwargs)
            self.left[name] = time.perf_counter()
            self.spent[name] += self.left[name] - self.entered[name]
            keep(result)
            return result

        return timed

    def parts(self, seconds: float) -> dict[str, float]:
        """The run's seconds by part."""
        spent = dict(self.spent)
        spent["measuring"] = spent["sampling"] - spent["generation"] - spent["scoring"]
        spent["other"] = seconds - spent["sampling"] - spent["learning"]
        return {part: spent[part] for part in PARTS}


class Trl:
    """``PPOTrainer`` without bf16, gradient checkpointing and sample generations; token ids are its prompts."""

    def __init__(self, prompts: list[str], updates: int, folder: str, parts: dict[str, nn.Module] | None = None):
        self.parts, self.clock, self.texts = parts or fresh(), Clock(), []
        sizes = {"per_device_train_batch_size": BATCH, "gradient_accumulation_steps": 1, "num_mini_batches": 1}
        sizes |= {"num_ppo_epochs": EPOCHS, "response_length": NEW_TOKENS, "total_episodes": BATCH * updates}
        rates = {"learning_rate": RATE, "lr_scheduler_type": "constant", "weight_decay": 0.0, "temperature": 1.0}
        plain = {"bf16": False, "gradient_checkpointing": False, "use_cpu": True, "num_sample_generations": 0}
        quiet = {"report_to": "none", "save_strategy": "no", "eval_strategy": "no", "disable_tqdm": True}
        args = PPOConfig(output_dir=folder, **sizes, **rates, **COEFFICIENTS, **plain, **quiet)
        rows = Dataset.from_dict({"input_ids": data.prompt_ids(prompts, TOKENIZER)})
        names = {"model": "policy", "ref_model": "reference", "value_model": "critic", "reward_model": "reward"}
        given = {name: self.parts[part] for name, part in names.items()} | {"train_dataset": rows, "eval_dataset": rows}
        TOKENIZER.padding_side = "left"  # rmlib pads by itself
        self.trainer = PPOTrainer(args, TOKENIZER, **given, callbacks=[self.callback()])
        self.trainer.remove_callback(PrinterCallback)

    def callback(self) -> TrainerCallback:
        """Splits a step where rmlib splits it: a rollout ends with the reward model's scores."""
        clock = self.clock

        class Split(TrainerCallback):
            def on_step_end(self, *args, **kwargs):
                clock.spent["sampling"] += clock.left["scoring"] - clock.entered["generation"]
                clock.spent["learning"] += time.perf_counter() - clock.left["scoring"]

        return Split()

    def run(self) -> None:
        """All updates."""

        def who(model: nn.Module, *_) -> str:
            return "scoring" if model is self.parts["reward"] else "valuing"

        generation = self.clock.wrap(ppo_trainer.batch_generation, "generation", lambda r: self.texts.append(r[0]))
        with (
            mock.patch.object(ppo_trainer, "batch_generation", generation),
            mock.patch.object(ppo_trainer, "get_reward", self.clock.wrap(ppo_trainer.get_reward, who)),
            redirect_stdout(io.StringIO()),
        ):
            self.trainer.train()

    def described(self) -> dict[str, float]:
        """Tokens a response up to the first special one, and the last step's divergence from the reference."""
        said = torch.cat([texts[:, -NEW_TOKENS:] for texts in self.texts])
        words = (said >= len(models.SPECIAL)).int().cumprod(1).sum(1).float()
        return {"tokens": words.mean().item(), "kl": self.trainer.state.log_history[-1]["objective/kl"]}


class Rmlib:
    """The library's own path, ``ppo.train_policy`` with ``ppo.reward_of_texts``."""

    def __init__(self, prompts: list[str], updates: int, folder: str):
        self.parts, self.clock, self.prompts, self.updates = fresh(), Clock(), prompts, updates

    def run(self) -> None:
        """All updates."""
        generation = self.clock.wrap(models.generate, "generation")
        scoring = self.clock.wrap(ppo.reward_of_texts(self.parts["reward"], TOKENIZER), "scoring")
        given = (self.parts["policy"], self.parts["critic"], TOKENIZER, self.prompts, scoring, settings(self.updates))
        with mock.patch.object(models, "generate", generation):
            self.log = ppo.train_policy(*given, seed=0)["log"]
        for part in ("sampling", "learning"):
            self.clock.spent[part] = sum(row[part] for row in self.log)

    def described(self) -> dict[str, float]:
        """Tokens a response, its end token not counted, and the last step's divergence from the reference."""
        return {"tokens": np.mean([row["length"] - row["eos_rate"] for row in self.log]), "kl": self.log[-1]["kl"]}


def weights(parts: dict[str, nn.Module], name: str) -> torch.Tensor:
    """All weights of a model in one row, copied."""
    return torch.cat([weight.detach().flatten().clone() for weight in parts[name].parameters()])


def check_same_numbers(prompts: list[str], folder: str) -> None:
    """Repeat an update of TRL's on its responses, with a reference that is not the policy; stop where they differ."""
    contestant, parts = Trl(prompts, 1, folder, fresh(reference_seed=3)), fresh(reference_seed=3)
    start = {name: weights(parts, name) for name in ("policy", "critic")}
    contestant.run()
    texts, pad = contestant.texts[0], TOKENIZER.pad_token_id
    width = texts.shape[1] - NEW_TOKENS
    asked = TOKENIZER.batch_decode(texts[:, :width], skip_special_tokens=True)
    said = texts[:, width:]
    with torch.no_grad():
        theirs = {"scores": ppo_trainer.get_reward(parts["reward"], texts, pad, width)[1]}
        theirs["values"] = ppo_trainer.get_reward(parts["critic"], texts, pad, width)[0][:, width - 1 : -1, 0]
        for name, part in (("logprobs", "policy"), ("ref_logprobs", "reference")):
            logits = ppo_trainer.forward(parts[part], texts, pad).logits[:, width - 1 : -1]
            theirs[name] = ppo_trainer.selective_log_softmax(logits, said)
        ended = nn.functional.pad(texts, (0, 1), value=TOKENIZER.eos_token_id)
        rewards = ppo_trainer.get_reward(parts["reward"], ended, pad, width)[1]
    models_ = (parts["policy"], parts["reference"], parts["critic"])
    with mock.patch.object(models, "generate", lambda *args, **kwargs: said.tolist()):
        ours = ppo.rollout(*models_, TOKENIZER, asked, lambda *_: theirs["scores"], settings(1), seed=0)
    trained = [weight for name in start for weight in parts[name].parameters() if weight.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=RATE, weight_decay=0.0, fused=True)
    differ = {name: (getattr(ours, name) - tensor).abs().max().item() for name, tensor in theirs.items()}
    differ["rewards"] = (ppo.reward_of_texts(parts["reward"], TOKENIZER)(asked, ours.responses) - rewards).abs().max()
    ppo.learn(parts["policy"], parts["critic"], optimiser, ours, settings(1), np.random.default_rng(0), [])
    for name, before in start.items():
        theirs_moved = weights(contestant.parts, name) - before
        apart = weights(parts, name) - before - theirs_moved
        differ[f"update of the {name}"] = (apart.norm() / theirs_moved.norm()).item()
    print("largest differences:", ", ".join(f"{name} {value:.1e}" for name, value in differ.items()), flush=True)
    for name, value in differ.items():
        if value > (0.02 if "update" in name else 1e-4):
            raise SystemExit(f"TRL and rmlib disagree about the {name}")


def one_round(prompts: list[str], updates: int, number: int, folder: str) -> list[dict]:
    """TRL, then rmlib."""
    contestants = {"trl": Trl(prompts, updates, folder), "rmlib": Rmlib(prompts, updates, folder)}
    rows = []
    for who, contestant in contestants.items():
        rate = matrix_rate()
        start = time.perf_counter()
        contestant.run()
        seconds = time.perf_counter() - start
        row = {"round": number, "who": who, "updates": updates, "samples_per_second": BATCH * updates / seconds}
        row |= {part: spent / updates for part, spent in contestant.clock.parts(seconds).items()}
        rows.append(row | contestant.described() | {"matrix_rate": rate})
        print(f"round {number} {who:6} {row['samples_per_second']:6.1f} samples/s", flush=True)
    return rows


def markdown(runs: pd.DataFrame) -> str:
    """The table for ``README.md``: medians, ranges, ratio of medians and median of the ratios in a round."""
    speeds = runs.pivot(index="round", columns="who", values="samples_per_second")
    turns, medians = speeds["rmlib"] / speeds["trl"], runs.groupby("who").median()
    head = ["loop", "samples/s: median [range]", "ratio of medians", "ratio in a round"]
    lines = [[*head, *(f"{part}, s" for part in PARTS), "tokens"], ["---"] * (len(head) + len(PARTS) + 1)]
    for who, name in NAMES.items():
        middle, speed = medians.loc[who], speeds[who]
        ratio = f"**{middle['samples_per_second'] / medians.loc['trl', 'samples_per_second']:.2f}**"
        turn = "1" if who == "trl" else f"{turns.median():.2f} [{turns.min():.2f}, {turns.max():.2f}]"
        lines.append([name, f"{speed.median():.1f} [{speed.min():.1f}, {speed.max():.1f}]", ratio, turn])
        lines[-1] += [*(f"{middle[part]:.2f}" for part in PARTS), f"{middle['tokens']:.1f}"]
    rate = runs["matrix_rate"]
    rates = f"fp32 matrix rate: median {rate.median():.0f} GFLOP/s [{rate.min():.0f}, {rate.max():.0f}]"
    versions = f"trl {trl.__version__}, torch {torch.__version__}"
    counts = f"{runs['round'].nunique()} rounds of {runs['updates'].iloc[0]} updates"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{counts}; {rates}; {versions}."


def main() -> None:
    """Check, warm up, race, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5, help="runs of each loop")
    parser.add_argument("--updates", type=int, default=10, help="PPO steps in a run")
    parser.add_argument("--csv", type=Path, default=HERE / "ppo_race.csv", help="where every run is written")
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(THREADS)
    prompts = make_prompts()
    with tempfile.TemporaryDirectory() as folder:
        check_same_numbers(prompts, folder)
        one_round(prompts, 1, 0, folder)  # warms up and does not count
        rows = [one_round(prompts, options.updates, n, folder) for n in range(1, options.rounds + 1)]
    runs = pd.DataFrame([row for both in rows for row in both])
    runs.round(4).to_csv(options.csv, index=False)
    print(markdown(runs))


if __name__ == "__main__":
    main()
