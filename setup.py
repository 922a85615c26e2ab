"""Builds the native library into the package with CMake; the wheel is one for all Pythons of its platform."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from setuptools import Command, Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build import build
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
SOURCE = ROOT / "runtime" / "native"
SOURCES = ("*.cpp", "*.h", "*.inc", "*.in", "*.map", "*.cmake", "CMakeLists.txt")


class build_native(Command):
    """CMake's build of `runtime/native`: into the package, for an editable install that of the checkout."""

    description = "build the native library"
    user_options = []  # noqa: RUF012

    def initialize_options(self) -> None:
        self.build_lib: str | None = None
        self.editable_mode = False

    def finalize_options(self) -> None:
        self.set_undefined_options("build_py", ("build_lib", "build_lib"))

    def run(self) -> None:
        tool = shutil.which("cmake")
        if tool is None:
            raise SystemExit("building framestep needs cmake: pip install cmake ninja")
        target = SOURCE if self.editable_mode else Path(str(self.build_lib)) / "framestep" / "runtime" / "native"
        folder = ROOT / "build" / "native"
        generator = ["-G", "Ninja"] if shutil.which("ninja") else []
        # another cmake's folder, of an isolated build that is gone, is of no use
        configure = [tool, "--fresh", "-S", str(SOURCE), "-B", str(folder), *generator, "-DCMAKE_BUILD_TYPE=Release"]
        subprocess.run(configure, check=True)
        subprocess.run([tool, "--build", str(folder), "--parallel"], check=True)
        install = [
            tool,
            "--install",
            str(folder),
            "--component",
            "python",
            "--strip",
            "--prefix",
            str(target.resolve()),
        ]
        subprocess.run(install, check=True)

    def get_outputs(self) -> list[str]:
        return [str(Path(str(self.build_lib)) / "framestep" / "runtime" / "native" / "libframestep.so")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def get_source_files(self) -> list[str]:
        files = [path for pattern in SOURCES for path in SOURCE.glob(pattern)]
        return [str(path.relative_to(ROOT)) for path in (*files, ROOT / "include" / "framestep.h")]


class build_modules(build_py):
    """The package's folder is the checkout's, so this file lies in it."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if found[1] != "setup"]


class wheel_for_every_python(bdist_wheel):
    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class NativeDistribution(Distribution):
    def has_ext_modules(self) -> bool:
        return True


build.sub_commands = [*build.sub_commands, ("build_native", None)]
setup(
    distclass=NativeDistribution,
    cmdclass={"build_native": build_native, "build_py": build_modules, "bdist_wheel": wheel_for_every_python},
)
