"""What ``aspec prepare`` does: write a checkpoint anew, laid out for streaming."""

import time

import torch

from aspec.cli.flags.planning import PrepareFlags
from aspec.cli.front.opening import fetching, status_line
from aspec.errors import WriteError
from aspec.io import hub
from aspec.io.fetching.fetch import Words
from aspec.models.formats.gguf.folder import folder_of
from aspec.observe.console import Console
from aspec.preparing.logits import NUM_TOKENS, LogitReader
from aspec.preparing.prepare import Design, Prepared, design, prepare
from aspec.units import format_bytes, format_rate

SEED = 1  # of the tokens whose logits are compared
ROUNDINGS = 32  # of the dtype at 1, by which logits of the same weights may differ


def prepare_to_console(flags: PrepareFlags, console: Console) -> None:
    """Write the checkpoint and tell how far it is. Raises AspecError; stopped, a further command continues."""
    assert flags.output is not None
    with fetching(console) as fetches:
        found = hub.resolve(str(flags.target), what="target", fetches=fetches)
    folder = folder_of(found) if found.is_file() else found
    made = design(folder, flags.bits, flags.group_size, published=flags.published)
    console.note(f"{flags.output}: {len(made.shards)} files, {format_bytes(made.nbytes)}{_quantised(made)}")
    words, begun_s = Words(), time.monotonic()
    try:
        with status_line(console) as show:
            written = prepare(made, flags.output, lambda done, total: show(words("prepare", done, total)))
    except KeyboardInterrupt:
        console.note(f"{flags.output} is not finished; to continue, run the same command again")
        raise
    console.note(_summary(written, time.monotonic() - begun_s))
    if flags.verify:
        console.note(verified(made, written))


def _quantised(made: Design) -> str:
    """What is quantised, and what stays, in words."""
    if (own := made.quantiser) is None:
        return ""
    before = made.source.checkpoint.nbytes
    return (
        f" instead of {format_bytes(before)}: {own.num_weights} matrices of the layers with {own.form.rounding.bits} "
        f"bits in groups of {own.group}; {format_bytes(before - own.nbytes)} of embeddings, head, norms and others stay"
    )


def _summary(written: Prepared, seconds: float) -> str:
    kept = f", {written.num_kept} of them found finished" if written.num_kept else ""
    rate = f", {format_rate(written.nbytes / seconds)}" if not written.num_kept and seconds > 0 else ""
    return (
        f"{written.folder}: {written.num_shards} files{kept}, {format_bytes(written.nbytes)}, written and read back in "
        f"{seconds:.1f} s{rate}"
    )


def verified(made: Design, written: Prepared) -> str:
    """The logits of both checkpoints in a sentence. Raises WriteError if they differ where all bytes are the same.

    A product can depend on where in memory its weights begin, so a rounding can on the place of a tensor in its file.
    """
    generator = torch.Generator().manual_seed(SEED)
    size = int(made.source.model.config.get_text_config().vocab_size)
    row = torch.randint(size, (NUM_TOKENS,), generator=generator).tolist()
    (expected,), (found,) = (LogitReader(folder).once([row]) for folder in (made.source.folder, written.folder))
    most = ROUNDINGS * torch.finfo(expected.dtype).eps
    before, after = (logits.float().log_softmax(-1) for logits in (expected, found))
    if not after.isfinite().all() or (made.quantiser is None and not torch.allclose(before, after, rtol=0, atol=most)):
        raise WriteError(
            f"{written.folder}: not verified: the logits of {NUM_TOKENS} tokens differ from the source's by up to "
            f"{float((before - after).abs().max()):.3g}. Please report this bug."
        )
    if made.quantiser is None:
        apart = float((before - after).abs().max())
        how = f"are the source's but for roundings of up to {apart:.2g}" if apart else "equal the source's"
        return f"verified: the logits of {NUM_TOKENS} tokens {how}"
    divergence = float((before.exp() * (before - after)).sum(-1).mean())
    same = float((before.argmax(-1) == after.argmax(-1)).float().mean())
    return (
        f"verified: over {NUM_TOKENS} random tokens the logits diverge from the source's by {divergence:.4f} nats a "
        f"token (KL); the likeliest token is the same at {100 * same:.0f} % of them"
    )
