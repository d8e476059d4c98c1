"""Rules that the source keeps, read off its syntax trees; and ARCHITECTURE.md, which names all of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from fedhds.spec import AGGREGATOR_SPECS, OPTIMIZER_SPECS, PEFT_SPECS, STRATEGY_SPECS
from fedhds.tensors.codecs import CODECS
from fedhds_server.run.state import Phase

ROOT = Path(__file__).resolve().parents[1]
ARCHITECTURE = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8")
PACKAGES = {"fedhds": "common", "fedhds_server": "server", "fedhds_client": "client"}
MAX_LINES = 400


@dataclass(frozen=True)
class Module:
    """One file of the source."""

    name: str
    """As it is imported."""
    path: str
    """Below the repository's root."""
    text: str
    tree: ast.Module

    def within(self, package: str) -> bool:
        """Whether it is `package` or lies in it."""
        return within(self.name, package)


def within(name: str, package: str) -> bool:
    """Whether a module is `package` or lies in it."""
    return name == package or name.startswith(f"{package}.")


@cache
def modules(*folders: str) -> dict[str, Module]:
    """All modules below folders of the repository by name, without generated code; by default those of the packages."""
    found = {}
    for folder in folders or [f"{parent}/{package}" for package, parent in PACKAGES.items()]:
        for file in sorted((ROOT / folder).rglob("*.py")):
            if (ROOT / "common/fedhds/v2") in file.parents:
                continue
            parts = file.relative_to((ROOT / folder).parent).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            text = file.read_text(encoding="utf-8")
            found[name] = Module(name, str(file.relative_to(ROOT)), text, ast.parse(text))
    return found


def imports(nodes: Iterable[ast.AST], *, for_types: bool, in_functions: bool = True) -> Iterator[str]:
    """What statements import, as "package.module" or "package.module.name"."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING" and not for_types:
            yield from imports(node.orelse, for_types=for_types, in_functions=in_functions)
        elif in_functions or not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from imports(ast.iter_child_nodes(node), for_types=for_types, in_functions=in_functions)


# Which way imports point. Imports for types alone count, too.

FORBIDDEN = {
    "fedhds": ["fedhds_server", "fedhds_client"],
    "fedhds_server": ["fedhds_client", "torch", "transformers", "peft", "accelerate"],
    "fedhds_client": ["fedhds_server"],
    "benchmarks": ["tests"],
    "demo": ["tests"],
}
# What does I/O or tells the time: none of it in the state machine, where names for types do not count.
IMPURE = [
    *("asyncio", "datetime", "grpc", "http", "io", "os", "pathlib", "shutil", "socket", "sqlite3", "subprocess"),
    *("tempfile", "threading", "time", "urllib", "alembic", "fsspec", "sqlalchemy", "starlette", "uvicorn"),
    *("fedhds.runtime", "fedhds.transfer", "fedhds.tensors.safetensors", "fedhds_server.app"),
    *(f"fedhds_server.{part}" for part in ("coordinator", "dashboard", "leadership", "observers", "rpc", "storage")),
]
PURE = ["fedhds_server.run", "fedhds_server.workflows"]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package: str) -> None:
    folder = f"{PACKAGES[package]}/{package}" if package in PACKAGES else package
    for module in modules(folder).values():
        wrong = imported(module, FORBIDDEN[package], for_types=True)
        assert not wrong, f"{module.path} imports {wrong}"


@pytest.mark.parametrize("package", PURE)
def test_the_state_machine_does_no_io_and_has_no_clock(package: str) -> None:
    checked = [module for module in modules().values() if module.within(package)]
    assert len(checked) >= 5
    for module in checked:
        wrong = imported(module, IMPURE, for_types=False)
        assert not wrong, f"{module.path} imports {wrong}"


def imported(module: Module, packages: Iterable[str], *, for_types: bool) -> list[str]:
    """Which of `packages` a module imports, wherever in it."""
    names = [*imports([module.tree], for_types=for_types)]
    return [package for package in packages if any(within(name, package) for name in names)]


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_do_not_import_each_other_in_a_circle(package: str) -> None:
    known = modules(f"{PACKAGES[package]}/{package}")
    assert len(known) > 30
    try:
        TopologicalSorter({module.name: set(needs(module, known)) for module in known.values()}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def needs(module: Module, known: Mapping[str, Module]) -> Iterator[str]:
    """The modules out of `known` that run before `module` can, packages around them included."""
    for name in imports(module.tree.body, for_types=False, in_functions=False):
        target = name if name in known else name.rpartition(".")[0]
        while target in known:
            # A package that holds the module itself has begun already.
            if not module.within(target):
                yield target
            target = target.rpartition(".")[0]


# Names of variants: the registries know what belongs to one, and nobody else asks for it by name.


@dataclass(frozen=True)
class Registry:
    """The names of one kind of variants."""

    names: frozenset[str]
    subjects: frozenset[str]
    """What holds such a name in code."""
    places: tuple[str, ...]
    """Where the names may be compared."""


SPEC = "common/fedhds/spec/"
REGISTRIES = {
    "selection strategy": Registry(
        frozenset(STRATEGY_SPECS),
        frozenset({"name", "strategy", "STRATEGIES", "STRATEGY_SPECS"}),
        (SPEC, "server/fedhds_server/selection/", "client/fedhds_client/selection/"),
    ),
    "aggregator": Registry(
        frozenset(AGGREGATOR_SPECS),
        frozenset({"name", "aggregator", "AGGREGATORS", "AGGREGATOR_SPECS"}),
        (SPEC, "server/fedhds_server/aggregation/"),
    ),
    "server optimizer": Registry(
        frozenset(OPTIMIZER_SPECS),
        frozenset({"name", "optimizer", "server_optimizer", "OPTIMIZERS", "OPTIMIZER_SPECS"}),
        (SPEC, "server/fedhds_server/optimizers/"),
    ),
    "PEFT method": Registry(
        frozenset(PEFT_SPECS),
        frozenset({"method", "peft", "peft_method", "PEFT_METHODS", "PEFT_SPECS"}),
        (SPEC, "client/fedhds_client/peft_methods/"),
    ),
    "codec": Registry(
        frozenset(CODECS),
        frozenset({"name", "codec", "wire_dtype", "CODECS"}),
        (SPEC, "common/fedhds/tensors/codecs.py"),
    ),
}
# Other things are called so, too: these count only beside something that holds a name of their kind.
COMMON_WORDS = {"none", "full", "random", "momentum", "float32", "bfloat16", "float16"}


def named_variants(tree: ast.AST, path: str) -> list[str]:
    """Where code that does not belong to a registry asks for one of its names."""
    found = []
    for line, words, subjects in comparisons(tree):
        for kind, registry in REGISTRIES.items():
            named = words & registry.names
            if (
                named
                and (named - COMMON_WORDS or subjects & registry.subjects)
                and not path.startswith(registry.places)
            ):
                found.append(f"{path}:{line} asks for the {kind} {', '.join(sorted(named))}")
    return found


def comparisons(tree: ast.AST) -> Iterator[tuple[int, set[str], set[str]]]:
    """Line, constant texts and identifiers of all that compares texts or looks something up by one."""
    for node in ast.walk(tree):
        match node:
            case ast.Compare():
                yield node.lineno, texts(node), identifiers(node.left, *node.comparators)
            case ast.Match():
                for case in node.cases:
                    yield case.pattern.lineno, texts(case.pattern), identifiers(node.subject, case.pattern)
            case ast.Subscript(value=value, slice=ast.Constant() as key) if "Literal" not in identifiers(value):
                yield node.lineno, texts(key), identifiers(value)
            case ast.Call(func=ast.Attribute(value=value, attr="get" | "pop"), args=[ast.Constant() as key, *_]):
                yield node.lineno, texts(key), identifiers(value)
            case ast.Dict(keys=keys) if len(words := set().union(*(texts(key) for key in keys if key))) > 1:
                # A table by name; what only has a key of such a name is none.
                named = [words & registry.names for registry in REGISTRIES.values()]
                yield node.lineno, set().union(*(names for names in named if len(names) > 1)), set()


def texts(node: ast.AST) -> set[str]:
    """All constant texts in an expression or a pattern."""
    constants = [inner.value for inner in ast.walk(node) if isinstance(inner, ast.Constant)]
    return {value for value in constants if isinstance(value, str)}


def identifiers(*nodes: ast.AST) -> set[str]:
    """What the operands are called at their end: `strategy` and `name` of (strategy, spec.name)."""
    found = set()
    for node in nodes:
        match node:
            case ast.Name(id=name) | ast.Attribute(attr=name):
                found.add(name)
            case ast.Subscript(slice=ast.Constant(value=str(name))):
                found.add(name)
            case ast.MatchClass(kwd_attrs=names):
                found.update(names)
            case ast.Tuple(elts=inner) | ast.MatchSequence(patterns=inner):
                found |= identifiers(*inner)
    return found


def test_only_its_registry_knows_a_variant_by_name() -> None:
    found = [fault for module in modules().values() for fault in named_variants(module.tree, module.path)]
    assert not found, "ask the variant's specification instead:\n" + "\n".join(found)


@pytest.mark.parametrize(
    "code",
    [
        "spec.selection.strategy.name == 'full'",
        "strategy in ('random', 'other')",
        "spec['name'] != 'none'",
        "anything == 'fedhds-aligned'",
        "match spec.peft.method:\n    case 'lora': pass",
        "match spec:\n    case Spec(optimizer='none'): pass",
        "match codec, x:\n    case 'float16', _: pass",
        "{'fedhds': 1, 'federated-kmeans': 2}[x]",
        "CODECS['float32']",
        "sizes['int8']",
        "STRATEGIES.get('full')",
        "'fedavg' in names",
    ],
)
def test_a_comparison_of_names_is_found(code: str) -> None:
    assert named_variants(ast.parse(code), "server/fedhds_server/app.py")


@pytest.mark.parametrize(
    "code",
    [
        "dtype == 'float32'",
        "reduction == 'none'",
        "coreset.WhichOneof('rows') == 'random'",
        "kind: Literal['full', 'fedhds'] = 'full'",
        "facts = {'fedhds': version, 'files': files}",
        "STRATEGIES[spec.name]",
    ],
)
def test_what_only_looks_like_a_comparison_of_names_is_not(code: str) -> None:
    assert not named_variants(ast.parse(code), "server/fedhds_server/app.py")


# What is in every file.


def everything() -> list[Module]:
    """The packages, the benchmarks and the demo."""
    return [*modules().values(), *modules("benchmarks", "demo").values()]


def test_no_module_is_longer_than_one_concept() -> None:
    long = {module.path: count for module in everything() if (count := module.text.count("\n")) > MAX_LINES}
    assert not long, f"more than {MAX_LINES} lines, which are two concepts that have not been told apart: {long}"


def test_nothing_is_read_that_could_run_code() -> None:
    for module in everything():
        assert not imported(module, ["pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"], for_types=False)
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                where = f"{module.path}:{node.lineno}"
                assert ast.unparse(node.func) != "torch.load" or given.get("weights_only") == "True", where
                assert given.get("allow_pickle", "False") == "False", where


# ARCHITECTURE.md


def test_the_map_names_every_module_and_nothing_else() -> None:
    [tree] = re.findall(r"^## The house\n+```\n(.*?)^```", ARCHITECTURE, flags=re.MULTILINE | re.DOTALL)
    there = {
        module.path
        for module in modules().values()
        if not module.path.endswith("/__init__.py") and "/migrations/" not in module.path
    }
    assert named_modules(tree) == there


def named_modules(tree: str) -> set[str]:
    """The paths of the files NAME.py in a tree of indented lines; a line that begins with NAME/ opens a folder."""
    folders: list[tuple[int, str]] = []
    found: list[str] = []
    for line in tree.splitlines():
        depth, first = len(line) - len(line.lstrip()), line.split()[0]
        while folders and folders[-1][0] >= depth:
            folders.pop()
        if first.endswith("/"):
            folders.append((depth, first))
        found += ["".join(folder for _, folder in folders) + name for name in re.findall(r"\b\w+\.py\b", line)]
    assert len(found) == len(set(found))
    return {path for path in found if path.startswith(tuple(f"{folder}/" for folder in PACKAGES.values()))}


def test_the_map_names_only_what_is_there() -> None:
    named = re.findall(r"`((?:common|server|client|proto|tests|docs|demo|benchmarks)/[\w./-]*)`", ARCHITECTURE)
    assert len(named) > 20
    for path in named:
        assert (ROOT / path).exists(), path


def test_the_drawing_of_the_state_machine_has_every_phase() -> None:
    [drawing] = re.findall(r"^```mermaid\nstateDiagram-v2\n(.*?)^```", ARCHITECTURE, flags=re.MULTILINE | re.DOTALL)
    assert set(Phase) <= set(re.findall(r"\w+", drawing))
