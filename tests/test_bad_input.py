"""Bad input of every kind is refused by name, before anything is trained; bad rows can be dropped and are counted."""

import csv
import gzip
import json
import math
import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification

from rmlib import models, params, sources, voting
from rmlib.notebooks import parameters_cell
from rmlib.runs import ROOT


@dataclass(frozen=True)
class Case:
    """A bad thing, the call that must refuse it, and what the message says beside the name of the file."""

    id: str
    make: Callable[[Path], Path]
    call: Callable[..., object]
    says: tuple[str, ...]
    error: type[Exception] = ValueError
    clean: Callable[[Path], Path] | None = None  # the same without its bad rows, which can be dropped
    left_out: str = ""


# ---------------------------------------------------------------- files


def write(path: Path, rows: list) -> Path:
    """Rows (or raw lines) in the format that the name says; ``(folder, rows)`` pairs go to files of their own."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.name.endswith(".csv"):
        names = list(dict.fromkeys(name for row in rows if isinstance(row, dict) for name in row))
        with path.open("wb") as file:
            for row in [names, *rows]:
                cells = [row.get(name, "") for name in names] if isinstance(row, dict) else row
                file.write(row if isinstance(row, bytes) else csv_line(cells))
    elif path.name.endswith(".json"):
        path.write_text(json.dumps(rows))
    else:
        lines = b"".join(row if isinstance(row, bytes) else json.dumps(row).encode() + b"\n" for row in rows)
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


def csv_line(cells: list) -> bytes:
    class Line(list):
        write = list.append

    csv.writer(line := Line()).writerow(cells)
    return line[0].encode()


def put(name: str, content: bytes | str = b"") -> Callable[[Path], Path]:
    """A maker of one file with this content."""

    def make(folder: Path) -> Path:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def between(good: list, bad: list) -> list:
    """The bad rows stand third, so a good one comes before and after them."""
    return [*good[:2], *bad, *good[2:]]


def row_case(id, name, good, bad, call, kind, detail="", left_out=None, also=()) -> Case:
    bad = bad if isinstance(bad, list) else [bad]
    place = f"{name} row {2 + len(bad)}: {kind}"
    return Case(
        id,
        lambda folder: write(folder / name, between(good, bad)),
        call,
        (place, detail, *also),
        sources.DataError,
        lambda folder: write(folder / name, good),
        f"{left_out or kind}: 1",
    )


# ---------------------------------------------------------------- tables


TABLE = [{"prompt": f"Question {n}?", "chosen": f"Good {n}.", "rejected": f"Bad {n}."} for n in range(5)]
FIRST = TABLE[0]


def named(extra: dict) -> list[dict]:
    """The good rows with further columns."""
    return [row | extra for row in TABLE]


def read_table(path: Path, on_bad_row: str = "error", **settings) -> list[dict]:
    settings = {"validation_share": 0.4} | settings
    return sources.preference_rows("table", path, on_bad_row=on_bad_row, **settings)


def read_turns(path: Path, on_bad_row: str = "error") -> list[dict]:
    return read_table(path, on_bad_row, prompt_column=None)


def read_template(path: Path, on_bad_row: str = "error") -> list[dict]:
    words = tiny.tokenizer()
    words.chat_template = (
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
        "{{ m.content }}{% endfor %}"
    )
    return read_table(path, on_bad_row, tokenizer=words)


def read_words(path: Path, on_bad_row: str = "error") -> list[dict]:
    return read_table(path, on_bad_row, tokenizer=tiny.tokenizer(), max_length=12)


def read_cut(path: Path, on_bad_row: str = "error") -> list[dict]:
    words = models.load_tokenizer(tiny.save_encoder(path.parent / "encoder"))
    return read_table(path, on_bad_row, tokenizer=words, max_length=12)


def table(id, bad, kind, detail="", *, good=TABLE, ending=".jsonl", call=read_table, **more) -> Case:
    return row_case(f"table: {id}", f"mine{ending}", good, bad, call, kind, detail, **more)


def bad(**changed) -> dict:
    """A good row with some fields changed; ``...`` takes a field away."""
    row = {"prompt": "Question 9?", "chosen": "Good 9.", "rejected": "Bad 9."} | changed
    return {name: value for name, value in row.items() if value is not ...}


def turns(*said: str) -> list[dict]:
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 3, said, strict=False)]


DIALOGUES = [{"chosen": turns(f"Ask {n}", "Yes"), "rejected": turns(f"Ask {n}", "No")} for n in range(5)]
ASKED = [
    {"prompt": turns(f"Ask {n}"), "chosen": turns("", "Yes")[1:], "rejected": turns("", "No")[1:]} for n in range(5)
]
SPOKEN = [{"prompt": f"one {w}", "chosen": f"good {w}", "rejected": f"bad {w}"} for w in tiny.FILLER[:5]]


def dialogue(chosen: object, rejected: object = None) -> dict:
    return {"chosen": chosen, "rejected": turns("Ask 9", "No") if rejected is None else rejected}


VOTES, GOLD = {"votes": [1, -1]}, {"gold_chosen": 1.0, "gold_rejected": 0.5}
WITH_SPLITS = [row | {"split": "validation" if n > 2 else "train"} for n, row in enumerate(TABLE)]
WITH_IDS = [row | {"pair_id": f"p{n}"} for n, row in enumerate(TABLE)]

TABLES = [
    table("no chosen", bad(chosen=...), "missing field: 'chosen'", left_out="missing field"),
    table("no rejected", bad(rejected=...), "missing field: 'rejected'", left_out="missing field"),
    table("no prompt", bad(prompt=...), "missing field: 'prompt'", left_out="missing field"),
    table("null rejected", bad(rejected=None), "null field", "'rejected'"),
    table("null prompt in Parquet", bad(prompt=None), "null field", "'prompt'", ending=".parquet"),
    table("short row in CSV", [b"Question 9?,Good 9.\r\n"], "null field", "'rejected'", ending=".csv"),
    table("long row in CSV", [b"Q,A,B,C\r\n"], "not readable", "too many fields", ending=".csv"),
    table("empty chosen", bad(chosen=""), "empty field", "'chosen'"),
    table("blank prompt", bad(prompt=" \n"), "empty field", "'prompt'"),
    table("empty rejected in CSV", bad(rejected=""), "empty field", "'rejected'", ending=".csv"),
    table("identical pair", bad(rejected="Good 9."), "identical responses"),
    table("identical but for spaces", bad(rejected=" Good 9.\n"), "identical responses"),
    table("a number for a text", bad(chosen=7), "wrong type", "chosen is a int"),
    table("a prompt of turns, responses of text", bad(prompt=turns("Ask")), "wrong type", "prompt is a list"),
    table("one response text, one turns", bad(chosen=turns("Ask", "Yes")), "wrong type", "chosen is a list"),
    table("a truncated line", [b'{"prompt": "Q\n'], "not readable", "not JSON"),
    table("a line that is a list", [b"[1]\n"], "not readable", "not an object"),
    table("an element that is text", ["Q"], "not readable", "not an object", ending=".json"),
    table("a line nested too deep", [b'{"a":' * 99999 + b"\n"], "not readable", "not JSON"),
    table("a key given twice", [b'{"chosen": "a", "chosen": "b"}\n'], "not readable", "a key is given twice"),
    table("not UTF-8", [b'{"prompt": "caf\xe9", "chosen": "a", "rejected": "b"}\n'], "not readable", "not UTF-8"),
    table("not UTF-8 in CSV", [b"caf\xe9,a,b\r\n"], "not readable", "not UTF-8", ending=".csv"),
    table("half a character", bad(prompt="\ud83d"), "not readable", "not UTF-8"),
    table("a vote out of range", bad(votes=[1, 2]), "bad votes", "[1, 2]", good=named(VOTES)),
    table("a vote of a half", bad(votes=[0.5]), "bad votes", "[0.5]", good=named(VOTES)),
    table("a vote of true", bad(votes=[True]), "bad votes", "[True]", good=named(VOTES)),
    table("no votes in the list", bad(votes=[]), "bad votes", "[]", good=named(VOTES)),
    table("null votes", bad(votes=None), "bad votes", "None", good=named(VOTES)),
    table("votes in words", bad(votes="yes, no"), "bad votes", "'yes, no'", good=named(VOTES)),
    table("votes of CSV out of range", bad(votes="1 -3"), "bad votes", "'1 -3'", good=named({"votes": "1,-1"}),
          ending=".csv"),
    table("votes in some rows only", bad(), "missing field", "only some rows have votes", good=named(VOTES)),
    table("gold of one response", bad(gold_chosen=1.0), "missing field", "come together", good=named(GOLD)),
    table("gold in words", bad(gold_chosen="much", gold_rejected=0.0), "wrong type", "gold_chosen = 'much'",
          good=named(GOLD)),
    table("gold of true", bad(gold_chosen=True, gold_rejected=0.0), "wrong type", "gold_chosen = True",
          good=named(GOLD)),
    table("gold of NaN", bad(gold_chosen=1.0, gold_rejected=math.nan), "not finite", "gold_rejected", good=named(GOLD)),
    table("a duplicated id", bad(pair_id="p0"), "duplicated id", "'p0' belongs to mine.jsonl row 1", good=WITH_IDS),
    table("an empty id", bad(pair_id=""), "empty field", "'pair_id'", good=WITH_IDS),
    table("an id that is a list", bad(pair_id=["p9"]), "wrong type", "pair_id is a list", good=WITH_IDS),
    table("a pair repeated", FIRST, "repeated pair", "it stands in mine.jsonl row 1"),
    table("a subset called all", bad(subset="all"), "reserved name", "subset 'all'", good=named({"subset": "tea"})),
    table("an unknown split", bad(split="dev"), "unknown split", "'dev'; choose from train", good=WITH_SPLITS),
    table(
        "a prompt in two splits",
        bad(prompt="Question 0?", split="test"),
        "prompt in two splits",
        "train in mine.jsonl row 1, here test",
        good=WITH_SPLITS,
    ),
    table("dialogues that differ early", dialogue(turns("Ask 8", "Yes")), "the two dialogues differ", good=DIALOGUES,
          call=read_turns, left_out="the two dialogues differ before the last reply"),
    table("a last turn of the user", dialogue(turns("Ask 9", "Yes", "So?"), turns("Ask 9", "Yes", "Or?")), "wrong role",
          good=DIALOGUES, call=read_turns),
    table("an unknown role", dialogue([{"role": "bot", "content": "Yes"}]), "wrong type", "'role': 'bot'",
          good=DIALOGUES,
          call=read_turns),
    table("a turn without content", dialogue([{"role": "user"}]), "wrong type", "a turn has", good=DIALOGUES,
          call=read_turns),
    table("a turn that is text", dialogue(["Ask 9", "Yes"]), "wrong type", "not 'Ask 9'", good=DIALOGUES,
          call=read_turns),
    table("an empty turn", dialogue(turns("Ask 9", " ")), "empty field", "a turn of 'chosen'", good=DIALOGUES,
          call=read_turns),
    table("no turns", dialogue([]), "wrong type", "chosen is list", good=DIALOGUES, call=read_turns),
    table("replies to nothing", {side: turns("", side)[1:] for side in ("chosen", "rejected")}, "empty field",
          "'prompt'",
          good=DIALOGUES, call=read_turns),
    table("a prompt that is a number", ASKED[0] | {"prompt": 3}, "wrong type", "prompt is int", good=ASKED),
    table("refused by the chat template", ASKED[0] | {"prompt": [{"role": "system", "content": "Be kind"}]},
          "refused by the chat template", "no system here", good=ASKED, call=read_template),
    table("too long", bad(prompt="one " * 12), "too long", "exceed max_length 12", good=SPOKEN, call=read_words),
    table("the same after tokenization", bad(prompt="one", chosen="GOOD", rejected="good"),
          "identical responses after tokenization", good=SPOKEN, call=read_words),
    table("the same after truncation", bad(prompt="one", chosen="two " * 12 + "good", rejected="two " * 12 + "bad"),
          "identical responses after tokenization", "at most 12 tokens", good=SPOKEN, call=read_cut),
]  # fmt: skip


# ---------------------------------------------------------------- files that cannot be read at all


def zipped(rows: list = TABLE) -> bytes:
    return gzip.compress(b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def parquet(names: list[str], columns: list[list]) -> bytes:
    pq.write_table(
        pa.Table.from_arrays([pa.array(column) for column in columns], names), sink := pa.BufferOutputStream()
    )
    return sink.getvalue().to_pybytes()


def not_utf8_parquet(folder: Path, rows: list[dict]) -> Path:
    """Arrow checks no text that is built from bytes."""
    columns = [[row[name].encode("latin-1") for row in rows] for name in FIRST]
    arrays = [pa.array(column, pa.binary()).view(pa.string()) for column in columns]
    pq.write_table(pa.Table.from_arrays(arrays, list(FIRST)), folder / "mine.parquet")
    return folder / "mine.parquet"


def unreadable(id: str, make: Callable, *says: str, call=read_table, error=sources.DataError) -> Case:
    return Case(f"file: {id}", make, call, says, error)


def nowhere(folder: Path) -> Path:
    return folder / "nowhere"


def a_folder(folder: Path) -> Path:
    (folder / "inside").mkdir(parents=True)
    return folder / "inside"


FILES = [
    unreadable("not there", nowhere, "docs/your_own_data.md", call=lambda path: sources.locate(str(path)),
               error=FileNotFoundError),
    unreadable("no path", lambda folder: Path(os.environ.get("RMLIB_DATA", ROOT / "data")), "data_path = ''",
               call=lambda path: sources.locate(""), error=FileNotFoundError),
    unreadable("not on the hub", lambda folder: Path("hub:nobody/no-set"), "at v1 cannot be fetched",
               call=lambda path: sources.locate(str(path), "v1"), error=FileNotFoundError),
    unreadable("no name on the hub", lambda folder: Path("hub:"), "cannot be fetched",
               call=lambda path: sources.locate(str(path)),
               error=FileNotFoundError),
    unreadable("a folder", a_folder, "is a folder: name one file"),
    unreadable("an unknown ending", put("mine.txt", "{}"), "unknown kind of file; choose from .jsonl"),
    unreadable("empty", put("mine.jsonl"), "holds no rows"),
    unreadable("blank lines only", put("mine.jsonl", "\n\n"), "holds no rows"),
    unreadable("an empty list", put("mine.json", "[]"), "holds no rows"),
    unreadable("a header only", put("mine.csv", "prompt,chosen,rejected\n"), "holds no rows"),
    unreadable("Parquet without rows", put("mine.parquet", parquet(["chosen"], [[]])), "holds no rows"),
    unreadable("gzip of nothing", put("mine.jsonl.gz", gzip.compress(b"")), "holds no rows"),
    unreadable("a truncated gzip", put("mine.jsonl.gz", zipped()[:-20]), "not a whole gzip file"),
    unreadable("a gzip with a wrong checksum", put("mine.jsonl.gz", zipped()[:-8] + bytes(8)), "not a whole gzip file"),
    unreadable("a gzip in name only", put("mine.jsonl.gz", "{}"), "not a whole gzip file"),
    unreadable("a truncated list", put("mine.json", '[{"prompt": "Q"'), "mine.json: "),
    unreadable("a truncated Parquet", put("mine.parquet", parquet(["chosen"], [["a"]])[:-9]), "mine.parquet: "),
    unreadable("a Parquet in name only", put("mine.parquet", "prompt,chosen\n"), "mine.parquet: "),
    unreadable("a Parquet column twice", put("mine.parquet", parquet(["chosen"] * 2, [["a"], ["b"]])), "(chosen)"),
    unreadable("a Parquet column of bytes", put("mine.parquet", parquet(list(FIRST), [[b"a"], [b"b"], [b"c"]])),
               "row 1: wrong type"),
    unreadable("a CSV column twice", put("mine.csv", "prompt,chosen,chosen\na,b,c\n"),
               "column 'chosen' is there twice"),
    unreadable("a quote left open", put("mine.csv", 'prompt,chosen,rejected\na,"b,c\nd,e,f\n'),
               "line 3: unexpected end of data"),
    unreadable("CSV with semicolons", put("mine.csv", "prompt;chosen;rejected\na;b;c\n"),
               "row 1: missing field: 'chosen'"),
    unreadable("UTF-16", put("mine.jsonl", '{"prompt": "Q"}'.encode("utf-16")), "row 1: not readable: not"),
    unreadable("no row left", put("mine.jsonl", "[1]\n{}\n"), "no usable row",
               call=lambda path: read_table(path, "drop")),
    unreadable("no words left", put("mine.jsonl", json.dumps(bad(prompt="one " * 99))), "no usable row",
               call=lambda path: read_words(path, "drop")),
    unreadable("too few prompts to hold one out", put("mine.jsonl", json.dumps(FIRST)),
               "validation_share 0.4 of 1 prompts"),
    unreadable("no row to train on", lambda folder: write(folder / "mine.jsonl", named({"split": "ood"})),
               "splits are ood; train, and validation or ood, are needed"),
    unreadable("no row held out", lambda folder: write(folder / "mine.csv", named({"split": "train"})),
               "splits are train; train, and validation or ood, are needed"),
    unreadable("held out for the last look alone",
               lambda folder: write(folder / "mine.parquet", [*WITH_SPLITS[:3], WITH_SPLITS[3] | {"split": "test"}]),
               "splits are test, train; train, and validation or ood, are needed"),
    unreadable("neither error nor drop", lambda folder: Path("on_bad_row"), "'skip'; choose from error, drop",
               call=lambda path: read_table(path, "skip"), error=ValueError),
    Case("table: not UTF-8 in Parquet",
         lambda folder: not_utf8_parquet(folder, between(TABLE, [bad(prompt="caf\xe9")])), read_table,
         ("mine.parquet row 3: not readable: not UTF-8",), sources.DataError, lambda folder: not_utf8_parquet(folder,
         TABLE),
         "not readable: 1"),
]  # fmt: skip


# ---------------------------------------------------------------- Anthropic HH


def hh_row(n: object, prompt: str = "\n\nHuman: Ask {}\n\nAssistant:", **changed) -> dict:
    asked = prompt.format(n)
    return {"chosen": f"{asked} Yes {n}", "rejected": f"{asked} No {n}"} | changed


def read_hh(path: Path, on_bad_row: str = "error") -> list[dict]:
    rows = sources.preference_rows("hh", path, on_bad_row=on_bad_row, validation_share=0.4)
    return [{name: value for name, value in row.items() if name != "pair_id"} for row in rows]  # it holds the place


def hh(id: str, bad: object, kind: str, detail: str = "", **more) -> Case:
    name = "harmless-base/train.jsonl.gz"
    return row_case(f"HH: {id}", name, [hh_row(n) for n in range(5)], bad, read_hh, kind, detail, **more)


def two_parts(train: list) -> Callable[[Path], Path]:
    """The test part holds a prompt of its own; a row of the train part may repeat it."""

    def make(folder: Path) -> Path:
        write(folder / "part/helpful-base/test.jsonl.gz", [hh_row("test")])
        write(folder / "part/helpful-base/train.jsonl.gz", train)
        return folder / "part"

    return make


DIFFER = "the two dialogues differ before the last reply"
HH = [
    hh("nobody asks", hh_row(9, "\n\nAssistant:"), "not a dialogue of Human and Assistant"),
    hh("nobody replies", hh_row(9, "\n\nHuman: Ask {}"), "not a dialogue of Human and Assistant"),
    hh("two dialogues", hh_row(9, rejected=hh_row(8)["rejected"]), DIFFER),
    hh("an empty reply", hh_row(9, chosen="\n\nHuman: Ask 9\n\nAssistant: "), "empty field", "'chosen'"),
    hh("identical replies", hh_row(9, rejected=hh_row(9)["chosen"]), "identical responses"),
    hh("no rejected", {"chosen": hh_row(9)["chosen"]}, "missing field", "'rejected'"),
    hh("null chosen", hh_row(9, chosen=None), "null field", "'chosen'"),
    hh("turns in place of text", hh_row(9, chosen=turns("Ask 9", "Yes")), "wrong type", "chosen is a list"),
    hh("a pair repeated", hh_row(0), "repeated pair", "harmless-base/train.jsonl.gz row 1"),
    hh("not UTF-8", [b'{"chosen": "\xff"}\n'], "not readable", "not UTF-8"),
    Case("HH: a test prompt among the training prompts",
         two_parts([*(hh_row(n) for n in range(5)), hh_row("test", chosen=hh_row("test")["chosen"] + "!")]), read_hh,
         ("helpful-base/train.jsonl.gz row 6: prompt in two splits", "test in helpful-base/test.jsonl.gz row 1"),
         sources.DataError, two_parts([hh_row(n) for n in range(5)]), "prompt in two splits: 1"),
    unreadable("a folder without HH", lambda folder: write(folder / "inside/other.jsonl.gz", TABLE).parent,
               "no file named train.jsonl.gz or test.jsonl.gz", call=read_hh),
    unreadable("a truncated part of HH", put("train.jsonl.gz", zipped()[:40]), "not a whole gzip file", call=read_hh),
]  # fmt: skip


# ---------------------------------------------------------------- people's verdicts


def panda(n: int, **changed) -> dict:
    row = {
        "idx": n,
        "motivation_app": "app",
        "instruction": f"Do {n}",
        "input": "",
        "response1": f"a{n}",
        "response2": f"b{n}",
    }
    row |= {"annotator1": 1, "annotator2": 2, "annotator3": 0} | changed
    return {name: value for name, value in row.items() if value is not ...}


def read_panda(path: Path, on_bad_row: str = "error") -> list[dict]:
    return sources.pandalm_pairs(path, validation_share=0.4, seed=0, on_bad_row=on_bad_row)


def verdict(id: str, kind: str, detail: str, **changed) -> Case:
    return row_case(
        f"PandaLM: {id}", "v1.json", [panda(n) for n in range(5)], panda(9, **changed), read_panda, kind, detail
    )


def argument(**changed) -> str:
    pair = {
        "id": "7",
        "title": "Tea?",
        "text1": "Yes.",
        "stance": "pro",
        "text2": "No.",
        "votes": ["a1", "a2"],
    } | changed
    votes = "".join(f"<mTurkAssignment><value>{vote}</value></mTurkAssignment>" for vote in pair["votes"])
    return (
        f"<annotatedArgumentPair><id>{pair['id']}</id><debateMetaData><title>{pair['title']}</title></debateMetaData>"
        f"<arg1><id>1</id><text>{pair['text1']}</text><stance>{pair['stance']}</stance></arg1>"
        f"<arg2><id>2</id><text>{pair['text2']}</text></arg2>"
        f"<mTurkAssignments>{votes}</mTurkAssignments></annotatedArgumentPair>"
    )


def debate(id: str, content: str, *says: str, n_ood: int = 0, error=sources.DataError) -> Case:
    def call(path: Path) -> object:
        return sources.convarg_pairs(path if path.is_dir() else path.parent, n_ood_debates=n_ood, seed=0)

    def make(folder: Path) -> Path:
        file = put("debates/tea_pro.xml", content)(folder)
        return file.parent if n_ood else file

    make = make if content else a_folder
    return Case(f"UKPConvArg1: {id}", make, call, says, error)


PEOPLE = [
    verdict("no second answer", "missing field", "'response2'", response2=...),
    verdict("a verdict out of range", "bad votes", "[3, 2, 0]", annotator1=3),
    verdict("a verdict in quotes", "bad votes", "['1', 2, 0]", annotator1="1"),
    verdict("no third verdict", "missing field", "'annotator3'", annotator3=...),
    verdict("an answer that is no text", "wrong type", "response1 is a bool", response1=True),
    verdict("an empty answer", "empty field", "'rejected'", response2=""),
    verdict("no instruction", "empty field", "'prompt'", instruction=" "),
    verdict("identical answers", "identical responses", "", response2="a9"),
    verdict("a duplicated id", "duplicated id", "'0' belongs to v1.json row 1", idx=0),
    verdict("a null id", "null field", "'idx'", idx=None),
    debate("no XML", "", "no UKPConvArg1 XML", error=FileNotFoundError),
    debate("broken XML", "<list>", "tea_pro.xml: not readable as XML"),
    debate("not UTF-8", '<?xml version="1.0" encoding="martian"?><list/>', "not readable as XML"),
    debate("no second text", f"<list>{argument(text2='')}</list>", "pair 0 (7): missing arg2/text"),
    debate("no stance", f"<list>{argument(stance=' ')}</list>", "pair 0 (7): missing arg1/stance"),
    debate("no votes", f"<list>{argument(votes=[])}</list>", "pair 0 (7): votes []"),
    debate("an unknown vote", f"<list>{argument()}{argument(id='8', votes=['b'])}</list>", "pair 1 (8): votes ['b']"),
    debate("a duplicated id", f"<list>{argument()}{argument(text2='Never.')}</list>", "pair 1 (7): duplicated id"),
    debate("all debates held out", f"<list>{argument()}</list>", "n_ood_debates 1 leaves no debate", n_ood=1),
]


# ---------------------------------------------------------------- sets with their voters' scores


def scored(n: int, **changed) -> dict:
    row = {"chosen": ["Ask", f"Yes {n}"], "rejected": ["Ask", f"No {n}"], "GPT4 label": 1}
    row |= {"mean preference difference": 1.0, "std preference difference": 0.5}
    row |= {"chosen_score_list": [1.0, 2.0], "rejected_score_list": [0.5, 0.5]} | changed
    return {name: value for name, value in row.items() if value is not ...}


def read_scored(path: Path, on_bad_row: str = "error") -> list[dict]:
    return sources.annotated_pairs(path, on_bad_row).to_dict("records")


def voter(id: str, kind: str, detail: str, change: dict) -> Case:
    good = [scored(n) for n in range(4)]
    return row_case(f"annotated: {id}", "train.jsonl", good, scored(9, **change), read_scored, kind, detail)


ANNOTATED = [
    voter("no scores", "missing field", "'chosen_score_list'", {"chosen_score_list": ...}),
    voter("a single score", "bad scores", "at least two", {"chosen_score_list": [1.0], "rejected_score_list": [1.0]}),
    voter("more scores for one side", "bad scores", "2 for chosen, 3 for rejected", {"rejected_score_list": [1.0] * 3}),
    voter("a score of NaN", "bad scores", "[nan, 1.0]", {"rejected_score_list": [math.nan, 1.0]}),
    voter("a score in quotes", "bad scores", "['1', 2]", {"chosen_score_list": ["1", 2]}),
    voter("an unknown label", "bad label", "2: 1, 0, or -1", {"GPT4 label": 2}),
    voter("a label in words", "bad label", "'chosen': 1, 0, or -1", {"GPT4 label": "chosen"}),
    voter("no mean", "missing field", "'mean_preference_difference'", {"mean preference difference": ...}),
    voter("a spread in words", "wrong type", "= 'wide'", {"std preference difference": "wide"}),
    voter("no turns", "wrong type", "chosen = []", {"chosen": []}),
    voter("turns that are numbers", "wrong type", "rejected = [1, 2]", {"rejected": [1, 2]}),
    voter("an empty reply", "empty field", "'rejected'", {"rejected": ["Ask", ""]}),
    voter("identical replies", "identical responses", "", {"rejected": ["Ask", "Yes 9"]}),
    unreadable("no annotated set in the folder", a_folder, "no file named *.jsonl or *.jsonl.gz", call=read_scored),
]


# ---------------------------------------------------------------- parameters


def parameter(id: str, text: str | bytes, *says: str, stem: str = "01_preference_strength") -> Case:
    cell = parameters_cell(ROOT / "notebooks" / f"{stem}.ipynb")
    return Case(f"parameters: {id}", put("mine.yaml", text), lambda path: params.read_yaml(stem, path, cell), says,
                params.ParameterError)  # fmt: skip


PARAMETERS = [
    parameter("an unknown key", "n_membres: 3", "unknown parameter 'n_membres'; the nearest is 'n_members'"),
    parameter("a hidden key", "_lr: 3.0e-5", "unknown parameter '_lr'"),
    parameter("a key that is a number", "3: 4", "unknown parameter 3"),
    parameter("a number that YAML reads as text", "lr: 3e-5", "lr = '3e-5'"),
    parameter("a number in quotes", "n_members: '10'", "n_members = '10'"),
    parameter("half a member", "n_members: 2.5", "n_members = 2.5"),
    parameter("a number for a switch", "vary_head: 1", "vary_head = 1"),
    parameter("a rate of zero", "lr: 0.0", "lr = 0.0"),
    parameter("a rate without end", "lr: .inf", "lr = inf"),
    parameter("a rate that is no number", "lr: .nan", "lr = nan"),
    parameter("a null", "lr:", "lr = None"),
    parameter("an unknown choice", "schedule: cosine", "schedule = 'cosine'"),
    parameter("a share over one in a list", "growing_shares: [0.5, 1.5]", "growing_shares.1 = 1.5"),
    parameter("no seeds", "seeds: []", "seeds = []"),
    parameter("a seed below zero", "seeds: [-1]", "seeds.0 = -1"),
    parameter("a seed twice", "seeds: [1, 2, 1]", "seeds = [1, 2, 1]", "given twice"),
    parameter("a preset that climbs out", "preset: ../elsewhere", "preset = '../elsewhere'"),
    parameter("two mistakes at once", "lr: 0.0\nn_members: 1", "lr = 0.0", "n_members = 1"),
    parameter("a key given twice", "lr: 1.0e-3\nlr: 2.0e-3", "'lr' is given twice"),
    parameter("no YAML", "lr: [", "cannot be read as YAML"),
    parameter("code in YAML", "lr: !!python/object/apply:os.getcwd []", "cannot be read as YAML"),
    parameter("YAML that is not UTF-8", b"# caf\xe9\nlr: 1.0", "cannot be read as YAML"),
    parameter("a list of keys", "- lr", "expected 'key: value' lines, got list"),
    parameter("people's data without a path", "source: hh", "needs data_path", stem="00_world_and_data"),
    parameter("a width no multiple of its heads", "hidden_size: 7", "hidden_size = 7 is no even multiple of heads = 2",
              stem="00_world_and_data"),
    parameter("heads of odd width", "hidden_size: 6", "hidden_size = 6 is no even multiple of heads = 2",
              stem="00_world_and_data"),
    parameter("a world from a file", "data_path: mine.jsonl", "'world' reads neither data_path",
              stem="00_world_and_data"),
    parameter("a world on a base model", "base_model: gpt2", "'world' reads neither data_path nor base_model",
              stem="00_world_and_data"),
    parameter("arguments on a base model", "source: convarg\ndata_path: xml\nbase_model: gpt2",
              "'convarg' is read by the encoder: leave base_model empty", stem="00_world_and_data"),
    parameter("an unknown source", "source: mine", "source = 'mine'", stem="00_world_and_data"),
    parameter("an unknown way with bad rows", "on_bad_row: skip", "on_bad_row = 'skip'", stem="00_world_and_data"),
    parameter("a prompt column without a name", "prompt_column: ''", "prompt_column = ''", stem="00_world_and_data"),
    parameter("all prompts held out", "validation_share: 1.0", "validation_share = 1.0", stem="00_world_and_data"),
    parameter("a single band", "n_bands: 1", "n_bands = 1", stem="01b_annotated_sets"),
    Case("parameters: no file", nowhere, lambda path: params.read_yaml("01_preference_strength", path, {}),
         ("No such file",), params.ParameterError),
    Case("parameters: a key missing everywhere", put("mine.yaml", "preset: mine"),
         lambda path: params.read_yaml("01b_annotated_sets", path, {}), ("parameter 'n_bands' is missing",
         ), params.ParameterError),
]  # fmt: skip


# ---------------------------------------------------------------- checkpoints


def new_reward_model(folder: Path) -> object:
    return models.reward_model(str(folder), head_seed=0)


def base(folder: Path, spoil: Callable[[Path], object]) -> Path:
    spoil(Path(tiny.save_causal(folder / "base")))
    return folder / "base"


def saved(folder: Path, spoil: Callable[[Path], object]) -> Path:
    model = models.reward_model(tiny.save_causal(folder / "base"), head_seed=0)
    models.save_reward_model(model, folder / "saved")
    spoil(folder / "saved")
    return folder / "saved"


def head(folder: Path, spoil: Callable[[Path], object]) -> Path:
    models.save_reward_model(models.FrozenRewardModel(4), folder / "head")
    spoil(folder / "head" / "head.safetensors")
    return folder / "head"


def edit(name: str, **changed) -> Callable[[Path], None]:
    """Change a JSON file of the checkpoint; ``...`` takes a key away."""

    def spoil(folder: Path) -> None:
        found = json.loads((folder / name).read_text()) | changed
        (folder / name).write_text(json.dumps({key: value for key, value in found.items() if value is not ...}))

    return spoil


def weights(change: Callable[[dict], object], name: str = "model.safetensors") -> Callable[[Path], None]:
    def spoil(folder: Path) -> None:
        file = folder if folder.suffix else folder / name
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, {"format": "pt"})

    return spoil


def unspoilt(folder: Path) -> None:
    """What is wrong is the kind of checkpoint."""


def cut(folder: Path) -> None:
    file = folder if folder.suffix else folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-64])


def pickled(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")


def remote_code(name: str, entries: dict, **changed) -> Callable[[Path], None]:
    """A checkpoint that wants to run a file of its own; the file would leave a trace."""

    def spoil(folder: Path) -> None:
        (folder / "strange.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        edit(name, auto_map=entries, **changed)(folder)

    return spoil


CODE = {
    kind: f"strange.{kind}" for kind in ("AutoConfig", "AutoModelForCausalLM", "AutoModelForSequenceClassification")
}
STRANGE = remote_code("config.json", CODE, model_type="strange")
STRANGE_WORDS = remote_code("tokenizer_config.json", {"AutoTokenizer": ["strange.T", None]}, tokenizer_class="Strange")
LAYER = "model.layers.0.mlp.up_proj.weight"


def lose(tensors: dict) -> None:
    del tensors[LAYER]


def spoil_a_number(tensors: dict) -> None:
    tensors[LAYER][0, 0] = math.nan


def narrow(tensors: dict) -> None:
    tensors[LAYER] = tensors[LAYER][:-1].clone()


def many_labels(folder: Path) -> Path:
    model = AutoModelForSequenceClassification.from_pretrained(tiny.save_causal(folder / "base"), num_labels=3)
    model.save_pretrained(folder / "many")
    return folder / "many"


def no_pad_no_end(folder: Path) -> None:
    edit("tokenizer_config.json", pad_token=..., eos_token=...)(folder)


def no_words(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()


def unlink(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def overwrite(name: str, text: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text(text)


def features(change: Callable[[torch.Tensor, list], tuple]) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        values, ids = change(torch.ones(3, 2), ["a", "b", "c"])
        models.save_features(values, ids, folder / "base.safetensors")
        return folder / "base.safetensors"

    return make


def features_without_ids(folder: Path) -> Path:
    save_file({"features": torch.ones(3, 2)}, folder / "base.safetensors")
    return folder / "base.safetensors"


def checkpoint(id: str, call: Callable, make: Callable, *says: str, error=ValueError) -> Case:
    return Case(f"checkpoint: {id}", make, call, says, error)


def spoilt(id: str, spoil: Callable, *says: str, error=ValueError, only: str = "") -> list[Case]:
    """The same damage to what a reward model starts from, to a language model, and to a saved reward model."""
    calls = {"start": (new_reward_model, base), "language model": (models.load_language_model, base),
             "reward model": (models.load_reward_model, saved)}  # fmt: skip
    return [
        checkpoint(f"{id} ({name})", call, lambda folder, make=make: make(folder, spoil), *says, error=error)
        for name, (call, make) in calls.items()
        if only in name
    ]


CHECKPOINTS = [
    *spoilt("no folder", shutil.rmtree, "no ", error=FileNotFoundError),
    *spoilt("no config.json", unlink("config.json"), "config.json is missing", error=FileNotFoundError),
    *spoilt("a broken config.json", overwrite("config.json", "{"), "config.json", error=OSError),
    *spoilt("a config.json of no model", edit("config.json", model_type=...), "Unrecognized model"),
    *spoilt("an unknown kind of model", edit("config.json", model_type="martian"), "martian"),
    *spoilt("code of strangers", STRANGE, "custom code"),
    *spoilt("pickled weights alone", pickled, "safetensors", error=OSError),
    *spoilt("truncated weights", cut, "cannot be read", "incomplete"),
    *spoilt("weights that are no weights", overwrite("model.safetensors", "weights"), "cannot be read"),
    *spoilt("NaN weights", weights(spoil_a_number), "not finite", LAYER),
    *spoilt("a weight lost", weights(lose), "weights are missing", LAYER),
    *spoilt("a weight of another shape", weights(narrow), "another shape", LAYER),
    checkpoint("a kind that scores no text", new_reward_model,
               lambda folder: base(folder, edit("config.json", model_type="whisper")), "cannot be read"),
    checkpoint("several labels", models.load_reward_model, many_labels, "has one label, this one has 3"),
    checkpoint("several labels to start from", new_reward_model, many_labels, "has one label, this one has 3"),
    checkpoint("a language model for a reward model", models.load_reward_model, lambda folder: base(folder, unspoilt),
               "no reward model", "score.weight"),
    checkpoint("a reward model for a language model", models.load_language_model,
               lambda folder: saved(folder, unspoilt),
               "no causal language model", "lm_head.weight"),
    checkpoint("an encoder for a language model", models.load_language_model,
               lambda folder: Path(tiny.save_encoder(folder / "encoder")), "no causal language model"),
    checkpoint("a truncated head", models.load_reward_model, lambda folder: head(folder, cut), "cannot be read"),
    checkpoint("a head without its score", models.load_reward_model,
               lambda folder: head(folder, weights(lambda found: found.pop("score.weight"))), "score.weight"),
    checkpoint("a head of NaN", models.load_reward_model,
               lambda folder: head(folder, weights(lambda found: found["score.weight"].fill_(math.nan))), "not finite"),
    checkpoint("a head that is no matrix", models.load_reward_model,
               lambda folder: head(folder,
               weights(lambda found: found.update({"hidden.weight": torch.ones(3)}))), "no matrix"),
    checkpoint("dropout that a model has no place for",
               lambda path: models.reward_model(path, head_seed=0, dropout=0.1),
               lambda folder: Path(tiny.save_encoder(folder / "encoder")), "no attention_dropout"),
    checkpoint("no tokenizer", models.load_tokenizer, lambda folder: base(folder, no_words), "cannot be read"),
    checkpoint("a broken tokenizer", models.load_tokenizer,
               lambda folder: base(folder, overwrite("tokenizer.json", "{")),
               "cannot be read"),
    checkpoint("a tokenizer of another make", models.load_tokenizer,
               lambda folder: base(folder, overwrite("tokenizer.json", '{"model": 3}')), "cannot be read"),
    checkpoint("a tokenizer without padding or end", models.load_tokenizer, lambda folder: base(folder, no_pad_no_end),
               "neither a padding nor an end token"),
    checkpoint("a tokenizer with code of strangers", models.load_tokenizer, lambda folder: base(folder, STRANGE_WORDS),
               "custom code"),
    checkpoint("no features", models.load_features, lambda folder: folder / "none.safetensors", "No such file",
               error=FileNotFoundError),
    checkpoint("features without ids", models.load_features, features_without_ids, "not a file of cached features"),
    checkpoint("features that are no features", models.load_features, put("base.safetensors", "x"),
               "not a file of cached features"),
    checkpoint("features with fewer ids", models.load_features, features(lambda x, ids: (x, ids[:2])),
               "do not fit 2 ids"),
    checkpoint("features with an id twice", models.load_features, features(lambda x, ids: (x, ["a", "b", "a"])),
               "each once"),
    checkpoint("features in one dimension", models.load_features, features(lambda x, ids: (x[:, 0].clone(), ids)),
               "shape (3,)"),
    checkpoint("features of NaN", models.load_features, features(lambda x, ids: (x * math.nan, ids)),
               "3 rows, the first is 'a'"),
    checkpoint("features without ids to start from", new_reward_model, features_without_ids,
               "not a file of cached features"),
    checkpoint("texts longer than the encoder",
               lambda path: models.encode(str(path), [("one", "two")], max_length=4096),
               lambda folder: Path(tiny.save_encoder(folder / "encoder")), "512", "4096"),
]  # fmt: skip


# ---------------------------------------------------------------- tables of strength


def strength(id: str, make: Callable, *says: str) -> Case:
    return Case(f"strength: {id}", make, lambda path: voting.read_strength(path, ["007", "b"]), says)


def strengths(**changed) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        table = {"pair_id": ["007", "b"], "mean": [0.1, -0.2], "std": [0.0, 1.0]} | changed
        pd.DataFrame({name: column for name, column in table.items() if column is not ...}).to_parquet(
            folder / "s.parquet"
        )
        return folder / "s.parquet"

    return make


STRENGTHS = [
    strength("not there", nowhere, "not a table"),
    strength("a folder", a_folder, "not a table"),
    strength("an empty CSV", put("s.csv"), "not a table"),
    strength("CSV that is not UTF-8", put("s.csv", b"pair_id,mean,std\ncaf\xe9,1,1\n"), "not a table"),
    strength("a Parquet in name only", put("s.parquet", "pair_id"), "not a table"),
    strength("no mean", strengths(mean=...), "no column mean; there are pair_id, std"),
    strength("no pair_id", strengths(pair_id=...), "no column pair_id"),
    strength("means in words", strengths(mean=["high", "low"]), "column mean holds no numbers"),
    strength("spreads in words", put("s.csv", "pair_id,mean,std\n007,1,small\nb,1,1\n"), "column std holds no numbers"),
    strength("a mean of NaN", strengths(mean=[0.1, math.nan]), "no finite mean and spread", "'b'"),
    strength("a mean left empty in CSV", put("s.csv", "pair_id,mean,std\n007,,1\nb,1,1\n"),
             "no finite mean and spread", "'007'"),
    strength("a spread without end", strengths(std=[math.inf, 1.0]), "no finite mean and spread", "'007'"),
    strength("a spread below zero", strengths(std=[0.1, -0.1]), "no finite mean and spread", "'b'"),
    strength("a pair twice", strengths(pair_id=["b", "b"]), "1 pairs twice, the first is 'b'"),
    strength("a pair that is missing", strengths(pair_id=["007", "c"]), "1 pairs missing, the first is 'b'"),
    strength("a pair without a name", strengths(pair_id=["007", None]), "row 2 has no pair_id"),
]  # fmt: skip


# ---------------------------------------------------------------- all of them

CASES = [*TABLES, *FILES, *HH, *PEOPLE, *ANNOTATED, *PARAMETERS, *CHECKPOINTS, *STRENGTHS]
DROPPED = [case for case in CASES if case.clean]


def id_of(case: Case) -> str:
    return case.id


@pytest.mark.parametrize("case", CASES, ids=id_of)
def test_bad_input_is_refused_with_its_file_and_place(case: Case, tmp_path: Path):
    path = case.make(tmp_path)
    with pytest.raises(case.error) as refused:
        case.call(path)
    message = str(refused.value)
    assert str(path) in message
    assert [text for text in case.says if text not in message] == [], message
    assert not list(tmp_path.rglob("ran")), "code of strangers was run"


@pytest.mark.parametrize("case", DROPPED, ids=id_of)
def test_dropped_rows_are_counted_and_leave_the_others_as_they_are(case: Case, tmp_path: Path, capsys):
    expected = case.call(case.clean(made(tmp_path / "clean")))
    capsys.readouterr()
    kept = case.call(case.make(made(tmp_path / "bad")), "drop")
    told = [line for line in capsys.readouterr().err.splitlines() if "left out" in line]
    assert kept == expected
    assert told == [f"  left out, {case.left_out}"]


def made(folder: Path) -> Path:
    folder.mkdir()
    return folder


def test_the_table_is_long_and_no_case_stands_in_it_twice():
    assert len(CASES) >= 60 and len({case.id for case in CASES}) == len(CASES)
    assert len(DROPPED) >= 60


def test_code_of_strangers_in_a_known_kind_of_checkpoint_is_never_run(tmp_path: Path):
    folder = base(tmp_path, remote_code("config.json", CODE))
    assert type(models.load_language_model(folder)).__module__.startswith("transformers.")
    assert not (folder / "ran").exists()
