"""A sweep: settings with several values, and the runs that these make."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fedhds.errors import SettingsError
from fedhds.settings import Setting
from fedhds.settings.flatten import active
from fedhds.settings.kinds import is_many
from fedhds.settings.loader import Given, build
from fedhds.settings.names import flag
from fedhds.spec import STRATEGY_SPECS
from fedhds_server.simulation.settings import SimulationSettings, defaults

# A comma is a part of these.
_TEXTS = ("model_license", "data_license", "out", "shards")
_MAX_LABEL = 100


@dataclass(frozen=True)
class Point:
    """One run of a sweep."""

    swept: Mapping[str, str]
    """The values of the settings that have several, by name."""
    settings: SimulationSettings
    given: Mapping[str, Any]
    """All values as they were given, by name."""

    @property
    def label(self) -> str:
        """The swept values for people and for file names, such as "selection-strategy=random,seed=1"."""
        swept = sorted(self.swept.items(), key=lambda item: item[0] == "seed")
        text = ",".join(f"{flag(name)[2:]}={value}" for name, value in swept)
        return re.sub(r"[^\w.,=%+-]+", "-", text)[:_MAX_LABEL] or "run"


def points(settings: Sequence[Setting], given: Given) -> list[Point]:
    """The runs that given values make, seeds outermost: an interrupted sweep has compared everything on some of them.

    A parameter of one variant counts in the runs with this variant, a budget in those whose strategy has one. Raises
    SettingsError for values that no run can have, or not together.
    """
    given = Given({**defaults(), **given.values}, given.sources)
    axes = dict(_axes(settings, given))
    fixed = {name: value for name, value in given.values.items() if name not in axes}
    result: list[Point] = []
    used: set[str] = set()
    for values in itertools.product(*axes.values()):
        everything = fixed | dict(zip(axes, values, strict=True))
        names = {setting.name for setting in active(settings, everything)}
        here = {name: value for name, value in everything.items() if name in names} if axes else everything
        strategy = STRATEGY_SPECS.get(str(here.get("selection_strategy")))
        if axes and strategy and strategy.coreset_kind == "all":
            here.pop("selection_budget", None)
        used |= here.keys()
        # What the swept values of a parameter leave as it is is one run.
        if all(point.given != here for point in result):
            built = build(SimulationSettings, settings, Given(here, given.sources))
            swept = {name: here[name] for name in axes if name in here}
            result.append(Point(swept, built, here))
    unused = sorted(given.values.keys() - used)
    if unused:
        raise SettingsError(given.sources[unused[0]], "no run of the sweep has this parameter; drop it")
    return result


def _axes(settings: Sequence[Setting], given: Given) -> Iterator[tuple[str, list[str]]]:
    for setting in sorted(settings, key=lambda setting: setting.name != "seed"):
        value = given.values.get(setting.name)
        if is_many(setting.field) or value is None:
            continue
        if isinstance(value, str) and setting.name not in _TEXTS and "," in value:
            value = [part.strip() for part in value.split(",") if part.strip()]
        if not isinstance(value, list):
            continue
        if setting.name == "processes":
            raise SettingsError(given.sources[setting.name], "takes one value; it makes no difference to a run")
        values = [str(part) for part in value]
        if len(set(values)) < len(values):
            raise SettingsError(given.sources[setting.name], "has a value twice; give each once")
        if len(values) == 1:
            given.values[setting.name] = values[0]
            continue
        yield setting.name, values
