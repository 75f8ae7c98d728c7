"""The documentation site: `make docs`."""

import specauf

project = "specauf"
author = "the specauf authors"
release = version = specauf.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"specauf {version}"
exclude_patterns = ["_build"]
myst_heading_anchors = 3
autodoc_typehints = "description"  # shapes are too long for signatures
autodoc_member_order = "bysource"
napoleon_google_docstring = True
suppress_warnings = ["myst.xref_missing"]  # links to files outside docs/; tests/docs/test_links.py checks all links
