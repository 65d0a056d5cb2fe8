"""Build entry point; the metadata lies in pyproject.toml."""

from setuptools import setup

setup()
