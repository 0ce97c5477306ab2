"""Embedders and rerankers in the layouts in which they are published, from safetensors and GGUF:
vectors and scores are those of transformers with the documented pooling, texts in one batch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_encoders as tiny
import torch
from tiny_encoders import LONGEST, TEXTS
from tiny_models import SHAPE
from torch import nn
from typer.testing import CliRunner

from khaosz.cli import app
from khaosz.data.tokenizer import Tokenizer, train_tokenizer
from khaosz.data.tokenizer.files import template_processing
from khaosz.errors import KhaoszError, ModelError, NotEnoughMemoryError
from khaosz.interop.gguf import blocks
from khaosz.interop.gguf.file import GgufFile
from khaosz.interop.gguf.tokenizer import tokenizer_to_metadata
from khaosz.interop.huggingface_config import config_from_hf, config_to_hf, load_config
from khaosz.interop.local_models import default_model
from khaosz.interop.models import check_model, load_model, open_model
from khaosz.memory.machine import Limit
from khaosz.rag.models.embedders import check_embedder, open_embedder
from khaosz.rag.models.encoder_models import EncoderEmbedder, check_encoder_memory
from khaosz.rag.models.rerankers import open_reranker

transformers = pytest.importorskip("transformers")
VECTOR, SCORE = 1e-5, 1e-4  # fp32 sums in another order
MEAN, CLS, LAST, RANK = 1, 2, 3, 4


def close(ours: Any, expected: Any, distance: float) -> None:
    np.testing.assert_allclose(ours, np.array(expected), rtol=0, atol=distance)


def unit(row: torch.Tensor) -> np.ndarray:
    return (row / row.norm()).numpy()


def reference(model: Any, path: Path, texts: Sequence[str], pooling: str) -> np.ndarray:
    """By transformers' tokenizer and model, one text at a time."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    rows = []
    for text in texts:
        with torch.no_grad():
            states = model(**tokenizer(text, return_tensors="pt")).last_hidden_state[0]
        rows.append(unit(states[0] if pooling == "cls" else states.mean(0)))
    return np.array(rows)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_vectors_of_directory_and_gguf(family: str, pooling: str, tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "model.gguf"
    model = getattr(tiny, f"save_{family}")(folder)
    tiny.save_modules(folder, {"cls": "cls_token", "mean": "mean_tokens"}[pooling])
    tiny.bert_gguf(model, file, {"cls": CLS, "mean": MEAN}[pooling])
    expected = reference(model, folder, TEXTS, pooling)
    for path in (folder, file):
        check_embedder(str(path))
        embedder = open_embedder(str(path))
        close(embedder.passages(TEXTS), expected, VECTOR)
        assert embedder.dimension == 32


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
def test_tokens_are_those_of_transformers(family: str, tmp_path: Path) -> None:
    model = getattr(tiny, f"save_{family}")(tmp_path / "model")
    tiny.bert_gguf(model, tmp_path / "model.gguf", MEAN)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for name in ("model", "model.gguf"):
        ours = EncoderEmbedder(tmp_path / name)._tokenizer._tokenizer
        for text in TEXTS:
            assert ours.encode(text).ids == theirs(text)["input_ids"], text
            pair, expected = ours.encode("the cat", text), theirs("the cat", text)
            assert pair.ids == expected["input_ids"]
            if family == "bert":
                assert pair.type_ids == expected["token_type_ids"]


def test_context_begins_behind_the_padding_id(tmp_path: Path) -> None:
    """XLM-R's table has two rows more than a text may have tokens; that of GGUF has not."""
    model = tiny.save_xlm_roberta(tmp_path / "model")
    tiny.bert_gguf(model, tmp_path / "model.gguf", MEAN)
    assert model.config.max_position_embeddings == LONGEST + 2
    full = "the " * (LONGEST - 2)  # and two special tokens
    expected = reference(model, tmp_path / "model", [full], "mean")
    for name in ("model", "model.gguf"):
        embedder = EncoderEmbedder(tmp_path / name)
        assert embedder._encoder.longest == LONGEST
        close(embedder.passages([full]), expected, VECTOR)
        assert embedder.tokens([full]) == LONGEST


@pytest.mark.parametrize("kind", ["F16", "Q8_0", "Q4_0"])
def test_quantised_encoder(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The vectors of the dequantised weights, which are read some rows at a time."""
    monkeypatch.setattr(blocks, "_CHUNK", 96)
    model = tiny.save_xlm_roberta(tmp_path / "model")
    tiny.bert_gguf(model, tmp_path / "model.gguf", CLS, kind=kind)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                raw = blocks.quantize(parameter.numpy(), kind)
                parameter.copy_(torch.from_numpy(blocks.dequantize(raw, kind).copy()))
    expected = reference(model, tmp_path / "model", TEXTS, "cls")
    close(open_embedder(str(tmp_path / "model.gguf")).passages(TEXTS), expected, VECTOR)


def test_scores_of_cross_encoders(tmp_path: Path) -> None:
    folder, file = tmp_path / "reranker", tmp_path / "reranker.gguf"
    model = tiny.save_xlm_roberta(folder, labels=1)
    tiny.bert_gguf(model, file, RANK, labels=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    with torch.no_grad():
        expected = [
            float(model(**tokenizer("the cat", text, return_tensors="pt")).logits) for text in TEXTS
        ]
    assert np.ptp(expected) > 0.01
    # sentence-transformers 6 writes it beside a cross-encoder too.
    (folder / "modules.json").write_text('[{"path": "", "type": "a.transformer.Transformer"}]')
    for path in (folder, file):
        close(open_reranker(str(path)).scores("the cat", TEXTS), expected, SCORE)


def test_bert_reranker_without_its_pooler_is_refused(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path / "model", labels=1)
    tiny.bert_gguf(model, tmp_path / "model.gguf", RANK, labels=1)
    assert np.isfinite(open_reranker(str(tmp_path / "model")).scores("the cat", TEXTS)).all()
    refused(open_reranker, tmp_path / "model.gguf", "cls.weight.*pooler")


def refused(call: Any, path: Path, message: str) -> None:
    with pytest.raises(KhaoszError, match=message) as error:
        call(str(path))
    assert "\n" not in str(error.value) and path.name in str(error.value)


# Names of published models, and what their model cards put before a text.
PROMPTS = {
    "multilingual-e5-small": ("query: ", "passage: "),
    "multilingual-e5-large-instruct": (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query: ",
        "",
    ),
    "bge-small-zh-v1.5": ("为这个句子生成表示以用于检索相关文章：", ""),
    "BAAI_bge-large-en": ("Represent this sentence for searching relevant passages: ", ""),
    "bge-m3": ("", ""),
    "e5-smaller": ("", ""),
}


@pytest.mark.parametrize("name", PROMPTS)
def test_prefixes_of_known_models(name: str, tmp_path: Path) -> None:
    query, passage = PROMPTS[name]
    model = tiny.save_bert(tmp_path / name)
    tiny.bert_gguf(model, tmp_path / f"{name}-f16.gguf", MEAN)
    for path in (tmp_path / name, tmp_path / f"{name}-f16.gguf"):
        settings = EncoderEmbedder(path)._settings
        assert (settings.query_prefix, settings.passage_prefix) == (query, passage)
    tiny.save_modules(tmp_path / name, "cls_token", query="the ", document="")
    settings = EncoderEmbedder(tmp_path / name)._settings
    assert (settings.query_prefix, settings.passage_prefix) == ("the ", "")


def marked_tokenizer(path: Path, begin: bool) -> Tokenizer:
    """As Qwen3-Embedding adds an end token, and EmbeddingGemma a begin token too."""
    made = plain_tokenizer({"<|bos|>": "<bos>", "<|eos|>": "<eos>"})
    spec = json.loads(made.serialized)
    bos, eos = ("<bos>", made.bos_id), ("<eos>", made.eos_id)
    spec["post_processor"] = template_processing([bos] if begin else [], [eos])
    return saved_tokenizer(spec, made.config, path)


def plain_tokenizer(names: dict[str, str]) -> Tokenizer:
    """With other names for some special tokens: by ours, a reader knows what we add."""
    texts = ["the quick brown fox yes no", "春眠不觉晓，企鹅住在南极"]
    made = train_tokenizer(iter(texts * 20), 340)
    text, config = made.serialized.decode(), json.dumps(made.config)
    for ours, theirs in names.items():
        text, config = text.replace(ours, theirs), config.replace(ours, theirs)
    return Tokenizer(text.encode(), json.loads(config))


def saved_tokenizer(spec: dict[str, Any], config: dict[str, Any], path: Path) -> Tokenizer:
    made = Tokenizer(json.dumps(spec).encode(), config)
    made.save(path)
    return made


LONG = ["春眠不觉晓", "the quick brown fox " * 4, "no"]


def gemma(path: Path) -> tuple[Any, list[nn.Linear]]:
    """EmbeddingGemma's layout: windows of both sides, mean, two projections."""
    tokenizer = marked_tokenizer(path, begin=True)
    config = transformers.Gemma3TextConfig(
        **{**SHAPE, "vocab_size": tokenizer.vocab_size, "num_hidden_layers": 6}, sliding_window=10,
        use_bidirectional_attention=True, query_pre_attn_scalar=12, pad_token_id=0,
        bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id,
        rope_parameters={
            "full_attention": {"rope_type": "default", "rope_theta": 1e6},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    )  # fmt: skip
    model = tiny.random_values(transformers.Gemma3TextModel(config))
    model.save_pretrained(path)
    torch.manual_seed(0)
    dense = [nn.Linear(32, 48, bias=False), nn.Linear(48, 32, bias=False)]
    prompts = {"query": "the fox ", "document": "no "}
    tiny.save_modules(path, "mean_tokens", *dense, **prompts)
    return model, dense


GEMMA_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def decoder_gguf(
    architecture: str, model: Any, tokenizer: Tokenizer, path: Path, names: dict[str, str],
    extra: dict[str, Any], more: dict[str, torch.Tensor],
) -> None:  # fmt: skip
    tensors = dict(more)
    for name, tensor in model.state_dict().items():
        parts = name.removeprefix("model.").removesuffix(".weight").split(".", 2)
        stem = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}
        stored = stem.get(parts[0]) or f"blk.{parts[1]}.{names[parts[2]]}"
        if "norm" in stored and architecture.startswith("gemma"):
            tensor = tensor + 1
        tensors[f"{stored}.weight"] = tensor
    config = model.config
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        f"{architecture}.context_length": config.max_position_embeddings,
        f"{architecture}.embedding_length": config.hidden_size,
        f"{architecture}.block_count": config.num_hidden_layers,
        f"{architecture}.feed_forward_length": config.intermediate_size,
        f"{architecture}.attention.head_count": config.num_attention_heads,
        f"{architecture}.attention.head_count_kv": config.num_key_value_heads,
        f"{architecture}.attention.key_length": config.head_dim,
        f"{architecture}.attention.value_length": config.head_dim,
        f"{architecture}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        **{f"{architecture}.{key}": value for key, value in extra.items() if "." not in key[:9]},
    }
    metadata |= tokenizer_to_metadata(tokenizer, config.vocab_size)
    metadata |= {key: value for key, value in extra.items() if key.startswith("tokenizer.")}
    tiny.write_tensors(path, metadata, tensors)


def test_embedding_gemma(tmp_path: Path) -> None:
    folder, file = tmp_path / "model", tmp_path / "embeddinggemma-300M-F32.gguf"
    folder.mkdir()
    model, dense = gemma(folder)
    tokenizer = marked_tokenizer(tmp_path / "tokenizer", begin=True)
    decoder_gguf(
        "gemma-embedding", model, tokenizer, file, GEMMA_NAMES,
        {"attention.sliding_window": 10, "rope.freq_base": 1e6, "pooling_type": MEAN,
         "dense_2_feat_in": 32, "dense_2_feat_out": 48},
        {"dense_2.weight": dense[0].weight, "dense_3.weight": dense[1].weight},
    )  # fmt: skip
    written = json.loads((folder / "config.json").read_text())
    ours = load_config(folder)
    assert (written["sliding_window"], ours.sliding_window) == (10, 6)
    assert config_from_hf(config_to_hf(ours)) == ours
    published = {
        folder: ("the fox ", "no "),
        file: ("task: search result | query: ", "title: none | text: "),
    }
    for path, prefixes in published.items():
        check_embedder(str(path))
        embedder = open_embedder(str(path))
        for prefix, ours in zip(
            prefixes, (embedder.queries(LONG), embedder.passages(LONG)), strict=True
        ):
            expected = []
            for text in LONG:
                ids = [tokenizer.bos_id, *tokenizer.encode(prefix + text), tokenizer.eos_id]
                with torch.no_grad():
                    states = model(torch.tensor([ids])).last_hidden_state[0]
                    expected.append(unit(dense[1](dense[0](states.mean(0)))))
            close(ours, expected, VECTOR)
        for opens in (open_model, load_model):
            refused(opens, path, "does not generate text")
        refused(open_reranker, path, "is an embedder")


QWEN_NAMES = GEMMA_NAMES | {"post_attention_layernorm": "ffn_norm"}


def qwen(vocab_size: int, tied: bool = True) -> Any:
    config = transformers.Qwen3Config(
        **{**SHAPE, "vocab_size": vocab_size, "max_position_embeddings": 1024},
        tie_word_embeddings=tied,
    )
    return tiny.random_values(transformers.Qwen3ForCausalLM(config))


def test_qwen3_embedding_from_gguf(tmp_path: Path) -> None:
    tokenizer = marked_tokenizer(tmp_path, begin=False)
    model, path = qwen(tokenizer.vocab_size), tmp_path / "Qwen3-Embedding-0.6B-Q8_0.gguf"
    decoder_gguf("qwen3", model, tokenizer, path, QWEN_NAMES, {"pooling_type": LAST}, {})
    embedder = open_embedder(str(path))
    query = (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        "Query:"
    )
    for prefix, ours in ((query, embedder.queries(LONG)), ("", embedder.passages(LONG))):
        expected = []
        for text in LONG:
            ids = [*tokenizer.encode(prefix + text), tokenizer.eos_id]
            with torch.no_grad():
                expected.append(unit(model.model(torch.tensor([ids])).last_hidden_state[0, -1]))
        close(ours, expected, VECTOR)


SYSTEM = (
    "Judge whether the Document meets the requirements based on the Query and the Instruct"
    ' provided. Note that the answer can only be "yes" or "no".'
)
PAIR = (
    "<Instruct>: Given a web search query, retrieve relevant passages that answer the query\n"
    "<Query>: {query}\n<Document>: {document}"
)
# As in the model card.
RERANK = (
    f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{PAIR}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_ROLE = '{{{{ messages | selectattr("role", "eq", "{}") | map(attribute="content") | first }}}}'
# As Qwen/Qwen3-Reranker-0.6B has for sentence-transformers: other words, to tell them apart.
ROLES = (
    f"<|im_start|>user\n{_ROLE.format('system')}\n<Query>: {_ROLE.format('query')}\n"
    f"<Document>: {_ROLE.format('document')}"
    "<|im_end|>\n<|im_start|>assistant\n"
)


def chat_tokenizer(path: Path, template: str | None) -> Tokenizer:
    names = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    renamed = {f"<|reserved_{i}|>": name for i, name in enumerate(names)}
    made = plain_tokenizer({**renamed, "<|bos|>": "<bos>", "<|end|>": "<end>"})
    config = {**made.config, "chat_template": template}
    config["additional_special_tokens"] = names[:2]
    spec = json.loads(made.serialized)
    for token in spec["added_tokens"]:  # as in Qwen3's
        token["special"] = token["special"] and "think" not in token["content"]
    return saved_tokenizer(spec, config, path)


def expected_scores(
    model: Any, path: Path, template: str, passages: Sequence[str], answers: Sequence[int]
) -> list[float]:
    import tokenizers

    backend = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    scores = []
    for passage in passages:
        text = template.replace("{query}", "企鹅").replace("{document}", passage)
        ids = backend.encode(text, add_special_tokens=False).ids
        with torch.no_grad():
            yes, no = model(torch.tensor([ids])).logits[0, -1][list(answers)]
        scores.append(float(yes - no))
    return scores


def test_qwen3_reranker(tmp_path: Path) -> None:
    passages = ["企鹅住在南极", "the quick brown fox", "no"]
    card, plain = tmp_path / "card", tmp_path / "roles"
    tokenizer = chat_tokenizer(card, CHAT)
    answers = [tokenizer.encode("yes")[0], tokenizer.encode("no")[0]]
    model = qwen(tokenizer.vocab_size)
    expected = expected_scores(model, card, RERANK, passages, answers)
    assert np.ptp(expected) > 0.01
    model.save_pretrained(card)
    close(open_reranker(str(card)).scores("企鹅", passages), expected, SCORE)

    chat_tokenizer(plain, ROLES)
    model.save_pretrained(plain)
    modules = [("", "base.modules.transformer.Transformer")]
    modules += [("1_LogitScore", "cross_encoder.modules.logit_score.LogitScore")]
    (plain / "1_LogitScore").mkdir()
    ids = {"true_token_id": 30, "false_token_id": 31}
    (plain / "1_LogitScore/config.json").write_text(json.dumps(ids))
    (plain / "modules.json").write_text(
        json.dumps([{"path": p, "type": f"sentence_transformers.{k}"} for p, k in modules])
    )
    template = ROLES.replace(_ROLE.format("query"), "{query}")
    template = template.replace(_ROLE.format("document"), "{document}")
    template = template.replace(_ROLE.format("system"), "the quick fox")
    prompts = {"prompts": {"web": "the quick fox"}, "default_prompt_name": "web"}
    (plain / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    template = template.removesuffix("\n")  # which Jinja leaves out
    expected = expected_scores(model, card, template, passages, [30, 31])
    close(open_reranker(str(plain)).scores("企鹅", passages), expected, SCORE)
    refused(open_embedder, plain, "is a reranker")


@pytest.mark.parametrize("tied", [True, False])
def test_qwen3_reranker_from_gguf(tied: bool, tmp_path: Path) -> None:
    """The converter writes two rows of the head, in place of one that is not tied."""
    passages = ["企鹅住在南极", "the quick brown fox", "no"]
    tokenizer = chat_tokenizer(tmp_path, CHAT)
    answers = [tokenizer.encode("yes")[0], tokenizer.encode("no")[0]]
    model, path = qwen(tokenizer.vocab_size, tied), tmp_path / "reranker.gguf"
    head = model.lm_head.weight[answers]
    expected = expected_scores(model, tmp_path, RERANK, passages, answers)
    model.lm_head = None  # the file has no output.weight
    decoder_gguf(
        "qwen3", model, tokenizer, path, QWEN_NAMES,
        {"pooling_type": RANK, "classifier.output_labels": ["yes", "no"],
         "tokenizer.chat_templates": ["rerank"], "tokenizer.chat_template.rerank": RERANK},
        {"cls.output.weight": head},
    )  # fmt: skip
    ours = open_reranker(str(path)).scores("企鹅", passages)
    close(ours, expected, SCORE)
    refused(open_embedder, path, "is a reranker")
    refused(open_model, path, "is a reranker")


def test_search_command_with_gguf_files(tmp_path: Path) -> None:
    """An embedder and a reranker of the BERT family by path, as a user names them."""
    embedder, reranker = tmp_path / "bge-small-zh-v1.5.gguf", tmp_path / "bge-reranker.gguf"
    tiny.bert_gguf(tiny.save_bert(tmp_path / "e"), embedder, CLS)
    judge = tiny.save_xlm_roberta(tmp_path / "r", labels=1)
    tiny.bert_gguf(judge, reranker, None, labels=1)
    for n, text in enumerate(["the cat sat on 北京", "北京是首都", "a dog and the cat"]):
        (tmp_path / f"{n}.txt").write_text(text)
    kb, files = str(tmp_path / "a.kb"), [str(tmp_path / f"{n}.txt") for n in range(3)]
    run = CliRunner()
    added = run.invoke(app, ["rag", "add", *files, "--kb", kb, "--embedder", str(embedder)])
    assert added.exit_code == 0, added.output
    command = ["rag", "search", "the cat", "--kb", kb, "--json", "--reranker", str(reranker)]
    found = run.invoke(app, command)
    assert found.exit_code == 0, found.output
    hits = json.loads(found.stdout)
    assert len(hits) == 3 and all({"dense", "rerank"} <= hit["legs"].keys() for hit in hits)
    expected = open_reranker(str(reranker)).scores("the cat", [hit["text"] for hit in hits])
    close([hit["score"] for hit in hits], expected, SCORE)


def test_faults_of_gguf_encoders_are_named(tmp_path: Path) -> None:
    model, path = tiny.save_bert(tmp_path / "model"), tmp_path / "model.gguf"
    good = tiny.bert_tensors(model, 0)
    metadata: dict[str, Any] = {}

    def written(changes: dict[str, Any], tensors: dict[str, Any] | None = None) -> Path:
        values = {**metadata, **changes}
        values = {key: value for key, value in values.items() if value is not None}
        tiny.write_tensors(path, values, good if tensors is None else tensors)
        return path

    tiny.bert_gguf(model, path, MEAN)
    metadata = dict(GgufFile.open(path).metadata)
    check_model(path)
    for changes, message in (
        ({"bert.attention.causal": True}, "causal attention"),
        ({"bert.attention.head_count": 5}, "5 heads"),
        ({"bert.feed_forward_length": None}, "feed_forward_length.*missing"),
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer 'rwkv'"),
        ({"tokenizer.ggml.bos_token_id": 999}, "bos_token_id 999"),
        ({"tokenizer.ggml.model": "t5"}, "scores"),
        ({"bert.pooling_type": 9}, "pooling_type = 9"),
    ):
        refused(open_embedder, written(changes), message)
    less = {name: tensor for name, tensor in good.items() if name != "blk.1.ffn_up.bias"}
    refused(open_embedder, written({}, less), "blk.1.ffn_up.bias' is missing")
    refused(open_embedder, written({}, {**good, "blk.0.x": good["token_types.weight"]}), "blk.0.x")
    path = written({"bert.pooling_type": None})
    refused(open_reranker, path, "cls.output.weight' is missing")
    with pytest.raises(ModelError, match="does not generate"):
        load_model(path)


def test_models_are_named_as_they_were_pulled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("KHAOSZ_CACHE", str(tmp_path))
    for check in (check_embedder, open_embedder, open_reranker):
        with pytest.raises(ModelError, match="is not on this machine yet") as error:
            check("bge-small-zh")
        assert error.value.hint is not None and "khaosz pull bge-small-zh" in error.value.hint
    (tmp_path / "models").mkdir()
    path = tmp_path / "models/own.gguf"
    tiny.bert_gguf(tiny.save_bert(tmp_path / "model"), path, CLS)
    assert open_embedder("own").name == str(path)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match="no trained model"):
        default_model()  # chats with none of them
    path.rename(tmp_path / "other.gguf")
    pulled = CliRunner().invoke(app, ["pull", "./other.gguf"])
    assert "khaosz rag add FILES --embedder other" in pulled.output


def test_what_is_not_an_embedder_is_refused(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path / "judge", labels=1)
    tiny.bert_gguf(model, tmp_path / "judge.gguf", None, labels=1)
    for path in (tmp_path / "judge", tmp_path / "judge.gguf"):
        refused(check_embedder, path, "is a reranker, not an embedder")
    (tmp_path / "gemma").mkdir()
    body, _ = gemma(tmp_path / "gemma")
    tokenizer = marked_tokenizer(tmp_path / "tokenizer", begin=True)
    extra = {"attention.sliding_window": 10, "pooling_type": MEAN}
    path = tmp_path / "gemma.gguf"
    decoder_gguf("gemma-embedding", body, tokenizer, path, GEMMA_NAMES, extra, {})
    refused(check_embedder, path, "dense_2.weight' is missing")


def test_what_is_not_a_reranker_is_refused(tmp_path: Path) -> None:
    tokenizer = marked_tokenizer(tmp_path / "embedder", begin=False)
    model = qwen(tokenizer.vocab_size)
    model.save_pretrained(tmp_path / "embedder")
    tiny.save_modules(tmp_path / "embedder", "lasttoken")
    path = tmp_path / "embedder.gguf"
    decoder_gguf("qwen3", model, tokenizer, path, QWEN_NAMES, {"pooling_type": LAST}, {})
    for each in (tmp_path / "embedder", path):
        refused(open_reranker, each, "is an embedder, not a reranker")
    config = transformers.Qwen3Config(
        **{**SHAPE, "vocab_size": tokenizer.vocab_size}, num_labels=1, pad_token_id=0
    )
    classifier = transformers.Qwen3ForSequenceClassification(config)
    classifier.save_pretrained(tmp_path / "classifier")
    tokenizer.save(tmp_path / "classifier")
    refused(open_reranker, tmp_path / "classifier", "sequence classifier on a decoder")


def test_encoder_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path / "model")
    tiny.bert_gguf(model, tmp_path / "model.gguf", MEAN, kind="Q8_0")
    least = 4 * sum(tensor.numel() for tensor in tiny.bert_tensors(model, 0).values())
    for name in ("model", "model.gguf"):
        check_encoder_memory(tmp_path / name, [Limit("this machine", 2 * least)])
        with pytest.raises(NotEnoughMemoryError, match=f"{name} needs about") as error:
            check_encoder_memory(tmp_path / name, [Limit("this machine", least - 1)])
        assert error.value.hint == "a smaller model is needed"


def test_early_files_of_bge_say_no_pooling(tmp_path: Path) -> None:
    model = tiny.save_bert(tmp_path / "model")
    for name, pooling in (("bge-small-zh-v1.5.gguf", "cls"), ("all-minilm.gguf", "mean")):
        tiny.bert_gguf(model, tmp_path / name, None)
        expected = reference(model, tmp_path / "model", TEXTS, pooling)
        close(open_embedder(str(tmp_path / name)).passages(TEXTS), expected, VECTOR)


def test_encoder_is_refused_before_training_begins(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    gemma(tmp_path / "model")
    (tmp_path / "text.txt").write_text("the quick brown fox\n" * 50)
    run = ["init_from=" + str(tmp_path / "model"), "out=" + str(tmp_path / "out")]
    data = [f"data={tmp_path / 'text.txt'}", "val=", "window=64"]
    result = CliRunner().invoke(app, ["train", "pt", *run, *data])
    assert isinstance(result.exception, ModelError) or result.exit_code == 1
    assert "is an encoder, which cannot be trained" in f"{result.output}{result.exception}"
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("length", [2, 30])
def test_damaged_charsmap_is_named(length: int, tmp_path: Path, capfd: Any) -> None:
    """The library panics about it, which is not one of Python's `Exception`s."""
    model, path = tiny.save_xlm_roberta(tmp_path / "model"), tmp_path / "model.gguf"
    tiny.bert_gguf(model, path, MEAN)
    metadata = dict(GgufFile.open(path).metadata)
    metadata["tokenizer.ggml.precompiled_charsmap"] = np.frombuffer(
        tiny.CHARSMAP[:length], np.uint8
    )
    tiny.write_tensors(path, metadata, tiny.bert_tensors(model, 0))
    refused(lambda name: open_embedder(name).passages(TEXTS), path, "its tokenizer is damaged")
    capfd.readouterr()  # the library prints its panic
