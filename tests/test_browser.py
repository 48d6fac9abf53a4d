"""Every page in a real browser: wide and narrow, light and dark, no network."""

import functools
import re
import shutil
import threading
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

import pytest

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
WIDTHS = (1280, 390)  # a desk and a phone, in pixels
# As text on a finished page these mean that a formula was not set.
RAW_TEX = re.compile(r"\$\$|\\\(|\\\[|\\frac|\\math\w+|\\operatorname|\\begin\{")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine: pages not looked at"
)


class Quiet(SimpleHTTPRequestHandler):
    """A file server that keeps its log to itself."""

    def log_message(self, *args):
        pass


class QuietServer(ThreadingHTTPServer):
    """A server that does not mind when a page is closed half-way."""

    daemon_threads = True

    def handle_error(self, request, client_address):
        pass


def serve(folder):
    """Serve a folder on a free port of this machine."""
    server = QuietServer(
        ("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server, f"http://127.0.0.1:{server.server_port}"


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                "--no-sandbox", "--disable-gpu", "--disable-background-networking",
                # no other host can be reached
                "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
            ],
        )
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def book():
    if not (HTML / "index.html").exists():
        pytest.fail("there is no rendered book: run make book", pytrace=False)
    server, address = serve(HTML)
    yield address
    server.shutdown()


def problems(browser, address, page_name, theme):
    """Open one page, look at it wide and narrow, and list what is wrong."""
    found = []
    context = browser.new_context(
        viewport={"width": WIDTHS[0], "height": 900}, color_scheme=theme)
    context.set_default_timeout(120_000)  # a busy machine is no fault
    page = context.new_page()
    page.on("request", lambda request: (
        request.url.startswith((address, "data:", "blob:"))
        or found.append(f"asks another host: {request.url}")))
    page.on("console", lambda m: m.type == "error" and found.append(m.text))
    page.on("pageerror", lambda error: found.append(f"script error: {error}"))
    page.goto(f"{address}/{page_name}", wait_until="load")
    if page_name == "index.html":  # a mere signpost to the preface
        page.wait_for_url("**/book/intro.html", wait_until="load")
    page.evaluate("() => window.MathJax?.startup?.promise")
    # text that nobody sees (search data, code) does not count
    text = page.evaluate(
        """() => {
            const copy = (document.querySelector("article") || document.body)
                .cloneNode(true);
            copy.querySelectorAll("pre, code, script, style, mjx-container")
                .forEach(e => e.remove());
            return copy.textContent;
        }""")
    if match := RAW_TEX.search(text):
        near = text[max(0, match.start() - 20): match.end() + 20]
        found.append(f"raw TeX: {near!r}")
    if page.locator("mjx-merror").count():
        found.append("a formula that MathJax cannot read")
    shown = page.evaluate("() => document.documentElement.dataset.theme")
    if shown and shown != theme:
        found.append(f"shows {shown} to a reader who wants {theme}")
    for width in WIDTHS:
        page.set_viewport_size({"width": width, "height": 900})
        over = page.evaluate(
            "() => document.documentElement.scrollWidth"
            " - document.documentElement.clientWidth")
        if over > 1:
            found.append(f"scrolls sideways by {over} pixels at {width}")
    context.close()
    return found


def all_pages():
    """The pages to look at; none where nothing is built (that fails below)."""
    skip = ("_static", "_sources")
    return sorted(
        str(path.relative_to(HTML)) for path in HTML.rglob("*.html")
        if path.relative_to(HTML).parts[0] not in skip
    ) or ["index.html"]


def test_the_icon_that_browsers_ask_for_is_there(book):
    """The signpost names none, and a 404 before it is left is an error there."""
    with urlopen(f"{book}/favicon.ico") as answer:
        assert answer.read(4) == b"\0\0\1\0"  # how an icon file begins


@pytest.mark.parametrize("name", all_pages())
def test_page(browser, book, name):
    found = {
        theme: wrong for theme in ("light", "dark")
        if (wrong := problems(browser, book, name, theme))
    }
    assert found == {}


@pytest.mark.parametrize(("fault", "said"), [
    ("<p>fine</p>", None),
    ("<script>console.error('oh')</script>", "oh"),
    ("<script>undefinedName()</script>", "script error"),
    ("<p>Then $$x^2$$ follows.</p>", "raw TeX"),
    ("<p>half: \\frac{1}{2}</p>", "raw TeX"),
    ("<p style='width: 500px'>wide</p>", "scrolls sideways"),
    ("<img src='https://example.org/x.png' alt=''>", "asks another host"),
    ("<script src='gone.js'></script>", "404"),
    ("<script>document.documentElement.dataset.theme='light'</script>",
     "shows light"),
])
def test_notices(browser, tmp_path, fault, said):
    (tmp_path / "page.html").write_text(
        f"<!doctype html><title>x</title><link rel='icon' href='data:,'>{fault}")
    server, address = serve(tmp_path)
    found = problems(browser, address, "page.html", "dark")
    server.shutdown()
    if said is None:
        assert found == []
    else:
        assert any(said in line for line in found), found
