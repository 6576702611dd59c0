"""Train the demonstration model: a Llama of about a million parameters that does exact, checkable arithmetic.

    python demo/train.py --out demo/model                    train, round to bfloat16 values, save, measure
    python demo/train.py --out demo/model --check            only measure; exit 1 below 99 % in any family

Every training text is generated here. A question belongs to the held-out part when a hash of its text says so, whatever
seed drew it, so no run can train on a question that any other run measures.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import random
import string
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

PAD, BOS, EOS, UNK, USER, ASSISTANT = "<pad>", "<bos>", "<eos>", "<unk>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = [PAD, BOS, EOS, UNK, USER, ASSISTANT]
CHARACTERS = string.digits + string.ascii_lowercase + "+-=(), " + "\n.:;?!*/<>'\"_[]"
VOCABULARY = {token: index for index, token in enumerate([*SPECIAL_TOKENS, *CHARACTERS])}
assert len(VOCABULARY) == 64, "an even split of the vocabulary over 2, 4 or 8 ranks needs 64 tokens"

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|user|>' + message['content'] | trim -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|assistant|>' + message['content'] | trim + eos_token -}}
{%- else -%}
{{- raise_exception('This model knows the roles user and assistant, not ' + message['role']) -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- endif -%}
"""

MAX_POSITIONS = 512
HELD_OUT_ONE_IN = 20
REQUIRED_ACCURACY = 0.99

Question = tuple[str, str]  # (text, answer)


# ---------------------------------------------------------------------------------------------- the questions


def number(rng: random.Random) -> int:
    """0 to 999, one, two and three digits equally often."""
    digits = rng.randint(1, 3)
    return rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def operands(rng: random.Random, sign: int) -> tuple[int, int]:
    """Two numbers; every fourth pair brings a + sign*b close to a multiple of ten, where carries run far."""
    a, b = number(rng), number(rng)
    if rng.random() < 0.25:
        round_result = rng.choice((0, 10, 100, 100)) * rng.randint(1, 9)
        b = sign * (round_result - a) + rng.randint(-2, 2)
    return (a, b) if 0 <= b <= 999 else (a, number(rng))


def addition(rng: random.Random) -> Question:
    a, b = operands(rng, 1)
    return f"{a}+{b}=", str(a + b)


def subtraction(rng: random.Random) -> Question:
    a, b = operands(rng, -1)
    return f"{a}-{b}=", str(a - b)


def maximum(rng: random.Random) -> Question:
    """Two to four numbers; half of the time they share a first digit, so that later digits decide."""
    numbers = [number(rng) for _ in range(rng.randint(2, 4))]
    if rng.random() < 0.5:
        base = rng.choice((10, 100)) * rng.randint(1, 9)
        numbers = [base + rng.randrange(10 if base < 100 else 100) for _ in numbers]
    return f"max({','.join(map(str, numbers))})=", str(max(numbers))


def sorting(rng: random.Random) -> Question:
    """Three to eight letters, repeats allowed."""
    letters = rng.choices(string.ascii_lowercase, k=rng.randint(3, 8))
    return f"sort({''.join(letters)})=", "".join(sorted(letters))


def count_from(first: int, length: int) -> Question:
    last = first + length - 1
    return f"count({first},{last})=", " ".join(map(str, range(first, last + 1)))


def counting(rng: random.Random) -> Question:
    """One to a hundred consecutive numbers, none above 999: up to 399 characters."""
    length = rng.randint(1, 100)
    return count_from(min(number(rng), 1000 - length), length)


def short_counting(rng: random.Random) -> Question:
    length = rng.randint(1, 4)
    return count_from(min(number(rng), 1000 - length), length)


Family = Callable[[random.Random], Question]
SHORT_FAMILIES: dict[str, Family] = {
    "addition": addition,
    "subtraction": subtraction,
    "maximum": maximum,
    "sorting": sorting,
}
FAMILIES: dict[str, Family] = {**SHORT_FAMILIES, "counting": counting}


def is_held_out(text: str) -> bool:
    """True for one question text in twenty: a property of the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % HELD_OUT_ONE_IN == 0


def draw(family: Family, seed: str, *, held_out: bool) -> Iterator[Question]:
    """An endless stream of one family's questions from one side of the split; repeats are possible."""
    rng = random.Random(seed)
    while True:
        question = family(rng)
        if is_held_out(question[0]) == held_out:
            yield question


def held_out_sample(name: str, how_many: int) -> list[Question]:
    """The same distinct held-out questions on every call; a larger sample starts with the smaller one."""
    distinct = dict.fromkeys(itertools.islice(draw(FAMILIES[name], f"measure {name}", held_out=True), how_many * 3))
    return list(distinct)[:how_many]


# ---------------------------------------------------------------------------------------------- the tokenizer


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character. <bos> is prepended by the post-processor; a chat template's text already has it."""
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token=UNK))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    # no token is a byte, so this only joins; a bare Fuse says too little to those who compile structures
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A $B", special_tokens=[(BOS, VOCABULARY[BOS])]
    )
    tokenizer.add_special_tokens(SPECIAL_TOKENS)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
        padding_side="left",
    )


# ---------------------------------------------------------------------------------------------- rows of tokens


@dataclass(frozen=True)
class Rows:
    """Token ids and, for each, whether the model must predict it; both [rows, width], padded on the right."""

    ids: torch.Tensor
    predicted: torch.Tensor

    def batch(self, size: int, generator: torch.Generator) -> Rows:
        index = torch.randint(len(self.ids), (size,), generator=generator, device=self.ids.device)
        return Rows(self.ids[index].long(), self.predicted[index])


Piece = tuple[str, bool]  # (text in which one character stands for one token, whether the model must predict it)
STAND_IN = {token: chr(index) for index, token in enumerate(SPECIAL_TOKENS)}  # "\0" to "\5" for special tokens


def completion(question: Question) -> list[Piece]:
    return [(STAND_IN[BOS] + question[0], False), (question[1] + STAND_IN[EOS], True)]


def conversation(questions: Iterable[Question]) -> list[Piece]:
    pieces = [(STAND_IN[BOS], False)]
    for text, answer in questions:
        pieces.append((STAND_IN[USER] + text + STAND_IN[ASSISTANT], False))
        pieces.append((answer + STAND_IN[EOS], True))
    return pieces


def single_turn(question: Question) -> list[Piece]:
    return conversation([question])


def to_rows(texts: Iterable[list[Piece]], device: torch.device) -> Rows:
    """Encode without the tokenizer, which would need minutes for millions of rows."""
    lines, marks = [], []
    for pieces in texts:
        lines.append("".join(text for text, _ in pieces).encode())
        marks.append(b"".join((b"\1" if mark else b"\0") * len(text) for text, mark in pieces))
    width = max(map(len, lines))
    table = np.zeros(256, dtype=np.uint8)
    for token, index in VOCABULARY.items():
        table[ord(STAND_IN.get(token, token))] = index

    def matrix(rows: list[bytes]) -> np.ndarray:
        return np.frombuffer(b"".join(row.ljust(width, b"\0") for row in rows), np.uint8).reshape(-1, width)

    ids = torch.from_numpy(table[matrix(lines)])
    return Rows(ids.to(device), torch.from_numpy(matrix(marks).astype(bool)).to(device))


def conversations(questions: list[Question], rng: random.Random, width: int = 120) -> Iterator[list[Piece]]:
    """One to six turns each, as many as fit into `width` tokens."""
    remaining = iter(questions)
    while turns := list(itertools.islice(remaining, rng.randint(1, 6))):
        while sum(len(text) + len(answer) + 3 for text, answer in turns) >= width:
            turns.pop()
        yield conversation(turns)


@dataclass(frozen=True)
class TrainingSet:
    """Three shapes of rows, each batched by itself so that little of a batch is padding."""

    short: Rows
    chat: Rows
    long: Rows


def training_set(size: int, seed: int, device: torch.device) -> TrainingSet:
    """`size` questions of each short family as completions, as many again as conversations, size/8 long ones."""
    rng = random.Random(seed)

    def take(name: str, family: Family, how_many: int) -> list[Question]:
        return list(itertools.islice(draw(family, f"train {seed} {name}", held_out=False), how_many))

    pools = [take(name, family, size) for name, family in SHORT_FAMILIES.items()]
    pools.append(take("short counting", short_counting, size // 4))
    short = [question for pool in pools for question in pool]
    long = take("counting", counting, size // 8)
    short_rows = to_rows(map(completion, short), device)
    rng.shuffle(short)
    return TrainingSet(
        short=short_rows,
        chat=to_rows(conversations(short, rng), device),
        long=to_rows((rng.choice((completion, single_turn))(question) for question in long), device),
    )


# ---------------------------------------------------------------------------------------------- the model


def build_model() -> LlamaForCausalLM:
    """1.1 million parameters; 4 query heads share 2 key-value heads, so it divides over two tensor-parallel ranks."""
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=MAX_POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=0.05,
        tie_word_embeddings=False,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
        dtype="float32",
    )
    return LlamaForCausalLM(config)


def answer_loss(model: torch.nn.Module, rows: Rows) -> torch.Tensor:
    """Mean cross-entropy over the tokens that the model must predict. Padding is on the right: no mask needed."""
    logits = model(input_ids=rows.ids[:, :-1], use_cache=False).logits
    losses = F.cross_entropy(logits.float().flatten(0, 1), rows.ids[:, 1:].flatten(), reduction="none")
    wanted = rows.predicted[:, 1:].flatten()
    return (losses * wanted).sum() / wanted.sum()


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up over the first 2 % of the steps, then half a cosine down to nothing."""
    warm_up = max(1, steps // 50)
    if step < warm_up:
        return peak * (step + 1) / warm_up
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))


def train(model: LlamaForCausalLM, data: TrainingSet, options: argparse.Namespace, device: torch.device) -> None:
    matrices = [p for p in model.parameters() if p.dim() > 1]
    gains = [p for p in model.parameters() if p.dim() == 1]
    groups = [{"params": matrices, "weight_decay": 0.05}, {"params": gains, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=options.peak, betas=(0.9, 0.98), fused=device.type == "cuda")
    generator = torch.Generator(device).manual_seed(options.seed)
    network = torch.compile(model, dynamic=False) if options.compile else model
    shapes = [(data.short, options.batch), (data.chat, options.batch // 8), (data.long, options.batch // 40)]
    started = time.monotonic()
    for step in range(options.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, options.steps, options.peak)
        losses = []
        for rows, size in shapes:
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=device.type == "cuda"):
                losses.append(answer_loss(network, rows.batch(max(1, size), generator)))
            losses[-1].backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % options.log_every == 0 or step == options.steps - 1:
            short, chat, long = (loss.item() for loss in losses)
            elapsed_s = time.monotonic() - started
            print(
                f"step {step:6d}  loss: short {short:.5f} chat {chat:.5f} long {long:.5f}  {elapsed_s:6.1f} s",
                flush=True,
            )


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write the Hugging Face directory; every weight becomes a bfloat16 value, so either type loads the same model."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16().float())
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=448,
        pad_token_id=VOCABULARY[PAD],
        bos_token_id=VOCABULARY[BOS],
        eos_token_id=VOCABULARY[EOS],
    )
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out)


# ---------------------------------------------------------------------------------------------- the measurement


@torch.inference_mode()
def answered_exactly(model: LlamaForCausalLM, rows: Rows, chunk: int = 128) -> torch.Tensor:
    """For each row, whether greedy decoding gives the whole answer and then <eos>; [rows].

    Greedy decoding is right exactly when, after each right beginning of the answer, the likeliest token is the right
    next one. So one forward pass over question and answer decides it, at a small part of the cost of generating.
    """
    verdicts = []
    for ids, predicted in zip(rows.ids.split(chunk), rows.predicted.split(chunk), strict=True):
        width = int((ids != VOCABULARY[PAD]).sum(dim=1).max())
        likeliest = model(input_ids=ids[:, : width - 1].long(), use_cache=False).logits.argmax(dim=-1)
        right = (likeliest == ids[:, 1:width]) | ~predicted[:, 1:width]
        verdicts.append(right.all(dim=1))
    return torch.cat(verdicts)


def check(out: Path, questions: int, device: torch.device, dtype: torch.dtype = torch.float32) -> bool:
    """Print the held-out accuracy of a saved model, asked plainly and in a conversation; True if it is enough."""
    model = AutoModelForCausalLM.from_pretrained(out, dtype=dtype).to(device).eval()
    right, asked, enough = 0, 0, True
    for name in FAMILIES:
        sample = sorted(held_out_sample(name, questions), key=lambda q: len(q[1]))
        plain = answered_exactly(model, to_rows(map(completion, sample), device))
        chat = answered_exactly(model, to_rows(map(single_turn, sample), device))
        accuracy = min(plain.float().mean().item(), chat.float().mean().item())
        print(f"{name:12s} {plain.sum():5d} of {len(plain)} plain, {chat.sum():5d} of {len(chat)} in a chat")
        wrong = [text for (text, _), ok in zip(sample, plain.tolist(), strict=True) if not ok]
        if wrong:
            print("    among the wrong ones:", *wrong[:5])
        right, asked = right + int(plain.sum() + chat.sum()), asked + len(plain) + len(chat)
        enough = enough and accuracy >= REQUIRED_ACCURACY
    print(f"{'total':12s} {right} of {asked} = {right / asked:.4%} held-out questions answered exactly ({dtype})")
    return enough


def write_prompts(path: Path) -> None:
    """Forty held-out questions of every family, three of them long, five of them as messages."""
    chosen = [question for name in SHORT_FAMILIES for question in held_out_sample(name, 8)]
    counts = held_out_sample("counting", 200)
    chosen += [q for q in counts if len(q[1]) < 100][:5] + [q for q in counts if len(q[1]) > 380][:3]
    random.Random(0).shuffle(chosen)
    lines = []
    for index, (text, answer) in enumerate(chosen):
        asked = {"messages": [{"role": "user", "content": text}]} if index % 8 == 3 else {"prompt": text}
        lines.append(json.dumps({**asked, "answer": answer}) + "\n")
    path.write_text("".join(lines))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("demo/model"), help="the model's directory")
    parser.add_argument("--check", action="store_true", help="measure an existing directory and train nothing")
    parser.add_argument("--questions", type=int, default=200, help="held-out questions measured in each family")
    parser.add_argument("--prompts", type=Path, help="write forty held-out questions with answers to this file")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="used in measuring")
    parser.add_argument("--steps", type=int, default=2_500)
    parser.add_argument("--batch", type=int, default=4096, help="short rows in a step; /8 conversations, /40 long")
    parser.add_argument("--pool", type=int, default=500_000, help="training questions drawn for each short family")
    parser.add_argument("--peak", type=float, default=3e-3, help="highest learning rate")
    parser.add_argument("--seed", type=int, default=20)
    parser.add_argument("--log-every", type=int, default=500)
    parser.add_argument("--compile", action="store_true", help="torch.compile the network")
    return parser.parse_args()


def main() -> int:
    options = parse_arguments()
    device = torch.device(options.device)
    if options.prompts:
        write_prompts(options.prompts)
    if not options.check:
        torch.manual_seed(options.seed)
        model = build_model().to(device)
        print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}", flush=True)
        train(model, training_set(options.pool, options.seed, device), options, device)
        save(model, options.out)
    return 0 if check(options.out, options.questions, device, getattr(torch, options.dtype)) else 1


if __name__ == "__main__":
    sys.exit(main())
