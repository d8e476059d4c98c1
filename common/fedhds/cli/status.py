"""`fedhds status`: what a run is doing, asked of its coordinator once or again and again."""

from __future__ import annotations

import json as codec
import time
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedhds.cli.connection import DEFAULT_SERVER, Server, TlsCa, TlsCert, TlsKey, call
from fedhds.evaluation import label_of

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console, RenderableType

    from fedhds.v2 import status_pb2

_WATCH_EVERY_S = 2.0
_JOURNAL_LINES = 5
_OVER = ("completed", "stopped", "failed")


def status(
    server: Server = DEFAULT_SERVER,
    tls_ca: TlsCa = None,
    tls_cert: TlsCert = None,
    tls_key: TlsKey = None,
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Keep looking until the run is over or Ctrl-C.")] = False,
) -> None:
    """Show a run: phase, rounds, sites, evaluations, the last lines of its journal."""
    from fedhds.errors import UsageError
    from fedhds.v2 import status_pb2

    def ask(journal_after: int = 0) -> status_pb2.GetStatusResponse:
        request = status_pb2.GetStatusRequest(journal_after=journal_after)
        answer: status_pb2.GetStatusResponse = call("GetStatus", request, server, tls_ca, tls_cert, tls_key)
        return _harmless(answer)

    if json and watch:
        raise UsageError("--json prints one object and --watch goes on; choose one of them")
    if json:
        from fedhds.status import status_dict

        typer.echo(codec.dumps(status_dict(ask()), indent=2))
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        # Rich assumes 80 columns there, which breaks the table's lines.
        console = Console(width=max(console.width, 120))
    if not watch:
        answer = ask()
        console.print(_picture(answer))
        for line in answer.journal[-_JOURNAL_LINES:]:
            _print_line(console, line)
        return
    try:
        _watch(console, ask)
    except KeyboardInterrupt:
        return


def _harmless(answer: status_pb2.GetStatusResponse) -> status_pb2.GetStatusResponse:
    """The same, but nothing in its texts steers a terminal."""
    from google.protobuf import json_format

    from fedhds.encoding import shown

    def harmless(value: Any) -> Any:
        if isinstance(value, dict):
            return {harmless(key): harmless(item) for key, item in value.items()}
        if isinstance(value, list):
            return [harmless(item) for item in value]
        return shown(value) if isinstance(value, str) else value

    content = json_format.MessageToDict(answer, preserving_proto_field_name=True)
    return json_format.ParseDict(harmless(content), type(answer)())


def _watch(console: Console, ask: Callable[[int], status_pb2.GetStatusResponse]) -> None:
    """Prints the journal as it grows; in a terminal the run's picture stands below it."""
    from rich.live import Live

    from fedhds.errors import CoordinatorUnreachable

    answer = ask(0)
    seen = answer.journal[-1].number if answer.journal else 0
    lost = ""
    with Live(_picture(answer), console=console, auto_refresh=False) as live:
        for line in answer.journal[-_JOURNAL_LINES:]:
            _print_line(console, line)
        while answer.phase not in _OVER:
            time.sleep(_WATCH_EVERY_S)
            try:
                answer = ask(seen)
            except CoordinatorUnreachable as error:
                if str(error) != lost:
                    lost = str(error)
                    console.print(f"{lost}; asking again", markup=False, soft_wrap=True)
                continue
            lost = ""
            for line in answer.journal:
                _print_line(console, line)
                seen = line.number
            live.update(_picture(answer), refresh=True)


def _print_line(console: Console, line: status_pb2.JournalLine) -> None:
    from rich.text import Text

    at = time.strftime("%H:%M:%S", time.localtime(line.at))
    console.print(Text(f"{at} {line.message}", "yellow" if line.trouble else ""), soft_wrap=True)


def _picture(answer: status_pb2.GetStatusResponse) -> RenderableType:
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    spec = codec.loads(answer.spec)
    rounds, strategy = spec["rounds"]["count"], spec["selection"]["strategy"]["name"]
    parts: list[RenderableType] = [
        Text.assemble(
            f"run {answer.run_id}: ",
            (answer.phase, "bold"),
            f", round {answer.round_number} of {rounds}, strategy {strategy}, {answer.running_s:.0f} s",
        )
    ]
    if answer.HasField("paused"):
        parts.append(Text(f"paused: {answer.paused}", style="yellow"))
    if answer.message:
        parts.append(Text(answer.message))
    parts += [Text(warning, style="yellow") for warning in answer.warnings]
    if answer.model_fingerprint:
        by = "confirmed" if answer.model_confirmed else f"given by site {answer.model_given_by}, not confirmed"
        parts.append(Text(f"base model {answer.model_fingerprint}, {by}"))
    sites = Table("site", "state", "rows", "evaluates", "task", "MB sent", "distance", "rejected", "last error")
    for site in answer.sites:
        sites.add_row(
            Text(site.site),
            Text(f"{site.state}, has the adapter" if site.delivered else site.state),
            str(site.rows),
            ", ".join(["yes"] * site.evaluates + ["validates"] * site.validates),
            Text(site.task),
            f"{site.bytes_received / 1e6:.2f}",
            f"{site.last_update.distance:.2f}" if site.last_update.HasField("distance") else "",
            str(site.rejections or ""),
            Text(site.last_error),
        )
    parts.append(sites)
    if answer.closed_rounds and answer.closed_rounds[-1].HasField("product_gap"):
        gap = answer.closed_rounds[-1].product_gap
        parts.append(Text(f"averaging A and B apart was {100 * gap:.2f} % off the mean of their products"))
    if answer.validations:
        best = " before the first round" if not answer.best_round else f" after round {answer.best_round}"
        last = answer.validations[-1]
        loss = f"; {last.metrics['loss']:.4f} in round {last.round_number}" if "loss" in last.metrics else ""
        parts.append(Text(f"validation, on rows that are not those below: the loss is lowest{best}{loss}"))
    if answer.evaluations:
        metrics = sorted({metric for line in answer.evaluations for metric in line.metrics})
        # Where there is one evaluator, its mean is the median.
        several = any(line.evaluators > 1 for line in answer.evaluations)
        medians = [f"{label_of(metric)}, median" for metric in metrics if several]
        evaluations = Table("round", "held-out rows", *map(label_of, metrics), *medians)
        for line in answer.evaluations:
            means = [f"{line.metrics[metric]:.4f}" if metric in line.metrics else "" for metric in metrics]
            middle = [f"{line.medians[metric]:.4f}" if metric in line.medians else "" for metric in metrics if several]
            evaluations.add_row(str(line.round_number), str(line.rows), *means, *middle)
        parts.append(evaluations)
    if answer.checkpoint:
        parts.append(Text(f"checkpoint: {answer.checkpoint}"))
    if answer.best_checkpoint:
        parts.append(Text(f"best checkpoint: {answer.best_checkpoint}"))
    return Group(*parts)
