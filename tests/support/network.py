"""Hosts for tests: Linux network namespaces, each site's with a cable of its own to the coordinator's."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

PORT = 8470


def _run(*words: object) -> str:
    done = subprocess.run([str(word) for word in words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(map(str, words))}: {done.stderr.strip()}")
    return done.stdout


class Network:
    """The coordinator's host, and hosts of sites by name; what happens on a cable is said from the coordinator's end.

    Skips the test where hosts, rates or packet filters cannot be made. `close` takes everything away.
    """

    def __init__(self, sites: str) -> None:
        for program in ("ip", "tc", "iptables"):
            if not shutil.which(program):
                pytest.skip(f"{program} is not installed (Debian: iproute2, iptables)")
        self._sites = sites
        self._prefix = f"fedhds-{os.getpid()}-"
        self._made: list[str] = []
        try:
            for name in ("hub", *sites):
                _run("ip", "netns", "add", self.host(name))
                self._made.append(self.host(name))
                _run("ip", "-n", self.host(name), "link", "set", "lo", "up")
            for name in sites:
                self._connect(name)
            self.filter("hub", "-m statistic --mode random --probability 0 -j DROP")
            self.heal()
        except OSError as error:
            self.close()
            pytest.skip(f"this machine or user makes no network namespaces: {error}")

    def _connect(self, site: str) -> None:
        hub, host = self.host("hub"), self.host(site)
        _run("ip", "-n", hub, "link", "add", f"to-{site}", "type", "veth", "peer", "name", "to-hub", "netns", host)
        for namespace, device, address in ((hub, f"to-{site}", self.address(site)), (host, "to-hub", self._own(site))):
            _run("ip", "-n", namespace, "address", "add", f"{address}/24", "dev", device)
            _run("ip", "-n", namespace, "link", "set", device, "up")

    def host(self, name: str) -> str:
        """The namespace of a host."""
        return self._prefix + name

    def address(self, site: str) -> str:
        """Where the coordinator's host is for a site."""
        return f"10.77.{1 + self._sites.index(site)}.1"

    def _own(self, site: str) -> str:
        return f"10.77.{1 + self._sites.index(site)}.2"

    def on(self, name: str) -> tuple[str, ...]:
        """What runs a command on a host."""
        return ("ip", "netns", "exec", self.host(name))

    def filter(self, name: str, rule: str) -> None:
        """Adds a rule for packets that come in at a host."""
        _run(*self.on(name), "iptables", "-A", "INPUT", *rule.split())

    def packets(self, name: str) -> int:
        """Packets that the first rule at a host has met."""
        return int(_run(*self.on(name), "iptables", "-nvxL", "INPUT").splitlines()[2].split()[0])

    def heal(self) -> None:
        """Takes all rules away."""
        for name in ("hub", *self._sites):
            _run(*self.on(name), "iptables", "-F", "INPUT")

    def cable(self, site: str, state: str) -> None:
        """Pulls out the cable to a site ("down") or plugs it in ("up")."""
        _run("ip", "-n", self.host("hub"), "link", "set", f"to-{site}", state)

    def slow(self, site: str, rate: str) -> None:
        """Limits both directions of a cable, as tc writes rates; what waits for longer than 200 ms is dropped."""
        for name, device in (("hub", f"to-{site}"), (site, "to-hub")):
            limit = ("rate", rate, "burst", "64kb", "latency", "200ms")
            _run("tc", "-n", self.host(name), "qdisc", "add", "dev", device, "root", "tbf", *limit)

    def connections(self, site: str) -> int:
        """Connections with a site that the coordinator's host believes in."""
        return len(_run(*self.on("hub"), "ss", "-Htn", "state", "established", "dst", self._own(site)).splitlines())

    def close(self) -> None:
        """Takes the hosts away, and cables with them."""
        for name in self._made:
            subprocess.run(["ip", "netns", "delete", name], check=False)
        self._made = []
