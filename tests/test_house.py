"""The plan of the house: which part of the packages may import which, read from the source."""

import ast
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("ear_kernels", "ear_model")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def imported(path: Path) -> Iterator[str]:
    """Modules of our packages that a file imports: anywhere in it, in functions and for type checking too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                if whole in MODULES or node.module in MODULES:
                    yield whole if whole in MODULES else str(node.module)


ARROWS = {name: sorted(set(imported(path)) - {name}) for name, path in MODULES.items()}


def circle(arrows: dict[str, Iterable[str]]) -> list[str]:
    """The names along some circle of arrows, the first one repeated at its end; nothing if there is none."""
    finished: set[str] = set()

    def search(name: str, way: list[str]) -> list[str]:
        if name in way:
            return [*way[way.index(name) :], name]
        if name in finished:
            return []
        for other in arrows.get(name, ()):
            if found := search(other, [*way, name]):
                return found
        finished.add(name)
        return []

    return next((found for name in arrows if (found := search(name, []))), [])


def wing(module: str) -> str:
    """A folder of ear_model with all that is in it, or a module on its own."""
    return ".".join(module.split(".")[:2])


def is_in(module: str, *places: str) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


def arrows_between(sources: Iterable[str], targets: Iterable[str]) -> list[str]:
    return [
        f"{name} -> {other}"
        for name, others in ARROWS.items()
        if is_in(name, *sources)
        for other in others
        if is_in(other, *targets)
    ]


def test_the_packages_are_read() -> None:
    assert len(MODULES) > 80
    assert "ear_model.model.backbone" in ARROWS["ear_model.ear"]


def test_a_circle_is_found() -> None:
    assert circle({"a": ["b"], "b": ["c", "d"], "c": [], "d": ["b"]}) == ["b", "d", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_module_imports_itself_by_others() -> None:
    assert circle(ARROWS) == []


def test_no_wing_of_the_model_imports_itself_by_others() -> None:
    # The package itself only shows names of its wings.
    wings: dict[str, set[str]] = {}
    for name, others in ARROWS.items():
        if is_in(name, "ear_model") and name != "ear_model":
            wings.setdefault(wing(name), set()).update(
                wing(other) for other in others if is_in(other, "ear_model") and wing(other) != wing(name)
            )
    assert circle(wings) == []


def test_kernels_know_no_model() -> None:
    assert arrows_between(["ear_kernels"], ["ear_model"]) == []


@pytest.mark.parametrize("part", ["model", "scores"])
def test_the_model_knows_neither_training_nor_sampling(part: str) -> None:
    above = [f"ear_model.{name}" for name in ("training", "sampling", "ear")]
    assert arrows_between([f"ear_model.{part}"], above) == []


def test_sampling_takes_the_model_as_an_argument() -> None:
    assert arrows_between(["ear_model.sampling"], ["ear_model.ear", "ear_model.training"]) == []


def test_the_ground_floor_of_the_kernels_stands_on_nothing() -> None:
    above = {other for name in MODULES if is_in(name, "ear_kernels.runtime") for other in ARROWS[name]}
    assert [other for other in above if not is_in(other, "ear_kernels.runtime")] == []


def test_no_op_imports_the_host_code_of_another() -> None:
    ops = "ear_kernels.ops"
    found = []
    for name, others in ARROWS.items():
        for other in others:
            parts = other.split(".")
            if not (is_in(name, ops) and is_in(other, ops) and len(parts) > 3):
                continue
            if name.split(".")[2] != parts[2] and parts[3].startswith(("launch", "autograd")):
                found.append(f"{name} -> {other}")
    assert found == []


DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def anchors(document: Path) -> set[str]:
    """What a link to a heading of a document can name, as GitHub makes it of the heading."""
    text = re.sub(r"^```.*?^```", "", document.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_what_is_there(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link
    for name in re.findall(r"`(?:tests/)?((?:kernels|model|benchmarks)/test_\w+\.py)", text):
        assert (ROOT / "tests" / name).is_file(), name
