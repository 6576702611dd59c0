"""The shipped demonstration model loads as any Hugging Face model does and answers what it was never shown."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream
from transformers import AutoModelForCausalLM, AutoTokenizer

DEMO = Path(__file__).parents[2] / "demo"
MODEL = DEMO / "model"
PROMPTS = [json.loads(line) for line in (DEMO / "prompts.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def train() -> Iterator[ModuleType]:
    """demo/train.py, which is a script and in no package."""
    spec = importlib.util.spec_from_file_location("demo_train", DEMO / "train.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL, local_files_only=True)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, local_files_only=True)


def prompt_ids(tokenizer: Any, line: dict[str, Any]) -> list[int]:
    if "messages" in line:
        return list(tokenizer.apply_chat_template(line["messages"], add_generation_prompt=True)["input_ids"])
    return list(tokenizer(line["prompt"])["input_ids"])


def question_text(line: dict[str, Any]) -> str:
    return str(line["prompt"] if "prompt" in line else line["messages"][-1]["content"])


def generate(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """The new tokens of each prompt, <eos> included and padding removed."""
    batch = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    tokens = model.generate(**batch)[:, batch["input_ids"].shape[1] :].tolist()
    return [[token for token in row if token != tokenizer.pad_token_id] for row in tokens]


@pytest.mark.parametrize("longest", [True, False])
def test_it_answers_every_line_of_the_prompts_file_and_then_stops(model: Any, tokenizer: Any, longest: bool) -> None:
    lines = [line for line in PROMPTS if (len(line["answer"]) > 100) == longest]
    answers = generate(model, tokenizer, [prompt_ids(tokenizer, line) for line in lines])
    assert [tokenizer.decode(answer) for answer in answers] == [line["answer"] + "<eos>" for line in lines]


def test_the_prompts_file_holds_forty_held_out_questions_some_long_and_some_as_messages(train: ModuleType) -> None:
    assert len(PROMPTS) == 40
    assert all(train.is_held_out(question_text(line)) for line in PROMPTS)
    assert sum(len(line["answer"]) > 380 for line in PROMPTS) == 3
    assert sum("messages" in line for line in PROMPTS) == 5


@pytest.mark.parametrize("family", ["addition", "subtraction", "maximum", "sorting", "counting"])
def test_it_answers_at_least_99_percent_of_held_out_questions(train: ModuleType, model: Any, family: str) -> None:
    questions = sorted(train.held_out_sample(family, 100), key=lambda question: len(question[1]))
    rows = train.to_rows(map(train.completion, questions), torch.device("cpu"))
    assert len(questions) == 100
    assert train.answered_exactly(model, rows).float().mean().item() >= train.REQUIRED_ACCURACY


def test_training_questions_are_never_held_out(train: ModuleType) -> None:
    data = train.training_set(200, seed=7, device=torch.device("cpu"))
    tokens = {index: token for token, index in train.VOCABULARY.items()}
    questions = ["".join(tokens[token] for token in row.tolist()) for row in data.short.ids]
    questions = [text.removeprefix("<bos>").split("=")[0] + "=" for text in questions]
    assert len(questions) == 850
    assert not any(train.is_held_out(question) for question in questions)


def test_rows_for_training_have_the_ids_that_the_tokenizer_gives(train: ModuleType, tokenizer: Any) -> None:
    question = ("max(3,71,28)=", "71")
    plain, chat = train.to_rows([train.completion(question), train.conversation([question])], torch.device("cpu")).ids
    messages = [{"role": "user", "content": question[0]}, {"role": "assistant", "content": question[1]}]
    assert plain.tolist()[:17] == tokenizer("max(3,71,28)=71<eos>")["input_ids"]
    assert chat.tolist() == tokenizer.apply_chat_template(messages)["input_ids"]


def test_the_tokenizer_prepends_bos_and_the_chat_template_writes_it(tokenizer: Any) -> None:
    messages = [{"role": "user", "content": "12+30="}]
    assert tokenizer("12+30=")["input_ids"] == [1, 7, 8, 42, 9, 6, 44]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<bos><|user|>12+30=<|assistant|>"
    )


def test_decoding_gives_the_text_back_at_once_and_token_by_token(tokenizer: Any) -> None:
    text = "count(1,3)= 1 2  3\n"
    ids = tokenizer(text)["input_ids"]
    plain = Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    stream = DecodeStream(skip_special_tokens=True)
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert "".join(stream.step(plain, token) or "" for token in ids) == text


def test_a_character_outside_the_vocabulary_becomes_unk(tokenizer: Any) -> None:
    assert tokenizer("A")["input_ids"] == [tokenizer.bos_token_id, tokenizer.unk_token_id]


def test_it_answers_the_last_turn_of_a_conversation(model: Any, tokenizer: Any) -> None:
    turns = [("user", "sort(dacb)="), ("assistant", "abcd"), ("user", "5-9=")]
    line = {"messages": [{"role": role, "content": content} for role, content in turns]}
    [answer] = generate(model, tokenizer, [prompt_ids(tokenizer, line)])
    assert tokenizer.decode(answer) == "-4<eos>"


def test_every_weight_is_a_bfloat16_value_and_the_directory_is_small(model: Any) -> None:
    assert all(torch.equal(weight, weight.bfloat16().float()) for weight in model.parameters())
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 5_000_000


def test_two_tensor_parallel_ranks_can_share_it(model: Any) -> None:
    config = model.config
    shared = (config.num_attention_heads, config.num_key_value_heads, config.intermediate_size, config.vocab_size)
    assert [size % 2 for size in shared] == [0, 0, 0, 0]
    assert config.num_key_value_heads < config.num_attention_heads
