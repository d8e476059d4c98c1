"""Rounds measured without training: what moving, checking, keeping and averaging adapters costs beside gRPC alone.

A round is: all sites upload, the coordinator validates, makes durable and averages, all sites download. It lasts from
the last site's download of one global adapter to the last site's download of the next. `fedhds-server` is the real
daemon, sites are the client's own link code without a model (`benchmarks.transport_load`, which also holds the floor).
Sites' files lie in memory (/dev/shm): their disks would be on other hosts. All runs in a network namespace of its own,
whose loopback counters are the bytes on the wire (packets of up to 64 KiB: Ethernet's frames of 1500 bytes would add
4 % of headers to anything). Variants take turns, so that other work on the machine meets all of them.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import transport_idle
from fedhds.security import pki
from fedhds.security.identity import Role

Line = dict[str, Any]

MEMORY = Path("/dev/shm")
CASES = {"8x20": (8, 20), "32x20": (32, 20), "8x100": (8, 100)}
FLOORS = ("floor-sync", "floor-aio")
# The floor with TLS, hashes and durable files.
DUTIES = "duties-sync"
# Ours as it is, then without one thing each: the run folder in memory, or no TLS.
OURS = {"fedhds": (True, True), "not durable": (False, True), "no TLS": (True, False)}
VARIANTS = [*FLOORS, DUTIES, *OURS]
_PROCESSES = 4
_CERTIFICATES = ("coordinator", *(f"load-{number}" for number in range(_PROCESSES)))


def main() -> None:
    """Measures what is asked for, then prints the tables and draws the plot of the last line of every variant."""
    if sys.argv[1:2] != ["--inside"]:
        inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-m", "benchmarks.transport"]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--net", *inside, "--inside", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="transport", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["all", "rounds", "idle", "storm", "report"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the plot lies beside")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk that makes uploads durable")
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--rounds", type=int, default=5, help="measured per start of a server, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="starts of every server")
    parser.add_argument("--sites", nargs="+", type=int, default=[1, 10, 100, 1000], help="idle, storm: how many")
    parser.add_argument("--minutes", type=float, default=1.0, help="idle: how long; a poll lasts 20 s")
    parser.add_argument("--note", default="", help="kept with every line")
    chosen = parser.parse_args(sys.argv[2:])
    chosen.folder.mkdir(parents=True, exist_ok=True)

    def write(line: Line) -> None:
        line |= {"note": chosen.note} if chosen.note else {}
        with chosen.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        certificates = Path(folder) / "tls"
        pki.init_authority(certificates)
        for name in _CERTIFICATES:
            role = Role.COORDINATOR if name == "coordinator" else Role.SITE
            pki.issue(certificates, name, role=role, hosts=["localhost", "127.0.0.1"] * (role is Role.COORDINATOR))
        if chosen.part in ("all", "rounds"):
            measure_rounds(chosen, certificates, write)
        if chosen.part in ("all", "idle"):
            transport_idle.measure_idle(chosen, certificates, write)
        if chosen.part in ("all", "storm"):
            transport_idle.measure_storms(chosen, write)
    lines = [json.loads(line) for line in chosen.out.read_text(encoding="utf-8").splitlines()]
    show([line for line in lines if line["part"] == "rounds"], chosen.out.with_suffix(".png"))
    transport_idle.show(lines)


def measure_rounds(chosen: argparse.Namespace, certificates: Path, write: Callable[[Line], None]) -> None:
    """Every variant of every case, a few starts each, in turns."""
    for case in chosen.cases:
        clients, mebibytes = CASES[case]
        measured: dict[str, list[Line]] = {variant: [] for variant in chosen.variants}
        for _ in range(chosen.repeats):
            for variant in chosen.variants:
                measured[variant].append(rounds(variant, clients, mebibytes << 20, chosen, certificates))
                print(case, variant, measured[variant][-1], file=sys.stderr, flush=True)
        for variant, runs in measured.items():
            seconds = sorted(second for run in runs for second in run["seconds"])
            line = {name: round(median(run[name] for run in runs), 4) for name in ("cpu_s", "peak_mb", "wire")}
            line |= {"seconds": round(median(seconds), 4), "fastest_s": seconds[0], "slowest_s": seconds[-1]}
            facts = {"part": "rounds", "case": case, "variant": variant, "rounds": len(seconds)}
            write(facts | line | {"load": os.getloadavg()[0], "at": round(time.time())})


def rounds(variant: str, clients: int, size: int, chosen: argparse.Namespace, certificates: Path) -> Line:
    """One start of a server: seconds of every round but the first, and what the server used for them."""
    names = [f"load-{number % _PROCESSES}/{number:02d}" for number in range(clients)]
    groups = [names[number::_PROCESSES] for number in range(_PROCESSES)]
    last = chosen.rounds + 1
    with tempfile.TemporaryDirectory(dir=MEMORY) as folder:
        shared = {"size": size, "folder": folder, "rounds": last}
        if variant in FLOORS:
            with floor_server(variant, clients) as (server, target):
                sites = [shared | {"target": target, "sites": group} for group in groups]
                with loads(variant, sites) as (lines, _):
                    return _watched(server, lines, names, size, last)
        if variant == DUTIES:
            files = {"tls": tls_files(certificates, 0)}
            with (
                tempfile.TemporaryDirectory(dir=chosen.folder) as run,
                floor_server(variant, clients, certificates, Path(run)) as (server, target),
                loads(variant, [shared | files | {"target": target, "sites": group} for group in groups]) as (lines, _),
            ):
                return _watched(server, lines, names, size, last)
        durable, tls = OURS[variant]
        with tempfile.TemporaryDirectory(dir=chosen.folder if durable else MEMORY) as run:
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
            # Ours starts with a download of the initial adapter, the floor with nothing.
            transfers = 2 * last + (not missing[0])
            return {
                "seconds": [round(ends[at] - ends[at - 1], 4) for at in range(2, last + 1)],
                "cpu_s": round((cpu_s(server) - used) / last, 4),
                "peak_mb": memory_mb(server, "VmHWM"),
                "wire": round((wire_bytes() - sent) / (transfers * len(names) * size), 4),
            }
    raise SystemExit("the sites ended before the last round")


@contextmanager
def coordinator(run: Path, certificates: Path | None, *flags: object) -> Iterator[tuple[int, str]]:
    """A `fedhds-server`: its process id and address; ended with the context."""
    command = [Path(sys.executable).with_name("fedhds-server"), "--model", "m", "--strategy", "full", *flags]
    command += ["--listen", "127.0.0.1:0", "--run-folder", run, "--patience", 600, "--log-level", "WARNING"]
    if certificates:
        files = (certificates / name for name in ("ca.crt", "coordinator.crt", "coordinator.key"))
        command += [f"--tls-{name}={path}" for name, path in zip(("ca", "cert", "key"), files, strict=True)]
    process = subprocess.Popen(list(map(str, command)))
    try:
        address = run / "address"
        while not (address.exists() and (target := address.read_text().strip())):
            if process.poll() is not None:
                raise SystemExit("fedhds-server did not start")
            time.sleep(0.02)
        yield process.pid, target
    finally:
        process.kill()
        process.wait()


@contextmanager
def floor_server(
    variant: str, clients: int, certificates: Path | None = None, folder: Path | None = None
) -> Iterator[tuple[int, str]]:
    """The floor's server: its process id and address; ended with the context."""
    given: Line = {"clients": clients, "folder": str(folder)}
    if certificates:
        given["tls"] = [str(certificates / name) for name in ("ca.crt", "coordinator.crt", "coordinator.key")]
    with loads(variant.replace("-", "-server-"), [given]) as (lines, (process,)):
        yield process.pid, f"127.0.0.1:{next(lines)['port']}"


@contextmanager
def loads(role: str, arguments: list[Line]) -> Iterator[tuple[Iterator[Line], list[subprocess.Popen[bytes]]]]:
    """Load processes, and before them the lines that they print, as they come; ended with the context."""
    merged, pipe = os.pipe()
    processes = []
    with os.fdopen(merged) as lines:
        try:
            for each in arguments:
                command = [sys.executable, "-m", "benchmarks.transport_load", role, json.dumps(each)]
                # One pipe for all: what is shorter than 4 KiB is written to it at once.
                processes.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=pipe))
            os.close(pipe)
            yield map(json.loads, lines), processes
        finally:
            for process in processes:
                process.kill()
                process.communicate()


def tls_files(certificates: Path, number: int) -> list[str]:
    """CA, certificate and key of the load process `number`."""
    return [str(certificates / name) for name in ("ca.crt", f"load-{number}.crt", f"load-{number}.key")]


def cpu_s(process: int) -> float:
    """Seconds of processor time, user and system, that a process has used."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def memory_mb(process: int, name: str) -> float:
    """A line of /proc/PID/status in megabytes; VmHWM is the highest resident set so far."""
    status = Path(f"/proc/{process}/status").read_text(encoding="ascii")
    return round(int(status.split(f"{name}:")[1].split()[0]) * 1024 / 1e6, 1)


def wire_bytes() -> int:
    """Bytes of all packets that this network namespace's loopback has carried."""
    loopback = next(line for line in Path("/proc/net/dev").read_text().splitlines() if line.strip().startswith("lo:"))
    return int(loopback.split(":")[1].split()[0])


def show(lines: list[Line], plot: Path) -> None:
    """Prints a Markdown table and draws seconds, CPU and memory."""
    latest = {(line["case"], line["variant"]): line for line in lines}
    cases = [case for case in CASES if any((case, floor) in latest for floor in FLOORS)]
    if not cases:
        return
    print("\n| sites x MiB | variant | s per round | over floor | over duties | CPU s per round | peak MB | wire |")
    print("| --- | --- | --: | --: | --: | --: | --: | --: |")
    for case in cases:
        floor = min(latest[case, floor]["seconds"] for floor in FLOORS if (case, floor) in latest)
        duties = latest.get((case, DUTIES), {}).get("seconds", math.nan)
        for variant in VARIANTS:
            if line := latest.get((case, variant)):
                spread = f"{line['seconds']:.3f} ({line['fastest_s']:.3f}-{line['slowest_s']:.3f})"
                ratios = f"{line['seconds'] / floor:.2f} | {line['seconds'] / duties:.2f}"
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


if __name__ == "__main__":
    main()
