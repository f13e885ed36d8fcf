"""Measurements, and the figures of docs/."""

import cadd_min  # noqa: F401  # before torch is loaded: see there
