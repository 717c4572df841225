"""Ships the top-level recipes/ inside the wheel as arra/recipes; all else is declared in pyproject.toml.

Mapping the folder through `package_dir` would turn the editable install into an import hook, which hides `arra` from
the shape checks of jaxtyping; so the files are copied when a wheel is built, and a clone reads them where they lie.
"""

from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py


class BuildWithRecipes(build_py):
    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        target = Path(self.build_lib, "arra", "recipes")
        self.mkpath(str(target))
        for source in sorted(Path("recipes").glob("*.*")):
            self.copy_file(str(source), str(target / source.name))


setup(cmdclass={"build_py": BuildWithRecipes})
