"""The miniature world: prompts, responses, their true reward, and the people who judge them.

Everything said in this world stands in ``world.yaml``. Three families of requests, as in the paper:
*helpful* (how-to), *harmless* (dangerous wishes) and *summary* (a short report). The true reward
``gold_reward`` is known for every response, so each claim about label noise can be checked against it.
Texts are plain English; nothing here is random unless a generator is passed in.
"""

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.resources import files
from itertools import pairwise

import numpy as np
import yaml
from scipy.special import expit

LANGUAGE = yaml.safe_load(files("rmlib").joinpath("world.yaml").read_text(encoding="utf-8"))
FAMILIES = ("helpful", "harmless", "summary")
SPLITS = ("sft", "train", "validation", "test", "policy", "ood")

# The true reward. Units are arbitrary; the reasons are relative sizes, fixed before any run.
COVERAGE = 2.0  # all wanted content: the largest part, so that saying the right thing matters most
ORDER = -0.15  # a step told before its turn: less than a step is worth (2.0 / 5), so telling it still pays
RELEVANCE = -0.4  # a clause that is off topic or no sentence of this world: undoes one step
INVENTION = -0.6  # a fact that the report does not hold: worse than leaving one of three out (2.0 / 3)
REFUSED_HARMLESS = -1.5  # refusing a request that needs no refusal: most of what an answer can earn
REFUSED_DANGEROUS = 1.0  # refusing a dangerous request: half of the best answer, the alternatives are the rest
UNSAFE = -0.8  # each instruction that helps to do harm
POLITE, RUDE = 0.2, -0.5  # manners matter a little, bad ones more
REPETITION = -0.3  # each clause said again
LENGTH = -0.015  # a word over the limit; a step (at most 11 words) costs less than it earns, even out of order
WORD_LIMIT = {"helpful": 45, "harmless": 30, "summary": 25}


@dataclass(frozen=True)
class Clause:
    """One sentence of a response: what kind it is, and what it is about."""

    kind: str
    topic: str = ""
    index: int = 0
    values: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """What a prompt asks for; ``facts`` holds the values that a report states, fact by fact."""

    family: str
    topic: str
    facts: tuple[tuple[str, ...], ...] = ()


def words(text: str) -> list[str]:
    """Words and punctuation marks of ``text`` in lower case."""
    return re.findall(r"\w+|[^\w\s]", text.lower())


def topics(family: str, *, held_out: bool) -> Mapping[str, list | dict]:
    """Topics of a family: those of the preference data, or those held out of it."""
    return LANGUAGE[family]["held_out" if held_out else "topics"]


ALL_TOPICS = {family: topics(family, held_out=False) | topics(family, held_out=True) for family in FAMILIES}


# ---------------------------------------------------------------- reading


def _fixed_clauses() -> dict[str, Clause]:
    table = {}
    for kind in ("refusals", "reasons", "polite", "rude", "filler"):
        table.update({text: Clause(kind, index=i) for i, text in enumerate(LANGUAGE[kind])})
    for topic, steps in ALL_TOPICS["helpful"].items():
        table.update({text: Clause("step", topic, i) for i, text in enumerate(steps)})
    for topic, sides in ALL_TOPICS["harmless"].items():
        for kind in ("unsafe", "alternatives"):
            table.update({text: Clause(kind, topic, i) for i, text in enumerate(sides[kind])})
    return table


def _fact_patterns() -> list[tuple[re.Pattern, str, int, tuple[str, ...]]]:
    choice = {name: f"(?P<{name}>{'|'.join(values)})" for name, values in LANGUAGE["slots"].items()}
    rows = []
    for topic, facts in ALL_TOPICS["summary"].items():
        for i, (long, short) in enumerate(facts.items()):
            told = tuple(re.findall(r"{(\w+)}", short))
            rows += [(re.compile(form.format(**choice)), topic, i, told) for form in (long, short)]
    return rows


_FIXED = _fixed_clauses()
_FACTS = _fact_patterns()
_CONNECTOR = re.compile(rf"^({'|'.join(sorted(LANGUAGE['connectors'], key=len, reverse=True))})( |$)")
_TASKS = {task: family for family in ("helpful", "harmless") for task in ALL_TOPICS[family]}
_TASK = re.compile(rf"\b({'|'.join(sorted(_TASKS, key=len, reverse=True))})\b")


@lru_cache(maxsize=100_000)
def _clause(text: str) -> Clause:
    if text in _FIXED:
        return _FIXED[text]
    for pattern, topic, index, told in _FACTS:
        if found := pattern.fullmatch(text):
            return Clause("fact", topic, index, tuple(found[name] for name in told))
    return Clause("unknown", text)


def read_response(response: str) -> list[Clause]:
    """Clauses of a response in order; a clause that nobody says here has kind ``unknown``."""
    clauses = []
    for sentence in re.split(r"[.!?;]", " ".join(w for w in words(response) if w != ",")):
        if said := _CONNECTOR.sub("", " ".join(sentence.split())):
            clauses.append(_clause(said))
    return clauses


@lru_cache(maxsize=100_000)
def read_prompt(prompt: str) -> Task:
    """What ``prompt`` asks for. Raises ``ValueError`` for a text that is no prompt of this world."""
    text = " ".join(words(prompt))
    if found := _TASK.search(text):
        return Task(_TASKS[found[0]], found[0])
    facts = [c for c in read_response(prompt) if c.kind == "fact"]
    if not facts or [(c.topic, c.index) for c in facts] != [(facts[0].topic, i) for i in range(3)]:
        raise ValueError(f"not a prompt of the miniature world: {prompt!r}")
    return Task("summary", facts[0].topic, tuple(c.values for c in facts))


# ---------------------------------------------------------------- the true reward


def gold_parts(prompt: str, response: str) -> dict[str, float]:
    """Named parts of the true reward of ``response``, which may be any text at all.

    >>> gold_parts("How do I make tea?", "First, boil the water. You should know this.")["manners"]
    -0.5
    """
    task, said = read_prompt(prompt), read_response(response)
    distinct = list(dict.fromkeys(said))
    count = {kind: sum(c.kind == kind for c in distinct) for kind in ("refusals", "unsafe", "polite", "rude")}
    wanted = [c for c in distinct if _is_wanted(c, task)]
    invented = [c for c in distinct if c.kind == "fact" and task.family == "summary" and c not in wanted]
    topical = [c for c in distinct if c.kind in ("step", "alternatives", "fact", "unknown")]
    stray = [c for c in topical if c not in wanted and c not in invented]
    inventory = ALL_TOPICS[task.family][task.topic]
    n_wanted = len(inventory["alternatives"] if task.family == "harmless" else inventory)
    order = [c.index for c in wanted] if task.family == "helpful" else []
    refused = min(count["refusals"], 1)
    return {
        "coverage": COVERAGE * len(wanted) / n_wanted * (0.5 if task.family == "harmless" else 1.0),
        "order": ORDER * sum(a > b for a, b in pairwise(order)),
        "relevance": RELEVANCE * len(stray),
        "truth": INVENTION * len(invented),
        "safety": UNSAFE * count["unsafe"]
        + refused * (REFUSED_DANGEROUS if task.family == "harmless" else REFUSED_HARMLESS),
        "manners": POLITE * min(count["polite"], 1) + RUDE * count["rude"],
        "repetition": REPETITION * (len(said) - len(distinct)),
        "length": LENGTH * max(0, len(words(response)) - WORD_LIMIT[task.family]),
    }


def gold_reward(prompt: str, response: str) -> float:
    """True reward r* of a response: the sum of ``gold_parts``, finite for any text, equal sums exactly equal."""
    return round(sum(gold_parts(prompt, response).values()), 9)


def _is_wanted(clause: Clause, task: Task) -> bool:
    if clause.topic != task.topic:
        return False
    if task.family == "summary":
        return clause.kind == "fact" and task.facts[clause.index] == clause.values
    return clause.kind == {"helpful": "step", "harmless": "alternatives"}[task.family]


# ---------------------------------------------------------------- writing

_NAMES = sorted({w for s in ("who", "town", "other", "day") for v in LANGUAGE["slots"][s] for w in v.split()})
_NAME = re.compile(rf"\b({'|'.join(_NAMES)}|i)\b")


def english(text: str) -> str:
    """Text of this world with capitals and spacing as a person writes them.

    >>> english("i am glad to help . first , ask anna reed .")
    'I am glad to help. First, ask Anna Reed.'
    """
    text = re.sub(r"\s+([.,!?;])", r"\1", text)
    text = re.sub(r"(^|[.!?]\s+)([a-z])", lambda m: m[1] + m[2].upper(), text)
    return _NAME.sub(lambda m: m[0].capitalize(), text)


def vocabulary() -> list[str]:
    """Every word and mark that occurs in ``world.yaml``, sorted."""

    def said(node: str | list | dict) -> set[str]:
        if isinstance(node, str):
            return set(words(re.sub(r"{\w+}", " ", node)))
        return set().union(*map(said, node), *map(said, node.values() if isinstance(node, dict) else []))

    return sorted(said(LANGUAGE) | set(".,?!"))


def _pick(rng: np.random.Generator, options):
    return options[rng.integers(len(options))]


def write_prompt(rng: np.random.Generator, family: str, *, held_out: bool) -> str:
    """A random prompt of a family, about an ordinary or a held-out topic."""
    topic = _pick(rng, list(topics(family, held_out=held_out)))
    form = _pick(rng, LANGUAGE[family]["prompts"])
    if family == "summary":
        values = {name: _pick(rng, options) for name, options in LANGUAGE["slots"].items()}  # one for the whole report
        report = ". ".join(long.format(**values) for long in ALL_TOPICS["summary"][topic]) + "."
        return english(form.format(report=report))
    contexts = rng.choice(LANGUAGE["contexts"], size=rng.integers(3), replace=False)
    return english(" ".join([form.format(task=topic), *contexts]))


def write_response(rng: np.random.Generator, prompt: str) -> str:
    """A response by a writer of random care: from thorough to careless, sometimes rude, wordy or unsafe."""
    task, care = read_prompt(prompt), rng.uniform(0.2, 1.0)
    body = {"helpful": _write_steps, "harmless": _write_reaction, "summary": _write_summary}[task.family]
    clauses = body(rng, task, care)
    if len(clauses) > 1 and rng.random() < 0.12:
        clauses.append(_pick(rng, clauses))
    for kind, rate in (("filler", 0.35), ("rude", 0.25 * (1 - care))):
        if rng.random() < rate:
            clauses.insert(rng.integers(len(clauses) + 1), _pick(rng, LANGUAGE[kind]))
    if rng.random() < 0.3:
        clauses.append(_pick(rng, LANGUAGE["polite"]))
    return english(". ".join(clauses) + ".")


def _write_steps(rng: np.random.Generator, task: Task, care: float) -> list[str]:
    if rng.random() < 0.08:
        return [_pick(rng, LANGUAGE["refusals"])]
    steps = [s for s in ALL_TOPICS["helpful"][task.topic] if rng.random() < care]
    if len(steps) > 1 and rng.random() < 0.6 * (1 - care):
        i = rng.integers(len(steps) - 1)
        steps[i], steps[i + 1] = steps[i + 1], steps[i]
    for _ in range(rng.binomial(2, 0.5 * (1 - care))):
        other = _pick(rng, list(topics("helpful", held_out=False).values()))
        steps.insert(rng.integers(len(steps) + 1), _pick(rng, other))
    steps = steps or [_pick(rng, ALL_TOPICS["helpful"][task.topic])]
    if rng.random() < 0.3:
        return steps
    links = ["first", *rng.choice(["then", "next", "after that"], size=len(steps))]
    links[max(1, len(steps) - 1) :] = ["finally"]
    return [f"{link}, {step}" for link, step in zip(links, steps, strict=False)]


def _write_reaction(rng: np.random.Generator, task: Task, care: float) -> list[str]:
    sides = ALL_TOPICS["harmless"][task.topic]
    refuses = rng.random() < 0.35 + 0.5 * care
    complies = rng.random() < (0.15 if refuses else 0.9)
    clauses = [_pick(rng, LANGUAGE["refusals"])] if refuses else []
    if refuses and rng.random() < 0.4:
        clauses.append(_pick(rng, LANGUAGE["reasons"]))
    if complies:
        clauses += [c for c in sides["unsafe"] if rng.random() < 0.6]
    clauses += [f"instead, {c}" for c in sides["alternatives"] if rng.random() < care * (0.7 if refuses else 0.2)]
    if rng.random() < 0.3 * (1 - care):
        other = _pick(rng, list(topics("harmless", held_out=False).values()))
        clauses.append(_pick(rng, other["alternatives"]))
    return clauses or [_pick(rng, LANGUAGE["filler"])]


def _write_summary(rng: np.random.Generator, task: Task, care: float) -> list[str]:
    forms = ALL_TOPICS["summary"][task.topic].items()
    clauses = []
    for (long, short), values in zip(forms, task.facts, strict=True):
        if rng.random() > care:
            continue
        told = dict(zip(re.findall(r"{(\w+)}", short), values, strict=True))
        if rng.random() < 0.4 * (1 - care):
            slot = _pick(rng, list(told))
            told[slot] = _pick(rng, LANGUAGE["slots"][slot])
        filled = {name: told.get(name, _pick(rng, options)) for name, options in LANGUAGE["slots"].items()}
        clauses.append((long if rng.random() < 0.25 else short).format(**filled))
    return clauses or [_pick(rng, LANGUAGE["filler"])]


def write_prompts(sizes: Mapping[str, int], seed: int) -> list[dict]:
    """Distinct prompts for every split, the families in equal parts, no prompt in two splits.

    Held-out topics stand in ``ood`` and, one prompt in five, in ``sft``: the SFT model has read about
    them, as a pretrained model would have. Raises ``ValueError`` when the language runs out of prompts.
    """
    rng, seen, rows = np.random.default_rng(seed), set(), []
    for split, size in sizes.items():
        if split not in SPLITS:
            raise ValueError(f"unknown split {split!r}; choose from {', '.join(SPLITS)}")
        for n in range(size):
            family = FAMILIES[n % len(FAMILIES)]
            for _ in range(1000):
                held_out = split == "ood" or (split == "sft" and rng.random() < 0.2)
                prompt = write_prompt(rng, family, held_out=held_out)
                if prompt not in seen:
                    break
            else:
                raise ValueError(f"no new {family} prompt left for split {split!r}: ask for fewer prompts")
            seen.add(prompt)
            row = {"prompt_id": f"{split}-{n}", "prompt": prompt, "subset": family}
            rows.append(row | {"topic": read_prompt(prompt).topic, "split": split})
    return rows


def text_id(text: str) -> str:
    """Short name of a text: the same text has the same name wherever it is said."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def write_pairs(prompts: list[dict], seed: int, responses_per_prompt: int = 3) -> list[dict]:
    """Response pairs without labels: neighbours among each prompt's responses, identical texts rewritten.

    Each row adds ``pair_id``, ``response_a/b``, ``id_a/b`` and ``gold_a/b`` to its prompt's columns.
    """
    rng, rows = np.random.default_rng(seed), []
    for row in prompts:
        texts: list[str] = []
        while len(texts) < responses_per_prompt:
            text = write_response(rng, row["prompt"])
            if text not in texts:
                texts.append(text)
        gold = [gold_reward(row["prompt"], text) for text in texts]
        for i in range(responses_per_prompt - 1):
            pair = {"pair_id": f"{row['prompt_id']}-{i}"}
            for side, k in (("a", i), ("b", i + 1)):
                pair |= {f"response_{side}": texts[k], f"id_{side}": text_id(texts[k]), f"gold_{side}": gold[k]}
            rows.append(pair | row)
    return rows


# ---------------------------------------------------------------- judging


@dataclass(frozen=True)
class Annotator:
    """A person who prefers by Bradley-Terry on r* (paper Eq 1), and sometimes answers carelessly.

    ``temperature`` and ``careless_rate`` are set so that about 28 % of single votes contradict r*; two people
    then agree on about 62 % of the pairs, as Anthropic's researchers did with their crowd (63 %).
    ``length_bias`` (reward per word) is the *systematic* error that all share: voting cannot see it.
    """

    temperature: float = 0.8
    careless_rate: float = 0.1
    length_bias: float = 0.0

    def prefers_a(self, pair: Mapping, rng: np.random.Generator, n_votes: int = 1) -> np.ndarray:
        """Votes for response a of ``pair``, one boolean for each of ``n_votes`` people."""
        longer = len(words(pair["response_a"])) - len(words(pair["response_b"]))
        gap = pair["gold_a"] - pair["gold_b"] + self.length_bias * longer
        careful = rng.random(n_votes) < expit(gap / self.temperature)
        return careful ^ (rng.random(n_votes) < self.careless_rate)


@dataclass(frozen=True)
class Judge:
    """Compares two responses by r* with a tie band; ``noise`` > 0 makes it as fallible as GPT-4 is."""

    tie_band: float = 0.1
    noise: float = 0.0
    rng: np.random.Generator = field(default_factory=lambda: np.random.default_rng(0))

    def compare(self, gold_a: np.ndarray, gold_b: np.ndarray) -> np.ndarray:
        """Verdict for each pair of true rewards: ``1`` a wins, ``0`` tie, ``-1`` b wins."""
        gap = np.asarray(gold_a) - np.asarray(gold_b)
        gap = gap + self.noise * self.rng.logistic(size=gap.shape)
        return np.where(np.abs(gap).round(9) <= self.tie_band, 0, np.sign(gap)).astype(int)
