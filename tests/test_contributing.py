# SPDX-License-Identifier: Apache-2.0
"""The recipes of CONTRIBUTING.md are true of every op and every family, and its tools run in all places alike."""

from __future__ import annotations

import re
import subprocess

import pytest
import yaml
from markdown_pages import ROOT, first_cells, read_page

from talkingdit import families, ops
from talkingdit.families.family import Family, FamilyFile

PAGE = read_page(ROOT / "CONTRIBUTING.md")
OPS = sorted({getattr(ops, name).__module__.rpartition(".")[2] for name in vars(ops) if name.endswith("_reference")})
FAMILIES = (
    "puppet",
    "wan_s2v",
    "wan_i2v",
    "gloria",
    "skyreels_audio",
    "hunyuan_avatar",
)  # a test may have registered others
FOLDER = ROOT / "talkingdit" / "families"
NAMING = (
    "talkingdit/models.py",  # public names of classes, for people
    "training/family.py",  # configurations from before they named a family
    "training/vae.py",  # a program that trains the autoencoder of one family
)


def files_of(heading: str) -> list[str]:
    return [cell.strip("`") for cell in first_cells(PAGE.section(heading))]


def line_of(file: str) -> str:
    (line,) = [line for line in PAGE.prose.splitlines() if line.startswith(f"| `{file}` |")]
    return line


def exceptions(file: str) -> set[str]:
    """Names after "not for" in the line of a file."""
    return set(re.findall(r"`(\w+)`", line_of(file).partition("not for")[2]))


def optional(file: str) -> bool:
    return "may be missing" in line_of(file)


@pytest.mark.parametrize("op", OPS)
def test_an_op_is_the_files_of_the_recipe(op: str) -> None:
    files = files_of("Add an op")
    assert len(files) == 7
    assert [file for file in files if not (ROOT / file.replace("<op>", op)).is_file()] == [
        file for file in files if op in exceptions(file)
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_has_the_files_of_the_recipe(family: str) -> None:
    base = families.get(family).base or family
    files = [file for file in files_of("Add a family") if not optional(file)]
    assert [file for file in files if not any((FOLDER / name / file).is_file() for name in (family, base))] == []
    assert (FOLDER / family / "__init__.py").is_file()


@pytest.mark.parametrize("family", ["wan_s2v", "wan_i2v", "hunyuan_avatar"])
def test_what_a_step_is_given_lies_in_files_of_the_same_names(family: str) -> None:
    given = (FOLDER / family / "conditions.py").read_text()
    assert re.search(r"^class \w+Inputs\b", given, re.MULTILINE)
    assert re.search(r"^class \w+Conditions\b", given, re.MULTILINE)
    assert re.search(r"^def encode\(", (FOLDER / family / "encode.py").read_text(), re.MULTILINE)


def test_the_recipe_of_a_family_lists_what_is_asked_of_one() -> None:
    asked = set(re.findall(r'self\.part\("(\w+)"\)', (FOLDER / "family.py").read_text()))
    asked |= {name for name, value in vars(Family).items() if isinstance(value, FamilyFile)}
    assert {f"{part}.py" for part in asked} | {"__init__.py"} == set(files_of("Add a family"))


@pytest.mark.parametrize("family", FAMILIES)
def test_only_one_line_outside_its_folder_names_a_family(family: str) -> None:
    generic = [
        path
        for folder in ("talkingdit", "training")
        for path in (ROOT / folder).rglob("*.py")
        if FOLDER / family not in path.parents and path.relative_to(ROOT).as_posix() not in NAMING
    ]
    naming = re.compile(rf"families\.{family}\b|([\"']){family}\1")
    lines = {
        path.relative_to(ROOT).as_posix(): [line for line in path.read_text().splitlines() if naming.search(line)]
        for path in generic
    }
    registry = lines.pop("talkingdit/families/__init__.py")
    assert f'    "{family}": "talkingdit.families.{family}",' in registry
    others = {FOLDER / other for other in FAMILIES}  # one that has this one as its base
    assert {path: found for path, found in lines.items() if found and (ROOT / path).parent not in others} == {}


def test_pre_commit_runs_what_make_lint_runs() -> None:
    makefile = (ROOT / "Makefile").read_text()
    recipe = re.search(r"^lint:.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    assert recipe is not None
    made = [line.strip().replace(" $(NATIVE_CODE)", "") for line in recipe.group(1).splitlines()]
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert repository["repo"] == "local"
    assert [hook["entry"] for hook in repository["hooks"]] == made
    assert {hook["language"] for hook in repository["hooks"]} == {"system"}


def test_all_native_code_is_formatted() -> None:
    rules = subprocess.run(["make", "-pn", "lint"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    (formatted,) = re.findall(r"^NATIVE_CODE := (.*)$", rules, re.MULTILINE)
    suffixes = {".cpp", ".h", ".cu", ".cuh"}
    folders = (ROOT / name for name in ("csrc", "cuda", "tests"))
    native = {path.relative_to(ROOT) for folder in folders for path in folder.rglob("*") if path.suffix in suffixes}
    assert {path.as_posix() for path in native} == set(formatted.split())


def test_layers_may_use_no_library_but_torch_and_numpy() -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    modules = {"opencv-python-headless": "cv2", "pillow": "PIL", "typing-extensions": "typing_extensions"}
    needed = {re.split(r"[<>=]", name)[0] for name in project["project"]["dependencies"]}
    allowed = {"torch", "numpy", "typing_extensions"}
    contracts = project["tool"]["importlinter"]["contracts"]
    (forbidden,) = [contract["forbidden_modules"] for contract in contracts if contract["type"] == "forbidden"]
    assert {modules.get(name, name) for name in needed} - allowed <= set(forbidden)
