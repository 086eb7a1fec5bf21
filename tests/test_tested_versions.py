"""Versions of diffusers and transformers: which are tested, and that others are named once and not refused."""

from __future__ import annotations

import os
import re
import subprocess
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import pytest
import torch

from omni_sp import ParallelMesh, parallelize
from omni_sp.tested_versions import TESTED, warn_if_untested
from omni_sp.testing.ranks import RankPool
from omni_sp.testing.reference import randomise, relative_error
from tests.library_versions import EXPECTED
from tests.preloaded import python
from tests.sharding.models import qwen_image, qwen_inputs

ROOT = Path(__file__).resolve().parent.parent
OTHER = "is not tested with"


@contextmanager
def installed(**versions: str) -> Iterator[None]:
    """Pretend that these versions are installed, in a process that has warned of none yet."""
    real = metadata.version
    with mock.patch.object(metadata, "version", lambda package: versions.get(package) or real(package)):
        warn_if_untested.cache_clear()
        try:
            yield
        finally:
            warn_if_untested.cache_clear()


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("diffusers", "0.40.0"),
        ("diffusers", "0.41.3"),
        ("diffusers", "0.42.99"),
        ("transformers", "5.0.0"),
        ("transformers", "5.99.0"),
    ],
)
def test_a_tested_series_is_not_spoken_of(package: str, version: str) -> None:
    with installed(**{package: version}):
        warn_if_untested(package)  # a warning is an error here


@pytest.mark.parametrize(
    ("package", "version"),
    [
        ("diffusers", "0.39.0"),
        ("diffusers", "0.43.0.dev0"),
        ("diffusers", "1.0.0"),
        ("transformers", "4.57.6"),
        ("transformers", "6.0.0"),
    ],
)
def test_another_is_named_once_in_a_sentence(package: str, version: str) -> None:
    with installed(**{package: version}):
        with pytest.warns(UserWarning, match=f"{OTHER} {package} {re.escape(version)}, but with") as caught:
            warn_if_untested(package)
        warn_if_untested(package)  # a warning outside of the block is an error
        assert len(caught) == 1
        assert all(bound in str(caught[0].message) for bound in TESTED[package])


def test_a_library_without_a_version_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(package: str) -> str:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "version", missing)
    warn_if_untested.cache_clear()
    warn_if_untested("diffusers")
    warn_if_untested.cache_clear()


def sharded_by_an_unknown_version(mesh: ParallelMesh) -> tuple[float, list[str]]:
    """The error, and what was warned of, in a process with newer libraries."""
    model, inputs = randomise(qwen_image()), qwen_inputs()
    with torch.no_grad():
        expected = model(**inputs)[0]
        with installed(diffusers="0.99.0", transformers="9.0.0"), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                handle = parallelize(model, mesh)
                sharded = model(**inputs)[0]
                handle.remove()
    return relative_error(sharded, expected), [str(one.message) for one in caught if OTHER in str(one.message)]


def test_an_unknown_version_goes_on_and_one_rank_says_so(ranks: RankPool) -> None:
    answers: list[Any] = ranks.run(sharded_by_an_unknown_version, ulysses=2)
    assert max(error for error, _ in answers) <= 1e-5
    (first, second), others = answers[0][1], answers[1][1]
    assert "diffusers 0.99.0" in first
    assert "transformers 9.0.0" in second
    assert others == []


def test_the_command_says_it_once_and_draws(tmp_path: Path) -> None:
    known = tmp_path / "newer" / "diffusers-0.99.0.dist-info"
    known.mkdir(parents=True)
    (known / "METADATA").write_text("Metadata-Version: 2.1\nName: diffusers\nVersion: 0.99.0\n")
    path = os.pathsep.join(filter(None, [str(known.parent), os.environ.get("PYTHONPATH"), str(ROOT)]))
    small = ["--device", "cpu", "--width", "64", "--height", "64", "--num-inference-steps", "2"]
    done = subprocess.run(
        [python(), "-m", "omni_sp", "generate", "--prompt", "a red circle", "--ulysses-degree", "2", *small],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert list(tmp_path.glob("pictures/*.png"))
    assert done.stderr.count("diffusers 0.99.0") == 1


def version_of_rank(mesh: ParallelMesh) -> str:
    return str(diffusers.__version__)


def test_every_rank_runs_the_version_that_is_tested(ranks: RankPool) -> None:
    expected = EXPECTED or metadata.version("diffusers")
    assert ranks.run(version_of_rank, ulysses=4) == [expected] * 4


def test_the_files_of_this_repository_speak_of_the_same_versions() -> None:
    project, makefile, constraints = (
        (ROOT / name).read_text() for name in ("pyproject.toml", "Makefile", "constraints.txt")
    )
    for package, (oldest, newest) in TESTED.items():
        assert f'"{package}>={oldest.removesuffix(".0")}",' in project
        assert f"\n{package}=={newest}\n" in constraints
    older = re.search(r"^DIFFUSERS_BEFORE := (.+)$", makefile, re.MULTILINE)
    assert older is not None
    assert older[1].split()[-1] == TESTED["diffusers"][0]
    assert f"transformers=={TESTED['transformers'][0]}" in makefile
    table = re.findall(r"^\| (0\.\d+\.\d+) \| (\d+\.\d+\.\d+) ", (ROOT / "docs" / "use.md").read_text(), re.MULTILINE)
    assert [row[0] for row in table] == [TESTED["diffusers"][1], *older[1].split()]
    assert (table[-1][1], table[0][1]) == TESTED["transformers"]
