"""Which key an unknown key of a recipe means: by the names that other programs give it, by its
table, and by its spelling."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from khaosz.config.stages import STAGES_OF, TABLES

# Our keys, and what transformers, TRL, LLaMA-Factory, nanoGPT, OpenRLHF and others call them. A
# name of several keys means the first one that the stage has.
_OTHER_NAMES = {
    "data": "train_data train_file train_dataset dataset dataset_name dataset_path dataset_dir"
    " data_path data_dir input inputs corpus",
    "out": "output output_dir out_dir save_dir output_path",
    "val": "val_data val_file val_dataset validation validation_file validation_data eval_data"
    " eval_file eval_dataset test_file test_data",
    "val_fraction": "val_size val_ratio val_split validation_split test_size eval_split split_ratio"
    " validation_split_percentage",
    "tokenizer": "tokenizer_name tokenizer_path tokenizer_name_or_path tokenizer_dir",
    "init_from": "model_name model_path model_name_or_path pretrained pretrained_model base_model"
    " from_pretrained init_checkpoint checkpoint load_from sft_model_path start_from",
    "seed": "random_seed data_seed",
    "size": "preset model_size",
    "vocab_size": "vocab n_vocab vocabulary_size",
    "window": "max_seq_length max_seq_len max_length seq_len seq_length sequence_length block_size"
    " context context_length context_window cutoff_len model_max_length n_ctx max_prompt_length"
    " max_position",
    "max_minutes": "minutes max_time time_limit max_hours time_budget",
    "max_steps": "steps max_iters iters n_iters num_iterations max_iterations num_steps"
    " train_steps total_steps max_train_steps num_training_steps training_steps",
    "epochs": "epoch num_epochs n_epochs max_epochs num_train_epochs train_epochs total_epochs",
    "batch_tokens": "batch_size train_batch_size total_batch_size global_batch_size batch"
    " gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches",
    "batch_pairs": "batch_size train_batch_size total_batch_size global_batch_size batch"
    " gradient_accumulation_steps grad_accum accumulation_steps accumulate_grad_batches",
    "rollout.prompts": "batch_size train_batch_size total_batch_size global_batch_size batch"
    " rollout_batch_size num_prompts prompts_per_step",
    "micro_batch": "per_device_train_batch_size per_gpu_train_batch_size per_device_batch_size"
    " micro_batch_size micro_train_batch_size train_micro_batch_size_per_gpu device_batch_size",
    "optimizer": "optim optimiser optimizer_name optimizer_type",
    "lr": "learning_rate max_lr peak_lr base_lr matrix_lr",
    "embedding_lr": "embedding_learning_rate embed_lr head_lr",
    "betas": "beta1 beta2 adam_beta1 adam_beta2 adam_betas",
    "weight_decay": "wd decay adam_weight_decay",
    "grad_clip": "max_grad_norm gradient_clipping gradient_clip gradient_clip_val clip_grad"
    " clip_grad_norm grad_norm_clip max_norm",
    "schedule.name": "lr_scheduler_type lr_scheduler scheduler scheduler_type lr_schedule"
    " lr_decay_style",
    "schedule.warmup_fraction": "warmup_ratio warmup_frac",
    "schedule.warmup_steps": "warmup warmup_iters num_warmup_steps lr_warmup_steps lr_warmup_iters",
    "schedule.decay_fraction": "decay_ratio decay_steps lr_decay_iters cooldown_fraction"
    " warmdown_ratio lr_decay_ratio",
    "schedule.min_ratio": "min_lr min_learning_rate min_lr_ratio lr_min final_lr_frac eta_min",
    "schedule.cycles": "num_cycles",
    "dtype": "precision torch_dtype mixed_precision bf16 fp16 fp32 tf32 half amp",
    "compile": "torch_compile use_compile",
    "gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing"
    " checkpoint_activations grad_checkpointing",
    "parallel.threads": "num_threads n_threads num_workers dataloader_num_workers",
    "lora.rank": "r lora_r lora_rank lora_dim",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target lora_target_modules target modules",
    "lora.rslora": "use_rslora",
    "lora.base": "load_in_8bit quantization quantization_bit",
    "reward.centre": "center_rewards_coefficient center",
    "reward.use_margins": "margin margins",
    "preference.loss": "loss_type pref_loss dpo_loss loss_fn",
    "preference.beta": "beta dpo_beta pref_beta",
    "preference.label_smoothing": "label_smoothing_factor",
    "preference.gamma": "simpo_gamma gamma_beta_ratio",
    "preference.sft_weight": "rpo_alpha pref_ftx sft_loss_weight nll_weight",
    "reference": "ref_model ref_model_path reference_model ref",
    "reward_model": "reward_model_path reward_model_name rm",
    "reward_function": "reward_fn reward_func reward_funcs reward_functions reward",
    "rollout.group": "num_generations group_size n_samples num_return_sequences"
    " n_samples_per_prompt samples_per_prompt generations n",
    "rollout.max_new_tokens": "max_completion_length max_tokens response_length generate_max_len"
    " max_new_token",
    "rollout.epochs": "ppo_epochs num_ppo_epochs",
    "rollout.minibatches": "num_mini_batches num_minibatches mini_batches mini_batch_size"
    " ppo_mini_batch_size",
    "rollout.clip": "cliprange clip_range clip_ratio clip_epsilon clip_eps epsilon eps_clip",
    "rollout.value_clip": "cliprange_value value_clip_range clip_range_vf",
    "rollout.value_weight": "vf_coef value_coef value_loss_coef",
    "rollout.entropy": "ent_coef entropy_coef entropy_coeff entropy_bonus",
    "rollout.lam": "gae_lambda lambda lambd",
    "rollout.whiten": "whiten_rewards whiten_advantages normalize_advantages",
    "rollout.kl": "beta kl_coef kl_coeff init_kl_coef kl_penalty kl_weight kl_beta",
    "rollout.kl_target": "target_kl",
    "rollout.kl_horizon": "horizon",
    "rollout.missing_end_penalty": "missing_eos_penalty",
    "rollout.scale_by_std": "scale_rewards",
    "embed.temperature": "tau temp",
    "embed.negatives": "num_negatives hard_negatives num_hard_negatives train_group_size",
    "embed.pooling": "pooling_mode pooling_method pooler",
    "embed.query_prefix": "query_instruction query_prompt",
    "embed.passage_prefix": "passage_instruction document_prefix doc_prefix passage_prompt",
    "mix": "mixture weights mix_strategy interleave_probs dataset_weights",
    "dedup": "deduplicate remove_duplicates",
    "columns.text": "dataset_text_field text_field text_column text_key",
    "columns.prompt": "input_key prompt_key prompt_column",
    "columns.response": "output_key response_key response_column",
    "columns.chosen": "chosen_key chosen_column",
    "columns.rejected": "rejected_key rejected_column",
    "log_every": "logging_steps log_interval log_steps print_every",
    "eval_every": "eval_steps eval_interval eval_iters evaluation_steps val_interval val_every",
    "eval_tokens": "eval_samples max_eval_samples eval_batches",
    "save_every": "save_steps save_interval checkpoint_every checkpoint_interval ckpt_interval",
    "keep": "save_total_limit keep_checkpoints max_checkpoints keep_last",
    "sample_every": "sample_interval sample_steps",
    "prompts": "sample_prompts sample_prompt prompt eval_prompts",
    "early_stop": "early_stopping early_stopping_patience patience early_stop_patience",
    "loggers": "report_to logger use_wandb wandb tensorboard wandb_log log_with",
    "model.hidden_size": "n_embd n_embed d_model dim hidden_dim embed_dim width model_dim",
    "model.num_hidden_layers": "n_layer n_layers num_layers layers depth",
    "model.num_attention_heads": "n_head n_heads num_heads heads",
    "model.num_key_value_heads": "n_kv_head n_kv_heads num_kv_heads kv_heads",
    "model.intermediate_size": "ffn_dim d_ff ffn_hidden_size ffn_size mlp_dim n_inner",
    "model.num_experts": "n_experts num_local_experts n_routed_experts expert_count",
    "model.num_experts_per_tok": "moe_top_k experts_per_token n_experts_used num_experts_per_token",
    "model.moe_intermediate_size": "expert_dim moe_ffn_dim expert_feed_forward_length",
    "model.router_aux_loss_coef": "aux_loss_coef moe_aux_loss_coef balance_loss_weight",
    "model.max_position_embeddings": "max_positions n_positions",
    "model.rope_theta": "rope_base theta",
    "model.tie_word_embeddings": "tie_embeddings weight_tying tied",
}
_NOTES = {
    "batch_tokens": "counted in tokens, over all micro-batches and processes",
    "batch_pairs": "counted in pairs, over all micro-batches and processes",
    "dtype": 'dtype = "bf16" or "fp32"',
    "schedule.min_ratio": "a fraction of lr",
    "rollout.minibatches": "their number, not their size",
}


def meant_by(
    path: Iterable[str], stage: str | None = None, model_keys: Iterable[str] = ()
) -> str | None:
    """A hint that names the key that the unknown key at `path` means, or None."""
    *parents, name = path
    table, name = ".".join(parents), name.lower().replace("-", "_")
    known = [key for key in STAGES_OF if stage is None or stage in STAGES_OF[key]]
    known += [f"model.{key}" for key in model_keys]
    key = _named_elsewhere(name, table, known) or _misspelt(name, table, known)
    if key is None:
        return None
    note = f" ({_NOTES[key]})" if key in _NOTES else ""
    return f"did you mean '{key}'?{note}"


def _named_elsewhere(name: str, table: str, known: list[str]) -> str | None:
    inside = [key for key in known if key.rpartition(".")[2] == name]
    others = [key for key, names in _OTHER_NAMES.items() if name in names.split() and key in known]
    # A name of the same table first: `alpha` in [lora] is lora.alpha.
    both = [*inside, *others]
    return next((key for key in both if table and key.startswith(f"{table}.")), None) or next(
        iter(both), None
    )


def _misspelt(name: str, table: str, known: list[str]) -> str | None:
    """The nearest key of the same table, else of all."""
    siblings = [key for key in known if key.rpartition(".")[0] == table]
    if not table:
        siblings += [name for name in TABLES if any(key.startswith(f"{name}.") for key in known)]
    for keys, cutoff in ((siblings, 0.7), (known, 0.8)):
        leaves = {key.rpartition(".")[2]: key for key in reversed(keys)}
        if close := difflib.get_close_matches(name, leaves, n=1, cutoff=cutoff):
            return leaves[close[0]]
    return None
