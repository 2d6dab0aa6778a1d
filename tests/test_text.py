"""Tokenizers, vocabularies of a pair, and text that streams without half a character or half a stop string."""

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer
from transformers import PreTrainedTokenizerFast

from aspec.errors import CheckpointError, PromptError, VocabularyError
from aspec.generation.text.tokenizer import MAX_WINDOW, TextStream, Tokenizer, check_tokenizer, check_vocabulary

SPECIAL = ["<s>", "</s>"]
CHAT = "{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no ' + m.role) }}{% endif %}"
CHAT += "[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
FIXED = settings(
    deadline=None, max_examples=150, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def byte_level(words=()) -> RustTokenizer:
    """256 bytes, and merged tokens that begin and end anywhere inside characters."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: index for index, char in enumerate(alphabet)}
    merges = []
    for word in words:
        spelled = [pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(word)[0][0]][0]
        for end in range(2, len(spelled) + 1):
            pair, whole = (spelled[: end - 1], spelled[end - 1]), spelled[:end]
            if whole not in vocab:
                vocab[whole] = len(vocab)
                merges.append(pair)
    tokenizer = RustTokenizer(models.BPE(vocab=vocab, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def byte_fallback() -> RustTokenizer:
    """As sentencepiece models of the Llama 2 kind decode: a leading space goes, unknown characters are bytes."""
    words = ["▁", "▁Hello", "▁wor", "ld", "a", "b", "▁▁", ".", "é", "\ufffd"]
    words += [f"<0x{byte:02X}>" for byte in range(256)]
    tokenizer = RustTokenizer(models.BPE(vocab={w: i for i, w in enumerate(words)}, merges=[], byte_fallback=True))
    strip = [decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), *strip])
    return tokenizer


def metaspace() -> RustTokenizer:
    """As T5 and its like decode."""
    words = ["▁", "▁Hello", "▁wor", "ld", "a", "b", ".", "▁▁a", "é"]
    tokenizer = RustTokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="a"))
    tokenizer.decoder = decoders.Metaspace()
    return tokenizer


STYLES = {
    "byte_level": lambda: byte_level(["日本", "é ", "the cat", "😀😀"]),
    "byte_fallback": byte_fallback,
    "metaspace": metaspace,
}


def save(folder: Path, rust: RustTokenizer, *, special=SPECIAL, added=(), **options) -> Path:
    rust.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    rust.add_tokens([AddedToken(token, normalized=False) for token in added])
    PreTrainedTokenizerFast(tokenizer_object=rust, **options).save_pretrained(folder)
    return folder


def load(folder: Path, *words, **options) -> Tokenizer:
    return Tokenizer.load(save(folder, byte_level(words), **options))


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, tmp_path_factory):
    return Tokenizer.load(save(tmp_path_factory.mktemp(request.param), STYLES[request.param]()))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Tokenizer.load(save(tmp_path_factory.mktemp("plain"), STYLES["byte_level"]()))


def cut(text: str, stops) -> str:
    """``text`` before the stop string that is complete first."""
    ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
    return text[: min(ends)[1]] if ends else text


def run(stream: TextStream, tokens, sizes) -> list[str]:
    pieces, at, sizes = [], 0, list(sizes) or [1]
    while at < len(tokens):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(stream.push(tokens[at : at + size]))
        at += size
    return [*pieces, stream.finish()]


# -- streams -----------------------------------------------------------------------------------------------


@FIXED
@given(data=st.data())
def test_pieces_add_up_to_the_decoded_whole(tokenizer, data):
    last = max(tokenizer.vocab()) + 3  # a model is padded: ids beyond the tokenizer's are drawn as well
    interesting = st.sampled_from(tokenizer.encode("日本😀é the cat") or [0])
    tokens = data.draw(st.lists(st.integers(0, last) | interesting, max_size=60))
    sizes = data.draw(st.lists(st.integers(1, 5), max_size=4))
    assert "".join(run(TextStream(tokenizer), tokens, sizes)) == tokenizer.decode(tokens)


@FIXED
@given(data=st.data())
def test_stop_strings_depend_on_tokens_alone(tokenizer, data):
    tokens = data.draw(st.lists(st.integers(0, 11) | st.integers(64, 70), max_size=40))
    whole = tokenizer.decode(tokens)
    some = st.text("abH. é", min_size=1, max_size=3)
    if whole:
        some |= st.tuples(st.integers(0, len(whole) - 1), st.integers(1, 6)).map(lambda t: whole[t[0] :][: t[1]])
    stops = tuple(data.draw(st.lists(some, min_size=1, max_size=3)))
    stream = TextStream(tokenizer, stops)
    text = "".join(run(stream, tokens, data.draw(st.lists(st.integers(1, 5), max_size=4))))
    assert text == cut(whole, stops)
    assert stream.stopped == any(stop in whole for stop in stops)


def shown_before(tokens, stops, special=SPECIAL):
    """The text before the stop string that is complete first, of tokens that are characters or special ones.

    Stop strings are searched in the text with and without special tokens, and cut none.
    """
    spelled, shown, borders, views = "", [], {0}, ([], [])
    for token in tokens:
        for char in token:
            views[0].append((char, len(spelled)))
            if token not in special:
                views[1].append((char, len(spelled)))
                shown.append(len(spelled))
            spelled += char
        borders.add(len(spelled))
    found = []
    for view in views:
        text = "".join(char for char, _ in view)
        for stop in stops:
            for at in range(len(text) - len(stop) + 1):
                begin, end = view[at][1], view[at + len(stop) - 1][1] + 1
                if text.startswith(stop, at) and {begin, end} <= borders:
                    found.append((end, begin))
    until = min(found)[1] if found else len(spelled)
    return "".join(spelled[at] for at in shown if at < until), bool(found)


@FIXED
@given(data=st.data())
def test_stop_strings_may_hold_special_tokens(plain, data):
    names = {name: index for index, name in plain.vocab().items()}
    pieces = st.sampled_from(["<s>", "</s>", "a", "b", "<", "s", ">"])
    tokens = data.draw(st.lists(pieces, max_size=20))
    stops = tuple(data.draw(st.lists(st.lists(pieces, min_size=1, max_size=3).map("".join), min_size=1, max_size=3)))
    stream = TextStream(plain, stops)
    found = run(stream, [names[token] for token in tokens], data.draw(st.lists(st.integers(1, 5), max_size=4)))
    assert ("".join(found), stream.stopped) == shown_before(tokens, stops)


@pytest.mark.parametrize(
    ("tokens", "stop", "pieces"),
    [
        (["a", "b", "</s>", "a"], "</s>", ["a", "b", "", "", ""]),
        (["a", "</s>", "b", "b"], "</s>b", ["a", "", "", "", ""]),
        (["a", "</s>", "b", "a"], "</s>bb", ["a", "", "", "ba", ""]),
        (["a", "b", "<s>", "</s>"], "b<s></s>", ["a", "", "", "", ""]),
        (["a", "b", "<s>"], "b<s></s>", ["a", "", "", "b"]),
        (["a", "</s>", "<s>", "b"], "ab", ["", "", "", "", ""]),
        (["a", "</s>", "b"], "/s", ["a", "", "b", ""]),
        (["Ã", "</s>"], "</s>", ["", "\ufffd", ""]),
        (["Ã", "<s>", "©"], "</s>", ["", "", "é", ""]),
    ],
)
def test_a_special_token_is_no_text_but_stops(plain, tokens, stop, pieces):
    names = {name: index for index, name in plain.vocab().items()}
    assert run(TextStream(plain, (stop,)), [names[token] for token in tokens], [1]) == pieces


@FIXED
@given(st.text(max_size=30))
def test_valid_text_streams_character_by_character(plain, text):
    """A character is out as soon as its last byte is; nothing before, nothing later."""
    stream, whole, out = TextStream(plain), text.encode(), ""
    names = {name: index for index, name in plain.vocab().items()}
    spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    tokens = [names[char] for piece, _ in spelled for char in piece]
    for count, token in enumerate(tokens, 1):
        out += stream.push([token])
        expected = whole[:count].decode(errors="ignore")
        assert out == expected or expected.endswith("\ufffd")
    assert out + stream.finish() == text


def test_a_leading_space_survives_special_tokens_and_borders(tmp_path):
    tokenizer = Tokenizer.load(save(tmp_path, byte_fallback()))
    names = {name: index for index, name in tokenizer.vocab().items()}
    tokens = [names[name] for name in ["<s>", "▁Hello", "</s>", *["<s>"] * 20, "▁wor", "ld", "▁", "▁", "a"]]
    assert run(TextStream(tokenizer), tokens, [1]) == [
        "",
        "Hello",
        *[""] * 21,
        " wor",
        "ld",
        " ",
        " ",
        "a",
        "",
    ]


def test_bytes_of_a_run_wait_for_its_end(tmp_path):
    """One bad byte spoils the whole run of bytes in these decoders, characters before it included."""
    tokenizer = Tokenizer.load(save(tmp_path, byte_fallback()))
    names = {name: index for index, name in tokenizer.vocab().items()}
    good = [names[f"<0x{byte:02X}>"] for byte in "日".encode()]
    assert run(TextStream(tokenizer), [*good, names["a"]], [1]) == ["", "", "", "日a", ""]
    assert run(TextStream(tokenizer), [*good, good[0], names["a"]], [1]) == [
        "",
        "",
        "",
        "",
        "\ufffd" * 4 + "a",
        "",
    ]
    assert run(TextStream(tokenizer), good, [1]) == ["", "", "", "日"]


def test_stop_strings_are_held_back_and_cut(plain):
    tokens = plain.encode("abcabd STOPped")
    stream = TextStream(plain, stop=("STOP", "abd!"))
    pieces = run(stream, tokens, [1])
    assert "".join(pieces) == "abcabd "
    assert pieces[:4] == ["", "", "abc", ""]  # 'ab' may begin 'abd!' until 'c' comes
    assert stream.stopped
    assert stream.push(tokens) == ""
    assert stream.finish() == ""


def test_of_two_stop_strings_the_one_complete_first_counts(plain):
    for size in (1, 6):
        assert "".join(run(TextStream(plain, ("bcdef", "cd")), plain.encode("abcdef"), [size])) == "ab"


def test_a_stop_string_that_never_completes_comes_out_at_the_end(plain):
    stream = TextStream(plain, stop=("STOP",))
    assert run(stream, plain.encode("aSTO"), [1]) == ["a", "", "", "", "STO"]
    assert not stream.stopped


@pytest.mark.parametrize("names", ["¶", "abcðŁĺĢ", ["<s>", "a"]], ids=["garbage", "text", "special tokens"])
def test_a_token_costs_the_same_at_any_length(plain, names, monkeypatch):
    ids = {name: index for index, name in plain.vocab().items()}
    tokens = [ids[name] for name in names] * 500
    decoded = 0
    real = Tokenizer.decode

    def decode(self, ids):
        nonlocal decoded
        decoded += len(ids)
        return real(self, ids)

    whole = plain.decode(tokens)
    monkeypatch.setattr(Tokenizer, "decode", decode)
    assert "".join(run(TextStream(plain), tokens, [1])) == whole
    assert decoded < 6 * MAX_WINDOW * len(tokens)


# -- tokenizers --------------------------------------------------------------------------------------------


def test_encode_adds_what_the_tokenizer_adds_and_decode_leaves_it_out(tmp_path):
    rust = byte_level()
    rust.add_special_tokens([AddedToken("<s>", special=True, normalized=False)])
    rust.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 256)])
    tokenizer = Tokenizer.load(save(tmp_path, rust, bos_token="<s>"))
    tokens = tokenizer.encode("é .")
    assert tokens[0] == 256
    assert len(tokens) == 5
    assert tokenizer.decode(tokens) == "é ."
    assert tokenizer.vocab()[256] == "<s>"


def test_chat_templates(tmp_path):
    tokenizer = load(tmp_path / "chat", chat_template=CHAT)
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"}]
    assert tokenizer.has_chat_template
    assert tokenizer.decode(tokenizer.encode_chat(messages)) == "[system]be brief[user]hi[assistant]"
    with pytest.raises(PromptError, match=r"refuses the conversation .*no tool.* Change the messages"):
        tokenizer.encode_chat([{"role": "tool", "content": "x"}])
    bare = load(tmp_path / "bare")
    assert not bare.has_chat_template
    with pytest.raises(PromptError, match=r"has no chat template: .*--raw"):
        bare.encode_chat(messages)


def test_a_conversation_keeps_the_tokens_that_were_said(tmp_path):
    tokenizer = load(tmp_path, "the cat", chat_template=CHAT)
    user, answer = {"role": "user", "content": "hi"}, {"role": "assistant", "content": "the cat sat"}
    spelled = [tokenizer.encode(char)[0] for char in "the c"]  # as a model may say it, not as the tokenizer would
    prompt = tokenizer.encode_chat([user])
    whole = tokenizer.encode_chat([user, answer, user])
    kept = tokenizer.encode_chat([user, answer, user], [*prompt, *spelled])
    assert kept[: len(prompt) + 5] == [*prompt, *spelled] != whole[: len(prompt) + 5]
    assert tokenizer.decode(kept) == tokenizer.decode(whole) == "[user]hi[assistant]the cat sat[user]hi[assistant]"
    other = tokenizer.encode("dog")
    assert tokenizer.encode_chat([user, answer, user], [*prompt, *other]) == whole, "that was not said"


def test_tokens_that_do_not_spell_the_text_are_not_kept(tmp_path):
    """Tokenizers that put a space before a text would put one in the middle."""
    rust = byte_fallback()
    rust.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer = Tokenizer.load(save(tmp_path, rust, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}"))
    said = tokenizer.encode_chat([{"role": "user", "content": "a"}])
    whole = tokenizer.encode_chat([{"role": "user", "content": "ab"}])
    assert tokenizer.decode(said) == "a"
    assert tokenizer.encode_chat([{"role": "user", "content": "ab"}], said) == whole
    assert tokenizer.decode(whole) == "ab"


def test_text_that_is_not_unicode_is_refused(plain):
    with pytest.raises(PromptError, match=r"not valid Unicode at character 2: expected UTF-8 .* Convert"):
        plain.encode("ab\udcff")


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "has no tokenizer: expected tokenizer.json"),
        ({"config.json": '{"model_type": "llama"}'}, "has no tokenizer"),
        ({"tokenizer_config.json": '{"tokenizer_class": "LlamaTokenizer"}'}, "has no tokenizer"),
        ({"tokenizer.json": '{"trunc'}, "cannot be used"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "{}"}, "cannot be used"),
        (
            {"tokenizer.json": '{"version": "1.0", "added_tokens": [], "model": {"type": "None"}}'},
            "cannot be used",
        ),
        ({"tokenizer.model": "not a sentencepiece model"}, "cannot be used"),
    ],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(CheckpointError, match=expected) as caught:
        Tokenizer.load(tmp_path)
    assert str(caught.value).endswith("Copy the tokenizer files of the original model into the folder.")
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="has no tokenizer"):
        Tokenizer.load(tmp_path / "missing")


# -- vocabularies ------------------------------------------------------------------------------------------


def test_padding_may_differ(tmp_path):
    one, two = load(tmp_path / "1", "the"), load(tmp_path / "2", "the")
    size = len(one.vocab())
    check_vocabulary(one, two, size, size + 128)
    check_vocabulary(one, two, size + 128, size)
    check_vocabulary(one, two, size, size)


def test_same_size_and_other_ids_are_refused(tmp_path):
    one, two = load(tmp_path / "1", "the", "cat"), load(tmp_path / "2", "the", "cow")
    assert len(one.vocab()) == len(two.vocab())
    with pytest.raises(VocabularyError, match=r"token 258 is 'ca' in .*1 and 'co' in .*2\. Choose a draft"):
        check_vocabulary(one, two, 512, 512)


def test_a_vocabulary_that_is_only_a_part_is_refused(tmp_path):
    one, two = load(tmp_path / "1", "the", special=[]), load(tmp_path / "2", special=[])
    with pytest.raises(VocabularyError, match=r"token 256 is 'th' in .* and absent in "):
        check_vocabulary(one, two, 512, 256)
    with pytest.raises(VocabularyError, match=r"token 256 is absent in .* and 'th' in "):
        check_vocabulary(two, one, 256, 512)


def test_added_tokens_may_be_missing_but_not_contradict(tmp_path):
    old = load(tmp_path / "1", special=["<|end|>"])
    new = load(tmp_path / "2", special=["<|end|>", "<think>"], added=["<tool>"])
    other = load(tmp_path / "3", special=["<|eot|>"])
    check_vocabulary(old, new, 257, 300)
    check_vocabulary(new, old, 300, 257)
    with pytest.raises(VocabularyError, match=r"token 256 is '<\|end\|>' in .* and '<\|eot\|>' in "):
        check_vocabulary(old, other, 300, 300)


def test_a_tokenizer_larger_than_its_model_is_refused(tmp_path):
    tokenizer = load(tmp_path / "1", "the", special=[])
    check_tokenizer(tokenizer, 258)
    with pytest.raises(VocabularyError, match=r"knows token 257 \('the'\), its model only 0 \.\. 256: .* Fetch both"):
        check_tokenizer(tokenizer, 257)
    for sizes in ((257, 258), (258, 257)):
        with pytest.raises(VocabularyError, match="knows token 257"):
            check_vocabulary(tokenizer, tokenizer, *sizes)
    with pytest.raises(VocabularyError, match="knows token 256"):
        check_tokenizer(load(tmp_path / "2", special=[], added=["<tool>"]), 256)


def test_a_special_token_may_lie_beyond_the_embedding(tmp_path):
    check_tokenizer(load(tmp_path, special=["<image>"]), 256)
