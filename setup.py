"""Installs radit_jax; the metadata and the tool settings are in pyproject.toml."""

from setuptools import setup

setup()
