"""`ryot-deploy generate`: text from a bundle, by the same program that a bundle's own `run.py` is."""

from __future__ import annotations
