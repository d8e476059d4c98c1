"""What leaves a site: no training text, and nothing to anybody but the coordinator."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import numpy as np
import pytest
from google.protobuf.message import DecodeError, Message

from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import selection_pb2
from tests.support.federation import Federation
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

CANARY = "xyzzy-canary-7431 "
MessageType = TypeVar("MessageType", bound=Message)
_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA_FRAME = 0


class RecordingProxy:
    """Forwards TCP connections to the coordinator and keeps what clients send."""

    def __init__(self, target: str) -> None:
        host, _, port = target.rpartition(":")
        self._target = (host, int(port))
        self.sent: list[bytearray] = []
        self.address = ""
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()
        self._ready.wait(10)

    def _serve(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._forward, "127.0.0.1", 0))
        self.address = f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            upstream_reader, upstream_writer = await asyncio.open_connection(*self._target)
        except ConnectionError:
            # The coordinator has ended; the site finds out by itself.
            writer.close()
            return
        record = bytearray()
        self.sent.append(record)

        async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter, kept: bytearray | None) -> None:
            try:
                while data := await source.read(1 << 16):
                    if kept is not None:
                        kept += data
                    sink.write(data)
                    await sink.drain()
            except ConnectionError:
                pass
            finally:
                sink.close()

        await asyncio.gather(pump(reader, upstream_writer, record), pump(upstream_reader, writer, None))

    def messages(self) -> list[bytes]:
        """The bodies of all requests, free of HTTP/2 framing: every serialized message that was sent."""
        bodies = []
        for record in self.sent:
            assert record.startswith(_PREFACE)
            streams: dict[int, bytearray] = defaultdict(bytearray)
            position = len(_PREFACE)
            while position + 9 <= len(record):
                length = int.from_bytes(record[position : position + 3], "big")
                stream = int.from_bytes(record[position + 5 : position + 9], "big") & 0x7FFFFFFF
                if record[position + 3] == _DATA_FRAME:
                    streams[stream] += record[position + 9 : position + 9 + length]
                position += 9 + length
            bodies += [bytes(body) for body in streams.values()]
        return bodies

    def close(self) -> None:
        """Ends the proxy."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)


@pytest.mark.parametrize("strategy", ["full", "fedhds", "fedhds-aligned", "federated-kmeans"])
def test_no_training_text_leaves_a_site(federation: Federation, strategy: str) -> None:
    folder = federation.folder
    server = federation.server(
        "--rounds=2", f"--selection-strategy={strategy}", "--min-sites=1", "--min-evaluators=1", "--log-level=DEBUG"
    )
    proxy = RecordingProxy(federation.address())
    rows = write_rows(folder / "rows.jsonl", {"sun": 10, "sea": 10}, canary=CANARY)
    site = federation.client(
        "planted",
        f"--data={rows}",
        f"--eval-data={rows}",
        "--log-level=DEBUG",
        "--allow-exact-kmeans-sums",
        server=proxy.address,
    )
    assert (server.wait(), site.wait()) == (0, 0), site.text
    messages = proxy.messages()
    proxy.close()
    word = CANARY.strip().encode()
    # The search would find it: the site's name is in the first message, and all kinds of messages are there.
    assert any(b"planted" in message for message in messages)
    assert any(b"lora_A" in message for message in messages)
    assert sum(map(len, messages)) > 10_000
    needles = [word, word.decode().encode("utf-16-le"), b"canary-7431", b"xyzzy"]
    assert not [needle for message in messages for needle in needles if needle in message]
    files = [file for file in (folder / "run").rglob("*") if file.is_file()]
    assert any(file.name == "run.db" for file in files)
    for file in [*files, server.log]:
        content = file.read_bytes()
        assert not [needle for needle in needles if needle in content], file


_ROWS, _DIMENSION = 3, 16
_HMAC = 32


@pytest.mark.parametrize("consent", [False, True])
def test_neither_a_rows_features_nor_its_loss_leave_a_site_unless_it_consents(
    federation: Federation, consent: bool
) -> None:
    """Each of three rows would be a cluster, and one of them trains."""
    flags = ("--selection-strategy=fedhds-aligned", "--reduction=pca", f"--feature-dimension={_DIMENSION}")
    server = federation.server(*flags, "--selection-budget=1", "--rounds=1", "--min-sites=1", "--evaluate-every=0")
    proxy = RecordingProxy(federation.address())
    rows = write_rows(federation.folder / "rows.jsonl", {"sun": 1, "sea": 1, "sky": 1})
    policy = ["--min-cluster-rows=1"] * consent
    site = federation.client("planted", f"--data={rows}", *policy, server=proxy.address)
    assert (server.wait(), site.wait()) == (0, 0), site.text
    messages = proxy.messages()
    proxy.close()
    (cache,) = (federation.folder / "state").rglob("*.features")
    size = 4 * _ROWS * _DIMENSION
    features = np.frombuffer(cache.read_bytes()[-size - _HMAC : -_HMAC], dtype="<f4").reshape(_ROWS, _DIMENSION)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, atol=1e-5)
    # Four values are enough to know a row's features by.
    needles = [row[:4].tobytes() for row in features]
    kept = [path.read_bytes() for path in (federation.folder / "run").rglob("*") if path.is_file()]
    for places in (messages, kept):
        found = [any(needle in place for place in places) for needle in needles]
        # The state keeps a report in base64, and only as long as its stage is open.
        assert found == [consent and places is messages] * _ROWS
    (trained,) = results(messages, pb.TrainResult)
    assert (trained.samples, trained.HasField("loss")) == (1, consent)
    (report,) = results(messages, selection_pb2.ClusterReport)
    assert len(report.centroids) == (_ROWS if consent else 0)


def results(messages: list[bytes], kind: type[MessageType]) -> list[MessageType]:
    """The results of one kind among the requests that were sent."""
    found = []
    for message in messages:
        request, result = pb.CompleteTaskRequest(), kind()
        try:
            # After gRPC's own five bytes.
            request.ParseFromString(message[5:])
        except DecodeError:
            continue
        if request.result.Unpack(result):
            found.append(result)
    return found


def test_metrics_of_a_few_rows_are_not_measured(federation: Federation) -> None:
    federation.server("--rounds=1", "--min-sites=1")
    rows = write_rows(federation.folder / "rows.jsonl", {"sun": 4})
    site = federation.client("few", f"--eval-data={rows}")
    assert site.wait() != 0
    assert "--eval-data: has 4 rows" in " ".join(site.text.split())
    assert "--min-cluster-rows" in site.text


@pytest.fixture
def island() -> Iterator[str]:
    """A network namespace whose only way out is a link on which every packet is counted and nobody answers."""
    name = "fedhds-island"

    def run(*command: str) -> None:
        subprocess.run(command, check=True, capture_output=True)

    inside = ("ip", "netns", "exec", name)
    try:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)
        run("ip", "netns", "add", name)
        run(*inside, "ip", "link", "set", "lo", "up")
        run("ip", "link", "add", "fedhds-out", "type", "veth", "peer", "name", "uplink", "netns", name)
        run(*inside, "sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/uplink/disable_ipv6")
        run(*inside, "ip", "address", "add", "192.0.2.2/24", "dev", "uplink")
        run("sh", "-c", "echo 1 > /proc/sys/net/ipv6/conf/fedhds-out/disable_ipv6")
        run("ip", "link", "set", "fedhds-out", "up")
        run(*inside, "ip", "link", "set", "uplink", "up")
        run(*inside, "ip", "route", "add", "default", "via", "192.0.2.1")
    except (OSError, subprocess.CalledProcessError) as error:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, check=False)
        pytest.skip(f"no network namespaces here: {error}")
    yield name
    subprocess.run(["ip", "netns", "delete", name], check=True)


def packets_out(island: str) -> int:
    """Packets, ARP requests included, that left the island."""
    command = ["ip", "netns", "exec", island, "cat", "/sys/class/net/uplink/statistics/tx_packets"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode or not re.fullmatch(r"\d+\s*", done.stdout):
        shown = subprocess.run(
            ["ip", "netns", "exec", island, "cat", "/proc/net/dev"], capture_output=True, text=True, check=True
        ).stdout
        line = next(line for line in shown.splitlines() if line.strip().startswith("uplink:"))
        return int(line.split(":")[1].split()[9])
    return int(done.stdout)


def test_no_connection_is_made_but_to_the_coordinator(federation: Federation, island: str) -> None:
    """Without any switch that forbids the hub: on a local model nothing is looked up, nothing is reported home."""
    federation.prefix = ("ip", "netns", "exec", island)
    federation.environment = {"HF_HUB_OFFLINE": ""}
    rows = write_rows(federation.folder / "rows.jsonl", {"sun": 10, "sea": 10})
    before = packets_out(island)
    server = federation.server("--rounds=1", "--min-sites=1", "--min-evaluators=1")
    site = federation.client("a", f"--data={rows}", f"--eval-data={rows}")
    assert (server.wait(), site.wait()) == (0, 0), site.text
    assert packets_out(island) == before
    # The count would have shown it.
    attempt = "import socket; s = socket.socket(); s.settimeout(0.5); s.connect_ex(('192.0.2.9', 443))"
    subprocess.run([*federation.prefix, sys.executable, "-c", attempt], check=True)
    assert packets_out(island) > before


def test_the_coordinator_holds_nothing_of_a_site_but_what_is_listed(federation: Federation) -> None:
    folder = federation.folder
    rows = write_rows(folder / "rows.jsonl", {"sun": 10, "sea": 10})
    server = federation.server("--rounds=1", "--min-sites=1")
    site = federation.client("a", f"--data={rows}")
    assert (server.wait(), site.wait()) == (0, 0), site.text
    held = {file.relative_to(folder / "run").parts[0] for file in Path(folder / "run").rglob("*")}
    assert held <= {
        "lock",
        "metrics.jsonl",
        "run.db",
        "run.db-wal",
        "run.db-shm",
        "artifacts",
        "checkpoint",
        "checkpoints",
        "report.json",
        "selection-0.json",
    }
