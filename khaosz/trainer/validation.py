"""Scores of held-out text and samples of prompts, for the callbacks of a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from khaosz.config import TrainConfig
from khaosz.config.stages import STAGES_OF
from khaosz.data.shards.manifest import Group, PreparedData
from khaosz.data.tokenizer import Tokenizer
from khaosz.data.tokenizer.chat import encode_chat
from khaosz.errors import ConfigError, quoted
from khaosz.inference.generator import Generator
from khaosz.inference.sampling import SamplingParams
from khaosz.inference.scoring import Document, Score, score_documents
from khaosz.model import evaluating
from khaosz.parallel import sum_over_ranks
from khaosz.trainer.callback import Evaluate
from khaosz.trainer.train_context import TrainContext

_SAMPLE = SamplingParams(max_tokens=60, temperature=0.7, top_p=0.9, seed=0)


def evaluate_on(prepared: PreparedData, split: str, config: TrainConfig) -> Evaluate | None:
    """A function that scores the first `eval_tokens` of a split by language, spread over the ranks;
    None if the split is empty."""
    languages = sorted({group.lang for group in prepared.groups if group.split == split})
    if not languages:
        return None
    share = config.eval_tokens // len(languages)

    def evaluate(context: TrainContext) -> dict[str, float]:
        assert config.window is not None
        parallel = context.parallel
        scores = {}
        for lang in languages:
            groups = [g for g in prepared.groups if g.split == split and g.lang == lang]
            documents = first_documents(groups, share)
            score = score_documents(
                context.model,
                islice(documents, parallel.rank, None, parallel.world),
                window=config.window,
                byte_lengths=context.tokenizer.byte_lengths,
                dtype=context.plan.torch_dtype,
            )
            nats, tokens, text_nats, text_bytes = sum_over_ranks(
                [score.nats, score.tokens, score.text_nats, score.text_bytes], parallel
            )
            scores[lang] = Score(nats, int(tokens), text_nats, int(text_bytes))
        total = sum(scores.values(), Score())
        if not total.tokens:
            return {}
        means = {"loss": total.loss, "bits_per_byte": total.bits_per_byte}
        for lang, score in scores.items():
            if score.text_bytes and len(scores) > 1:
                means[f"bits_per_byte_{lang}"] = score.bits_per_byte
        return means

    return evaluate


def first_documents(groups: list[Group], tokens: int) -> Iterator[Document]:
    """Documents of the groups in turn, one of each, until they have about `tokens` tokens."""
    sources = [_documents(group) for group in groups]
    taken = 0
    while sources:
        for source in list(sources):
            document = next(source, None)
            if document is None:
                sources.remove(source)
                continue
            if taken >= tokens:
                return
            # One very long document must not represent its whole language.
            ids = document.ids[: max(2, tokens - taken)]
            mask = document.loss_mask
            taken += len(ids)
            yield Document(ids, None if mask is None else mask[: len(ids)])


def _documents(group: Group) -> Iterator[Document]:
    for shard in group.shards:
        for i in range(len(shard)):
            start, end = shard.document_span(i)
            mask = shard.loss_mask
            yield Document(shard.tokens[start:end], None if mask is None else mask[start:end])


def sample_text(context: TrainContext, prompt: str) -> str:
    """The model's text after a prompt: a continuation in pretraining, an answer in other stages."""
    model = context.model
    generator = Generator(model, context.tokenizer)
    if context.config.stage == "pt":
        ids = generator.prompt_ids(prompt)
    else:
        ids = generator.chat_ids([{"role": "user", "content": prompt}])
    with evaluating(model):
        return generator.generate(ids, _SAMPLE).text


def check_prompts(config: TrainConfig, tokenizer: Tokenizer, context: int) -> None:
    """Raises `ConfigError` for one of the recipe's `prompts` that fills the context, which would
    end the run at its first sample."""
    if config.stage not in STAGES_OF["prompts"]:
        return
    for prompt in config.prompts:
        if config.stage == "pt":
            ids = [*tokenizer.begin_ids, *tokenizer.encode(prompt), *tokenizer.finish_ids]
        else:
            turn = {"role": "user", "content": prompt}
            ids = encode_chat(tokenizer, [turn], add_generation_prompt=True)[0]
        if len(ids) >= context:
            raise ConfigError(
                f"prompts: {quoted(prompt)} has {len(ids):,} tokens, which fills the context of"
                f" {context:,}"
            )
