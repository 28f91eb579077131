"""Preference data from outside: every file becomes checked rows, and every bad row is named by file and place.

``preference_rows`` reads labelled pairs (Anthropic HH, a reader's own table), ``convarg_pairs`` and
``pandalm_pairs`` read pairs that several people judged, ``annotated_pairs`` a set with its voters' scores.
"""

import csv
import gzip
import hashlib
import io
import json
import math
import re
import sys
import xml.etree.ElementTree as ET
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rmlib import data, runs

SPLITS = ("train", "validation", "test", "ood")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
PATTERNS = tuple(f"*{ending}" for ending in ENDINGS)
HH_FILES = ("train.jsonl.gz", "test.jsonl.gz")
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
ROLES = {"system": "\n\n", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}  # and how HH marks them
ONE_SUBSET = "whole set"  # the subset of a set without subsets
DIFFER = "the two dialogues differ before the last reply"
CONVARG_FIELDS = {"pair_id": "id", "response_a": "arg1/text", "response_b": "arg2/text", "id_a": "arg1/id"}
CONVARG_FIELDS |= {"id_b": "arg2/id", "title": "debateMetaData/title", "stance": "arg1/stance"}
CONVARG_VOTES = {"a1": 1, "a2": -1, "equal": 0}
Placed = tuple[str, dict]  # a row after its place: file and number


class DataError(ValueError):
    """Data that cannot be used as it is; the message names file and row."""


class BadRow(Exception):
    """Why one row cannot be used: up to a colon the kind, under which rows are counted, then what is wrong here."""


def _check(good: object, problem: str, error: type[Exception] = BadRow) -> None:
    if not good:
        raise error(problem)


def sift(rows: Iterable[Placed], path: Path, on_bad_row: str, *tests: Callable[[str, dict], dict]) -> list[dict]:
    """What ``tests`` make of every row, each given its place and what the test before made of it.

    Rows for which one raises :class:`BadRow` are left out and counted (``"drop"``), or named in a
    :class:`DataError` (``"error"``).
    """
    _check(on_bad_row in ("error", "drop"), f"unknown on_bad_row {on_bad_row!r}; choose from error, drop", ValueError)
    kept, bad = [], []
    for place, row in rows:
        try:
            _check(None not in row, f"not readable: {row.get(None)}")
            for test in tests:
                row = test(place, row)
            kept.append(row)
        except BadRow as problem:
            bad.append((place, str(problem)))
    if bad and on_bad_row == "error":
        head = f"{len(bad)} bad rows in {path}; mend them, or set on_bad_row to 'drop' to leave them out"
        shown = [f"{place}: {problem}" for place, problem in bad[:10]] + [f"and {len(bad) - 10} more"] * (len(bad) > 10)
        raise DataError("\n  ".join([head, *shown]))
    for kind, n in sorted(Counter(problem.partition(": ")[0] for _, problem in bad).items()):
        print(f"  left out, {kind}: {n}", file=sys.stderr, flush=True)  # seen in the notebook and in the terminal
    _check(kept, f"{path}: no usable row", DataError)
    return kept


# ---------------------------------------------------------------- files and their rows


def locate(path: str, revision: str = "main") -> Path:
    """Where a data set lies: ``hub:owner/name`` is fetched at ``revision``, else a path under the data folder.

    Raises ``FileNotFoundError`` naming the place that was looked at.
    """
    if path.startswith("hub:"):
        try:
            return Path(snapshot_download(path[4:], repo_type="dataset", revision=revision, allow_patterns=PATTERNS))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{path} at {revision} cannot be fetched: {error}") from error
    place = runs.data_folder() / path
    problem = f"no data at {place} (data_path = {path!r}); docs/your_own_data.md says where to get it"
    _check(path and place.exists(), problem, FileNotFoundError)
    return place


def read_folder(path: Path, patterns: Sequence[str]) -> Iterator[Placed]:
    """``folder/place`` and row of a file, or of all files below a folder whose names fit; see :func:`read_rows`."""
    files = [path] if path.is_file() else sorted(file for pattern in patterns for file in path.rglob(pattern))
    _check(files, f"{path}: no file named {' or '.join(patterns)} in this folder or below", DataError)
    yield from ((f"{file.parent.name}/{place}", row) for file in files for place, row in read_rows(file))


def read_rows(path: Path) -> Iterator[Placed]:
    """(place, row) of every row of a JSONL, JSON, CSV or Parquet file, gzipped or not; rows count from 1.

    A row that cannot be read comes as ``{None: reason}``; a file that cannot, raises :class:`DataError`.
    """
    known = ", ".join(ENDINGS)
    _check(not path.is_dir(), f"{path} is a folder: name one file ({known})", DataError)
    _check(path.name.endswith(ENDINGS), f"{path}: unknown kind of file; choose from {known}", DataError)
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        parse, pieces = _pieces(path.name.removesuffix(".gz"), content)
        rows = [_row(parse, piece) for piece in pieces]
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from None
    except (pyarrow.ArrowException, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None
    _check(rows, f"{path}: the file holds no rows", DataError)
    yield from ((f"{path.name} row {n}", row) for n, row in enumerate(rows, 1))


def _pieces(name: str, content: bytes) -> tuple[Callable, Iterable]:
    """The pieces of a file, and what makes a row of one; so the piece that cannot be read spoils no other."""
    if name.endswith(".parquet"):
        table = pyarrow.parquet.read_table(io.BytesIO(content))
        return lambda batch: batch.to_pylist()[0], table.to_batches(max_chunksize=1)
    text = content.decode("utf-8-sig", "surrogateescape")  # _row tells what is not UTF-8
    if name.endswith(".csv"):
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            for column, n in Counter(reader.fieldnames).items():
                _check(n == 1, f"column {column!r} is there twice", ValueError)
            return dict, [row if None not in row else {None: "too many fields"} for row in reader]
        except csv.Error as error:
            raise ValueError(f"line {reader.reader.line_num}: {error}") from None
    parse = partial(json.loads, object_pairs_hook=_no_repeats)
    if name.endswith(".json") and text.lstrip()[:1] == "[":
        return lambda row: row, parse(text)
    return parse, [line for line in re.split(r"\r\n|\r|\n", text) if line.strip()]


def _row(parse: Callable[[object], object], piece: object) -> dict:
    try:
        row = parse(piece)
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeError:
        return {None: "not UTF-8"}
    except (ValueError, RecursionError) as error:
        return {None: f"not JSON ({error})"}
    return row if isinstance(row, dict) else {None: "not an object"}


def _no_repeats(items: list[tuple[str, object]]) -> dict:
    row = dict(items)
    return row if len(row) == len(items) else row | {None: "a key is given twice"}


def _field(row: Mapping, name: str, *types: type, note: str = "") -> object:
    """The value of a field that must be there, not null and of one of the types, if any are given."""
    _check(name in row, f"missing field: {name!r}{note}; the row has {', '.join(map(str, row))}")
    value = row[name]
    _check(value is not None, f"null field: {name!r}")
    _check(not types or type(value) in types, f"wrong type: {name} is a {type(value).__name__}, not text{note}")
    return value


def _name(row: Mapping, name: str) -> str:
    value = str(_field(row, name, str, int))
    _check(value.strip(), f"empty field: {name!r}")
    return value


def _number(row: Mapping, name: str) -> float:
    given = _field(row, name)
    try:
        value = float(given if type(given) is not bool else "")
    except (TypeError, ValueError):
        raise BadRow(f"wrong type: {name} = {given!r:.40}, not a number") from None
    _check(math.isfinite(value), f"not finite: {name} = {value}")
    return value


def _votes(row: Mapping, name: str) -> list[int]:
    votes = row[name]
    if isinstance(votes, str):  # CSV has no lists
        votes = [{"1": 1, "+1": 1, "0": 0, "-1": -1}.get(vote.strip()) for vote in votes.strip("[] ").split(",")]
    good = isinstance(votes, list) and votes and all(type(vote) is int and vote in (1, 0, -1) for vote in votes)
    _check(good, f"bad votes: {row[name]!r:.60}: a list of +1 (for the label), 0 and -1")
    return votes


def _split(row: Mapping, name: str) -> str:
    _check(row[name] in SPLITS, f"unknown split: {row[name]!r}; choose from {', '.join(SPLITS)}")
    return row[name]


def _scores(row: Mapping, name: str) -> list[float]:
    scores = _field(row, name)
    finite = isinstance(scores, list) and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
    _check(finite and len(scores) > 1, f"bad scores: {name} = {scores!r:.60}: a list of at least two finite numbers")
    return list(map(float, scores))


def _turns(name: str, value: object) -> list[dict]:
    turns = [{"role": "user", "content": value}] if isinstance(value, str) else value
    problem = f"wrong type: {name} is {type(turns).__name__}, not text or a list of turns"
    _check(turns and isinstance(turns, list), problem)
    for turn in turns:
        good = isinstance(turn, dict) and turn.get("role") in tuple(ROLES) and isinstance(turn.get("content"), str)
        _check(good, f"wrong type: {name}: a turn has a role ({', '.join(ROLES)}) and a content, not {turn!r:.80}")
        _check(turn["content"].strip(), f"empty field: a turn of {name!r}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


# ---------------------------------------------------------------- labelled pairs


def preference_rows(
    source: str,
    path: Path,
    *,
    prompt_column: str | None = "prompt",
    on_bad_row: str = "error",
    validation_share: float = 0.1,
    seed: int = 0,
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> list[dict]:
    """Preference rows of Anthropic HH (``"hh"``: file or folder) or of a reader's own file (``"table"``).

    A table holds ``chosen, rejected`` and, unless ``prompt_column`` is None, the prompt, as text or as lists of
    ``{"role", "content"}`` turns, which go through the chat template of ``tokenizer``; optionally ``pair_id, votes,
    gold_chosen, gold_rejected, split, subset, topic``. Where rows have no split, ``seed`` draws ``validation_share`` of
    the prompts. Pairs that do not fit, or do not differ, in ``max_length`` tokens are bad rows. Raises
    :class:`DataError` naming them.
    """
    table_pair = partial(_table_pair, prompt_column=prompt_column, tokenizer=tokenizer)
    pair_of = {"hh": _hh_pair, "pandalm": _pandalm_pair, "table": table_pair}[source]
    given = read_folder(path, HH_FILES) if source == "hh" else read_rows(path)
    fits = partial(_fits, tokenizer=tokenizer, max_length=max_length)
    once = partial(_once, columns=set(), seen={}, split_of={})
    rows = sift(given, path, on_bad_row, pair_of, once, fits)
    print(f"{path.name}: {len(rows)} pairs")
    if source == "hh" and all("split" in row for row in rows):  # HH's test part alone is divided like any set
        rows = [{name: value for name, value in row.items() if name != "split"} for row in rows]
    return _with_splits(rows, path, validation_share, seed)


def _hh_pair(place: str, row: dict) -> dict:
    """Prompt and two responses of one HH row: the two dialogues must differ in their last reply alone."""
    sides = [_field(row, side, str).rpartition(ASSISTANT) for side in ("chosen", "rejected")]
    _check(all(mark and HUMAN in prompt for prompt, mark, _ in sides), "not a dialogue of Human and Assistant")
    (prompt, _, chosen), (other_prompt, _, rejected) = sides
    _check(prompt == other_prompt, DIFFER)
    folder, _, file = place.partition("/")
    pair = _pair(prompt + ASSISTANT, chosen, rejected) | {"pair_id": place, "subset": folder, "topic": folder}
    return pair | ({"split": "test"} if "test" in file else {})


def _table_pair(place: str, row: dict, prompt_column: str | None, tokenizer) -> dict:
    sides = [_field(row, side) for side in ("chosen", "rejected")]
    prompt = None if prompt_column is None else _field(row, prompt_column, note=", the prompt_column")
    if any(isinstance(side, str) for side in sides):
        for name in filter(None, ("chosen", "rejected", prompt_column)):
            _field(row, name, str, note=" like the others")
        pair = _pair(prompt, *sides) | {"chat_template": ""}
    else:
        pair = _conversation(prompt, *sides, tokenizer)
    subset = str(row.get("subset") or ONE_SUBSET)
    _check(subset != "all", "reserved name: subset 'all' stands for all subsets together")
    both_or_none = ("gold_chosen" in row) == ("gold_rejected" in row)
    _check(both_or_none, "missing field: gold_chosen and gold_rejected come together")
    pair |= {"subset": subset, "topic": str(row.get("topic") or subset)}
    optional = {"votes": _votes, "gold_chosen": _number, "gold_rejected": _number, "split": _split, "pair_id": _name}
    return pair | {name: read(row, name) for name, read in optional.items() if name in row}


def _pair(prompt: str | None, chosen: str, rejected: str) -> dict:
    """The columns that follow from the texts; ids are digests, so equal texts have equal ids everywhere."""
    texts = {"prompt": prompt or "", "chosen": chosen, "rejected": rejected}
    empty = [name for name, text in texts.items() if not text.strip() and (name != "prompt" or prompt is not None)]
    _check(not empty, f"empty field: {', '.join(map(repr, empty))}")
    _check(chosen.strip() != rejected.strip(), "identical responses")
    pair_id = _digest(*texts.values())
    ids = {f"{side}_id": _digest(texts["prompt"], texts[side]) for side in ("chosen", "rejected")}
    return {"pair_id": pair_id, "prompt_id": _digest(prompt) if prompt else pair_id} | texts | ids


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


def _conversation(prompt: object, chosen: object, rejected: object, tokenizer) -> dict:
    """A pair of turn lists: what both share before the last reply, after ``prompt`` if there is one, is the prompt.

    It goes through the tokenizer's chat template up to where the assistant answers, else into HH's form.
    """
    (*asked, first), (*others, second) = _turns("chosen", chosen), _turns("rejected", rejected)
    before = [] if prompt is None else _turns("prompt", prompt)
    _check(asked == others, DIFFER)
    _check(first["role"] == second["role"] == "assistant", "wrong role: the last turn is not the assistant's")
    asked = asked if asked[: len(before)] == before else before + asked
    _check(asked, "empty field: 'prompt'")
    replies = [first["content"], second["content"]]
    template = chat_template(tokenizer)
    if not template:
        text = "".join(ROLES[turn["role"]] + turn["content"] for turn in asked) + ASSISTANT
        return _pair(text, *(f" {reply.strip()}" for reply in replies)) | {"chat_template": ""}
    try:
        text = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    except TemplateError as error:
        raise BadRow(f"refused by the chat template: {error}") from None
    return _pair(text, *replies) | {"chat_template": _digest(template)}


def chat_template(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The tokenizer's chat template; empty if it has none."""
    return getattr(tokenizer, "chat_template", None) or ""


def _once(place: str, row: dict, columns: set, seen: dict, split_of: dict) -> dict:
    """A row with the same ``columns`` as all, a pair and an id not yet ``seen``, and a prompt that has one split."""
    pair, name, split = (row["prompt"], row["chosen"], row["rejected"]), row["pair_id"], row.get("split", "none")
    names = {*row, "split"}  # rows without split are drawn
    odd = names ^ (columns or names)
    _check(not odd, f"missing field: only some rows have {', '.join(sorted(odd))}")
    columns |= names
    _check(pair not in seen, f"repeated pair: it stands in {seen.get(pair)}")
    _check(name not in seen, f"duplicated id: {name!r} belongs to {seen.get(name)}")
    there, first = split_of.setdefault(row["prompt_id"], (split, place))
    _check(split == there, f"prompt in two splits: {there} in {first}, here {split}")
    seen |= {pair: place, name: place}
    return row


def _fits(place: str, row: dict, tokenizer, max_length: int | None) -> dict:
    """A row that a model reads in ``max_length`` tokens, and whose two responses differ in what it reads."""
    if tokenizer is None or max_length is None:
        return row
    prompt, responses = row["prompt"], [row["chosen"], row["rejected"]]
    if data.is_encoder(tokenizer):
        read = tokenizer([prompt, prompt], responses, truncation=True, max_length=max_length)["input_ids"]
    else:
        [asked] = data.prompt_ids([prompt], tokenizer)
        read = [[*asked, *said] for said in data.response_ids(responses, tokenizer)]
    longer = max(map(len, read))
    _check(longer <= max_length, f"too long: {longer} tokens exceed max_length {max_length}")
    _check(read[0] != read[1], f"identical responses after tokenization: of at most {max_length} tokens")
    return row


def _with_splits(rows: list[dict], path: Path, validation_share: float, seed: int) -> list[dict]:
    """Rows with a split each, drawn by prompt for those that have none."""
    prompts = sorted({row["prompt_id"] for row in rows if "split" not in row})
    held = round(validation_share * len(prompts))
    problem = f"{path}: validation_share {validation_share} of {len(prompts)} prompts leaves a split empty"
    _check(0 < held < len(prompts) or not prompts, problem, DataError)
    validation = set(np.random.default_rng(seed).permutation(prompts)[:held].tolist())
    split = [{"split": "validation" if row["prompt_id"] in validation else "train"} | row for row in rows]
    there = {row["split"] for row in split}
    problem = f"{path}: splits are {', '.join(sorted(there))}; train, and validation or ood, are needed"
    _check("train" in there and there & {"validation", "ood"}, problem, DataError)
    return split


# ---------------------------------------------------------------- people's votes and scores


def pandalm_pairs(path: Path, **settings) -> list[dict]:
    """Pair set of PandaLM's test set (Wang et al. 2023): two answers to an instruction, three people's verdicts.

    ``settings`` are those of :func:`preference_rows`.
    """
    renamed = {"chosen": "response_a", "rejected": "response_b", "chosen_id": "id_a", "rejected_id": "id_b"}
    rows = preference_rows("pandalm", path, **settings)
    return [{renamed.get(name, name): value for name, value in row.items()} for row in rows]


def _pandalm_pair(place: str, row: dict) -> dict:
    prompt = "\n".join(filter(None, (_field(row, "instruction", str), _field(row, "input", str))))
    verdicts = [_field(row, f"annotator{n}") for n in (1, 2, 3)]
    good = all(type(verdict) is int and verdict in (0, 1, 2) for verdict in verdicts)
    _check(good, f"bad votes: {verdicts!r:.60}: a list of 1, 2 and 0 (a tie)")
    pair = _pair(prompt, _field(row, "response1", str), _field(row, "response2", str))
    pair |= dict.fromkeys(("subset", "topic"), str(row.get("motivation_app") or ONE_SUBSET))
    return pair | {"pair_id": _name(row, "idx"), "ballots": [(0, 1, -1)[verdict] for verdict in verdicts]}


def convarg_pairs(folder: str | Path, *, n_ood_debates: int, seed: int) -> list[dict]:
    """Pair set of UKPConvArg1 (Habernal and Gurevych 2016) from its published XML, one row a pair.

    The prompt is debate and stance; ``seed`` draws ``n_ood_debates`` whole debates for split ``ood``, the others are
    ``train``. Identical texts are left out and counted. Raises ``FileNotFoundError`` for a folder without XML, and
    :class:`DataError` naming the file and pair that is bad.
    """
    paths = sorted(Path(folder).glob("*.xml"))
    _check(paths, f"no UKPConvArg1 XML in {folder}; get it as docs/your_own_data.md says", FileNotFoundError)
    rows = [row for path in paths for row in _convarg_file(path)]
    debates = sorted({row["subset"] for row in rows})
    problem = f"{folder}: n_ood_debates {n_ood_debates} leaves no debate to train on: there are {len(debates)}"
    _check(n_ood_debates < len(debates), problem, DataError)
    ood = set(np.random.default_rng(seed).choice(debates, n_ood_debates, replace=False).tolist())
    distinct = [row for row in rows if row["response_a"] != row["response_b"]]
    print(f"UKPConvArg1: {len(rows)} pairs in {len(debates)} debates, {len(ood)} of them held out")
    print(f"  left out, identical texts: {len(rows) - len(distinct)}")
    return [row | {"split": "ood" if row["subset"] in ood else "train"} for row in distinct]


def _convarg_file(path: Path) -> Iterator[dict]:
    try:
        pairs = ET.parse(path).getroot()
    except (ET.ParseError, LookupError) as error:
        raise DataError(f"{path}: not readable as XML ({error})") from None
    ids: set[str] = set()
    for n, pair in enumerate(pairs):
        row = {name: (pair.findtext(field) or "").strip() for name, field in CONVARG_FIELDS.items()}
        votes = [vote.findtext("value") for vote in pair.iter("mTurkAssignment")]
        wrong = [f"missing {CONVARG_FIELDS[name]}" for name, text in row.items() if not text]
        wrong += [f"votes {votes}"] * (not votes or not set(votes) <= set(CONVARG_VOTES))
        wrong += ["duplicated id"] * (row["pair_id"] in ids)
        _check(not wrong, f"{path}: pair {n} ({pair.findtext('id')}): {', '.join(wrong)}", DataError)
        ids.add(row["pair_id"])
        row |= {name: f"{path.stem}/{row[name]}" for name in ("pair_id", "id_a", "id_b")}
        row |= {"prompt": f"{row.pop('title')} | {row.pop('stance')}", "prompt_id": path.stem, "topic": path.stem}
        row["subset"] = path.stem.split("_")[0].strip("-")
        yield row | {"ballots": [CONVARG_VOTES[vote] for vote in votes]}


def annotated_pairs(path: Path, on_bad_row: str = "error") -> pd.DataFrame:
    """A set with its voters' scores, in the columns that the authors released or that chapter 01 exports.

    One row a pair: ``split, prompt, chosen, rejected, scores_chosen, scores_rejected`` (one score a voter),
    ``shipped_mean, shipped_std`` (the columns as they came), ``judge`` (1 for chosen, 0 for rejected, -1 where
    there is no verdict). Files of a folder name their split. Raises :class:`DataError` naming the bad rows.
    """
    return pd.DataFrame(sift(read_folder(path, PATTERNS), path, on_bad_row, _annotated_pair))


def _annotated_pair(place: str, row: dict) -> dict:
    row = {name.replace(" ", "_"): value for name, value in row.items()}
    scores = {f"scores_{side}": _scores(row, f"{side}_score_list") for side in ("chosen", "rejected")}
    first, second = map(len, scores.values())
    _check(first == second, f"bad scores: {first} for chosen, {second} for rejected")
    (asked, chosen), (_, rejected) = _said(row, "chosen"), _said(row, "rejected")
    _pair(None, chosen, rejected)  # neither empty nor the same
    judge = row.get("GPT4_label", row.get("judge"))
    _check(judge in (None, -1, 0, 1), f"bad label: {judge!r}: 1, 0, or -1 for none")
    split = str(row.get("split") or place.partition("/")[2].split(".")[0])  # perhaps train-00000-of-00002
    known = [name for name in ("train", "validation") if split.startswith(name[:5])]
    texts = {"split": known[0] if known else split, "prompt": asked, "chosen": chosen, "rejected": rejected}
    shipped = {f"shipped_{what}": _number(row, f"{what}_preference_difference") for what in ("mean", "std")}
    return texts | scores | shipped | {"judge": -1 if judge is None else int(judge)}


def _said(row: Mapping, side: str) -> tuple[str, str]:
    """What was asked and what was replied: from a list of the turns' texts, or from text beside a prompt."""
    value = _field(row, side)
    turns = [row.get("prompt", ""), value] if isinstance(value, str) else value
    good = turns and isinstance(turns, list) and all(isinstance(turn, str) for turn in turns)
    _check(good, f"wrong type: {side} = {value!r:.60}: text, or a list of the turns' texts")
    return "\n".join(turns[:-1]), turns[-1]
