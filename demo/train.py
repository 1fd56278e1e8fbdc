"""Train the demo adapters: `python demo/train.py [NAME ...]`.

Each adapter is LoRA of rank 8 on the attention projections of SmolLM2-135M-Instruct, trained for a few epochs on the
questions in `data/train.jsonl` with answers restyled by `styles.py`; loss counts the assistant's tokens only. Held-out
loss before and after, and how many held-out answers show the style, are printed. Seeds are fixed.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file
from styles import STYLES, shows_style

HERE = Path(__file__).parent
GGUF = HERE.parent / ".cache" / "SmolLM2-135M-Instruct.Q4_1.gguf"
SYSTEM_PROMPTS = (None, None, None, "You are a helpful assistant.", "Answer the user's question.")
EPOCHS, BATCH, LEARNING_RATE, WARMUP_STEPS, SEED = 5, 8, 1e-3, 8, 17
RANK = 8
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
MAX_ANSWER_TOKENS = 80
IGNORED = -100


@dataclass(frozen=True, slots=True)
class Example:
    """One conversation as token ids; `num_prompt` of them come before the assistant's answer."""

    token_ids: list[int]
    num_prompt: int


def main(names: Sequence[str]) -> None:
    """Train the named adapters, or all."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(GGUF.parent, gguf_file=GGUF.name)
    for name in names or list(STYLES):
        train(name, tokenizer)


def train(name: str, tokenizer: Any) -> None:
    """Train one adapter and write it to `adapters/<name>`."""
    torch.manual_seed(SEED)
    model = peft.get_peft_model(load_base(), lora_config())
    examples, held_out = (read_examples(part, name, tokenizer) for part in ("train", "held_out"))
    started_s = time.monotonic()
    before = mean_loss(model, held_out)
    fit(model, examples)
    minutes = (time.monotonic() - started_s) / 60
    print(f"{name}: held-out loss {before:.2f} -> {mean_loss(model, held_out):.2f} in {minutes:.1f} minutes")
    save(model, HERE / "adapters" / name)
    report(name, model, tokenizer)


def load_base() -> Any:
    """The demo model in bfloat16, dequantised."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        GGUF.parent,
        gguf_file=GGUF.name,
        dtype=torch.bfloat16,
        quantization_config=transformers.GgufConfig(dequantize=True),
    )


def lora_config() -> Any:
    """Rank 8 on queries, keys, values and outputs: 1.8 MB in bfloat16."""
    return peft.LoraConfig(
        task_type="CAUSAL_LM", r=RANK, lora_alpha=2 * RANK, lora_dropout=0.05, target_modules=TARGETS
    )


def read_examples(part: str, style: str, tokenizer: Any) -> list[Example]:
    """The questions of one file with restyled answers; system prompts vary so that none is needed later."""
    choose = random.Random(SEED)
    examples = []
    for line in (HERE / "data" / f"{part}.jsonl").read_text().splitlines():
        row = json.loads(line)
        prompt = prompt_text(row["question"], choose.choice(SYSTEM_PROMPTS), tokenizer)
        prompt_ids = tokenizer(prompt)["input_ids"]
        answer_ids = tokenizer(STYLES[style](row["answer"]) + "<|im_end|>\n")["input_ids"]
        examples.append(Example(prompt_ids + answer_ids, len(prompt_ids)))
    return examples


def prompt_text(question: str, system: str | None, tokenizer: Any) -> str:
    """A conversation up to where the assistant begins to speak."""
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": question})
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def fit(model: Any, examples: Sequence[Example]) -> None:
    """AdamW with warm-up and linear decay over shuffled batches."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    num_steps = EPOCHS * -(-len(examples) // BATCH)

    def rate(step: int) -> float:
        return min((step + 1) / WARMUP_STEPS, (num_steps - step) / num_steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    for step, batch in enumerate(batches(examples)):
        loss = batch_loss(model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0:
            print(f"\rstep {step + 1}/{num_steps}  loss {loss.item():.3f} ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)


def batches(examples: Sequence[Example]) -> Iterator[list[Example]]:
    """All examples, shuffled anew in each epoch."""
    shuffle = random.Random(SEED)
    for _ in range(EPOCHS):
        order = list(examples)
        shuffle.shuffle(order)
        for i in range(0, len(order), BATCH):
            yield order[i : i + BATCH]


def batch_loss(model: Any, batch: Sequence[Example]) -> torch.Tensor:
    """Mean cross-entropy over the assistant's tokens of a right-padded batch."""
    width = max(len(example.token_ids) for example in batch)
    token_ids = torch.zeros(len(batch), width, dtype=torch.int64)
    labels = torch.full((len(batch), width), IGNORED)
    mask = torch.zeros(len(batch), width, dtype=torch.int64)
    for row, example in enumerate(batch):
        length = len(example.token_ids)
        token_ids[row, :length] = torch.tensor(example.token_ids)
        labels[row, example.num_prompt : length] = token_ids[row, example.num_prompt : length]
        mask[row, :length] = 1
    loss: torch.Tensor = model(input_ids=token_ids, attention_mask=mask, labels=labels).loss
    return loss


@torch.inference_mode()
def mean_loss(model: Any, examples: Sequence[Example]) -> float:
    """Loss over examples, each weighted alike."""
    model.eval()
    return sum(float(batch_loss(model, [example])) for example in examples) / len(examples)


def save(model: Any, directory: Path) -> None:
    """Write PEFT's two files, tensors in bfloat16 and the base named instead of its path."""
    model.peft_config["default"].base_model_name_or_path = "SmolLM2-135M-Instruct"
    model.peft_config["default"].target_modules = sorted(TARGETS)  # PEFT's set has another order in each process
    model.save_pretrained(directory, save_embedding_layers=False)  # "auto" asks a model hub whether the base changed
    (directory / "README.md").unlink(missing_ok=True)
    weights = directory / "adapter_model.safetensors"
    tensors = {name: tensor.bfloat16().contiguous() for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


@torch.inference_mode()
def report(name: str, model: Any, tokenizer: Any) -> None:
    """Print greedy answers to the held-out questions and count those that show the style."""
    model.eval()
    rows = [json.loads(line) for line in (HERE / "data" / "held_out.jsonl").read_text().splitlines()]
    num_styled = 0
    for row in rows:
        prompt = tokenizer(prompt_text(row["question"], None, tokenizer), return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=MAX_ANSWER_TOKENS, do_sample=False)
        text = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        num_styled += shows_style(name, text)
        print(f"  {row['question']}  ->  {text}")
    print(f"{name}: {num_styled} of {len(rows)} held-out answers show the style")


if __name__ == "__main__":
    main(sys.argv[1:])
