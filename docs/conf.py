"""How Sphinx builds the site: ``nox -s docs``."""

from __future__ import annotations

import inspect
import json
import pathlib
import sys
import urllib.error
import urllib.request
from typing import Any

from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.util import logging

sys.path[:0] = [str(pathlib.Path(__file__).parent), str(pathlib.Path(__file__).parents[1])]

import recblocks  # noqa: E402
from benchmarks import draw  # noqa: E402

project = "recblocks"
author = "The recblocks developers"
copyright = "2026, the recblocks developers. Apache-2.0"  # noqa: A001 (Sphinx's name)
release = recblocks.__version__

extensions = [
    "benchmark_tables",
    "matplotlib.sphinxext.plot_directive",
    "myst_parser",
    "sphinx-mathjax-offline",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx.ext.intersphinx",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx_gallery.gen_gallery",
]
exclude_patterns = ["_build", "gallery"]
html_theme = "furo"
html_title = "recblocks"
html_show_sphinx = False
html_favicon = "_static/favicon.svg"
html_static_path = ["_static"]
html_css_files = ["recblocks.css"]
html_js_files = ["scrolling.js"]

default_role = "code"
add_module_names = False
autodoc_member_order = "bysource"
autosummary_generate = False  # the pages are written, and this links to them
autodoc_typehints = "none"  # shapes and units stand in the text
napoleon_use_ivar = True
napoleon_custom_sections = [("Source", "notes_style")]
myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True
copybutton_exclude = ".linenos, .go"  # nor what an example prints

plot_formats = ["svg"]
plot_html_show_formats = False
plot_html_show_source_link = False
plot_include_source = True
plot_rcparams = {
    "axes.spines.right": False,
    "axes.spines.top": False,
    "figure.constrained_layout.use": True,
    "figure.figsize": (7.2, 3.0),
    "font.size": 9,
    "svg.hashsalt": "recblocks",
}
plot_apply_rcparams = True

doctest_global_setup = "import torch\nfrom recblocks import *"
sphinx_gallery_conf = {
    "abort_on_example_error": True,
    "download_all_examples": False,
    "examples_dirs": "gallery",
    "gallery_dirs": "generated/gallery",
    "show_signature": False,
    "write_computation_times": False,
}


def answers(url: str) -> bool:
    """Whether a site can be linked to from here: without a network its names stay plain, which is no warning."""
    try:
        urllib.request.urlopen(f"{url}/objects.inv", timeout=5).close()
    except (urllib.error.URLError, TimeoutError):
        return False
    return True


linked = {"python": "https://docs.python.org/3", "torch": "https://docs.pytorch.org/docs/stable"}
intersphinx_mapping = {name: (url, None) for name, url in linked.items() if answers(url)}


def every_public_name_has_a_page(app: Sphinx, _: object) -> None:
    """Warn, and so fail, for a name of `recblocks.__all__` that no page documents."""
    documented = set(app.env.get_domain("py").objects)  # type: ignore[attr-defined]
    for name in recblocks.__all__:
        if f"recblocks.{name}" not in documented:
            logging.getLogger(__name__).warning("recblocks.%s is public and stands on no page", name)


def without_signatures_of_tuples(_app: Sphinx, what: str, _name: str, given: Any, *_: Any) -> tuple[str, None] | None:
    """A NamedTuple is made by the library, not by its reader: its fields are what counts."""
    if what == "class" and inspect.isclass(given) and issubclass(given, tuple):
        return "", None
    return None


def write_benchmark_pages(app: Sphinx, _: Config) -> None:
    """Write a page of tables and pictures for each run that is on record."""
    for path in sorted((app.srcdir.parent / "benchmarks" / "results").glob("*.json")):
        draw.write_page(json.loads(path.read_text()), app.srcdir / "generated" / "benchmarks" / path.stem)


def headings_with_levels(_app: Sphinx, _page: str, _template: str, context: dict[str, Any], _doctree: object) -> None:
    """Sphinx calls the caption of a list of pages a heading, without the level that screen readers need."""
    for part in {"body", "furo_navigation_tree"} & context.keys():
        context[part] = context[part].replace('role="heading">', 'role="heading" aria-level="2">')


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.connect("config-inited", write_benchmark_pages)
    app.connect("html-page-context", headings_with_levels, priority=900)  # after the theme has made its tree
    app.connect("env-check-consistency", every_public_name_has_a_page)
    app.connect("autodoc-process-signature", without_signatures_of_tuples)
