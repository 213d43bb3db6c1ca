"""The files here are run by tests, as scripts; importing them to look for doctests would train."""

collect_ignore_glob = ["*.py"]
