"""From what a front end takes, plain types, to a ``QuantConfig``: everything is checked before any work."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lightning_quant.errors import explain, unknown
from lightning_quant.estimators import ESTIMATORS, Estimator, build_estimator, option_names
from lightning_quant.schedule import as_schedule
from lightning_quant.spec import SPEC_VERSION, LayerRule, QuantConfig


def build_config(
    method: str | Estimator = "pege",
    scheme: str = "w8a8",
    config: QuantConfig | str | None = None,
    rules: Sequence[LayerRule | Mapping[str, Any]] | None = None,
    schedule: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
    where: str = "QuantCallback",
    **fields: Any,
) -> QuantConfig:
    """The config that these settings mean.

    Args:
        method: Name in ``ESTIMATORS``, or an ``Estimator``.
        scheme: Scheme string.
        config: A ``QuantConfig`` or the path of its YAML file, instead of everything else.
        rules: Per-layer overrides, or mappings of their fields.
        schedule: Name of a scheduled setting of the method -> a number, or the fields of a ``Schedule``.
        options: Fields of ``QuantConfig`` and the method's own settings.
        where: Who asks, for messages.
        fields: Fields of ``QuantConfig``; None leaves one as it is.

    Raises:
        ValueError: An unknown or doubled setting, or one that makes no sense.
    """
    fields = {name: value for name, value in fields.items() if value is not None}
    if config is not None:
        given = {"method": method != "pege", "scheme": scheme != "w8a8", "rules": rules, "schedule": schedule}
        beside = [name for name, value in {**given, "options": options}.items() if value] + list(fields)
        if beside:
            got = f"{', '.join(beside)} beside it"
            raise ValueError(explain(f"{where}.config", "to stand alone", got, "Drop one."))
        return config if isinstance(config, QuantConfig) else QuantConfig.from_yaml(config)
    _once(where, "options", options or {}, "arguments", fields)
    _once(where, "options", options or {}, "schedule", schedule or {})
    chosen = [_rule(rule, where) for rule in rules or ()]
    parsed = QuantConfig.parse(method, scheme, rules=chosen, **(options or {}), **fields)
    return parsed if not schedule else replace(parsed, options=_with_schedules(parsed, schedule, f"{where}.schedule"))


def _once(where: str, first: str, these: Mapping[str, Any], second: str, those: Mapping[str, Any]) -> None:
    both = sorted(these.keys() & those.keys())
    if both:
        got = f"{', '.join(both)} in {first} and in {second}"
        raise ValueError(explain(where, "each setting once", got, "Drop one of them."))


def _rule(rule: LayerRule | Mapping[str, Any], where: str) -> LayerRule:
    """A rule from a mapping, checked the way a YAML file's is."""
    if isinstance(rule, LayerRule):
        return rule
    return QuantConfig.from_dict({"version": SPEC_VERSION, "rules": [rule]}, where).rules[0]


def _with_schedules(config: QuantConfig, schedule: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The method's options with the schedules among them."""
    for name, value in schedule.items():
        as_schedule(value, f"{where}[{name!r}]")
    if isinstance(config.method, str) and config.method in ESTIMATORS:
        build_estimator(config.method, dict(config.options))  # complains about the other options, if it must
        known = [n for n in option_names(ESTIMATORS[config.method]) if _moves(config, n)]
        for name in schedule:
            if name not in known:
                raise ValueError(unknown("scheduled setting", name, known or ["(none)"], where))
    return {**config.options, **schedule}


def _moves(config: QuantConfig, name: str) -> bool:
    """Whether a setting of the method is a schedule, as it stands or once it is given a number."""
    for options in ({}, {name: 0.5}, {name: 1.0}):
        try:
            rule = build_estimator(config.method, {**config.options, **options})
        except (TypeError, ValueError):  # not a number, or out of range
            continue
        if name in {**rule.role(False).schedules(), **rule.role(True).schedules()}:
            return True
    return False
