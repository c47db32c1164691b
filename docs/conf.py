"""The pages in this directory and the docstrings of the package, by Sphinx: ``sphinx-build -W -n docs build/docs``."""

import apts_mpi

project = "apts_mpi"
author = "The apts_mpi developers"
version = release = apts_mpi.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.mathjax", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"apts_mpi {release}"

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3

# `name` in a docstring is a reference; -n has those reported that lead nowhere. Types of parameters are in words.
default_role = "py:obj"
nitpick_ignore_regex = [("py:class", r"(?!apts_mpi\.).*")]
autodoc_member_order = "bysource"
autodoc_typehints = "none"
napoleon_google_docstring = False
napoleon_use_rtype = False
