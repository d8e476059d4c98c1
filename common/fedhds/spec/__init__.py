"""The specification of a run: a small frozen model for each part, and registries that others can add to."""

from fedhds.spec.aggregation import (
    AGGREGATOR_SPECS,
    AggregationSpec,
    AggregatorSpec,
    FedAvgSpec,
    SvdSpec,
    WireDtype,
)
from fedhds.spec.amounts import budget_rows
from fedhds.spec.evaluation import EvaluationSpec
from fedhds.spec.features import FeaturePooling, FeatureSpec
from fedhds.spec.filters import BINS, FILTER_SPECS, FilterSpec
from fedhds.spec.model import ModelSpec, PromptFormat
from fedhds.spec.optimizer import (
    OPTIMIZER_SPECS,
    AdagradSpec,
    AdamSpec,
    MomentumSpec,
    NoOptimizerSpec,
    OptimizerSpec,
    YogiSpec,
)
from fedhds.spec.peft import (
    PEFT_SPECS,
    BeftSpec,
    Ia3Spec,
    LoraSpec,
    PeftSpec,
    PrefixTuningSpec,
    PromptSpec,
    PromptTuningSpec,
    PTuningSpec,
)
from fedhds.spec.privacy import PrivacySpec, SelectionPrivacySpec
from fedhds.spec.rounds import RoundsSpec
from fedhds.spec.run import SCHEMA_VERSION, RunSpec
from fedhds.spec.secure import SecureSpec
from fedhds.spec.selection import Schedule, SelectionSpec
from fedhds.spec.strategies import (
    REDUCED_DIMENSION,
    STRATEGY_SPECS,
    ClusteringSpec,
    FederatedKMeansSpec,
    FedHdsAlignedSpec,
    FedHdsSpec,
    FullSpec,
    GroupingSpec,
    RandomSpec,
    Reduction,
    Shares,
    StrategySpec,
)
from fedhds.spec.training import TrainingSpec

__all__ = [
    "AGGREGATOR_SPECS",
    "BINS",
    "FILTER_SPECS",
    "OPTIMIZER_SPECS",
    "PEFT_SPECS",
    "REDUCED_DIMENSION",
    "SCHEMA_VERSION",
    "STRATEGY_SPECS",
    "AdagradSpec",
    "AdamSpec",
    "AggregationSpec",
    "AggregatorSpec",
    "BeftSpec",
    "ClusteringSpec",
    "EvaluationSpec",
    "FeaturePooling",
    "FeatureSpec",
    "FedAvgSpec",
    "FedHdsAlignedSpec",
    "FedHdsSpec",
    "FederatedKMeansSpec",
    "FilterSpec",
    "FullSpec",
    "GroupingSpec",
    "Ia3Spec",
    "LoraSpec",
    "ModelSpec",
    "MomentumSpec",
    "NoOptimizerSpec",
    "OptimizerSpec",
    "PTuningSpec",
    "PeftSpec",
    "PrefixTuningSpec",
    "PrivacySpec",
    "PromptFormat",
    "PromptSpec",
    "PromptTuningSpec",
    "RandomSpec",
    "Reduction",
    "RoundsSpec",
    "RunSpec",
    "Schedule",
    "SecureSpec",
    "SelectionPrivacySpec",
    "SelectionSpec",
    "Shares",
    "StrategySpec",
    "SvdSpec",
    "TrainingSpec",
    "WireDtype",
    "YogiSpec",
    "budget_rows",
]
