"""The site builds without warnings, its reference contains every public name, and its pages fit narrow and wide screens."""

import functools
import http.server
import importlib
import pkgutil
import re
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import yaml

import kspec_guidance

ROOT = Path(__file__).parents[2]
INTERNAL = {"__main__", "cli", "integrations", "utils"}
DIRECTIVES = [
    name
    for page in sorted((ROOT / "docs" / "reference").glob("*.md"))
    for name in re.findall(r"^::: (\S+)$", page.read_text(), re.MULTILINE)
]


def inventory(site):
    """The names that the site documents, from its Sphinx inventory."""
    compressed = (site / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(compressed).decode().splitlines()}


def public_names(modules):
    """Module, name and value of every entry in the ``__all__`` of the modules."""
    for module in map(importlib.import_module, modules):
        for name in getattr(module, "__all__", []):
            yield module.__name__, name, getattr(module, name)


def is_own(value):
    return callable(value) and getattr(value, "__module__", "").startswith("kspec_guidance")


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """Folder of the site, built without a warning."""
    pytest.importorskip("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)], cwd=ROOT,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert not [line for line in done.stderr.splitlines() if line.startswith("WARNING")]
    return folder


@pytest.fixture(scope="module")
def server(site):
    """Address of the site, served on this machine."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path.endswith("search_index.json"):  # every page would make its index of 2 MB anew
                self.send_error(404)
            else:
                super().do_GET()

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.slow
def test_site_documents_every_public_name(site):
    documented = inventory(site)
    modules = [name for name in DIRECTIVES if isinstance(pkgutil.resolve_name(name), ModuleType)]
    missing = [
        f"{module}.{name}"
        for module, name, value in public_names(["kspec_guidance", *modules])
        if is_own(value) and not {f"{module}.{name}", f"{value.__module__}.{value.__qualname__}"} & documented
    ]
    assert not missing


# what a reader could not see: what is wider than the window, outside of a box that scrolls, and code that its box cuts off
HIDDEN = """() => {
    const width = document.documentElement.clientWidth, right = e => e.getBoundingClientRect().right - 1, hidden = [];
    const scrolls = e => e && (getComputedStyle(e).overflowX == "auto" && right(e) <= width || scrolls(e.parentElement));
    if (document.documentElement.scrollWidth > width) hidden.push("the page");
    for (const e of document.querySelectorAll(".md-content__inner *"))
        if (right(e) > width && !scrolls(e)) hidden.push(e.outerHTML.slice(0, 80));
    for (const e of document.querySelectorAll(".md-content__inner :is(pre, pre code)"))
        if (e.offsetParent && e.scrollWidth > e.clientWidth + 1) hidden.push(e.textContent.slice(0, 80));
    return hidden;
}"""


@pytest.mark.slow
def test_no_page_scrolls_sideways_and_no_code_is_cut_off_at_1280_and_390_pixels(site, server, browser):
    hidden = {}
    with browser.new_context() as context:
        tab = context.new_page()
        for page in sorted(p.parent.relative_to(site).as_posix() for p in site.rglob("index.html")):
            for width in (1280, 390):
                tab.set_viewport_size({"width": width, "height": 900})
                if width == 1280:  # loaded wide and then narrowed: the other way round the header moves for a while
                    tab.goto(f"{server}/{page}/", wait_until="load")
                tab.evaluate("document.fonts.ready")
                if found := tab.evaluate(HIDDEN):
                    hidden[page, width] = found[:5]
    assert not hidden


@pytest.mark.slow
def test_the_site_follows_the_colour_scheme_and_asks_no_other_host(server, browser):
    brightness = {}
    for scheme in ("light", "dark"):
        with browser.new_context(color_scheme=scheme) as context:
            tab, hosts = context.new_page(), []
            tab.on("request", lambda request, hosts=hosts: hosts.append(request.url))
            tab.goto(server, wait_until="networkidle")
            assert all(url.startswith((server, "data:", "blob:")) for url in hosts)
            colour = tab.evaluate("getComputedStyle(document.body).backgroundColor")
            brightness[scheme] = sum(map(int, re.findall(r"\d+", colour)[:3]))
    assert brightness["dark"] < 150 < 600 < brightness["light"]


def test_every_page_begins_with_a_sentence_on_its_purpose():
    for page in (ROOT / "docs").rglob("*.md"):
        title, blank, first, *_ = page.read_text().splitlines()
        assert (title[:2], blank) == ("# ", ""), page
        assert re.match(r"[\w`]", first), page


def test_lines_of_code_fit_the_column_of_the_site():
    for page in (ROOT / "docs").rglob("*.md"):
        for block in re.findall(r"```\w+\n(.*?)```", page.read_text(), re.DOTALL):
            assert max(map(len, block.splitlines())) <= 104, page


def test_the_navigation_has_every_page_in_groups_of_one_level():
    text = (ROOT / "mkdocs.yml").read_text()
    groups = {name: pages for entry in yaml.safe_load(text[text.index("nav:") :])["nav"] for name, pages in entry.items()}
    assert list(groups) == ["Get started", "How-to", "Explanation", "Reference", "Project"]
    listed = [path for pages in groups.values() for page in pages for path in page.values()]
    assert all(isinstance(path, str) for path in listed)
    assert sorted(listed) == sorted(p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md"))


@pytest.fixture
def hooks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    return importlib.import_module("hooks")


@pytest.mark.parametrize(
    "origin",
    ["https://host.org/a/b.git", "git@host.org:a/b.git", "ssh://git@host.org:22/a/b", "https://user:secret@host.org/a/b"],
)
def test_the_site_links_to_the_repository_that_it_was_cloned_from(hooks, origin):
    assert hooks.web_address(origin) == "https://host.org/a/b"


@pytest.mark.parametrize("origin", ["", "/srv/a/b", "../b.git", "file:///srv/a/b"])
def test_a_clone_of_a_folder_has_no_repository_to_link_to(hooks, origin):
    assert hooks.web_address(origin) is None


def test_links_out_of_the_docs_lead_to_the_repository_or_name_the_file(hooks):
    page = SimpleNamespace(file=SimpleNamespace(src_path="how-to/page.md"))
    text = "[code](../../kspec_guidance/cli/app.py#L3), [page](../gpu.md)"
    linked = hooks.on_page_markdown(text, page, SimpleNamespace(repo_url="https://host.org/a/b"))
    assert linked == "[code](https://host.org/a/b/blob/main/kspec_guidance/cli/app.py#L3), [page](../gpu.md)"
    named = hooks.on_page_markdown(text, page, SimpleNamespace(repo_url=None))
    assert named == "code (`kspec_guidance/cli/app.py`), [page](../gpu.md)"


def test_names_in_docstrings_become_links_and_short_code_stays_on_one_line(hooks):
    html = hooks.on_page_content("<p>see :class:<code>~kspec_guidance.SPARKE</code>, or::</p> <code>--dtype</code>")
    name = '<autoref identifier="kspec_guidance.SPARKE" optional><code class="kspec-word">SPARKE</code></autoref>'
    assert html == f'<p>see {name}, or:</p> <code class="kspec-word">--dtype</code>'


def test_every_public_package_is_in_the_reference():
    packages = {info.name for info in pkgutil.iter_modules(kspec_guidance.__path__)} - INTERNAL
    assert packages == {name.split(".")[1] for name in DIRECTIVES}


def test_every_public_name_exists_and_has_a_docstring():
    modules = (
        info.name
        for info in pkgutil.walk_packages(kspec_guidance.__path__, "kspec_guidance.")
        if not info.name.endswith("__main__")
    )
    undocumented = [
        f"{module}.{name}"
        for module, name, value in public_names(modules)
        if is_own(value) and not (value.__doc__ or "").strip()
    ]
    assert not undocumented


@pytest.mark.slow
def test_mathematics_imports_no_diffusers():
    code = (
        "import sys, kspec_guidance.kernels, kspec_guidance.features, kspec_guidance.functional, kspec_guidance.metrics, "
        "kspec_guidance.statistics, kspec_guidance.objectives, kspec_guidance.memory, kspec_guidance.testing; "
        "print([m for m in ('diffusers', 'open_clip') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")
