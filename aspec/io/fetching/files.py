"""Which files of a repository make a checkpoint."""

# A checkpoint is the files at the top of its repository; its folders hold other formats (original/, onnx/).
WANTED = [
    "*.safetensors",
    "*.json",
    "tokenizer*",
    "merges.txt",
    "vocab.*",
    "*.model",
    "*.tiktoken",
    "*.jinja",
]
UNWANTED = ["*/*", "consolidated*", "*.bin", "*.gguf", "*.bin.index.json"]
WEIGHTS = ".safetensors"
SIZES = "headers.only"  # in a folder whose shards are only headers: JSON, name of a shard -> bytes of the whole shard


def listing(names: list[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:6]) + (", ..." if len(names) > 6 else "") if names else "nothing"
