"""--columns of `fit` and `compare` for a study's runs.csv, with budgets or without."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

_FIT = "params=params,tokens=tokens,flops=flops_all,loss=loss"
_COMPARE = (
    "objective=label,params=params,tokens=tokens,flops=flops_all,loss=loss,seed=seed,"
    "hours=gpu_hours,run=name,documents=documents"
)


def has_budgets(rows: Sequence[Mapping]) -> bool:
    """Say whether every row of runs.csv has a budget; a plan of token ratios has none."""
    return all(row["budget"] not in ("", None) for row in rows)


def fit_columns(rows: Sequence[Mapping]) -> str:
    """Return --columns of `fit`; C has what the loss adds, as in `compare` and `pictures`."""
    return _FIT + _budget(rows)


def compare_columns(rows: Sequence[Mapping]) -> str:
    """Return --columns of `compare`."""
    return _COMPARE + _budget(rows)


def _budget(rows: Sequence[Mapping]) -> str:
    return ",budget=budget" if has_budgets(rows) else ""
