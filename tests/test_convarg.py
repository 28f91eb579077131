"""UKPConvArg1: every pair with its votes, the label one of them, the truth the others; whole debates held out."""

from collections import Counter
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from rmlib import data, evaluation, runs, sources


def argument_pair(name: str = "p1", votes=("a1", "a2", "a1"), text1: str = "Yes & no.", text2: str = "No.", **changed):
    """One pair as the corpus writes it; ``changed`` replaces a whole element, by "" to leave it out."""
    debate, stance = changed.pop("debate", "Tea or coffee?"), changed.pop("stance", "Tea")
    elements = {
        "id": f"<id>{name}</id>",
        "arg1": f"<arg1><stance>{stance}</stance><text>{escape(text1)}</text><id>{name}-1</id></arg1>",
        "arg2": f"<arg2><stance>{stance}</stance><text>{escape(text2)}</text><id>{name}-2</id></arg2>",
        "meta": f"<debateMetaData><title>{debate}</title></debateMetaData>",
        "votes": "".join(f"<mTurkAssignment><value>{vote}</value></mTurkAssignment>" for vote in votes),
    }
    return f"<annotatedArgumentPair>{''.join((elements | changed).values())}</annotatedArgumentPair>"


@pytest.fixture
def corpus(tmp_path):
    """Writes one file of argument pairs and returns its folder."""

    def write(*pairs: str, file: str = "tea_tea") -> Path:
        (tmp_path / f"{file}.xml").write_text(f"<list>{''.join(pairs)}</list>", encoding="utf-8")
        return tmp_path

    return write


def read(folder: Path) -> list[dict]:
    return sources.convarg_pairs(folder, n_ood_debates=0, seed=0)


def test_an_argument_pair_is_read_with_its_votes(corpus):
    assert read(corpus(argument_pair("p1", ["a1", "a2", "equal", "a1", "a1"]))) == [
        {
            "pair_id": "tea_tea/p1",
            "prompt_id": "tea_tea",
            "prompt": "Tea or coffee? | Tea",
            "response_a": "Yes & no.",
            "response_b": "No.",
            "id_a": "tea_tea/p1-1",
            "id_b": "tea_tea/p1-2",
            "ballots": [1, -1, 0, 1, 1],
            "subset": "tea",
            "topic": "tea_tea",
            "split": "train",
        }
    ]


def test_the_label_is_one_decisive_vote_and_with_the_others_recovers_the_ballots(corpus):
    pair = read(corpus(argument_pair("p1", ["a1", "a1", "a2", "equal", "a1"])))[0]
    labelled = data.draw_labels([pair] * 400, seed=0)
    signs = [1 if row["chosen"] == pair["response_a"] else -1 for row in labelled]
    for sign, votes in zip(signs, labelled["votes"], strict=True):
        assert sorted([sign, *(sign * vote for vote in votes)]) == sorted(pair["ballots"])
    assert signs.count(1) / 400 == pytest.approx(3 / 4, abs=0.07)  # three of four decisive votes


def test_truth_of_a_vote_is_the_sum_of_the_others_as_seen_from_it(corpus):
    pair = read(corpus(argument_pair("p1", ["a1", "a1", "a2", "equal", "a1"])))[0]
    labelled = data.draw_labels([pair] * 40, seed=0)
    truth = {row["chosen"]: value for row, value in zip(labelled, data.truth(labelled), strict=True)}
    assert truth == {"Yes & no.": 1, "No.": -3}  # with its own vote, a label would be worth 2 and -2


def test_pairs_without_a_decisive_vote_are_left_out_and_counted(corpus, capsys):
    pairs = read(corpus(argument_pair("p1"), argument_pair("p2", ["equal", "equal"]), argument_pair("p3", ["equal"])))
    assert data.draw_labels(pairs, seed=0)["pair_id"][:] == ["tea_tea/p1"]
    assert "left out, no decisive vote: 2" in capsys.readouterr().out


def test_pairs_of_identical_texts_are_left_out_and_counted(corpus, capsys):
    pairs = read(corpus(argument_pair("p1"), argument_pair("p2", text1=" Same. ", text2="Same.")))
    assert [pair["pair_id"] for pair in pairs] == ["tea_tea/p1"]
    printed = capsys.readouterr().out
    assert "2 pairs in 1 debates, 0 of them held out" in printed
    assert "left out, identical texts: 1" in printed


def test_both_stances_of_a_debate_stand_in_one_split(corpus):
    for debate in ("Tea", "Dogs", "Trains", "Snow"):
        for stance in ("yes", "no"):
            folder = corpus(argument_pair(debate=debate, stance=stance), file=f"{debate}_{stance}")
    drawn = []
    for seed in range(20):
        pairs = sources.convarg_pairs(folder, n_ood_debates=2, seed=seed)
        assert len(pairs) == 8
        splits = {(pair["subset"], pair["split"]) for pair in pairs}
        assert len(splits) == 4
        assert Counter(split for _, split in splits) == {"ood": 2, "train": 2}
        drawn.append(frozenset(debate for debate, split in splits if split == "ood"))
    assert sources.convarg_pairs(folder, n_ood_debates=2, seed=19) == pairs
    assert frozenset.union(*drawn) == {"Tea", "Dogs", "Trains", "Snow"}


@pytest.mark.parametrize(
    ("pair", "problem"),
    [
        (argument_pair("p7", arg2="<arg2><id>p7-2</id></arg2>"), r"\(p7\): missing arg2/text"),
        (argument_pair("p7", text1="  "), r"\(p7\): missing arg1/text"),
        (argument_pair("p7", meta=""), r"\(p7\): missing debateMetaData/title"),
        (argument_pair("p7", id=""), r"\(None\): missing id"),
        (argument_pair("p7", ["a1", "a3"]), r"\(p7\): votes \['a1', 'a3'\]"),
        (argument_pair("p7", []), r"\(p7\): votes \[\]"),
    ],
)
def test_unreadable_pair_raises_with_its_file_and_place(corpus, pair, problem):
    with pytest.raises(ValueError, match=r"tea_tea\.xml: pair 1 " + problem):
        read(corpus(argument_pair("p1"), pair))


def test_broken_xml_raises_with_its_file(tmp_path):
    (tmp_path / "snow_no.xml").write_text("<list><annotatedArgumentPair>")
    with pytest.raises(ValueError, match=r"snow_no\.xml: not readable as XML"):
        read(tmp_path)


@pytest.mark.parametrize("folder", ["", "absent"])
def test_folder_without_xml_raises_with_where_to_get_it(tmp_path, folder):
    with pytest.raises(FileNotFoundError, match=r"no UKPConvArg1 XML in .*; get it as docs/your_own_data\.md"):
        read(tmp_path / folder)


def test_the_published_corpus_has_its_known_size_and_error(capsys):
    folder = runs.data_folder() / "ukp_convarg1" / "UKPConvArg1-full-XML"
    if not folder.is_dir():
        pytest.skip("UKPConvArg1 is not there: set RMLIB_DATA to the folder that holds ukp_convarg1")
    pairs = sources.convarg_pairs(folder, n_ood_debates=4, seed=0)
    assert "16927 pairs in 16 debates, 4 of them held out" in capsys.readouterr().out
    assert len({pair["pair_id"] for pair in pairs}) == len(pairs) == 16_912  # fifteen of identical texts
    assert len({pair["prompt_id"] for pair in pairs}) == 32
    assert 0.22 < evaluation.label_error(data.truth(data.draw_labels(pairs, seed=0))) < 0.26
