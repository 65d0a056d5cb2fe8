"""A study's YAML file: what is there to be planned, each key known and each value of its kind."""

from __future__ import annotations

import difflib
import math
import os
import reprlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import yaml

from megatron_emo.scaling.counts.devices import PRECISIONS
from megatron_emo.scaling.counts.flops import CONVENTIONS, OBJECTIVES
from megatron_emo.scaling.counts.memory import Layout
from megatron_emo.scaling.laws.surfaces import Surface
from megatron_emo.scaling.plans.recipe import (
    BUNDLES,
    ModelSettings,
    Recipe,
    SizeEntry,
    check_ranges,
)
from megatron_emo.scaling.plans.study_settings import DataSettings, LaunchSettings

EQUAL = ("tokens", "flops")
LOSS_PATHS = ("auto", "logits", "recompute", "forward")

LARGEST_GOAL = 1e40
MOST_RUNS = 20_000

REPLICATED_CHINCHILLA = Surface(E=1.8172, A=482.01, B=2085.43, alpha=0.3478, beta=0.3658)
"""Besiroglu et al. (2024), of Hoffmann et al.'s runs: where optima are expected by default."""


class PlanError(ValueError):
    """A plan that cannot be read, or that is refused."""


@dataclass(frozen=True)
class Objective:
    """One way of training."""

    label: str
    objective: str
    """--objective."""
    arguments: tuple[str, ...] = ()
    """Further flags of it."""


@dataclass(frozen=True)
class LossSettings:
    """What EMO's share of FLOPs and memory depends on."""

    path: str = "auto"
    """--emo-loss-path."""
    workspace_mb: int = 512
    """--emo-workspace-mb."""
    cost_dim: int | None = None
    """Columns of the cost embedding; None: the hidden size, as of the model's own output layer."""
    cost_bytes: int = 4
    """Of an entry: 4, 2 or 1."""
    distinct_share: float = 0.3
    """Distinct targets of a microbatch over its tokens: 0.2 to 0.4 in English text."""

    def __post_init__(self) -> None:
        if self.path not in LOSS_PATHS:
            raise ValueError(f"loss.path: expected one of {LOSS_PATHS}, got {self.path!r}")
        if not 0 < self.distinct_share <= 1:
            raise ValueError(
                f"loss.distinct_share: expected above 0, to 1, got {self.distinct_share}"
            )
        check_ranges("loss", self, {"workspace_mb": (1, 10**9), "cost_dim": (1, 10**6)})
        if self.cost_bytes not in (1, 2, 4):
            raise ValueError(f"loss.cost_bytes: expected 1, 2 or 4, got {self.cost_bytes}")

    def num_distinct(self, num_tokens: int, vocab_size: int) -> int:
        """Return U expected of that many tokens."""
        return min(vocab_size, math.ceil(self.distinct_share * num_tokens))


@dataclass(frozen=True)
class Expectation:
    """Where optima are expected, to refuse sizes too far from them."""

    law: Surface = REPLICATED_CHINCHILLA
    range: float = 16.0
    """Largest N / N*(C) and N*(C) / N of a run."""


@dataclass(frozen=True)
class Rates:
    """How fast runs are assumed to be."""

    precision: str = "bf16"
    mfu: float = 0.4
    """Model FLOPs (Megatron's count and the loss's) per second over the device's peak."""

    def __post_init__(self) -> None:
        if self.precision not in PRECISIONS:
            raise ValueError(
                f"rates.precision: expected one of {PRECISIONS}, got {self.precision!r}"
            )
        if not 0 < self.mfu <= 1:
            raise ValueError(f"rates.mfu: expected above 0, to 1, got {self.mfu}")


@dataclass(frozen=True)
class PlanSpec:
    """All that a plan's file says."""

    name: str
    sizes: tuple[int | str, ...]
    objectives: tuple[Objective, ...]
    model: ModelSettings
    budgets: tuple[float, ...] = ()
    """FLOPs; or tokens_per_param."""
    tokens_per_param: tuple[float, ...] = ()
    seeds: tuple[int, ...] = (1,)
    recipe: Recipe = field(default_factory=Recipe)
    loss: LossSettings = field(default_factory=LossSettings)
    layout: Layout = field(default_factory=Layout)
    rates: Rates = field(default_factory=Rates)
    expect: Expectation = field(default_factory=Expectation)
    flops: str = "megatron"
    """What budgets count: one of CONVENTIONS."""
    equal: str = "tokens"
    """tokens: objectives of one budget train on the same tokens, EMO's share coming on top. flops:
    the share is part of the budget, so that EMO gets fewer tokens."""
    params: str = "total"
    """N of tokens_per_param: total or non_embedding."""
    tolerance: float = 0.01
    """Of a budget, relative."""
    allow: tuple[str, ...] = ()
    """Refusals to print instead."""
    arguments: tuple[str, ...] = ()
    """Megatron's flags of every run."""
    data: DataSettings | None = None
    """What `run` and `score` need and `plan` does not."""
    launch: LaunchSettings = field(default_factory=LaunchSettings)

    def __post_init__(self) -> None:
        if bool(self.budgets) == bool(self.tokens_per_param):
            found = "both" if self.budgets else "neither"
            raise PlanError(f"budgets: expected budgets or tokens_per_param, got {found}")
        for name in ("sizes", "objectives", "seeds"):
            values = getattr(self, name)
            if not values:
                raise PlanError(f"{name}: expected at least one, got none")
        for name in ("sizes", "seeds", "budgets", "tokens_per_param"):
            _refuse_repeated(name, getattr(self, name))
        _refuse_repeated("objectives", tuple(o.label for o in self.objectives))
        goals = max(len(self.budgets), len(self.tokens_per_param))
        count = goals * len(self.sizes) * len(self.objectives) * len(self.seeds)
        if count > MOST_RUNS:
            raise PlanError(f"plan: expected at most {MOST_RUNS:,} runs, got {count:,}")
        _check_choice("flops", self.flops, tuple(CONVENTIONS))
        _check_choice("equal", self.equal, EQUAL)
        _check_choice("params", self.params, ("total", "non_embedding"))
        if self.equal == "flops" and self.flops != "megatron":
            raise PlanError(f"equal: expected tokens with flops: {self.flops}, got 'flops'")
        for name in ("budgets", "tokens_per_param"):
            for value in getattr(self, name):
                if not 0 < value <= LARGEST_GOAL:
                    raise PlanError(f"{name}: expected above 0, to {LARGEST_GOAL:g}, got {value}")
        if not 0 < self.tolerance < 1:
            raise PlanError(f"tolerance: expected between 0 and 1, got {self.tolerance}")
        if min(self.seeds) < 1:
            # Megatron takes no seed below 1.
            raise PlanError(f"seeds: expected numbers from 1 on, got {min(self.seeds)}")


def read_plan_file(path: str | os.PathLike) -> PlanSpec:
    """Return the plan of a YAML file; paths of its `data:` are made absolute.

    Raises:
        PlanError: no YAML, an unknown, missing or ill-formed key, with the nearest known one.
        FileNotFoundError: no such file.
    """
    try:
        spec = parse_plan(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        if spec.data is None:
            return spec
        return replace(spec, data=spec.data.resolved(Path(path).resolve().parent))
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise PlanError(f"--plan {path}: {error}") from error


def parse_plan(content: Any) -> PlanSpec:
    """Return the plan of plain values.

    Raises:
        PlanError: an unknown, missing or ill-formed key.
    """
    _check_keys(PlanSpec, content, "")
    values = dict(content)
    values["objectives"] = _parse_objectives(content["objectives"])
    values["sizes"] = _parse_sizes(content["sizes"])
    values["model"] = parse_section(ModelSettings, content["model"], "model")
    values["recipe"] = _parse_recipe(content.get("recipe", {}))
    for name, kind in (("loss", LossSettings), ("layout", Layout), ("rates", Rates)):
        values[name] = parse_section(kind, content.get(name, {}), name)
    values["launch"] = parse_section(LaunchSettings, content.get("launch", {}), "launch")
    values["data"] = _parse_data(content.get("data"))
    values["expect"] = _parse_expectation(content.get("expect", {}))
    for spec in fields(PlanSpec):
        if spec.name in content and spec.type in _KINDS:
            values[spec.name] = _convert(content[spec.name], spec.type, spec.name)
    return PlanSpec(**values)


def parse_section(kind: type, content: Any, where: str) -> Any:
    """Return a dataclass of plain fields from a mapping.

    Raises:
        PlanError: an unknown, missing or ill-formed key, named with `where`.
    """
    _check_keys(kind, content, where)
    types = {f.name: f.type for f in fields(kind)}
    try:
        return kind(
            **{key: _convert(v, types[key], f"{where}.{key}") for key, v in content.items()}
        )
    except PlanError:
        raise
    except ValueError as error:
        raise PlanError(str(error)) from error


def _check_keys(kind: type, content: Any, where: str, extra: tuple[str, ...] = ()) -> None:
    dot = f"{where}." if where else ""
    if not isinstance(content, Mapping):
        raise PlanError(f"{where or 'plan'}: expected keys and values, got {_show(content)}")
    known = [f.name for f in fields(kind)] + list(extra)
    for key in content:
        if key not in known:
            shown = _show(key).strip("'")
            near = difflib.get_close_matches(shown, known, 1, cutoff=0)
            raise PlanError(
                f"{dot}{shown}: unknown; nearest: {near[0]}; known: {', '.join(sorted(known))}"
            )
    for f in fields(kind):
        if f.default is f.default_factory is MISSING and f.name not in content:
            raise PlanError(f"{dot}{f.name}: missing")


def _number(value: Any, where: str) -> float:
    # YAML 1.1 takes 1e18, without a point and a sign, for a text.
    try:
        if isinstance(value, bool):
            raise ValueError
        number = float(value)
    except (TypeError, ValueError, OverflowError):
        raise PlanError(f"{where}: expected a number, got {_show(value)}") from None
    if not math.isfinite(number):
        raise PlanError(f"{where}: expected a finite number, got {_show(value)}")
    return number


def _integer(value: Any, where: str) -> int:
    number = _number(value, where)
    if number != int(number):
        raise PlanError(f"{where}: expected a whole number, got {_show(value)}")
    # An integer is itself, beyond what a float tells apart too.
    return value if isinstance(value, int) else int(number)


def _flag(value: Any, where: str) -> bool:
    if not isinstance(value, bool):
        raise PlanError(f"{where}: expected true or false, got {_show(value)}")
    return value


def _text(value: Any, where: str) -> str:
    if isinstance(value, (Mapping, list, bool)) or value is None:
        raise PlanError(f"{where}: expected a text, got {_show(value)}")
    return str(value)


_KINDS = {
    "int": _integer,
    "float": _number,
    "bool": _flag,
    "str": _text,
    "tuple[float, ...]": _number,
    "tuple[int, ...]": _integer,
    "tuple[str, ...]": _text,
}


def _convert(value: Any, annotation: str, where: str) -> Any:
    """Return the value as a field of that annotation has it."""
    plain = annotation.removesuffix(" | None")
    if value is None and plain != annotation:
        return None
    convert = _KINDS[plain]
    if not plain.startswith("tuple"):
        return convert(value, where)
    if not isinstance(value, list):
        raise PlanError(f"{where}: expected a list, got {_show(value)}")
    return tuple(convert(item, where) for item in value)


def _show(value: Any) -> str:
    """As repr, shortened before it is made: a few YAML aliases can stand for gigabytes."""
    shown = reprlib.Repr(maxlevel=2, maxlist=4, maxdict=4, maxstring=60, maxother=60, maxlong=40)
    return shown.repr(value)


def _parse_sizes(value: Any) -> tuple[int | str, ...]:
    if not isinstance(value, list):
        raise PlanError(f"sizes: expected a list, got {_show(value)}")
    return tuple(
        item if isinstance(item, str) and not item.isdigit() else _integer(item, "sizes")
        for item in value
    )


def _parse_objectives(value: Any) -> tuple[Objective, ...]:
    if not isinstance(value, list):
        raise PlanError(f"objectives: expected a list, got {_show(value)}")
    found = []
    for item in value:
        if not isinstance(item, Mapping):
            item = {"objective": item}
        item = {"label": item.get("objective"), **item}
        found.append(parse_section(Objective, item, "objectives"))
        _check_choice("objectives", found[-1].objective, tuple(OBJECTIVES))
        if not found[-1].label.replace("-", "").replace("_", "").isalnum():
            raise PlanError(
                f"objectives.label: expected letters, digits, - and _, got {found[-1].label!r}"
            )
    return tuple(found)


def _parse_data(content: Any) -> DataSettings | None:
    if content is None:
        return None
    if isinstance(content, Mapping) and isinstance(content.get("path"), str):
        content = {**content, "path": [content["path"]]}
    return parse_section(DataSettings, content, "data")


def _parse_recipe(content: Any) -> Recipe:
    _check_keys(Recipe, content, "recipe")
    name = _text(content.get("bundle", "marin"), "recipe.bundle")
    _check_choice("recipe.bundle", name, tuple(BUNDLES))
    table = content.get("table", {})
    if not isinstance(table, Mapping):
        raise PlanError(f"recipe.table: expected sizes by name, got {_show(table)}")
    entries = {
        str(size): parse_section(SizeEntry, entry, f"recipe.table.{size}")
        for size, entry in table.items()
    }
    types = {f.name: f.type for f in fields(Recipe)}
    values = {
        key: _convert(value, types[key], f"recipe.{key}")
        for key, value in content.items()
        if key not in ("bundle", "table")
    }
    try:
        return replace(BUNDLES[name], **values, table=entries)
    except ValueError as error:
        raise PlanError(str(error)) from error


def _parse_expectation(content: Any) -> Expectation:
    _check_keys(Expectation, content, "expect")
    values = {}
    if "law" in content:
        values["law"] = parse_section(Surface, content["law"], "expect.law")
        law = values["law"]
        exponents, scales = (law.alpha, law.beta), (law.A, law.B)
        if not (1e-3 <= min(exponents) <= max(exponents) <= 4 and 0 < min(scales) <= 1e15):
            raise PlanError(
                f"expect.law: expected alpha, beta 0.001 to 4 and A, B above 0, to 1e15, got {law}"
            )
    if "range" in content:
        values["range"] = _number(content["range"], "expect.range")
        if not 1 < values["range"] <= 1e12:
            raise PlanError(f"expect.range: expected above 1, to 1e12, got {values['range']}")
    return Expectation(**values)


def _check_choice(where: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise PlanError(f"{where}: expected one of {', '.join(known)}, got {value!r}")


def _refuse_repeated(name: str, values: tuple) -> None:
    for value, count in Counter(values).items():
        if count > 1:
            raise PlanError(f"{name}: expected each once, got {value!r} {count} times")
