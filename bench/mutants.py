"""Puts the defects of this field back into our code, one at a time: the tests must go red.

    python -m bench mutants                    all of them, exit 1 if fewer than 95 % are caught
    python -m bench mutants --only NAME ...    some of them
    python -m bench mutants --list             what there is

Each mutant replaces one text, which must occur exactly once, in a copy of the tree and runs the one
test (or group) that is there to notice. First all of those tests run on the copy as it is and must
pass. A test that dies of a NameError or the like has noticed bad Python, not the defect: such a
mutant counts as broken, and broken and timed-out mutants count as not caught.

Python and torch are imported once and every test runs in a fork of that process, which spares two
seconds a mutant: this needs POSIX.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import os
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
COPIED = ("khaosz", "tests", "recipes", "pyproject.toml")
PRELOADED = ("torch", "numpy", "pytest", "safetensors.torch", "tokenizers", "jinja2", "pydantic")
ENOUGH = 0.95
# Python's own complaints about a mutant that is no program.
NO_DEFECT = ("NameError", "TypeError", "AttributeError", "ImportError", "SyntaxError",
             "IndentationError", "UnboundLocalError", "ModuleNotFoundError")  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One defect: in `file`, `old` becomes `new`; `test` is the pytest selection to notice it."""

    name: str
    file: str
    old: str
    new: str
    test: str


# Where they go, and who is to notice.
TRAINER = "khaosz/trainer/trainer.py"
STRATEGY = "khaosz/trainer/strategy.py"
LOSS = "khaosz/trainer/loss.py"
CALIBRATION = "khaosz/trainer/calibration.py"
CHECKPOINT = "khaosz/trainer/checkpoint.py"
OPTIMIZER = "khaosz/trainer/optimizer.py"
BUILD = "khaosz/trainer/alignment/build.py"
DPO = "khaosz/trainer/alignment/dpo.py"
JUDGE = "khaosz/trainer/alignment/judge.py"
LOGPROBS = "khaosz/trainer/alignment/logprobs.py"
PAIRS = "khaosz/trainer/alignment/pairs.py"
POLICY = "khaosz/trainer/alignment/policy_loss.py"
PREFERENCE = "khaosz/trainer/alignment/preference_loss.py"
REFERENCE = "khaosz/trainer/alignment/reference.py"
REWARD = "khaosz/trainer/alignment/reward.py"
RLHF = "khaosz/trainer/alignment/rlhf.py"
ROLLOUT = "khaosz/trainer/alignment/rollout.py"
HELD_OUT = "khaosz/trainer/alignment/validation.py"
BATCH = "khaosz/data/batch.py"
CHAT = "khaosz/data/chat.py"
DATASET = "khaosz/data/dataset.py"
PACKING = "khaosz/data/packing.py"
PREFERENCES = "khaosz/data/preference.py"
RECORDS = "khaosz/data/records.py"
SEQUENCES = "khaosz/data/sequences.py"
PARALLEL = "khaosz/parallel/module.py"
LORA = "khaosz/model/lora.py"
MODULE = "khaosz/model/module.py"
TRANSFORMER = "khaosz/model/transformer.py"
HUGGINGFACE = "khaosz/interop/huggingface.py"

T_LOSS = "tests/trainer/test_loss.py::"
T_LOOP = "tests/trainer/alignment/test_loop_more.py::"
T_PAIRS = "tests/trainer/alignment/test_pairs.py::"
T_PAIRS_MORE = "tests/trainer/alignment/test_pairs_more.py::"
T_POLICY = "tests/trainer/alignment/test_policy_loss.py::"
T_PREFERENCE = "tests/trainer/alignment/test_preference_loss.py::"
T_ROLLOUTS = "tests/trainer/alignment/test_rollouts.py::"
T_ROLLOUTS_MORE = "tests/trainer/alignment/test_rollouts_more.py::"
T_CHAT = "tests/data/test_chat.py::"
T_DATASET = "tests/data/test_dataset.py::"
T_PACKING = "tests/data/test_packing.py::"
T_PREFERENCES = "tests/data/test_preference.py::"
T_SEQUENCES = "tests/data/test_sequences.py::"
T_ISOLATION = "tests/model/test_packing_isolation.py::"
T_LORA = "tests/model/test_lora.py::"
T_TRANSFORMER = "tests/model/test_transformer.py::"

STEPS = T_LOOP + "test_steps_are_those_of_plain_pytorch"
NAN_STEP = T_LOOP + "test_a_nan_step_is_as_if_it_had_not_been"
RATES = T_LOOP + "test_every_group_follows_the_schedule_from_its_own_rate"
RANKS = T_LOOP + "test_the_mean_is_over_the_labels_of_all_ranks"
TOTAL = T_LOOP + "test_steps_are_optimizer_steps"
BACK = T_LOOP + "test_a_checkpoint_brings_back_all_that_a_step_hangs_on"
DECAY = T_LOOP + "test_only_the_matrices_of_the_blocks_decay"
TWO_RANKS = "tests/parallel/test_two_ranks.py::test_gradients_of_a_step"
PLACES = T_SEQUENCES + "test_every_token_stands_where_it_should"
PADS = T_SEQUENCES + "test_padding_is_told_by_its_place_and_never_by_its_id"
BY_TOKEN = T_SEQUENCES + "test_values_by_token_come_back"
DATA_PADS = T_DATASET + "test_padding_is_told_by_doc_ids_and_never_by_an_id"
MASK = T_CHAT + "test_mask_is_the_assistant_text_and_the_end_of_its_turn"
ANSWERED = T_DATASET + "test_the_first_assistant_token_and_the_end_are_scored"
CUT = T_PREFERENCES + "test_answers_are_cut_to_the_window"
UNTRAINED = T_PACKING + "test_conversations_that_cannot_be_trained_are_counted"
TABLE = T_PAIRS_MORE + "test_reference_logprobs_go_to_their_pairs"
STORED = T_PAIRS_MORE + "test_a_stored_table_is_used_for_its_model_and_pairs_only"
RESUMED = T_PAIRS_MORE + "test_the_reference_of_a_resumed_policy_is_where_it_started"
SHOWN = T_PAIRS_MORE + "test_what_is_shown_is_what_each_answer_is_worth"
LN_2 = T_PAIRS + "test_step_0_is_ln_2"
BY_HAND = T_PREFERENCE + "test_dpo_by_hand"
PPO_FORMULA = T_ROLLOUTS_MORE + "test_the_loss_of_an_update_is_its_formula[ppo]"
GRPO_FORMULA = T_ROLLOUTS_MORE + "test_the_loss_of_an_update_is_its_formula[grpo]"
PENALTY = T_ROLLOUTS_MORE + "test_the_penalty_of_ppo_is_what_the_policy_says_over_the_reference"
WRAPPER = T_ROLLOUTS_MORE + "test_what_makes_gradients_runs_inside_the_wrapper"
GAE = T_POLICY + "test_gae_by_hand"
KL = T_POLICY + "test_estimators_of_kl"
CLIP = T_POLICY + "test_the_clip_holds_on_the_side_that_pays"

# fmt: off
NORMALISATION = [
    # Averaging micro-batch means: divide by the global count, the last partial window included.
    Mutant(
        "mean of micro-batch means", TRAINER,
        "                (loss / share).backward()",
        "                (loss / max(1, batch.tokens) / len(batches)).backward()",
        STEPS,
    ),
    Mutant(
        "mean of means in the log", TRAINER,
        "total += loss.detach()",
        "total += loss.detach() / max(1, batch.tokens) * count / len(batches)",
        STEPS,
    ),
    Mutant(
        "noted numbers divided by micro-batches", TRAINER,
        "{name: value / count for name",
        "{name: value / len(batches) for name",
        STEPS,
    ),
    Mutant(
        "count of this rank alone", TRAINER,
        "count, tokens, stop = across([mine, labels, float(context.stopping is not None)],"
        " parallel)",
        "count, tokens, stop = mine, labels, float(context.stopping is not None)",
        RANKS,
    ),
    Mutant(
        "loss of this rank alone", TRAINER,
        "loss_sum, *noted = across(mine_summed, parallel)",
        "loss_sum, *noted = mine_summed",
        RANKS,
    ),
    Mutant(
        "last partial micro-batch dropped", STRATEGY,
        "range(0, len(draws), self.micro_rows)",
        "range(0, len(draws) - self.micro_rows + 1, self.micro_rows)",
        T_LOSS + "test_micro_batches_hold_every_window_of_a_step",
    ),
    Mutant(
        "last incomplete step dropped", CALIBRATION,
        "limits.append(-(-round(strategy.examples * config.epochs) // rows))",
        "limits.append(round(strategy.examples * config.epochs) // rows)",
        TOTAL,
    ),
    Mutant(
        "total steps ignore accumulation", CALIBRATION,
        "limits.append(-(-round(strategy.examples * config.epochs) // rows))",
        "limits.append(-(-round(strategy.examples * config.epochs) // strategy.micro_rows))",
        TOTAL,
    ),
    Mutant(
        "loss averaged before it is counted", LOSS,
        "return _ChunkedCrossEntropy.apply(flat.to(dtype), weight, targets, chunk, inner)",
        "return _ChunkedCrossEntropy.apply("
        "flat.to(dtype), weight, targets, chunk, inner) / max(1, len(targets))",
        T_LOSS + "test_equals_the_float64_reference[True-64]",
    ),
    Mutant(
        "mean over the pairs of a micro-batch", DPO,
        "return preference_loss(chosen, rejected, self.config).sum()",
        "return preference_loss(chosen, rejected, self.config).mean()",
        LN_2,
    ),
    Mutant(
        "mean over the reward pairs of a micro-batch", REWARD,
        "return reward_loss(chosen, rejected, margin, self.config.centre).sum()",
        "return reward_loss(chosen, rejected, margin, self.config.centre).mean()",
        T_PAIRS + "test_a_new_reward_model_finds_everything_equal",
    ),
    Mutant(
        "mean over the answer tokens of a micro-batch", RLHF,
        "loss = policy.sum()",
        "loss = policy.mean()",
        GRPO_FORMULA,
    ),
    Mutant(
        "held-out mean over micro-batches", HELD_OUT,
        "count += strategy.count(batch)",
        "count += 1",
        T_PAIRS_MORE + "test_held_out_numbers_are_means_over_pairs",
    ),
    # Truncated or padded tokens in the denominator; a fully masked micro-batch gives 0/0.
    Mutant(
        "padding in the denominator", BATCH,
        "return int((self.labels != IGNORE).sum().item())",
        "return self.labels.numel()",
        STEPS,
    ),
    Mutant(
        "prompts in the denominator", BATCH,
        "return int((self.labels != IGNORE).sum().item())",
        "return int((self.doc_ids >= 0).sum().item())",
        STEPS,
    ),
    Mutant(
        "0/0 of a fully masked micro-batch", TRAINER,
        "                (loss / share).backward()",
        "                (loss / batch.tokens * (batch.tokens / share)).backward()",
        STEPS,
    ),
    # Masked NaN x 0 = NaN: select, don't multiply.
    Mutant(
        "masked loss multiplied by zero", LOSS,
        "loss = torch.where(scored[:, None], total.log() + top - chosen, 0.0).sum()",
        "loss = ((total.log() + top - chosen) * scored[:, None]).sum()",
        T_LOSS + "test_a_masked_row_is_selected_away_inside_a_chunk_too",
    ),
    Mutant(
        "masked gradient multiplied by zero", LOSS,
        "return loss, torch.where(scored[:, None], gradient, 0.0).to(hidden.dtype)",
        "return loss, (gradient * scored[:, None]).to(hidden.dtype)",
        T_LOSS + "test_a_masked_row_is_selected_away_inside_a_chunk_too",
    ),
    Mutant(
        "masked positions not left out", LOSS,
        "if not bool(scored.all()):",
        "if False:",
        T_LOSS + "test_masked_positions_are_selected_not_multiplied",
    ),
    Mutant(
        "attention rows that see nothing", TRANSFORMER,
        "return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & causal)[:, None]",
        "return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & causal"
        " & (doc_ids >= 0)[:, :, None])[:, None]",
        T_ISOLATION + "test_every_position_sees_itself_at_least",
    ),
]

COMPLETIONS = [
    # Off-by-one in the completion mask; the token that ends a turn not trained; pad equal to eos.
    Mutant(
        "first answer token lost", SEQUENCES,
        "labels[row, start + first - 1 : end - 1] = own[first:]",
        "labels[row, start + first : end - 1] = own[first + 1 :]",
        PLACES,
    ),
    Mutant(
        "last prompt token trained", SEQUENCES,
        "first, end = max(1, sequences[i].scored_from), start + len(own)",
        "first, end = max(1, sequences[i].scored_from - 1), start + len(own)",
        PLACES,
    ),
    Mutant(
        "end of an answer not trained", SEQUENCES,
        "labels[row, start + first - 1 : end - 1] = own[first:]",
        "labels[row, start + first - 1 : end - 2] = own[first:-1]",
        PLACES,
    ),
    Mutant(
        "labels not shifted", SEQUENCES,
        "labels[row, start + first - 1 : end - 1] = own[first:]",
        "labels[row, start + first : end] = own[first:]",
        PLACES,
    ),
    Mutant(
        "first assistant token lost", CHAT,
        "int(any(start < b and a < end for a, b in spans)) for start, end in offsets",
        "int(any(a < start < b for a, b in spans)) for start, end in offsets",
        MASK,
    ),
    Mutant(
        "end of a turn not trained", CHAT,
        "loss_mask.append(int(generated_from is not None))",
        "loss_mask.append(0)",
        MASK,
    ),
    Mutant(
        "loss mask not shifted with the labels", DATASET,
        "targets = np.where(mask[from_token + 1] != 0, targets, IGNORE)",
        "targets = np.where(mask[from_token] != 0, targets, IGNORE)",
        ANSWERED,
    ),
    Mutant(
        "a cut conversation loses its end", RECORDS,
        "ends = np.flatnonzero(trained & ~following) + 1",
        "ends = np.flatnonzero(trained & ~following)",
        "tests/data/test_records.py::test_cut_at_turn",
    ),
    Mutant(
        "a turn that just fits is cut off", PACKING,
        "prefix = cut_at_turn(mask[begin : begin + int(lengths[i]) + 1], window + 1)",
        "prefix = cut_at_turn(mask[begin : begin + int(lengths[i]) + 1], window)",
        T_PACKING + "test_a_turn_that_ends_with_the_last_label_of_the_window_is_kept",
    ),
    Mutant(
        "end token taken for padding in sequences", SEQUENCES,
        "labels[row, start + first - 1 : end - 1] = own[first:]",
        "labels[row, start + first - 1 : end - 1] = "
        "own[first:].masked_fill(own[first:] == pad_id, IGNORE)",
        PADS,
    ),
    Mutant(
        "end token taken for padding in windows", DATASET,
        "        labels[to_cell] = targets",
        "        labels[to_cell] = np.where(targets == pad_id, IGNORE, targets)",
        DATA_PADS,
    ),
    Mutant(
        "compared answers lose their end", PREFERENCES,
        "return answer[: ends[0] + 1]",
        "return answer[: ends[0]]",
        T_PREFERENCES + "test_the_answer_ends_where_generation_ends",
    ),
    # A template without generation markers; tokenised apart and joined; double BOS.
    Mutant(
        "silent training on nothing", CHAT,
        "if need_mask and not any(loss_mask):",
        "if need_mask and not loss_mask:",
        T_CHAT + "test_template_without_markers_trains_on_nothing_and_says_so",
    ),
    Mutant(
        "prompt and answer merge differently", PREFERENCES,
        "if not np.array_equal(start, prompt_ids):",
        "if len(start) != len(prompt_ids):",
        T_PREFERENCES + "test_templates_that_fit_no_pair",
    ),
    Mutant(
        "double BOS", CHAT,
        "    ids: list[int] = []\n    loss_mask: list[int] = []",
        "    ids: list[int] = [tokenizer.bos_id]\n    loss_mask: list[int] = [0]",
        MASK,
    ),
]

PACKED = [
    # Packing: attention across documents, position ids not reset.
    Mutant(
        "attention across documents", TRANSFORMER,
        "return ((doc_ids[:, :, None] == doc_ids[:, None, :]) & causal)[:, None]",
        "return causal.expand(len(doc_ids), 1, length, length)",
        T_ISOLATION + "test_no_document_sees_another[0]",
    ),
    Mutant(
        "documents not told apart in training", STRATEGY,
        "hidden = model(batch.ids, batch.positions, batch.doc_ids)",
        "hidden = model(batch.ids, batch.positions)",
        T_LOSS + "test_packed_documents_cost_what_each_costs_alone",
    ),
    Mutant(
        "log-probabilities that see the neighbour", LOGPROBS,
        "return model(batch.ids, batch.positions, batch.doc_ids)",
        "return model(batch.ids, batch.positions)",
        TABLE,
    ),
    Mutant(
        "positions not reset in sequences", SEQUENCES,
        "positions[row, start:end] = torch.arange(len(own))",
        "positions[row, start:end] = torch.arange(start, end)",
        PLACES,
    ),
    Mutant(
        "positions not reset in windows", DATASET,
        "positions[cell] = within",
        "positions[cell] = cell % window",
        T_DATASET + "test_packed_rows_give_the_documents_back",
    ),
    Mutant(
        "positions given and ignored", TRANSFORMER,
        "        if positions is None:",
        "        if True:",
        T_ISOLATION + "test_positions_are_those_given",
    ),
    # A conversation longer than the window clogs the packer and yields NaN.
    Mutant(
        "windows with nothing to train", PACKING,
        "keep = ~short & ~untrained",
        "keep = ~short",
        UNTRAINED,
    ),
    Mutant(
        "long conversations cut amid a turn", PACKING,
        "            keep[i] = False\n            skipped_long += 1",
        "            lengths[i] = window",
        UNTRAINED,
    ),
    Mutant(
        "prompts that leave no room", PREFERENCES,
        "if len(ids) >= window:",
        "if len(ids) > window:",
        CUT,
    ),
    Mutant(
        "answers longer than the window", PREFERENCES,
        "return EncodedPair(ids, chosen[:room], rejected[:room], cut,",
        "return EncodedPair(ids, chosen, rejected, cut,",
        CUT,
    ),
    Mutant(
        "answers of a pair cut differently", PREFERENCES,
        "return EncodedPair(ids, chosen[:room], rejected[:room], cut,",
        "return EncodedPair(ids, chosen[:room], rejected[: room - 1], cut,",
        CUT,
    ),
    # Token id 0 taken for padding; padding trained on because the mask is padded with 1.
    Mutant(
        "token 0 not scored", LOSS,
        "    scored = targets != IGNORE",
        "    scored = targets > 0",
        T_LOSS + "test_token_id_zero_is_a_label_like_any_other",
    ),
    Mutant(
        "token 0 not counted", BATCH,
        "return int((self.labels != IGNORE).sum().item())",
        "return int((self.labels > 0).sum().item())",
        PADS,
    ),
    Mutant(
        "labels of sequences padded with 1", SEQUENCES,
        "labels = torch.full(shape, IGNORE, dtype=torch.int64)",
        "labels = torch.full(shape, 1, dtype=torch.int64)",
        PLACES,
    ),
    Mutant(
        "labels of windows padded with the pad token", DATASET,
        "labels = np.full(n_rows * window, IGNORE, np.int64)",
        "labels = np.full(n_rows * window, pad_id, np.int64)",
        DATA_PADS,
    ),
]

REFERENCES = [
    # Dropout left on in the reference; the reference rebuilt from the resumed policy.
    Mutant(
        "dropout in a log-ratio", BUILD,
        'if config.lora is not None and config.lora.dropout and config.stage != "rm":',
        'if config.lora is not None and config.lora.dropout and config.stage == "ppo":',
        "tests/trainer/alignment/test_runs.py::TestBadInput::test_dropout_in_a_log_ratio",
    ),
    Mutant(
        "dropout with adapters off", LORA,
        "y: Tensor = self.base(x)",
        "y: Tensor = self.base(F.dropout(x, self.config.dropout, self.training))",
        T_LORA + "test_dropout_draws_nothing_without_lora",
    ),
    Mutant(
        "dropout in evaluation", LORA,
        "self.train(base.training)",
        "self.train(True)",
        T_LORA + "test_dropout_is_off_in_evaluation",
    ),
    Mutant(
        "table of the resumed policy", BUILD,
        "if config.reference is not None or start.checkpoint is not None:",
        "if config.reference is not None:",
        RESUMED,
    ),
    Mutant(
        "reference rebuilt from the resumed policy", BUILD,
        "elif start.checkpoint is None and config.lora is None:",
        "elif config.lora is None:",
        RESUMED,
    ),
    Mutant(
        "reference that learns along", BUILD,
        "frozen = copy.deepcopy(model)",
        "frozen = model",
        RESUMED,
    ),
    Mutant(
        "adapters left on in DPO's reference", DPO,
        "with without_lora(model):",
        "with torch.no_grad():",
        T_PAIRS_MORE + "test_adapters_off_are_the_reference_however_far_they_have_learned",
    ),
    Mutant(
        "adapters left on in a rollout's reference", RLHF,
        "with without_lora(self.policy):",
        "with torch.no_grad():",
        T_ROLLOUTS_MORE + "test_adapters_off_are_the_reference_of_a_rollout",
    ),
    Mutant(
        "table of another model", REFERENCE,
        'if (file.metadata() or {}).get("key") == key:',
        "if file.metadata():",
        STORED,
    ),
    Mutant(
        "reference rows by place", PAIRS,
        'fields["reference"] = data.reference[fields["pair"]]',
        'fields["reference"] = data.reference[: len(fields["pair"])]',
        TABLE,
    ),
    # Step 0 must be ln 2; show margin, accuracy and both log-probabilities.
    Mutant(
        "chosen and rejected swapped", PAIRS,
        "for answer in (pair.chosen_ids, pair.rejected_ids):",
        "for answer in (pair.rejected_ids, pair.chosen_ids):",
        TABLE,
    ),
    Mutant(
        "columns of the reference swapped", DPO,
        "reference[:, side]",
        "reference[:, 1 - side]",
        LN_2,
    ),
    Mutant(
        "reference at another temperature", DPO,
        "sums = batch.per_sequence(batch_logprobs(model, batch, compute)[0])",
        "sums = batch.per_sequence(batch_logprobs(model, batch, compute, temperature=1.5)[0])",
        TABLE,
    ),
    Mutant(
        "mean against sum", PREFERENCE,
        "ratio = self.logprobs - self.reference",
        "ratio = self.mean - self.reference",
        BY_HAND,
    ),
    Mutant(
        "log-ratios always per token", PREFERENCE,
        "return ratio / self.tokens if per_token else ratio",
        "return ratio / self.tokens",
        BY_HAND,
    ),
    Mutant(
        "loss with the wrong sign", PREFERENCE,
        "loss = -(1 - noise) * F.logsigmoid(beta * gap) - noise * F.logsigmoid(-beta * gap)",
        "loss = -(1 - noise) * F.logsigmoid(-beta * gap) - noise * F.logsigmoid(beta * gap)",
        BY_HAND,
    ),
    Mutant(
        "margin of a reward pair added", PREFERENCE,
        "gap if margin is None else gap - margin",
        "gap if margin is None else gap + margin",
        T_PREFERENCE + "test_reward_loss_by_hand",
    ),
    Mutant(
        "margin shown with the wrong sign", DPO,
        "margin=(won - lost).sum(),",
        "margin=(lost - won).sum(),",
        SHOWN,
    ),
    Mutant(
        "one log-probability shown twice", DPO,
        "logprob_rejected=rejected.mean.sum(),",
        "logprob_rejected=chosen.mean.sum(),",
        SHOWN,
    ),
    Mutant(
        "a tie counted as right", PREFERENCE,
        "return (chosen > rejected).float() + 0.5 * (chosen == rejected).float()",
        "return (chosen >= rejected).float()",
        T_PREFERENCE + "test_a_tie_is_half_right",
    ),
    # Reward read on the wrong padding side, or after EOS without saying so.
    Mutant(
        "reward read at the first padding", SEQUENCES,
        "ends[i] = row * shape[1] + end - 1",
        "ends[i] = row * shape[1] + min(end, shape[1] - 1)",
        PLACES,
    ),
    Mutant(
        "reward read one before the end", SEQUENCES,
        "ends[i] = row * shape[1] + end - 1",
        "ends[i] = row * shape[1] + end - 2",
        PLACES,
    ),
    Mutant(
        "reward read at the end of the row", SEQUENCES,
        "ends[i] = row * shape[1] + end - 1",
        "ends[i] = row * shape[1] + shape[1] - 1",
        PLACES,
    ),
    Mutant(
        "finished answers pay for the unfinished", RLHF,
        "judged = judged - penalty * (~finished).float()",
        "judged = judged - penalty * finished.float()",
        T_ROLLOUTS + "test_unfinished_answers_cost_what_the_recipe_says",
    ),
    Mutant(
        "cut answers called finished", ROLLOUT,
        'one.finish_reason == "stop"',
        "bool(one.ids)",
        T_ROLLOUTS + "test_an_answer_holds_its_end_token_if_it_came",
    ),
    Mutant(
        "a value that has seen its token", RLHF,
        "return critic.rewards(hidden[batch.labels != IGNORE])",
        "return critic.rewards(hidden.roll(-1, 1)[batch.labels != IGNORE])",
        T_ROLLOUTS + "test_the_value_of_a_token_is_that_of_what_stands_before_it",
    ),
]

ROLLOUTS = [
    # PPO and GRPO through the unwrapped module; mask not permuted with the batch.
    Mutant(
        "forward past the wrapper", TRAINER,
        "loss = self.module(batch.to(self.context.parallel.device))",
        'loss = getattr(self.module, "module", self.module)(batch.to("cpu"))',
        WRAPPER + "[grpo]",
    ),
    Mutant(
        "critic unknown to the wrapper", STRATEGY,
        "self.companion = strategy.companion  #",
        'self.__dict__["companion"] = strategy.companion  #',
        WRAPPER + "[ppo]",
    ),
    Mutant(
        "fields not permuted with the batch", SEQUENCES,
        "return torch.cat([lists[i] for i in self.order])",
        "return torch.cat(list(lists))",
        BY_TOKEN,
    ),
    Mutant(
        "fields not permuted back", SEQUENCES,
        "parts = torch.split(values, [lengths[i] for i in self.order])",
        "parts = torch.split(values, lengths)",
        BY_TOKEN,
    ),
    Mutant(
        "fields of other answers", RLHF,
        "name: batch.per_token([values[i] for i in picked])",
        "name: batch.per_token([values[i] for i in local])",
        GRPO_FORMULA,
    ),
    # k1 called k3, signs, and everything else that training does not notice.
    Mutant(
        "k1 called k3", POLICY,
        "return difference.exp() - 1 - difference",
        "return -difference",
        KL,
    ),
    Mutant(
        "k1 reversed", POLICY,
        "    return logprobs - reference",
        "    return reference - logprobs",
        KL,
    ),
    Mutant(
        "k3 reversed", POLICY,
        "difference = reference - logprobs",
        "difference = logprobs - reference",
        KL,
    ),
    Mutant(
        "KL of PPO's reward reversed", RLHF,
        "rewards = token_rewards(score, kl_k1(old, reference), weight)",
        "rewards = token_rewards(score, kl_k1(reference, old), weight)",
        PENALTY,
    ),
    Mutant(
        "k3 in PPO's reward", RLHF,
        "rewards = token_rewards(score, kl_k1(old, reference), weight)",
        "rewards = token_rewards(score, kl_k3(old, reference), weight)",
        PENALTY,
    ),
    Mutant(
        "k3 reported as KL", RLHF,
        "float(kl_k1(old, ref).double().sum())",
        "float(kl_k3(old, ref).double().sum())",
        PENALTY,
    ),
    Mutant(
        "KL of GRPO's loss reversed", RLHF,
        'penalty = estimate(logprobs, fields["reference"]).sum()',
        'penalty = estimate(fields["reference"], logprobs).sum()',
        GRPO_FORMULA,
    ),
    Mutant(
        "k1 in GRPO's loss", RLHF,
        'penalty = estimate(logprobs, fields["reference"]).sum()',
        'penalty = kl_k1(logprobs, fields["reference"]).sum()',
        GRPO_FORMULA,
    ),
    Mutant(
        "KL against the old policy", RLHF,
        'penalty = estimate(logprobs, fields["reference"]).sum()',
        'penalty = estimate(logprobs, fields["old"]).sum()',
        GRPO_FORMULA,
    ),
    Mutant(
        "GRPO paid for leaving the reference", RLHF,
        "loss = loss + self.kl.weight * penalty",
        "loss = loss - self.kl.weight * penalty",
        GRPO_FORMULA,
    ),
    Mutant(
        "PPO paid for leaving the reference", POLICY,
        "rewards = -weight * kl",
        "rewards = weight * kl",
        T_POLICY + "test_the_score_stands_at_the_last_token",
    ),
    Mutant(
        "score at the first token", POLICY,
        "rewards[-1] += score",
        "rewards[0] += score",
        T_POLICY + "test_the_score_stands_at_the_last_token",
    ),
    Mutant(
        "KL weight driven away from its target", POLICY,
        "self.weight *= 1 + error * answers / self.horizon",
        "self.weight *= 1 - error * answers / self.horizon",
        T_POLICY + "test_the_kl_weight_follows_its_target",
    ),
    Mutant(
        "advantages whitened apart", RLHF,
        "whitened(own, torch.tensor(mean), torch.tensor(variance))",
        "whitened(own, own.mean(), own.var(correction=0))",
        T_ROLLOUTS_MORE + "test_whitening_is_one_map_for_all_tokens",
    ),
    Mutant(
        "advantages whitened per rank", RLHF,
        "total, square, count = across(\n"
        "            [float(wide.sum()), float(wide.square().sum()), float(len(wide))],"
        " self.parallel\n        )",
        "total, square, count = float(wide.sum()), float(wide.square().sum()), float(len(wide))",
        T_ROLLOUTS_MORE + "test_moments_are_those_of_all_ranks",
    ),
    Mutant("GAE off by one", POLICY, "following = values[t]", "following = values[t - 1]", GAE),
    Mutant(
        "GAE bootstrapped behind the end", POLICY,
        "following = rewards.new_zeros(())",
        "following = values[-1]",
        GAE,
    ),
    Mutant(
        "returns without values", POLICY,
        "return advantages, advantages + values",
        "return advantages, advantages",
        GAE,
    ),
    Mutant(
        "ratio to the reference", RLHF,
        'logprobs, fields["old"], fields["advantages"], config.clip',
        'logprobs, fields["reference"], fields["advantages"], config.clip',
        GRPO_FORMULA,
    ),
    Mutant(
        "ratio that is always one", RLHF,
        "if self.rollout is None or self.rollout.number != number:",
        "if True:",
        PPO_FORMULA,
    ),
    Mutant(
        "the better of clipped and plain", POLICY,
        "return -torch.minimum(plain, bounded)",
        "return -torch.maximum(plain, bounded)",
        CLIP,
    ),
    Mutant(
        "clip on one side only", POLICY,
        "ratio.clamp(1 - clip, 1 + clip)",
        "ratio.clamp(max=1 + clip)",
        CLIP,
    ),
    Mutant(
        "value clip that lets everything pass", POLICY,
        "return 0.5 * torch.maximum(",
        "return 0.5 * torch.minimum(",
        T_POLICY + "test_values_move_by_the_clip_at_most",
    ),
    Mutant(
        "values clipped around the new ones", RLHF,
        'values, fields["values"], fields["returns"], config.value_clip',
        'values, values.detach(), fields["returns"], config.value_clip',
        PPO_FORMULA,
    ),
    Mutant(
        "group statistics of the whole batch", POLICY,
        "grouped.mean(1, keepdim=True)",
        "grouped.mean()",
        T_POLICY + "test_groups_are_judged_among_themselves",
    ),
    Mutant(
        "answers of a group not side by side", ROLLOUT,
        "[prompt for prompt in prompts for _ in range(config.group)]",
        "[prompt for _ in range(config.group) for prompt in prompts]",
        T_ROLLOUTS + "test_grpo_judges_answers_against_their_own_prompt",
    ),
    Mutant(
        "temperature ignored when sampled", RLHF,
        "return batch_logprobs(model, batch, self.compute, temperature=self.config.temperature)[0]",
        "return batch_logprobs(model, batch, self.compute)[0]",
        T_ROLLOUTS + "test_old_log_probabilities_are_those_of_sampling",
    ),
    Mutant(
        "temperature ignored when trained", RLHF,
        "temperature=config.temperature,",
        "temperature=1.0,",
        GRPO_FORMULA,
    ),
    Mutant(
        "temperature ignored in the gradient", LOGPROBS,
        "gradient = (gradient / ctx.temperature).to(hidden.dtype)",
        "gradient = gradient.to(hidden.dtype)",
        "tests/trainer/alignment/test_logprobs.py::test_gradients_of_both[0.7]",
    ),
    Mutant(
        "entropy punished", RLHF,
        "loss = loss - config.entropy * entropy.sum()",
        "loss = loss + config.entropy * entropy.sum()",
        GRPO_FORMULA,
    ),
    Mutant(
        "a reward made up where there is none", JUDGE,
        "scores.append(score if math.isfinite(score) else math.nan)",
        "scores.append(score if math.isfinite(score) else 0.0)",
        T_ROLLOUTS + "TestJudges::test_what_has_no_finite_reward_is_left_out",
    ),
    # DDP averages after the loss was divided by the global count.
    Mutant(
        "average where a sum belongs", PARALLEL,
        "return count / context.world",
        "return count",
        TWO_RANKS,
    ),
    Mutant(
        "gradients never reduced", PARALLEL,
        "if isinstance(module, DistributedDataParallel) and not last:",
        "if isinstance(module, DistributedDataParallel):",
        TWO_RANKS,
    ),
    # Online preference training on responses without their prompts.
    Mutant(
        "answers trained without their prompts", JUDGE,
        "return TokenSequence([*asked, *self.ids], len(asked))",
        "return TokenSequence(list(self.ids), 0)",
        T_ROLLOUTS + "test_grpo_judges_answers_against_their_own_prompt",
    ),
    Mutant(
        "pairs trained without their prompts", PAIRS,
        "sequences.append(TokenSequence(ids, len(pair.prompt_ids)))",
        "sequences.append(TokenSequence(answer.tolist(), 0))",
        TABLE,
    ),
]

OPTIMISATION = [
    # Pure-bf16 weights; keep fp32 masters, and sums in fp32.
    Mutant(
        "bf16 masters", CALIBRATION,
        "    model.compiled_blocks = None\n    inner = chunk_loss",
        "    model.to(dtype).compiled_blocks = None\n    inner = chunk_loss",
        T_LOOP + "test_masters_stay_fp32_and_move_by_less_than_bf16_can",
    ),
    Mutant(
        "softmax in bf16", LOSS,
        "logits = (hidden @ weight.t()).float()",
        "logits = hidden @ weight.t()",
        T_LOSS + "test_bf16_logits_are_summed_in_fp32",
    ),
    Mutant(
        "loss summed in bf16", LOSS,
        "loss = torch.zeros((), dtype=torch.float32, device=hidden.device)",
        "loss = torch.zeros((), dtype=hidden.dtype, device=hidden.device)",
        T_LOSS + "test_bf16_logits_are_summed_in_fp32",
    ),
    Mutant(
        "log-probabilities in bf16", LOGPROBS,
        "wide = torch.promote_types(hidden.dtype, torch.float32)",
        "wide = hidden.dtype",
        T_PAIRS_MORE + "test_log_probabilities_of_bf16_states_are_fp32",
    ),
    Mutant(
        "norms in bf16", MODULE,
        "wide = x.float()",
        "wide = x",
        T_TRANSFORMER + "test_rms_norm_of_bf16_is_computed_in_fp32",
    ),
    # Scheduler stepped per micro-batch; total steps ignore accumulation; step out of order.
    Mutant(
        "scheduler stepped per micro-batch", TRAINER,
        "factor = lr_factor(context.config.schedule, step, context.plan.total_steps)",
        "factor = lr_factor("
        "context.config.schedule, step * len(batches), context.plan.total_steps)",
        STEPS,
    ),
    Mutant(
        "schedule over micro-batches", TRAINER,
        "factor = lr_factor(context.config.schedule, step, context.plan.total_steps)",
        "factor = lr_factor("
        "context.config.schedule, step, context.plan.total_steps * len(batches))",
        STEPS,
    ),
    Mutant(
        "schedule a step ahead", TRAINER,
        "factor = lr_factor(context.config.schedule, step, context.plan.total_steps)",
        "factor = lr_factor(context.config.schedule, step + 1, context.plan.total_steps)",
        STEPS,
    ),
    Mutant(
        "schedule logged and not used", TRAINER,
        'group["lr"] = group["base_lr"] * factor',
        'group["lr"] = group["base_lr"]',
        RATES,
    ),
    Mutant(
        "schedule multiplied into itself", TRAINER,
        'group["lr"] = group["base_lr"] * factor',
        'group["lr"] = group["lr"] * factor',
        RATES,
    ),
    Mutant(
        "optimizer stepped per micro-batch", TRAINER,
        "            total += loss.detach()",
        "            self._update(1.0, finite=True, step=0)\n            total += loss.detach()",
        STEPS,
    ),
    Mutant(
        "clipped before accumulation ends", TRAINER,
        "                (loss / share).backward()",
        "                (loss / share).backward()\n"
        "                torch.nn.utils.clip_grad_norm_("
        "self._trained, self.context.config.grad_clip)",
        STEPS,
    ),
    Mutant(
        "never clipped", TRAINER,
        "clip_grad_norm_(self._trained, context.config.grad_clip)",
        "clip_grad_norm_(self._trained, math.inf)",
        STEPS,
    ),
    Mutant("gradients not zeroed", TRAINER, "parameter.grad = None", "pass", STEPS),
    Mutant(
        "NaN guard removed", TRAINER,
        "finite=math.isfinite(grad_norm)",
        "finite=True",
        NAN_STEP,
    ),
    Mutant(
        "gradients of a NaN step kept", TRAINER,
        "                )\n        self._forget_gradients()",
        "                )\n        if finite:\n            self._forget_gradients()",
        NAN_STEP,
    ),
    Mutant(
        "weight decay on norms and embeddings", OPTIMIZER,
        '{"params": others, "lr": config.embedding_lr, "weight_decay": 0.0}',
        '{"params": others, "lr": config.embedding_lr, "weight_decay": config.weight_decay}',
        DECAY,
    ),
    Mutant(
        "weight decay without its learning rate", OPTIMIZER,
        'parameter.mul_(1 - lr * group["weight_decay"])',
        'parameter.mul_(1 - group["weight_decay"])',
        DECAY,
    ),
    # `rope_theta` or `rope_scaling` accepted and ignored; `strict=False` that reports nothing.
    Mutant(
        "rope_theta ignored", MODULE,
        "inverse = 1.0 / (config.rope_theta **",
        "inverse = 1.0 / (10000.0 **",
        T_TRANSFORMER + "test_no_setting_is_accepted_and_ignored",
    ),
    Mutant(
        "rope_scaling ignored", MODULE,
        "match config.rope_scaling:",
        "match None:",
        T_TRANSFORMER + "test_no_setting_is_accepted_and_ignored",
    ),
    Mutant(
        "unknown weights dropped silently", HUGGINGFACE,
        'elif not name.endswith("rotary_emb.inv_freq"):',
        "elif False:",
        "tests/interop/test_huggingface.py::test_a_broken_directory_is_explained"
        "[unexpected tensor]",
    ),
    # `.item()` on every micro-batch.
    Mutant(
        "item on every micro-batch", TRAINER,
        "total += loss.detach()",
        "total += loss.item()",
        T_LOOP + "test_accumulation_reads_nothing_back",
    ),
    # Of resuming: what a step hangs on beside the weights.
    Mutant(
        "random state not restored", CHECKPOINT,
        'torch.set_rng_state(rng["cpu"])',
        "pass",
        BACK,
    ),
    Mutant(
        "optimizer not restored", CHECKPOINT,
        'context.load_optimizer_tensors(load_file(str(state / "optimizer.safetensors")))',
        'load_file(str(state / "optimizer.safetensors"))',
        BACK,
    ),
    Mutant(
        "critic not restored", CHECKPOINT,
        'context.value.load_state_dict(load_file(str(state / "critic.safetensors")))',
        'load_file(str(state / "critic.safetensors"))',
        BACK,
    ),
    Mutant(
        "rollout not restored", CHECKPOINT,
        "context.rollouts.load_state_tensors(load_file(str(own)))",
        "load_file(str(own))",
        BACK,
    ),
    Mutant(
        "KL weight not restored", RLHF,
        'self.kl.weight = float(held["kl_weight"])',
        'float(held["kl_weight"])',
        T_ROLLOUTS + "test_a_rollout_is_stored_and_read_back",
    ),
]
# fmt: on

MUTANTS = [*NORMALISATION, *COMPLETIONS, *PACKED, *REFERENCES, *ROLLOUTS, *OPTIMISATION]


@dataclass
class Result:
    """What became of a mutant."""

    outcome: str  # caught | survived | timeout | broken
    seconds: float
    why: str = ""  # the failing test, or what else there is to say
    said: str = ""  # the first line of what it failed with


class Tree:
    """A copy of the tree, in which one mutant at a time is put."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        ignored = shutil.ignore_patterns("__pycache__", ".*")
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, folder / name, ignore=ignored)
            else:
                shutil.copy2(ROOT / name, folder / name)
        self._changed: tuple[Path, str] | None = None

    def mutate(self, mutant: Mutant) -> None:
        path = self.folder / mutant.file
        before = path.read_text(encoding="utf-8")
        self._changed = (path, before)
        self._write(path, before.replace(mutant.old, mutant.new))

    def restore(self) -> None:
        if self._changed is not None:
            self._write(*self._changed)
            self._changed = None

    def _write(self, path: Path, text: str) -> None:
        path.write_text(text, encoding="utf-8")
        # Bytecode is told to be stale by size and whole seconds: a mutant of the same length, put
        # in within the same second, would not be seen.
        Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)


@dataclass
class Task:
    """A pytest run in a fork: of a mutant, or of a share of the selections as they are."""

    tests: list[str]
    tree: Tree
    log: Path
    pid: int = 0
    started: float = 0.0

    def start(self) -> None:
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid == 0:
            code = 98
            try:
                code = self._run()
            finally:
                os._exit(code)

    def _run(self) -> int:
        """In the child: pytest, with `khaosz` from the copy here and in all that it starts."""
        os.setsid()  # a group of its own, so that a timeout ends torchrun's processes as well
        output = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(output, stream)
        copy = str(self.tree.folder)
        os.chdir(copy)
        os.environ["PYTHONPATH"] = copy
        os.environ["COLUMNS"] = "300"  # so that the summary is not cut
        sys.path[:] = [copy, *(p for p in sys.path if p and Path(p).resolve() != ROOT)]
        importlib.invalidate_caches()
        import pytest

        scratch = str(self.log.with_suffix(".tmp"))
        code = pytest.main(
            ["-x", "-q", "-p", "no:cacheprovider", "--basetemp", scratch, *self.tests]
        )
        loaded = getattr(sys.modules.get("khaosz"), "__file__", "") or ""
        if not loaded.startswith(copy):
            print(f"khaosz was imported from {loaded or 'nowhere'}, not from {copy}")
            return 99
        sys.stdout.flush()
        return int(code)

    def ended(self, timeout: float) -> int | None:
        """pytest's exit code, -1 after a timeout, None while it runs."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() - self.started > timeout:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            return -1
        return None

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def output(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")


def judge(code: int, output: str, seconds: float) -> Result:
    """What pytest's exit code and summary say about a mutant."""
    found = re.search(r"^(?:FAILED|ERROR) (\S.*?)(?: - (.*))?$", output, re.MULTILINE)
    test = found[1].rpartition("/")[2] if found else ""
    complaint = (found[2] or "") if found else ""
    if code == 0:
        return Result("survived", seconds)
    if code == -1:
        return Result("timeout", seconds)
    if code != 1:
        return Result("broken", seconds, f"pytest ended with {code}")
    if complaint.startswith(NO_DEFECT):
        return Result("broken", seconds, test, complaint)
    return Result("caught", seconds, test, complaint)


def check_texts(mutants: Iterable[Mutant]) -> list[str]:
    """Mutants whose old text does not occur exactly once: the code has moved on."""
    problems = []
    for mutant in mutants:
        path = ROOT / mutant.file
        times = path.read_text(encoding="utf-8").count(mutant.old) if path.is_file() else 0
        if times != 1 or mutant.old == mutant.new:
            problems.append(f"{mutant.name}: its text occurs {times} times in {mutant.file}")
    return problems


def in_turn(tasks: list[Task | None], timeout: float) -> Iterator[tuple[int, int]]:
    """(slot, exit code) of the tasks that run in the slots, as they end."""
    while any(tasks):
        for slot, task in enumerate(tasks):
            if task is not None and (code := task.ended(timeout)) is not None:
                yield slot, code
        time.sleep(0.02)


def run_unmutated(tests: list[str], trees: list[Tree], timeout: float) -> str | None:
    """Run all selections on the code as it is: the output of the first run that fails, or None."""
    share = -(-len(tests) // len(trees))
    tasks: list[Task | None] = []
    for i, tree in enumerate(trees):
        if own := tests[i * share : (i + 1) * share]:
            begun = Task(own, tree, tree.folder.with_suffix(".log"))
            begun.start()
            tasks.append(begun)
    failed = None
    for slot, code in in_turn(tasks, timeout):
        task = tasks[slot]
        assert task is not None
        if code != 0:
            failed = failed or f"{task.output()[-5000:]}\npytest ended with {code}"
        tasks[slot] = None
    return failed


def run_mutants(
    mutants: list[Mutant], trees: list[Tree], timeout: float, why: bool
) -> list[Result]:
    """One mutant at a time in each tree, each judged by its own test."""
    results: dict[str, Result] = {}
    waiting = iter(mutants)
    running: list[Mutant | None] = [None] * len(trees)
    tasks: list[Task | None] = [None] * len(trees)

    def begin(slot: int) -> None:
        mutant, tree = next(waiting, None), trees[slot]
        running[slot] = mutant
        tasks[slot] = None
        if mutant is not None:
            tree.mutate(mutant)
            task = Task([mutant.test], tree, tree.folder.with_suffix(".log"))
            task.start()
            tasks[slot] = task

    for slot in range(len(trees)):
        begin(slot)
    for slot, code in in_turn(tasks, timeout):
        mutant, task = running[slot], tasks[slot]
        assert mutant is not None and task is not None
        result = judge(code, task.output(), task.seconds)
        results[mutant.name] = result
        print(f"{result.outcome:<9}{result.seconds:5.1f} s  {mutant.name:<45}{result.why}")
        if why and result.said:
            print(f"{'':18}{result.said}")
        sys.stdout.flush()
        trees[slot].restore()
        begin(slot)
    return [results[mutant.name] for mutant in mutants]


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench mutants", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--only", nargs="+", metavar="NAME", help="parts of names are enough")
    parser.add_argument("--list", action="store_true", help="names, files and tests")
    parser.add_argument("--why", action="store_true", help="with what each test has failed")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=120.0, help="seconds for a mutant")
    return parser.parse_args()


def main() -> int:
    options = parsed()
    mutants = MUTANTS
    if options.only:
        mutants = [m for m in MUTANTS if any(part in m.name for part in options.only)]
    if not mutants:
        print(f"error: no mutant is called {' or '.join(options.only)}", file=sys.stderr)
        return 2
    if options.list:
        for mutant in mutants:
            print(f"{mutant.name:<45}{mutant.file:<42}{mutant.test}")
        return 0
    if not hasattr(os, "fork"):
        print("error: this needs fork, which Windows does not have", file=sys.stderr)
        return 2
    assert len({m.name for m in MUTANTS}) == len(MUTANTS), "two mutants of one name"
    if problems := check_texts(mutants):
        print("error: " + "\nerror: ".join(problems), file=sys.stderr)
        return 2
    # Before torch is imported: the models are tiny, and a fork with threads is a risk.
    for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
        os.environ[name] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tests = sorted({mutant.test for mutant in mutants})
        jobs = max(1, min(options.jobs, len(mutants)))
        trees = [Tree(Path(folder) / f"tree{i}") for i in range(jobs)]
        if failed := run_unmutated(tests, trees, 10 * options.timeout):
            print(f"{failed}\nerror: a test fails without any mutant", file=sys.stderr)
            return 2
        print(f"{len(tests)} selections pass as they are, {time.monotonic() - started:.0f} s")
        results = run_mutants(mutants, trees, options.timeout, options.why)
    caught = sum(result.outcome == "caught" for result in results)
    for mutant, result in zip(mutants, results, strict=True):
        if result.outcome != "caught":
            print(f"{result.outcome}: {mutant.name}, {mutant.file}  {result.why}  {result.said}")
    share = caught / len(mutants)
    print(
        f"{caught} of {len(mutants)} mutants caught ({share:.1%}),"
        f" {time.monotonic() - started:.0f} s"
    )
    return 0 if share >= ENOUGH else 1


if __name__ == "__main__":
    sys.exit(main())
