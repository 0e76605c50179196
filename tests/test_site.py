"""Every page of the built site in headless Chromium: nothing broken, nothing fetched from elsewhere, search works."""
import json
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest
from browser import chromium
from built import site  # noqa: F401

pytestmark = pytest.mark.xdist_group("site")

READY = """
const done = arguments[arguments.length - 1];
const math = window.MathJax && MathJax.startup ? MathJax.startup.promise : Promise.resolve();
math.then(() => setTimeout(() => done(true), 100));
"""
BROKEN = "return [...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)"
BAD_MATH = "return [...document.querySelectorAll('mjx-merror, [data-mjx-error]')].map(e => e.textContent)"
LOST = ("return [...document.querySelectorAll('a[href^=\"#\"]')].map(a => a.getAttribute('href').slice(1)).filter(i => "
        "i && !document.getElementById(decodeURIComponent(i)))")
LINKS = "return [...document.querySelectorAll('.bd-article a[href]')].map(a => a.href.split('#')[0])"
WIDE = "return document.documentElement.scrollWidth - document.documentElement.clientWidth"


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(site):
    """The site behind a server on this machine."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(site.html)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture(scope="module")
def driver():
    with chromium() as found:
        yield found


def visit(driver, url):
    """Open a page; returns (complaints, addresses it asked for)."""
    driver.get_log("browser"), driver.get_log("performance")
    driver.get(url)
    driver.execute_script("document.querySelectorAll('img[loading=lazy]').forEach(i => i.loading = 'eager')")
    driver.execute_async_script(READY)
    complaints = [f"console: {e['message']}" for e in driver.get_log("browser") if e["level"] in ("SEVERE", "WARNING")]
    complaints += [f"image: {src}" for src in driver.execute_script(BROKEN)]
    complaints += [f"formula: {m}" for m in driver.execute_script(BAD_MATH)]
    complaints += [f"link to nowhere: #{a}" for a in driver.execute_script(LOST)]
    events = [json.loads(e["message"])["message"] for e in driver.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    return complaints, asked


def outside(asked):
    return [u for u in asked if urlparse(u).scheme in ("http", "https", "ws", "wss") and urlparse(u).hostname != "127.0.0.1"]


def test_every_page(site, address, driver):
    pages = sorted(p.relative_to(site.html) for p in site.html.rglob("*.html") if not {"_static", "_sources"} & set(p.parts))
    assert len(pages) > 10
    bad = {}
    for page in pages:
        complaints, asked = visit(driver, f"{address}/{page}")
        complaints += [f"from elsewhere: {u}" for u in outside(asked)]
        complaints += [f"link to nowhere: {u}" for u in set(driver.execute_script(LINKS))
                       if u.startswith(address) and not (site.html / urlparse(u).path.lstrip("/")).exists()]
        if complaints:
            bad[str(page)] = complaints
    assert not bad, json.dumps(bad, indent=1)


def test_front_page_comes_first_and_fits(address, driver):
    visit(driver, f"{address}/index.html")
    assert driver.current_url.endswith("/nbs/index.html")
    assert driver.find_elements("css selector", ".cell_output table") and driver.find_elements("css selector", "h1")
    driver.set_window_size(420, 800)
    try:
        visit(driver, f"{address}/nbs/index.html")
        assert driver.execute_script(WIDE) <= 0, "the page is wider than a telephone's screen"
    finally:
        driver.set_window_size(1280, 900)


@pytest.mark.parametrize("scheme", ["http", "file"])
def test_search_finds_a_word(site, address, driver, scheme):
    base = address if scheme == "http" else site.html.as_uri()
    for word, where in (("equivariance", "05_subspace"), ("warp", "01_affine")):
        visit(driver, f"{base}/search.html?q={word}")
        for _ in range(50):
            hits = [a.get_attribute("href") for a in driver.find_elements("css selector", "#search-results li a")]
            if any(where in h for h in hits):
                break
            driver.execute_async_script("setTimeout(arguments[0], 100)")
        assert any(where in h for h in hits), f"'{word}' is not found in {where}: {hits[:5]}"


def test_opened_as_a_file(site, driver):
    """The report is read by its path, without a server."""
    complaints, asked = visit(driver, (site.html / "nbs" / "index.html").as_uri())
    assert not complaints + outside(asked)


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_both_colour_schemes(address, driver, theme):
    visit(driver, f"{address}/nbs/index.html")
    driver.execute_script(f"localStorage.setItem('mode', '{theme}'); localStorage.setItem('theme', '{theme}')")
    complaints, _ = visit(driver, f"{address}/nbs/index.html")
    shade = driver.execute_script("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert not complaints and (min(shade) > 200 if theme == "light" else max(shade) < 60), (theme, shade)
