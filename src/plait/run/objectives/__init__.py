"""What a run trains for besides the loss on completions: TRL's trainers under plait's run.

rewards    the functions that judge completions      arguments  the options of TRL's trainers
base       RunTrainer over a trainer of TRL          reference  the model at the start
dpo, kto, reward, grpo  one trainer each             rollout    completions that vLLM draws
trainers   objective -> its trainer

Only the four trainers import TRL, and only `trainers` imports them.
"""
