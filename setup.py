"""Builds the extension modules: `_cpu` always, `_cuda` when a CUDA toolkit (12.1 or newer) is found.

    FUSED_SCHED_CUDA=auto|1|0        build _cuda when a toolkit is found | fail without it | never
    FUSED_SCHED_CUDA_ARCHS="80 90"   GPU architectures (default: 75 80 90 100 120)
    FUSED_SCHED_REQUIRE_CPU=1        fail when _cpu cannot be built, instead of installing pure Python
    CXX, CUDA_HOME, MAX_JOBS         as everywhere

Neither module sees a torch header. A module that cannot be built leaves a package that works without it;
`python -m fused_sched` tells why, from the `_build_info.json` written here.
"""

import filecmp
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from contextlib import contextmanager
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # PEP 517 frontends do not put it there

from build_tools import ninja_file, toolchain  # noqa: E402

MODULES = ("_cpu", "_cuda")
# One folder per Python and platform, the same for every kind of install from this checkout.
FOLDER = Path("build") / f"{sysconfig.get_config_var('SOABI') or sys.implementation.cache_tag}"


class Build(build):
    """Starts from an empty build/lib, where files of an earlier version would end up in the wheel."""

    def run(self):
        shutil.rmtree(Path(self.build_lib) / "fused_sched", ignore_errors=True)
        super().run()


class BuildModules(build_ext):
    """Runs ninja, puts the modules into the package and records what was built and why not the rest."""

    def run(self):
        (ROOT / FOLDER).mkdir(parents=True, exist_ok=True)
        with locked(ROOT / FOLDER / "lock"):
            info, reasons = compile_modules()
            check_required(reasons)
            for name in MODULES:
                target = Path(self.get_ext_fullpath(f"fused_sched.{name}"))
                if name in reasons:
                    say(f"{name} was not built: {reasons[name]}")
                    target.unlink(missing_ok=True)
                else:
                    replace_file(ROOT / FOLDER / f"{name}.so", target)
        info["version"] = self.distribution.get_version()
        self.info_path().write_text(json.dumps(info, indent=2) + "\n")

    def info_path(self):
        return Path(self.get_ext_fullpath("fused_sched._cpu")).with_name("_build_info.json")

    def get_outputs(self):
        modules = [Path(self.get_ext_fullpath(f"fused_sched.{name}")) for name in MODULES]
        return [str(path) for path in [*modules, self.info_path()] if path.exists()]

    def get_output_mapping(self):
        if not self.inplace:
            return {}
        package = Path(self.build_lib) / "fused_sched"
        return {str(package / Path(path).name): path for path in self.get_outputs()}


def compile_modules():
    """Builds what can be built. Returns the build's record, and why modules are missing: {name: reason}."""
    mode = os.environ.get("FUSED_SCHED_CUDA", "auto")
    if mode not in ("auto", "1", "0"):
        sys.exit(f"fused_sched: FUSED_SCHED_CUDA must be auto, 1 or 0, got {mode!r}")
    reasons = {}
    compiler = cuda = None
    try:
        ninja = toolchain.find_ninja()
        compiler = toolchain.find_cpp_compiler()
    except toolchain.Missing as reason:
        reasons = dict.fromkeys(MODULES, f"{reason}")
    try:
        cuda = toolchain.find_cuda_toolkit()
        if not list(ROOT.glob("csrc/cuda/*.cu")):
            cuda, reasons["_cuda"] = None, "there are no CUDA sources in csrc/cuda"
    except toolchain.Missing as reason:
        reasons["_cuda"] = f"{reason}"

    if compiler is not None:
        (ROOT / FOLDER / "build.ninja").write_text(ninja_file.ninja_file(ROOT, FOLDER, compiler, cuda))
        wanted = [name for name in MODULES if name not in reasons]
        # Both at once; only when that fails, one by one, to learn which of them it was.
        log, error = run_ninja(ninja, wanted)
        if error is None:
            print(log, end="", file=sys.stderr)
        for name in wanted if error is not None else []:
            log, error = run_ninja(ninja, [name])
            print(log, end="", file=sys.stderr)
            if error is not None:
                reasons[name] = error
    return {
        "compiler": compiler and f"{compiler.version} [{compiler.target}]",
        "nvcc": cuda and cuda.version,
        "cuda_architectures": list(cuda.architectures) if cuda else [],
        "not_built": reasons,
    }, reasons


def run_ninja(ninja, targets):
    """The log of a run, and None or the line of its first error."""
    command = [ninja, "-f", str(FOLDER / "build.ninja"), "-k", "0"]
    if os.environ.get("MAX_JOBS"):
        command += ["-j", os.environ["MAX_JOBS"]]
    # Flags of the environment's own could turn on fast-math, after which CPU and CUDA no longer agree.
    environment = {k: v for k, v in os.environ.items() if k not in ("NVCC_APPEND_FLAGS", "NVCC_PREPEND_FLAGS")}
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    done = subprocess.run([*command, *targets], cwd=ROOT, env=environment, **streams)
    if done.returncode == 0:
        return done.stdout, None
    lines = [line.strip() for line in done.stdout.splitlines() if line.strip()]
    errors = [line for line in lines if "error:" in line]
    return done.stdout, (errors or lines[-1:] or ["ninja failed"])[0]


def check_required(reasons):
    """Ends the build when a module that must be there is not."""
    if "_cpu" in reasons and os.environ.get("FUSED_SCHED_REQUIRE_CPU") == "1":
        sys.exit(
            "fused_sched: _cpu must be built (FUSED_SCHED_REQUIRE_CPU=1) but was not; "
            "without that setting the package installs with its pure-Python backend"
        )
    if "_cuda" in reasons and os.environ.get("FUSED_SCHED_CUDA") == "1":
        sys.exit("fused_sched: _cuda must be built (FUSED_SCHED_CUDA=1) but was not")
    if "_cpu" in reasons:
        say("installing without compiled code; the backend will be 'reference' (plain PyTorch)")


def say(text):
    print(f"fused_sched: {text}", file=sys.stderr)


def replace_file(source, target):
    """Copies by renaming: a process that has the old module loaded keeps it whole."""
    if target.exists() and filecmp.cmp(source, target, shallow=False):
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = target.with_name(f"{target.name}.{os.getpid()}")
    shutil.copy2(source, fresh)
    os.replace(fresh, target)


@contextmanager
def locked(path):
    """One build at a time in a build folder."""
    with open(path, "w") as file:
        if os.name == "posix":
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX)
        yield


setup(
    ext_modules=[Extension(f"fused_sched.{name}", sources=[]) for name in MODULES],
    cmdclass={"build": Build, "build_ext": BuildModules},
)
