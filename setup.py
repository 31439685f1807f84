"""Packages: fastdsm from fastdsm/, and fastdsm.kernels from kernels/ beside it."""

from setuptools import find_packages, setup

setup(
    packages=[*find_packages(include=["fastdsm", "fastdsm.*"], exclude=["fastdsm.kernels"]), "fastdsm.kernels"],
    package_dir={"fastdsm.kernels": "kernels"},
    package_data={"fastdsm": ["py.typed", "data/*"]},
)
