"""`fedhds fingerprint`: what an operator compares, or gives the coordinator as --expected-fingerprint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer


def fingerprint(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="Base model: a path or a hub id.")],
    revision: Annotated[str, typer.Option(help="Revision of a hub model.")] = "",
    prompt_format: Annotated[Literal["auto", "chat", "alpaca"], typer.Option(help="As in the run.")] = "auto",
    feature_model: Annotated[str, typer.Option(help="The run's --feature-model, if it has one.")] = "",
    state: Annotated[Path | None, typer.Option(help="Remember the digests of weights in this folder.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object with the digest of each part.")] = False,
) -> None:
    """Print the fingerprint of a base model: 64 hexadecimal digits, the same at every site that may take part."""
    import json as codec

    from fedhds.fingerprint import PARTS, combined
    from fedhds.v2 import federation_pb2 as pb
    from fedhds_client.commands.adapter import _prepare_environment

    _prepare_environment()
    from fedhds_client.data.prompts import Prompter
    from fedhds_client.models import fingerprint as fingerprints
    from fedhds_client.models.loading import load_base_model

    def whole(name: str, revision: str, *, body_only: bool = False) -> pb.ModelFingerprint:
        base = load_base_model(name, revision=revision, device="cpu", cache_dir=state, body_only=body_only)
        template = Prompter(base.tokenizer, max_length=base.max_length, prompt_format=prompt_format).fingerprint
        return fingerprints.fingerprint(base, template)

    proof = whole(model, revision)
    if feature_model:
        proof.feature_model = fingerprints.digest_of(whole(feature_model, "", body_only=True))
    parts = {part: str(getattr(proof, part)) for part in PARTS}
    typer.echo(codec.dumps({"fingerprint": combined(parts), **parts}) if json else combined(parts))
