"""For tests of formats with packed integers: stored tensors of any bits, and what they mean, value by value."""

import torch

from aspec.models.formats.integers.packed_ints import num_words

AWQ_COLUMNS = (0, 2, 4, 6, 1, 3, 5, 7)  # of a word, by nibble


def any_words(*shape):
    return torch.randint(-(2**31), 2**31, shape, dtype=torch.int64).int()


def values_of(words, bits, count):
    """The first values of every row: value i is the bits from ``bits * i`` on, low bits first."""
    stored = words.long() & 0xFFFFFFFF
    found = []
    for value in range(count):
        word, shift = divmod(value * bits, 32)
        number = stored[:, word] >> shift
        if shift + bits > 32:
            number = number | stored[:, word + 1] << (32 - shift)
        found.append(number & (1 << bits) - 1)
    return torch.stack(found, 1)


def packed(values, bits):
    """The words of rows of values."""
    words = torch.zeros(values.shape[0], num_words(values.shape[1], bits), dtype=torch.int64)
    for value in range(values.shape[1]):
        word, shift = divmod(value * bits, 32)
        words[:, word] |= values[:, value].long() << shift & 0xFFFFFFFF
        if shift + bits > 32:
            words[:, word + 1] |= values[:, value].long() >> (32 - shift)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def gptq(bits, rows, columns, size, dtype=torch.float16, reordered=False, module="m"):
    """The stored tensors of a module of GPTQ."""
    groups = 1 if size == -1 else columns // size
    index = torch.arange(columns, dtype=torch.int32) // (columns // groups)
    return {
        f"{module}.qweight": any_words(num_words(columns, bits), rows),
        f"{module}.qzeros": any_words(groups, num_words(rows, bits)),
        f"{module}.scales": (torch.randn(groups, rows) / 64).to(dtype),
        f"{module}.g_idx": index[torch.randperm(columns)] if reordered else index,
    }


def gptq_weight(tensors, bits, version, module="m"):
    """The weight [out, in] of a module of GPTQ, in the dtype of its scales."""
    words, zeros, scales, index = (tensors[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales", "g_idx"))
    rows, columns, index = scales.shape[1], len(index), index.long()
    if version == 1 and bits != 3:
        zeros = zeros + sum(1 << start for start in range(0, 32, bits))  # wraps
    zeros = values_of(zeros, bits, rows)
    if version == 1 and bits == 3:
        zeros = zeros + 1 & 7
    numbers = values_of(words.t(), bits, columns).t()
    return ((numbers - zeros[index]) * scales[index]).t()


def awq(rows, columns, size, dtype=torch.float16, module="m"):
    """The stored tensors of a module of AWQ."""
    groups = 1 if size == -1 else columns // size
    return {
        f"{module}.qweight": any_words(columns, rows // 8),
        f"{module}.qzeros": any_words(groups, rows // 8),
        f"{module}.scales": (torch.randn(groups, rows) / 64).to(dtype),
    }


def awq_weight(tensors, module="m"):
    """The weight [out, in] of a module of AWQ, in the dtype of its scales."""
    words, zeros, scales = (tensors[f"{module}.{end}"] for end in ("qweight", "qzeros", "scales"))
    groups, rows = scales.shape
    order = torch.argsort(torch.tensor(AWQ_COLUMNS))
    numbers, zeros = (
        values_of(own, 4, rows).view(len(own), -1, 8)[..., order].flatten(1).view(groups, -1, rows)
        for own in (words, zeros)
    )
    return ((numbers - zeros) * scales.unsqueeze(1)).flatten(0, 1).t()
