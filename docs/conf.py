"""Configuration of the documentation: `make docs` builds it, with warnings as errors."""

from __future__ import annotations

import importlib
import operator
import re

from sphinx.util import logging

import ctorch
from ctorch._version import __version__

project = "ctorch"
copyright = "the ctorch authors"
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
myst_enable_extensions = ["amsmath", "colon_fence", "deflist", "dollarmath", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
napoleon_numpy_docstring = False
python_maximum_signature_line_length = 80

# Documented examples are run: `make docs` has a doctest pass. Blocks in Markdown are ```{doctest}.
doctest_global_setup = "import torch, ctorch\ntorch.manual_seed(0)"
doctest_test_doctest_blocks = "default"

html_theme = "furo"
html_title = f"ctorch {version}"
html_theme_options = {"navigation_with_keys": True}
html_show_sourcelink = False


def _plain_text(app, what, name, obj, options, lines):  # type: ignore[no-untyped-def]
    """Take ``[T, *shape]`` and ``|y|`` in docstrings as they are read, not as markup."""
    literal: int | None = None  # indentation above which a literal block goes on
    for i, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if literal is not None and line.strip() and indent <= literal:
            literal = None
        if literal is None and not line.lstrip().startswith((">>>", "...")):
            parts = re.split(r"(``.+?``|\*\*\w[^*]*\w\*\*|:math:`.+?`)", line)
            parts[::2] = [re.sub(r"([*|])", r"\\\1", part) for part in parts[::2]]
            lines[i] = "".join(parts)
            literal = indent if line.endswith("::") else None


PARTS = ("", ".ode", ".autodiff", ".nn", ".training", ".testing", ".codegen", ".compat.torchdiffeq")


def _complete(app, env):  # type: ignore[no-untyped-def]
    """Warn of public names that the reference leaves out."""
    kinds = ("class", "data", "exception", "function", "module")
    # first of all, as a build that reads few pages anew imports none of them
    modules = [importlib.import_module(f"ctorch{part}") for part in PARTS]
    documented = [
        operator.attrgetter(name.removeprefix("ctorch."))(ctorch) if name != "ctorch" else ctorch
        for name, entry in env.get_domain("py").objects.items()
        if entry.objtype in kinds and not entry.aliased
    ]
    for module in modules:
        for name in module.__all__:
            if not any(getattr(module, name) is value for value in documented):
                text = "%s.%s is public, but has no place in docs/api"
                logging.getLogger(__name__).warning(text, module.__name__, name)


def setup(app):  # type: ignore[no-untyped-def]
    """Docstrings are read before napoleon does so (priority 500)."""
    app.connect("autodoc-process-docstring", _plain_text, priority=400)
    app.connect("env-check-consistency", _complete)
