"""A pytest plugin: ``import torchdiffeq`` gives ctorch, as a user who migrates would have it."""

import importlib
import sys

sys.modules["torchdiffeq"] = importlib.import_module("ctorch.compat.torchdiffeq")


def pytest_report_header() -> str:
    return f"torchdiffeq is {sys.modules['torchdiffeq'].__file__}"
