"""Rounds measured without training: what moving, checking, keeping and averaging adapters costs beside gRPC alone.

A round is: all sites upload, the coordinator validates, makes durable and averages, all sites download. It lasts from
the last site's download of one global adapter to the last site's download of the next. `fedhds-server` is the real
daemon, sites are the client's own link code without a model (`benchmarks.transport_load`, which also has the baseline).
Sites' files are in memory (/dev/shm): their disks would be on other hosts. It all runs in a network namespace of its
own, whose loopback counters are the bytes on the wire (packets of up to 64 KiB: Ethernet's frames of 1500 bytes would
add 4 % of headers to anything). Variants take turns, so that other work on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from benchmarks.transport_daemons import PROCESSES, Line, coordinator, cpu_s, loads, memory_mb, tls_files, wire_bytes

MEMORY = Path("/dev/shm")
CASES = {"8x20": (8, 20), "32x20": (32, 20), "8x100": (8, 100)}
BASELINES = ("baseline-sync", "baseline-aio")
# The baseline with TLS, hashes and durable files.
SECURE_BASELINE = "secure-baseline-sync"
# Ours as it is, then without one thing each: the run folder in memory, or no TLS.
OURS = {"fedhds": (True, True), "not durable": (False, True), "no TLS": (True, False)}
VARIANTS = [*BASELINES, SECURE_BASELINE, *OURS]


def measure_rounds(arguments: argparse.Namespace, certificates: Path, write: Callable[[Line], None]) -> None:
    """Every variant of every case, a few starts each, in turns."""
    for case in arguments.cases:
        clients, mebibytes = CASES[case]
        measured: dict[str, list[Line]] = {variant: [] for variant in arguments.variants}
        for _ in range(arguments.repeats):
            for variant in arguments.variants:
                measured[variant].append(rounds(variant, clients, mebibytes << 20, arguments, certificates))
                print(case, variant, measured[variant][-1], file=sys.stderr, flush=True)
        for variant, runs in measured.items():
            seconds = sorted(second for run in runs for second in run["seconds"])
            line = {name: round(median(run[name] for run in runs), 4) for name in ("cpu_s", "peak_mb", "wire")}
            line |= {"seconds": round(median(seconds), 4), "fastest_s": seconds[0], "slowest_s": seconds[-1]}
            labels = {"part": "rounds", "case": case, "variant": variant, "rounds": len(seconds)}
            write(labels | line | {"load": os.getloadavg()[0], "at": round(time.time())})


def rounds(variant: str, clients: int, size: int, arguments: argparse.Namespace, certificates: Path) -> Line:
    """One start of a server: seconds of every round but the first, and what the server used for them."""
    names = [f"load-{number % PROCESSES}/{number:02d}" for number in range(clients)]
    groups = [names[number::PROCESSES] for number in range(PROCESSES)]
    last = arguments.rounds + 1
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shared = {"size": size, "folder": folder, "rounds": last}
        if variant in BASELINES:
            with baseline_server(variant, clients) as (server, target):
                sites = [shared | {"target": target, "sites": group} for group in groups]
                with loads(variant, sites) as (lines, _):
                    return _watched(server, lines, names, size, last)
        if variant == SECURE_BASELINE:
            files = {"tls": tls_files(certificates, 0)}
            with (
                tempfile.TemporaryDirectory(dir=arguments.folder) as run,
                baseline_server(variant, clients, certificates, Path(run)) as (server, target),
                loads(variant, [shared | files | {"target": target, "sites": group} for group in groups]) as (lines, _),
            ):
                return _watched(server, lines, names, size, last)
        durable, tls = OURS[variant]
        with tempfile.TemporaryDirectory(dir=arguments.folder if durable else MEMORY) as run:
            flags = ["--rounds", last, "--min-sites", clients, "--evaluate-every", 0]
            with coordinator(Path(run), certificates if tls else None, *flags) as (server, target):
                sites = [
                    shared | {"target": target, "sites": group, "tls": tls_files(certificates, number) if tls else None}
                    for number, group in enumerate(groups)
                ]
                with loads("ours", sites) as (lines, _):
                    return _watched(server, lines, names, size, last)


def _watched(server: int, lines: Iterator[Line], names: list[str], size: int, last: int) -> Line:
    """CPU and bytes are of all rounds with the start, since sites do not wait for each other between rounds."""
    used, sent = cpu_s(server), wire_bytes()
    ends: dict[int, float] = {}
    missing = {number: set(names) for number in range(last + 1)}
    for line in lines:
        number = line["round"]
        missing[number].discard(line["site"])
        ends[number] = max(ends.get(number, 0.0), line["at"])
        if number == last and not missing[number]:
            # Ours starts with a download of the initial adapter, the baseline with nothing.
            transfers = 2 * last + (not missing[0])
            return {
                "seconds": [round(ends[at] - ends[at - 1], 4) for at in range(2, last + 1)],
                "cpu_s": round((cpu_s(server) - used) / last, 4),
                "peak_mb": memory_mb(server, "VmHWM"),
                "wire": round((wire_bytes() - sent) / (transfers * len(names) * size), 4),
            }
    raise SystemExit("the sites ended before the last round")


@contextmanager
def baseline_server(
    variant: str, clients: int, certificates: Path | None = None, folder: Path | None = None
) -> Iterator[tuple[int, str]]:
    """The baseline's server: its process id and address; ended with the context."""
    arguments: Line = {"clients": clients, "folder": str(folder)}
    if certificates:
        arguments["tls"] = [str(certificates / name) for name in ("ca.crt", "coordinator.crt", "coordinator.key")]
    with loads(variant.replace("-", "-server-"), [arguments]) as (lines, (process,)):
        yield process.pid, f"127.0.0.1:{next(lines)['port']}"


def show(lines: list[Line], plot: Path) -> None:
    """Prints a Markdown table and draws seconds, CPU and memory."""
    latest = {(line["case"], line["variant"]): line for line in lines}
    cases = [case for case in CASES if any((case, baseline) in latest for baseline in BASELINES)]
    if not cases:
        return
    print("\n| sites x MiB | variant | s per round | over baseline | over secure | CPU s per round | peak MB | wire |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for case in cases:
        baseline = min(latest[case, baseline]["seconds"] for baseline in BASELINES if (case, baseline) in latest)
        secure = latest.get((case, SECURE_BASELINE), {}).get("seconds", math.nan)
        for variant in VARIANTS:
            if line := latest.get((case, variant)):
                spread = f"{line['seconds']:.3f} ({line['fastest_s']:.3f}-{line['slowest_s']:.3f})"
                ratios = f"{line['seconds'] / baseline:.2f} | {line['seconds'] / secure:.2f}"
                rest = f"{line['cpu_s']:.2f} | {line['peak_mb']:.0f} | {line['wire']:.4f}"
                print(f"| {case} | {variant} | {spread} | {ratios} | {rest} |")
    for variant in OURS:
        few, many = latest.get(("8x20", variant)), latest.get(("32x20", variant))
        if few and many:
            print(f"\npeak memory of 32 sites over 8, {variant}: {many['peak_mb'] / few['peak_mb']:.2f}")
    _plot(latest, cases, plot)


def _plot(latest: dict[tuple[str, str], Line], cases: list[str], plot: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    titles = {"seconds": "seconds per round", "cpu_s": "server: CPU seconds per round", "peak_mb": "server: peak MB"}
    for axis, (name, title) in zip(axes, titles.items(), strict=True):
        for number, variant in enumerate(VARIANTS):
            heights = [latest.get((case, variant), {}).get(name, 0.0) for case in cases]
            places = [at + (number - 2.5) * 0.14 for at in range(len(cases))]
            axis.bar(places, heights, 0.14, label=variant)
        axis.set_title(title)
        axis.set_xticks(range(len(cases)), [f"{case} MiB" for case in cases])
        axis.grid(alpha=0.3, axis="y")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(plot, dpi=110)
    pyplot.close(figure)
    print(f"\n{plot}")
