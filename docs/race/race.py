"""The race: reward-model training and scoring, TRL's ``RewardTrainer`` against this library (``make bench``).

Same weights at the start, pairs, batch size, steps, threads, optimiser and clipping; both run in one process, taking
turns. Writes ``race.csv`` (every run), ``race.png`` and the table in ``README.md``, all beside this file.
"""

import tempfile
import time
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForSequenceClassification, PrinterCallback
from trl import RewardConfig, RewardTrainer

from rmlib import data, figures, losses, models, training

HERE = Path(__file__).parent
THREADS = 2
ROUNDS = 5
BATCH = 32
HELD_OUT = 256
VOCABULARY, WIDTH, LAYERS, HEADS, INNER = 1024, 128, 4, 4, 512
LENGTHS = {  # prompt tokens, response tokens (both ends included), pairs trained on and scored in a run
    "short": ((16, 64), (24, 48), 1024),
    "HH-like": ((100, 300), (20, 100), 256),
}
NAMES = {"trl": "TRL RewardTrainer", "rmlib": "rmlib"}
RECIPE = training.Optimisation(lr=1e-3, batch_size=BATCH, schedule="linear", warmup_ratio=0.0, max_grad_norm=1.0)


def make_pairs(n: int, prompt: tuple[int, int], response: tuple[int, int], seed: int) -> data.CausalPairs:
    """Random token ids in which one token in ten of a chosen response is one of eight good words."""
    rng = np.random.default_rng(seed)

    def text(bounds: tuple[int, int], good: float) -> np.ndarray:
        ids = rng.integers(16, VOCABULARY, rng.integers(bounds[0], bounds[1] + 1))
        return np.where(rng.random(len(ids)) < good, rng.integers(8, 16, len(ids)), ids)

    parts = ((prompt, 0.0), (response, 0.1), (response, 0.0))
    return data.CausalPairs(*([text(*part) for _ in range(n)] for part in parts), pad_id=0)


def fresh_model() -> LlamaForSequenceClassification:
    """The same weights at every call."""
    torch.manual_seed(0)
    size = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": INNER, "max_position_embeddings": 512}
    size |= {"num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    config = LlamaConfig(**size, pad_token_id=0, num_labels=1)
    return LlamaForSequenceClassification(config)


def pass_flops(pairs: data.CausalPairs) -> float:
    """Matrix flops of one forward pass over real tokens, each prompt once; a training step does three times that."""
    weights = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
    p, c, r = (np.array([len(ids) for ids in part]) for part in (pairs.prompt, pairs.chosen, pairs.rejected))
    attended = p * (p + 1) / 2 + c * p + c * (c + 1) / 2 + r * p + r * (r + 1) / 2
    return float(2 * weights * (p + c + r).sum() + 4 * WIDTH * LAYERS * attended.sum())


def matrix_rate(size: int = 2048, seconds: float = 1.0) -> float:
    """GFLOP/s of a square fp32 matrix product on this machine, now."""
    a, b = torch.randn(2, size, size)
    for _ in range(3):
        a @ b
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        a @ b
        done += 1
    return 2 * size**3 * done / (time.perf_counter() - start) / 1e9


class Trl:
    """``RewardTrainer`` on the same pairs, without bf16 and gradient checkpointing, which cost time on a CPU."""

    def __init__(self, pairs: data.CausalPairs, folder: str):
        self.pairs = self.dataset(pairs)
        sizes = {"per_device_train_batch_size": BATCH, "per_device_eval_batch_size": BATCH, "num_train_epochs": 1}
        rates = {"learning_rate": RECIPE.lr, "lr_scheduler_type": RECIPE.schedule, "weight_decay": 0.0}
        rates |= {"warmup_steps": RECIPE.warmup_ratio, "max_grad_norm": RECIPE.max_grad_norm}  # below 1: a share
        plain = {"bf16": False, "gradient_checkpointing": False, "max_length": None, "use_cpu": True}
        quiet = {"report_to": "none", "save_strategy": "no", "disable_tqdm": True}
        args = RewardConfig(output_dir=folder, **sizes, **rates, **plain, **quiet)
        tokenizer = models.word_tokenizer([f"w{i}" for i in range(VOCABULARY - len(models.SPECIAL))])
        self.model = fresh_model()
        self.trainer = RewardTrainer(self.model, args, train_dataset=self.pairs, processing_class=tokenizer)
        self.trainer.remove_callback(PrinterCallback)

    @staticmethod
    def dataset(pairs: data.CausalPairs) -> Dataset:
        """Two texts a pair, as the trainer wants them."""
        sides = {"chosen_ids": pairs.chosen, "rejected_ids": pairs.rejected}
        joined = {name: zip(pairs.prompt, side, strict=True) for name, side in sides.items()}
        return Dataset.from_dict({name: [np.concatenate(parts) for parts in both] for name, both in joined.items()})

    def train(self) -> None:
        """One pass."""
        self.trainer.train()

    def score(self, pairs: data.CausalPairs | None = None) -> np.ndarray:
        """Rewards, shape (2, pairs): chosen, then rejected."""
        logits = self.trainer.predict(self.pairs if pairs is None else self.dataset(pairs)).predictions
        return logits.reshape(-1, 2, BATCH).transpose(1, 0, 2).reshape(2, -1)

    def slots(self) -> dict[str, int]:
        """Token places computed, padding included."""
        loaders = {"train": self.trainer.get_train_dataloader(), "score": self.trainer.get_test_dataloader(self.pairs)}
        return {task: sum(batch["input_ids"].numel() for batch in loader) for task, loader in loaders.items()}


class Rmlib:
    """The library's own path, as ``training.train_reward_model`` takes it."""

    def __init__(self, pairs: data.CausalPairs, folder: str):
        self.pairs, self.rows, self.model = pairs, np.arange(len(pairs.chosen)), fresh_model()

    def train(self) -> None:
        """One pass."""
        flipped = np.zeros(len(self.rows), dtype=bool)
        training.fit(self.model, self.batches(), lambda rows: self.pairs.collate(rows, flipped), self.loss, RECIPE)

    def batches(self) -> list[np.ndarray]:
        """Rows of every step."""
        return data.length_batches(self.pairs.lengths, self.rows, BATCH, np.random.default_rng(0))

    @staticmethod
    def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Eq 2."""
        return losses.pairwise_loss(*models.pair_rewards(model, batch))

    def score(self, pairs: data.CausalPairs | None = None, model: torch.nn.Module | None = None) -> np.ndarray:
        """Rewards, shape (2, pairs): chosen, then rejected."""
        pairs, model = pairs or self.pairs, model or self.model
        scores = training.score_pairs(model, pairs, np.arange(len(pairs.chosen)), batch_size=BATCH)
        return np.stack([scores["reward_chosen"], scores["reward_rejected"]])

    def slots(self) -> dict[str, int]:
        """Token places computed, padding included."""
        lengths = self.pairs.lengths
        batches = {"train": self.batches(), "score": data.score_batches(lengths, self.rows, BATCH)}
        return {task: int(sum(lengths[b].max() * len(b) for b in parts)) for task, parts in batches.items()}


def one_round(lengths: str, number: int, folder: str) -> list[dict]:
    """Both contestants train and score once, in turns that swap from round to round."""
    prompt, response, n = LENGTHS[lengths]
    pairs, held_out = make_pairs(n, prompt, response, seed=1), make_pairs(HELD_OUT, prompt, response, seed=2)
    contestants = {"trl": Trl(pairs, folder), "rmlib": Rmlib(pairs, folder)}
    order = list(contestants) if number % 2 else list(contestants)[::-1]
    slots = {who: contestants[who].slots() for who in order}
    rows = []
    for task in ("train", "score"):
        rate = matrix_rate()
        for who in order:
            start = time.perf_counter()
            getattr(contestants[who], task)()
            seconds = time.perf_counter() - start
            gflops = pass_flops(pairs) * (3 if task == "train" else 1) / seconds / 1e9
            row = {"lengths": lengths, "task": task, "who": who, "round": number, "seconds": seconds}
            row |= {"pairs_per_second": n / seconds, "slots_per_pair": slots[who][task] / n}
            rows.append(row | {"gflops": gflops, "matrix_rate": rate})
            print(f"{lengths:8} {task:6} {who:6} round {number}: {n / seconds:7.1f} pairs/s", flush=True)
    rewards = {who: contestants[who].score(held_out) for who in order}
    same_weights = contestants["rmlib"].score(held_out, contestants["trl"].model)
    np.testing.assert_allclose(same_weights, rewards["trl"], atol=1e-4)  # both read one model alike
    loss = {who: np.logaddexp(0, rejected - chosen).mean() for who, (chosen, rejected) in rewards.items()}
    return [row | {"held_out_loss": loss[row["who"]]} for row in rows]


def summary(runs: pd.DataFrame) -> pd.DataFrame:
    """Median and range of the rounds, one row for lengths, task and contestant."""
    groups = runs.assign(share=runs["gflops"] / runs["matrix_rate"]).groupby(["task", "lengths", "who"], sort=False)
    table = groups["pairs_per_second"].agg(["median", "min", "max"])
    table = table.join(groups[["slots_per_pair", "gflops", "share", "held_out_loss"]].median())
    speeds = runs.pivot(index=["task", "lengths", "round"], columns="who", values="pairs_per_second")
    turns = (speeds["rmlib"] / speeds["trl"]).groupby(["task", "lengths"]).agg(["median", "min", "max"])
    table = table.join(turns.add_prefix("round_"), on=["task", "lengths"])
    return table.assign(ratio=table["median"] / table.xs("trl", level="who")["median"])


def markdown(table: pd.DataFrame, rate: pd.Series) -> str:
    """The table of ``README.md``."""
    head = (
        "task, lengths, loop, pairs/s: median [range], ratio of medians, ratio in a round, slots a pair, GFLOP/s, share"
    )
    lines = [[*head.split(", "), "held-out loss"], ["---"] * 10]
    for (task, lengths, who), row in table.sort_index(ascending=[False, False, False]).iterrows():
        speed = f"{row['median']:.1f} [{row['min']:.1f}, {row['max']:.1f}]"
        ratio = f"**{row['ratio']:.2f}**"
        turns = f"{row['round_median']:.2f} [{row['round_min']:.2f}, {row['round_max']:.2f}]"
        turns = "1" if who == "trl" else turns
        numbers = [f"{row['slots_per_pair']:.0f}", f"{row['gflops']:.0f}", f"{row['share']:.0%}"]
        lines.append([task, lengths, NAMES[who], speed, ratio, turns, *numbers, f"{row['held_out_loss']:.4f}"])
    rates = f"fp32 matrix rate: median {rate.median():.0f} GFLOP/s [{rate.min():.0f}, {rate.max():.0f}]"
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines) + f"\n\n{rates}, torch {torch.__version__}.\n"


def draw(table: pd.DataFrame) -> None:
    """Medians as bars, ranges as whiskers, share and ratio above."""
    figures.use_style()
    figure, axes = plt.subplots(1, 2, figsize=(7.2, 3.3))
    for ax, task, title in zip(axes, ("train", "score"), ("Training", "Scoring"), strict=True):
        for k, who in enumerate(NAMES):
            rows = table.loc[task].xs(who, level="who").loc[list(LENGTHS)]
            x, color = np.arange(len(rows)) + 0.36 * k - 0.18, figures.PALETTE[1 - k]
            whiskers = [rows["median"] - rows["min"], rows["max"] - rows["median"]]
            ax.bar(x, rows["median"], 0.34, yerr=whiskers, capsize=3, label=NAMES[who], color=color, ecolor="0.3")
            for at, (_, row) in zip(x, rows.iterrows(), strict=True):
                text = f"{row['share']:.0%}" if who == "trl" else f"{row['share']:.0%}\n{row['ratio']:.2f}x"
                ax.annotate(text, (at, row["max"]), (0, 3), textcoords="offset points", ha="center", fontsize=8)
        ax.set(xticks=range(len(LENGTHS)), xticklabels=list(LENGTHS), title=title, ylabel="pairs per second")
        ax.grid(axis="x", visible=False)
        ax.margins(y=0.2)
    figure.suptitle("above the bars: share of the machine's fp32 matrix rate; speed over TRL's", fontsize=9)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
    figure.savefig(HERE / "race.png")


def main() -> None:
    """Warm up, race, write."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(THREADS)
    with tempfile.TemporaryDirectory() as folder:
        for lengths in LENGTHS:  # round 0 warms up and does not count
            one_round(lengths, 0, folder)
        runs = pd.DataFrame([row for n in range(1, ROUNDS + 1) for k in LENGTHS for row in one_round(k, n, folder)])
    runs.round(4).to_csv(HERE / "race.csv", index=False)
    table = summary(runs)
    draw(table)
    before, _, after = (HERE / "README.md").read_text(encoding="utf-8").split("<!-- race -->\n")
    parts = (before, markdown(table, runs["matrix_rate"]), after)
    (HERE / "README.md").write_text("<!-- race -->\n".join(parts), encoding="utf-8")


if __name__ == "__main__":
    main()
