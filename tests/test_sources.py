"""Data from outside: all formats give the same rows, dialogues split at the last reply, no prompt has two splits."""

import gzip
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import papermill
import pytest
import tiny
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from rmlib import data, models, runs, sources

REAL = Path(os.environ.get("RMLIB_DATA", runs.ROOT / "data"))
TABLE = [
    {"prompt": "Tea?", "chosen": "Yes, please.", "rejected": "No."},
    {"prompt": "Tea?", "chosen": "Yes, please.", "rejected": 'She said "no",\nand left.'},
    {"prompt": "Café ☕?", "chosen": "Ça va.", "rejected": "No."},
]


def needs(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"{name} is not in {REAL}; RMLIB_DATA names the folder that holds it")
    return REAL / name


def lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def write(path: Path, rows: list[dict]) -> Path:
    """Rows as a reader would save them, in the format that the name says."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pd.DataFrame(rows).to_parquet(path)
    elif path.name.endswith(".csv"):
        pd.DataFrame(rows).to_csv(path, index=False)
    else:
        text = json.dumps(rows, indent=1) if ".json" in path.suffixes else lines(rows)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def read(path: Path, **settings) -> list[dict]:
    return sources.preference_rows("table", path, **{"validation_share": 0.5} | settings)


def read_rows(folder: Path, rows: list[dict], **settings) -> list[dict]:
    return read(write(folder / "mine.jsonl", rows), **settings)


def texts(rows: list[dict]) -> list[tuple[str, str, str]]:
    return [(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


# ---------------------------------------------------------------- a reader's own table


@pytest.mark.parametrize("ending", sources.ENDINGS)
def test_every_format_gives_the_same_rows(tmp_path, ending):
    rows = read(write(tmp_path / f"mine{ending}", TABLE))
    assert texts(rows) == texts(TABLE)
    assert rows == read_rows(tmp_path, TABLE)


def test_a_byte_order_mark_blank_lines_and_an_index_column_do_no_harm(tmp_path):
    expected = read_rows(tmp_path, TABLE)
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + lines(TABLE).replace("\n", "\r\n\r\n").encode())
    pd.DataFrame(TABLE).to_csv(tmp_path / "indexed.csv", encoding="utf-8-sig")
    (tmp_path / "marked.json").write_bytes(b"\xef\xbb\xbf" + json.dumps(TABLE).encode())
    for name in ("marked.jsonl", "indexed.csv", "marked.json"):
        assert read(tmp_path / name) == expected


def test_equal_texts_have_equal_ids_and_different_ones_have_not(tmp_path):
    first, second, third = read_rows(tmp_path, TABLE)
    assert first["prompt_id"] == second["prompt_id"] != third["prompt_id"]
    assert first["chosen_id"] == second["chosen_id"] != first["rejected_id"]
    assert first["rejected_id"] != third["rejected_id"], "the same words in answer to another prompt"
    assert len({row["pair_id"] for row in (first, second, third)}) == 3


def test_columns_of_the_reader_s_own_are_kept(tmp_path):
    own = {
        "subset": ["tea", "tea", "café"],
        "topic": ["a", "b", "c"],
        "split": ["train", "train", "ood"],
        "pair_id": [7, 8, 9],
    }
    rows = read_rows(tmp_path, [row | {name: own[name][n] for name in own} for n, row in enumerate(TABLE)])
    assert {name: [row[name] for row in rows] for name in own} == own | {"pair_id": ["7", "8", "9"]}


def test_a_table_without_subset_and_topic_has_one_of_each(tmp_path):
    assert {(row["subset"], row["topic"]) for row in read_rows(tmp_path, TABLE)} == {("whole set", "whole set")}


@pytest.mark.parametrize("written", ["1,-1,0", "[1, -1, 0]", " +1, -1 ,0"])
def test_votes_of_csv_are_read_from_text(tmp_path, written):
    path = write(tmp_path / "mine.csv", [row | {"votes": written} for row in TABLE])
    assert [row["votes"] for row in read(path)] == [[1, -1, 0]] * 3


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
def test_votes_are_the_truth_of_a_table(tmp_path, ending):
    votes = [[1, 1, -1], [0, -1], [1]]
    path = write(tmp_path / f"mine{ending}", [row | {"votes": v} for row, v in zip(TABLE, votes, strict=True)])
    assert data.truth(Dataset.from_list(read(path))).tolist() == [1.0, -1.0, 1.0]


@pytest.mark.parametrize("ending", sources.ENDINGS)
def test_gold_rewards_are_the_truth_of_a_table(tmp_path, ending):
    gold = [row | {"gold_chosen": 1.5, "gold_rejected": n} for n, row in enumerate(TABLE)]
    assert data.truth(Dataset.from_list(read(write(tmp_path / f"mine{ending}", gold)))).tolist() == [1.5, 0.5, -0.5]


def test_the_prompt_may_stand_in_a_column_of_another_name(tmp_path):
    rows = read_rows(
        tmp_path, [{"question": row["prompt"]} | row | {"prompt": 3} for row in TABLE], prompt_column="question"
    )
    assert texts(rows) == texts(TABLE)


def test_pairs_without_prompts_are_each_a_prompt_of_their_own(tmp_path):
    rows = read_rows(tmp_path, TABLE[:2], prompt_column=None)
    assert [row["prompt"] for row in rows] == ["", ""]
    assert {row["split"] for row in rows} == {"train", "validation"}
    words = tiny.tokenizer()
    assert data.prompt_ids([""], words)[0].tolist() == [words.bos_token_id, words.sep_token_id]


# ---------------------------------------------------------------- conversations


def said(role: str, content: str) -> list[dict]:
    return [{"role": role, "content": content}]


YES, NO = said("assistant", "Yes."), said("assistant", "No.")
ASKED = [said("system", "Be brief.") + said("user", word) for word in ("Tea?", "Milk?")]
FORMS = {
    "explicit": lambda asked: {"prompt": asked, "chosen": YES, "rejected": NO},
    "implicit": lambda asked: {"chosen": asked + YES, "rejected": asked + NO},
    "both": lambda asked: {"prompt": asked, "chosen": asked + YES, "rejected": asked + NO},
}


def chat_tokenizer():
    """The tiny tokenizer with a small chat template, which writes the first token of the text itself."""
    words = tiny.tokenizer()
    words.chat_template = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }} {% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    return words


def conversation(folder: Path, form: str, ending: str = ".jsonl", **settings) -> tuple[str, str, str]:
    path = write(folder / f"{form}{ending}", [FORMS[form](asked) for asked in ASKED])
    return texts(read(path, prompt_column=None if form == "implicit" else "prompt", **settings))[0]


@pytest.mark.parametrize("ending", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_turns_without_a_template_take_the_form_of_hh(tmp_path, form, ending):
    expected = ("\n\nBe brief.\n\nHuman: Tea?\n\nAssistant:", " Yes.", " No.")
    assert conversation(tmp_path, form, ending) == expected
    assert conversation(tmp_path, form, ending, tokenizer=tiny.tokenizer()) == expected


@pytest.mark.parametrize("form", FORMS)
def test_turns_go_through_the_tokenizer_s_own_template(tmp_path, form):
    expected = ("<bos>system: Be brief. user: Tea? assistant:", "Yes.", "No.")
    assert conversation(tmp_path, form, tokenizer=chat_tokenizer()) == expected


@pytest.mark.parametrize("words", [tiny.tokenizer(), chat_tokenizer()], ids=["plain", "chat"])
def test_a_prompt_begins_with_exactly_one_beginning_of_text(tmp_path, words):
    prompt, *_ = conversation(tmp_path, "explicit", tokenizer=words)
    ids = data.prompt_ids([prompt], words)[0].tolist()
    assert ids.count(words.bos_token_id) == 1 and ids[0] == words.bos_token_id


def test_earlier_turns_of_a_dialogue_belong_to_the_prompt(tmp_path):
    before = said("user", "Tea?") + YES + said("user", "With milk?")
    other = {"chosen": said("user", "Water?") + YES, "rejected": said("user", "Water?") + NO}
    rows = read_rows(tmp_path, [{"chosen": before + YES, "rejected": before + NO}, other], prompt_column=None)
    assert rows[0]["prompt"] == "\n\nHuman: Tea?\n\nAssistant: Yes.\n\nHuman: With milk?\n\nAssistant:"


def test_a_prompt_of_text_may_stand_before_replies_of_turns(tmp_path):
    rows = [{"prompt": word, "chosen": YES, "rejected": NO} for word in ("Tea?", "Milk?")]
    assert read_rows(tmp_path, rows)[0]["prompt"] == "\n\nHuman: Tea?\n\nAssistant:"


def test_the_template_of_a_tokenizer_is_told_and_empty_without_one():
    assert "m.role" in sources.chat_template(chat_tokenizer())
    assert sources.chat_template(tiny.tokenizer()) == sources.chat_template(None) == ""


# ---------------------------------------------------------------- splits


def many(n_prompts: int, n_pairs: int = 2) -> list[dict]:
    return [
        {"prompt": f"Question {n}?", "chosen": f"Good {k}.", "rejected": f"Bad {k}."}
        for n in range(n_prompts)
        for k in range(n_pairs)
    ]


def splits(rows: list[dict]) -> dict[str, set[str]]:
    return {split: {row["prompt"] for row in rows if row["split"] == split} for split in sources.SPLITS}


@given(st.integers(2, 12), st.integers(1, 3), st.floats(0.05, 0.95), st.integers(0, 99))
def test_no_prompt_stands_in_two_splits_and_the_share_is_that_of_prompts(tmp_path_factory, n, pairs, share, seed):
    path = write(tmp_path_factory.getbasetemp() / f"splits_{n}_{pairs}.jsonl", many(n, pairs))
    held = round(share * n)
    if not 0 < held < n:
        with pytest.raises(sources.DataError, match="leaves a split empty"):
            read(path, validation_share=share, seed=seed)
        return
    found = splits(read(path, validation_share=share, seed=seed))
    assert not found["train"] & found["validation"]
    assert (len(found["train"]), len(found["validation"])) == (n - held, held)


def test_the_seed_draws_the_validation_prompts_whatever_the_order_of_rows(tmp_path):
    rows = many(20)
    first, again, other = (splits(read_rows(tmp_path, rows, seed=seed))["validation"] for seed in (0, 0, 1))
    assert first == again != other
    assert splits(read_rows(tmp_path, rows[::-1]))["validation"] == first


def test_splits_that_rows_name_stay_and_only_the_others_are_drawn(tmp_path):
    rows = many(5, 1)
    found = splits(read_rows(tmp_path, [rows[0] | {"split": "test"}, rows[1] | {"split": "ood"}, *rows[2:]]))
    assert (found["test"], found["ood"]) == ({"Question 0?"}, {"Question 1?"})
    assert len(found["train"] | found["validation"]) == 3 and found["train"] and found["validation"]


# ---------------------------------------------------------------- Anthropic HH


def dialogue(question: str, yes: str = "Yes.", no: str = "No.") -> dict:
    asked = f"\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: {question}\n\nAssistant:"
    return {"chosen": f"{asked} {yes}", "rejected": f"{asked} {no}"}


def read_hh(path: Path, **settings) -> list[dict]:
    return sources.preference_rows("hh", path, **{"validation_share": 0.5} | settings)


def test_a_dialogue_is_split_into_prompt_and_last_reply(tmp_path):
    path = write(tmp_path / "harmless-base" / "train.jsonl.gz", [dialogue("Tea?"), dialogue("Milk?")])
    for row in (read_hh(path)[0], read_hh(tmp_path)[0], read_hh(tmp_path / "harmless-base")[0]):
        assert texts([row]) == [("\n\nHuman: Hello\n\nAssistant: Hi\n\nHuman: Tea?\n\nAssistant:", " Yes.", " No.")]
        assert (row["subset"], row["pair_id"]) == ("harmless-base", "harmless-base/train.jsonl.gz row 1")


def test_the_test_part_stays_test_and_the_training_part_is_divided_by_prompt(tmp_path):
    train = [dialogue(f"Question {n}?", yes=f"Yes {k}.") for n in range(4) for k in range(2)]
    write(tmp_path / "harmless-base" / "train.jsonl.gz", train)
    write(tmp_path / "helpful-base" / "train.jsonl.gz", [dialogue("More?")])
    for part in ("harmless-base", "helpful-base"):
        write(tmp_path / part / "test.jsonl.gz", [dialogue(f"{part}?")])
    rows = read_hh(tmp_path, validation_share=0.4)
    found = {split: len(prompts) for split, prompts in splits(rows).items()}
    assert found == {"train": 3, "validation": 2, "test": 2, "ood": 0}
    assert {row["subset"] for row in rows if row["split"] == "test"} == {"harmless-base", "helpful-base"}


def test_red_team_attempts_are_passed_over(tmp_path):
    write(tmp_path / "harmless-base" / "train.jsonl.gz", [dialogue("Tea?"), dialogue("Milk?")])
    write(tmp_path / "red-team-attempts" / "red_team_attempts.jsonl.gz", [{"transcript": "no pair"}])
    assert len(read_hh(tmp_path)) == 2


def test_the_published_test_part_has_its_known_size_and_bad_rows(capsys):
    """Counted apart from the library: of 2,312 rows four have no words after the last Assistant in one dialogue
    (rows 87, 517, 926, 1104), and five have dialogues that differ before it (1255, 1689, 1951, 1953, 2037)."""
    folder = needs("hh_harmless_test")
    rows = read_hh(folder, on_bad_row="drop", validation_share=0.1)
    told = capsys.readouterr().err
    assert "left out, empty field: 4\n" in told and told.count("left out") == 2
    assert "left out, the two dialogues differ before the last reply: 5\n" in told
    assert Counter(row["split"] for row in rows) == {"train": 2303 - 230, "validation": 230}
    with pytest.raises(sources.DataError, match="9 bad rows in ") as error:
        read_hh(folder)
    assert all(f"row {n}: " in str(error.value) for n in (87, 517, 926, 1104, 1255, 1689, 1951, 1953, 2037))


# ---------------------------------------------------------------- PandaLM


def test_verdicts_of_three_people_become_ballots(tmp_path):
    row = {
        "idx": 0,
        "motivation_app": "app",
        "instruction": "Sum up",
        "input": "Tea.",
        "response1": "T",
        "response2": "t.",
    }
    row |= {"annotator1": 1, "annotator2": 2, "annotator3": 0}
    path = write(tmp_path / "v1.json", [row, row | {"idx": 1, "input": ""}])
    first, second = sources.pandalm_pairs(path, validation_share=0.5, seed=0)
    assert (first["prompt"], second["prompt"]) == ("Sum up\nTea.", "Sum up")
    assert (first["response_a"], first["response_b"], first["ballots"]) == ("T", "t.", [1, -1, 0])
    assert (first["subset"], first["pair_id"]) == ("app", "0")


def test_the_published_pandalm_set_is_read_and_labels_are_no_part_of_their_truth():
    """Counted apart from the library: 999 pairs less those with answers that are no text or empty, or repeated."""
    path = needs("pandalm") / "testset-v1.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    names = ("instruction", "input", "response1", "response2")
    whole = {tuple(row[name] for name in names) for row in raw if all(type(row[name]) is str for name in names)}
    assert len(raw) == 999
    pairs = sources.pandalm_pairs(path, validation_share=0.1, seed=0, on_bad_row="drop")
    assert len(pairs) == len([1 for *asked, a, b in whole if a.strip() and b.strip() and a.strip() != b.strip()]) == 867
    labelled = data.draw_labels(pairs, seed=0)
    verdicts = {str(row["idx"]): Counter((0, 1, -1)[row[f"annotator{n}"]] for n in (1, 2, 3)) for row in raw}
    first = {pair["pair_id"]: pair["response_a"] for pair in pairs}
    for row in labelled:
        label = 1 if row["chosen"] == first[row["pair_id"]] else -1
        assert Counter([label, *(label * vote for vote in row["votes"])]) == verdicts[row["pair_id"]]
    assert {len(votes) for votes in labelled["votes"]} == {2}
    assert 0.02 < np.mean(data.truth(labelled) < 0) < 0.06, "879 of 999 pairs are unanimous"


# ---------------------------------------------------------------- where data lie


def test_a_path_is_looked_up_in_the_data_folder_unless_it_is_absolute(tmp_path, monkeypatch):
    monkeypatch.setenv("RMLIB_DATA", str(tmp_path / "sets"))
    inside = write(tmp_path / "sets" / "mine.jsonl", TABLE)
    outside = write(tmp_path / "other.jsonl", TABLE)
    assert sources.locate("mine.jsonl") == inside
    assert sources.locate(str(outside)) == outside


def test_a_hub_set_is_fetched_at_its_revision_and_its_data_files_alone(tmp_path, monkeypatch):
    asked = []

    def fetch(name: str, **settings) -> str:
        asked.append((name, settings))
        return str(tmp_path)

    monkeypatch.setattr(sources, "snapshot_download", fetch)
    assert sources.locate("hub:someone/some-set", "abc123") == tmp_path
    [(name, settings)] = asked
    assert (name, settings["repo_type"], settings["revision"]) == ("someone/some-set", "dataset", "abc123")
    assert not {"*.py", "*.bin", "*.pkl", "*"} & set(settings["allow_patterns"])


def test_a_hub_set_that_cannot_be_fetched_is_named_with_its_revision():
    with pytest.raises(FileNotFoundError, match="hub:someone/some-set at abc123 cannot be fetched"):
        sources.locate("hub:someone/some-set", "abc123")


# ---------------------------------------------------------------- from a file to rewards


def test_a_reader_s_own_table_trains_a_reward_model_from_end_to_end(tmp_path):
    rows = [{name: tiny.preferences()[name][n] for name in ("prompt", "chosen", "rejected")} for n in range(16)]
    base, words = tiny.save_llama(tmp_path / "llama"), tiny.tokenizer()
    preferences = Dataset.from_list(read_rows(tmp_path, rows, tokenizer=words, max_length=64))
    pairs = data.causal_pairs(preferences, words, max_length=64)
    model = models.reward_model(base, head_seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    batch = pairs.collate(np.arange(len(rows)), np.zeros(len(rows), dtype=bool))
    for _ in range(30):
        chosen, rejected = models.pair_rewards(model, batch)
        loss = -torch.nn.functional.logsigmoid(chosen - rejected).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    chosen, rejected = models.pair_rewards(model.eval(), batch)
    assert (chosen > rejected).all()


# ---------------------------------------------------------------- sets with their voters' scores


def scored(n: int, margins: list[float], label: int, spelling: str = "chosen_score_list", **shipped) -> dict:
    """A made-up row in the columns of the released set."""
    zeros = [float(n)] * len(margins)
    return {
        "chosen": ["Hello", f"Question {n}?", f"Yes {n}."],
        "rejected": ["Hello", f"Question {n}?", f"No {n}."],
        "GPT4 label": label,
        "mean preference difference": shipped.get("mean", float(np.mean(margins))),
        "std preference difference": shipped.get("std", float(np.std(margins))),
        spelling: [n + margin for margin in margins],
        spelling.replace("chosen", "rejected"): zeros,
    }


def released(folder: Path, form: str = "lines", spelling: str = "chosen_score_list") -> Path:
    """Sixty training pairs (one shipped mean is wrong), thirty for validation (every third without a verdict)."""
    rng = np.random.default_rng(0)
    votes = [[float(m) for m in rng.normal(rng.normal(0.5, 1), 0.5, 10)] for _ in range(90)]
    train = [scored(n, votes[n], -1, spelling) for n in range(60)]
    train[7]["mean preference difference"] += 0.5
    valid = [scored(n, votes[n], -1 if n % 3 == 0 else int(np.mean(votes[n]) > 0), spelling) for n in range(60, 90)]
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("valid", valid)):
        text = json.dumps(rows) if form == "array" else lines(rows)
        (folder / f"{name}.json.gz").write_bytes(gzip.compress(text.encode()))
    return folder


@pytest.mark.parametrize("form", ["lines", "array"])
@pytest.mark.parametrize("spelling", ["chosen_score_list", "chosen score list"])
def test_the_released_columns_are_read_as_they_are(tmp_path, form, spelling):
    pairs = sources.annotated_pairs(released(tmp_path / "set", form, spelling))
    expected = sources.annotated_pairs(released(tmp_path / "plain"))
    assert pairs.equals(expected)
    assert Counter(pairs["split"]) == {"train": 60, "validation": 30}
    row = pairs.iloc[7]
    assert (row["prompt"], row["chosen"], row["rejected"]) == ("Hello\nQuestion 7?", "Yes 7.", "No 7.")
    assert row["scores_rejected"] == [7.0] * 10
    assert row["shipped_mean"] == pytest.approx(np.mean(row["scores_chosen"]) - 7.0 + 0.5)
    assert Counter(pairs["judge"])[-1] == 60 + 10


def test_the_released_parts_can_be_read_one_by_one(tmp_path):
    folder = released(tmp_path / "set")
    assert set(sources.annotated_pairs(folder / "valid.json.gz")["split"]) == {"validation"}


def test_a_null_verdict_on_the_training_part_is_none_at_all(tmp_path):
    path = write(tmp_path / "train.jsonl", [scored(n, [0.5, 1.0], label) for n, label in enumerate((None, -1, 1))])
    assert sources.annotated_pairs(path)["judge"].tolist() == [-1, -1, 1]


@pytest.mark.parametrize("validation", ["validation-00000-of-00001.parquet", "valid.parquet", "validation.jsonl.gz"])
def test_files_named_as_on_the_hub_are_read_as_their_splits(tmp_path, validation):
    write(tmp_path / "data" / "train-00000-of-00002.parquet", [scored(0, [0.5, 1.0], -1)])
    write(tmp_path / "data" / "train-00001-of-00002.parquet", [scored(1, [0.5, 1.0], -1)])
    write(tmp_path / "data" / validation, [scored(2, [0.5, 1.0], 1)])
    pairs = sources.annotated_pairs(tmp_path)
    assert pairs["split"].tolist() == ["train", "train", "validation"]
    assert pairs["judge"].tolist() == [-1, -1, 1]


def test_what_the_book_exports_is_read_like_what_the_authors_released(tmp_path):
    row = scored(1, [0.5, 1.5], 1) | {
        "chosen": "Yes.",
        "rejected": "No.",
        "prompt": "Tea?",
        "split": "validation",
        "margin": 1.0,
    }
    row["judge"] = row.pop("GPT4 label")
    write(tmp_path / "annotated.parquet", [row])
    [pair] = sources.annotated_pairs(tmp_path / "annotated.parquet").to_dict("records")
    assert (pair["prompt"], pair["chosen"], pair["split"], pair["judge"]) == ("Tea?", "Yes.", "validation", 1)
    assert list(pair["scores_chosen"]) == [1.5, 2.5]


@pytest.fixture
def preset():
    """A preset whose results and figures go when the test is over."""
    name = f"test_released_{os.getpid()}"
    yield name
    for place in (runs.RESULTS, runs.FIGURES):
        shutil.rmtree(place / name, ignore_errors=True)


def test_the_notebook_recomputes_means_and_counts_missing_verdicts(tmp_path, preset):
    """One shipped mean is half a point off, no spread is; ten of thirty validation labels are missing."""
    notebook = runs.ROOT / "notebooks" / "01b_annotated_sets.ipynb"
    given = {"preset": preset, "data_path": str(released(tmp_path / "set")), "n_judged_bands": 4}
    papermill.execute_notebook(notebook, tmp_path / "out.ipynb", given, kernel_name="python3", progress_bar=False)
    evidence = runs.FIGURES / preset / "01b_annotated_sets"
    columns = pd.read_csv(evidence / "columns.csv").set_index("column")
    assert columns["rows off by more than 0.01"].to_dict() == {"mean": 1, "std": 0}
    assert columns.loc["mean", "largest difference"] == pytest.approx(0.5)
    counts = pd.read_csv(evidence / "counts.csv").set_index("split")
    assert counts["pairs"].to_dict() == {"train": 60, "validation": 30}
    assert counts["without_verdict"].to_dict() == {"train": 60, "validation": 10}
    assert json.loads((evidence / "run.json").read_text())["data"]["path"] == given["data_path"]
