"""Compiled kernels are kept in a folder named after all sources, so that no edit brings an old answer back."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import engine
from engine.warm import steps

ROOT = Path(engine.__file__).parent


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the engine that may be edited."""
    target = tmp_path / "engine"
    shutil.copytree(ROOT, target, ignore=shutil.ignore_patterns("__pycache__"))
    return target


def test_fingerprint_is_the_same_for_the_same_sources(copy: Path) -> None:
    assert engine.source_fingerprint(copy) == engine.source_fingerprint()
    (copy / "notes.txt").write_text("no source")
    assert engine.source_fingerprint(copy) == engine.source_fingerprint()


@pytest.mark.parametrize(
    "name", ["jit/kernels.py", "jit/arrays.py", "arch/ept.py", "cpu/sppt.py", "kvm/bitmaps.py", "trace/replay.py"]
)
def test_fingerprint_changes_with_every_source_of_a_kernel(copy: Path, name: str) -> None:
    source = copy / name
    source.write_text(source.read_text() + "\n# edited\n")
    assert engine.source_fingerprint(copy) != engine.source_fingerprint()


def test_fingerprint_changes_when_a_source_is_renamed_or_added(copy: Path) -> None:
    (copy / "cpu" / "sppt.py").rename(copy / "cpu" / "sppt2.py")
    renamed = engine.source_fingerprint(copy)
    (copy / "cpu" / "more.py").write_text("")
    assert len({engine.source_fingerprint(), renamed, engine.source_fingerprint(copy)}) == 3


@pytest.mark.parametrize(
    "name",
    [
        "nested/svm.py",
        "machine/dirty.py",
        "vcpu/msrs.py",
        "state/config.py",
        "warm/steps.py",
        "trace/session.py",
        "trace/readers/rows.py",
    ],
)
def test_fingerprint_leaves_out_what_no_kernel_depends_on(copy: Path, name: str) -> None:
    source = copy / name
    source.write_text(source.read_text() + "\n# edited\n")
    assert engine.source_fingerprint(copy) == engine.source_fingerprint()


def imported(source: Path, modules: dict[str, Path]) -> set[str]:
    """The modules of the engine that ``source`` imports, their packages among them."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    return {".".join(parts[:n]) for name in found for parts in [name.split(".")] for n in range(1, 9)} & set(modules)


def test_fingerprint_covers_every_module_with_kernels_and_all_that_these_import() -> None:
    files = [file for file in ROOT.rglob("*.py") if "__pycache__" not in file.parts]
    modules = {".".join(file.relative_to(ROOT.parent).with_suffix("").parts): file for file in files}
    modules = {name.removesuffix(".__init__"): file for name, file in modules.items()}
    kernels = re.compile(r"^\s*@(short_)?kernel\b", re.MULTILINE)
    todo = [name for name, file in modules.items() if kernels.search(file.read_text())]
    assert len(todo) > 30
    needed = set(todo)
    while todo:
        more = imported(modules[todo.pop()], modules) - needed
        needed |= more
        todo += more
    assert {modules[name] for name in needed} <= set(engine.kernel_sources())


# ---- where the folder is


def environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value for name, value in os.environ.items() if name not in {"SUBPAGE_KERNEL_CACHE", "NUMBA_CACHE_DIR"}
    }
    return {**kept, **variables}


def test_folder_can_be_configured(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SUBPAGE_KERNEL_CACHE", str(tmp_path))
    assert engine._kernel_cache() == tmp_path / engine.source_fingerprint()


def test_folder_is_in_the_cache_directory_of_the_user(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SUBPAGE_KERNEL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = engine._kernel_cache()
    assert folder == tmp_path / "subpage" / "kernels" / engine.source_fingerprint()
    assert folder.parent.stat().st_mode & 0o077 == 0


def test_folder_that_others_may_write_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SUBPAGE_KERNEL_CACHE", raising=False)
    home, shared = tmp_path / "home", tmp_path / "tmp"
    monkeypatch.setenv("XDG_CACHE_HOME", str(home))
    monkeypatch.setattr("tempfile.tempdir", str(shared))
    shared.mkdir()
    (home / "subpage" / "kernels").mkdir(parents=True)
    (home / "subpage" / "kernels").chmod(0o777)
    fallback = shared / f"subpage-kernels-{os.getuid()}"
    assert engine._kernel_cache() == fallback / engine.source_fingerprint()
    fallback.chmod(0o770)
    fresh = engine._kernel_cache()
    assert fresh.parent == shared and fresh != fallback and fresh.name.startswith("subpage-kernels-")


def test_folder_that_cannot_be_made_is_not_private(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert not engine._private(tmp_path / "file" / "below")
    assert engine._private(tmp_path / "new")


def test_numba_is_told_even_when_it_was_imported_before(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import numba

    before = numba.config.CACHE_DIR
    for name in ("NUMBA_CACHE_DIR", "NUMBA_LOOP_VECTORIZE", "NUMBA_SLP_VECTORIZE"):
        monkeypatch.setenv(name, os.environ[name])
    monkeypatch.setattr(numba.config, "CACHE_DIR", before)
    engine._point_numba_at(tmp_path)
    assert numba.config.CACHE_DIR == os.environ["NUMBA_CACHE_DIR"] == str(tmp_path)


def test_warming_drives_every_operation() -> None:
    steps.warm()


# ---- the edit that numba alone would miss

PROGRAM = """
import engine.cpu.access_check, engine.jit, numpy as np
from engine.cpu import sppt
from engine.jit import kernel

print(int(sppt.touched(0, 1)), int(engine.probe.both(0, 1)))
"""

PROBE = """
from engine.cpu import sppt
from engine.jit import kernel


@kernel
def both(gpa, size):
    \"\"\"A kernel that calls a rule of another module.\"\"\"
    return sppt.touched(gpa, size) + 100
"""


def printed(program: str, root: Path, kernels: Path) -> list[str]:
    """The words that a program prints which imports the engine below ``root`` and keeps its kernels in ``kernels``."""
    answer = subprocess.run(
        [sys.executable, "-c", program],
        cwd=kernels.parent,
        env=environment(
            PYTHONPATH=str(root),
            PYTHONDONTWRITEBYTECODE="1",
            SUBPAGE_KERNEL_CACHE=str(kernels),
            NUMBA_DISABLE_JIT="0",
        ),
        capture_output=True,
        text=True,
        check=True,
    )
    return answer.stdout.split()


@pytest.mark.jit
def test_a_copy_of_the_sources_elsewhere_uses_the_same_kernels(copy: Path, tmp_path: Path) -> None:
    program = "from engine.cpu import sppt; sppt.touched(0, 1); print(sum(sppt.touched.stats.cache_hits.values()))"

    shutil.copytree(copy, tmp_path / "elsewhere" / "engine")
    kernels = tmp_path / "kernels"
    assert [printed(program, root, kernels) for root in (tmp_path, tmp_path / "elsewhere")] == [["0"], ["1"]]


@pytest.mark.jit
def test_edited_rule_of_another_module_is_seen_by_kernels_that_call_it(copy: Path, tmp_path: Path) -> None:
    """Same folder for kernels, same caller, one rule edited: both its own answer and its caller's are new."""
    (copy / "probe.py").write_text(PROBE)
    program = PROGRAM.replace("engine.jit, numpy", "engine.probe, numpy")

    def run() -> list[int]:
        return [int(word) for word in printed(program, tmp_path, tmp_path / "kernels")]

    assert run() == [1, 101]
    assert run() == [1, 101], "from the cache"
    compiled = sorted((tmp_path / "kernels").iterdir())
    assert len(compiled) == 1 and list(compiled[0].rglob("*.nbi")), "kernels were kept"
    rule = copy / "cpu" / "sppt.py"
    edited = rule.read_text().replace("return (2 << last) - (1 << first)", "return (2 << last) - (1 << first) + 7")
    assert edited != rule.read_text()
    rule.write_text(edited)
    assert run() == [8, 108]
    assert len(list((tmp_path / "kernels").iterdir())) == 2
