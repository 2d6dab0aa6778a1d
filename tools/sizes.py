"""Sizes of files and functions: the longest ones, and an error where a limit is passed.

python tools/sizes.py
"""

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
DECLARATIONS = {"generate"}  # a command line's flags are its signature, however long


def main() -> None:
    """Print the longest and exit with 1 where a limit is passed."""
    files, functions = [], []
    for path in sorted([*(ROOT / "aspec").rglob("*.py"), *(ROOT / "tools").glob("*.py")]):
        text = path.read_text(encoding="utf-8")
        name = str(path.relative_to(ROOT))
        files.append((text.count("\n"), name))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name not in DECLARATIONS:
                functions.append(((node.end_lineno or node.lineno) - node.lineno + 1, f"{name}:{node.name}"))
    for label, found, limit in (("file", files, MAX_FILE_LINES), ("function", functions, MAX_FUNCTION_LINES)):
        longest = sorted(found, reverse=True)[:3]
        print(f"longest {label}s:", ", ".join(f"{name} {lines}" for lines, name in longest))
        if longest[0][0] > limit:
            sys.exit(f"a {label} passes {limit} lines: split it")
    print(f"{len(files)} files, {sum(lines for lines, _ in files)} lines")


if __name__ == "__main__":
    main()
