"""What the build promises: incremental, honest about what is missing, independent of the build machine's GPU.

Most tests build a stub of the project (the real setup.py over sources of a few lines); one builds the real
thing from an sdist.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from build_tools import ninja_file, toolchain  # noqa: E402

STUB_SOURCES = {
    "csrc/core/in_binding.h": "#define IN_BINDING 1\n",
    "csrc/core/in_loops.h": "#define IN_LOOPS 1\n",
    "csrc/binding.cpp": """
#include <Python.h>
#include "core/in_binding.h"
#define INIT_NAME(module) PyInit_##module
#define INIT(module) INIT_NAME(module)
static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "stub", nullptr, -1, nullptr,
                                 nullptr, nullptr, nullptr, nullptr};
PyMODINIT_FUNC INIT(FS_MODULE)() { return PyModule_Create(&definition); }
""",
    "csrc/cpu/update_tile.cpp": '#include "../core/in_loops.h"\n#define NAME(isa) loop_##isa\n'
    "#define EXPAND(isa) NAME(isa)\nint EXPAND(FS_ISA)() { return IN_LOOPS; }\n",
    "csrc/cuda/step.cu": '#include "../core/in_loops.h"\n__global__ void kernel(int* out) { *out = IN_LOOPS; }\n',
    "fused_sched/__init__.py": '__version__ = "1.2.3"\n',
    "README.md": "stub\n",
    "LICENSE": "stub\n",
}


def run(*command: str, cwd: Path, succeeds: bool = True, **settings: str) -> str:
    """Output of a command run with our build settings and nothing of the caller's."""
    ours = {"CXX", "CUDA_HOME", "CUDA_PATH"}
    environment = {k: v for k, v in os.environ.items() if k not in ours and not k.startswith("FUSED_SCHED_")}
    environment |= {"FUSED_SCHED_CUDA": "0", **settings}
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert (done.returncode == 0) == succeeds, done.stdout
    return done.stdout


def build_in_place(project: Path, succeeds: bool = True, **settings: str) -> str:
    return run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", cwd=project, succeeds=succeeds, **settings)


def build_info(project: Path) -> dict:
    return json.loads((project / "fused_sched" / "_build_info.json").read_text())


def modules(project: Path) -> set[str]:
    return {path.name.split(".")[0] for path in (project / "fused_sched").glob("*.so")}


def times(project: Path) -> dict[str, int]:
    """When each object and module was made, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in project.glob("build/*/*") if path.suffix in {".o", ".so"}}


@pytest.fixture
def stub(tmp_path: Path) -> Path:
    for name, text in STUB_SOURCES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    shutil.copy(ROOT / "setup.py", tmp_path)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    shutil.copytree(ROOT / "build_tools", tmp_path / "build_tools", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def test_only_what_includes_a_touched_header_is_compiled_again(stub: Path) -> None:
    build_in_place(stub, FUSED_SCHED_REQUIRE_CPU="1")
    assert modules(stub) == {"_cpu"}
    first = times(stub)

    assert "no work to do" in build_in_place(stub)
    assert times(stub) == first

    (stub / "csrc/core/in_loops.h").write_text("#define IN_LOOPS 2\n")
    build_in_place(stub)
    rebuilt = {name for name, made in times(stub).items() if made != first[name]}
    loops = {name for name in first if name.startswith("csrc.cpu.update_tile")}
    assert len(loops) in {1, 3}  # x86-64 has three instruction sets, others one
    assert rebuilt == loops | {"_cpu.so"}


def test_a_new_source_is_found(stub: Path) -> None:
    build_in_place(stub)
    (stub / "csrc/cpu/extra.cpp").write_text("int extra() { return 1; }\n")
    build_in_place(stub)
    assert "csrc.cpu.extra.cpp.o" in times(stub)


def test_a_missing_compiler_leaves_pure_python_and_says_so(stub: Path) -> None:
    build_in_place(stub)
    log = build_in_place(stub, CXX="no-such-compiler")
    assert "no C++ compiler (CXX=no-such-compiler cannot be run): install g++" in log
    assert "the backend will be 'reference'" in log
    assert modules(stub) == set()  # not the module of the build before
    assert "no-such-compiler" in build_info(stub)["not_built"]["_cpu"]
    required = build_in_place(stub, succeeds=False, CXX="no-such-compiler", FUSED_SCHED_REQUIRE_CPU="1")
    assert "_cpu must be built" in required


def test_an_error_in_the_sources_is_reported_and_fails_where_cpu_is_required(stub: Path) -> None:
    (stub / "csrc/cpu/broken.cpp").write_text("int broken( { }\n")
    build_in_place(stub)
    assert modules(stub) == set()
    assert "csrc/cpu/broken.cpp:1" in build_info(stub)["not_built"]["_cpu"]
    log = build_in_place(stub, succeeds=False, FUSED_SCHED_REQUIRE_CPU="1")
    assert "csrc/cpu/broken.cpp:1" in log


def test_cuda_can_be_refused_and_required(stub: Path) -> None:
    build_in_place(stub, FUSED_SCHED_CUDA="0")
    assert build_info(stub)["not_built"] == {"_cuda": "FUSED_SCHED_CUDA=0"}
    log = build_in_place(stub, succeeds=False, FUSED_SCHED_CUDA="1", CUDA_HOME=str(stub / "nowhere"))
    assert "_cuda must be built (FUSED_SCHED_CUDA=1)" in log
    build_in_place(stub, FUSED_SCHED_CUDA="auto", CUDA_HOME=str(stub / "nowhere"))
    assert modules(stub) == {"_cpu"}


def test_a_failed_required_build_leaves_what_was_there(stub: Path) -> None:
    build_in_place(stub)
    before, record = modules(stub), build_info(stub)
    build_in_place(stub, succeeds=False, FUSED_SCHED_CUDA="1", CUDA_HOME=str(stub / "nowhere"))
    assert (modules(stub), build_info(stub)) == (before, record)


@pytest.mark.parametrize("value", ["off", "yes", ""])
def test_cuda_setting_must_be_one_of_three(stub: Path, value: str) -> None:
    assert "auto, 1 or 0" in build_in_place(stub, succeeds=False, FUSED_SCHED_CUDA=value)


def test_compiler_may_be_several_words(stub: Path) -> None:
    build_in_place(stub, CXX="env g++")
    assert modules(stub) == {"_cpu"}


def test_a_compiler_upgraded_in_place_rebuilds_everything(stub: Path) -> None:
    wrapper = stub / "mycxx"
    for version in ("first", "second"):
        wrapper.write_text(f'#!/bin/sh\n[ "$1" = --version ] && echo {version} && exit\nexec g++ "$@"\n')
        wrapper.chmod(0o755)
        log = build_in_place(stub, CXX=str(wrapper))
        assert "no work to do" not in log
        assert build_info(stub)["compiler"].startswith(version)
    assert "no work to do" in build_in_place(stub, CXX=str(wrapper))


def test_only_the_bindings_see_where_pybind11_is(tmp_path: Path) -> None:
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/loops.cpp").touch()
    compiler = toolchain.CppCompiler(("g++",), "12", "x86_64-linux-gnu", ("/somewhere/include",))
    text = ninja_file.ninja_file(tmp_path, Path("build/here"), compiler, None)
    flags = text[text.index("csrc/binding.cpp") :].splitlines()[1]
    assert text.count("/somewhere/include") == flags.count("/somewhere/include") == 1


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on PATH")
def test_cuda_is_built_by_toolkit_not_by_gpu(stub: Path) -> None:
    settings = {"FUSED_SCHED_CUDA": "1", "FUSED_SCHED_CUDA_ARCHS": "80 90", "CUDA_VISIBLE_DEVICES": ""}
    build_in_place(stub, **settings)
    assert modules(stub) == {"_cpu", "_cuda"}
    assert build_info(stub)["cuda_architectures"] == ["80", "90"]
    first = times(stub)
    assert "no work to do" in build_in_place(stub, **settings)
    (stub / "csrc/core/in_loops.h").write_text("#define IN_LOOPS 2\n")
    build_in_place(stub, **settings)
    rebuilt = {name for name, made in times(stub).items() if made != first[name]}
    assert {"csrc.cuda.step.cu.o", "_cuda.so"} <= rebuilt  # nvcc's depfiles are read too
    assert not {name for name in rebuilt if name.startswith("csrc.binding")}


def fake_nvcc(folder: Path, release: str, top: Path) -> Path:
    """An nvcc that answers questions, reached like the real one through a path that is not the toolkit's."""
    script = folder / "bin" / "nvcc"
    script.parent.mkdir(parents=True)
    script.write_text(f"""#!/bin/sh
case "$1" in
  --version) echo "Cuda compilation tools, release {release}, V{release}.99" ;;
  --dryrun) echo "#$ TOP={top}/bin/.." ;;
  --list-gpu-arch) printf 'compute_75\\ncompute_80\\ncompute_90\\n' ;;
  --help) echo "--generate-code --compress-mode" ;;
esac
""")
    script.chmod(0o755)
    return folder


def test_the_toolkit_is_the_one_nvcc_names(tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart_static.a").touch()
    home = fake_nvcc(tmp_path / "wrapper", "12.4", toolkit)
    found = toolchain.find_cuda_toolkit({"CUDA_HOME": str(home)})
    assert found.runtime_library == str(toolkit / "lib64" / "libcudart_static.a")
    assert found.architectures == ("75", "80", "90")  # of the default ones, those that this nvcc knows
    with pytest.raises(toolchain.Missing, match="asks for 100; this nvcc knows 75, 80, 90"):
        toolchain.find_cuda_toolkit({"CUDA_HOME": str(home), "FUSED_SCHED_CUDA_ARCHS": "9.0;100"})


@pytest.mark.parametrize(("release", "compresses"), [("12.8", False), ("12.9", False), ("13.0", True)])
def test_code_is_compressed_where_every_driver_reads_it(release: str, compresses: bool, tmp_path: Path) -> None:
    toolkit = tmp_path / "toolkit"
    (toolkit / "bin").mkdir(parents=True)
    (toolkit / "lib64").mkdir()
    (toolkit / "lib64" / "libcudart_static.a").touch()
    found = toolchain.find_cuda_toolkit({"CUDA_HOME": str(fake_nvcc(tmp_path / "wrapper", release, toolkit))})
    assert found.compresses == compresses
    assert ("--compress-mode=size" in ninja_file._target_flags(found)) == compresses


def test_an_old_toolkit_is_not_used(tmp_path: Path) -> None:
    home = fake_nvcc(tmp_path / "old", "12.0", tmp_path)
    with pytest.raises(toolchain.Missing, match=r"CUDA 12\.0\.99, older than 12\.1"):
        toolchain.find_cuda_toolkit({"CUDA_HOME": str(home)})


def test_pybind11_may_be_the_copy_in_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = toolchain.importlib.util.find_spec
    monkeypatch.setattr(
        toolchain.importlib.util, "find_spec", lambda name: None if name == "pybind11" else find_spec(name)
    )
    include = Path(toolchain.pybind11_include())
    assert include.parent.name == "torch"
    assert (include / "pybind11" / "pybind11.h").is_file()


def test_paths_with_spaces_and_dollars_survive_the_ninja_file(tmp_path: Path) -> None:
    (tmp_path / "csrc/cpu").mkdir(parents=True)
    (tmp_path / "csrc/cpu/a b$c.cpp").touch()
    compiler = toolchain.CppCompiler(("g++",), "12", "x86_64-linux-gnu", ("/with space/include",))
    text = ninja_file.ninja_file(tmp_path, Path("build/here"), compiler, None)
    assert "csrc/cpu/a$ b$$c.cpp" in text
    assert "'-isystem/with space/include'" in text


def test_no_source_includes_a_torch_header() -> None:
    includes = [
        f"{path.name}: {line}"
        for path in (ROOT / "csrc").rglob("*")
        if path.suffix in {".h", ".cuh", ".cpp", ".cu"}
        for line in path.read_text().splitlines()
        if re.match(r"\s*#\s*include\s*[<\"](torch|ATen|c10)/", line)
    ]
    assert includes == []


def fresh_environment(folder: Path) -> Path:
    """The Python of an environment that has this one's packages but not our editable install.

    A folder named in a .pth file is searched, but the .pth files inside it are not read: they hold the hook of an
    editable install, which would lend the checkout's modules to a wheel that lacks them.
    """
    run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder.parent)
    (site,) = folder.glob("lib/*/site-packages")
    packages = [path for path in sys.path if Path(path).name in {"site-packages", "dist-packages"}]
    (site / "packages_of_the_tests.pth").write_text("\n".join(packages) + "\n")
    return folder / "bin" / "python"


@pytest.mark.slow_build
def test_the_wheel_of_the_sdist_works_from_any_directory(tmp_path: Path) -> None:
    checkout = tmp_path / "checkout"
    shutil.copytree(
        ROOT,
        checkout,
        ignore=shutil.ignore_patterns(".*", "build", "dist", "*.egg-info", "__pycache__", "demo_output"),
    )
    make_sdist = "from setuptools import build_meta; build_meta.build_sdist('../dist')"
    run(sys.executable, "-c", make_sdist, cwd=checkout)
    (sdist,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        packed = [name.split("/", 1)[-1] for name in archive.getnames()]
    assert not [name for name in packed if name.endswith((".so", "_build_info.json"))]

    pip = [sys.executable, "-m", "pip", "-q"]
    run(*pip, "wheel", "--no-build-isolation", "--no-deps", "-w", "dist", str(sdist), cwd=tmp_path,
        FUSED_SCHED_REQUIRE_CPU="1")  # fmt: skip
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info" not in name} == {"fused_sched"}
    assert "fused_sched/py.typed" in names
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "fused_sched").rglob("*.py")}
    assert {name for name in names if name.endswith(".py")} == sources
    assert [name for name in names if re.match(r"fused_sched/_cpu\..*\.so$", name)]

    python = fresh_environment(tmp_path / "environment")
    run(*pip, "--python", str(python), "install", "--no-deps", str(wheel), cwd=tmp_path)
    report = run(str(python), "-m", "fused_sched", cwd=tmp_path)
    (package,) = (tmp_path / "environment").glob("lib/*/site-packages/fused_sched")
    assert f"in {package}" in report
    assert re.search(r"^backend cpu +usable", report, re.M), report
    assert re.search(r"^backend cuda +not built: FUSED_SCHED_CUDA=0", report, re.M), report

    # Without its modules the same package still works, and says what is missing.
    for module in package.glob("*.so"):
        module.unlink()
    report = run(str(python), "-m", "fused_sched", cwd=tmp_path)
    assert re.search(r"^backend cpu +not built", report, re.M), report
    assert re.search(r"^backend reference +usable", report, re.M), report
