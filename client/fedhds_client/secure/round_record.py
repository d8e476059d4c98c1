"""What a site remembers of the newest secure round, so that no restart makes it answer two different questions."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from fedhds.errors import RoundReplayed, SecureAggregationError, StorageError
from fedhds.runtime.files import replace_file
from fedhds.secure.keys import KEY_BYTES, new_private_key

Hex = Annotated[
    bytes,
    BeforeValidator(lambda value: bytes.fromhex(value) if isinstance(value, str) else value),
    PlainSerializer(bytes.hex, return_type=str),
]


class RoundRecord(BaseModel):
    """The secrets of one round and every answer that was given in it; saved before the answer leaves the site.

    Answers are kept as they were sent: the same question gets the same bytes.
    """

    model_config = ConfigDict(extra="forbid")

    round_number: int
    share_private: Hex
    """X25519; opens what other sites seal for this one."""
    mask_private: Hex
    """X25519; this is what is shared out in case the site drops out."""
    seed: Hex
    """Of the mask that the site adds for itself."""
    rounding: Hex
    """Of the noise that rounds the update; never shared."""
    keys: Hex = b""
    peers: Hex = b""
    sealed: Hex = b""
    sharing: tuple[str, ...] = ()
    masked: Hex = b""
    survivors: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    signed: Hex = b""
    opened: Hex = b""

    @classmethod
    def at(cls, path: Path, round_number: int) -> Self:
        """The record of a round: the one at `path`, or new secrets in place of those of an earlier round.

        Raises RoundReplayed for a round before the one at `path`, StorageError, SecureAggregationError for a record
        that cannot be read: without it the site cannot know what it has answered.
        """
        try:
            known = cls.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            known = None
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror}; check the state folder") from error
        except (ValidationError, ValueError) as error:
            raise SecureAggregationError(
                f"{path} is damaged, so this site does not know what it has answered in this run; it takes no further "
                "part in the run's secure rounds"
            ) from error
        if known and known.round_number > round_number:
            raise RoundReplayed(
                f"the coordinator asks for round {round_number}, and this site has begun round {known.round_number}; "
                "a round that is over is not answered again"
            )
        if known and known.round_number == round_number:
            return known
        return cls(
            round_number=round_number,
            share_private=new_private_key(),
            mask_private=new_private_key(),
            seed=secrets.token_bytes(KEY_BYTES),
            rounding=secrets.token_bytes(KEY_BYTES),
        )

    def save(self, path: Path) -> None:
        """Makes the record durable in place of the one before, whose secrets are gone then; raises StorageError."""
        replace_file(path, self.model_dump_json(), private=True)

    def forget(self) -> None:
        """Drops the secrets when the last answer is in the record."""
        self.share_private = self.mask_private = self.seed = self.rounding = b""
