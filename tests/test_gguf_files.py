"""The files of a hub repository that are the model of one quantisation."""

import pytest

from aspec.errors import CheckpointError
from aspec.io.fetching.gguf_files import choose_files, label_of

REPOSITORY = [
    "README.md",
    "config.json",
    "Llama-3.2-1B-Instruct-Q4_K_M.gguf",
    "Llama-3.2-1B-Instruct-Q4_K_S.gguf",
    "Llama-3.2-1B-Instruct-IQ4_XS.gguf",
    "Llama-3.2-1B-Instruct-UD-Q2_K_XL.gguf",
    "Llama-3.2-1B-Instruct.Q8_0.gguf",
    "Llama-3.2-1B-Instruct-BF16-00001-of-00002.gguf",
    "Llama-3.2-1B-Instruct-BF16-00002-of-00002.gguf",
    "Q6_K/Llama-00001-of-00002.gguf",
    "Q6_K/Llama-00002-of-00002.gguf",
    "mmproj-F16.gguf",
    "imatrix_unsloth.gguf",
]


@pytest.mark.parametrize(
    ("asked", "files"),
    [
        ("Q4_K_M", [2]),
        ("q4_k_s", [3]),
        ("IQ4_XS", [4]),
        ("UD-Q2_K_XL", [5]),
        ("Q2_K_XL", [5]),
        ("Q8_0", [6]),
        ("bf16", [7, 8]),
        ("Q6_K", [9, 10]),
        ("llama-3.2-1b-instruct.q8_0", [6]),
        ("Llama-3.2-1B-Instruct-IQ4_XS.gguf", [4]),
    ],
)
def test_a_quantisation_names_its_files(asked, files):
    assert choose_files(reversed(REPOSITORY), asked) == [REPOSITORY[number] for number in files]


@pytest.mark.parametrize(
    ("names", "asked", "expected"),
    [
        (
            REPOSITORY,
            "F16",
            r"has no GGUF file of the quantisation F16: found BF16, IQ4_XS, Q4_K_M, .*Choose one of them",
        ),
        (["model.safetensors"], "Q8_0", "found none"),
        (
            ["a-Q8_0.gguf", "b-Q8_0.gguf"],
            "Q8_0",
            "has 2 GGUF models of the quantisation Q8_0: expected one, found a-Q8_0, b-Q8_0",
        ),
        (["a-Q8_0-00002-of-00003.gguf"], "Q8_0", "has 1 of the 3 files of a-Q8_0"),
    ],
)
def test_what_is_not_there_is_named(names, asked, expected):
    with pytest.raises(CheckpointError, match=expected) as caught:
        choose_files(names, asked)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("qwen2.5-0.5b-instruct-q4_0.gguf", "Q4_0"),
        ("gpt-oss-20b-mxfp4.gguf", "MXFP4"),
        ("gpt-oss-20b-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("phi-4-IQ3_XXS.gguf", "IQ3_XXS"),
        ("model-f16.gguf", "F16"),
        ("Q4-model.gguf", "Q4"),
        ("smollm2.gguf", None),
        ("SQ4_0x.gguf", None),
    ],
)
def test_labels(name, label):
    assert label_of(name) == label
