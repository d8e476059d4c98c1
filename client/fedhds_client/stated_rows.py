"""How many training rows a site says it has: exactly, or under noise what hides the number."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedhds.privacy.accountant import Cost
from fedhds.privacy.mechanisms import calibrate_noise, site_rng

if TYPE_CHECKING:
    from fedhds.spec import RunSpec
    from fedhds_client.policy import SitePolicy
    from fedhds_client.site import Site

# Where DP-SGD's noise is given and not its epsilon: a count this noised costs a tenth of what one step does.
_NOISE = 10.0
# Share of the run's epsilon that the count may cost by itself.
_SHARE = 0.1
_TASK = "rows"


def rows_noise(spec: RunSpec) -> float:
    """Noise multiplier, and deviation, of the count of rows, which one row changes by 1; 0: the count is not noised."""
    selection, training = spec.privacy.selection, spec.privacy.training
    units = {spec.selection.strategy.privacy_unit, "example" if spec.selection.filters else None}
    if selection.noised and "example" in units:
        return selection.noise_multiplier
    if training.epsilon:
        return calibrate_noise(epsilon=_SHARE * training.epsilon, delta=training.delta)
    return _NOISE if training.noised else 0.0


def stated_rows(site: Site, spec: RunSpec, policy: SitePolicy, run_id: str) -> int:
    """The number of rows that leaves the site in a run, always the same one; durable with its ledger entry.

    Where noise hides single rows, it is the noised count; where it hides the whole shard, no noise could, and it is the
    policy's constant. Raises PrivacyError when the site's budget forbids it, StorageError.
    """
    if not site.rows or not spec.privacy.noised:
        return site.rows
    noise = rows_noise(spec)
    if not noise:
        return policy.stated_rows
    payload = site.account.release(run_id, f"{_TASK}/{site.name}")
    if payload is None:
        payload = str(max(1, round(site.rows + site_rng().gauss(0.0, noise)))).encode()
        site.account.record(
            payload,
            run_id=run_id,
            task_id=f"{_TASK}/{site.name}",
            cost=Cost(noise),
            sensitivity=1.0,
            clip_norm=0.0,
            released=1,
            dimension=1,
            delta=policy.delta(spec),
            release="number of rows",
            unit="example",
            limits=policy.limits(spec, run_id),
        )
    return int(payload)
