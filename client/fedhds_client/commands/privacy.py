"""`fedhds privacy`: what a planned run would cost each site, and what has been spent on this host's rows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_args

import typer

if TYPE_CHECKING:
    from fedhds.spec import RunSpec


def privacy(
    context: typer.Context,
    rows: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Plan a run, in which so many of a site's rows train.")
    ] = None,
    run: Annotated[
        Path | None, typer.Option(metavar="FILE", help="The planned run's specification: a run folder's report.json.")
    ] = None,
    ledger: Annotated[Path | None, typer.Option(metavar="FILE", help="The ledger (default: this user's).")] = None,
    delta: Annotated[
        float | None, typer.Option(metavar="D", help="Delta of epsilon; of a planned run its --delta. [default: 1e-05]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Print what sites of this host have spent; with --rows, what a planned run would cost one of them.

    A planned run is given by --run or by flags as of fedhds-server: fedhds privacy --rows 700 --model M --rounds 3
    --selection-strategy full --epsilon 8
    """
    from fedhds.errors import UsageError

    if delta is not None and not 0 < delta < 1:
        raise UsageError(f"--delta {delta:g} is not between 0 and 1")
    if rows is not None:
        own = [] if delta is None else ["--delta", repr(delta)]
        _plan(_spec(run, [*own, *context.args]), rows, json=json)
    elif run or context.args:
        raise UsageError("a planned run needs --rows: how many of a site's rows train")
    else:
        _spent(ledger, delta or 1e-5, json=json)


# The planned run's settings are read as fedhds-server reads them.
privacy.command_options = {  # type: ignore[attr-defined]
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True}
}


def _spent(file: Path | None, delta: float, *, json: bool) -> None:
    import json as codec

    from fedhds.errors import UsageError
    from fedhds.privacy.ledger import Ledger, Unit
    from fedhds_client.settings import LEDGER, default_state_folder

    path = file or default_state_folder() / LEDGER
    if not path.exists():
        raise UsageError(f"there is no ledger {path}; nothing was released by this user, or give --ledger")
    shards: list[dict[str, Any]] = []
    for key, rows, entries in Ledger(path).row_sets():
        account = Ledger(path).account(key, lambda: ())
        shards.append(
            {
                "rows": rows,
                "digest": key,
                "releases": len(entries),
                "runs": len({entry.run_id for entry in entries}),
                "epsilon": {unit: _finite(account.spent(delta=delta, unit=unit)) for unit in get_args(Unit)},
                "last": entries[-1].time if entries else None,
            }
        )
    if json:
        typer.echo(codec.dumps({"ledger": str(path), "delta": delta, "shards": shards}, indent=2))
        return
    typer.echo(f"{path}, delta {delta:g}; inf: something was released without noise")
    lines = []
    for shard in shards:
        epsilons = [_shown(epsilon) for epsilon in shard["epsilon"].values()]
        counts = [str(shard[name]) for name in ("releases", "runs")]
        lines.append([str(shard["rows"]), shard["digest"][:12], *counts, *epsilons, shard["last"] or ""])
    _table(["rows", "digest", "releases", "runs", *get_args(Unit), "last"], lines)


def _plan(spec: RunSpec, rows: int, *, json: bool) -> None:
    import json as codec

    from fedhds_client.privacy_plan import planned

    plan = planned(spec, rows)
    if json:
        typer.echo(codec.dumps(plan.as_dict(), indent=2))
        return
    lines = []
    for each in plan.releases:
        numbers = [f"{each.cost.noise_multiplier:.4g}", f"{each.cost.sample_rate:.4g}", str(each.cost.steps)]
        lines.append([each.release, each.unit, *numbers, _shown(_finite(each.epsilon))])
    _table(["release", "unit", "noise", "rate", "steps", "epsilon alone"], lines)
    for unit, epsilon in plan.epsilon.items():
        typer.echo(f"{unit}-level epsilon of the whole run: {_shown(_finite(epsilon))} (delta {plan.delta:g})")
    for note in plan.notes:
        typer.echo(note)


def _spec(file: Path | None, flags: Sequence[str]) -> RunSpec:
    import json
    import os

    from pydantic import ValidationError

    from fedhds.errors import UsageError
    from fedhds.settings import load
    from fedhds.spec import RunSpec

    if file is None:
        return load(
            RunSpec, program="fedhds privacy plan", description="", arguments=flags, environment=dict(os.environ)
        )
    if flags:
        raise UsageError(f"--run has the run's settings; drop {' '.join(flags)}")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        return RunSpec.model_validate(content.get("spec", content))
    except (OSError, ValueError, AttributeError, ValidationError) as error:
        raise UsageError(f"--run: {file} has no run's specification: {' '.join(str(error).split())}") from error


def _finite(epsilon: float) -> float | None:
    return epsilon if epsilon < float("inf") else None


def _shown(epsilon: float | None) -> str:
    return "inf" if epsilon is None else f"{epsilon:.4g}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    widths = [max(len(row[column]) for row in (heads, *rows)) for column in range(len(heads))]
    for row in (heads, *rows):
        typer.echo("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
