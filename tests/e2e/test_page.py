"""The status page in a real browser: what is seen of real runs, by whom it can be read, and what it never does.

Pictures are kept in build/screenshots, for people to look at.
"""

from __future__ import annotations

import json
import re
import socket
from collections.abc import AsyncIterator, Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import urlsplit

import grpc
import pytest
from playwright.async_api import Browser, Error

from fedhds.v2 import federation_pb2 as pb
from fedhds.v2 import federation_pb2_grpc as rpc
from tests.support import programs
from tests.support.browser import DESK, PHONE, Visit, chromium, visit
from tests.support.federation import Daemon, Federation
from tests.support.hostile import state_of, until
from tests.support.pair import Pair
from tests.support.postgres import PostgresServer
from tests.support.run_states import large, leading, page_of
from tests.support.scrapes import FLAG
from tests.support.stores import Place, sqlite_place
from tests.support.tiny import write_rows

pytestmark = pytest.mark.e2e

ATTACK = "<script>document.title = 'taken'</script><img src=x onerror=\"document.title = 'taken'\">"

# Text that is seen, with its contrast to the ground it stands on (WCAG 2.2, 1.4.3).
CONTRASTS = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).map(Number)
      .map((value) => value / 255).map((value) => value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (element) => {
    for (; element; element = element.parentElement) {
      const color = getComputedStyle(element).backgroundColor;
      if (color !== "rgba(0, 0, 0, 0)") return color;
    }
    return "rgb(255, 255, 255)";
  };
  return [...document.querySelectorAll("body *")]
    .filter((element) => element.getClientRects().length
      && [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim()))
    .map((element) => {
      const style = getComputedStyle(element);
      const pair = [light(element.ownerSVGElement ? style.fill : style.color), light(ground(element))];
      return [element.textContent, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
    });
}"""


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with chromium() as made:
        yield made


def url_of(server: Daemon) -> str:
    server.wait_for("metrics at http")
    found = re.search(r"metrics at (\S+)/metrics", server.text)
    assert found
    return f"{found[1]}/"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def operate(federation: Federation, verb: str, *flags: str) -> str:
    done = programs.run("fedhds", verb, f"--server={federation.address()}", *flags)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fail_with(run: Path, reason: str) -> None:
    """Enrolls as the site `evil` and fails its first task for `reason`."""
    until(lambda: bool(state_of(run).manifest))
    state = state_of(run)
    with grpc.insecure_channel((run / "address").read_text().strip()) as channel:
        stub = rpc.FederationStub(channel)
        session = stub.Enroll(pb.EnrollRequest(site="evil", protocol_versions=[2])).session
        stub.Register(
            pb.RegisterRequest(
                session=session,
                fingerprint=pb.ModelFingerprint(**state.fingerprint),
                manifest=state.adapter_manifest.to_proto(),
                rows=8,
            )
        )
        while not (task := stub.NextTask(pb.NextTaskRequest(session=session, wait_s=5)).task).id:
            pass
        stub.FailTask(pb.FailTaskRequest(session=session, task_id=task.id, kind="RuntimeError", reason=reason))


@pytest.fixture(scope="module")
def paused(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """The page of a paused run with rounds, evaluations, groups, and a site that means harm."""
    federation = Federation(tmp_path_factory.mktemp("page"), model)
    try:
        server = federation.server(
            *(
                "--rounds=400",
                "--selection-strategy=fedhds-aligned",
                "--selection-budget=12",
                "--min-evaluators=1",
                "--min-sites=4",
            ),
            *("--evaluate-every=1", "--deadline=3600", FLAG),
        )
        for name, topics in {
            "hospital-a": ("sun", "sea", "rain"),
            "hospital-b": ("sun", "sea", "wind"),
            "university-of-the-north": ("snow", "sea"),
        }.items():
            rows = write_rows(federation.folder / f"{name}.jsonl", dict.fromkeys(topics, 20))
            federation.client(name, f"--data={rows}")
        held_out = write_rows(federation.folder / "held-out.jsonl", {"sun": 5})
        federation.client("evaluator", f"--eval-data={held_out}")
        fail_with(federation.folder / "run", ATTACK)
        server.wait_for("after round 4, evaluator measures")
        operate(federation, "pause", "--reason=the disk is being changed")
        yield url_of(server)
    finally:
        federation.stop()


async def complete(page: Visit) -> None:
    """Returns once all of the paused run is shown."""
    await page.wait_for("document.querySelectorAll('#loss-chart circle.held-out').length > 4")
    await page.wait_for("document.querySelectorAll('#groups-map rect').length > 0")
    await page.wait_for("document.querySelectorAll('#events-list li').length > 9")


async def test_a_run_is_seen_as_it_goes_to_its_end(federation: Federation, browser: Browser) -> None:
    server = federation.server("--rounds=400", "--selection-strategy=full", "--min-sites=2", "--evaluate-every=1", FLAG)
    page = await visit(browser, url_of(server))
    await page.wait_for("document.title.startsWith('Waiting for sites')")
    await page.page.evaluate("window.unloaded = false")
    for name in "ab":
        rows = write_rows(federation.folder / f"{name}.jsonl", {"sun": 8})
        federation.client(name, f"--data={rows}", f"--eval-data={rows}")
    closed = "Number.parseInt(document.getElementById('rounds-figure').textContent)"
    await page.wait_for(f"{closed} >= 2")
    seen = await page.page.evaluate(closed)
    await page.wait_for(f"{closed} > {seen}")
    await page.wait_for("document.querySelectorAll('#loss-chart circle.held-out').length >= 3")
    await page.wait_for("document.getElementById('events-list').textContent.includes('round 2 closed')")
    assert await page.text("#connection") == "Live"
    assert "does not compare sites" in await page.text("#groups-note")
    assert re.search(r"16\s+of 16", await page.text("#samples-figure"))
    operate(federation, "stop", "--reason=good enough")
    await page.wait_for("document.getElementById('headline').textContent === 'Stopped'")
    assert "good enough" in await page.text("#message")
    assert not page.errors
    assert server.wait() == 0, server.text
    await page.wait_for("document.getElementById('connection').textContent.startsWith('The run is over')")
    assert await page.text("#headline") == "Stopped"
    assert await page.page.evaluate("window.unloaded") is False
    await page.shoot("over")


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
async def test_it_is_readable_in_light_and_dark_on_a_desk_and_on_a_phone(
    paused: str, browser: Browser, dark: bool, size: dict[str, int]
) -> None:
    page = await visit(browser, paused, dark=dark, size=size)
    await complete(page)
    await page.page.click("summary")
    await page.shoot(f"paused-{'dark' if dark else 'light'}-{'phone' if size == PHONE else 'desk'}")
    assert await page.page.evaluate("document.documentElement.scrollWidth") == size["width"]
    contrasts = await page.page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [(text, ratio) for text, ratio in contrasts if ratio < 4.5] == []
    ground = await page.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) is dark


async def test_it_tells_what_the_status_tells(paused: str, browser: Browser) -> None:
    page = await visit(browser, paused)
    await complete(page)
    assert "the disk is being changed" in await page.text("#notice")
    assert re.fullmatch(r"Round \d+ of 400", await page.text("#headline"))
    assert "deadline in" in await page.text("#answers-note")
    assert re.search(r"5\s+live of 5", await page.text("#live-figure"))
    # Those that somebody should look at come first.
    sites = [await row.inner_text() for row in await page.page.locator("#sites-rows th").all()]
    assert sites == ["evil", "evaluator", "hospital-a", "hospital-b", "university-of-the-north"]
    groups = await page.text("#groups-rows")
    assert re.search(r"hospital-a/\d+, hospital-b/\d+", groups)
    label = await page.page.locator("#loss-chart svg").get_attribute("aria-label")
    assert re.match(r"Loss on held-out rows: [\d.]+ in round 0, [\d.]+ in round \d+\.", label or "")
    await page.page.click("summary")
    # One for the base model, and one for each round, whether it was measured before the pause began or not.
    closed = int((await page.text("#rounds-figure")).split()[0])
    assert await page.page.locator("#rounds-rows tr").count() == closed + 1


async def test_what_a_site_wrote_stays_text_and_nothing_leaves_the_origin(paused: str, browser: Browser) -> None:
    page = await visit(browser, paused)
    await complete(page)
    assert ATTACK in await page.text("#sites-rows .error")
    assert ATTACK in await page.text("#events-list")
    assert not await page.page.locator("main script, main img").count()
    assert "taken" not in await page.page.title()
    assert page.errors == []
    assert {urlsplit(url).netloc for url in page.asked} == {urlsplit(paused).netloc}
    # Even where a script tried: text has no way to markup, and other hosts are out of reach.
    for attempt in ("document.body.innerHTML += 'x'", "fetch('http://127.0.0.1:1/')"):
        with pytest.raises(Error, match=r"TypeError: .*(TrustedHTML|Failed to fetch)"):
            await page.page.evaluate(f"async () => {{ await ({attempt}); }}")
    assert any("Content Security Policy" in error for error in page.errors)


async def test_everything_that_does_something_is_reached_by_keyboard_and_shows_it(
    paused: str, browser: Browser
) -> None:
    page = await visit(browser, paused)
    await complete(page)
    wanted = await page.page.evaluate(
        """[...document.querySelectorAll("a, button, input, summary, [tabindex]")]
            .filter((element) => element.checkVisibility()).length"""
    )
    assert wanted >= 4
    reached: list[str] = []
    for _ in range(wanted):
        await page.page.keyboard.press("Tab")
        name, outline = await page.page.evaluate(
            """() => { const at = document.activeElement, style = getComputedStyle(at);
                return [at.getAttribute("aria-label") ?? at.textContent, style.outlineStyle + style.outlineWidth]; }"""
        )
        assert outline == "solid2px", name
        reached.append(name)
    assert len(set(reached)) == wanted
    assert reached == [
        "Values as a table",
        "List of sites",
        "Events, newest first",
        "List of groups",
    ]
    await page.page.focus("summary")
    await page.page.keyboard.press("Enter")
    assert await page.page.locator("#rounds-rows").is_visible()


async def test_a_screen_reader_finds_its_way(paused: str, browser: Browser) -> None:
    page = await visit(browser, paused)
    await complete(page)
    await page.page.click("summary")
    nodes = await page.tree()

    def named(*roles: str) -> list[str]:
        return [node.get("name", {}).get("value", "") for node in nodes if node["role"]["value"] in roles]

    images = named("image", "img")
    assert len(images) == 3
    tables = named("table")
    assert len(tables) == 3
    assert all([*images, *tables, *named("region"), *named("columnheader"), *named("rowheader")])
    for landmark in ("banner", "main", "contentinfo"):
        assert len(named(landmark)) == 1, landmark
    # Changes are read out where they matter, not where they come every second.
    assert len(named("status")) == 2
    headings = [
        (int(next(p["value"]["value"] for p in node["properties"] if p["name"] == "level")), node["name"]["value"])
        for node in nodes
        if node["role"]["value"] == "heading"
    ]
    assert headings[0][0] == 1
    assert [level for level, _ in headings].count(1) == 1
    assert all(after <= before + 1 for (before, _), (after, _) in pairwise(headings))
    assert all(name for _, name in headings)
    assert await page.page.get_attribute("html", "lang") == "en"


async def test_a_page_outlives_its_coordinator_and_goes_on_with_the_next(
    federation: Federation, browser: Browser
) -> None:
    flags = ("--rounds=3", "--selection-strategy=full", "--min-sites=2", f"--http=127.0.0.1:{free_port()}")
    listen = f"127.0.0.1:{free_port()}"
    first = federation.server(*flags, listen=listen)
    rows = write_rows(federation.folder / "a.jsonl", {"sun": 8})
    federation.client("a", f"--data={rows}")
    page = await visit(browser, url_of(first))
    await page.wait_for("document.getElementById('events-list').textContent.includes('site a enrolled')")
    lines = await page.page.locator("#events-list li").count()
    await page.page.evaluate("window.unloaded = false")
    assert page.errors == []
    first.kill()
    await page.wait_for("document.getElementById('connection').textContent.startsWith('Disconnected since')")
    assert await page.page.locator("#sites-rows tr").count() == 1
    await page.shoot("disconnected")
    federation.server(*flags, listen=listen)
    await page.wait_for("document.getElementById('connection').textContent === 'Live'")
    federation.client("b", f"--data={rows}")
    await page.wait_for("document.getElementById('headline').textContent === 'Completed'")
    assert await page.page.evaluate("window.unloaded") is False
    # No line twice, none left out.
    numbered = [
        json.loads(line)
        for line in await page.page.evaluate(
            "[...document.querySelectorAll('#events-list li p')].map((line) => JSON.stringify(line.textContent))"
        )
    ]
    assert len(numbered) > lines
    for number in (1, 2, 3):
        assert len([line for line in numbered if line.startswith(f"round {number} closed")]) == 1


async def test_a_hidden_page_holds_no_stream_and_catches_up_when_it_is_seen(paused: str, browser: Browser) -> None:
    opened = await visit(browser, paused)
    await complete(opened)
    page, lines = opened.page, await opened.page.locator("#events-list li").count()
    hide = """(hidden) => {
        Object.defineProperty(document, "hidden", { value: hidden, configurable: true });
        document.dispatchEvent(new Event("visibilitychange"));
    }"""
    async with page.expect_event("requestfailed", lambda request: "/events" in request.url):
        await page.evaluate(hide, True)
    async with page.expect_event("response", lambda response: "/events" in response.url):
        await page.evaluate(hide, False)
    await opened.wait_for("document.getElementById('connection').textContent === 'Live'")
    assert await page.locator("#events-list li").count() == lines


async def test_a_standby_says_so_and_shows_the_run_once_it_leads(
    federation: Federation, postgres: PostgresServer, browser: Browser
) -> None:
    pair = Pair(federation, postgres)
    first = pair.server("one", FLAG)
    second = pair.server("two", FLAG)
    second.wait_for("standing by: the coordinator at")
    page = await visit(browser, url_of(second))
    await page.wait_for("document.getElementById('headline').textContent === 'Standing by'")
    port = federation.address("one").rpartition(":")[2]
    await page.wait_for(f"document.getElementById('message').textContent.includes(':{port} leads the run. ')")
    assert not await page.page.locator("#run").is_visible()
    await page.shoot("standby")
    first.kill()
    await page.wait_for("document.getElementById('headline').textContent === 'Waiting for sites'")
    assert await page.page.locator("#run").is_visible()
    assert page.errors == []


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Place]:
    made = sqlite_place(tmp_path)
    yield made
    made.close()


@pytest.mark.parametrize("size", [DESK, PHONE], ids=["desk", "phone"])
async def test_a_run_of_thousands_of_sites_and_rounds_stays_readable(
    sqlite: Place, tmp_path: Path, browser: Browser, size: dict[str, int]
) -> None:
    coordinator = leading(large(2000, 5000), sqlite, tmp_path).gate.coordinator
    assert coordinator
    async with page_of(coordinator, sqlite) as url:
        page = await visit(browser, url, size=size)
        await page.wait_for("document.querySelectorAll('#sites-rows th').length === 200")
        assert "The list has 200 of 2,000 sites" in await page.text("#sites-note")
        assert re.search(r"2,000\s+live of 2,000", await page.text("#live-figure"))
        points = await page.page.locator("#loss-chart polyline.training").get_attribute("points")
        assert 50 < len((points or "").split()) <= 200
        await page.page.click("summary")
        assert "evenly spaced" in await page.text("#rounds-caption")
        assert await page.page.evaluate("document.documentElement.scrollWidth") == size["width"]
        await page.shoot(f"large-{'phone' if size == PHONE else 'desk'}")
        assert page.errors == []
