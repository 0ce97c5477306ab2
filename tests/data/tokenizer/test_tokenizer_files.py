"""Special tokens and templates from every file of a directory, in transformers' precedence."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizer_families import CHATML, write

from khaosz.data.tokenizer import load_tokenizer
from khaosz.data.tokenizer.chat import encode_chat, render_chat
from khaosz.errors import DataError, TokenizerError

transformers = pytest.importorskip("transformers")
TOOL = {"type": "function", "function": {"name": "f", "description": "d", "parameters": {}}}


def put(path: Path, value: Any) -> None:
    path.parent.mkdir(exist_ok=True)
    text = value if isinstance(value, str) else json.dumps(value)
    path.write_text(text, encoding="utf-8")


def config(directory: Path, **changes: Any) -> None:
    path = directory / "tokenizer_config.json"
    put(path, {**json.loads(path.read_text(encoding="utf-8")), **changes})


def token(content: str, **flags: bool) -> dict[str, Any]:
    names = ("lstrip", "rstrip", "single_word", "normalized", "special")
    return {"content": content, **dict.fromkeys(names, False), **flags}


def flags_in_the_config(d: Path) -> None:
    config(d, added_tokens_decoder={"5": token("<|im_end|>", rstrip=True, special=True)})


def no_special_flag_in_the_config(d: Path) -> None:
    config(d, added_tokens_decoder={"5": token("<|im_end|>")}, eos_token="<|im_end|>")


def new_token_in_the_config(d: Path) -> None:
    config(d, added_tokens_decoder={"900": token("<think>", lstrip=True, special=True)})


def names_in_the_map(d: Path) -> None:
    (d / "tokenizer_config.json").unlink()
    put(d / "special_tokens_map.json", {"eos_token": "<|im_end|>", "bos_token": {"content": "<s>"}})
    put(d / "chat_template.jinja", CHATML)


def names_in_the_map_against_the_config(d: Path) -> None:
    put(d / "special_tokens_map.json", {"eos_token": "<|im_end|>", "pad_token": "<new pad>"})


def map_beside_a_decoder(d: Path) -> None:
    flags_in_the_config(d)
    put(d / "special_tokens_map.json", {"eos_token": "<|im_end|>"})


def added_tokens_file(d: Path) -> None:
    put(d / "added_tokens.json", {"<think>": 901, "<|im_start|>": 4, "</think>": 900})


def extra_tokens(d: Path) -> None:
    config(d, extra_special_tokens=["<think>", "</think>"])


def extra_tokens_in_both(d: Path) -> None:
    extra_tokens(d)
    put(d / "special_tokens_map.json", {"extra_special_tokens": ["<tool>", "world"]})


def additional_tokens(d: Path) -> None:
    config(d, additional_special_tokens=["<think>"])


def tokens_of_the_model(d: Path) -> None:
    template = "{{ image_token }}{{ audio_token }}{{ sep_token }}" + CHATML
    extra = {"audio_token": "<audio>"}
    config(d, image_token="<image>", extra_special_tokens=extra, sep_token="</s>")
    config(d, chat_template=template)


def names_of_plain_pieces(d: Path) -> None:
    config(d, eos_token="!", pad_token="fox")


def named_templates(d: Path) -> None:
    named = {"default": CHATML, "tool_use": "T{{ tools[0].function.name }}", "rag": "R"}
    config(d, chat_template=[{"name": n, "template": text} for n, text in named.items()])


def template_files(d: Path) -> None:
    named_templates(d)
    put(d / "chat_template.jinja", "D{{ messages[0].content }}")
    put(d / "additional_chat_templates" / "tool_use.jinja", "F{{ tools[0].function.name }}")


def one_template_file(d: Path) -> None:
    named_templates(d)
    put(d / "chat_template.jinja", "D{{ messages[0].content }}")


CHANGES: list[Callable[[Path], None]] = [
    flags_in_the_config,
    no_special_flag_in_the_config,
    new_token_in_the_config,
    names_in_the_map,
    names_in_the_map_against_the_config,
    map_beside_a_decoder,
    added_tokens_file,
    extra_tokens,
    extra_tokens_in_both,
    additional_tokens,
    tokens_of_the_model,
    names_of_plain_pieces,
    named_templates,
    template_files,
    one_template_file,
]
CHAT = [{"role": "user", "content": " hello <think> \n!world <image>"}]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
@pytest.mark.parametrize("family", ["llama3", "metaspace first"])
def test_directories(tmp_path: Path, family: str, change: Callable[[Path], None]) -> None:
    change(write(family, tmp_path))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path))
    ours = load_tokenizer(tmp_path)
    ours.save(tmp_path / "again")
    again = transformers.PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "again"))
    assert again.special_tokens_map == theirs.special_tokens_map
    ids = {"bos": ours.bos_id, "eos": ours.eos_id, "pad": ours.pad_id}
    for name, token_id in ids.items():
        assert getattr(theirs, f"{name}_token_id") in (token_id, None)
    plain = [{"role": "user", "content": " hello 你好 \n"}]
    for tools in (None, [TOOL]):
        text = theirs.apply_chat_template(plain, tools=tools, tokenize=False)
        assert render_chat(ours, plain, tools) == text
        expected = theirs.apply_chat_template(plain, tools=tools, tokenize=True)["input_ids"]
        for each in (ours, load_tokenizer(tmp_path / "again")):
            assert encode_chat(each, plain, tools)[0] == expected
        assert again.apply_chat_template(plain, tools=tools, tokenize=True)["input_ids"] == expected
    assert again(CHAT[0]["content"])["input_ids"] == theirs(CHAT[0]["content"])["input_ids"]
    in_text = set(ours.special_ids.values()) & set(encode_chat(ours, CHAT)[0])
    assert in_text <= set(encode_chat(ours, plain)[0])


def test_tokens_without_a_row_of_embedding_are_not_added(tmp_path: Path) -> None:
    extra_tokens(write("llama3", tmp_path))
    size = load_tokenizer(tmp_path).vocab_size
    put(tmp_path / "config.json", {"vocab_size": size - 1})
    assert load_tokenizer(tmp_path).vocab_size == size - 1


def test_ids_of_the_model_end_a_text(tmp_path: Path) -> None:
    write("llama3", tmp_path, eos_token="</s>")
    put(tmp_path / "config.json", {"eos_token_id": [6, 9999], "bos_token_id": 1})
    assert load_tokenizer(tmp_path).end_ids == (2, 5, 6, 9999)  # 5: the end of a turn by its name
    put(tmp_path / "generation_config.json", {"eos_token_id": [2, 7], "pad_token_id": None})
    ours = load_tokenizer(tmp_path)
    assert ours.end_ids == (2, 5, 7)  # config.json counts where the other has none
    ours.save(tmp_path / "prepared")  # without the model's files
    assert load_tokenizer(tmp_path / "prepared").end_ids == ours.end_ids
    put(tmp_path / "generation_config.json", {"eos_token_id": 0})
    assert load_tokenizer(tmp_path).end_ids == (2, 0, 5)


def test_ids_of_the_model_stand_in_for_names(tmp_path: Path) -> None:
    write("gpt2", tmp_path, bos_token=None, eos_token=None, pad_token=None)
    with pytest.raises(TokenizerError, match="names no eos_token"):
        load_tokenizer(tmp_path)
    put(tmp_path / "config.json", {"bos_token_id": 1, "eos_token_id": 7, "pad_token_id": 3})
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id, ours.pad_id, ours.begin_ids) == (1, 7, 3, [])
    assert "bos_token" not in ours.template_variables  # transformers has no name for it either
    ours.save(tmp_path / "copy")
    assert load_tokenizer(tmp_path / "copy").bos_id == 1


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer_config.json", {"bos_token": 7}, "bos_token is 7, not a token"),
        ("tokenizer_config.json", {"extra_special_tokens": [{}]}, "extra_special_tokens is"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "not a table of ids"),
        ("tokenizer_config.json", {"chat_template": [{"name": "x"}]}, "chat_template is neither"),
        ("special_tokens_map.json", "[]", "not a JSON object"),
        ("added_tokens.json", {"<x>": "5"}, "ids are not whole numbers"),
        ("generation_config.json", {"eos_token_id": "2"}, "eos_token_id is '2'"),
        ("config.json", "{", "not valid JSON"),
    ],
)
def test_broken_files(tmp_path: Path, name: str, content: Any, message: str) -> None:
    write("gpt2", tmp_path)
    if name == "tokenizer_config.json":
        config(tmp_path, **content)
    else:
        put(tmp_path / name, content)
    with pytest.raises(TokenizerError, match=message) as error:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_templates_without_a_default(tmp_path: Path) -> None:
    write("gpt2", tmp_path, chat_template=[{"name": "tool_use", "template": "T"}])
    ours = load_tokenizer(tmp_path)
    assert render_chat(ours, CHAT, [TOOL]) == "T"
    with pytest.raises(DataError, match="none is named default"):
        render_chat(ours, CHAT)
    with pytest.raises(DataError, match="no chat template"):
        render_chat(load_tokenizer(write("gpt2", tmp_path / "b", chat_template=None)), CHAT)
