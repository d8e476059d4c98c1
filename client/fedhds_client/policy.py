"""The site's policy: rules that no coordinator can override, from a local file and from flags."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedhds.errors import PolicyError, SettingsError
from fedhds.settings.names import flag, key
from fedhds.spec import RunSpec

if TYPE_CHECKING:
    from fedhds.privacy.ledger import Limit

# The run's delta comes from the coordinator, and a large one would make every epsilon small; so the site judges its
# budget at this delta or at the run's, whichever is smaller.
MAX_DELTA = 1e-5

Names = tuple[str, ...] | None


class SitePolicy(BaseModel):
    """The rules. A list that is not given allows everything, an empty one nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    models: Names = Field(None, description="Base models that a run may use, as the coordinator names them.")
    allow_feature_model: tuple[str, ...] = Field((), description="Models that features may be taken with besides.")
    peft_methods: Names = Field(None, description="PEFT methods.")
    strategies: Names = Field(None, description="Selection strategies.")
    aggregators: Names = Field(None, description="Aggregators.")
    require_secure_sites: int = Field(
        0, ge=0, description="Fewest certificates in a secure sum that the site adds its update to; 0: none is needed."
    )
    max_rounds: int | None = Field(None, ge=1, description="Most rounds of a run, and adapters that leave in it.")
    min_selection_noise: float = Field(0.0, ge=0, description="Least noise multiplier of what selection sends.")
    min_training_noise: float = Field(0.0, ge=0, description="Least noise multiplier of DP-SGD.")
    max_run_epsilon: float | None = Field(
        None, gt=0, description="Largest epsilon of one run, selection and training together, in each privacy unit."
    )
    max_epsilon: float | None = Field(
        None, gt=0, description="Largest epsilon ever, selection and training together, in each privacy unit."
    )
    selection_max_epsilon: float | None = Field(
        None, gt=0, description="Largest epsilon ever of what selection sends, in each privacy unit."
    )
    allow_exact_kmeans_sums: bool = Field(False, description="Whether exact sums over clusters may leave.")
    allow_exact_metrics: bool = Field(True, description="Whether exact metrics of held-out rows may leave.")
    min_cluster_rows: int = Field(5, ge=1, description="Fewest rows behind what the site says of its rows.")
    stated_rows: int = Field(
        1000, ge=1, description="Training rows that the site states where noise hides its whole shard."
    )

    @classmethod
    def read(cls, file: Path | None, flags: Mapping[str, Any]) -> SitePolicy:
        """The rules of the YAML `file` and of `flags`, which are those that a person set; raises SettingsError."""
        given = {} if file is None else _content(file)
        for name in flags:
            if name in given:
                raise SettingsError(flag(name), f"the policy {file} has this rule, too; keep one of them")
        try:
            return cls.model_validate({**given, **flags})
        except ValidationError as error:
            problem = error.errors(include_url=False)[0]
            where, reason = str(problem["loc"][0]), problem["msg"].removeprefix("Value error, ")
            if problem["type"] == "extra_forbidden":
                rules = ", ".join(key(name) for name in cls.model_fields)
                reason = f"there is no such rule; there are {rules}"
            raise SettingsError("--policy", f"{file}: {key(where)}: {reason}") from None

    def check_run(self, spec: RunSpec) -> None:
        """Raises PolicyError, which names the rule, for a run that the policy does not allow."""
        for rule, name in (
            ("models", spec.model.name),
            ("peft_methods", spec.peft.method),
            ("strategies", spec.selection.strategy.name),
            ("aggregators", spec.aggregation.aggregator.name),
        ):
            allowed = getattr(self, rule)
            if allowed is not None and name not in allowed:
                raise _broken(rule, f"the run has {name}, which is not among them")
        features = spec.selection.features.model
        if features and features not in (spec.model.name, *self.allow_feature_model):
            raise PolicyError(
                f"the run takes features with the model {features}, which the operator of the coordinator set; a site "
                f"loads it only if it is started with --allow-feature-model {features}"
            )
        if self.max_rounds is not None and spec.rounds.count > self.max_rounds:
            raise _broken("max_rounds", f"the run has {spec.rounds.count} rounds, the site takes {self.max_rounds}")
        self._check_noise(spec)

    def _check_noise(self, spec: RunSpec) -> None:
        # Here, as it imports numpy, which --help need not wait for.
        from fedhds.privacy.mechanisms import gaussian_epsilon

        selection, training = spec.privacy.selection, spec.privacy.training
        if spec.selection.asks_sites and selection.noise_multiplier < self.min_selection_noise:
            have = f"{selection.noise_multiplier:g} for selection, the site needs {self.min_selection_noise:g}"
            raise _broken("min_selection_noise", f"the run has a noise multiplier of {have}")
        if training.epsilon == 0 and training.noise_multiplier < self.min_training_noise:
            have = f"{training.noise_multiplier:g} for training, the site needs {self.min_training_noise:g}"
            raise _broken("min_training_noise", f"the run has a noise multiplier of {have}")
        for rule in ("max_run_epsilon", "max_epsilon"):
            limit = getattr(self, rule)
            if limit is None:
                continue
            if not training.noised:
                raise _broken(rule, "the run trains without noise, so that no epsilon holds")
            if training.epsilon > limit:
                raise _broken(rule, f"the run is to have epsilon {training.epsilon:g}, the site takes {limit:g}")
            releases = spec.selection.releases(spec) * (1 if spec.selection.one_shot else spec.rounds.count)
            cost = gaussian_epsilon(
                noise_multiplier=selection.noise_multiplier, delta=self.delta(spec), releases=releases
            )
            if cost > limit:
                raise _broken(rule, f"selection alone is to have epsilon {cost:.4g}, the site takes {limit:g}")

    def check_round(self, spec: RunSpec, round_number: int, adapters: int) -> None:
        """Raises PolicyError for a round beyond those of the run, after so many adapters that left in it."""
        most = min(spec.rounds.count, self.max_rounds or spec.rounds.count)
        if round_number > most:
            raise _broken("max_rounds", f"this is round {round_number} of a run that has {most} at most")
        if self.max_rounds is not None and adapters >= self.max_rounds:
            raise _broken("max_rounds", f"{adapters} adapters of this site have left in this run")

    def delta(self, spec: RunSpec) -> float:
        """The delta at which the site judges its budget."""
        return min(MAX_DELTA, spec.privacy.selection.delta, spec.privacy.training.delta)

    def limits(self, spec: RunSpec, run_id: str) -> tuple[Limit, ...]:
        """What the site's releases in a run may cost."""
        from fedhds.privacy.ledger import Limit

        delta = self.delta(spec)
        limits = []
        if self.selection_max_epsilon is not None:
            limits.append(Limit(self.selection_max_epsilon, delta, "--selection-max-epsilon", selection_only=True))
        if self.max_epsilon is not None:
            limits.append(Limit(self.max_epsilon, delta, "max-epsilon"))
        if self.max_run_epsilon is not None:
            limits.append(Limit(self.max_run_epsilon, delta, "max-run-epsilon", run_id))
        return tuple(limits)


def _broken(rule: str, how: str) -> PolicyError:
    return PolicyError(f"the site's policy does not allow it: {key(rule)}: {how}")


def _content(file: Path) -> dict[str, Any]:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError("--policy", f"cannot read {file}: {error}; give a YAML file") from error
    except yaml.YAMLError as error:
        raise SettingsError("--policy", f"{file} is no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(content, dict):
        raise SettingsError("--policy", f"{file} is no mapping of rules; write them as in docs/privacy.md")
    rules: dict[str, Any] = {}
    for name, value in content.items():
        rule = str(name).replace("-", "_")
        if rule in rules:
            raise SettingsError("--policy", f"{file}: {name} is there twice; keep one of them")
        rules[rule] = value
    return rules
