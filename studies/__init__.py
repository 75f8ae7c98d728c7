"""Experiments on a real target: what each objective brings. One command: `python -m studies reduced`."""
