"""What moving adapters costs beside gRPC alone: rounds without training, waiting sites, results that come at once.

Starts itself again in a network namespace of its own, whose loopback counters are the bytes on the wire.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

from benchmarks import transport_burst, transport_idle, transport_rounds
from benchmarks.transport_daemons import PROCESSES, Line
from fedhds.security import pki
from fedhds.security.identity import Role

_CERTIFICATES = ("coordinator", *(f"load-{number}" for number in range(PROCESSES)))


def main() -> None:
    """Measures what is asked for, then prints the tables and draws the plot of the last line of every variant."""
    if sys.argv[1:2] != ["--inside"]:
        inside = ["sh", "-c", 'ip link set lo up && exec "$@"', "sh", sys.executable, "-m", "benchmarks.transport"]
        os.execvp("unshare", ["unshare", "--user", "--map-root-user", "--net", *inside, "--inside", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="transport", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--part", choices=["all", "rounds", "idle", "burst", "report"], default="all")
    parser.add_argument("--out", type=Path, default=Path(__file__).with_suffix(".jsonl"), help="the plot is beside it")
    parser.add_argument("--folder", type=Path, default=Path("build"), help="on the disk that makes uploads durable")
    parser.add_argument("--cases", nargs="+", choices=transport_rounds.CASES, default=list(transport_rounds.CASES))
    parser.add_argument("--variants", nargs="+", choices=transport_rounds.VARIANTS, default=transport_rounds.VARIANTS)
    parser.add_argument("--rounds", type=int, default=5, help="measured per start of a server, after one to warm up")
    parser.add_argument("--repeats", type=int, default=3, help="starts of every server")
    parser.add_argument("--sites", nargs="+", type=int, default=[1, 10, 100, 1000], help="idle, burst: how many")
    parser.add_argument("--minutes", type=float, default=1.0, help="idle: how long; a poll lasts 20 s")
    parser.add_argument("--note", default="", help="kept with every line")
    arguments = parser.parse_args(sys.argv[2:])
    arguments.folder.mkdir(parents=True, exist_ok=True)

    def write(line: Line) -> None:
        line |= {"note": arguments.note} if arguments.note else {}
        with arguments.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)

    with tempfile.TemporaryDirectory(dir=transport_rounds.MEMORY) as folder:
        certificates = Path(folder) / "tls"
        pki.init_authority(certificates)
        for name in _CERTIFICATES:
            role = Role.COORDINATOR if name == "coordinator" else Role.SITE
            pki.issue(certificates, name, role=role, hosts=["localhost", "127.0.0.1"] * (role is Role.COORDINATOR))
        if arguments.part in ("all", "rounds"):
            transport_rounds.measure_rounds(arguments, certificates, write)
        if arguments.part in ("all", "idle"):
            transport_idle.measure_idle(arguments, certificates, write)
        if arguments.part in ("all", "burst"):
            transport_burst.measure_bursts(arguments, write)
    lines = [json.loads(line) for line in arguments.out.read_text(encoding="utf-8").splitlines()]
    transport_rounds.show([line for line in lines if line["part"] == "rounds"], arguments.out.with_suffix(".png"))
    transport_idle.show(lines)
    transport_burst.show(lines)


if __name__ == "__main__":
    main()
