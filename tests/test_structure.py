"""The house's own rules: import bands, the top level, what the policy may name, exports."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aspec"

BANDS = {
    0: "errors io.json_file requests plan params defaults options units tasks.op tasks.task tasks",
    1: "tasks.graph tasks.passes tasks.tree tasks.ngram calibration costs seats sizing rounds scheduler planner search "
    "tariff hardware races",
    2: "hf_compat io io.checkpoint io.mapping io.layout attention transfer kv families probe skeleton binding exact "
    "offload split model shapes sampling penalties text timelimit hub tasks.offers drafting lookup sequence runner "
    "stats timeline recorder snapshot summary responses intake journal screen graphs",
    3: "io.backend io.sim io.cpu io.device io.streams io.cuda io.events io.pinned io.lane io.disk io.memory io.rate "
    "io.host_memory io.ticker io.capture io.loop_mailbox io.settling executor virtual",
    4: "devices resolve needs simulation prices profile stopwatch growing measuring cache forecast planning design "
    "assembly loading links gauging streaming guarding engine console library_warnings monitor frame dashboard chrome "
    "verify",
    5: "api flags jobflags generation batch progress serving chat trace bench profiling explain cli __main__ __init__",
}
BAND = {name: band for band, names in BANDS.items() for name in names.split()}
MAY_LOOK_UP = {"io.layout", "io.mapping", "binding"}  # the size of a page
THREADS = {"io", "model", "virtual"}  # threads live in aspec/io; the others only ask which thread they are on


def modules():
    for path in sorted(PACKAGE.rglob("*.py")):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        yield name.removesuffix(".__init__"), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree, everywhere=True):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def band_of(module):
    name = module.removeprefix("aspec").removeprefix(".")
    while name and name not in BAND:
        name = name.rpartition(".")[0]
    return BAND.get(name)


@pytest.mark.parametrize(("name", "tree"), modules(), ids=lambda v: v if isinstance(v, str) else "")
def test_imports_go_downward(name, tree):
    assert name in BAND, f"{name} has no band: say in this test where it belongs"
    if BAND[name] == 5:
        return
    for module in imports(tree):
        if module.startswith("aspec.") and (band := band_of(module)) is not None:
            page = name in MAY_LOOK_UP and module.startswith("aspec.io.memory")
            protocol = name in ("graphs", "drafting") and module.startswith("aspec.io.device")
            assert band <= BAND[name] or page or protocol, f"{name} (band {BAND[name]}) imports {module} (band {band})"


@pytest.mark.parametrize("name", [n for n, band in BAND.items() if band <= 1])
def test_words_and_policy_know_no_tensor_no_clock_and_no_loop(name):
    trees = dict(modules())
    forbidden = {"torch", "asyncio", "time", "threading", "random", "numpy", "transformers"}
    assert not forbidden & {module.split(".")[0] for module in imports(trees[name])}


def test_maths_knows_no_loop_and_machinery_no_policy():
    for name, tree in modules():
        found = set(imports(tree))
        if BAND[name] == 2:
            assert "asyncio" not in found, name
        if BAND[name] == 3:
            assert not found & {"aspec.scheduler", "aspec.planner"}, name


def test_threads_are_made_in_io_only():
    for name, tree in modules():
        if "threading" in set(imports(tree)):
            assert name.split(".")[0] in THREADS, name


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
"""What is private in transformers, or has another name in another version of it."""


def test_what_transformers_may_change_is_named_in_one_module():
    for name, tree in modules():
        if name == "hf_compat":
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


def test_the_readme_tree_names_every_module():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, _ in modules():
        leaf = name.rpartition(".")[2]
        if leaf not in ("__init__", "__main__", "aspec", "io", "tasks"):
            assert f"{leaf}.py" in readme, f"README's tree lacks {leaf}.py"


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
        if path.name not in ("cuda.py", "capture.py", "devices.py"):
            assert "torch.cuda" not in text, path.name
