"""The project is described in pyproject.toml. Install it with: pip install --no-build-isolation -e ."""

from setuptools import setup

setup()
