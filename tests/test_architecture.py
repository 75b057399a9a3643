"""The rules of the house, read from the source: who imports whom, what is installed, what no file may hold."""

import ast
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = {"robust_if": "robust_if", "attacks": "robust_if.attacks", "fairness": "robust_if.fairness", "evaluations": "robust_if.evaluations"}
MAY_IMPORT = {
    "robust_if": {"robust_if"},
    "attacks": {"robust_if", "attacks"},
    "fairness": {"robust_if", "fairness"},
    "evaluations": set(ROOMS),
}
#: The command line and its parts: they put everything together, so they may import every room, and no other module may import them.
CLI, COMMANDS = "robust_if.cli", "robust_if.commands"

#: Inside the core a module imports nothing from a later row; modules that are not named here only have to avoid cycles.
ROWS = (("task",), ("data", "scores"), ("gradients",), ("targets", "preconditioners"), ("estimators",))


@cache
def modules() -> dict[str, Path]:
    """Every module of the four rooms by its import name; the links in robust_if are not followed."""
    found = {}
    for folder, package in ROOMS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            inner = path.relative_to(ROOT / folder).with_suffix("").parts
            found[".".join([package, *inner]).removesuffix(".__init__")] = path
    return found


def room(module: str) -> str:
    second = [*module.split("."), ""][1]
    return second if second in ROOMS else "robust_if"


def is_command(module: str) -> bool:
    """Whether the module belongs to the command line."""
    return module == CLI or f"{module}.".startswith(f"{COMMANDS}.")


def imported(name: str, tree: ast.AST, *, only_on_loading: bool = False) -> Iterator[str]:
    """What the module ``name`` imports by full name; ``only_on_loading`` leaves out functions and TYPE_CHECKING."""
    for node in loaded(tree) if only_on_loading else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            is_package = name in modules() and modules()[name].name == "__init__.py"
            parents = name.split(".")[: len(name.split(".")) + is_package - node.level] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" if f"{base}.{alias.name}" in modules() else base for alias in node.names)


def loaded(tree: ast.AST) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        deferred = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if not deferred and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from loaded(node)


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(modules()[module].read_text(encoding="utf-8"))


def own_imports(module: str, **kwargs: bool) -> set[str]:
    return {name for name in imported(module, tree(module), **kwargs) if name in modules()}


@pytest.mark.parametrize("module", modules())
def test_a_room_imports_only_the_rooms_it_may(module: str) -> None:
    if is_command(module):
        return
    strangers = {name for name in own_imports(module) if room(name) not in MAY_IMPORT[room(module)] or is_command(name)}
    assert not strangers, f"{module} must not import {sorted(strangers)}"


def test_there_is_no_import_cycle() -> None:
    graph = {module: own_imports(module, only_on_loading=True) for module in modules()}
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, "import cycle: " + " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for name in sorted(graph[module]):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_the_core_is_built_upwards() -> None:
    level = {f"robust_if.{name}": k for k, row in enumerate(ROWS) for name in row}

    def at(module: str) -> int | None:
        return level.get(".".join(module.split(".")[:2]))

    for module in modules():
        for name in own_imports(module):
            here, there = at(module), at(name)
            assert here is None or there is None or there <= here, f"{module} imports {name}, which stands above it"


def test_decisions_know_only_scores() -> None:
    assert own_imports("robust_if.decisions") == {"robust_if.scores"}


#: What makes or holds poison: no estimator and no detector may know of it.
NAMES = ("poisoned", "labels", "backdoors", "triggers", "adaptive", "clean_label", "availability", "fairness")
POISONERS = {f"robust_if.attacks.{name}" for name in NAMES}


def blind(module: str) -> bool:
    """Whether the module scores samples and so must know neither the truth nor the attack: the core and the detectors to compare with."""
    return f"{module}.".startswith("robust_if.evaluations.detectors.") or (room(module) == "robust_if" and not is_command(module))


def reached(module: str) -> set[str]:
    """Every module that one imports, by any way."""
    found: set[str] = set()
    left = {module}
    while left:
        found |= left
        left = {name for each in left for name in own_imports(each)} - found
    return found - {module}


@pytest.mark.parametrize("module", [name for name in modules() if blind(name)])
def test_no_knowledge_of_an_attack_reaches_what_scores(module: str) -> None:
    assert not reached(module) & POISONERS


def test_every_poisoner_is_a_module_and_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(modules()) >= POISONERS
    module = "robust_if.evaluations.detectors.neighbours"
    fake = ast.parse("def estimate(self, job):\n    from robust_if.attacks import backdoors")
    monkeypatch.setattr(f"{__name__}.tree", lambda name: fake if name == module else ast.parse(modules()[name].read_text(encoding="utf-8")))
    assert "robust_if.attacks.backdoors" in reached(module) and "robust_if.attacks.poisoned" in reached(module)


def told(node: ast.AST) -> str | None:
    """The truth that a function ``score`` or ``estimate`` takes, or that a class with one of them, or what it is given (``Job``), holds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in ("score", "estimate"):
        taken = ast.unparse(node.args)
    elif isinstance(node, ast.ClassDef) and (node.name == "Job" or any(getattr(each, "name", "") in ("score", "estimate") for each in node.body)):
        taken = "; ".join(ast.unparse(each) for each in node.body if isinstance(each, ast.AnnAssign))
    else:
        return None
    found = re.search(r"Poisoned|\b\w*(?:mask|truth|poison|mislabelled)\w*\b", taken)
    return found and found.group()


def test_no_estimator_is_told_the_truth() -> None:
    seen = 0
    for module in [name for name in modules() if blind(name) or name.startswith("robust_if.evaluations")]:
        for node in ast.walk(tree(module)):
            # the command of the pipeline that is called so takes files; it is no estimator
            if module != "robust_if.evaluations.scoring":
                assert told(node) is None, f"{module}: {getattr(node, 'name', '')} takes {told(node)}"
                seen += isinstance(node, ast.FunctionDef) and node.name == "estimate"
    assert seen > 20


@pytest.mark.parametrize(
    "source",
    [
        "def estimate(self, job, mask): ...",
        "def score(self, task, train: Poisoned[Samples]): ...",
        "class Job:\n    truth: Array",
        "class Oracle(Estimator):\n    mislabelled: Array\n    def estimate(self, job): ...",
    ],
)
def test_an_estimator_that_is_told_the_truth_is_recognised(source: str) -> None:
    assert any(told(node) for node in ast.walk(ast.parse(source)))


def test_the_reader_of_imports_sees_what_it_should(monkeypatch: pytest.MonkeyPatch) -> None:
    source = "import attacks.labels\nfrom ..scores import Scores\nif TYPE_CHECKING:\n    import a\ndef f():\n    from robust_if import cli\n"
    name = "robust_if.estimators.base"
    expected = {"attacks.labels", "robust_if.scores", "a"}
    monkeypatch.setitem(modules(), CLI, ROOT / "robust_if" / "cli.py")
    assert set(imported(name, ast.parse(source))) == expected | {CLI}
    assert set(imported(name, ast.parse(source), only_on_loading=True)) == expected - {"a"}


def test_every_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {name for name, path in modules().items() if path.name == "__init__.py"}
    assert set(settings["packages"]) == folders
    assert settings["package-dir"] == {package: folder for folder, package in ROOMS.items()}


def test_every_other_file_of_a_package_is_installed() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    patterns = [(modules()[package].parent, pattern) for package, patterns in settings["package-data"].items() for pattern in patterns]
    listed = {path for folder, pattern in patterns for path in folder.glob(pattern)}
    inside = {path for path in project_files() if path.relative_to(ROOT).parts[0] in ROOMS and path.suffix != ".py"}
    assert listed == inside


@cache
def project_files() -> list[Path]:
    """The files of the project, those not yet committed among them."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("not a git checkout")
    paths = (ROOT / name for name in listed.split("\0") if name)
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def sources() -> list[Path]:
    return [path for path in project_files() if path.suffix == ".py"]


def test_no_file_names_a_place_on_one_machine() -> None:
    pattern = re.compile(r"(?<![\w.])/(?:work|home|root|Users)/|find[-_]links", re.IGNORECASE)
    for path in project_files():
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found = pattern.search(text)
        assert not found, f"{path.relative_to(ROOT)} holds {found.group()!r}"


def test_the_bare_rooms_and_torchvision_are_never_imported() -> None:
    for path in sources():
        roots = {name.split(".")[0] for name in imported("", ast.parse(path.read_text(encoding="utf-8")))}
        banned = roots & {"attacks", "fairness", "evaluations", "torchvision"}
        assert not banned, f"{path.relative_to(ROOT)} imports {banned}"


def unsafe(node: ast.AST) -> str | None:
    """Why this piece of source could run somebody else's code, if it could."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        roots = {name.split(".")[0] for name in imported("", ast.Module([node], []))}
        return next((f"imports {name}" for name in sorted(roots & {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "joblib"})), None)
    if not isinstance(node, ast.Call):
        return None
    name = ast.unparse(node.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
    if name in {"eval", "exec", "os.system", "os.popen"}:
        return f"calls {name}"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "calls torch.load without weights_only=True"
    return next((f"passes {key}=True" for key in ("shell", "allow_pickle", "trust_remote_code") if given.get(key) == "True"), None)


def test_nothing_runs_code_from_data() -> None:
    for path in sources():
        if path.is_relative_to(ROOT / "tests"):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            reason = unsafe(node)
            assert reason is None, f"{path.relative_to(ROOT)}:{node.lineno} {reason}"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from joblib import load",
        "eval('1')",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "subprocess.run(command, shell=True)",
        "np.load(path, allow_pickle=True)",
    ],
)
def test_unsafe_source_is_recognised(source: str) -> None:
    assert any(unsafe(node) for node in ast.walk(ast.parse(source)))


def test_safe_source_is_let_through() -> None:
    source = "model.eval()\ntorch.load(path, weights_only=True)\nsubprocess.run([command])"
    assert not any(unsafe(node) for node in ast.walk(ast.parse(source)))
