"""`fedhds simulate`: a whole federation of real daemons on this machine, on the user's own data and model."""

from __future__ import annotations

import os
import shutil
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from rich.console import Console

    from fedhds_server.simulation.display import SweepDisplay
    from fedhds_server.simulation.results import Line, RunLines
    from fedhds_server.simulation.shards import Shards
    from fedhds_server.simulation.sweep import Point

_DESCRIPTION = (
    "Run a whole federation of real daemons on this machine. Every setting of the coordinator is a flag here, too; one "
    "that is given several values, divided by commas (in YAML: a list), makes a sweep. Finished runs are kept in "
    "runs.jsonl of --out; started again, the command goes on where it was interrupted."
)


def simulate(context: typer.Context) -> None:
    """Run a federation, or a sweep of them, on this machine your own data and model (--help: all settings)."""
    from rich.console import Console

    from fedhds.errors import UsageError
    from fedhds.settings.loader import read
    from fedhds_server.simulation.settings import simulation_settings
    from fedhds_server.simulation.sweep import points

    settings = simulation_settings()
    given = read(
        settings,
        program="fedhds simulate",
        description=_DESCRIPTION,
        arguments=context.args,
        environment=os.environ,
        sweeps=True,
    )
    plan = points(settings, given)
    console = Console(highlight=False)
    out = plan[0].settings.out
    try:
        failed = _simulate(plan, out, console)
    except BlockingIOError as error:
        raise UsageError(f"--out: another simulation works in {out}; wait for it, or choose another folder") from error
    except OSError as error:
        raise UsageError(f"--out: cannot use {out}: {error.strerror or error}") from error
    except KeyboardInterrupt:
        console.print("stopped; the same command goes on")
        raise typer.Exit(130) from None
    if failed:
        console.print(f"{failed} of {len(plan)} runs failed; the same command tries them again")
        raise typer.Exit(1)


# The flags are those of the settings, which are read as a daemon's are.
simulate.command_options = {  # type: ignore[attr-defined]
    "add_help_option": False,
    "context_settings": {"ignore_unknown_options": True, "allow_extra_args": True},
}


def _simulate(plan: Sequence[Point], out: Path, console: Console) -> int:
    """Runs what is not finished yet, and shows the results of all; the number of runs that failed."""
    from fedhds.runtime.files import locked
    from fedhds_server.simulation.display import SweepDisplay
    from fedhds_server.simulation.federation import key_of
    from fedhds_server.simulation.results import RunLines
    from fedhds_server.simulation.shards import shards_of

    out.mkdir(parents=True, exist_ok=True)
    with locked(out / "lock"):
        runs = RunLines(out / "runs.jsonl")
        shards = [shards_of(point.settings) for point in plan]
        keys = [key_of(point, files) for point, files in zip(plan, shards, strict=True)]
        finished = [key for key in keys if key in runs.lines]
        failed = 0
        with SweepDisplay(console, len(plan), len(finished)) as display:
            if finished and len(plan) > 1:
                display.say(f"{len(finished)} of {len(plan)} runs are finished")
            for point, files, key in zip(plan, shards, keys, strict=True):
                if key not in runs.lines:
                    failed += not _run(point, files, key, out / "runs" / f"{point.label}-{key[:8]}", runs, display)
                    display.ended()
        _show([runs.lines[key] for key in keys if key in runs.lines], out, console)
    return failed


def _run(point: Point, shards: Shards, key: str, folder: Path, runs: RunLines, display: SweepDisplay) -> bool:
    """Whether a run succeeded; what is left of one that failed stays for people, the next try starts from nothing."""
    from fedhds_server.simulation.daemons import SimulationError
    from fedhds_server.simulation.federation import run

    display.begins(point.label, point.settings.coordinator.run.rounds.count)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        line = run(point, shards, folder, display.watch)
    except SimulationError as error:
        kept = folder.with_name(f"{folder.name}.failed")
        shutil.rmtree(kept, ignore_errors=True)
        folder.rename(kept)
        display.say(f"{point.label}: failed: {str(error).replace(str(folder), str(kept))}")
        return False
    runs.add(key, line)
    display.say(f"{point.label}: done in {line['measured']['seconds']:.0f} s, its run folder is {folder / 'run'}")
    return True


def _show(lines: Sequence[Line], out: Path, console: Console) -> None:
    from rich.console import Console

    from fedhds_server.simulation.results import plot, table_of

    if not lines:
        return
    table = table_of(lines)
    # Whole also where the output is no terminal, for which rich assumes 80 columns.
    Console(highlight=False, width=max(console.width, 160)).print(table)
    console.print(f"lines: {out / 'runs.jsonl'}", soft_wrap=True)
    try:
        if plot(lines, out / "results.png"):
            console.print(f"plot: {out / 'results.png'}", soft_wrap=True)
    except ModuleNotFoundError:
        console.print("no plot: it needs pip install matplotlib")
