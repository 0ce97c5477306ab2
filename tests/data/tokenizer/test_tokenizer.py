"""Tokenizer: lossless, no control tokens out of text, deterministic, and readable errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models

from khaosz.data.tokenizer.chat import encode_chat
from khaosz.data.tokenizer.tokenizer import (
    MIN_VOCAB_SIZE,
    SPECIAL_TOKENS,
    StreamDecoder,
    Tokenizer,
    load_tokenizer,
    train_tokenizer,
)
from khaosz.errors import ContextLengthError, TokenizerError

# No deadline and no too_slow check: both would measure the load of the machine, not our code.
QUICK = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

LINES = [
    "The quick brown fox jumps over the lazy dog; it's 2024, isn't it?",
    "天地玄黄，宇宙洪荒。日月盈昃，辰宿列张。",
    "中华人民共和国的公民在法律面前一律平等。",
    "def add(a, b):\n    return a + b  # 相加\n",
    "人工智能与语言模型：从分词到训练，一步一步来。",
]

NASTY = [
    "",
    " ",
    "\x00\x01\x1b[31m\x7f",
    "a\r\nb\rc\n\n\n  d\t\t e \u3000 f\u00a0",
    "👨‍👩‍👧‍👦🏳️‍🌈🇨🇳👍🏽",
    "𠀀𠮷𪚥龘靐齉",
    "“全角”，‘引号’；ＡＢＣ１２３——……《书》",
    "e\u0301 é Å \u212b \uf900 豈",  # not NFC: a normaliser would fold these
    "שלום עולם مرحبا",
    "\ufeffBOM \u200b \u202eoverride \ufffd \U0010ffff",
    "x = {'k': [1, 2, 3]} # `code` ~ don't DON'T ''' \"\"\"",
    "1234567890 3.14159 １２３ ²³ Ⅷ",
    "<|bos|><|end|>text<|user|><|reserved_0|>",
]

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
HOSTILE = st.lists(
    st.one_of(TEXT, st.sampled_from([*SPECIAL_TOKENS, *NASTY, "<|", "|>"])), max_size=6
).map("".join)


def texts(n: int = 60) -> list[str]:
    return [f"{LINES[i % len(LINES)]} {i}" for i in range(n)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer(texts(), 400)


def test_special_tokens_have_the_first_ids(tokenizer: Tokenizer) -> None:
    assert [tokenizer.special_ids[name] for name in SPECIAL_TOKENS] == list(range(16))
    assert (tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id, tokenizer.end_id) == (0, 1, 2, 7)
    fixed = "<|pad|> <|bos|> <|eos|> <|system|> <|user|> <|assistant|> <|tool|> <|end|>"
    assert " ".join(SPECIAL_TOKENS[:8]) == fixed  # written into models: never to be reordered
    assert tokenizer.vocab_size == 400


@pytest.mark.parametrize("text", NASTY)
def test_unusual_text_round_trips(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert not any(tokenizer.is_special(i) for i in ids)


@settings(QUICK, max_examples=200)
@given(HOSTILE)
def test_encode_is_lossless_and_never_yields_control_tokens(
    tokenizer: Tokenizer, text: str
) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.decode(ids, skip_special=True) == text
    assert all(i >= len(SPECIAL_TOKENS) for i in ids)
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())
    assert tokenizer.encode_batch([text, "x", text]) == [ids, tokenizer.encode("x"), ids]
    offset_ids, offsets = tokenizer.control_encoder.encode(text)
    assert offset_ids == ids
    assert all(0 <= start < end <= len(text) for start, end in offsets)


@settings(QUICK, max_examples=100)
@given(st.lists(st.integers(0, 399), max_size=40), st.booleans())
def test_streaming_equals_decoding_for_any_ids(
    tokenizer: Tokenizer, ids: list[int], skip: bool
) -> None:
    stream = StreamDecoder(tokenizer, skip_special=skip)
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.finish() == tokenizer.decode(ids, skip_special=skip)


@settings(QUICK, max_examples=100)
@given(TEXT.filter(lambda text: "\ufffd" not in text))
def test_stream_buffers_incomplete_characters(tokenizer: Tokenizer, text: str) -> None:
    stream = StreamDecoder(tokenizer)
    shown = ""
    for i in tokenizer.encode(text):
        shown += stream.push(i)
        assert text.startswith(shown)  # a prefix of real text: nothing guessed, nothing torn
    assert shown == text
    assert stream.finish() == ""


def test_stream_cut_inside_a_character(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("𠀀")
    assert len(ids) == 4
    stream = StreamDecoder(tokenizer)
    assert "".join(stream.push(i) for i in ids[:3]) == ""
    assert stream.finish() == "\ufffd"


def test_decode_names_special_tokens_or_skips_them(tokenizer: Tokenizer) -> None:
    ids = [tokenizer.bos_id, *tokenizer.encode("你好"), tokenizer.end_id]
    assert tokenizer.decode(ids) == "<|bos|>你好<|end|>"
    assert tokenizer.decode(ids, skip_special=True) == "你好"
    assert tokenizer.decode(np.array(ids, dtype=np.uint16)) == "<|bos|>你好<|end|>"


def test_bytes_of_every_token(tokenizer: Tokenizer) -> None:
    assert {tokenizer.token_bytes(i) for i in range(16, 272)} == {bytes([b]) for b in range(256)}
    lengths = tokenizer.byte_lengths
    assert lengths.dtype == np.int64
    assert lengths.shape == (400,)
    assert not lengths[:16].any()
    assert lengths[16:].all()
    for bad in (-1, 400):
        with pytest.raises(TokenizerError, match=f"{bad} is outside"):
            tokenizer.token_bytes(bad)
    with pytest.raises(TokenizerError, match="outside"):
        tokenizer.decode([400])


@pytest.mark.parametrize("text", ["\ud800", "中文\udfff", "a" * 50 + "\udc80b"])
def test_lone_surrogates_are_refused(tokenizer: Tokenizer, text: str) -> None:
    for call in (tokenizer.encode, lambda t: tokenizer.encode_batch(["ok", t])):
        with pytest.raises(TokenizerError, match="lone surrogate U\\+D") as info:
            call(text)
        assert info.value.hint


def test_training_is_deterministic_to_the_byte() -> None:
    first, second = train_tokenizer(texts(), 350), train_tokenizer(iter(texts()), 350)
    assert first.serialized == second.serialized
    assert first.fingerprint == second.fingerprint
    assert train_tokenizer([*texts(30), "other words " * 9], 350).fingerprint != first.fingerprint


def test_digits_are_single_tokens(tokenizer: Tokenizer) -> None:
    assert len(tokenizer.encode("20242024")) == 8


def test_training_refuses_invalid_arguments() -> None:
    with pytest.raises(TokenizerError, match=str(MIN_VOCAB_SIZE)):
        train_tokenizer(texts(), MIN_VOCAB_SIZE - 1)
    assert train_tokenizer(texts(), MIN_VOCAB_SIZE).vocab_size == MIN_VOCAB_SIZE
    for nothing in ([], ["", ""]):
        with pytest.raises(TokenizerError, match="no text"):
            train_tokenizer(nothing, 300)
    with pytest.raises(TokenizerError, match="surrogate"):
        train_tokenizer(["\ud800"], 300)


def test_too_little_text_gives_the_real_size() -> None:
    small = train_tokenizer(["ab ab"], 1000)
    assert MIN_VOCAB_SIZE <= small.vocab_size < 1000
    assert len(small.byte_lengths) == small.vocab_size


def test_training_reads_no_further_than_its_budget() -> None:
    read = 0

    def endless() -> object:
        nonlocal read
        while True:
            read += 1
            yield f"第{read}篇 words and words\n" * 10

    train_tokenizer(endless(), 300, max_bytes=20_000)
    assert read <= 100  # each text is over 200 bytes


def test_long_documents_are_cut_at_line_ends() -> None:
    long = "一二三四五六七八九十\n" * 100_000  # 1.1 million characters
    tokenizer = train_tokenizer([long], 280, max_bytes=8_000_000)
    assert tokenizer.decode(tokenizer.encode(long[:5000])) == long[:5000]
    assert len(tokenizer.encode("一二三四五六七八九十")) < 30  # it learned from it


@pytest.mark.parametrize("unbroken", ["字", "aB", "=", "_", " ", "\u0301"])
def test_training_time_is_bounded_on_unbroken_runs(unbroken: str) -> None:
    """Uncut, the trainer needs hours for each of these; cut, a moment."""
    text = unbroken * 200_000
    tokenizer = train_tokenizer([text], 280, max_bytes=8_000_000)
    assert tokenizer.decode(tokenizer.encode(text[:1000])) == text[:1000]


def test_save_and_load_round_trip(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path / "a" / "b")
    loaded = load_tokenizer(tmp_path / "a" / "b")
    assert loaded.fingerprint == tokenizer.fingerprint
    assert loaded.config == tokenizer.config
    assert [loaded.encode(t) for t in NASTY] == [tokenizer.encode(t) for t in NASTY]
    assert sorted(p.name for p in (tmp_path / "a" / "b").iterdir()) == [
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    tokenizer.save(tmp_path / "a" / "b")  # over itself
    assert load_tokenizer(tmp_path / "a" / "b").fingerprint == tokenizer.fingerprint


def test_load_errors_name_file_and_problem(tokenizer: Tokenizer, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="does not exist") as info:
        load_tokenizer(tmp_path / "nowhere")
    assert info.value.hint
    with pytest.raises(TokenizerError, match=r"tokenizer\.json does not exist"):
        load_tokenizer(tmp_path)
    tokenizer.save(tmp_path)
    path = tmp_path / "tokenizer.json"
    whole = path.read_bytes()
    for broken, message in [
        (whole[:-40], "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b"{}", "cannot be read"),
    ]:
        path.write_bytes(broken)
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(tmp_path)
    path.write_bytes(whole)
    (tmp_path / "tokenizer_config.json").write_text("{", encoding="utf-8")
    with pytest.raises(TokenizerError, match=r"tokenizer_config\.json is not valid JSON"):
        load_tokenizer(tmp_path)


def chatml(tokenizer: Tokenizer, directory: Path, config: dict[str, object]) -> None:
    """Our vocabulary under the names that Qwen gives its control tokens."""
    spec = tokenizer.serialized.decode()
    for ours, theirs in [("<|pad|>", "<|endoftext|>"), ("<|end|>", "<|im_end|>")]:
        spec = spec.replace(ours, theirs)
    for name in ("<|bos|>", "<|eos|>"):
        spec = spec.replace(name, name.replace("<|", "<|un"))
    directory.mkdir(exist_ok=True)
    (directory / "tokenizer.json").write_text(spec, encoding="utf-8")
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")


def test_foreign_tokenizer_is_read_by_its_config(tokenizer: Tokenizer, tmp_path: Path) -> None:
    config = {
        "bos_token": None,
        "eos_token": {"content": "<|im_end|>"},
        "pad_token": "<|endoftext|>",
    }
    chatml(tokenizer, tmp_path, config)
    foreign = load_tokenizer(tmp_path)
    assert (foreign.eos_id, foreign.end_id, foreign.pad_id) == (7, 7, 0)
    assert foreign.bos_id == foreign.eos_id  # it has none of its own
    assert foreign.chat_template is None
    (tmp_path / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    assert load_tokenizer(tmp_path).chat_template == "{{ messages }}"
    chatml(tokenizer, tmp_path, {})
    with pytest.raises(TokenizerError, match="names no eos_token"):
        load_tokenizer(tmp_path)


def test_sentencepiece_style_tokenizer_loads(tmp_path: Path) -> None:
    """Llama 2: U+2581 for spaces, <0xE4> for bytes, a space of its own before the first word."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "▁a"]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>", fuse_unk=True)
    )
    backend.normalizer = tokenizers.normalizers.Sequence(
        [tokenizers.normalizers.Prepend("▁"), tokenizers.normalizers.Replace(" ", "▁")]
    )
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    foreign = load_tokenizer(tmp_path)
    assert (foreign.bos_id, foreign.eos_id, foreign.pad_id, foreign.end_id) == (1, 2, 2, 2)
    for text in ["a b", " a", "你a 好"]:
        assert foreign.decode(foreign.encode(text)) == text
    assert foreign.token_bytes(vocab["▁a"]) == b" a"
    assert foreign.token_bytes(vocab["<0xE4>"]) == b"\xe4"


def test_saved_file_survives_a_failed_save(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(tmp_path)
    before = (tmp_path / "tokenizer.json").read_bytes()
    broken = Tokenizer(tokenizer.serialized, {"bos_token": {1, 2}})  # a set is not JSON
    with pytest.raises(TypeError):
        broken.save(tmp_path)
    assert (tmp_path / "tokenizer.json").read_bytes() == before
    assert load_tokenizer(tmp_path).config == tokenizer.config


@given(
    st.lists(
        st.sampled_from(["the quick ", "春眠不觉晓", "1234567890", " " * 40, "x", "\n", "🚀"]),
        min_size=1,
    ),
    st.integers(1, 1000),
    st.integers(0, 20_000),
)
@settings(max_examples=20, deadline=None)
def test_long_text_is_refused_only_beyond_the_limit(
    tokenizer: Tokenizer, words: list[str], times: int, limit: int
) -> None:
    text = "".join(words) * times
    ids = tokenizer.encode(text)
    try:
        assert tokenizer.encode(text, limit=limit) == ids
    except ContextLengthError:
        assert len(ids) > limit


def test_long_text_is_refused_after_its_first_parts(tokenizer: Tokenizer) -> None:
    """Encoding the whole of these takes half a minute."""
    for part in ("1234567890" * 400_000, "春眠不觉晓，" * 400_000, "!?.,;:" * 400_000):
        with pytest.raises(ContextLengthError, match="more than 512 tokens"):
            tokenizer.encode(part, limit=512)
        chat = [{"role": "user", "content": part}]
        with pytest.raises(ContextLengthError, match="more than 512 tokens"):
            encode_chat(tokenizer, chat, limit=512)
