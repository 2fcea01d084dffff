"""What pyproject.toml cannot say: data/ is a folder of the repository and ktlab/data in the wheel.

Everything else is in pyproject.toml.
"""

from setuptools import find_namespace_packages, find_packages, setup

DATA = ["ktlab.data"] + [
    f"ktlab.data.{name}" for name in find_namespace_packages("data", exclude=["recipe", "recipe.*"])
]
SUFFIXES = ("gguf", "txt", "md", "json", "csv", "yaml", "png", "svg")
DATA_FILES = [f"*.{suffix}" for suffix in SUFFIXES]

setup(
    packages=find_packages(include=["ktlab", "ktlab.*"]) + DATA,
    package_data={"ktlab": ["py.typed", "**/*.css", "**/*.js", "**/*.yaml"]}
    | {name: DATA_FILES for name in DATA},
)
