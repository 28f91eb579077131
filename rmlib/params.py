"""The parameters of every chapter: their types and ranges, checked before anything runs.

Values and reasons stand in the notebooks' parameters cells and in ``params/<preset>/<stem>.yaml``; here
stands only what is allowed. ``check`` runs in each notebook's second code cell, ``read_yaml`` on a file
before a kernel starts.
"""

import difflib
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, create_model, field_validator, model_validator
from pydantic.dataclasses import dataclass

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
AtLeastTwo = Annotated[int, Field(ge=2)]
Positive = Annotated[float, Field(gt=0)]
PositiveOrZero = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
ShareOrZero = Annotated[float, Field(ge=0, lt=1)]
ShareOrOne = Annotated[float, Field(gt=0, le=1)]
BelowHalf = Annotated[float, Field(gt=0, lt=0.5)]
Name = Annotated[str, Field(min_length=1)]
Shares = Annotated[list[Share], Field(min_length=1)]
OnBadRow = Literal["error", "drop"]
Schedule = Literal["linear", "inverse_sqrt", "constant"]
IPYTHON_NAMES = re.compile(r"In|Out|__.*|_(i{0,3}|i?\d+|[iod]h|exit_code)")
PolicyArm = Literal[
    "vanilla",
    "MetaRM",
    "MetaRM, plain gradient",
    "fresh labels",
    "DPO",
    "more compute",
    "averaged weights",
    "committee",
    "vanilla, held out",
    "MetaRM, held out",
]
STRICT = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


def _check_ppo(p):
    if p.reward_norm and p.reward_scaling:
        raise ValueError("reward_norm and reward_scaling exclude one another")
    if p.num_mini_batches > p.batch_size * p.rollouts_per_prompt:
        raise ValueError(f"num_mini_batches = {p.num_mini_batches} exceeds the responses of a step")
    return p


@dataclass(frozen=True, config=STRICT)
class Settings:
    """How :mod:`rmlib.ppo` trains a policy; the switches of the official code ("PPO-max") under the field's names.

    ``kl_coef`` weighs the penalty, whose ``kl_estimator`` is a token's log ratio (k1) or its always positive form (k3).
    Scores lose ``missing_eos_penalty`` where a response was cut at ``max_new_tokens``; then ``reward_norm``
    standardises them in their batch, or ``reward_scaling`` divides them by the standard deviation of all scores so far;
    ``reward_clip`` bounds them. Training stops after a step whose KL exceeds ``max_kl`` nats a response.
    ``None`` switches a clip off. Raises ``ValueError`` naming a field that is out of range.
    """

    steps: Count
    lr: PositiveOrZero
    critic_lr: PositiveOrZero
    max_new_tokens: Count
    batch_size: Count = 64
    rollouts_per_prompt: Count = 1
    num_ppo_epochs: Count = 4
    num_mini_batches: Count = 1
    warmup_steps: CountOrZero = 0
    kl_coef: PositiveOrZero = 0.0
    kl_estimator: Literal["k1", "k3"] = "k1"
    gamma: Annotated[float, Field(ge=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    cliprange: Positive | None = 0.2
    cliprange_value: Positive | None = 0.2
    vf_coef: Positive = 1.0
    entropy_coef: PositiveOrZero = 0.0
    whiten_advantages: bool = False
    advantage_clip: Positive | None = None
    reward_norm: bool = False
    reward_scaling: bool = False
    reward_clip: Positive | None = None
    missing_eos_penalty: PositiveOrZero = 0.0
    max_kl: Positive | None = None
    max_grad_norm: Positive | None = 1.0
    temperature: Positive = 1.0
    top_p: ShareOrOne = 1.0
    repetition_penalty: Positive = 1.0

    _fits = model_validator(mode="after")(_check_ppo)

    @property
    def sampling(self) -> dict:
        """How responses are drawn. Log-probabilities are always those of the policy itself."""
        names = ("max_new_tokens", "temperature", "top_p", "repetition_penalty")
        return {name: getattr(self, name) for name in names}


class Plain(BaseModel, frozen=True):
    """What all chapters share; an unknown key is an error, and a number in quotes is no number."""

    model_config = STRICT

    preset: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]


class Seeded(Plain):
    """A chapter that draws: its seeds, each once."""

    seeds: Annotated[list[CountOrZero], Field(min_length=1)]

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


def _check_world_and_data(p: BaseModel) -> BaseModel:
    if p.source != "world" and not p.data_path:
        raise ValueError(f"source = {p.source!r} needs data_path, where its files lie")
    if p.source == "world" and (p.data_path or p.base_model):
        raise ValueError("source = 'world' reads neither data_path nor base_model: name the source that does")
    if p.source == "convarg" and p.base_model:
        raise ValueError("source = 'convarg' is read by the encoder: leave base_model empty")
    if p.hidden_size % (2 * p.heads):
        raise ValueError(f"hidden_size = {p.hidden_size} is no even multiple of heads = {p.heads}")
    return p


def _check_answers(p: BaseModel) -> BaseModel:
    if p.answers_each > p.sft_answers:
        raise ValueError(f"answers_each = {p.answers_each} exceeds sft_answers = {p.sft_answers}")
    return p


def _check_rounds(p: BaseModel) -> BaseModel:
    if lacking := {"vanilla", "MetaRM"} - set(p.arms):
        raise ValueError(f"arms lack {', '.join(sorted(lacking))}, which all others are compared to")
    return _check_answers(p)


def _chapter(types: Mapping[object, str], base: type[Plain] = Seeded, fits: Callable = lambda p: p) -> type[Plain]:
    """The parameters of a chapter: names by their type, and a check of what must fit together, which returns them.

    Names under ``Settings`` have the type that they have there.
    """
    typed = ((name, kind) for kind, names in types.items() for name in names.split())
    fields = {name: (Settings.__annotations__[name] if kind is Settings else kind, ...) for name, kind in typed}
    validators = {"fits": model_validator(mode="after")(fits)}
    return create_model("Chapter", __base__=base, __validators__=validators, **fields)


# What every chapter that trains policies is given; those that ask for more settings name them, as 02b does.
Policies = _chapter(
    {
        Settings: "batch_size rollouts_per_prompt num_ppo_epochs num_mini_batches warmup_steps max_new_tokens "
        "temperature top_p repetition_penalty max_kl whiten_advantages",
        Annotated[int, Field(ge=5)]: "steps",
        Positive: "lr critic_lr kl_coef",
        Count: "n_asked answers_each",
        CountOrZero: "workers",
    }
)

CHAPTERS: dict[str, type[Plain]] = {
    "00_world_and_data": _chapter(
        {
            Literal["world", "convarg", "pandalm", "hh", "table"]: "source",
            str: "data_path base_model",
            Name: "revision base_revision encoder encoder_revision",
            Name | None: "prompt_column",
            OnBadRow: "on_bad_row",
            Share: "validation_share",
            Count: "n_ood_debates encoder_max_length n_sft_prompts demonstrations_per_prompt n_train_prompts "
            "n_validation_prompts n_test_prompts n_policy_prompts n_ood_prompts hidden_size layers heads max_length "
            "sft_batch_size n_samples",
            CountOrZero: "world_seed sft_epochs",
            AtLeastTwo: "responses_per_prompt",
            Positive: "temperature sft_lr",
            Annotated[float, Field(ge=0, le=0.5)]: "careless_rate",
            PositiveOrZero: "judge_noise",
            float: "length_bias",
            bool: "labels_biased",
        },
        fits=_check_world_and_data,
    ),
    "01_preference_strength": _chapter(
        {
            AtLeastTwo: "n_members long_epochs n_folds",
            Annotated[int, Field(ge=3)]: "n_response_folds",
            bool: "vary_head",
            Positive: "lr slice_epochs",
            Schedule: "schedule",
            ShareOrZero: "warmup_ratio dropout",
            Share: "scorer_dropout",
            Shares: "growing_shares",
            Literal["prompt_id", "topic", "subset"]: "fold_group",
            Count: "batch_size max_length fold_members dropout_passes n_sweep_seeds n_evaluations",
            CountOrZero: "bias_members n_bootstrap workers",
        }
    ),
    "01b_annotated_sets": _chapter(
        {str: "data_path", Name: "revision", OnBadRow: "on_bad_row", AtLeastTwo: "n_bands n_judged_bands"}, base=Plain
    ),
    "02_denoising": _chapter(
        {
            Positive: "lr",
            PositiveOrZero: "lm_coef",
            Schedule: "schedule policy_schedule",
            ShareOrZero: "warmup_ratio dropout",
            Share: "self_smoothing",
            BelowHalf: "alpha",
            list[BelowHalf]: "alphas",
            list[Positive]: "margin_scales",
            Shares: "flip_shares",
            AtLeastTwo: "epochs n_orders",
            Count: "batch_size max_length snapshots_per_epoch band_epochs band_snapshots n_train_scored n_sweep_seeds "
            "n_policy_seeds",
            CountOrZero: "n_bootstrap workers",
            str: "strength",
        }
    ),
    "02b_policies": _chapter(
        {
            Settings: "kl_estimator lam cliprange cliprange_value vf_coef entropy_coef advantage_clip reward_norm "
            "reward_scaling reward_clip missing_eos_penalty",
            ShareOrOne: "gamma",
            AtLeastTwo: "best_of",
            bool: "variants",
        },
        base=Policies,
        fits=_check_ppo,
    ),
    "03_contrastive": _chapter(
        {
            Positive: "lr epochs long_epochs simcse_temperature swav_temperature epsilon",
            PositiveOrZero: "simcse_beta swav_beta swav_diff_beta",
            Schedule: "schedule",
            ShareOrZero: "warmup_ratio baseline_dropout",
            Share: "dropout",
            AtLeastTwo: "batch_size swav_prototypes swav_diff_prototypes n_drawn n_probed",
            Count: "baseline_batch_size max_length n_iterations queue_size n_sweep_seeds n_policy_seeds",
            list[Positive]: "betas temperatures",
            CountOrZero: "n_bootstrap workers",
        }
    ),
    "03b_contrastive_policies": _chapter({AtLeastTwo: "sft_answers"}, base=Policies, fits=_check_answers),
    "04_metarm": _chapter(
        {
            Settings: "steps critic_lr rollouts_per_prompt num_ppo_epochs kl_coef whiten_advantages max_new_tokens "
            "temperature",
            Positive: "lr epochs compute_epochs eta meta_temperature policy_lr",
            Schedule: "schedule",
            ShareOrZero: "warmup_ratio dropout",
            Literal["gradient", "normalised"]: "ascent",
            AtLeastTwo: "k n_members n_evaluations",
            Count: "batch_size max_length meta_batch_size n_meta_prompts n_sweep_seeds n_judged policy_batch_size",
            list[Positive]: "etas temperatures",
            list[AtLeastTwo]: "ks",
            list[Count]: "n_meta_sweep",
            CountOrZero: "n_bootstrap workers",
        }
    ),
    "05_iterative_rlhf": _chapter(
        {
            Settings: "reward_clip",
            Annotated[list[PolicyArm], Field(min_length=1)]: "arms",
            list[Positive]: "eta_factors",
            Literal["previous", "sft"]: "policy_start reward_model_start",
            Positive: "reward_lr epochs compute_epochs eta meta_temperature dpo_beta dpo_lr",
            PositiveOrZero: "judge_noise",
            Schedule: "schedule",
            ShareOrZero: "warmup_ratio",
            Literal["gradient", "normalised"]: "ascent",
            Literal["mean", "worst", "mean - std"]: "committee_rule",
            AtLeastTwo: "rounds k n_members sft_answers answers_each",
            Count: "reward_batch_size max_length meta_batch_size n_meta_prompts dpo_batch_size",
        },
        base=Policies,
        fits=_check_rounds,
    ),
}


class ParameterError(ValueError):
    """One or more parameters are unknown, missing, or not of the right type or range."""


def check(stem: str, values: Mapping[str, object], source: str = "the parameters cell") -> BaseModel:
    """The checked parameters of chapter ``stem`` from a notebook's globals or a file's content.

    Modules, functions, classes and names that IPython defines are passed over. Raises
    :class:`ParameterError` naming every offending key, ``source``, and the nearest key that exists.
    """
    model = CHAPTERS[stem]
    named = {name: value for name, value in values.items() if not IPYTHON_NAMES.fullmatch(name)}
    given = {name: value for name, value in named.items() if not (isinstance(value, ModuleType) or callable(value))}
    if any(isinstance(value, model) for value in values.values()):  # the cell is run once more, amid later names
        given = {name: value for name, value in given.items() if name in model.model_fields}
    try:
        return model(**given)
    except ValidationError as error:
        lines = [_explain(problem, list(model.model_fields)) for problem in error.errors()]
        raise ParameterError(f"{source}: " + "; ".join(lines)) from None


def read_yaml(stem: str, path: Path, defaults: Mapping[str, object]) -> BaseModel:
    """The checked parameters of a chapter: ``defaults`` overridden by a YAML file."""
    try:
        given = yaml.load(path.read_text(encoding="utf-8"), _NoRepeats) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ParameterError(f"{path}: cannot be read as YAML ({error})") from None
    if not isinstance(given, dict):
        raise ParameterError(f"{path}: expected 'key: value' lines, got {type(given).__name__}")
    if strange := [key for key in given if not isinstance(key, str) or IPYTHON_NAMES.fullmatch(key)]:
        raise ParameterError(f"{path}: unknown parameter {strange[0]!r}")
    return check(stem, {**defaults, **given}, source=str(path))


class _NoRepeats(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error rather than overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.YAMLError(f"{repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _explain(problem: Mapping, known: list[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"unknown parameter {key!r}; the nearest is {near[0]!r}"
    if problem["type"] == "missing":
        return f"parameter {key!r} is missing"
    value = problem["input"]
    number_as_text = isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", value)
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if number_as_text else ""
    return f"{key} = {value!r}: {problem['msg']}{hint}" if key else problem["msg"]
