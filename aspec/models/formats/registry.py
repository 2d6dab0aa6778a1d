"""The methods that aspec decodes: ``quant_method`` of a quantization_config -> the function that reads its settings."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType

from aspec.errors import CheckpointError, UnsupportedModelError, shown
from aspec.io.checkpoint import FETCH_AGAIN, Checkpoint, TensorRef
from aspec.io.hub import source_of
from aspec.io.json_file import read_json
from aspec.io.weight_format import REMEDY, quantisation
from aspec.models.formats import awq, bitsandbytes, compressed_tensors, fp8, gptq, mxfp4, nvfp4
from aspec.models.formats.gguf.folder import open_stored
from aspec.models.formats.int4 import prepared
from aspec.models.formats.packed import Format, StoredWeight

KEYS = ("quantization_config", "compression_config", "quantization")  # of config.json, old and new

MODELOPT_FILE = "hf_quant_config.json"

Reader = Callable[[Mapping[str, object], str], Format]
"""From the settings, and the file that they are from, for messages. Raises UnsupportedModelError."""

READERS: Mapping[str, Reader] = MappingProxyType(
    {
        prepared.METHOD: prepared.read,
        "awq": awq.read,
        "bitsandbytes": bitsandbytes.read,
        "compressed-tensors": compressed_tensors.read,
        "fbgemm_fp8": fp8.read_fbgemm,
        "fp8": fp8.read,
        "gptq": gptq.read,
        "modelopt": nvfp4.read,
        "mxfp4": mxfp4.read,
    }
)


def read_format(config: Mapping[str, object], where: str) -> Format | None:
    """The method of a config.json; None if its weights are not quantised.

    Raises UnsupportedModelError, with the name of the method or field, if aspec does not know it.
    """
    settings = _settings(config)
    if settings is None:
        return None
    method = _method(settings) if isinstance(settings, Mapping) else None
    reader = READERS.get(method) if isinstance(method, str) else None
    if not isinstance(settings, Mapping) or reader is None:
        raise UnsupportedModelError(
            f"{where}: the weights are quantised with {shown(quantisation({KEYS[0]: settings}))}: expected a "
            f"quant_method among {', '.join(READERS)}, found {shown(method)}. {REMEDY}"
        )
    return reader(settings, where)


def open_weights(folder: Path, packing: Format | None) -> tuple[Checkpoint, Mapping[str, StoredWeight]]:
    """The checkpoint of a folder and its weights, which a GGUF file may hold. Raises CheckpointError."""
    if (source := source_of(folder)) is not None:
        checkpoint, packed = open_stored(folder, source)
        used = {ref.name for weight in packed for ref in weight.refs}
        plain = {name: ref for name, ref in checkpoint.tensors.items() if name not in used}
        return checkpoint, {**plain, **{weight.name: weight for weight in packed}}
    checkpoint = Checkpoint.open(folder)
    return checkpoint, stored_weights(checkpoint.tensors, packing)


def format_of(folder: Path, config: Mapping[str, object]) -> Format | None:
    """The method of the weights in ``folder``, whose config.json holds ``config``; None if they are not quantised.

    ModelOpt also writes its settings to a file of its own, alone in old versions. Raises as ``read_format`` does, and
    CheckpointError if that file is damaged.
    """
    path = folder / MODELOPT_FILE
    if _settings(config) is not None or not path.is_file():
        return read_format(config, str(folder / "config.json"))
    values = read_json(path, "the settings of ModelOpt", error=CheckpointError)
    if not isinstance(values, dict) or not isinstance(values.get("quantization"), dict):
        raise CheckpointError(f"{path}: expected a JSON object with quantization, found none. {FETCH_AGAIN}")
    if not values["quantization"].get("quant_algo"):
        return None
    return read_format({KEYS[0]: {"quant_method": "modelopt", **values}}, str(path))


def _settings(config: Mapping[str, object]) -> object:
    """The settings of a config.json, or of its text model; None if there are none."""
    text = config.get("text_config")
    levels = (config, text) if isinstance(text, Mapping) else (config,)
    return next((value for level in levels for key in KEYS if (value := level.get(key))), None)


def stored_weights(tensors: Mapping[str, TensorRef], packing: Format | None) -> Mapping[str, StoredWeight]:
    """All weights of a checkpoint by name, packed ones in place of the tensors that they are made from.

    Raises CheckpointError for tensors that do not fit the method, and for a weight that is stored packed and plain.
    """
    packed = [] if packing is None else packing.weights(tensors)
    used = {ref.name for weight in packed for ref in weight.refs}
    plain = {name: ref for name, ref in tensors.items() if name not in used}
    if twice := next((weight for weight in packed if weight.name in plain), None):
        raise CheckpointError(
            f"{plain[twice.name].file}: {shown(twice.name)} is stored twice: expected it packed ({twice.method}) or "
            f"plain, found both. {FETCH_AGAIN}"
        )
    return {**plain, **{weight.name: weight for weight in packed}}


def _method(settings: Mapping[str, object]) -> object:
    """The method's name; settings of old versions of bitsandbytes have none."""
    if settings.get("load_in_4bit") is True or settings.get("load_in_8bit") is True:
        return "bitsandbytes"
    return settings.get("quant_method")
