"""The gate through which a trained adapter leaves: the policy, the noise of DP-SGD, and the ledger."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from fedhds.errors import PrivacyError
from fedhds.privacy.accountant import Cost, calibrate, epsilon_of
from fedhds.privacy.ledger import Limit
from fedhds_client.stated_rows import stated_rows
from fedhds_client.training.batches import steps_of

if TYPE_CHECKING:
    from fedhds.spec import RunSpec
    from fedhds.v2 import selection_pb2
    from fedhds_client.policy import SitePolicy
    from fedhds_client.site import Site
    from fedhds_client.training.loop import TrainOutcome

logger = logging.getLogger(__name__)

RELEASE = "adapter"


@dataclass(frozen=True)
class AdapterRelease:
    """One round's adapter of one site: what it may cost, known before the site trains."""

    site: Site
    spec: RunSpec
    run_id: str
    task_id: str
    asked: int
    """Rows that the coordinator asked for, from what it was told: no function of the rows themselves."""
    cost: Cost
    limits: tuple[Limit, ...]

    @classmethod
    def planned(
        cls,
        site: Site,
        spec: RunSpec,
        policy: SitePolicy,
        *,
        run_id: str,
        task_id: str,
        round_number: int,
        coreset: selection_pb2.Coreset,
    ) -> AdapterRelease:
        """Raises PolicyError or PrivacyError when the adapter may not leave, StorageError."""
        earlier = [entry for entry in site.account.entries() if entry.run_id == run_id]
        left = {entry.task_id for entry in earlier if entry.release == RELEASE and entry.task_id != task_id}
        policy.check_round(spec, round_number, len(left))
        asked = _asked(coreset, stated_rows(site, spec, policy, run_id))
        limits = policy.limits(spec, run_id)
        cost, private = Cost(0.0), spec.privacy.training
        if private.noised:
            if round_number == 1 and not spec.aggregation.aggregator.one_factor:
                text = "%s: noise on both factors of LoRA multiplies; --aggregator ffa or alternating keep it linear"
                logger.warning(text, site.name)
            spent = [entry.cost for entry in earlier if entry.unit == "example"]
            last = next((entry.cost for entry in reversed(earlier) if entry.release == RELEASE), None)
            cost = _private_cost(spec, policy, spent, last, asked, rounds=spec.rounds.count - round_number + 1)
            if private.epsilon:
                limits = (*limits, Limit(private.epsilon, private.delta, "limit, the run's --epsilon", run_id))
        site.account.check(cost, unit="example", limits=limits, adapter=True)
        return cls(site, spec, run_id, task_id, asked, cost, limits)

    def record(self, tensors: int) -> None:
        """Makes the release durable in the ledger; only then may the update be finished. Raises as `planned` does."""
        private = self.spec.privacy.training
        entry = self.site.account.record(
            None,
            run_id=self.run_id,
            task_id=self.task_id,
            cost=self.cost,
            sensitivity=private.max_grad_norm if private.noised else None,
            clip_norm=private.max_grad_norm if private.noised else 0.0,
            released=tensors,
            dimension=0,
            delta=private.delta,
            release=RELEASE,
            unit="example",
            limits=self.limits,
        )
        if entry.epsilon is not None:
            logger.info(
                "%s: releases an adapter at example-level epsilon %.4g (delta %g), this run so far %.4g",
                self.site.name,
                entry.epsilon,
                private.delta,
                self.site.account.spent(self.run_id, delta=private.delta, unit="example"),
            )

    def shown(self, outcome: TrainOutcome) -> TrainOutcome:
        """What may be said of the training: under noise nothing but the number of rows that was asked for."""
        if not self.spec.privacy.noised:
            return outcome
        return replace(outcome, samples=self.asked, loss=0.0, loss_rows=0, seconds=0.0, truncated_rows=0)


def _private_cost(
    spec: RunSpec, policy: SitePolicy, spent: list[Cost], last: Cost | None, asked: int, *, rounds: int
) -> Cost:
    """The cost of one round of DP-SGD, with noise for this and all `rounds` that are still to come."""
    private = spec.privacy.training
    rate, steps = min(1.0, spec.training.batch_size / asked), steps_of(spec.training, asked)
    replaced = spec.selection.strategy.pick_change == "one"

    def cost(noise: float, rounds: int) -> Cost:
        return Cost(max(noise, policy.min_training_noise), rate, steps * rounds, replaced)

    if not private.epsilon:
        return cost(private.noise_multiplier, 1)
    # As in the round before, if that still fits: equal steps compose faster, and not a bit is lost by rounding.
    again = cost(last.noise_multiplier, rounds) if last and last == cost(last.noise_multiplier, 1) else None
    if last and again and epsilon_of([*spent, again], delta=private.delta) <= private.epsilon:
        return last
    noise = calibrate(
        epsilon=private.epsilon,
        delta=private.delta,
        sample_rate=rate,
        steps=steps * rounds,
        replaced=replaced,
        spent=spent,
    )
    if noise is None:
        raise PrivacyError(
            f"no noise keeps {rounds} more rounds within the run's --epsilon {private.epsilon:g}: it is spent; the "
            "site takes no further part in the training",
            public="this release would go beyond the run's own --epsilon",
        )
    logger.info("DP-SGD: noise multiplier %.4g on %d steps a round, %.3g of the rows in each", noise, steps, rate)
    return cost(noise, 1)


def _asked(coreset: selection_pb2.Coreset, stated: int) -> int:
    match coreset.WhichOneof("rows"):
        case "random":
            return min(stated, coreset.random.count)
        case "picks":
            return min(stated, sum(pick.count for pick in coreset.picks.clusters) + coreset.picks.unclustered)
    return stated
