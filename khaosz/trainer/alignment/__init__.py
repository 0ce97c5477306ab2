"""Alignment: reward models, preference losses and reinforcement learning, all through the one loop.

Pairs: `pairs.py` (batches), `reward.py` and `dpo.py` (strategies), `reference.py` (the frozen
model's numbers). Rollouts: `rollout.py` (answers and their judgement), `rlhf.py` (PPO and GRPO).
Arithmetic without models: `logprobs.py`, `preference_loss.py`, `policy_loss.py`.
"""
