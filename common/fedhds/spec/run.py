"""What a run is: the one frozen, typed specification that the coordinator fixes and every site follows.

On the wire and in the run's state it is JSON: `spec.model_dump_json()`, `RunSpec.model_validate_json(text)`.
"""

from __future__ import annotations

from typing import Annotated, Any, Final, Literal, Self

from pydantic import Field, model_validator

from fedhds import __version__
from fedhds.settings import Parameters, parameter
from fedhds.spec.aggregation import AggregationSpec
from fedhds.spec.evaluation import EvaluationSpec
from fedhds.spec.model import ModelSpec
from fedhds.spec.peft import PEFT_METHODS, PeftSpec
from fedhds.spec.privacy import PrivacySpec
from fedhds.spec.rounds import RoundsSpec
from fedhds.spec.secure import SecureSpec
from fedhds.spec.selection import SelectionSpec
from fedhds.spec.training import TrainingSpec

SCHEMA_VERSION: Final = 2


class RunSpec(Parameters):
    """The specification of one run. Descriptions are the reference that `--help` and the docs are made from."""

    schema_version: Literal[2] = Field(
        SCHEMA_VERSION,
        description="The shape of this document; raised when an older version would misread it.",
        json_schema_extra={"setting": False},
    )
    model: ModelSpec = Field(json_schema_extra={"group": "Model"})
    peft: Annotated[PeftSpec, PEFT_METHODS] = Field(
        default_factory=PEFT_METHODS.make_default, json_schema_extra={"group": "PEFT"}
    )
    training: TrainingSpec = Field(default_factory=TrainingSpec, json_schema_extra={"group": "Training"})
    seed: int = parameter(
        42,
        "Seed of cohorts, initial adapter, data order and dropout; never of privacy noise.",
        group="Training",
        ge=0,
        lt=2**63,
    )
    selection: SelectionSpec = Field(default_factory=SelectionSpec, json_schema_extra={"group": "Selection"})
    privacy: PrivacySpec = Field(default_factory=PrivacySpec, json_schema_extra={"group": "Privacy"})
    aggregation: AggregationSpec = Field(default_factory=AggregationSpec, json_schema_extra={"group": "Aggregation"})
    secure: SecureSpec = Field(default_factory=SecureSpec, json_schema_extra={"group": "Secure aggregation"})
    rounds: RoundsSpec = Field(json_schema_extra={"group": "Rounds"})
    evaluation: EvaluationSpec = Field(default_factory=EvaluationSpec, json_schema_extra={"group": "Evaluation"})

    @model_validator(mode="before")
    @classmethod
    def _check_schema(cls, values: Any) -> Any:
        # Before the fields: those of another schema are other fields, and errors about them would hide the reason.
        version = values.get("schema_version", SCHEMA_VERSION) if isinstance(values, dict) else SCHEMA_VERSION
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"schema_version: the run's specification has schema {version!r}, and fedhds {__version__} reads "
                f"{SCHEMA_VERSION}; use the same version of fedhds at the coordinator and at all sites"
            )
        return values

    @model_validator(mode="after")
    def _check_variants(self) -> Self:
        self.selection.check(self)
        self.aggregation.check(self)
        self.aggregation.aggregator.check(self)
        self.privacy.training.check(self)
        self.aggregation.robust.check(self)
        self.secure.check(self)
        return self
