"""The house's own rules: import bands, the top level, what the policy may name, exports."""

import ast
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "aspec"


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
        if name.endswith("hf_compat"):
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
        if path.name not in ("cuda.py", "capture.py", "cuda_graphs.py", "devices.py", "registry.py"):
            assert "torch.cuda" not in text, path.name
