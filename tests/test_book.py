"""The rendered book: nothing from other hosts, no dead link, nothing missing."""

import ast
import re
import shutil
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from bs4 import BeautifulSoup

ROOT = Path(__file__).resolve().parents[1]
HTML = ROOT / "_build" / "html"
# Elements that make a browser fetch something by itself.
FETCHES = {
    "script": ["src"], "img": ["src", "srcset"], "iframe": ["src"],
    "source": ["src", "srcset"], "video": ["src", "poster"], "audio": ["src"],
    "embed": ["src"], "object": ["data"], "input": ["src"], "track": ["src"],
    "use": ["href", "xlink:href"], "image": ["href", "xlink:href"],
}
EXTERNAL = re.compile(r"^\s*(?:[a-z]+:)?//", re.I)
CSS_FETCH = re.compile(r"(?:url\(|@import\s)\s*[\"']?\s*(?:https?:)?//", re.I)
JS_FETCH = re.compile(
    r"(?:\bimport\s*\(?|\bfrom|\bfetch\(|\.src\s*=)\s*[\"'`](?:https?:)?//"
)


@pytest.fixture(scope="session", autouse=True)
def built():
    """Stop at once where there is nothing to look at."""
    if not (HTML / "index.html").exists():
        pytest.fail("there is no rendered book: run make book", pytrace=False)


def pages(html):
    """All pages of a built book."""
    skip = ("_static", "_sources")
    return [
        path for path in sorted(html.rglob("*.html"))
        if path.relative_to(html).parts[0] not in skip
    ]


def soup_of(path):
    return BeautifulSoup(path.read_text("utf-8"), "html.parser")


def listed():
    """The pages that the table of contents names."""
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text("utf-8"))
    return [toc["root"]] + [
        chapter["file"] for part in toc["parts"] for chapter in part["chapters"]
    ]


def external(html):
    """List everything that a browser would fetch from another host."""
    found = []
    for path in pages(html):
        name, soup = path.relative_to(html), soup_of(path)
        for tag, attributes in FETCHES.items():
            for element in soup.find_all(tag):
                for attribute in attributes:
                    value = element.get(attribute, "")
                    if any(EXTERNAL.match(part) for part in value.split(",")):
                        found.append(f"{name}: <{tag}> {value}")
        for link in soup.find_all("link"):
            # canonical and the like are not fetched
            if {"stylesheet", "icon", "preload", "preconnect", "dns-prefetch",
                    "modulepreload", "prefetch", "manifest"} & set(link["rel"]):
                if EXTERNAL.match(link.get("href", "")):
                    found.append(f"{name}: <link> {link['href']}")
        for script in soup.find_all("script", src=False):
            if match := JS_FETCH.search(script.string or ""):
                found.append(f"{name}: inline script {match[0]}")
        css = [style.string or "" for style in soup.find_all("style")]
        css += [element["style"] for element in soup.find_all(style=True)]
        if match := CSS_FETCH.search("\n".join(css)):
            found.append(f"{name}: style {match[0]}")
        for frame in soup.find_all("meta", attrs={"http-equiv": "refresh"}):
            if "//" in frame.get("content", ""):
                found.append(f"{name}: refresh {frame['content']}")
    for path in html.rglob("*.css"):
        if match := CSS_FETCH.search(path.read_text("utf-8")):
            found.append(f"{path.relative_to(html)}: {match[0]}")
    return found


def dead_links(html):
    """List the local links and pictures that lead nowhere, anchors included."""
    anchors, found = {}, []

    def ids(path):
        if path not in anchors:
            soup = soup_of(path)
            anchors[path] = {e["id"] for e in soup.find_all(id=True)} | {
                e["name"] for e in soup.find_all("a", attrs={"name": True})}
        return anchors[path]

    for path in pages(html):
        soup = soup_of(path)
        targets = [e["href"] for e in soup.find_all("a", href=True)]
        targets += [e["href"] for e in soup.find_all("link", href=True)]
        targets += [e["src"] for e in soup.find_all(src=True)]
        for target in targets:
            parts = urlsplit(target)
            if parts.scheme or parts.netloc or target in ("#", ""):
                continue
            goal = path
            if parts.path:
                goal = (path.parent / unquote(parts.path)).resolve()
            anchor = unquote(parts.fragment)
            if not goal.is_file():
                found.append(f"{path.relative_to(html)}: no file {target}")
            elif anchor and goal.suffix == ".html" and anchor not in ids(goal):
                found.append(f"{path.relative_to(html)}: no anchor {target}")
    return found


def incomplete(html, names):
    """List what the named pages lack."""
    found = []
    for name in names:
        path = html / f"{name}.html"
        if not path.is_file():
            found.append(f"{name}: not built")
            continue
        soup = soup_of(path)
        article = soup.find("article")
        if soup.html.get("lang") != "en":
            found.append(f"{name}: no language")
        if not soup.find("meta", attrs={"name": "viewport"}):
            found.append(f"{name}: no viewport")
        if not soup.title or "Emoformer" not in soup.title.text:
            found.append(f"{name}: no title")
        if len(article.find_all("h1")) != 1:
            found.append(f"{name}: {len(article.find_all('h1'))} main headings")
        for image in article.find_all("img"):
            alt = image.get("alt", "")
            if len(alt) < 20 or alt.startswith(("../", "_images")):
                found.append(f"{name}: picture without a text: {image['src']}")
        for drawing in article.select(".emo-drawing svg"):
            if len(drawing.get("aria-label", "")) < 20:
                found.append(f"{name}: a drawing without a text")
        used = [e["id"] for e in article.find_all(id=True)]
        twice = {i for i in used if used.count(i) > 1}
        if twice:
            found.append(f"{name}: ids used twice: {sorted(twice)}")
        if "CC BY 4.0" not in soup.find("footer", "bd-footer-content").text:
            found.append(f"{name}: no licence")
        if any("#|" in cell.text for cell in article.select(".cell_input")):
            found.append(f"{name}: a directive of the exporter shows")
        source = ROOT / f"{name}.ipynb"
        text = source.read_text("utf-8") if source.exists() else ""
        if match := re.search(r"#\| default_exp (\w+)", text):
            module = match[1]
            badges = article.select(f'.export-badge a[href*="emoformer.{module}"]')
            if not badges:
                found.append(f"{name}: no badge links to emoformer.{module}")
    return found


def public_names(package):
    """Every name in `__all__` of every module, without importing it."""
    for path in sorted(package.glob("[a-z]*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            if isinstance(node, ast.Assign) and (
                    getattr(node.targets[0], "id", "") == "__all__"):
                for name in ast.literal_eval(node.value):
                    yield f"emoformer.{path.stem}.{name}"


def missing_names(html, package):
    """List the public names that the API page does not explain."""
    known = {e["id"] for e in soup_of(html / "book/api.html").find_all(id=True)}
    return [name for name in public_names(package) if name not in known]


def test_nothing_is_fetched_from_another_host():
    assert external(HTML) == []


def test_every_local_link_leads_somewhere():
    assert dead_links(HTML) == []


def test_every_page_has_what_it_needs():
    assert incomplete(HTML, listed()) == []


def test_every_chapter_is_in_the_table_of_contents():
    chapters = {f"chapters/{p.stem}" for p in ROOT.glob("chapters/[0-9]*.ipynb")}
    assert chapters <= set(listed())


def test_the_api_page_has_every_public_name():
    assert len(list(public_names(ROOT / "emoformer"))) > 20
    assert missing_names(HTML, ROOT / "emoformer") == []


def test_the_book_was_built_from_these_sources():
    stale = []
    for name in listed():
        source = next(ROOT.glob(f"{name}.*"))
        copy = HTML / "_sources" / source.relative_to(ROOT)
        if not copy.exists() or copy.read_bytes() != source.read_bytes():
            stale.append(name)
    assert stale == [], "run: make clean book"


# Each check is shown a page with one fault.

FAULTS = [
    '<script src="https://cdn.example.org/x.js"></script>',
    '<link rel="stylesheet" href="//cdn.example.org/x.css">',
    '<link rel="preload" as="font" href="https://cdn.example.org/x.woff2">',
    '<img src="https://example.org/x.png" alt="a picture from elsewhere">',
    '<img srcset="a.png 1x, https://example.org/x.png 2x" alt="the same">',
    '<iframe src="https://example.org/"></iframe>',
    '<style>@font-face { src: url("https://example.org/x.woff2") }</style>',
    '<style>@import "https://example.org/x.css";</style>',
    '<p style="background: url(//example.org/x.png)">x</p>',
    '<script type="module">import x from "https://example.org/x.js"</script>',
    '<script>const x = import("https://example.org/x.js")</script>',
    '<meta http-equiv="refresh" content="0; url=https://example.org/">',
]


@pytest.fixture
def small(tmp_path):
    """A book of one page without faults."""
    (tmp_path / "ok.css").write_text("p { color: red }")
    page = tmp_path / "page.html"
    page.write_text(
        '<link rel="stylesheet" href="ok.css"><h1 id="top">x</h1>'
        '<a href="#top">up</a><a href="https://example.org/">away</a>')
    return page


def test_a_page_without_faults_passes(small):
    assert external(small.parent) == []
    assert dead_links(small.parent) == []


@pytest.mark.parametrize("fault", FAULTS)
def test_notices_what_is_fetched(small, fault):
    small.write_text(small.read_text() + fault)
    assert len(external(small.parent)) == 1


def test_notices_what_a_style_sheet_fetches(small):
    (small.parent / "ok.css").write_text('a { background: url("http://x.org/a") }')
    assert len(external(small.parent)) == 1


@pytest.mark.parametrize("fault", [
    '<a href="gone.html">x</a>', '<a href="#gone">x</a>',
    '<a href="page.html#gone">x</a>', '<img src="gone.png">',
])
def test_notices_a_dead_link(small, fault):
    small.write_text(small.read_text() + fault)
    assert len(dead_links(small.parent)) == 1


@pytest.mark.parametrize(("old", "new", "said"), [
    ('lang="en"', "", "no language"),
    ("CC BY 4.0", "", "no licence"),
    ("</h1>", "</h1><h1>again</h1>", "2 main headings"),
    ('class="export-badge"', "", "no badge"),
    ("<span></span>", "#| export\n", "a directive"),
    ('aria-label="', 'aria-lab="', "a drawing without a text"),
    (' alt="', ' alt="" x="', "picture without a text"),
    ("</h1>", '</h1><i id="main-content"></i><i id="main-content"></i>', "twice"),
])
def test_notices_an_incomplete_page(tmp_path, old, new, said):
    name = "chapters/05_feedforward"
    page = tmp_path / f"{name}.html"
    page.parent.mkdir()
    shutil.copy(HTML / f"{name}.html", page)
    assert incomplete(tmp_path, [name]) == []
    assert old in page.read_text("utf-8")
    page.write_text(page.read_text("utf-8").replace(old, new), "utf-8")
    assert any(said in line for line in incomplete(tmp_path, [name]))
    page.unlink()
    assert incomplete(tmp_path, [name]) == [f"{name}: not built"]


def test_notices_a_name_without_explanation(tmp_path):
    (tmp_path / "feedforward.py").write_text('__all__ = ["relu", "swish"]')
    assert missing_names(HTML, tmp_path) == ["emoformer.feedforward.swish"]
