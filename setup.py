"""Packages: fastdsm, and fastdsm.kernels with its families from kernels/ beside it."""

from setuptools import find_packages, setup

families = [f"fastdsm.kernels.{family}" for family in find_packages("kernels")]

setup(
    packages=[
        *find_packages(include=["fastdsm", "fastdsm.*"], exclude=["fastdsm.kernels*"]),
        "fastdsm.data",
        "fastdsm.kernels",
        *families,
    ],
    package_dir={"fastdsm.kernels": "kernels"},
    package_data={"fastdsm": ["py.typed"], "fastdsm.data": ["*"]},
)
