"""Packaging of s4nb. Everything is read from settings.ini, so that nbdev and pip see the same facts; torch is not imported.

A wheel holds the sources of the native kernels, and the libraries that this machine could compile from them (S4NB_BUILD).
Where torch is not to be seen, as in pip's isolated builds, it holds the sources alone: `s4nb build` compiles them later."""
import importlib.util
import shutil
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

try: from setuptools.command.bdist_wheel import bdist_wheel
except ImportError: from wheel.bdist_wheel import bdist_wheel    # setuptools before 70

root = Path(__file__).resolve().parent
config = ConfigParser(delimiters=["="])  # a colon is part of an entry point, not a delimiter
config.read(root / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]


def compile_into(package):
    "Compiles the native kernels into the folder of the package; a failure is a line, never an error."
    spec = importlib.util.spec_from_file_location("s4nb_build", root / "s4nb" / "build.py")
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    for old in package.glob("*.so"): old.unlink()    # of an earlier run in the same build folder
    told = {}
    for kind, said in build.build(build.asked(), package, package / "_sources").items():
        told.setdefault(said, []).append(build.NAMES[kind])
    for said, names in told.items():
        print(f"s4nb: {' and '.join(names)} kernels: {said}", end="\n" if said == "ok" else "; later: s4nb build\n")
    for kind in build.LIBRARIES.values():    # what a wheel has no use for
        for rest in package.glob(f"{kind}.[!s]*"): rest.unlink()


class BuildPackage(build_py):
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return    # there `make kernels` compiles
        package = Path(self.build_lib) / "s4nb"
        shutil.rmtree(package / "_sources", ignore_errors=True)
        shutil.copytree(root / "extensions" / "structured_kernels", package / "_sources")
        compile_into(package)


class Wheel(bdist_wheel):
    def run(self):
        self.run_command("build")    # first of all: the tag tells what has come out
        self.root_is_pure = not list(Path(self.get_finalized_command("build_py").build_lib, "s4nb").glob("*.so"))
        super().run()

    def get_tag(self):
        return "py3", "none", "any" if self.root_is_pure else super().get_tag()[2]


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
    cmdclass={"build_py": BuildPackage, "bdist_wheel": Wheel},
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
