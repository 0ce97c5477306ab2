"""Encoders against transformers, the reference, from folders in the published layout."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
import torch
from tokenizers import models, normalizers, pre_tokenizers, processors

from khaosz.errors import ConfigError, ModelError
from khaosz.rag import KnowledgeBase
from khaosz.rag.models.embedders import open_embedder
from khaosz.rag.models.encoder_models import CrossEncoder, EncoderEmbedder

transformers = pytest.importorskip("transformers")

TEXTS = ["the cat sat", "北京是首都", "a", "dogs run and cats sleep all day long", "北 京 the the"]
_SIZES = dict(
    hidden_size=32, num_hidden_layers=3, num_attention_heads=4, intermediate_size=48,
    hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
)  # fmt: skip
# fp32 sums in another order: 24 bits over three layers of width 32.
_CLOSE = dict(rtol=1e-4, atol=2e-6)


def tokenizer_of(family: str) -> tokenizers.Tokenizer:
    words = ["<pad>", "<s>", "</s>", "<unk>"]
    words += sorted({w for text in TEXTS for w in text.split()} | set("北京是首都"))
    made = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.UnicodeScripts()]
    )
    pair = "<s> $A </s> </s> $B </s>" if family == "xlm-roberta" else "<s> $A </s> $B:1 </s>:1"
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made


def folder_of(
    family: str, path: Path, labels: int = 0, longest: int = 40, act: str = "gelu"
) -> Any:
    """A tiny random model of a family as transformers saves it, and the model."""
    torch.manual_seed(3)
    tokenizer = tokenizer_of(family)
    shift = 0 if family == "bert" else 1
    config = transformers.AutoConfig.for_model(
        family, **_SIZES, vocab_size=tokenizer.get_vocab_size(), hidden_act=act,
        max_position_embeddings=longest + shift, type_vocab_size=1 if shift else 2,
        pad_token_id=0, **({"num_labels": labels} if labels else {}),
    )  # fmt: skip
    kind = "AutoModelForSequenceClassification" if labels else "AutoModel"
    model = getattr(transformers, kind).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # initially, biases are zero and norms are one
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    model.save_pretrained(path)
    tokenizer.save(str(path / "tokenizer.json"))
    return model


def reference(model: Any, path: Path, texts: list[str], pooling: str) -> np.ndarray:
    """One text at a time, without padding."""
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    rows = []
    for text in texts:
        with torch.no_grad():
            states = model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state[0]
        row = {"cls": states[0], "mean": states.mean(0), "last": states[-1]}[pooling]
        rows.append((row / row.norm()).numpy())
    return np.array(rows)


def pooled_by(path: Path, pooling: str) -> None:
    names = {"cls": "cls_token", "mean": "mean_tokens", "last": "lasttoken"}
    modes = {f"pooling_mode_{n}": key == pooling for key, n in names.items()}
    (path / "1_Pooling").mkdir(exist_ok=True)
    (path / "1_Pooling/config.json").write_text(json.dumps(modes))


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("pooling", ["cls", "mean", "last"])
def test_vectors_match_transformers(family: str, pooling: str, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path)
    pooled_by(tmp_path, pooling)
    ours = EncoderEmbedder(tmp_path).passages(TEXTS)
    np.testing.assert_allclose(ours, reference(model, tmp_path, TEXTS, pooling), **_CLOSE)
    assert ours.dtype == np.float32


@pytest.mark.parametrize("act", ["gelu_new", "relu", "silu"])
def test_activations(act: str, tmp_path: Path) -> None:
    model = folder_of("bert", tmp_path, act=act)
    ours = EncoderEmbedder(tmp_path).queries(TEXTS)
    np.testing.assert_allclose(ours, reference(model, tmp_path, TEXTS, "mean"), **_CLOSE)


@pytest.mark.parametrize("family", ["bert", "roberta", "xlm-roberta"])
@pytest.mark.parametrize("labels", [1, 2])
def test_scores_match_transformers(family: str, labels: int, tmp_path: Path) -> None:
    model = folder_of(family, tmp_path, labels)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    expected = []
    for text in TEXTS:
        pair = tokenizer.encode("the cat", text)
        kinds = pair.type_ids if family == "bert" else [0] * len(pair.ids)
        with torch.no_grad():
            logits = model(torch.tensor([pair.ids]), token_type_ids=torch.tensor([kinds])).logits[0]
        expected.append(float(logits[0] if labels == 1 else logits[1] - logits[0]))
    scores = CrossEncoder(tmp_path).scores("the cat", TEXTS)
    np.testing.assert_allclose(scores, expected, **_CLOSE)


def test_prefixes_are_read_from_the_folder(tmp_path: Path) -> None:
    folder_of("bert", tmp_path)
    prompts = {"prompts": {"query": "the ", "document": "dogs "}}
    plain = EncoderEmbedder(tmp_path)
    (tmp_path / "config_sentence_transformers.json").write_text(json.dumps(prompts))
    prefixed = EncoderEmbedder(tmp_path)
    assert (prefixed.queries(["cat"]) == plain.queries(["the cat"])).all()
    assert (prefixed.passages(["cat"]) == plain.passages(["dogs cat"])).all()


def test_every_part_of_a_long_text_counts(tmp_path: Path) -> None:
    folder_of("xlm-roberta", tmp_path, longest=12)
    embedder = EncoderEmbedder(tmp_path)
    text = "the cat sat and dogs run all day long " * 3
    whole = embedder.passages([text])[0]
    for changed in (text + "北京", "北京" + text, text.replace("dogs", "北京", 1)):
        assert np.abs(embedder.passages([changed])[0] - whole).max() > 1e-4


def test_windows_are_weighted_by_length(tmp_path: Path) -> None:
    model = folder_of("bert", tmp_path, longest=12)
    text = "the cat sat and dogs run all day long " * 2 + "北京"
    tokenizer = tokenizer_of("bert")
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    room = 12 - 2 - 2  # two special tokens, and two tokens of slack
    windows = [[1, *ids[at : at + room], 2] for at in range(0, len(ids), room)]
    assert len({len(window) for window in windows}) > 1
    with torch.no_grad():
        total = sum(model(torch.tensor([w])).last_hidden_state[0].double().sum(0) for w in windows)
    (ours,) = EncoderEmbedder(tmp_path).passages([text])
    np.testing.assert_allclose(ours, (total / total.norm()).numpy(), **_CLOSE)


def test_long_passage_has_the_score_of_its_best_window(tmp_path: Path) -> None:
    folder_of("bert", tmp_path, labels=1, longest=16)
    judge = CrossEncoder(tmp_path)
    parts = [
        "the cat sat and dogs run all",
        "day long sleep a 北 京",
        "cats sleep all day long the",
    ]
    alone = [judge.scores("the cat", [part])[0] for part in parts]
    text = " ".join(parts)
    assert judge.scores("the cat", [text])[0] >= min(alone)
    endless = "the " * 100
    assert np.isfinite(judge.scores(endless, [text, "cat"])).all()


def test_knowledge_base_uses_folders_as_embedder_and_reranker(tmp_path: Path) -> None:
    folder_of("bert", tmp_path / "embedder")
    folder_of("bert", tmp_path / "judge", labels=1)
    judge = CrossEncoder(tmp_path / "judge")
    embedder = open_embedder(str(tmp_path / "embedder"))
    assert isinstance(embedder, EncoderEmbedder)
    with KnowledgeBase(tmp_path / "a.kb", embedder=embedder) as base:
        for text in TEXTS:
            base.add_text(text, name=text)
        hits = base.search("the cat", 3, reranker=judge)
        assert [hit.score for hit in hits] == sorted((h.score for h in hits), reverse=True)
        assert all("rerank" in hit.legs for hit in hits)
        expected = judge.scores("the cat", [hit.text for hit in hits])
        np.testing.assert_allclose([hit.score for hit in hits], expected, **_CLOSE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "deberta"}, "deberta"),
        ({"hidden_act": "snake"}, "snake"),
        ({"position_embedding_type": "relative_key"}, "absolute"),
        ({"num_attention_heads": 5}, "heads"),
        ({"hidden_size": "32"}, "hidden_size"),
        ({"vocab_size": 9}, "expected"),
        ({"num_hidden_layers": 4}, "missing"),
        ({"num_hidden_layers": 2}, "unexpected"),
    ],
)
def test_refuses_unsupported_models_by_name(
    change: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder_of("bert", tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match=message):
        EncoderEmbedder(tmp_path)


def test_texts_are_lower_cased_where_the_folder_says_so(tmp_path: Path) -> None:
    folder_of("bert", tmp_path)
    plain = EncoderEmbedder(tmp_path).passages(["the cat", "THE CAT"])
    settings = {"max_seq_length": 20, "do_lower_case": True}
    (tmp_path / "sentence_bert_config.json").write_text(json.dumps(settings))
    lower = EncoderEmbedder(tmp_path).passages(["the cat", "THE CAT"])
    assert (lower == plain[0]).all() and (plain[0] != plain[1]).any()


def test_special_tokens_of_other_files(tmp_path: Path) -> None:
    """transformers adds the tokens that tokenizer_config.json alone names."""
    folder_of("bert", tmp_path)
    entry = {"content": "cat", "lstrip": True, "special": False}
    config = {"added_tokens_decoder": {"9": entry}, "tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ours = EncoderEmbedder(tmp_path)
    assert ours.tokens(["the  cats"]) == len(theirs("the  cats")["input_ids"])
    assert ours.tokens(["the  cats"]) == 5  # without the file, "cats" is one unknown word


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", {"num_labels": 3}, "num_labels=3 contradicts id2label=1"),
        (
            "1_Pooling/config.json",
            {"pooling_mode": "mean", "pooling_mode_cls_token": True},
            "pooling_mode='mean' contradicts pooling_mode_cls_token=true",
        ),
        ("tokenizer_config.json", {"do_lower_case": False}, "do_lower_case=False contradicts"),
    ],
)
def test_refuses_contradictions(
    name: str, content: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder_of("bert", tmp_path, labels=int(name == "config.json"))
    made = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.save(str(tmp_path / "tokenizer.json"))
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    before = json.loads(path.read_text()) if path.is_file() else {}
    path.write_text(json.dumps({**before, **content}))
    with pytest.raises(ModelError, match=message):
        (CrossEncoder if name == "config.json" else EncoderEmbedder)(tmp_path)


def test_number_of_labels_without_their_names(tmp_path: Path) -> None:
    folder_of("bert", tmp_path, labels=1)
    expected = CrossEncoder(tmp_path).scores("the cat", TEXTS)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["id2label"]
    path.write_text(json.dumps({**values, "num_labels": 1}))
    assert (CrossEncoder(tmp_path).scores("the cat", TEXTS) == expected).all()


def test_refuses_folders_that_are_incomplete(tmp_path: Path) -> None:
    folder_of("bert", tmp_path / "body")
    with pytest.raises(ModelError, match="no classification head"):
        CrossEncoder(tmp_path / "body")
    folder_of("bert", tmp_path / "many", labels=3)
    with pytest.raises(ModelError, match="3 classes"):
        CrossEncoder(tmp_path / "many")
    for name, message in (("tokenizer.json", "missing"), ("model.safetensors", "no model")):
        broken = tmp_path / f"no-{name}"
        shutil.copytree(tmp_path / "body", broken)
        (broken / name).unlink()
        with pytest.raises(ModelError, match=message):
            EncoderEmbedder(broken)
    (tmp_path / "body/modules.json").write_text('[{"type": "sentence_transformers.models.LSTM"}]')
    with pytest.raises(ModelError, match="LSTM"):
        EncoderEmbedder(tmp_path / "body")
    with pytest.raises((ConfigError, ModelError)):
        open_embedder(str(tmp_path / "none"))
