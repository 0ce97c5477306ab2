"""Step for step against TRL: the same weights and the same chats give the same losses.

TRL runs its own trainers with its own tokenisation and collators, we run ours unmodified; its data
are listed in the order in which our strategies draw. Fifty AdamW steps in fp32 on ragged data,
each accumulated over micro-batches of different token counts.

It needs `trl` beside `khaosz`:

    PYTHONPATH=. PYTHON_THAT_HAS_TRL -m pytest tests/trainer/stages/test_trl.py
"""

from __future__ import annotations

import io
import json
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tiny import TINY_MODEL
from torch import Tensor

from khaosz.config import ModelConfig, TrainConfig
from khaosz.data.batches.batch import IGNORE, Batch
from khaosz.data.batches.sequences import TokenSequence, pack_sequences
from khaosz.data.tokenizer import Tokenizer
from khaosz.interop.huggingface import save_model
from khaosz.model import RewardModel, Transformer
from khaosz.parallel import ParallelContext
from khaosz.trainer.open_run import RunOrigin
from khaosz.trainer.run import assemble
from khaosz.trainer.stages.dpo import sequence_rewards
from khaosz.trainer.stages.pairs import PairStrategy
from khaosz.trainer.strategy import Compute
from khaosz.trainer.trainer import Trainer

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # the peer's, on import
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    transformers = pytest.importorskip("transformers")
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

STEPS, WINDOW, LR = 50, 128, 1e-3
PER_STEP, PER_MICRO, PAIR_LR = 8, 2, 2e-4  # pairs: slow enough that all steps have some loss left
Losses = list[float]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Matrices this small are slower on two."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def random_model(tokenizer: Tokenizer) -> Transformer:
    """All weights random, also of the norms."""
    config = {**TINY_MODEL, "vocab_size": tokenizer.vocab_size, "max_position_embeddings": WINDOW}
    model = Transformer(ModelConfig.parse({**config, "qk_norm": True}))
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.normal_(1, 0.1, generator=generator)
            else:
                spread = 0.5 if "embed" in name else parameter.shape[-1] ** -0.5
                parameter.normal_(0, spread, generator=generator)
    return model


def saved(model: Transformer, tokenizer: Tokenizer, directory: Path) -> Path:
    ends = [tokenizer.eos_id, tokenizer.end_id]
    save_model(model, directory, bos_id=tokenizer.bos_id, eos_ids=ends, pad_id=tokenizer.pad_id)
    tokenizer.save(directory)
    return directory


@pytest.fixture
def start(random_model: Transformer, tokenizer: Tokenizer, tmp_path: Path) -> Path:
    return saved(random_model, tokenizer, tmp_path / "start")


@pytest.fixture
def texts(corpus_file: Path) -> list[str]:
    lines = corpus_file.read_text(encoding="utf-8").splitlines()
    return [text for line in lines if len(text := json.loads(line)["text"]) > 60]


def written(records: list[dict[str, Any]], path: Path) -> Path:
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def chats_of(texts: list[str]) -> list[dict[str, Any]]:
    """48 chats of one or two turns, none longer than the window: TRL would cut it elsewhere."""
    records = []
    for i in range(48):
        text = texts[i]
        messages = [user(text[: 5 + i % 11]), assistant(text[16 : 18 + 3 * (i % 7)])]
        if i % 3 == 0:
            messages += [user(text[8 : 12 + i % 5]), assistant(text[20 : 22 + 2 * (i % 9)])]
        records.append({"messages": messages})
    return records


def pairs_of(texts: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "prompt": texts[i][: 8 + i],
            "chosen": texts[i][20 : 24 + 3 * (i % 9)],
            "rejected": texts[i + 30][: 4 + 5 * (i % 6)],
        }
        for i in range(24)
    ]


def as_chat(record: dict[str, Any]) -> dict[str, Any]:
    return {
        "prompt": [user(record["prompt"])],
        "chosen": [assistant(record["chosen"])],
        "rejected": [assistant(record["rejected"])],
    }


def ours(stage: str, data: Path, model: Path, out: Path, **changes: Any) -> Trainer:
    values: dict[str, Any] = {
        "stage": stage, "data": data, "out": out, "init_from": model, "window": WINDOW,
        "batch_tokens": 4 * WINDOW, "batch_pairs": PER_STEP, "micro_batch": 1, "max_steps": STEPS,
        "optimizer": "adamw", "lr": LR, "embedding_lr": LR, "weight_decay": 0.0, "grad_clip": 1.0,
        "schedule": {"name": "constant", "warmup_steps": 0}, "dtype": "fp32", "compile": "off",
        "val_fraction": 0.0, "dedup": False,
    }  # fmt: skip
    config = TrainConfig.parse({**values, **changes})
    quiet = Console(file=io.StringIO())
    return assemble(RunOrigin(config), ParallelContext(torch.device("cpu")), quiet)


def theirs(config: Any, out: Path, **changes: Any) -> Any:
    """TRL's configuration, with everything of ours that differs from its defaults."""
    values = {
        "output_dir": str(out), "max_steps": STEPS, "max_length": WINDOW + 1,
        "learning_rate": LR, "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-10, "max_grad_norm": 1.0,
        "bf16": False, "gradient_checkpointing": False, "use_cpu": True,
        "train_sampling_strategy": "sequential", "logging_steps": 1, "save_strategy": "no",
        "report_to": "none", "disable_tqdm": True,
    }  # fmt: skip
    return config(**{**values, **changes})


class Recorded:
    """Mixed into a trainer of TRL: records what each micro-batch adds to its reported loss."""

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss: Tensor = super().training_step(*args, **kwargs)  # type: ignore[misc]
        self.__dict__.setdefault("losses", []).append(float(loss))
        return loss

    def steps(self, micro_batches: int) -> tuple[Losses, Losses]:
        """Loss and gradient norm of each step."""
        losses: Losses = self.__dict__["losses"]
        starts = range(0, len(losses), micro_batches)
        norms = [row["grad_norm"] for row in self.state.log_history if "grad_norm" in row]  # type: ignore[attr-defined]
        return [sum(losses[i : i + micro_batches]) for i in starts], norms


class RecordedSFT(Recorded, trl.SFTTrainer):  # type: ignore[name-defined]
    pass


class RecordedDPO(Recorded, trl.DPOTrainer):  # type: ignore[name-defined]
    pass


class RecordedRM(Recorded, trl.RewardTrainer):  # type: ignore[name-defined]
    pass


def run_ours(trainer: Trainer, steps: int = STEPS) -> tuple[Losses, Losses]:
    trainer.context.model.train()
    rows = [trainer.step(step) for step in range(steps)]
    return [row["loss"] for row in rows if row], [row["grad_norm"] for row in rows if row]


def assert_same(ours: tuple[Losses, Losses], theirs: tuple[Losses, Losses]) -> None:
    for name, a, b in zip(("loss", "norm"), ours, theirs, strict=True):
        assert len(a) == len(b) == STEPS, (name, len(a), len(b))
    loss = max(abs(a - b) for a, b in zip(ours[0], theirs[0], strict=True))
    norm = max(abs(a / b - 1) for a, b in zip(ours[1], theirs[1], strict=True))
    print(f"loss {ours[0][0]:.5f} -> {ours[0][-1]:.5f}, differs by {loss:.2e}, norm by {norm:.2e}")
    # fp32 in another order of operations, carried on by fifty updates.
    assert loss <= 1e-5 and norm <= 1e-4
    assert ours[0][-1] < ours[0][0] - 0.1, "nothing was learned, so nothing was compared"


# -- supervised fine-tuning ------------------------------------------------------------------


def conversations(batch: Batch) -> list[dict[str, list[int]]]:
    """The chats of a packed batch: all ids, and labels as in TRL, not shifted."""
    actual = []
    for ids, labels, doc_ids in zip(batch.ids, batch.labels, batch.doc_ids, strict=True):
        for number in range(int(doc_ids.max()) + 1):
            own = doc_ids == number
            targets = labels[own].tolist()
            assert targets[-1] != IGNORE, "a chat ends with a token that is trained on"
            actual.append(
                {"input_ids": [*ids[own].tolist(), targets[-1]], "labels": [IGNORE, *targets]}
            )
    return actual


class Unpacked:
    """A collator over rows that hold several chats, as ours do: TRL pads each to the longest."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.inner = DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_id)

    def __call__(self, rows: list[dict[str, Any]]) -> Any:
        return self.inner([chat for row in rows for chat in row["chats"]])


def sft_against(
    kind: Any,
    texts: list[str],
    start: Path,
    tokenizer: Tokenizer,
    folder: Path,
    steps: int = STEPS,
) -> tuple[tuple[Losses, Losses], tuple[Losses, Losses]]:
    """Both runs over our windows: each is a micro-batch of ours and, unpacked, one of TRL's."""
    trainer = ours("sft", written(chats_of(texts), folder / "c.jsonl"), start, folder / "ours")
    windows = [batch for step in range(steps) for batch in trainer.strategy.micro_batches(step)]
    assert len(windows) == 4 * steps
    assert len({batch.tokens for batch in windows}) > 5, "micro-batches of one size hide the bug"
    peer = kind(
        model=str(start),
        args=theirs(
            trl.SFTConfig, folder / "theirs", max_steps=steps,
            per_device_train_batch_size=1, gradient_accumulation_steps=4,
            remove_unused_columns=False, dataset_kwargs={"skip_prepare_dataset": True},
        ),
        train_dataset=datasets.Dataset.from_list([{"chats": conversations(w)} for w in windows]),
        data_collator=Unpacked(tokenizer),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    peer.train()
    return run_ours(trainer, steps), peer.steps(4)


def test_chats_have_the_ids_and_labels_of_trl(
    texts: list[str], start: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    records = chats_of(texts)
    trainer = ours("sft", written(records, tmp_path / "c.jsonl"), start, tmp_path / "ours")
    mine = set()
    for step in range(STEPS):
        for batch in trainer.strategy.micro_batches(step):
            mine |= {(*c["input_ids"], None, *c["labels"]) for c in conversations(batch)}
    peer = trl.SFTTrainer(
        model=str(start),
        args=theirs(trl.SFTConfig, tmp_path / "theirs", assistant_only_loss=True),
        train_dataset=datasets.Dataset.from_list(records),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )
    expected = {(*row["input_ids"], None, *row["labels"]) for row in peer.train_dataset}
    assert len(expected) == len(records) and mine == expected


def test_sft(texts: list[str], start: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    assert_same(*sft_against(RecordedSFT, texts, start, tokenizer, tmp_path))


class AveragedSFT(RecordedSFT):
    """Trainers before transformers #34191: the mean of each micro-batch's mean."""

    loss_is_scaled_for_ga = False

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        return super().compute_loss(*args, **{**kwargs, "num_items_in_batch": None})


def test_mean_of_means_is_another_loss(
    texts: list[str], start: Path, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    mine, averaged = sft_against(AveragedSFT, texts, start, tokenizer, tmp_path, steps=8)
    apart = [abs(a - b) for a, b in zip(mine[0], averaged[0], strict=True)]
    print("mean of means is off by", [f"{gap:.4f}" for gap in apart])
    # The weights of the first step are equal, so all of this is the normalisation: a hundred times
    # what `assert_same` allows.
    assert apart[0] > 1e-3 and max(apart) > 1e-2


# -- pairs -----------------------------------------------------------------------------------


def drawn(strategy: PairStrategy, steps: int = STEPS) -> list[int]:
    """The pairs of all steps in the order of our draws."""
    batches = [batch for step in range(steps) for batch in strategy.micro_batches(step)]
    assert len({batch.tokens for batch in batches}) > steps // 10
    return [pair for batch in batches for pair in batch.fields["pair"].tolist()]


def pairs_against(
    kind: Any, config: Any, stage: str, texts: list[str], start: Path, folder: Path
) -> tuple[Trainer, Any]:
    """Both trainers over the same pairs in the same order, chats on their side."""
    records = pairs_of(texts)
    data = written(records, folder / "p.jsonl")
    trainer = ours(stage, data, start, folder / "ours", lr=PAIR_LR, embedding_lr=PAIR_LR)
    strategy = trainer.strategy
    assert isinstance(strategy, PairStrategy) and len(strategy.data.pairs) == len(records)
    order = drawn(strategy)
    assert len(order) == STEPS * PER_STEP and set(order[: len(records)]) == set(range(len(records)))
    peer = kind(
        model=str(start),
        args=theirs(
            config, folder / "theirs", learning_rate=PAIR_LR,
            per_device_train_batch_size=PER_MICRO,
            gradient_accumulation_steps=PER_STEP // PER_MICRO,
        ),
        train_dataset=datasets.Dataset.from_list([as_chat(records[i]) for i in order]),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    whole = stage == "rm"  # TRL's reward model reads a chat, its DPO a prompt and an answer
    for i, row in zip(order, peer.train_dataset, strict=True):
        pair = strategy.data.pairs[i]
        prompt = pair.prompt_ids.tolist()
        if not whole:
            assert row["prompt_ids"] == prompt
        for own, name in ((pair.chosen_ids, "chosen_ids"), (pair.rejected_ids, "rejected_ids")):
            assert row[name] == [*(prompt if whole else []), *own.tolist()]
    return trainer, peer


def test_dpo(texts: list[str], start: Path, tmp_path: Path) -> None:
    """TRL averages each micro-batch over its pairs and then the micro-batches: with as many pairs
    in each, that is our mean over the pairs of the step."""
    trainer, peer = pairs_against(RecordedDPO, trl.DPOConfig, "dpo", texts, start, tmp_path)
    peer.train()
    mine = run_ours(trainer)
    assert mine[0][0] == pytest.approx(math.log(2), abs=1e-6)
    assert_same(mine, peer.steps(PER_STEP // PER_MICRO))


@pytest.fixture
def reward_model(random_model: Transformer) -> RewardModel:
    model = RewardModel.from_transformer(random_model)
    torch.nn.init.normal_(model.score.weight, std=0.2, generator=torch.Generator().manual_seed(2))
    return model


def test_rm(
    texts: list[str], reward_model: RewardModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Averaged as DPO is. Both read the reward at the token that ends the answer."""
    start = saved(reward_model, tokenizer, tmp_path / "reward_model")
    trainer, peer = pairs_against(RecordedRM, trl.RewardConfig, "rm", texts, start, tmp_path)
    peer.train()
    assert_same(run_ours(trainer), peer.steps(PER_STEP // PER_MICRO))


def test_last_micro_batch_of_an_epoch_weighs_more_in_trl(
    texts: list[str], reward_model: RewardModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """Seven pairs in micro-batches of 2, 2, 2 and 1: in TRL the last pair counts for two. Here a
    pair counts for one in any layout, and steps are never cut short at the end of an epoch."""
    start = saved(reward_model, tokenizer, tmp_path / "reward_model")
    records = pairs_of(texts)[:7]
    data = written(records, tmp_path / "p.jsonl")
    trainer = ours("rm", data, start, tmp_path / "ours", batch_pairs=7)
    strategy = trainer.strategy
    assert isinstance(strategy, PairStrategy)
    order = drawn(strategy, steps=1)
    alone = []
    for i in order:
        (batch,) = strategy.batches(strategy.data, [[i]])
        alone.append(float(strategy.loss(trainer.context.model, batch, Compute())))
    strategy.metric_sums.clear()
    mine = trainer.step(0)
    assert mine is not None and mine["loss"] == pytest.approx(sum(alone) / 7, abs=1e-6)
    peer = RecordedRM(
        model=str(start),
        args=theirs(
            trl.RewardConfig, tmp_path / "theirs", max_steps=1,
            per_device_train_batch_size=2, gradient_accumulation_steps=4,
        ),
        train_dataset=datasets.Dataset.from_list([as_chat(records[i]) for i in order]),
        processing_class=transformers.AutoTokenizer.from_pretrained(start),
    )  # fmt: skip
    peer.train()
    means = [sum(alone[i : i + 2]) / len(alone[i : i + 2]) for i in range(0, 7, 2)]
    (loss,) = peer.steps(4)[0]
    assert loss == pytest.approx(sum(means) / 4, abs=1e-6)
    assert abs(loss - mine["loss"]) > 1e-3


def test_transformers_finds_the_end_of_an_answer_by_the_padding_id(
    reward_model: RewardModel, tokenizer: Tokenizer, tmp_path: Path
) -> None:
    """The last token that is not the padding's, whatever the attention mask says. An answer that
    ends with that token (padding with the end token, trl #3091) is read one token early; ours,
    which knows its length, at its end. Where padding has an id of its own, as in our tokenizers,
    the two agree."""
    start = saved(reward_model, tokenizer, tmp_path / "reward_model")
    peer = transformers.AutoModelForSequenceClassification.from_pretrained(start).eval()
    assert peer.config.pad_token_id == tokenizer.pad_id not in (tokenizer.end_id, tokenizer.eos_id)
    answer = [40, 41, 42, 43, tokenizer.end_id]

    def by_us(length: int) -> float:
        batch = pack_sequences([TokenSequence(answer[:length], 2)], WINDOW, tokenizer.pad_id)
        return float(sequence_rewards(reward_model, batch, Compute()))

    def by_them(pad_id: int) -> float:
        peer.config.pad_token_id = pad_id
        mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0]])
        ids = torch.tensor([[*answer, pad_id, pad_id]])
        return float(peer(input_ids=ids, attention_mask=mask).logits)

    with torch.no_grad():
        assert by_them(tokenizer.pad_id) == pytest.approx(by_us(5), abs=1e-5)
        assert by_them(tokenizer.end_id) == pytest.approx(by_us(4), abs=1e-5)
        assert abs(by_us(4) - by_us(5)) > 1e-3
