"""How Sphinx builds these pages: `just docs`."""

from proteus_cache import __version__

project = "proteus-cache"
author = "the authors of proteus-cache"
release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3  # links such as training.md#run

default_role = "code"  # `names` in docstrings
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = f"proteus-cache {release}"
