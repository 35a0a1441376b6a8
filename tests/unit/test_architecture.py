"""The rooms of the package: who may import whom. docs/architecture.md draws the same map."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "e2sad_jax"

# From low to high: a room imports from itself and from those before it.
ROOMS = (
    ("errors", "_streams", "_version", "_compile"),
    ("_io", "_arguments"),
    ("losses",),
    ("attacks",),
    ("defenses",),
    ("networks", "data", "distributed"),
    ("inference",),
    ("training",),
    ("evaluation",),
    ("reporting",),
    ("runs",),
    ("comparison", "export"),
    ("cli",),
    ("__main__",),
)
LEVEL = {room: level for level, rooms in enumerate(ROOMS) for room in rooms}


def modules(folder: pathlib.Path = PACKAGE) -> dict[str, pathlib.Path]:
    """Every module of the package, or of another folder, by its dotted name."""
    found = {}
    for path in folder.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def imports(tree: ast.AST, *, inside_functions: bool) -> set[str]:
    """Dotted names of this package's modules and their members that a module imports when it runs."""
    found: set[str] = set()
    for node in ast.iter_child_nodes(tree):
        if is_type_checking(node) or (isinstance(node, ast.FunctionDef) and not inside_functions):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        else:
            found |= imports(node, inside_functions=inside_functions)
    return {name for name in found if name.partition(".")[0] in ("e2sad_jax", "experiments", "benchmarks", "tests")}


def room_of(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_every_module_has_a_room():
    rooms = {room_of(name) for name in modules()} - {"", "py"}
    assert rooms == set(LEVEL)


def test_no_room_imports_a_higher_one():
    wrong = []
    for name, path in modules().items():
        if name == "e2sad_jax":
            continue
        for imported in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=True):
            own = imported.startswith("e2sad_jax.")
            if not own or (room_of(imported) != room_of(name) and LEVEL[room_of(imported)] >= LEVEL[room_of(name)]):
                wrong.append(f"{name} imports {imported}")
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("folder", ["e2sad_jax", "experiments", "benchmarks"])
def test_no_import_circles(folder):
    known = modules(ROOT / folder)

    def module_of(name: str) -> str:
        return name if name in known else name.rpartition(".")[0]

    graph = {
        name: {module_of(i) for i in imports(ast.parse(path.read_text(encoding="utf-8")), inside_functions=False)}
        - {name}
        for name, path in known.items()
    }
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            for other in sorted(graph.get(name, ())):
                visit(other, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("room", ["attacks", "defenses", "losses"])
def test_the_method_imports_jax_optax_and_numpy_alone(room):
    files = [PACKAGE / f"{room}.py"] if room == "losses" else sorted((PACKAGE / room).rglob("*.py"))
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                assert top in {"jax", "optax", "numpy", "e2sad_jax"} | set(sys.stdlib_module_names), f"{path}: {name}"


def test_import_is_light():
    code = (
        "import sys, e2sad_jax; assert 'jax' not in sys.modules\n"
        "from e2sad_jax import attacks, defenses, losses\n"
        "heavy = {'flax', 'orbax', 'matplotlib', 'tensorflow_datasets', 'absl.app', 'scipy.ndimage'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
