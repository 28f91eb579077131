"""The parameters of every chapter: their types and ranges, checked before anything runs.

Values and reasons stand in the notebooks' parameters cells and in ``params/<preset>/<stem>.yaml``; here
stands only what is allowed. ``check`` runs in each notebook's second code cell, ``read_yaml`` on a file
before a kernel starts.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Annotated, Literal, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(gt=0, lt=1)]
ShareOrZero = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Schedule = Literal["linear", "inverse_sqrt", "constant"]
Preset = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]*$")]
Name = Annotated[str, Field(min_length=1)]
Seeds = Annotated[list[CountOrZero], Field(min_length=1)]


class Parameters(BaseModel):
    """What all chapters share; an unknown key is an error, and a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    preset: Preset
    seeds: Seeds

    @field_validator("seeds")
    @classmethod
    def _distinct(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) < len(seeds):
            raise ValueError("a seed is given twice")
        return seeds


class WorldAndData(Parameters):
    """Chapter 00."""

    source: Literal["world", "convarg", "pandalm", "hh", "table"]
    data_path: str
    revision: Name
    on_bad_row: Literal["error", "drop"]
    prompt_column: Name | None
    validation_share: Share
    n_ood_debates: Count
    base_model: str
    base_revision: Name
    encoder: Name
    encoder_revision: Name
    encoder_max_length: Count
    world_seed: CountOrZero
    n_sft_prompts: Count
    demonstrations_per_prompt: Count
    n_train_prompts: Count
    n_validation_prompts: Count
    n_test_prompts: Count
    n_policy_prompts: Count
    n_ood_prompts: Count
    responses_per_prompt: Annotated[int, Field(ge=2)]
    temperature: Positive
    careless_rate: Annotated[float, Field(ge=0, le=0.5)]
    length_bias: float
    labels_biased: bool
    judge_noise: Annotated[float, Field(ge=0)]
    hidden_size: Count
    layers: Count
    heads: Count
    max_length: Count
    sft_lr: Positive
    sft_batch_size: Count
    sft_epochs: CountOrZero
    n_samples: Count

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.source != "world" and not self.data_path:
            raise ValueError(f"source = {self.source!r} needs data_path, where its files lie")
        if self.source == "world" and (self.data_path or self.base_model):
            raise ValueError("source = 'world' reads neither data_path nor base_model: name the source that does")
        if self.source == "convarg" and self.base_model:
            raise ValueError("source = 'convarg' is read by the encoder: leave base_model empty")
        if self.hidden_size % (2 * self.heads):
            raise ValueError(f"hidden_size = {self.hidden_size} is no even multiple of heads = {self.heads}")
        return self


class AnnotatedSets(BaseModel):
    """Chapter 01b."""

    model_config = Parameters.model_config

    preset: Preset
    data_path: str
    revision: Name
    on_bad_row: Literal["error", "drop"]
    n_bands: Annotated[int, Field(ge=2)]
    n_judged_bands: Annotated[int, Field(ge=2)]


class PreferenceStrength(Parameters):
    """Chapter 01."""

    n_members: Annotated[int, Field(ge=2)]
    vary_head: bool
    lr: Positive
    batch_size: Count
    schedule: Schedule
    warmup_ratio: ShareOrZero
    dropout: ShareOrZero
    max_length: Count
    slice_epochs: Positive
    long_epochs: Annotated[int, Field(ge=2)]
    growing_shares: Annotated[list[Share], Field(min_length=1)]
    fold_group: Literal["prompt_id", "topic", "subset"]
    n_folds: Annotated[int, Field(ge=2)]
    n_response_folds: Annotated[int, Field(ge=3)]
    fold_members: Count
    scorer_dropout: Share
    dropout_passes: Count
    bias_members: CountOrZero
    n_sweep_seeds: Count
    n_curve_pairs: Count
    n_evaluations: Count
    n_bootstrap: CountOrZero
    workers: CountOrZero


class Denoising(Parameters):
    """Chapter 02."""

    lr: Positive
    batch_size: Count
    schedule: Schedule
    warmup_ratio: ShareOrZero
    dropout: ShareOrZero
    max_length: Count
    epochs: Annotated[int, Field(ge=2)]
    snapshots_per_epoch: Count
    alpha: Smoothing
    flip_shares: Annotated[list[Share], Field(min_length=1)]
    alphas: list[Smoothing]
    margin_scales: list[Positive]
    self_smoothing: Share
    lm_coef: Annotated[float, Field(ge=0)]
    band_epochs: Count
    band_snapshots: Count
    n_train_scored: Count
    n_sweep_seeds: Count
    n_policy_seeds: Count
    strength: str
    n_bootstrap: CountOrZero
    workers: CountOrZero


class Policies(Parameters):
    """Chapter 02b."""

    steps: Annotated[int, Field(ge=5)]
    lr: Positive
    critic_lr: Positive
    batch_size: Count
    rollouts_per_prompt: Count
    num_ppo_epochs: Count
    num_mini_batches: Count
    warmup_steps: CountOrZero
    max_new_tokens: Count
    temperature: Positive
    top_p: Annotated[float, Field(gt=0, le=1)]
    repetition_penalty: Positive
    kl_coef: Positive
    kl_estimator: Literal["k1", "k3"]
    max_kl: Positive | None
    gamma: Annotated[float, Field(gt=0, le=1)]
    lam: Annotated[float, Field(ge=0, le=1)]
    cliprange: Positive | None
    cliprange_value: Positive | None
    vf_coef: Positive
    entropy_coef: Annotated[float, Field(ge=0)]
    whiten_advantages: bool
    advantage_clip: Positive | None
    reward_norm: bool
    reward_scaling: bool
    reward_clip: Positive | None
    missing_eos_penalty: Annotated[float, Field(ge=0)]
    variants: bool
    n_asked: Count
    best_of: Annotated[int, Field(ge=2)]
    workers: CountOrZero

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.reward_norm and self.reward_scaling:
            raise ValueError("reward_norm and reward_scaling exclude one another")
        if self.num_mini_batches > self.batch_size * self.rollouts_per_prompt:
            raise ValueError(f"num_mini_batches = {self.num_mini_batches} exceeds the responses of a step")
        return self


CHAPTERS: dict[str, type[BaseModel]] = {
    "00_world_and_data": WorldAndData,
    "01_preference_strength": PreferenceStrength,
    "01b_annotated_sets": AnnotatedSets,
    "02_denoising": Denoising,
    "02b_policies": Policies,
}


IPYTHON_NAMES = re.compile(r"In|Out|__.*|_(i{0,3}|i?\d+|[iod]h|exit_code)")


class ParameterError(ValueError):
    """One or more parameters are unknown, missing, or not of the right type or range."""


def check(stem: str, values: Mapping[str, object], source: str = "the parameters cell") -> BaseModel:
    """The checked parameters of chapter ``stem`` from a notebook's globals or a file's content.

    Modules, functions, classes and names that IPython defines are passed over. Raises
    :class:`ParameterError` naming every offending key, ``source``, and the nearest key that exists.
    """
    model = CHAPTERS[stem]
    again = any(isinstance(value, model) for value in values.values())  # the cell is run once more, amid later names
    given = {
        name: value
        for name, value in values.items()
        if _is_parameter(name, value) and (name in model.model_fields or not again)
    }
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
    if strange := [key for key in given if not isinstance(key, str) or not _is_parameter(key, None)]:
        raise ParameterError(f"{path}: unknown parameter {strange[0]!r}")
    return check(stem, {**defaults, **given}, source=str(path))


class _NoRepeats(yaml.SafeLoader):
    """YAML in which a key that is given twice is an error rather than overwritten."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """The mapping of ``node``."""
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := [key for n, key in enumerate(keys) if key in keys[:n]]:
            raise yaml.YAMLError(f"{repeated[0]!r} is given twice")
        return super().construct_mapping(node, deep)


def _is_parameter(name: str, value: object) -> bool:
    ours = isinstance(value, ModuleType | FunctionType | type) or callable(value)
    return not IPYTHON_NAMES.fullmatch(name) and not ours


def _explain(problem: Mapping, known: list[str]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
        return f"unknown parameter {key!r}; the nearest is {near[0]!r}"
    if problem["type"] == "missing":
        return f"parameter {key!r} is missing"
    hint = " (YAML reads 1e-3 as text: write 1.0e-3)" if _is_number(problem["input"]) else ""
    return f"{key} = {problem['input']!r}: {problem['msg']}{hint}" if key else problem["msg"]


def _is_number(value: object) -> bool:
    """Whether ``value`` is a number written as text."""
    return isinstance(value, str) and re.fullmatch(r"[+-]?[\d.]+([eE][+-]?\d+)?", value) is not None
