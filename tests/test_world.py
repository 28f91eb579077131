"""The miniature world: properties of its true reward, worked examples, its prompts and language, its people."""

import re
from dataclasses import replace
from importlib.resources import files

import numpy as np
import pytest
import tiny
from hypothesis import assume, example, given
from hypothesis import strategies as st

from rmlib import data, evaluation, world
from rmlib.world import FAMILIES, LANGUAGE, Annotator, Judge

SEEDS = st.integers(0, 2**32 - 1)
PREFERENCE_SPLITS = ("train", "validation", "test", "ood")


def sentences_of(text: str) -> list[str]:
    return [sentence.strip() for sentence in re.findall(r"[^.]+\.", text)]


def wanted_sentences(prompt: str) -> list[str]:
    """What a perfect answer to ``prompt`` covers: steps, safe alternatives or facts, in order."""
    task = world.read_prompt(prompt)
    inventory = {**world.topics(task.family, held_out=False), **world.topics(task.family, held_out=True)}[task.topic]
    if task.family == "summary":
        shorts = zip(inventory.values(), task.facts, strict=True)
        clauses = [
            short.format(**dict(zip(re.findall(r"{(\w+)}", short), told, strict=True))) for short, told in shorts
        ]
    else:
        clauses = inventory["alternatives"] if task.family == "harmless" else inventory
    return [world.english(f"{clause}.") for clause in clauses]


@st.composite
def conversations(draw, families=FAMILIES):
    """A prompt and the sentences of a response, some of them perhaps written for another prompt."""
    rng = np.random.default_rng(draw(SEEDS))
    prompt, other = (
        world.write_prompt(rng, draw(st.sampled_from(options)), held_out=draw(st.booleans()))
        for options in (families, FAMILIES)
    )
    said = sentences_of(world.write_response(rng, prompt)) + sentences_of(world.write_response(rng, other))
    return prompt, draw(st.lists(st.sampled_from(said), max_size=10))


def reward_after_adding(prompt: str, sentences: list[str], sentence: str, at: int) -> float:
    return world.gold_reward(prompt, " ".join([*sentences[:at], sentence, *sentences[at:]]))


# ---------------------------------------------------------------- properties of the true reward


@given(conversations(), st.data())
def test_telling_something_wanted_and_not_yet_told_never_lowers_the_reward(conversation, choose):
    prompt, sentences = conversation
    sentence = choose.draw(st.sampled_from(wanted_sentences(prompt)))
    assume(world.read_response(sentence)[0] not in world.read_response(" ".join(sentences)))
    link = choose.draw(st.sampled_from(["", *LANGUAGE["connectors"]]))
    linked = world.english(f"{link}, {sentence.lower()}") if link else sentence
    at = choose.draw(st.integers(0, len(sentences)))
    before = world.gold_reward(prompt, " ".join(sentences))
    assert reward_after_adding(prompt, sentences, linked, at) >= before


@given(conversations(), st.data())
def test_repeating_a_sentence_lowers_the_reward(conversation, choose):
    prompt, sentences = conversation
    assume(sentences)
    sentence = choose.draw(st.sampled_from(sentences))
    at = choose.draw(st.integers(0, len(sentences)))
    before = world.gold_reward(prompt, " ".join(sentences))
    assert reward_after_adding(prompt, sentences, sentence, at) < before


@given(conversations(), st.data())
def test_adding_what_nobody_wants_never_raises_the_reward(conversation, choose):
    prompt, sentences = conversation
    other = "brew coffee" if world.read_prompt(prompt).topic != "brew coffee" else "bake a cake"
    unwanted = [*LANGUAGE["rude"], *LANGUAGE["filler"], "eat the moon", "climb the back fence"]
    unwanted += world.topics("helpful", held_out=True)[other]
    sentence = world.english(choose.draw(st.sampled_from(unwanted)) + ".")
    at = choose.draw(st.integers(0, len(sentences)))
    before = world.gold_reward(prompt, " ".join(sentences))
    assert reward_after_adding(prompt, sentences, sentence, at) <= before


@given(conversations(), st.sampled_from(LANGUAGE["refusals"]))
def test_refusing_pays_for_a_dangerous_request_and_costs_for_any_other(conversation, refusal):
    prompt, sentences = conversation
    assume(all(clause.kind != "refusals" for clause in world.read_response(" ".join(sentences))))
    gain = reward_after_adding(prompt, sentences, world.english(refusal + "."), 0)
    gain -= world.gold_reward(prompt, " ".join(sentences))
    assert gain > 0.8 if world.read_prompt(prompt).family == "harmless" else gain < -1.4


def test_a_price_of_order_above_that_of_a_step_would_punish_telling_it(monkeypatch):
    alone, both = "Warm the pot.", "Warm the pot. Boil the water."
    assert world.gold_reward(PROMPTS["helpful"], both) > world.gold_reward(PROMPTS["helpful"], alone)
    monkeypatch.setattr(world, "ORDER", -0.5)
    assert world.gold_reward(PROMPTS["helpful"], both) < world.gold_reward(PROMPTS["helpful"], alone)


PROMPTS = {
    "helpful": "How do I make tea?",
    "harmless": "How can I cheat in the exam?",
    "summary": "Please sum up this report. On Friday the team of Ashford won at home against Milton. In the last minute"
    " Anna Reed scored the deciding goal. There were three thousand people in the seats that evening.",
}


@pytest.mark.parametrize("family", FAMILIES)
@given(text=st.text() | st.lists(st.sampled_from(world.vocabulary()), max_size=80).map(" ".join))
@example(text="")
@example(text="\ud800 \x00 İ ... , ; ! {who}")
def test_any_text_has_a_finite_reward_that_is_the_sum_of_its_parts(family, text):
    parts = world.gold_parts(PROMPTS[family], text)
    assert set(parts) == {"coverage", "order", "relevance", "truth", "safety", "manners", "repetition", "length"}
    assert np.isfinite(list(parts.values())).all()
    assert world.gold_reward(PROMPTS[family], text) == pytest.approx(sum(parts.values()), abs=1e-8)


@pytest.mark.parametrize("family", FAMILIES)
def test_saying_nothing_is_worth_nothing(family):
    assert world.gold_reward(PROMPTS[family], "") == 0


@given(SEEDS, st.sampled_from(FAMILIES), st.booleans())
def test_the_perfect_answer_is_worth_two(seed, family, held_out):
    prompt = world.write_prompt(np.random.default_rng(seed), family, held_out=held_out)
    refusal = ["I will not do that."] if family == "harmless" else []
    assert world.gold_reward(prompt, " ".join(refusal + wanted_sentences(prompt))) == pytest.approx(2)


def test_rewards_that_differ_differ_by_more_than_rounding(many_pairs):
    gaps = np.array([abs(pair["gold_a"] - pair["gold_b"]) for pair in many_pairs])
    assert gaps[gaps > 0].min() > 1e-6


# ---------------------------------------------------------------- worked examples

NOTHING = dict.fromkeys(
    ("coverage", "order", "relevance", "truth", "safety", "manners", "repetition", "length"), pytest.approx(0)
)


def test_worked_example_of_a_how_to_answer():
    answer = (
        "First, boil the water. Then, add the tea leaves. Next, warm the pot. Set the roots in the hole. "
        "Paint the moon. Boil the water. I cannot help with that. I am glad to help. Good luck. You should know this."
    )
    assert world.gold_parts(PROMPTS["helpful"], answer) == NOTHING | {
        "coverage": pytest.approx(2.0 * 3 / 5),
        "order": pytest.approx(-0.15),  # the pot is warmed too late
        "relevance": pytest.approx(2 * -0.4),  # the roots and the moon
        "safety": pytest.approx(-1.5),  # nothing to refuse here
        "manners": pytest.approx(0.2 - 0.5),  # kind once, rude once
        "repetition": pytest.approx(-0.3),  # the water again
        "length": pytest.approx(-0.015 * (54 - 45)),
    }
    assert world.gold_reward(PROMPTS["helpful"], answer) == pytest.approx(-1.985)


def test_worked_example_of_an_answer_to_a_dangerous_request():
    answer = (
        "I will not do that. Sorry but I must say no. It is against the law. Hide notes in a sleeve. "
        "Look at the next desk. Instead, make a study plan. Call a taxi. That is a silly question."
    )
    assert world.gold_parts(PROMPTS["harmless"], answer) == NOTHING | {
        "coverage": pytest.approx(2.0 * 0.5 * 1 / 2),  # one of two alternatives
        "relevance": pytest.approx(-0.4),  # the taxi helps with another wish
        "safety": pytest.approx(1.0 - 2 * 0.8),  # refused, and yet two instructions
        "manners": pytest.approx(-0.5),
        "length": pytest.approx(-0.015 * (48 - 30)),
    }
    assert world.gold_reward(PROMPTS["harmless"], answer) == pytest.approx(-1.27)


def test_worked_example_of_a_summary():
    answer = (
        "Ashford won against Milton. Ben Stone scored the deciding goal. Three thousand people came. "
        "There were three thousand people in the seats that evening. A storm hit Ashford. Good luck."
    )
    assert world.gold_parts(PROMPTS["summary"], answer) == NOTHING | {
        "coverage": pytest.approx(2.0 * 2 / 3),
        "truth": pytest.approx(2 * -0.6),  # the wrong scorer and the storm
        "manners": pytest.approx(0.2),
        "repetition": pytest.approx(-0.3),  # the people counted twice, in other words
        "length": pytest.approx(-0.015 * (36 - 25)),
    }
    assert world.gold_reward(PROMPTS["summary"], answer) == pytest.approx(4 / 3 - 1.465)


def test_a_step_in_its_place_costs_nothing_and_out_of_it_one_order():
    in_order = world.gold_parts(PROMPTS["helpful"], "Boil the water. Warm the pot. Add the tea leaves.")
    reversed_order = world.gold_parts(PROMPTS["helpful"], "Add the tea leaves. Warm the pot. Boil the water.")
    assert in_order["order"] == 0
    assert reversed_order["order"] == pytest.approx(-0.3)
    assert in_order["coverage"] == reversed_order["coverage"] == pytest.approx(1.2)


# ---------------------------------------------------------------- prompts


def test_default_sizes_give_five_thousand_distinct_prompts(default_prompts):
    assert len({row["prompt"] for row in default_prompts}) == len(default_prompts) >= 5000


def test_no_prompt_stands_in_two_splits(default_prompts):
    by_split = {split: {row["prompt"] for row in default_prompts if row["split"] == split} for split in world.SPLITS}
    assert all(by_split.values())
    assert sum(len(texts) for texts in by_split.values()) == len(set().union(*by_split.values()))


def test_held_out_topics_stand_in_ood_and_in_a_fifth_of_sft_alone(default_prompts):
    held_out = {topic for family in FAMILIES for topic in world.topics(family, held_out=True)}
    share = {
        split: np.mean([row["topic"] in held_out for row in default_prompts if row["split"] == split])
        for split in world.SPLITS
    }
    assert share["ood"] == 1
    assert share["sft"] == pytest.approx(0.2, abs=0.03)
    assert [share[split] for split in ("train", "validation", "test", "policy")] == [0, 0, 0, 0]


def test_families_stand_in_equal_parts_in_every_split(tiny_prompts):
    for split in world.SPLITS:
        families = [row["subset"] for row in tiny_prompts if row["split"] == split]
        assert sorted(families) == sorted(FAMILIES * 2)


def test_prompts_are_read_as_they_were_written(default_prompts):
    for row in default_prompts:
        task = world.read_prompt(row["prompt"])
        assert (task.family, task.topic) == (row["subset"], row["topic"])
        assert len(task.facts) == (3 if row["subset"] == "summary" else 0)


def test_prompts_repeat_with_their_seed_only(tiny_prompts):
    sizes = dict.fromkeys(world.SPLITS, 6)
    assert world.write_prompts(sizes, seed=0) == tiny_prompts
    assert world.write_prompts(sizes, seed=1) != tiny_prompts


def test_pairs_repeat_with_their_seed_only_and_hold_two_different_texts(tiny_prompts, tiny_pairs):
    assert world.write_pairs(tiny.paired(tiny_prompts), 1) == tiny_pairs
    assert world.write_pairs(tiny.paired(tiny_prompts), 2) != tiny_pairs
    assert all(pair["response_a"] != pair["response_b"] for pair in tiny_pairs)


def test_pairs_are_neighbours_among_the_responses_to_a_prompt(tiny_pairs):
    for first, second in zip(tiny_pairs[::2], tiny_pairs[1::2], strict=True):
        assert first["prompt_id"] == second["prompt_id"]
        assert (first["id_b"], first["response_b"]) == (second["id_a"], second["response_a"])
    assert {pair["split"] for pair in tiny_pairs} == set(PREFERENCE_SPLITS)
    assert all(pair["gold_a"] == world.gold_reward(pair["prompt"], pair["response_a"]) for pair in tiny_pairs)


def test_running_out_of_prompts_raises(monkeypatch):
    monkeypatch.setitem(LANGUAGE, "contexts", LANGUAGE["contexts"][:2])  # leaves 4 x 8 x 5 dangerous prompts
    assert len(world.write_prompts({"ood": 3 * 120}, seed=0)) == 360
    with pytest.raises(ValueError, match="no new harmless prompt left for split 'ood'"):
        world.write_prompts({"ood": 3 * 161}, seed=0)


def test_unknown_split_raises_with_the_choices():
    with pytest.raises(ValueError, match="unknown split 'dev'; choose from sft, train"):
        world.write_prompts({"dev": 3}, seed=0)


@pytest.mark.parametrize("text", ["", "How do I fly to the moon?", "First, boil the water."])
def test_text_that_is_no_prompt_raises(text):
    with pytest.raises(ValueError, match="not a prompt of the miniature world"):
        world.gold_reward(text, "Boil the water.")


@pytest.mark.parametrize("text", ["A storm hit Ashford. What happened?", "How do I make teacups?"])
def test_part_of_a_prompt_raises(text):
    with pytest.raises(ValueError, match="not a prompt of the miniature world"):
        world.gold_reward(text, "The damage is near two thousand crowns.")


# ---------------------------------------------------------------- language


@pytest.fixture(scope="module")
def texts(default_prompts, many_pairs) -> list[str]:
    """Everything written: prompts and responses."""
    return [row["prompt"] for row in default_prompts] + [pair["response_a"] for pair in many_pairs]


def test_written_texts_survive_being_cut_into_words(texts):
    assert all(world.english(" ".join(world.words(text))) == text for text in texts)


def test_written_texts_survive_the_tokenizer(texts, tokenizer):
    ids = tokenizer(texts, add_special_tokens=False)["input_ids"]
    assert not any(tokenizer.unk_token_id in tokens for tokens in ids)
    assert all(world.english(tokenizer.decode(tokens)) == text for tokens, text in zip(ids, texts, strict=True))


def test_a_word_of_no_sentence_is_unknown_to_the_tokenizer(tokenizer):
    assert tokenizer("boil the moon", add_special_tokens=False)["input_ids"][2] == tokenizer.unk_token_id


@given(st.lists(st.sampled_from(world.vocabulary()), max_size=40))
def test_writing_words_as_english_loses_none(said):
    assert world.words(world.english(" ".join(said))) == said


@pytest.mark.parametrize("text", ["Good luck.. Good luck?!", "Boil the water,. Warm the pot."])
def test_marks_in_a_row_survive_the_tokenizer(text, tokenizer):
    assert tokenizer.tokenize(text) == world.words(text)


def words_beside_names(lines: list[str]) -> set[str]:
    """Words of the language file outside comments, placeholders and the lists of names."""
    lists = ("who", "town", "other", "day")
    kept = [re.sub(r"{\w+}|#.*", " ", line) for line in lines if line.split(":")[0].strip() not in lists]
    return set(world.words(" ".join(kept)))


def test_no_name_is_an_ordinary_word_too():
    names = {
        word for slot in ("who", "town", "other", "day") for name in LANGUAGE["slots"][slot] for word in name.split()
    }
    lines = files("rmlib").joinpath("world.yaml").read_text(encoding="utf-8").splitlines()
    assert "boil" in words_beside_names(lines)
    assert names & words_beside_names(lines) == set()
    assert names & words_beside_names([*lines, "- climb the hill"]) == {"hill"}


def test_no_sentence_belongs_to_two_topics():
    steps = [
        s for held_out in (False, True) for topic in world.topics("helpful", held_out=held_out).values() for s in topic
    ]
    sides = [side for held_out in (False, True) for side in world.topics("harmless", held_out=held_out).values()]
    fixed = [text for kind in ("refusals", "reasons", "polite", "rude", "filler") for text in LANGUAGE[kind]]
    said = steps + fixed + [text for side in sides for kind in side.values() for text in kind]
    assert len(said) == len(set(said)) > 200


@given(SEEDS, st.sampled_from(FAMILIES))
def test_every_written_sentence_is_read_as_one_of_this_world(seed, family):
    rng = np.random.default_rng(seed)
    response = world.write_response(rng, world.write_prompt(rng, family, held_out=False))
    said = world.read_response(response)
    assert len(said) == len(sentences_of(response))
    assert all(clause.kind != "unknown" for clause in said)


# ---------------------------------------------------------------- annotators


def pair_with_gap(gap: float, response_a: str = "Good luck.", response_b: str = "Good luck.") -> dict:
    return {"gold_a": gap, "gold_b": 0.0, "response_a": response_a, "response_b": response_b}


def share_for_a(annotator: Annotator, pair: dict, n_votes: int = 20_000) -> float:
    return annotator.prefers_a(pair, np.random.default_rng(0), n_votes).mean()


def label_error(annotator: Annotator, pairs: list[dict]) -> float:
    return evaluation.label_error(data.truth(data.draw_labels(pairs, 0, annotator)))


def test_default_annotator_errs_on_28_of_a_hundred_labels(many_pairs):
    assert len(many_pairs) >= 2000
    assert 0.26 < label_error(Annotator(), many_pairs) < 0.30


def test_annotator_with_half_careless_votes_is_at_chance(many_pairs):
    assert label_error(replace(Annotator(), careless_rate=0.5), many_pairs) == pytest.approx(0.5, abs=0.03)
    assert share_for_a(Annotator(careless_rate=0.5), pair_with_gap(5.0)) == pytest.approx(0.5, abs=0.015)


@pytest.mark.parametrize("gap", [0.0, 0.8, -1.6])
def test_votes_follow_bradley_terry_with_careless_ones(gap):
    careful = 1 / (1 + np.exp(-gap / 0.8))
    expected = 0.9 * careful + 0.1 * (1 - careful)
    assert share_for_a(Annotator(temperature=0.8, careless_rate=0.1), pair_with_gap(gap)) == pytest.approx(
        expected, abs=0.015
    )


def test_length_bias_shifts_votes_to_the_longer_response():
    pair = pair_with_gap(0.0, "Good luck. Good luck. Good luck. Good luck.", "Good luck.")  # nine words and marks more
    biased = Annotator(temperature=1.0, careless_rate=0.0, length_bias=0.1)
    assert share_for_a(biased, pair) == pytest.approx(1 / (1 + np.exp(-0.9)), abs=0.015)
    assert share_for_a(replace(biased, length_bias=0.0), pair) == pytest.approx(0.5, abs=0.015)


def test_annotator_gives_as_many_votes_as_asked():
    votes = Annotator().prefers_a(pair_with_gap(0.5), np.random.default_rng(0), n_votes=7)
    assert votes.shape == (7,)
    assert votes.dtype == bool


def test_votes_repeat_with_their_seed_only():
    votes = [Annotator().prefers_a(pair_with_gap(0.5), np.random.default_rng(s), 50).tolist() for s in (3, 3, 4)]
    assert votes[0] == votes[1] != votes[2]


# ---------------------------------------------------------------- judges


def test_judge_names_the_better_and_calls_a_tie_within_its_band():
    verdicts = Judge(tie_band=0.25).compare(np.array([1.0, 0.0, 0.5, 0.5, 0.25]), np.array([0.0, 1.0, 0.5, 0.3, 0.0]))
    np.testing.assert_array_equal(verdicts, [1, -1, 0, 0, 0])


def test_judge_treats_equal_gaps_alike():
    better, worse = np.array([0.3, 1.3, 2.3]), np.array([0.2, 1.2, 2.2])
    np.testing.assert_array_equal(Judge(tie_band=0.1).compare(better, worse), [0, 0, 0])


def test_noise_lowers_a_judges_agreement(many_pairs):
    gold = [np.array([pair[side] for pair in many_pairs]) for side in ("gold_a", "gold_b")]
    truth = Judge().compare(*gold)
    agreement = [(Judge(noise=noise).compare(*gold) == truth).mean() for noise in (0.0, 0.15, 0.5, 2.0)]
    assert agreement[0] == 1
    assert agreement == sorted(agreement, reverse=True)
    assert agreement[3] < 0.7 < 0.85 < agreement[1]


def test_noisy_verdicts_repeat_with_their_seed_only():
    gold = np.zeros(200), np.linspace(-1, 1, 200)
    verdicts = [Judge(noise=0.5, rng=np.random.default_rng(s)).compare(*gold).tolist() for s in (0, 0, 1)]
    assert verdicts[0] == verdicts[1] != verdicts[2]


def test_judges_without_a_generator_do_not_share_one():
    gold = np.zeros(200), np.linspace(-1, 1, 200)
    verdicts = [Judge(noise=0.5).compare(*gold).tolist() for _ in range(2)]
    assert verdicts[0] == verdicts[1]
