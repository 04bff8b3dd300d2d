"""Packaging of s4nb. Everything is read from settings.ini, so that nbdev and pip see the same facts; torch is not imported."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])  # a colon is part of an entry point, not a delimiter
config.read(root / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]

suffix = "_requirements"  # each NAME_requirements line is the extra NAME
extras = {key.removesuffix(suffix): value.split() for key, value in settings.items() if key.endswith(suffix)}

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(root / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    license="Apache-2.0",
    keywords=settings["keywords"],
    packages=find_packages(include=["s4nb", "s4nb.*"]),
    python_requires=f">={settings['min_python']}",
    install_requires=settings["requirements"].split(),
    extras_require=extras,
    entry_points={
        "console_scripts": [settings["console_scripts"]],
        "nbdev": ["s4nb=s4nb._modidx:d"],
    },
    zip_safe=False,
)
