"""What pyproject.toml cannot say: data/ is a folder of the repository and ktlab/data in the wheel.

Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, find_packages, setup

DATA = ["ktlab.data"] + [
    f"ktlab.data.{name}" for name in find_namespace_packages("data", exclude=["recipe", "recipe.*"])
]

setup(packages=find_packages(include=["ktlab", "ktlab.*"]) + DATA)
