"""Begin and end tokens survive each way between formats, for us and for transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tiny_models import tiny_model
from tokenizer_families import CHATML, write

from khaosz.data.tokenizer import Tokenizer, load_tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ModelError
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.inference.text_stream import TextStream
from khaosz.interop.gguf.file import GgufFile, TensorToWrite, write_gguf
from khaosz.interop.gguf.model import GgufModel
from khaosz.interop.huggingface import save_model
from khaosz.interop.models import convert, open_tokenizer

transformers = pytest.importorskip("transformers")
TEXTS = ["hello world", " 你好，世界\n", "<|im_end|>\n\nx"]
CHAT = [{"role": "user", "content": " hi \n"}, {"role": "assistant", "content": "你好"}]
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}
# The switches of the family whose class transformers picks for the tokenizer.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"qkv_bias": True},
    "qwen3": {"qk_norm": True},
}


def directory(family: str, path: Path, model: str = "llama", **changes: Any) -> Path:
    """A model directory with ids that only generation_config.json names."""
    write(family, path, **changes)
    shape = {"vocab_size": 430, "head_dim": 16, "max_position_embeddings": 64}
    save_model(tiny_model(**shape, **MODELS[model]), path)
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 6]}))
    return path


def their_ids(path: Path, text: str) -> list[int]:
    return list(transformers.AutoTokenizer.from_pretrained(path)(text)["input_ids"])


@pytest.mark.parametrize("family", ["gpt2", "llama3", "bos that has no name", "eos after a text"])
def test_round_trip(tmp_path: Path, family: str) -> None:
    source = directory(family, tmp_path / "source")
    gguf = convert(source, tmp_path / "a.gguf", kind="F32")
    back = convert(gguf, tmp_path / "back")
    ends = load_tokenizer(source).end_ids
    assert {2, 5, 6} <= set(ends)
    for place in (source, gguf, back):
        generator = Generator.from_directory(place)
        assert generator.engine.end_ids == set(ends)
        for text in TEXTS[:2]:  # transformers would parse the third
            assert generator.prompt_ids(text) == their_ids(source, text)
    for text in TEXTS:
        assert their_ids(back, text) == their_ids(source, text)
    assert json.loads((back / "generation_config.json").read_text())["eos_token_id"] == [*ends]
    metadata = GgufFile.open(gguf).metadata
    marked = open_tokenizer(source)
    assert metadata["tokenizer.ggml.add_bos_token"] == bool(marked.begin_ids)
    assert metadata["tokenizer.ggml.add_eos_token"] == bool(marked.finish_ids)
    if marked.begin_ids:
        assert metadata["tokenizer.ggml.bos_token_id"] == 1
    assert metadata["tokenizer.ggml.eom_token_id"] == 6


@pytest.mark.parametrize("model", MODELS)
def test_transformers_reads_a_converted_tokenizer_as_it_is(tmp_path: Path, model: str) -> None:
    """Its classes for Qwen rebuild a tokenizer, with a normaliser that the file has not."""
    source = directory("llama3", tmp_path / "source", model)
    convert(source, tmp_path / "a.gguf", kind="F32")
    back = convert(tmp_path / "a.gguf", tmp_path / "back")
    ours, theirs = load_tokenizer(back), transformers.AutoTokenizer.from_pretrained(back)
    for text in ("e\u0301 A\u030a 2024", *TEXTS[:2]):
        assert theirs(text)["input_ids"] == [*ours.begin_ids, *ours.encode(text)]
    assert encode_chat(ours, CHAT)[0] == theirs.apply_chat_template(CHAT)["input_ids"]


def test_flags_and_named_templates_survive_a_gguf(tmp_path: Path) -> None:
    named = [{"name": "default", "template": CHATML}, {"name": "tool_use", "template": "T"}]
    source = directory("phi4", tmp_path / "source", chat_template=named)
    gguf = convert(source, tmp_path / "a.gguf", kind="F32")
    convert(gguf, tmp_path / "back")
    before = load_tokenizer(source)
    for place in (gguf, tmp_path / "back"):
        after = open_tokenizer(place)
        assert encode_chat(after, CHAT)[0] == encode_chat(before, CHAT)[0]
        assert encode_chat(after, CHAT, [TOOL])[0] == encode_chat(before, CHAT, [TOOL])[0]
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "back"))
    assert theirs.apply_chat_template(CHAT)["input_ids"] == encode_chat(before, CHAT)[0]


@pytest.mark.parametrize("named", [["eos_token"], ["bos_token", "eos_token", "unk_token"]])
def test_a_gguf_names_the_tokens_that_the_model_names(tmp_path: Path, named: list[str]) -> None:
    """A template sees no bos_token where only an id in config.json says it."""
    template = "{{ bos_token }}{{ unk_token }}{{ pad_token }}{{ messages[0].content }}"
    source = directory("gpt2", tmp_path / "source", chat_template=template)
    values = json.loads((source / "tokenizer_config.json").read_text())
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    kept = {key: value for key, value in values.items() if not key.endswith("_token")}
    text = json.dumps(kept | {key: names[key] for key in named})
    (source / "tokenizer_config.json").write_text(text)
    (source / "generation_config.json").write_text(
        json.dumps({"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3})
    )
    gguf = convert(source, tmp_path / "a.gguf", kind="F32")
    back = convert(gguf, tmp_path / "back")
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(source))
    expected = theirs.apply_chat_template(CHAT[:1])["input_ids"]
    for place in (source, gguf, back):
        tokenizer = open_tokenizer(place)
        assert encode_chat(tokenizer, CHAT[:1])[0] == expected
        assert (tokenizer.bos_id, tokenizer.pad_id) == (1, 3)
    assert GgufFile.open(gguf).metadata["tokenizer.ggml.bos_token_id"] == 1


def test_each_end_token_ends_an_answer(tmp_path: Path) -> None:
    generator = Generator.from_directory(directory("llama3", tmp_path))
    for end in (2, 5, 6):
        params = SamplingParams(max_tokens=3, temperature=0, logit_bias={end: 100})
        answer = generator.generate("hello", params)
        assert (answer.finish_reason, answer.ids, answer.text) == ("stop", (end,), "")


def test_ends_of_a_gguf_file_by_name(tmp_path: Path) -> None:
    """Files of others have no key for every end: llama.cpp finds them by name, and so do we."""
    convert(directory("gpt2", tmp_path / "source"), tmp_path / "a.gguf", kind="F32")
    file = GgufFile.open(tmp_path / "a.gguf")
    ours = ("khaosz.end_token_ids", "tokenizer.ggml.eot_token_id", "tokenizer.ggml.eom_token_id")
    metadata = {key: value for key, value in file.metadata.items() if key not in ours}
    tensors = [
        TensorToWrite(name, t.type, t.shape, lambda name=name: [file.raw(name)])
        for name, t in file.tensors.items()
    ]
    write_gguf(tmp_path / "b.gguf", metadata, tensors)
    assert GgufModel.open(tmp_path / "b.gguf").tokenizer().end_ids == (2, 5, 6)
    for key, value in [
        ("khaosz.end_token_ids", "2"),
        ("khaosz.token_names", "[1]"),
        ("khaosz.token_flags", "["),
        ("khaosz.token_flags", '{"<s>": 1}'),
        ("tokenizer.ggml.add_eos_token", "yes"),
        ("tokenizer.ggml.eom_token_id", 10_000),
    ]:
        write_gguf(tmp_path / "c.gguf", {**metadata, key: value}, tensors)
        with pytest.raises(ModelError, match=key.rpartition(".")[2]):
            GgufModel.open(tmp_path / "c.gguf").tokenizer()
    metadata["khaosz.end_token_ids"] = np.array([2, 7], np.int32)
    write_gguf(tmp_path / "c.gguf", metadata, tensors)
    assert GgufModel.open(tmp_path / "c.gguf").tokenizer().end_ids == (2, 5, 7)


def test_what_a_gguf_has_no_key_for_is_refused(tmp_path: Path) -> None:
    source = directory("bos that has no name", tmp_path / "source", bos_token="<|im_start|>")
    with pytest.raises(ModelError, match=r"adds \[1\] before a text"):
        convert(source, tmp_path / "a.gguf")
    assert not (tmp_path / "a.gguf").exists()


def test_an_earlier_conversion_keeps_its_begin_token(tmp_path: Path) -> None:
    """Directories that earlier versions converted from GGUF have the flag alone, which
    transformers 5 does not read beside a tokenizer.json."""
    convert(directory("llama3", tmp_path / "source"), tmp_path / "a.gguf", kind="F32")
    back = convert(tmp_path / "a.gguf", tmp_path / "back")
    path = back / "tokenizer.json"
    spec = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**spec, "post_processor": None}, ensure_ascii=False), "utf-8")
    earlier = load_tokenizer(back)
    assert earlier.begin_ids == [1]
    earlier.save(back)
    assert their_ids(back, "hello") == [1, *earlier.encode("hello")]


def test_a_continuation_keeps_its_space(tmp_path: Path) -> None:
    """SentencePiece writes a space before the first word of a text: it counts in a text that goes
    on, and not at the start of an answer."""
    tokenizer = load_tokenizer(write("mistral", tmp_path))
    world = tokenizer.encode("world")
    for prompt, text in [(tokenizer.encode("hello"), " world"), ([1], "world"), ([], "world")]:
        stream = TextStream(tokenizer, (), after=prompt)
        shown = [piece for token in world for piece in stream.push(token) if isinstance(piece, str)]
        assert "".join(shown) + stream.finish()[0] == text
    model = tiny_model(vocab_size=tokenizer.vocab_size, head_dim=16)
    params = SamplingParams(max_tokens=1, temperature=0, logit_bias={world[0]: 100})
    assert Generator(model, tokenizer).generate("hello", params).text.startswith(" ")


def test_tool_template_is_found_by_tools(tmp_path: Path) -> None:
    from khaosz.serve.tools import add_tools, call_format

    named = {"default": CHATML, "tool_use": "{{ tools | tojson }}<tool_call>"}
    entries = [{"name": name, "template": text} for name, text in named.items()]
    tokenizer: Tokenizer = load_tokenizer(write("gpt2", tmp_path, chat_template=entries))
    assert add_tools(CHAT, [TOOL], tokenizer) == (CHAT, [TOOL])
    assert call_format(tokenizer) == "marked"
