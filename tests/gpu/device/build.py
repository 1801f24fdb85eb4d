"""The package: that of this tree, where Python finds it, else built by pip without a network."""

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from device.results import append, scratch

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("requirements", "package")
SECONDS = 120


def build() -> bool:
    """Build and install the package into $SCRATCH/site, if need be; return whether it is there."""
    wheel = os.environ.get("WHEEL")
    if not wheel and _is_installed():
        append("build", "requirements", "ok", how="nothing is built: the package of this tree is installed")
        append("build", "package", "ok", how="installed before")
        return True
    if not wheel:
        missing = missing_requirements()
        if missing:
            why = f"building needs {' and '.join(missing)}; or build a wheel elsewhere (make wheel) and set WHEEL to it"
            append("build", "requirements", "failed", why=why)
            append("build", "package", "failed", why="not tried")
            print(f"build: {why}", flush=True)
            return False
        append("build", "requirements", "ok")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    command += ["--upgrade", "--target", str(scratch() / "site"), wheel or str(ROOT)]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {"PATH": _path()}, capture_output=True, text=True, timeout=SECONDS
        )
        why = done.stderr.strip()[-2000:] if done.returncode else ""
    except subprocess.TimeoutExpired:
        why = f"took longer than {SECONDS} s"
    if why:
        append("build", "package", "failed", why=why)
        print(f"build: {why}", flush=True)
        return False
    append("build", "package", "ok", how=f"from {wheel}" if wheel else "built")
    return True


def missing_requirements() -> list[str]:
    """Name what pyproject.toml asks of a build, and a compiler, as far as they are not here."""
    missing = []
    for name, least in (("setuptools", (77,)), ("pybind11", (2, 13))):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "none"
        numbers = tuple(int(number) for number in version.split(".")[: len(least)] if number.isdecimal())
        if numbers < least:
            missing.append(f"{name} >= {'.'.join(map(str, least))} ({version} is here)")
    compiler = os.environ.get("CXX") or "c++"
    for program in ("cmake", "ninja", compiler):
        if shutil.which(program, path=_path()) is None:
            missing.append(program if program != compiler else f"a C++ compiler ({compiler})")
    return missing


def _path() -> str:
    # cmake and ninja come as packages of Python too, whose programs lie beside it
    return f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"


def _is_installed() -> bool:
    package = importlib.util.find_spec("mgt_kernels")
    if package is None or package.origin is None or importlib.util.find_spec("mgt_benchmarks") is None:
        return False
    path = Path(package.origin).resolve().parent
    # another tree's would be tested in the place of this one's
    return path == ROOT / "mgt_kernels" and (path / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}").exists()
