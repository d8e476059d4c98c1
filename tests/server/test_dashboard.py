"""What the dashboard sends: to whom, how much, and at what cost; without a browser."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable
from http.client import HTTPConnection
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

from fedhds_server.dashboard import dashboard
from fedhds_server.dashboard.dashboard import MAX_STREAMS
from fedhds_server.selection.base import Group, Selection
from fedhds_server.selection.record import abridged_selection, newest_selection, write_selection
from fedhds_server.status import status_of
from tests.support.host import Host, enroll, pause, resume, start, task_of
from tests.support.run_states import large, leading, of_sites, page_of
from tests.support.stores import Place

Event = tuple[str, str, Any]


@pytest.fixture
async def host(tmp_path: Path) -> AsyncIterator[Host]:
    made = await start(tmp_path, rounds=4, min_sites=2, deadline=600.0)
    yield made
    await made.stop()


class Stream:
    """An open /events."""

    def __init__(self, url: str, after: str = "") -> None:
        self._address = urlsplit(url)
        self._after = after

    async def __aenter__(self) -> Stream:
        self._reader, self._writer = await asyncio.open_connection(self._address.hostname, self._address.port)
        path = f"/events?{self._address.query}"
        lines = [f"GET {path} HTTP/1.1", f"Host: {self._address.netloc}", f"Last-Event-ID: {self._after}", "", ""]
        self._writer.write("\r\n".join(lines).encode())
        self.head = (await self._reader.readuntil(b"\r\n\r\n")).decode()
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.close()
        await self._writer.wait_closed()

    async def event(self) -> Event:
        """The next event: id, kind, content; raises EOFError when the stream has ended."""
        while True:
            size = int(await self._reader.readuntil(b"\r\n"), 16)
            text = (await self._reader.readexactly(size + 2)).decode()
            if not size:
                raise EOFError
            fields = dict(line.split(": ", 1) for line in text.strip().splitlines())
            if "event" in fields:
                return fields.get("id", ""), fields["event"], json.loads(fields["data"])

    async def until(self, kind: str, wanted: Callable[[Any], bool] = bool) -> Event:
        """The next event of a kind whose content is wanted."""
        async with asyncio.timeout(20):
            while True:
                event = await self.event()
                if event[1] == kind and wanted(event[2]):
                    return event


async def answer(url: str, path: str, **headers: str) -> tuple[int, dict[str, str], str]:
    """Status, headers and text."""

    def ask() -> tuple[int, dict[str, str], str]:
        connection = HTTPConnection(urlsplit(url).netloc, timeout=20)
        try:
            connection.request("GET", path, headers=headers)
            response = connection.getresponse()
            return (
                response.status,
                {key.lower(): value for key, value in response.getheaders()},
                response.read().decode(),
            )
        finally:
            connection.close()

    return await asyncio.to_thread(ask)


async def test_a_stream_begins_with_all_goes_on_with_changes_and_resumes(host: Host, sqlite: Place) -> None:
    async with page_of(host.coordinator, sqlite) as url:
        async with Stream(url) as stream:
            _, kind, snapshot = await stream.event()
            assert (kind, snapshot["phase"], snapshot["sites"]) == ("snapshot", "enrolling", [])
            a, _ = await enroll(host, "a"), await enroll(host, "b")
            await task_of(host, a)
            _, _, changes = await stream.until("changes", lambda changes: changes.get("phase") == "training")
            assert "spec" not in changes
            assert snapshot["spec"]["rounds"]["count"] == 4
            assert changes["round_number"] == 1
            assert {site["site"] for site in changes["sites"]} == {"a", "b"}
            cohort = changes["cohort"]
            assert (cohort["working"], cohort["answered"], cohort["disconnected"], cohort["quorum"]) == (2, 0, 0, 1)
            assert 500 < cohort["deadline_s"] <= 600
            await pause(host, "a new disk")
            number, _, line = await stream.until("line", lambda line: "paused" in line["message"])
            assert line["trouble"]
        assert number == f"r/{line['number']}/{line['at']}"
        async with Stream(url) as other:
            before = [(await other.until("line"))[0] for _ in range(int(line["number"]))]
            assert before[-1] == number
        for again in (Stream(url, after=before[-2]), Stream(f"{url}/?after={quote(before[-2])}")):
            async with again as stream:
                assert [(await stream.event())[1:2] for _ in range(2)] == [("snapshot",), ("line",)]


@pytest.mark.parametrize("after", ["r/99/{at}", "r/1/1.5", "another/1/{at}", f"another/{5000 * '9'}", "r"])
async def test_a_page_that_shows_another_history_begins_anew(host: Host, sqlite: Place, after: str) -> None:
    """Its coordinator was started on a backup: the journal ends before the page's last line, or went on otherwise."""
    await enroll(host, "a")
    _, entry = host.coordinator.journal[0]
    async with page_of(host.coordinator, sqlite) as url, Stream(url, after=after.format(at=entry.at)) as stream:
        kinds = [(await stream.event())[1] for _ in range(2)]
        assert kinds == ["snapshot", "history"]
        assert (await stream.until("line"))[0] == f"r/1/{entry.at}"


async def test_a_stream_ends_after_a_while_so_that_a_stalled_page_frees_its_place(
    host: Host, sqlite: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dashboard, "_STREAM_S", 2.0)
    async with page_of(host.coordinator, sqlite) as url:
        # They read nothing, and do not ask for another.
        stalled = [await Stream(url).__aenter__() for _ in range(MAX_STREAMS)]

        async def admitted() -> bool:
            async with Stream(url) as stream:
                return " 200 " in stream.head

        assert not await admitted()
        async with asyncio.timeout(20):
            while not await admitted():  # noqa: ASYNC110 - the server says so when it is asked
                await asyncio.sleep(0.05)
        assert (await stalled[0].until("again", lambda _: True))[1] == "again"
        for stream in stalled:
            await stream.__aexit__()


async def test_a_value_that_is_gone_is_said(host: Host, sqlite: Place) -> None:
    await enroll(host, "a")
    await pause(host, "night")
    async with page_of(host.coordinator, sqlite) as url, Stream(url) as stream:
        assert (await stream.event())[2]["paused"] == "night"
        await resume(host)
        assert (await stream.until("changes", lambda changes: "paused" in changes))[2]["paused"] is None


async def test_streams_are_bounded_and_leave_room_for_scrapes(host: Host, sqlite: Place) -> None:
    async with page_of(host.coordinator, sqlite) as url:
        streams = [Stream(url) for _ in range(MAX_STREAMS)]
        for stream in streams:
            assert " 200 " in (await stream.__aenter__()).head
        async with Stream(url) as refused:
            assert " 503 " in refused.head
            assert "retry-after: " in refused.head
        assert (await answer(url, "/metrics"))[0] == 200
        await streams[0].__aexit__()

        async def admitted() -> bool:
            async with Stream(url) as stream:
                return " 200 " in stream.head

        async with asyncio.timeout(20):
            while not await admitted():  # noqa: ASYNC110 - the server says so when it is asked
                await asyncio.sleep(0.05)
        for stream in streams[1:]:
            await stream.__aexit__()


async def test_open_streams_do_not_hold_up_the_end(host: Host, sqlite: Place, caplog: pytest.LogCaptureFixture) -> None:
    async with page_of(host.coordinator, sqlite) as url:
        stream = await Stream(url).__aenter__()
        await stream.event()
    # Otherwise uvicorn waits for a second, cuts them off and complains.
    with pytest.raises(EOFError):
        await stream.until("never")
    await stream.__aexit__()
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


async def test_all_who_look_share_one_status(host: Host, sqlite: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = []

    def counting(*arguments: Any, **options: Any) -> Any:
        taken.append(time.monotonic())
        return status_of(*arguments, **options)

    monkeypatch.setattr("fedhds_server.dashboard.dashboard.status_of", counting)
    async with page_of(host.coordinator, sqlite) as url:
        assert not taken
        began = time.monotonic()
        async with asyncio.TaskGroup() as group:
            for _ in range(10):
                group.create_task(three_seconds(url))
    assert 2 <= len(taken) <= time.monotonic() - began + 1
    assert min(after - before for before, after in pairwise(taken)) > 0.99


async def three_seconds(url: str) -> None:
    async with Stream(url) as stream:
        for _ in range(4):
            await stream.event()


async def test_a_standby_says_where_the_leader_is(sqlite: Place) -> None:
    async with page_of(None, sqlite) as url, Stream(url) as stream:
        _, kind, told = await stream.event()
        assert kind == "snapshot"
        assert told["leader"] == "fed2.example.org:8470"
        assert "standby" in told["problems"]
        assert "run_id" not in told
        assert (await answer(url, "/selection.json"))[0] == 404


async def test_headers_keep_everything_foreign_out(host: Host, sqlite: Place) -> None:
    async with page_of(host.coordinator, sqlite) as url:
        for path in ("/", "/page.js", "/drawing.js", "/page.css", "/icon.svg"):
            status, headers, _ = await answer(url, path)
            assert status == 200
            assert headers["content-security-policy"].startswith("default-src 'none'; script-src 'self';")
            assert headers["x-content-type-options"] == "nosniff"
        # A name that somebody pointed at the loopback address.
        port = urlsplit(url).port
        for path in ("/", "/events", "/selection.json", "/metrics"):
            for name in (
                "evil.example.org",
                "{.evil.example.org",
                'a".evil.org',
                "`.evil.org",
                "[::1",
                "a@localhost",
                "",
            ):
                assert (await answer(url, path, Host=f"{name}:{port}"))[0] in (400, 421)
        for name in (f"localhost:{port}", f"[::1]:{port}"):
            assert (await answer(url, "/", Host=name))[0] == 200
    async with page_of(host.coordinator, sqlite, loopback=False) as url:
        assert (await answer(url, "/", Host="fed.example.org"))[0] == 200


@pytest.mark.slow
def test_what_is_shown_of_a_large_run_is_bounded_and_first_what_matters() -> None:
    state = large(2000, 5000)
    status = status_of(state, Path("none"), limit=200)
    assert len(status.sites) == 200
    shown = {site.site for site in status.sites}
    names = list(state.sites)
    assert shown >= {*names[-30:], *names[100:140]}
    assert sum(status.site_states.values()) == 2000
    numbers = [line.round_number for line in status.closed_rounds]
    assert len(numbers) <= 200
    assert (numbers[0], numbers[-1]) == (1, 5000)
    assert {line.contributor_count for line in status.closed_rounds} == {50}
    evaluated = [line.round_number for line in status.evaluations]
    assert set(evaluated[1:-1]) == set(numbers[1:-1])
    assert len(evaluated) <= 200
    assert (evaluated[0], evaluated[-1]) == (0, 5000)
    assert status.ByteSize() < 100_000
    whole = status_of(state, Path("none"))
    assert (len(whole.sites), len(whole.closed_rounds), len(whole.evaluations)) == (2000, 5000, 5001)
    assert all(len(line.contributors) == line.contributor_count for line in whole.closed_rounds)


@pytest.mark.parametrize("rounds", range(1, 40))
def test_rounds_that_are_left_out_stay_out_while_the_run_grows(rounds: int) -> None:
    def shown(count: int) -> set[int]:
        status = status_of(of_sites(2, count), Path("none"), limit=8)
        return {line.round_number for line in status.closed_rounds}

    assert len(shown(rounds)) <= 8
    assert {1, rounds} <= shown(rounds)
    assert shown(rounds + 1) - shown(rounds) <= {rounds, rounds + 1}


async def test_a_look_at_ten_thousand_sites_holds_the_loop_up_for_a_moment_only(sqlite: Place, tmp_path: Path) -> None:
    coordinator = leading(large(10_000, 500), sqlite, tmp_path).gate.coordinator
    assert coordinator
    began = time.process_time()
    status_of(coordinator.state, coordinator.checkpoint, coordinator.journal, limit=200)
    taken_s = time.process_time() - began
    print(f"{1e3 * taken_s:.1f} ms")
    assert taken_s < 0.5


def selection_of(groups: int, sites: int) -> Selection:
    """Every group holds a cluster of every site, and one centroid of the first site is dropped."""
    made = tuple(
        Group(tuple((f"site-{site}", number) for site in range(sites)), ((f"site-{number % sites}", number),))
        for number in range(groups)
    )
    places = {member: (float(member[1]), float(len(member[0]))) for group in made for member in group.members}
    return Selection({}, made, ("a note",), places | {("site-0", groups): (-1.0, 0.5)})


def test_a_selection_is_kept_whole_and_shown_bounded(tmp_path: Path) -> None:
    assert newest_selection(tmp_path) is None
    for number, groups in ((0, 3), (2, 300), (10, 400)):
        write_selection(tmp_path, selection_of(groups, 30), run_id="r", number=number, strategy="fedhds")
    (tmp_path / "selection-x.json").touch()
    assert newest_selection(tmp_path) == 10
    kept = json.loads((tmp_path / "selection-10.json").read_text())
    assert kept["round_number"] == 10
    assert len(kept["groups"]) == 400
    assert kept["dropped"] == [{"site": "site-0", "cluster": 400, "at": [-1.0, 0.5]}]
    shown = abridged_selection(tmp_path, 10)
    assert (len(shown["groups"]), shown["group_count"], shown["shared_count"]) == (200, 400, 400)
    first = shown["groups"][0]
    assert (first["sites"], first["clusters"], len(first["members"])) == (30, 30, 8)
    assert sum(len(group["dots"]) for group in shown["groups"]) <= 1500
    assert len(json.dumps(shown)) < 100_000
    # Clusters at one place are one dot; the one that gives rows is drawn in any case.
    few = abridged_selection(tmp_path, 0)
    assert few["groups"][0]["dots"] == [[0.0, 6.0, 10, True], [0.0, 7.0, 20, False]]
    assert (few["dropped"], few["dropped_count"]) == ([[-1.0, 0.5]], 1)


async def test_a_page_gets_the_map_and_of_a_damaged_one_its_error(host: Host, sqlite: Place) -> None:
    write_selection(host.folder, selection_of(3, 4), run_id="r", number=0, strategy="fedhds")
    async with page_of(host.coordinator, sqlite) as url:
        assert (await answer(url, "/selection.json"))[0] == 404
        host.coordinator.effects.newest_selection = 0
        status, _, text = await answer(url, "/selection.json")
        assert (status, json.loads(text)["group_count"]) == (200, 3)
        (host.folder / "selection-1.json").write_text("{")
        host.coordinator.effects.newest_selection = 1
        status, _, text = await answer(url, "/selection.json")
        assert status == 503
        assert text.startswith("cannot read ")
