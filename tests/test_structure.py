"""The house's own rules: the order of folders, what the policy may name, the top level, exports, README's tree."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aspec"

ORDER = (
    ("errors",),
    ("units", "threads", "expert_plan"),
    ("plan",),
    ("options",),
    ("io",),
    ("tasks", "models"),
    ("backends", "generation", "observe", "preparing"),
    ("speculation",),
    ("profiling",),
    ("planning",),
    ("engine",),
    ("api",),
    ("serving",),
    ("cli",),
    ("__init__", "__main__"),
)
"""Folders and modules of the top, ground first: each imports only what lies on a floor below it."""

FLOOR = {name: floor for floor, names in enumerate(ORDER) for name in names}
WORDS = ("errors", "units", "threads", "expert_plan", "plan", "tasks.op", "tasks.task")
POLICY = (
    *(f"tasks.{name}" for name in ("graph", "passes", "scheduler", "group", "rows", "draft_sizing", "cost_model")),
    *("tasks.experts.cache", "tasks.experts.stream"),
    *("tasks.layers.buffers", "tasks.layers.weights", "tasks.layers.split"),
    *("tasks.races", "speculation.tree", "speculation.ngram_index", "speculation.calibration"),
    *("profiling.hardware", "profiling.cost_tables", "planning.placement", "planning.search"),
)
TORCH_FREE = ("tasks", "observe", "serving")  # folders
THREADS = ("io", "backends", "observe.ticker", "cli.front.stuck_main")  # that hold threads
ASK_FOR_THREADS = (
    "models.exact.known_recipes",
    "models.exact.panels",
    "models.exact.products",
    "models.experts.pause",
    "models.experts.replay",
    "models.frame",
    "planning.virtual_time",
)  # that only ask which thread they are on, or let one of several wait
MOST_FILES = 14


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name, ast.parse(path.read_text(encoding="utf-8"))


MODULES = dict(modules())


def imports(tree):
    """Every module that is imported, and every name from one, as dotted paths."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(name):
    """The modules of aspec that a module imports, as they are called here."""
    found = (module.removeprefix("aspec.") for module in imports(MODULES[name]) if module.startswith("aspec."))
    return {module for module in found if module in MODULES}


def folder(name):
    return name.split(".")[0]


def test_every_module_has_a_floor():
    assert {folder(name) for name in MODULES} == set(FLOOR)


@pytest.mark.parametrize("name", MODULES)
def test_imports_go_downward(name):
    for module in own_imports(name):
        within = folder(module) == folder(name)
        assert within or FLOOR[folder(module)] < FLOOR[folder(name)], f"{name} imports {module}"


def test_no_circle_of_imports():
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path[path.index(name) :], name])
        if name not in done:
            path.append(name)
            for module in own_imports(name):
                visit(module)
            path.pop()
            done.add(name)

    for name in MODULES:
        visit(name)


@pytest.mark.parametrize("name", [*WORDS, *POLICY])
def test_words_and_policy_know_no_tensor_no_clock_and_no_loop(name):
    forbidden = {"torch", "asyncio", "time", "threading", "random", "numpy", "transformers"}
    assert not forbidden & {module.split(".")[0] for module in imports(MODULES[name])}


@pytest.mark.parametrize("name", [name for name in MODULES if folder(name) in TORCH_FREE])
def test_what_needs_no_tensor_imports_no_torch(name):
    assert not {"torch", "transformers"} & {module.split(".")[0] for module in imports(MODULES[name])}


def test_maths_knows_no_loop():
    for name, tree in MODULES.items():
        if folder(name) in ("models", "generation", "speculation"):
            assert "asyncio" not in set(imports(tree)), name


def test_threads_are_made_in_few_places():
    for name, tree in MODULES.items():
        if "threading" in set(imports(tree)):
            allowed = folder(name) in THREADS or name in (*THREADS, *ASK_FOR_THREADS)
            assert allowed, name


@pytest.mark.parametrize(
    "path", [p for p in sorted(PACKAGE.iterdir()) if (p / "__init__.py").exists()], ids=lambda path: path.name
)
def test_a_folder_is_a_question_and_not_a_hall(path):
    own = ast.parse((path / "__init__.py").read_text(encoding="utf-8"))
    question = ast.get_docstring(own)
    assert question is not None
    assert "\n" not in question
    assert len(own.body) == 1, "what a folder offers stands in its modules"
    assert len(list(path.glob("*.py"))) <= MOST_FILES
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"  {path.name}/ " in readme, "README's tree says what it is for"


HF_NAMES = {
    "_attn_implementation",
    "_experts_implementation",
    "_get_dtype_plan",
    "_is_hf_initialized",
    "_is_stateful",
    "_keys_to_ignore_on_load_unexpected",
    "_model_mapping",
    "_supports_attention_backend",
    "all_tied_weights_keys",
    "initialize_weights",
    "past_key_values",
}
"""Private, renamed or moving names of transformers."""


def test_what_transformers_may_change_is_named_in_one_module():
    for name, tree in MODULES.items():
        if name == "models.hf_compat":
            continue
        nodes = list(ast.walk(tree))
        used = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
        used |= {node.arg for node in nodes if isinstance(node, ast.keyword)}
        used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        assert not used & HF_NAMES, name
        moving = {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
        moving |= {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
        assert not {module for module in moving if module and module.startswith("transformers.")}, name


def test_the_top_level_is_what_was_agreed():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked}
    assert {name for name in top if not name.startswith(".")} <= {
        "aspec",
        "tools",
        "tests",
        "pyproject.toml",
        "README.md",
        "LICENSE",
    }


def test_the_package_data_is_small():
    assert sum(f.stat().st_size for f in (PACKAGE / "demo").rglob("*") if f.is_file()) <= 20e6


def test_every_export_exists():
    import aspec

    for name in aspec.__all__:
        assert getattr(aspec, name) is not None
    with pytest.raises(AttributeError):
        aspec.nonsense  # noqa: B018 - the access is the test


FORBIDDEN = {
    "cuda.synchronize": "waits for every stream of the device",
    "empty_cache": "flushes the allocator, and waits for the device",
    "ipc_collect": "likewise",
    "memory_summary": "stops the allocator",
    ".query()": "polls, and holds the interpreter's lock",
    "launch_host_func": "calls Python inside the driver",
    "cudaLaunchHostFunc": "likewise",
    "cudaStreamAddCallback": "likewise",
    "torch.cuda.graph(": "synchronises and flushes before it captures",
}


def test_no_module_waits_for_a_whole_device_flushes_polls_or_calls_back():
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8").replace("_cuda.", "cuda.")
        found = [f"{call}: {why}" for call, why in FORBIDDEN.items() if call in text]
        assert not found, f"{path.name}: {found}"


def test_only_the_files_of_devices_ask_torch_for_one():
    for path in sorted(PACKAGE.rglob("*.py")):
        text = path.read_text(encoding="utf-8")
        if path.name not in ("cuda.py", "cuda_graphs.py", "registry.py"):
            assert "torch.cuda" not in text, path.name
