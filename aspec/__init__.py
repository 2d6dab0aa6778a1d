"""aspec runs language models that do not fit in device memory: weights stream while a draft speculates.

import aspec
print(aspec.generate("def main():", max_new_tokens=64).text)          # the embedded demo pair

with aspec.LLM(target="org/big", draft="org/small", device_memory="8GiB") as llm:
    print(llm.chat("Why is the sky blue?", temperature=0.6).text)

async with aspec.open_engine(target="org/big", draft="org/small", device_memory="8GiB") as engine:
    async for piece in engine.stream("Once upon a time", aspec.SamplingParams(temperature=0.6)):
        print(piece.text, end="")
"""

from importlib import import_module
from typing import TYPE_CHECKING

from aspec.errors import AspecError, DeviceError, InternalError, UserError
from aspec.generation.grammar.grammar import Grammar
from aspec.generation.params import SamplingParams
from aspec.options import EngineOptions
from aspec.threads import wait_passively

if TYPE_CHECKING:
    from aspec.api import LLM, Result, generate
    from aspec.engine.engine import Engine, open_engine
    from aspec.generation.stats import Piece, RequestStats

__version__ = "0.1.0"

wait_passively()  # before anything here imports torch

__all__ = [
    "LLM",
    "AspecError",
    "DeviceError",
    "Engine",
    "EngineOptions",
    "Grammar",
    "InternalError",
    "Piece",
    "RequestStats",
    "Result",
    "SamplingParams",
    "UserError",
    "__version__",
    "generate",
    "open_engine",
]

_LATER = {  # imported on first use: torch and transformers take seconds
    "Engine": "aspec.engine.engine",
    "open_engine": "aspec.engine.engine",
    "LLM": "aspec.api",
    "generate": "aspec.api",
    "Result": "aspec.api",
    "Piece": "aspec.generation.stats",
    "RequestStats": "aspec.generation.stats",
}


def __getattr__(name: str) -> object:
    if name in _LATER:
        return getattr(import_module(_LATER[name]), name)
    raise AttributeError(f"module 'aspec' has no attribute {name!r}")
