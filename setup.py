"""Lets tools that know only setup.py build the package; its metadata is in pyproject.toml."""

import setuptools

setuptools.setup()
