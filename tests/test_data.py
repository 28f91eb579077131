"""Preference sets and batches: what labels are drawn from what truth, what is left out, what a model sees."""

from collections import Counter

import numpy as np
import pytest
import torch
from datasets import Dataset
from tokenizers.processors import TemplateProcessing

from rmlib import data, models, world

# ---------------------------------------------------------------- labels in the world


def test_only_the_splits_of_preferences_become_pairs(tiny_pairs):
    assert Counter(pair["split"] for pair in tiny_pairs) == dict.fromkeys(("train", "validation", "test", "ood"), 12)


def test_labels_repeat_with_their_seed_only(many_pairs, tiny_pairs, tiny_preferences):
    assert data.draw_labels(tiny_pairs, seed=0).to_list() == tiny_preferences.to_list()
    labels = [np.array(data.draw_labels(many_pairs, seed)["chosen_id"]) for seed in (0, 1)]
    # two people contradict each other where just one is wrong: 2 x 0.28 x 0.72 of the pairs if errors were alike
    assert 0.3 < (labels[0] != labels[1]).mean() < 0.45


def test_a_labelled_pair_holds_both_responses_with_their_own_gold(tiny_pairs, tiny_preferences):
    texts_and_ids = ["prompt", "chosen", "rejected", "chosen_id", "rejected_id"]
    columns = ["pair_id", "prompt_id", *texts_and_ids, "subset", "topic", "split", "gold_chosen", "gold_rejected"]
    assert tiny_preferences.column_names == columns
    for pair, row in zip(tiny_pairs, tiny_preferences, strict=True):
        chosen, rejected = ("a", "b") if row["chosen_id"] == pair["id_a"] else ("b", "a")
        for name, side in (("chosen", chosen), ("rejected", rejected)):
            told = row[name], row[f"{name}_id"], row[f"gold_{name}"]
            assert told == (pair[f"response_{side}"], pair[f"id_{side}"], pair[f"gold_{side}"])
        assert row["pair_id"] == pair["pair_id"]


def test_truth_in_the_world_is_the_gold_of_chosen_minus_rejected(tiny_preferences):
    by_hand = [row["gold_chosen"] - row["gold_rejected"] for row in tiny_preferences]
    np.testing.assert_array_equal(data.truth(tiny_preferences), by_hand)


def test_truth_is_positive_where_a_careful_annotator_labels_and_negative_where_a_contrary_one_does(tiny_pairs):
    careful = world.Annotator(temperature=0.01, careless_rate=0.0)
    contrary = world.Annotator(temperature=0.01, careless_rate=1.0)
    decided = [pair for pair in tiny_pairs if abs(pair["gold_a"] - pair["gold_b"]) > 0.1]
    assert (data.truth(data.draw_labels(decided, 0, careful)) > 0).all()
    assert (data.truth(data.draw_labels(decided, 0, contrary)) < 0).all()


def test_set_without_truth_raises(tiny_preferences):
    with pytest.raises(KeyError, match="neither gold_chosen, gold_rejected nor votes"):
        data.truth(tiny_preferences.remove_columns(["gold_chosen", "gold_rejected"]))


# ---------------------------------------------------------------- which rows form a batch

LENGTHS = np.random.default_rng(0).integers(10, 120, size=1000)


def padding(batches: list[np.ndarray]) -> float:
    """Share of padding in batches that are as long as their longest row."""
    return 1 - LENGTHS[np.concatenate(batches)].sum() / sum(len(rows) * LENGTHS[rows].max() for rows in batches)


def random_batches(rows: np.ndarray) -> list[np.ndarray]:
    return np.array_split(np.random.default_rng(0).permutation(rows), len(rows) // 16)


@pytest.mark.parametrize("rows", [np.arange(1000), np.arange(1, 1000, 3), np.arange(5)])
def test_every_row_stands_in_one_batch_of_an_epoch(rows):
    for batches in (
        data.length_batches(LENGTHS, rows, 16, np.random.default_rng(0)),
        data.score_batches(LENGTHS, rows, 16),
    ):
        assert sorted(np.concatenate(batches)) == rows.tolist()
        assert sorted(map(len, batches), reverse=True) == [16] * (len(rows) // 16) + [len(rows) % 16]


def test_batches_of_like_length_hardly_pad():
    ours = padding(data.length_batches(LENGTHS, np.arange(1000), 16, np.random.default_rng(0)))
    at_random = padding(random_batches(np.arange(1000)))
    assert at_random > 0.35
    assert ours < 0.06
    assert padding(data.score_batches(LENGTHS, np.arange(1000), 16)) < ours


def test_batches_repeat_with_their_seed_only():
    epochs = [data.length_batches(LENGTHS, np.arange(1000), 16, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    flat = [np.concatenate(epoch).tolist() for epoch in epochs]
    assert flat[0] == flat[1] != flat[2]


def test_one_generator_gives_another_order_each_epoch():
    rng = np.random.default_rng(0)
    first, second = (data.length_batches(LENGTHS, np.arange(1000), 16, rng) for _ in range(2))
    companions = [{frozenset(rows.tolist()) for rows in epoch} for epoch in (first, second)]
    assert not companions[0] & companions[1]


def test_batches_do_not_come_sorted_by_length():
    batches = data.length_batches(LENGTHS, np.arange(1000), 16, np.random.default_rng(0))
    longest = np.array([LENGTHS[rows].max() for rows in batches])
    assert abs(np.corrcoef(longest, np.arange(len(longest)))[0, 1]) < 0.4
    scored = np.array([LENGTHS[rows].max() for rows in data.score_batches(LENGTHS, np.arange(1000), 16)])
    assert (np.diff(scored) >= 0).all()


# ---------------------------------------------------------------- batches of a causal model

BOS, SEP, EOS, PAD = 1, 2, 3, 0


def hand_made_pairs(pad_id: int = PAD) -> data.CausalPairs:
    prompt = [[BOS, 10, SEP], [BOS, 11, 12, SEP]]
    chosen, rejected = [[20, 21, EOS], [22, EOS]], [[30, EOS], [31, 32, 33, EOS]]
    return data.CausalPairs(*([np.array(ids) for ids in part] for part in (prompt, chosen, rejected)), pad_id)


def collate_both(pairs, flipped=(False, False)) -> dict[str, torch.Tensor]:
    return pairs.collate(np.array([0, 1]), np.array(flipped))


def test_a_row_is_prompt_chosen_rejected_and_padding():
    pairs = hand_made_pairs()
    assert pairs.lengths.tolist() == [8, 10]
    assert collate_both(pairs)["input_ids"].tolist() == [
        [BOS, 10, SEP, 20, 21, EOS, 30, EOS, PAD, PAD],
        [BOS, 11, 12, SEP, 22, EOS, 31, 32, 33, EOS],
    ]


def test_positions_of_the_rejected_response_restart_after_the_prompt():
    positions = collate_both(hand_made_pairs())["position_ids"]
    assert positions[0, :8].tolist() == [0, 1, 2, 3, 4, 5, 3, 4]
    assert positions[1].tolist() == [0, 1, 2, 3, 4, 5, 4, 5, 6, 7]


def test_mask_is_causal_and_hides_chosen_from_rejected():
    mask = collate_both(hand_made_pairs())["attention_mask"]
    assert mask.shape == (2, 1, 10, 10)
    for row, parts in enumerate(("pppcccrr", "ppppccrrrr")):
        for query, own in enumerate(parts):
            for key, other in enumerate(parts):
                seen = key <= query and not (own == "r" and other == "c")
                assert mask[row, 0, query, key].item() is seen
    assert mask.any(-1).all()  # padding sees something too: an empty row of attention would be NaN


def test_padding_is_seen_by_no_real_token():
    mask = collate_both(hand_made_pairs())["attention_mask"]
    assert not mask[0, 0, :8, 8:].any()


def test_a_row_is_read_at_the_end_token_of_chosen_then_of_rejected():
    batch = collate_both(hand_made_pairs())
    assert batch["at"].tolist() == [[5, 7], [5, 9]]
    assert (batch["input_ids"].gather(1, batch["at"]) == EOS).all()


def marks(batch: dict[str, torch.Tensor]) -> list[str]:
    """The mask of what is imitated, a row a text."""
    return ["".join("x" if said else "." for said in row) for row in batch["imitated"].tolist()]


def test_exactly_the_chosen_tokens_are_imitated():
    batch = collate_both(hand_made_pairs())
    assert marks(batch) == ["...xxx....", "....xx...."]
    assert batch["input_ids"][batch["imitated"]].tolist() == [20, 21, EOS, 22, EOS]


def test_of_a_flipped_pair_the_tokens_that_stand_first_are_imitated():
    batch = collate_both(hand_made_pairs(), flipped=(True, False))
    assert marks(batch) == ["...xx.....", "....xx...."]
    assert batch["input_ids"][batch["imitated"]].tolist() == [30, EOS, 22, EOS]


@pytest.mark.parametrize("flip", [False, True])
def test_the_imitated_tokens_of_any_batch_are_its_chosen_responses(tiny_preferences, tokenizer, flip):
    pairs = data.causal_pairs(tiny_preferences, tokenizer, max_length=200)
    rows = np.random.default_rng(0).permutation(len(tiny_preferences))[:20]
    batch = pairs.collate(rows, np.full(len(tiny_preferences), flip))
    first, second = (pairs.rejected, pairs.chosen) if flip else (pairs.chosen, pairs.rejected)
    for i, row in enumerate(rows):
        assert batch["input_ids"][i, batch["imitated"][i]].tolist() == first[row].tolist()
        assert first[row].tolist() != second[row].tolist()


def test_flipped_pairs_swap_their_responses():
    batch = collate_both(hand_made_pairs(), flipped=(True, False))
    assert batch["input_ids"][0, :8].tolist() == [BOS, 10, SEP, 30, EOS, 20, 21, EOS]
    assert batch["input_ids"][1].tolist() == collate_both(hand_made_pairs())["input_ids"][1].tolist()
    assert batch["at"].tolist() == [[4, 7], [5, 9]]


def test_flips_are_looked_up_by_pair_and_not_by_place_in_the_batch():
    batch = hand_made_pairs().collate(np.array([1]), np.array([False, True]))
    assert batch["input_ids"].tolist() == [[BOS, 11, 12, SEP, 31, 32, 33, EOS, 22, EOS]]


def test_padding_with_the_end_token_changes_no_mask_position_or_end():
    ours, usual = collate_both(hand_made_pairs(pad_id=EOS)), collate_both(hand_made_pairs())
    assert ours["input_ids"][0, 8:].tolist() == [EOS, EOS]
    for name in ("attention_mask", "position_ids", "at", "imitated"):
        assert torch.equal(ours[name], usual[name])


TEXTS = [
    [[BOS, 10, SEP], [20, 21, EOS], [30, EOS], [40, 41, 42, EOS]],
    [[BOS, 11, 12, SEP], [EOS], [31, EOS], [22, EOS]],
]


def grouped(k: int, pad_id: int = PAD) -> dict[str, torch.Tensor]:
    """Both prompts with their first ``k`` responses."""
    return data.grouped([[np.array(ids) for ids in text[: k + 1]] for text in TEXTS], pad_id)


def test_a_group_is_its_prompt_and_its_responses_one_after_another():
    batch = grouped(3)
    assert batch["input_ids"].tolist() == [
        [BOS, 10, SEP, 20, 21, EOS, 30, EOS, 40, 41, 42, EOS],
        [BOS, 11, 12, SEP, EOS, 31, EOS, 22, EOS, PAD, PAD, PAD],
    ]
    assert batch["position_ids"][0].tolist() == [0, 1, 2, 3, 4, 5, 3, 4, 3, 4, 5, 6]
    assert batch["position_ids"][1, :9].tolist() == [0, 1, 2, 3, 4, 4, 5, 4, 5]
    assert batch["at"].tolist() == [[5, 7, 11], [4, 6, 8]]


@pytest.mark.parametrize("k", [1, 2, 3])
def test_the_mask_of_a_group_is_causal_and_no_response_sees_another(k):
    mask = grouped(k)["attention_mask"]
    for row, text in enumerate(TEXTS):
        parts = [part for part, ids in enumerate(text[: k + 1]) for _ in ids]
        for query, own in enumerate(parts):
            seen = [key <= query and other in (0, own) for key, other in enumerate(parts)]
            assert mask[row, 0, query, : len(parts)].tolist() == seen
        assert not mask[row, 0, : len(parts), len(parts) :].any()
    assert mask.any(-1).all()  # padding sees something too: an empty row of attention would be NaN


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("pad_id", [PAD, EOS])
def test_exactly_the_first_response_of_a_group_is_imitated(k, pad_id):
    batch = grouped(k, pad_id)
    assert [batch["input_ids"][i, batch["imitated"][i]].tolist() for i in (0, 1)] == [text[1] for text in TEXTS]


def test_a_group_of_two_is_a_pair():
    pairs = data.CausalPairs(*([np.array(text[part]) for text in TEXTS] for part in range(3)), PAD)
    for flip, order in ((False, [0, 1, 2]), (True, [0, 2, 1])):
        batch = data.grouped([[np.array(text[part]) for part in order] for text in TEXTS], PAD)
        pair = collate_both(pairs, flipped=(flip, flip))
        assert batch.keys() == pair.keys()
        assert all(torch.equal(batch[name], pair[name]) for name in pair)


def test_tokenized_pairs_begin_once_and_end_once(tiny_preferences, tokenizer):
    pairs = data.causal_pairs(tiny_preferences, tokenizer, max_length=200)
    for ids in pairs.prompt:
        assert ids[0] == tokenizer.bos_token_id
        assert ids[-1] == tokenizer.sep_token_id
        assert (ids == tokenizer.bos_token_id).sum() == (ids == tokenizer.sep_token_id).sum() == 1
    for ids in pairs.chosen + pairs.rejected:
        assert ids[-1] == tokenizer.eos_token_id
        assert (ids == tokenizer.eos_token_id).sum() == 1
        assert not set(ids) & {tokenizer.bos_token_id, tokenizer.sep_token_id}


def test_tokenized_pairs_read_back_as_their_texts(tiny_preferences, tokenizer):
    pairs = data.causal_pairs(tiny_preferences, tokenizer, max_length=200)
    for i, row in enumerate(tiny_preferences):
        ids = {"prompt": pairs.prompt[i][1:-1], "chosen": pairs.chosen[i][:-1], "rejected": pairs.rejected[i][:-1]}
        assert {name: world.english(tokenizer.decode(part)) for name, part in ids.items()} == {
            name: row[name] for name in ids
        }


def test_tokenizer_that_adds_its_own_beginning_gives_one_all_the_same():
    tokenizer = models.word_tokenizer(world.vocabulary())
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    assert tokenizer("make tea")["input_ids"][0] == tokenizer.bos_token_id
    ids = data.prompt_ids(["make tea"], tokenizer)[0]
    assert (ids == tokenizer.bos_token_id).sum() == 1
    assert tokenizer.bos_token_id not in data.response_ids(["boil the water"], tokenizer)[0]


def test_an_empty_prompt_of_a_tokenizer_without_beginning_or_separator_holds_integers():
    tokenizer = models.word_tokenizer(world.vocabulary())
    tokenizer.bos_token = tokenizer.sep_token = None
    assert data.prompt_ids([""], tokenizer)[0].dtype == np.int64


def test_too_long_a_pair_raises_with_its_name_and_row(tiny_preferences, tokenizer):
    fits = data.causal_pairs(tiny_preferences, tokenizer, max_length=200)
    longest = [len(p) + max(len(c), len(r)) for p, c, r in zip(fits.prompt, fits.chosen, fits.rejected, strict=True)]
    assert len(data.causal_pairs(tiny_preferences, tokenizer, max_length=max(longest)).prompt) == len(longest)
    row = int(np.flatnonzero(np.array(longest) > max(longest) - 1)[0])
    name = tiny_preferences["pair_id"][row]
    with pytest.raises(ValueError, match=rf"pair '{name}' \(row {row}\): .* exceed max_length {max(longest) - 1}"):
        data.causal_pairs(tiny_preferences, tokenizer, max_length=max(longest) - 1)


# ---------------------------------------------------------------- demonstrations


def test_demonstrations_are_learnt_on_response_tokens_alone():
    demonstrations = data.Responses(
        [np.array([BOS, 10, SEP]), np.array([BOS, SEP])], [np.array([20, EOS]), np.array([21, 22, 23, EOS])], pad_id=EOS
    )
    assert demonstrations.lengths.tolist() == [5, 6]
    batch = demonstrations.collate(np.array([0, 1]))
    assert batch["input_ids"].tolist() == [[BOS, 10, SEP, 20, EOS, EOS], [BOS, SEP, 21, 22, 23, EOS]]
    assert batch["response_ids"][batch["mask"]].tolist() == [20, EOS, 21, 22, 23, EOS]
    assert batch["mask"].int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]


# ---------------------------------------------------------------- batches of cached features

FEATURES = torch.arange(8.0).reshape(4, 2)
FEATURE_IDS = ["w", "x", "y", "z"]


def test_features_of_a_pair_are_those_of_its_responses():
    preferences = Dataset.from_dict({"chosen_id": ["x", "z", "w"], "rejected_id": ["w", "y", "z"]})
    pairs = data.feature_pairs(preferences, FEATURES, FEATURE_IDS)
    assert pairs.lengths.tolist() == [1, 1, 1]
    batch = pairs.collate(np.array([2, 0]), np.array([False, False, False]))
    assert batch["features"].shape == (4, 2)
    assert torch.equal(batch["features"], FEATURES[[0, 1, 3, 0]])
    flipped = pairs.collate(np.array([2, 0]), np.array([True, False, False]))
    assert torch.equal(flipped["features"], FEATURES[[0, 0, 3, 1]])


def test_features_of_an_unknown_response_raise_with_its_id():
    preferences = Dataset.from_dict({"chosen_id": ["x"], "rejected_id": ["nobody"]})
    with pytest.raises(KeyError, match="nobody"):
        data.feature_pairs(preferences, FEATURES, FEATURE_IDS)
