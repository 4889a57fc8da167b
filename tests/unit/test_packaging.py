"""What is shipped: the wheel, the extras, the image, and how to cite it."""

from __future__ import annotations

import re
import tomllib
import zipfile
from pathlib import Path
from typing import get_args

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from popo_lite.recipe import OutputRecipe
from popo_lite.recipe_file import shipped_recipes, shipped_sweeps

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
PAPER = "Beyond Negative Rollouts: Positive-Only Policy Optimization with Implicit Negative Gradients"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names of the files in a wheel of this checkout."""
    build = pytest.importorskip("hatchling.build", reason="hatchling builds the wheel; it is in the dev extra")
    folder = tmp_path_factory.mktemp("wheel")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        name = build.build_wheel(str(folder))
    with zipfile.ZipFile(folder / name) as file:
        return file.namelist()


def test_the_wheel_has_all_that_commands_read(wheel):
    recipes = {f"popo_lite/recipes/{name}.toml" for name in shipped_recipes()}
    sweeps = {f"popo_lite/recipes/ablations/{name}.toml" for name in shipped_sweeps()}
    assert recipes | sweeps == {name for name in wheel if name.startswith("popo_lite/recipes/")}
    package = {path.relative_to(ROOT).as_posix() for path in (ROOT / "popo_lite").rglob("*") if path.is_file()}
    assert {name for name in package if "__pycache__" not in name} <= set(wheel)
    assert {"popo_lite/constraints.txt", "popo_lite/constraints-newest.txt"} <= set(wheel)


def test_the_wheel_has_nothing_else(wheel):
    outside = {name for name in wheel if not name.startswith(("popo_lite/", "popo_lite-0.1.0.dist-info/"))}
    assert not outside
    assert not [name for name in wheel if "test" in name.rpartition("/")[2].split("_")[0] or "__pycache__" in name]


def test_every_tracker_has_an_extra_of_its_name():
    names = get_args(get_args(OutputRecipe.model_fields["report_to"].annotation)[0])
    assert set(names) <= EXTRAS.keys()
    assert EXTRAS["trackers"] == [f"popo-lite[{','.join(names)}]"]


def test_pinned_versions_are_in_the_ranges():
    """And both files of constraints pin the same packages."""
    ranges: dict[str, list[Requirement]] = {}
    for line in (*PROJECT["dependencies"], *(line for lines in EXTRAS.values() for line in lines)):
        requirement = Requirement(line)
        ranges.setdefault(canonicalize_name(requirement.name), []).append(requirement)
    pinned = {}
    for name in ("constraints.txt", "constraints-newest.txt"):
        lines = [Requirement(line) for line in (ROOT / name).read_text().splitlines() if line[:1] not in ("", "#")]
        pinned[name] = {canonicalize_name(line.name): line.specifier for line in lines}
        for package, specifier in pinned[name].items():
            for version in re.findall(r"==([\w.]+)", str(specifier)):
                assert all(each.specifier.contains(version) for each in ranges[package]), f"{name}: {package}"
    assert pinned["constraints.txt"].keys() == pinned["constraints-newest.txt"].keys()


def bibtex(path):
    return re.findall(r"```bibtex\n(.*?)```", path.read_text(), re.DOTALL)


def test_the_paper_is_cited_in_one_way():
    readme = bibtex(ROOT / "README.md")
    assert len(readme) == 1
    assert bibtex(ROOT / "popo_lite" / "tools" / "export" / "card.md.jinja") == readme
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    paper = citation["preferred-citation"]
    authors = " and ".join(f"{each['family-names']}, {each['given-names']}" for each in paper["authors"])
    assert paper["title"] == PAPER
    for value in (paper["title"], authors, paper["journal"], str(paper["year"])):
        assert f"{{{value}}}" in readme[0]
    assert (citation["cff-version"], citation["title"]) == ("1.2.0", PROJECT["name"])
    assert (citation["version"], citation["license"]) == (PROJECT["version"], PROJECT["license"])


def test_the_image_copies_what_is_there_and_is_not_run_by_root():
    lines = (ROOT / "Dockerfile").read_text().splitlines()
    for line in lines:
        if line.startswith("COPY "):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists()
    asked = re.search(r"'\.\[(.*)\]'", "\n".join(lines))
    assert asked is not None
    assert set(asked[1].split(",")) <= EXTRAS.keys()
    assert [line for line in lines if line.startswith("USER ")] == ["USER popo"]
