"""What everybody knows of a selection strategy: parameters, privacy unit, what the model card says; one file each."""

from fedhds.settings import Variants
from fedhds.spec.strategies.base import StrategySpec
from fedhds.spec.strategies.federated_kmeans import FederatedKMeansSpec
from fedhds.spec.strategies.fedhds import REDUCED_DIMENSION, ClusteringSpec, FedHdsAlignedSpec, FedHdsSpec, Reduction
from fedhds.spec.strategies.full import FullSpec
from fedhds.spec.strategies.grouping import GroupingSpec, Shares
from fedhds.spec.strategies.random import RandomSpec
from fedhds.spec.strategies.target import TargetFeaturesSpec, TargetGradientsSpec, TargetSpec

STRATEGY_SPECS: dict[str, type[StrategySpec]] = {
    "full": FullSpec,
    "random": RandomSpec,
    "fedhds": FedHdsSpec,
    "fedhds-aligned": FedHdsAlignedSpec,
    "federated-kmeans": FederatedKMeansSpec,
    "target-features": TargetFeaturesSpec,
    "target-gradients": TargetGradientsSpec,
}
STRATEGIES = Variants(STRATEGY_SPECS, key="name", default="fedhds-aligned", kind="selection strategy")

__all__ = [
    "REDUCED_DIMENSION",
    "STRATEGIES",
    "STRATEGY_SPECS",
    "ClusteringSpec",
    "FedHdsAlignedSpec",
    "FedHdsSpec",
    "FederatedKMeansSpec",
    "FullSpec",
    "GroupingSpec",
    "RandomSpec",
    "Reduction",
    "Shares",
    "StrategySpec",
    "TargetFeaturesSpec",
    "TargetGradientsSpec",
    "TargetSpec",
]
