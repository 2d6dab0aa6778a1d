"""The synchronous front door: an engine that stays open, prompts in the forms people have, mistakes with a remedy."""

import array
import asyncio
import dataclasses
import os
import signal
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch

import aspec
from aspec.api import LLM, generate
from aspec.errors import AspecError, ClosedError, PromptError, UserError
from aspec.generation.params import SamplingParams
from aspec.generation.text.prompts import as_prompt, as_prompts
from aspec.generation.text.tokenizer import Tokenizer
from aspec.io.loop.loop_thread import LoopThread
from tests import tiny

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
SMALL = dict(device_memory="3MiB", resident_memory=0, max_context=96, prefill_tokens=32, threads=1)
IDS = [5, 6, 7]


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tiny.build(tmp_path_factory.mktemp("api") / "plain", "llama")


@pytest.fixture(scope="module")
def chatty(tmp_path_factory):
    folder = tiny.build(tmp_path_factory.mktemp("api") / "chatty", "llama")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    (folder / "generation_config.json").write_text('{"do_sample": true, "temperature": 0.7, "top_k": 9}')
    return folder


@pytest.fixture
def llm(chatty):
    with LLM(target=chatty, **SMALL) as opened:
        yield opened


@dataclasses.dataclass
class Said:
    role: str
    content: str
    name: str | None = None


class Dumping:
    """As pydantic's models and OpenAI's message objects are."""

    role, content = "user", "hi"

    def model_dump(self, exclude_none):
        assert exclude_none
        return {"role": self.role, "content": self.content}


@pytest.mark.parametrize(
    "given",
    [
        (5, 6, 7),
        range(5, 8),
        (token for token in IDS),
        array.array("q", IDS),
        np.array(IDS),
        np.array([IDS], dtype=np.uint16),
        [np.int64(5), 6, np.uint8(7)],
        torch.tensor(IDS),
        torch.tensor([IDS], dtype=torch.int32),
        list(torch.tensor(IDS)),
        {"input_ids": IDS, "attention_mask": [1, 1, 1]},
        {"input_ids": torch.tensor([IDS]), "attention_mask": torch.ones(1, 3)},
        {"input_ids": [IDS]},
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_of_any_kind_are_all_taken(given):
    assert as_prompt(given) == IDS


@pytest.mark.parametrize(
    "given",
    [
        {"role": "user", "content": "hi"},
        [{"role": "user", "content": "hi"}],
        [types.MappingProxyType({"role": "user", "content": "hi"})],
        [Said("user", "hi")],
        [types.SimpleNamespace(role="user", content="hi")],
        (Dumping(),),
    ],
    ids=lambda given: str(type(given[0] if isinstance(given, list | tuple) else given)),
)
def test_messages_of_any_kind_are_all_taken(given):
    assert as_prompt(given) == [{"role": "user", "content": "hi"}]
    assert as_prompts(given) == ([[{"role": "user", "content": "hi"}]], True)


def test_what_a_template_may_know_stays_in_a_message():
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}
    assert as_prompt([{"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"}, call]) == [
        {"role": "user", "content": [{"type": "text", "text": "a"}], "name": "x"},
        call,
    ]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (None, "None: expected a text"),
        (7, "int 7"),
        (b"text", "bytes"),
        ({"text": "a"}, "dict"),
        ([1, 2.0], "element 1 is float 2.0"),
        ([1, True], "element 1 is bool True"),
        ([1, None], "element 1 is None"),
        ([1, "a"], "element 1 is str 'a'"),
        (np.array([1.0, 2.0]), "element 0 is float 1.0"),
        (torch.tensor([True]), "element 0 is bool"),
        ([1, torch.tensor(True)], "element 1 is Tensor"),
        ([1, torch.tensor([1, 2])], "element 1 is Tensor"),
        (["a", {"role": "user", "content": "b"}], "element 0 is str 'a'"),
        ([{"role": "user", "content": "a"}, "b"], "message 1 is str 'b'"),
        ([{"role": "user"}], "no content"),
        ([{"role": 3, "content": "a"}], "role 3"),
        ({"input_ids": [1, 2], "attention_mask": [0, 1]}, "padding"),
    ],
    ids=str,
)
def test_what_cannot_be_converted_is_refused_by_name(given, says):
    with pytest.raises(PromptError, match=says):
        as_prompt(given)


def test_one_prompt_and_several_are_told_apart():
    assert as_prompts("a") == (["a"], True)
    assert as_prompts(["a", "b"]) == (["a", "b"], False)
    assert as_prompts(text for text in ["a"]) == (["a"], False)
    assert as_prompts(IDS) == ([IDS], True)
    assert as_prompts([IDS, "a", np.array(IDS)]) == ([IDS, "a", IDS], False)
    assert as_prompts(torch.tensor([IDS, IDS])) == ([IDS, IDS], False)
    assert as_prompts([[{"role": "user", "content": "a"}], "b"]) == ([[{"role": "user", "content": "a"}], "b"], False)
    assert as_prompts([]) == ([], False)
    with pytest.raises(PromptError, match=r"prompt 1: .*element 0"):
        as_prompts([IDS, [None]])


def test_a_text_is_asked_as_the_command_line_asks_it(llm, chatty):
    tokens = Tokenizer.load(chatty).encode_chat([{"role": "system", "content": "S"}, {"role": "user", "content": "a"}])
    result = llm.generate("a", system="S", max_new_tokens=4, seed=3)
    assert result.stats.prompt_tokens == len(tokens)
    own = SamplingParams(max_new_tokens=4, seed=3, temperature=0.7, top_k=9)
    assert result.token_ids == llm.generate(tokens, own).token_ids, "generation_config.json holds"
    assert result.token_ids != llm.generate("a", raw=True, max_new_tokens=4, seed=3).token_ids
    said = llm.chat([Said("system", "S"), Said("user", "a")], max_new_tokens=4, seed=3)
    assert said.token_ids == result.token_ids
    assert llm.generate(tokens, own, seed=4).token_ids != result.token_ids, "a keyword wins over params"


def test_a_stream_gives_the_pieces_of_the_whole(llm):
    pieces = list(llm.stream("a", max_new_tokens=6, seed=1))
    whole = llm.generate("a", max_new_tokens=6, seed=1)
    assert "".join(piece.text for piece in pieces) == whole.text
    assert sum((piece.token_ids for piece in pieces), ()) == whole.token_ids
    left = llm.stream("a", max_new_tokens=80, ignore_eos=True)
    next(left)
    left.close()  # a stream that is left frees its row
    assert llm.generate(["a", "b"], max_new_tokens=2)[1].stats.completion_tokens > 0


def test_it_works_inside_a_running_loop(llm, plain):
    async def cell():
        one = generate("a", target=plain, max_new_tokens=3, **SMALL)
        return one, llm.generate("a", max_new_tokens=3), [piece.text for piece in llm.stream("a", max_new_tokens=3)]

    one, kept, pieces = asyncio.run(cell())
    assert one.stats.completion_tokens == 3
    assert "".join(pieces) == kept.text


def test_threads_share_an_engine(llm):
    wanted = {text: llm.generate(text, max_new_tokens=8).token_ids for text in "abcdef"}
    found = {}
    threads = [
        threading.Thread(target=lambda text=text: found.update({text: llm.generate(text, max_new_tokens=8).token_ids}))
        for text in wanted
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == wanted


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (dict(device_memory="4 apples"), "device_memory: expected a size"),
        (dict(device_memory=[4]), r"device_memory must be .*'8GiB', found \[4\]"),
        (dict(device_memory=True), "device_memory must be"),
        (dict(link_rate="fast"), "link_rate: expected a rate"),
        (dict(threads="two"), "threads must be a whole number"),
        (dict(max_batch=2.5), "max_batch must be a whole number"),
        (dict(exact="yes"), "exact must be True or False"),
        (dict(target=torch.nn.Linear(2, 2)), r"target must be a folder, .* found Linear. Save"),
        (dict(device="tpu"), "device must be one of auto, cpu, cuda"),
        (dict(model="x"), "no option 'model'. Did you mean 'target'"),
        (dict(max_tokens=3), "no option 'max_tokens'. Did you mean 'max_new_tokens'"),
        (dict(temprature=1), "Did you mean 'temperature'"),
        (dict(max_new_tokens="4"), "max_new_tokens must be a whole number"),
        (dict(dtype=torch.int8), "dtype 'int8' is not known"),
        (dict(target="/no/such/folder"), "was not found"),
    ],
    ids=str,
)
def test_a_mistake_gets_its_remedy(options, says):
    with pytest.raises(UserError, match=says):
        generate("a", **options)


def test_sizes_rates_and_dtypes_may_be_texts_or_numbers():
    options = aspec.EngineOptions(
        device_memory="1.5GiB", host_memory=4e9, link_rate="1GB/s", threads=np.int64(2), dtype=torch.bfloat16
    )
    assert (options.device_memory, options.host_memory, options.link_rate) == (3 << 29, 4 * 10**9, 1e9)
    assert (options.threads, options.dtype) == (2, "bfloat16")


def test_mistakes_of_a_call_are_named(llm, plain):
    for call, says in (
        (lambda: llm.generate("a", max_tokens=3), "no sampling parameter 'max_tokens'. Did you mean 'max_new_tokens'"),
        (lambda: llm.generate(""), "the prompt is empty"),
        (lambda: llm.generate(["a", [10**9]]), r"prompt 1: the prompt's token 0 is 1000000000"),
        (lambda: llm.generate([3, -1]), "token 1 is -1"),
        (lambda: llm.generate(IDS, system="S"), "a system message needs a text"),
        (lambda: llm.chat(IDS), "found token ids"),
    ):
        with pytest.raises(UserError, match=says):
            call()
    with LLM(target=plain, **SMALL) as raw:
        with pytest.raises(PromptError, match="has no chat template"):
            raw.chat("hi")
        assert raw.generate("hi", max_new_tokens=2).stats.completion_tokens == 2
    assert llm.generate([]) == []
    assert aspec.generate([], target="/nowhere") == []


def test_prompts_are_checked_before_a_weight_is_read(plain, monkeypatch):
    monkeypatch.setattr("aspec.api.Engine", None)  # nothing opens
    for prompts, says in (
        ([1] * 10_000, "the prompt has 10000 tokens; the context holds"),
        (["a", ""], "prompt 1: the prompt is empty"),
        ("\udc80", "not valid Unicode"),
    ):
        with pytest.raises(PromptError, match=says):
            generate(prompts, target=plain)


def test_a_closed_engine_says_so(plain):
    before = threading.active_count()
    llm = LLM(target=plain, **SMALL)
    running = llm.stream("a", max_new_tokens=80, ignore_eos=True)
    next(running)
    llm.close()
    llm.close()
    for call in (lambda: llm.generate("a"), lambda: next(running), lambda: list(llm.stream("a"))):
        with pytest.raises((ClosedError, UserError), match=r"closed|not open"):
            call()
    LLM(target=plain, **SMALL).generate("a", max_new_tokens=1)  # nobody holds it: it closes
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_failed_opening_leaves_no_thread():
    before = threading.active_count()
    for _ in range(3):
        with pytest.raises(AspecError):
            LLM(target="/no/such/folder")
    deadline = time.monotonic() + 60
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= before


def test_a_program_ends_though_its_engine_was_never_closed():
    code = "import aspec; llm = aspec.LLM(threads=1); print(llm.generate('import os', max_new_tokens=2).finish_reason)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (0, "length\n", "")


def test_an_interrupted_call_ends_before_it_returns():
    ended = []

    async def endless():
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def one():
        return 1

    with LoopThread("test", asyncio.new_event_loop) as loop:
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        threading.Timer(0.2, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
        try:
            with pytest.raises(KeyboardInterrupt):
                loop.call(endless)
        finally:
            signal.signal(signal.SIGINT, before)
        assert ended == [True]
        assert loop.call(one) == 1, "the loop goes on"

        async def nested():
            return loop.call(endless)

        with pytest.raises(UserError, match="another thread"):
            loop.call(nested)
    with pytest.raises(ClosedError):
        loop.call(endless)


def test_a_forked_process_is_told_to_open_its_own():
    async def one():
        return 1

    with LoopThread("test", asyncio.new_event_loop) as loop:
        child = os.fork()
        if child == 0:
            try:
                loop.close()  # it is the parent's: nothing happens
                loop.call(one)
            except UserError as error:
                os._exit(0 if "in a fork" in str(error) else 1)
            finally:
                os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert loop.call(one) == 1
