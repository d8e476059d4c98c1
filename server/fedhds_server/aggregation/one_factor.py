"""Rules under which one factor of LoRA trains in a round: the mean of B A is then exact, as the other is common."""

from __future__ import annotations

from typing import Any

from fedhds_server.aggregation.fedavg import FedAvg


class Alternating(FedAvg):
    """RoLoRA (Chen et al. 2025): odd rounds train B, even rounds A. B is first, as A has no gradient while B is 0."""

    description = "RoLoRA: B trains in odd rounds, A in even ones; the mean of the factor that trains"

    def trainable(self, parameters: Any, round_number: int, roles: frozenset[str]) -> frozenset[str]:
        """One factor."""
        return roles - {"lora_A" if round_number % 2 else "lora_B"}


class Ffa(FedAvg):
    """FFA-LoRA (Sun et al. 2024): A keeps its first value."""

    description = "FFA-LoRA: A keeps its first value; the mean of B"

    def trainable(self, parameters: Any, round_number: int, roles: frozenset[str]) -> frozenset[str]:
        """All but A."""
        return roles - {"lora_A"}
