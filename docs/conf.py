"""The pages in this directory and the docstrings of the package, by Sphinx: ``sphinx-build -W -n docs build/docs``."""

import apts_mpi

project = "apts_mpi"
author = "The apts_mpi developers"
version = release = apts_mpi.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.mathjax",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
    "sphinx-mathjax-offline",
]
# The second is what package indexes show.
exclude_patterns = ["_static", "description.md"]
html_theme = "furo"
html_title = f"apts_mpi {release}"
html_static_path = ["_static"]
html_css_files = ["pages.css"]

myst_enable_extensions = ["colon_fence", "dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a reference; -n has those reported that lead nowhere. Types of parameters are in words,
# those of signatures come from the annotations.
default_role = "py:obj"
nitpick_ignore_regex = [
    ("py:class", r"(?!apts_mpi\.).*"),
    # Of annotations: names of other packages, and of files whose classes have no entry of their own.
    ("py:class", r"apts_mpi\.\w+\.\w+\..*|apts_mpi\.result\..*"),
    ("py:obj", r"typing\.Literal.*"),
]
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
maximum_signature_line_length = 88
napoleon_google_docstring = False
napoleon_use_rtype = False
