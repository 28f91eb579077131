"""Preference data from outside: every file becomes checked rows, and every bad row is named by file and place.

``preference_rows`` reads labelled pairs (Anthropic HH, a reader's own table), ``convarg_pairs`` and
``pandalm_pairs`` read pairs that several people judged, ``annotated_pairs`` a set with its voters' scores.
"""

import codecs
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
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet
from huggingface_hub import snapshot_download
from jinja2 import TemplateError
from pyarrow import ArrowException
from transformers import PreTrainedTokenizerBase

from rmlib import data, runs

SPLITS = ("train", "validation", "test", "ood")
ROLES = ("system", "user", "assistant")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".parquet")
HH_FILES = ("train.jsonl.gz", "test.jsonl.gz")
ONE_SUBSET = "whole set"  # the subset of a set without subsets
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


class DataError(ValueError):
    """Data that cannot be used as it is; the message names file and row."""


class BadRow(Exception):
    """Why one row cannot be used: a kind, under which rows are counted, and a detail."""

    def __init__(self, kind: str, detail: str = ""):
        super().__init__(kind, detail)
        self.kind, self.detail = kind, detail


class Sieve:
    """What becomes of bad rows: ``"error"`` stops with their places, ``"drop"`` leaves them out and counts them."""

    def __init__(self, on_bad_row: str):
        if on_bad_row not in ("error", "drop"):
            raise ValueError(f"unknown on_bad_row {on_bad_row!r}; choose from error, drop")
        self.on_bad_row = on_bad_row
        self.bad: list[tuple[str, BadRow]] = []

    def sift(self, rows: Sequence[tuple[str, dict]], test: Callable[[str, dict], dict]) -> list[tuple[str, dict]]:
        """What ``test(place, row)`` makes of every row; rows for which it raises :class:`BadRow` are set aside."""
        kept = []
        for place, row in rows:
            try:
                kept.append((place, test(place, row)))
            except BadRow as problem:
                self.bad.append((place, problem))
        return kept

    def close(self, n_kept: int, path: Path) -> None:
        """Print how many rows were left out, or raise :class:`DataError` naming the first of them."""
        if self.bad and self.on_bad_row == "error":
            shown = [f"{place}: {bad.kind}: {bad.detail}".removesuffix(": ") for place, bad in self.bad[:10]]
            more = [f"and {len(self.bad) - 10} more"] * (len(self.bad) > 10)
            hint = "mend them, or set on_bad_row to 'drop' to leave them out"
            raise DataError("\n  ".join([f"{len(self.bad)} bad rows in {path}; {hint}", *shown, *more]))
        for kind, n in sorted(Counter(bad.kind for _, bad in self.bad).items()):
            print(f"  left out, {kind}: {n}", file=sys.stderr, flush=True)  # seen in the notebook and in the terminal
        if not n_kept:
            raise DataError(f"{path}: no usable row")


# ---------------------------------------------------------------- files


def locate(path: str, revision: str = "main") -> Path:
    """Where a data set lies: ``hub:owner/name`` is fetched at ``revision``, else a path under the data folder.

    Raises ``FileNotFoundError`` naming the place that was looked at.
    """
    if path.startswith("hub:"):
        wanted = [f"*{ending}" for ending in ENDINGS]
        try:
            return Path(snapshot_download(path[4:], repo_type="dataset", revision=revision, allow_patterns=wanted))
        except (OSError, ValueError) as error:
            raise FileNotFoundError(f"{path} at {revision} cannot be fetched: {error}") from error
    place = runs.data_folder() / path
    if not path or not place.exists():
        raise FileNotFoundError(
            f"no data at {place} (data_path = {path!r}); docs/your_own_data.md says where to get it"
        )
    return place


def read_rows(path: Path) -> list[tuple[str, dict]]:
    """(place, row) of every row of a JSONL, JSON, CSV or Parquet file, gzipped or not; rows count from 1.

    A row that cannot be read comes as ``{None: reason}``. Raises :class:`DataError` naming a file that cannot be
    read at all: a folder, empty, truncated, or of another kind.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name one file ({', '.join(ENDINGS)})")
    if not path.name.endswith(ENDINGS):
        raise DataError(f"{path}: unknown kind of file; choose from {', '.join(ENDINGS)}")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        rows = list(_rows_of(path.name.removesuffix(".gz"), content))
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: not a whole gzip file ({error})") from None
    except (ArrowException, OSError, ValueError, RecursionError) as error:
        raise DataError(f"{path}: {error}") from None
    if not rows:
        raise DataError(f"{path}: the file holds no rows")
    return [(f"{path.name} row {n}", row) for n, row in enumerate(rows, 1)]


def _rows_of(name: str, content: bytes) -> Iterator[dict]:
    if name.endswith(".parquet"):
        yield from _parquet_rows(pyarrow.parquet.read_table(io.BytesIO(content)))
        return
    text = content.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")  # _readable tells what is not UTF-8
    if name.endswith(".csv"):
        yield from _csv_rows(text)
    elif name.endswith(".json") and text.lstrip()[:1] == "[":
        rows = json.loads(text, object_pairs_hook=_no_repeats)
        yield from (row if isinstance(row, dict) else {None: "not an object"} for row in rows)
    else:
        yield from (_json_line(line) for line in re.split(r"\r\n|\r|\n", text) if line.strip())


def _parquet_rows(table: pyarrow.Table) -> Iterator[dict]:
    try:
        yield from table.to_pylist()
    except UnicodeDecodeError:  # one row spoils all; find it
        for n in range(table.num_rows):
            try:
                yield from table.slice(n, 1).to_pylist()
            except UnicodeDecodeError:
                yield {None: "not UTF-8"}


def _csv_rows(text: str) -> Iterator[dict]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        if repeated := [name for name, n in Counter(reader.fieldnames or []).items() if n > 1]:
            raise ValueError(f"column {repeated[0]!r} is there twice")
        yield from reader
    except csv.Error as error:
        raise ValueError(f"line {reader.reader.line_num}: {error}") from None


def _json_line(line: str) -> dict:
    try:
        row = json.loads(line, object_pairs_hook=_no_repeats)
    except (ValueError, RecursionError) as error:
        return {None: f"not JSON ({error})"}
    return row if isinstance(row, dict) else {None: "not an object"}


def _no_repeats(items: list[tuple[str, object]]) -> dict:
    row = dict(items)
    return row if len(row) == len(items) else row | {None: "a key is given twice"}


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
    ``{"role", "content"}`` turns; optionally ``pair_id, votes, gold_chosen, gold_rejected, split, subset``. Turns
    go through the chat template of ``tokenizer``. Rows without split are drawn by prompt: ``validation_share``
    of the prompts, by ``seed``, for validation. With ``max_length`` (tokens) pairs that are too long for a causal
    model, or the same after an encoder's cut, are bad rows. Raises :class:`DataError` naming the bad rows.
    """
    sieve = Sieve(on_bad_row)
    if source == "hh":
        rows = sieve.sift(_hh_files(path), _hh_pair)
    else:
        rows = sieve.sift(read_rows(path), lambda _, row: _table_pair(row, prompt_column, tokenizer))
    rows = sieve.sift(rows, _Once())
    if rows and tokenizer is not None and max_length is not None:
        rows = _fitting(rows, tokenizer, max_length, sieve)
    sieve.close(len(rows), path)
    print(f"{path.name}: {len(rows)} pairs")
    return _with_splits([row for _, row in rows], path, validation_share, seed)


def _hh_files(path: Path) -> list[tuple[str, dict]]:
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*.jsonl.gz") if p.name in HH_FILES)
    if not files:
        raise DataError(f"{path}: neither {' nor '.join(HH_FILES)} in this folder or below")
    both = len({file.name for file in files}) > 1
    return [
        (f"{file.parent.name}/{place}", row | {"subset": file.parent.name, "test": both and "test" in file.name})
        for file in files
        for place, row in read_rows(file)
    ]


def _hh_pair(place: str, row: dict) -> dict:
    """Prompt and two responses of one HH row: the two dialogues must differ in their last reply alone."""
    _readable(row)
    parts = [_text_field(row, side).rpartition(ASSISTANT) for side in ("chosen", "rejected")]
    if any(not mark or HUMAN not in prompt for prompt, mark, _ in parts):
        raise BadRow("not a dialogue of Human and Assistant")
    if parts[0][0] != parts[1][0]:
        raise BadRow("the two dialogues differ before the last reply")
    pair = _pair(parts[0][0] + ASSISTANT, parts[0][2], parts[1][2])
    known = {"pair_id": place, "subset": row["subset"], "topic": row["subset"]}
    return pair | known | ({"split": "test"} if row["test"] else {})


def _table_pair(row: dict, prompt_column: str | None, tokenizer: PreTrainedTokenizerBase | None) -> dict:
    _readable(row)
    sides = [_field(row, side) for side in ("chosen", "rejected")]
    if prompt_column is not None and prompt_column not in row:
        raise BadRow("missing field", f"{prompt_column!r}, the prompt_column; the row has {', '.join(map(str, row))}")
    prompt = None if prompt_column is None else _field(row, prompt_column)
    if all(isinstance(side, str) for side in sides):
        if not isinstance(prompt, str | None):
            raise BadRow("wrong type", f"{prompt_column} is a {type(prompt).__name__}, the responses are text")
        pair = _pair(prompt or "", *sides, may_lack_prompt=prompt_column is None)
    elif any(isinstance(side, str) for side in sides):
        raise BadRow("wrong type", f"chosen is a {type(sides[0]).__name__}, rejected a {type(sides[1]).__name__}")
    else:
        pair = _conversation(prompt, *sides, tokenizer)
    turned = not all(isinstance(side, str) for side in sides) and chat_template(tokenizer)
    pair["chat_template"] = hashlib.sha256(turned.encode()).hexdigest()[:16] if turned else ""
    pair["subset"] = pair["topic"] = str(row.get("subset") or ONE_SUBSET)
    if pair["subset"] == "all":
        raise BadRow("reserved name", "subset 'all' stands for all subsets together")
    pair |= _truth(row)
    if row.get("topic"):
        pair["topic"] = str(row["topic"])
    if "pair_id" in row:
        pair["pair_id"] = _name(row, "pair_id")
    if "split" in row:
        if row["split"] not in SPLITS:
            raise BadRow("unknown split", f"{row['split']!r}; choose from {', '.join(SPLITS)}")
        pair["split"] = row["split"]
    return pair


def _readable(row: Mapping) -> None:
    if None in row:
        raise BadRow("not readable", row[None] if isinstance(row[None], str) else "too many fields")
    try:
        json.dumps(row, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError:
        raise BadRow("not readable", "not UTF-8") from None


def _field(row: Mapping, name: str) -> object:
    if name not in row:
        raise BadRow("missing field", f"{name!r}; the row has {', '.join(map(str, row))}")
    if row[name] is None:
        raise BadRow("null field", repr(name))
    return row[name]


def _name(row: Mapping, name: str) -> str:
    value = _field(row, name)
    if type(value) not in (str, int):
        raise BadRow("wrong type", f"{name} is a {type(value).__name__}, not text")
    if not str(value).strip():
        raise BadRow("empty field", repr(name))
    return str(value)


def _text_field(row: Mapping, name: str) -> str:
    value = _field(row, name)
    if not isinstance(value, str):
        raise BadRow("wrong type", f"{name} is a {type(value).__name__}, not text")
    return value


def _pair(prompt: str, chosen: str, rejected: str, *, may_lack_prompt: bool = False) -> dict:
    """The columns that follow from three texts; ids are digests, so equal texts have equal ids everywhere."""
    for name, text in (("prompt", prompt), ("chosen", chosen), ("rejected", rejected)):
        if not text.strip() and not (name == "prompt" and may_lack_prompt):
            raise BadRow("empty field", repr(name))
    if chosen.strip() == rejected.strip():
        raise BadRow("identical responses")
    ids = {side: _digest(prompt, text) for side, text in (("chosen_id", chosen), ("rejected_id", rejected))}
    pair_id = _digest(prompt, chosen, rejected)
    prompt_id = _digest(prompt) if prompt else pair_id
    return {"pair_id": pair_id, "prompt_id": prompt_id, "prompt": prompt, "chosen": chosen, "rejected": rejected} | ids


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _conversation(prompt: object, chosen: object, rejected: object, tokenizer) -> dict:
    """A pair of turn lists: what both share before the last reply, after ``prompt`` if there is one, is the prompt."""
    first, second = _turns("chosen", chosen), _turns("rejected", rejected)
    before = [] if prompt is None else _turns("prompt", prompt)
    if first[:-1] != second[:-1]:
        raise BadRow("the two dialogues differ before the last reply")
    if any(turns[-1]["role"] != "assistant" for turns in (first, second)):
        raise BadRow("wrong role", "the last turn is not the assistant's")
    asked = first[:-1] if first[: len(before)] == before else before + first[:-1]
    if not asked:
        raise BadRow("empty field", "'prompt'")
    return _pair(
        chat_text(asked, tokenizer), *(reply_text(turns[-1]["content"], tokenizer) for turns in (first, second))
    )


def _turns(name: str, value: object) -> list[dict]:
    turns = [{"role": "user", "content": value}] if name == "prompt" and isinstance(value, str) else value
    if not isinstance(turns, list) or not turns:
        raise BadRow("wrong type", f"{name} is {type(value).__name__}, not text or a list of turns")
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES or not isinstance(turn.get("content"), str):
            raise BadRow(
                "wrong type", f"{name}: a turn has a role ({', '.join(ROLES)}) and a content, not {turn!r:.80}"
            )
        if not turn["content"].strip():
            raise BadRow("empty field", f"a turn of {name!r}")
    return [{"role": turn["role"], "content": turn["content"]} for turn in turns]


def chat_text(turns: Sequence[Mapping], tokenizer: PreTrainedTokenizerBase | None) -> str:
    """Turns up to where the assistant answers, by the tokenizer's chat template, else in HH's form."""
    if chat_template(tokenizer):
        try:
            return tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)
        except TemplateError as error:
            raise BadRow("refused by the chat template", str(error)) from None
    names = {"system": "\n\n", "user": f"{HUMAN} ", "assistant": f"{ASSISTANT} "}
    return "".join(names[turn["role"]] + turn["content"] for turn in turns) + ASSISTANT


def reply_text(content: str, tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The assistant's reply as it follows ``chat_text``."""
    return content if chat_template(tokenizer) else f" {content.strip()}"


def chat_template(tokenizer: PreTrainedTokenizerBase | None) -> str:
    """The tokenizer's chat template; empty if it has none."""
    return getattr(tokenizer, "chat_template", None) or ""


def _truth(row: Mapping) -> dict:
    """Other people's votes or true rewards, where a row has them."""
    found = {}
    if "votes" in row:
        votes = row["votes"]
        if isinstance(votes, str):  # CSV has no lists
            votes = [int(v) if re.fullmatch(r"[+-]?\d", v.strip()) else v for v in votes.strip("[] ").split(",")]
        if not isinstance(votes, list) or not votes or any(type(v) is not int or v not in (-1, 0, 1) for v in votes):
            raise BadRow("bad votes", f"{row['votes']!r:.60}: a list of +1 (for the label), 0 and -1")
        found["votes"] = votes
    gold = [name for name in ("gold_chosen", "gold_rejected") if name in row]
    if len(gold) == 1:
        raise BadRow("missing field", "gold_chosen and gold_rejected come together")
    for name in gold:
        found[name] = _number(row, name)
    return found


def _number(row: Mapping, name: str) -> float:
    try:
        value = float(str(given) if isinstance(given := _field(row, name), bool) else given)
    except (TypeError, ValueError):
        raise BadRow("wrong type", f"{name} = {given!r:.40}, not a number") from None
    if not math.isfinite(value):
        raise BadRow("not finite", f"{name} = {value}")
    return value


class _Once:
    """Tells rows that repeat an id or a pair, whose prompt stands in another split, or whose columns differ."""

    def __init__(self):
        self.ids: dict[str, str] = {}
        self.pairs: dict[tuple, str] = {}
        self.split_of: dict[str, tuple[str, str]] = {}
        self.columns: set[str] = set()

    def __call__(self, place: str, row: dict) -> dict:
        self.columns = self.columns or set(row) | {"split"}
        if lacking := self.columns ^ (set(row) | {"split"}):  # rows without split are drawn
            raise BadRow("missing field", f"only some rows have {', '.join(sorted(lacking))}")
        if (pair := (row["prompt"], row["chosen"], row["rejected"])) in self.pairs:
            raise BadRow("repeated pair", f"it stands in {self.pairs[pair]}")
        if row["pair_id"] in self.ids:
            raise BadRow("duplicated id", f"{row['pair_id']!r} belongs to {self.ids[row['pair_id']]}")
        split, first = self.split_of.setdefault(row["prompt_id"], (row.get("split", ""), place))
        if split != row.get("split", ""):
            raise BadRow("prompt in two splits", f"{split or 'none'} in {first}, here {row.get('split', 'none')}")
        self.pairs[pair] = self.ids[row["pair_id"]] = place
        return row


def _fitting(rows: list[tuple[str, dict]], tokenizer, max_length: int, sieve: Sieve) -> list[tuple[str, dict]]:
    """Rows that a model reads in ``max_length`` tokens, and whose two responses differ in what it reads."""
    prompt, chosen, rejected = ([row[name] for _, row in rows] for name in ("prompt", "chosen", "rejected"))
    if data.is_encoder(tokenizer):
        read = [data.encoder_ids(prompt, side, tokenizer, max_length) for side in (chosen, rejected)]
    else:
        asked = data.prompt_ids(prompt, tokenizer)
        read = [
            [np.concatenate(parts).tolist() for parts in zip(asked, data.response_ids(side, tokenizer), strict=True)]
            for side in (chosen, rejected)
        ]
    tokens = {place: ids for (place, _), *ids in zip(rows, *read, strict=True)}

    def test(place: str, row: dict) -> dict:
        first, second = tokens[place]
        if max(len(first), len(second)) > max_length:
            raise BadRow("too long", f"{max(len(first), len(second))} tokens exceed max_length {max_length}")
        if first == second:
            raise BadRow("identical responses after tokenization", f"of at most {max_length} tokens")
        return row

    return sieve.sift(rows, test)


def _with_splits(rows: list[dict], path: Path, validation_share: float, seed: int) -> list[dict]:
    """Rows with a split each, drawn by prompt for those that have none."""
    prompts = sorted({row["prompt_id"] for row in rows if "split" not in row})
    held = round(validation_share * len(prompts))
    if prompts and not 0 < held < len(prompts):
        raise DataError(f"{path}: validation_share {validation_share} of {len(prompts)} prompts leaves a split empty")
    validation = set(np.random.default_rng(seed).permutation(prompts)[:held].tolist())
    split = [{"split": "validation" if row["prompt_id"] in validation else "train"} | row for row in rows]
    there = {row["split"] for row in split}
    if "train" not in there or not there & {"validation", "ood"}:
        raise DataError(f"{path}: splits are {', '.join(sorted(there))}; train, and validation or ood, are needed")
    return split


# ---------------------------------------------------------------- pairs that several people judged


def pandalm_pairs(
    path: Path,
    *,
    validation_share: float,
    seed: int,
    on_bad_row: str = "error",
    tokenizer: PreTrainedTokenizerBase | None = None,
    max_length: int | None = None,
) -> list[dict]:
    """Pair set of PandaLM's test set (Wang et al. 2023): two answers to an instruction, three people's verdicts.

    The arguments are those of :func:`preference_rows`. Raises :class:`DataError` naming the bad rows.
    """
    sieve = Sieve(on_bad_row)
    rows = sieve.sift(sieve.sift(read_rows(path), _pandalm_pair), _Once())
    if rows and tokenizer is not None and max_length is not None:
        rows = _fitting(rows, tokenizer, max_length, sieve)
    sieve.close(len(rows), path)
    print(f"PandaLM: {len(rows)} pairs")
    renamed = {"chosen": "response_a", "rejected": "response_b", "chosen_id": "id_a", "rejected_id": "id_b"}
    pairs = _with_splits([row for _, row in rows], path, validation_share, seed)
    return [{renamed.get(name, name): value for name, value in row.items()} for row in pairs]


def _pandalm_pair(place: str, row: dict) -> dict:
    _readable(row)
    prompt = "\n".join(filter(None, (_text_field(row, "instruction"), _text_field(row, "input"))))
    verdicts = [_field(row, f"annotator{n}") for n in (1, 2, 3)]
    if any(type(verdict) is not int or verdict not in (0, 1, 2) for verdict in verdicts):
        raise BadRow("bad votes", f"{verdicts}: 1, 2, or 0 for a tie")
    pair = _pair(prompt, _text_field(row, "response1"), _text_field(row, "response2"))
    known = dict.fromkeys(("subset", "topic"), str(row.get("motivation_app") or ONE_SUBSET))
    return pair | known | {"pair_id": _name(row, "idx"), "ballots": [(0, 1, -1)[v] for v in verdicts]}


def convarg_pairs(folder: str | Path, *, n_ood_debates: int, seed: int) -> list[dict]:
    """Pair set of UKPConvArg1 (Habernal and Gurevych 2016) from its published XML, one row a pair.

    The prompt is debate and stance; ``n_ood_debates`` whole debates, both stances of each, are drawn for
    split ``ood``, the others are ``train``. Pairs of identical texts are left out and counted.
    Raises ``FileNotFoundError`` for a folder without XML and :class:`DataError` naming the file and pair that
    cannot be read.
    """
    paths = sorted(Path(folder).glob("*.xml"))
    if not paths:
        raise FileNotFoundError(f"no UKPConvArg1 XML in {folder}; get it as docs/your_own_data.md says")
    rows = [row for path in paths for row in _convarg_file(path)]
    debates = sorted({row["subset"] for row in rows})
    if n_ood_debates >= len(debates):
        raise DataError(
            f"{folder}: n_ood_debates {n_ood_debates} leaves no debate to train on: there are {len(debates)}"
        )
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
        get = {field: pair.findtext(field) for field in ("id", "arg1/text", "arg2/text", "arg1/id", "arg2/id")}
        get |= {field: pair.findtext(field) for field in ("debateMetaData/title", "arg1/stance")}
        votes = [vote.findtext("value") for vote in pair.iter("mTurkAssignment")]
        missing = [field for field, value in get.items() if not (value or "").strip()]
        if missing or not votes or not set(votes) <= {"a1", "a2", "equal"}:
            problem = f"missing {', '.join(missing)}" if missing else f"votes {votes}"
            raise DataError(f"{path}: pair {n} ({get['id']}): {problem}")
        if get["id"] in ids:
            raise DataError(f"{path}: pair {n} ({get['id']}): duplicated id")
        ids.add(get["id"])
        prompt = f"{get['debateMetaData/title'].strip()} | {get['arg1/stance'].strip()}"
        yield {
            "pair_id": f"{path.stem}/{get['id']}",
            "prompt_id": path.stem,
            "prompt": prompt,
            "response_a": get["arg1/text"].strip(),
            "response_b": get["arg2/text"].strip(),
            "id_a": f"{path.stem}/{get['arg1/id']}",
            "id_b": f"{path.stem}/{get['arg2/id']}",
            "ballots": [{"a1": 1, "a2": -1, "equal": 0}[vote] for vote in votes],
            "subset": path.stem.split("_")[0].strip("-"),
            "topic": path.stem,
        }


# ---------------------------------------------------------------- sets with their voters' scores


def annotated_pairs(path: Path, on_bad_row: str = "error") -> pd.DataFrame:
    """A set with its voters' scores, in the columns that the authors released or that chapter 01 exports.

    One row a pair: ``split, prompt, chosen, rejected, scores_chosen, scores_rejected`` (one score a voter),
    ``shipped_mean, shipped_std`` (the columns as they came), ``judge`` (1 for chosen, 0 for rejected, -1 where
    there is no verdict). Files of a folder name their split. Raises :class:`DataError` naming the bad rows.
    """
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.name.endswith(ENDINGS))
    if not files:
        raise DataError(f"{path}: no file of a known kind ({', '.join(ENDINGS)})")
    sieve = Sieve(on_bad_row)
    rows = [(place, row | {"file": file.name.split(".")[0]}) for file in files for place, row in read_rows(file)]
    kept = sieve.sift(rows, _annotated_pair)
    sieve.close(len(kept), path)
    return pd.DataFrame([row for _, row in kept])


def _annotated_pair(place: str, row: dict) -> dict:
    _readable(row)
    row = {name.replace(" ", "_"): value for name, value in row.items()}
    scores = {side: _scores(row, f"{side}_score_list") for side in ("chosen", "rejected")}
    if len(scores["chosen"]) != len(scores["rejected"]):
        raise BadRow("bad scores", f"{len(scores['chosen'])} for chosen, {len(scores['rejected'])} for rejected")
    asked, chosen = _said(row, "chosen")
    _, rejected = _said(row, "rejected")
    if chosen.strip() == rejected.strip():
        raise BadRow("identical responses")
    judge = row.get("GPT4_label", row.get("judge"))
    judge = -1 if judge is None else judge  # as on the training part
    if judge not in (-1, 0, 1):
        raise BadRow("bad label", f"{judge!r}: 1, 0, or -1 for none")
    split = str(row.get("split") or row["file"])  # the hub's files may be named train-00000-of-00002
    known = [name for name in ("train", "validation", "valid") if split.startswith(name)]
    return {
        "split": {"valid": "validation"}.get(known[0], known[0]) if known else split,
        "prompt": asked,
        "chosen": chosen,
        "rejected": rejected,
        **{f"scores_{side}": values for side, values in scores.items()},
        "shipped_mean": _number(row, "mean_preference_difference"),
        "shipped_std": _number(row, "std_preference_difference"),
        "judge": int(judge),
    }


def _said(row: Mapping, side: str) -> tuple[str, str]:
    """What was asked and what was replied: from a list of the turns' texts, or from text beside a prompt."""
    value = _field(row, side)
    turns = value if isinstance(value, list) else [row.get("prompt", ""), value]
    if not turns or not all(isinstance(turn, str) for turn in turns):
        raise BadRow("wrong type", f"{side} = {value!r:.60}: text, or a list of the turns' texts")
    if not turns[-1].strip():
        raise BadRow("empty field", repr(side))
    return "\n".join(turns[:-1]), turns[-1]


def _scores(row: Mapping, name: str) -> list[float]:
    values = _field(row, name)
    good = isinstance(values, list) and len(values) > 1 and all(type(v) in (int, float) for v in values)
    if not good or not all(math.isfinite(v) for v in values):
        raise BadRow("bad scores", f"{name} = {values!r:.60}: a list of at least two finite numbers")
    return [float(v) for v in values]
