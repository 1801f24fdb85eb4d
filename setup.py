"""Runs CMake for the extension; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        # a cache of an earlier build names tools of a build environment that pip has since removed
        (build / "CMakeCache.txt").unlink(missing_ok=True)
        configure = [
            "cmake", str(ROOT), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            # a wheel holds no links: one file, of the name that programs look for
            "-DCMAKE_PLATFORM_NO_VERSIONED_SONAME=ON", "-DCMAKE_INSTALL_LIBDIR=lib",
        ]  # fmt: skip
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)
        # the C library, which programs find through mgt_kernels.include_dir() and library_path()
        subprocess.run(["cmake", "--install", ".", "--prefix", target], cwd=build, check=True)

    def copy_extensions_to_source(self) -> None:
        """Of an editable installation, which has the C library beside the sources too."""
        super().copy_extensions_to_source()
        package = Path(self.get_finalized_command("build_py").get_package_dir("mgt_kernels"))
        for folder in ("include", "lib"):
            shutil.copytree(Path(self.build_lib) / "mgt_kernels" / folder, package / folder, dirs_exist_ok=True)


setup(ext_modules=[Extension("mgt_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
