"""PPO with given completions on one process or on two: ``workers_rlhf_ppo.py OUT PROCESSES``."""

import sys

import torch
import transformers

from lowrank_kernels import rlhf
from lowrank_kernels.rlhf.rollout import ended, padded_left
from rlhf_models import causal


class Given:
    """Completions that depend on their seeds alone."""

    def generate(self, prompts, n, sampling):
        ids, mask = padded_left(prompts, sampling.pad_token_id)
        generators = [torch.Generator().manual_seed(seed) for seed in sampling.seeds]
        rows = [
            torch.randint(2, 40, (sampling.max_new_tokens,), generator=generator)
            for generator in generators
        ]
        return ended(torch.cat([ids, torch.stack(rows)], 1), mask, sampling)

    def sync(self, policy, version):
        pass


def sums(completion_ids, **_):
    return [sum(ids) / 100 for ids in completion_ids]


def trained(out, processes, resume=None):
    size = 8 // processes
    config = rlhf.PPOConfig(
        out, max_steps=4, max_completion_length=6, per_device_train_batch_size=size // 2, learning_rate=1e-2,
        gradient_accumulation_steps=2, num_ppo_epochs=2, eos_token_id=2, pad_token_id=0, use_cpu=True,
        report_to="none", save_strategy="steps", save_steps=3, adaptive_kl=True, normalize_scores=True,
        whiten_rewards=True, optim="sgd",
    )  # fmt: skip
    prompts = [{"prompt_ids": [5, 3 + i, 4 + i]} for i in range(16)]
    roles = rlhf.RoleModel(causal(), r=8)
    made = rlhf.PPOTrainer(roles, config, train_dataset=prompts, reward_funcs=sums, sampler=Given())
    made.remove_callback(transformers.PrinterCallback)
    made.train(resume_from_checkpoint=resume)
    return made, {n: p.detach() for n, p in roles.named_parameters() if p.requires_grad}


def main(out, processes):
    made, parameters = trained(out, processes)
    assert made.accelerator.num_processes == processes
    _, resumed = trained(out, processes, f"{out}/checkpoint-3")  # within a rollout
    assert all(torch.equal(resumed[name], tensor) for name, tensor in parameters.items())
    result = {
        "parameters": parameters,
        "kl_coef": made.control_of_kl.value,
        "statistics": made.statistics.state_dict(),
        "log": made.state.log_history[2],
    }
    torch.save(result, f"{out}-{made.accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.manual_seed(0)
    main(sys.argv[1], int(sys.argv[2]))
