"""Small models and folders of adapters for the tests of lowrank_kernels.rlhf."""

import torch
import transformers

import lowrank_kernels as lk

VOCABULARY = 48
SIZES = dict(
    vocab_size=VOCABULARY, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


def causal(r=0, seed=0, dtype=torch.float32, **changes):
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(**(SIZES | changes))
    model = transformers.LlamaForCausalLM(config).to(dtype).eval()
    lk.replace_linear(model, r=r, progress=False)
    return model


def classifier(seed=0):
    """A reward model on the base of :func:`causal`."""
    torch.manual_seed(1)
    model = transformers.LlamaForSequenceClassification(
        transformers.LlamaConfig(**SIZES, num_labels=1)
    )
    body = causal(seed=seed).model
    model.model = body
    return model.eval()


def batch(rows=3, columns=9, seed=0, left=False, ragged=True):
    """Token ids and mask, rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (rows, columns), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if ragged else 0):
        pad = row % 3
        if pad and left:
            mask[row, :pad] = 0
        elif pad:
            mask[row, -pad:] = 0
    return ids.where(mask.bool(), 0), mask


def reward_folder(path, r=4, seed=5):
    """A reward model as PEFT saves it, with random adapters and head; the model too."""
    import peft

    torch.manual_seed(seed)
    config = peft.LoraConfig(r=r, target_modules=["q_proj", "down_proj"], task_type="SEQ_CLS")
    model = peft.get_peft_model(classifier(), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    model.save_pretrained(path)
    return model.eval()


def sft_folder(path, r=8, seed=6):
    """An adapter of a language model, with random values."""
    model = causal(r=r)
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in lk.adapters(model)["default"].parameters:
            parameter.normal_(std=0.1)
    lk.save_adapter(model, path)
    return model
