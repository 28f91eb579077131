"""Preference sets: how labels are drawn, and how pairs become batches.

A *pair set* holds two responses a prompt and what people or the world say of them, without a label. A
seed draws the label and so turns it into a *preference set*: a ``datasets.Dataset`` with ``pair_id,
prompt_id, prompt, chosen, rejected, chosen_id, rejected_id, subset, topic, split`` and its truth, either
``gold_chosen, gold_rejected`` (the world) or ``votes`` (people: +1, 0 or -1 for every vote but the label).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rmlib import world


def draw_labels(pairs: Sequence[dict], seed: int, annotator: world.Annotator | None = None) -> Dataset:
    """Preference set in which one person labels each pair; ``seed`` redraws all labels.

    In the world the person is ``annotator``. On people's ballots the label is one vote drawn among a pair's
    decisive ones, and ``votes`` holds the *other* votes as seen from the label, so that no label is part of
    its own truth; a pair without a decisive vote is left out and counted.
    """
    rng, person = np.random.default_rng(seed), annotator or world.Annotator()
    rows = [_labelled(pair, rng, person) for pair in pairs]
    kept = [row for row in rows if row is not None]
    if len(kept) < len(rows):
        print(f"  left out, no decisive vote: {len(rows) - len(kept)}")
    return Dataset.from_list(kept)


def _labelled(pair: dict, rng: np.random.Generator, person: world.Annotator) -> dict | None:
    if "ballots" not in pair:
        return _row(pair, person.prefers_a(pair, rng)[0])
    decisive = np.flatnonzero(pair["ballots"])
    if len(decisive) == 0:
        return None
    drawn = rng.choice(decisive)
    label = pair["ballots"][drawn]
    others = [label * vote for i, vote in enumerate(pair["ballots"]) if i != drawn]
    return _row(pair, label == 1) | {"votes": others}


def _row(pair: dict, prefers_a: bool) -> dict:
    sides = {"chosen": "a", "rejected": "b"} if prefers_a else {"chosen": "b", "rejected": "a"}
    row = {name: pair[name] for name in ("pair_id", "prompt_id", "prompt")}
    row |= {side: pair[f"response_{k}"] for side, k in sides.items()}
    row |= {f"{side}_id": pair[f"id_{k}"] for side, k in sides.items()}
    row |= {name: pair[name] for name in ("subset", "topic", "split")}
    return row | {f"gold_{side}": pair[f"gold_{k}"] for side, k in sides.items() if f"gold_{k}" in pair}


def truth(preferences: Dataset) -> np.ndarray:
    """True margin of each label: r* of chosen minus rejected, or the sum of the other votes.

    Positive where the label is right, negative where it is wrong, 0 for a tie. Raises ``KeyError`` where
    the set holds neither.
    """
    if "gold_chosen" in preferences.column_names:
        return np.array(preferences["gold_chosen"]) - np.array(preferences["gold_rejected"])
    if "votes" in preferences.column_names:
        return np.array([sum(votes) for votes in preferences["votes"]], dtype=float)
    raise KeyError("this preference set has no truth: neither gold_chosen, gold_rejected nor votes")


def length_batches(
    lengths: np.ndarray, rows: np.ndarray, batch_size: int, rng: np.random.Generator, window: int = 16
) -> list[np.ndarray]:
    """One epoch of ``rows`` in random order, cut into batches of similar length.

    Rows are shuffled, sorted by length inside windows of ``window`` batches, and the batches shuffled again.
    """
    shuffled = rng.permutation(rows)
    span = window * batch_size
    windows = (shuffled[start : start + span] for start in range(0, len(shuffled), span))
    ordered = np.concatenate([part[np.argsort(lengths[part], kind="stable")] for part in windows])
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def score_batches(lengths: np.ndarray, rows: np.ndarray, batch_size: int) -> list[np.ndarray]:
    """``rows`` from short to long in batches, for scoring."""
    ordered = rows[np.argsort(lengths[rows], kind="stable")]
    return [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]


@dataclass(frozen=True)
class CausalPairs:
    """Token ids of pairs for a causal model: one row a pair, [prompt | chosen | rejected].

    Chosen and rejected share their prompt's pass: the rejected response does not see the chosen one and its
    positions restart after the prompt, so its reward equals that of a separate pass.
    """

    prompt: list[np.ndarray]
    chosen: list[np.ndarray]
    rejected: list[np.ndarray]
    pad_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each pair's row, shape (pairs,)."""
        return np.array([sum(map(len, row)) for row in zip(self.prompt, self.chosen, self.rejected, strict=True)])

    def collate(self, rows: np.ndarray, flipped: np.ndarray) -> dict[str, Tensor]:
        """Batch of ``rows``; where ``flipped`` (a mask over all pairs) is true, the two responses swap places."""
        pairs = [(self.rejected[i], self.chosen[i]) if flipped[i] else (self.chosen[i], self.rejected[i]) for i in rows]
        return grouped([(self.prompt[i], *pair) for i, pair in zip(rows, pairs, strict=True)], self.pad_id)


def grouped(texts: Sequence[Sequence[np.ndarray]], pad_id: int) -> dict[str, Tensor]:
    """Batch whose rows are a prompt and its k responses, [prompt | first | ... | last]; no response sees another.

    ``at`` (rows, k) are the last tokens of the responses, ``imitated`` is true on the first.
    """
    joined = [torch.from_numpy(np.concatenate(text)) for text in texts]
    ids = pad_sequence(joined, batch_first=True, padding_value=pad_id)
    end = torch.tensor([list(map(len, text)) for text in texts]).cumsum(1)
    at = torch.arange(ids.shape[1])[None]
    part = (at[:, None] >= end[:, :-1, None]).sum(1)  # 0 on the prompt, i on the i-th response
    start = torch.nn.functional.pad(end[:, :-1], (1, 0)).gather(1, part)
    seen = (part[:, None] == 0) | (part[:, None] == part[:, :, None])
    return {
        "input_ids": ids,
        "position_ids": torch.where(part > 0, at - start + end[:, :1], at),
        "attention_mask": ((at[:, :, None] >= at[:, None, :]) & seen)[:, None],
        "at": end[:, 1:] - 1,
        "imitated": (part == 1) & (at < end[:, 1:2]),
    }


@dataclass(frozen=True)
class FeaturePairs:
    """Cached features of pairs: ``features`` (responses, hidden) and each pair's two rows in it."""

    features: Tensor
    chosen: np.ndarray
    rejected: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        """All the same: there is nothing to pad."""
        return np.ones(len(self.chosen), dtype=int)

    def collate(self, rows: np.ndarray, flipped: np.ndarray) -> dict[str, Tensor]:
        """Batch of ``rows``; where ``flipped`` is true, the two responses swap places."""
        first = np.where(flipped[rows], self.rejected[rows], self.chosen[rows])
        second = np.where(flipped[rows], self.chosen[rows], self.rejected[rows])
        return {"features": self.features[np.concatenate([first, second])]}


def causal_pairs(preferences: Dataset, tokenizer, max_length: int) -> CausalPairs:
    """Tokenize for a causal model: ``<bos> prompt <sep> response <eos>``, the separator where there is one.

    Raises ``ValueError`` naming the first pair whose prompt and longer response exceed ``max_length``.
    """
    prompt = prompt_ids(list(preferences["prompt"]), tokenizer)
    chosen = response_ids(list(preferences["chosen"]), tokenizer)
    rejected = response_ids(list(preferences["rejected"]), tokenizer)
    for i, (p, c, r) in enumerate(zip(prompt, chosen, rejected, strict=True)):
        if len(p) + (longer := max(len(c), len(r))) > max_length:
            much = f"{len(p)} prompt tokens and a response of {longer} exceed max_length {max_length}"
            raise ValueError(f"pair {preferences['pair_id'][i]!r} (row {i}): {much}")
    return CausalPairs(prompt, chosen, rejected, tokenizer.pad_token_id)


def prompt_ids(prompts: list[str], tokenizer) -> list[np.ndarray]:
    """Token ids of prompts: exactly one beginning-of-text token, and the separator where the tokenizer has one.

    A chat template may have written the first token already. Without any token an empty prompt becomes the
    end-of-text token, so that there is something to answer.
    """
    start = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    end = [] if tokenizer.sep_token_id is None else [tokenizer.sep_token_id]
    return [
        np.array((start if ids[:1] != start else []) + ids + end or [tokenizer.eos_token_id], dtype=np.int64)
        for ids in tokenizer(prompts, add_special_tokens=False)["input_ids"]
    ]


def response_ids(responses: list[str], tokenizer) -> list[np.ndarray]:
    """Token ids of responses, the end-of-text token appended."""
    ids = tokenizer(responses, add_special_tokens=False)["input_ids"]
    return [np.array([*tokens, tokenizer.eos_token_id]) for tokens in ids]


def is_encoder(tokenizer) -> bool:
    """Whether a tokenizer belongs to an encoder: only those open a text with a token to classify it by."""
    return tokenizer.cls_token_id is not None


def feature_pairs(preferences: Dataset, features: Tensor, ids: list[str]) -> FeaturePairs:
    """Pairs over cached ``features`` whose rows belong to response ``ids``. Raises ``KeyError`` for an unknown id."""
    place = {name: i for i, name in enumerate(ids)}
    chosen, rejected = ([place[name] for name in preferences[f"{side}_id"]] for side in ("chosen", "rejected"))
    return FeaturePairs(features, np.array(chosen), np.array(rejected))


@dataclass(frozen=True)
class Responses:
    """Token ids of prompts and responses: demonstrations, or what a policy has said."""

    prompt: list[np.ndarray]
    response: list[np.ndarray]
    pad_id: int

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of prompt and response together, shape (responses,)."""
        return np.array([len(p) + len(r) for p, r in zip(self.prompt, self.response, strict=True)])

    def collate(self, rows: np.ndarray) -> dict[str, Tensor]:
        """Right-padded texts of ``rows``, ``response_ids`` and their ``mask`` (rows, tokens).

        ``at`` is the position before each response token, from which it is foretold; ``end`` (rows, 1) the last one.
        """
        texts = [torch.from_numpy(np.concatenate([self.prompt[i], self.response[i]])) for i in rows]
        ids = pad_sequence(texts, batch_first=True, padding_value=self.pad_id)
        said = pad_sequence([torch.from_numpy(self.response[i]) for i in rows], batch_first=True)
        start = torch.tensor([len(self.prompt[i]) for i in rows])[:, None]
        end = torch.tensor([len(text) for text in texts])[:, None] - 1
        before = start - 1 + torch.arange(said.shape[1])[None]
        length = ids.shape[1]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones(length, length, dtype=torch.bool).tril().expand(len(rows), 1, -1, -1),
            "position_ids": torch.arange(length).expand(len(rows), -1),
            "response_ids": said,
            "mask": before < end,
            "at": before.clamp(max=end),
            "end": end,
        }
