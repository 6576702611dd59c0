"""Tokenizers: the same ids as AutoTokenizer, and text that never takes anything back."""

import itertools
import json
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from socket import gethostname
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from hortator.producer.errors import BadRequest, ConfigError
from hortator.producer.schema import Message
from hortator.workers.text import ByteText, HFText, Text

CORPUS = ["the quick brown fox jumps over the lazy dog", "12+30=42", "naïve café, 東京 — 🦊🦊", "def f(x):\n  return x"]
SPECIALS = ["<s>", "</s>", "<unk>", "<|user|>"]
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|user|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}:{% endif %}"
)


def byte_level() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    bos = [("<s>", tokenizer.token_to_id("<s>"))]
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=bos)
    return tokenizer


def metaspace() -> Tokenizer:
    """As Llama 2: spaces become ▁, unknown characters bytes, and the decoder strips the first space."""
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    trained.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trained.train_from_iterator(
        CORPUS[:2], trainers.BpeTrainer(vocab_size=120, special_tokens=SPECIALS, show_progress=False)
    )
    trained.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    whole = json.loads(trained.to_str())
    vocab = whole["model"]["vocab"]
    vocab |= {f"<0x{byte:02X}>": len(vocab) + byte for byte in range(256)}
    return Tokenizer.from_str(json.dumps(whole))


def save(tokenizer: Tokenizer, path: Path, **config: Any) -> Path:
    tokenizer.save(str(path / "tokenizer.json"))
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "chat_template": TEMPLATE}
    (path / "tokenizer_config.json").write_text(
        json.dumps(names | {"tokenizer_class": "PreTrainedTokenizerFast"} | config)
    )
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


@pytest.fixture(scope="module", params=[byte_level, metaspace])
def model_path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(request.param(), tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def text(model_path: Path) -> HFText:
    return HFText.load(model_path)


def streamed(text: Text, token_ids: list[int]) -> str:
    decoder = text.decoder()
    return "".join([*map(decoder.feed, token_ids), decoder.flush()])


@pytest.mark.parametrize(
    "prompt", [*CORPUS, "", " ", "  two  spaces ", "a<s>b</s>", "<|user|>x", "\x00\x1f", "é" * 500]
)
def test_a_prompt_has_the_ids_that_auto_tokenizer_gives(text: HFText, model_path: Path, prompt: str) -> None:
    from transformers import AutoTokenizer

    assert list(text.encode(prompt)) == AutoTokenizer.from_pretrained(model_path)(prompt).input_ids


def test_a_long_prompt_is_tokenised_like_a_short_one(text: HFText, model_path: Path) -> None:
    from transformers import AutoTokenizer

    prompt = "a rather long prompt, told again and again; " * 1000
    assert list(text.encode(prompt)) == AutoTokenizer.from_pretrained(model_path)(prompt).input_ids


def test_heartbeats_go_on_while_megabytes_are_tokenised(text: HFText) -> None:
    ticks, done = [time.monotonic()], threading.Event()

    def beat() -> None:
        while not done.wait(0.01):
            ticks.append(time.monotonic())

    heart = threading.Thread(target=beat)
    heart.start()
    text.encode("beat on; " * 200_000)
    ticks.append(time.monotonic())
    done.set()
    heart.join()
    silence = max(later - earlier for earlier, later in itertools.pairwise(ticks))
    assert silence < max(0.5, (ticks[-1] - ticks[0]) / 2)


def test_a_chat_has_the_ids_that_its_template_gives(text: HFText, model_path: Path) -> None:
    from transformers import AutoTokenizer

    turns = [{"role": "user", "content": "12+30="}, {"role": "assistant", "content": "42"}]
    reference = AutoTokenizer.from_pretrained(model_path).apply_chat_template(
        turns, add_generation_prompt=True, return_dict=False
    )
    assert list(text.encode_chat([Message.model_validate(turn) for turn in turns])) == reference


def test_a_stream_of_random_tokens_adds_up_to_the_full_decoding(text: HFText) -> None:
    random.seed(3)
    vocab = [token_id for token, token_id in text._rust.get_vocab().items() if not token.startswith("<0x")]
    for _ in range(200):
        token_ids = random.choices(sorted(vocab), k=random.randrange(1, 30))
        assert streamed(text, token_ids) == text.decode(token_ids)


@pytest.mark.parametrize("sentence", CORPUS)
def test_a_stream_of_a_sentence_adds_up_to_it(text: HFText, sentence: str) -> None:
    token_ids = text._rust.encode(sentence, add_special_tokens=False).ids
    assert streamed(text, token_ids) == sentence


@pytest.mark.parametrize("sentence", CORPUS)
def test_tokens_may_come_many_at_a_time(text: HFText, sentence: str) -> None:
    token_ids, rng = list(text._rust.encode(sentence, add_special_tokens=False).ids), random.Random(3)
    for _ in range(20):
        decoder, pieces, rest = text.decoder(), [], token_ids
        while rest:
            count = rng.randint(1, 5)
            pieces.append(decoder.feed(*rest[:count]))
            rest = rest[count:]
        assert "".join([*pieces, decoder.flush()]) == sentence
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("sentence", ["naïve 東京 🦊", "🦊"])
def test_no_half_character_is_ever_streamed(text: HFText, sentence: str) -> None:
    decoder = text.decoder()
    pieces = [decoder.feed(token_id) for token_id in text._rust.encode(sentence).ids]
    assert not any("\ufffd" in piece for piece in pieces)


def test_bytes_that_never_become_characters_do_not_make_each_token_dearer_than_the_one_before(
    text: HFText, monkeypatch: pytest.MonkeyPatch
) -> None:
    vocabulary = text._rust.get_vocab()
    byte = vocabulary.get("<0x80>", vocabulary.get("\u0122"))  # how byte-level BPE writes 0x80
    assert text.decode([byte]) == "\ufffd"
    sizes: list[int] = []
    decode = text.decode

    def measured(token_ids: Sequence[int]) -> str:
        sizes.append(len(token_ids))
        return decode(token_ids)

    monkeypatch.setattr(text, "decode", measured)
    assert streamed(text, [byte] * 2000) == "\ufffd" * 2000
    assert max(sizes) < 40


def test_what_is_given_out_of_bytes_that_are_no_characters_adds_up_to_the_full_decoding(tmp_path: Path) -> None:
    text, rng = HFText.load(save(byte_level(), tmp_path)), random.Random(4)
    letters = [token_id for token, token_id in text._rust.get_vocab().items() if len(token) == 1 and ord(token) > 0x7E]
    for _ in range(100):
        pieces = [rng.choices(letters, k=rng.randrange(1, 40)), text._rust.encode("🦊東é").ids]
        token_ids = [token_id for _ in range(4) for token_id in rng.choice(pieces)]
        assert streamed(text, token_ids) == text.decode(token_ids)


def test_bytes_stream_as_they_decode() -> None:
    random.seed(5)
    text = ByteText()
    for _ in range(300):
        token_ids = list(random.choices([0x61, 0xC3, 0xA9, 0xF0, 0x9F, 0xA6, 0x8A, 300], k=12))
        assert streamed(text, token_ids) == text.decode(token_ids)


def test_a_model_without_a_chat_template_refuses_messages(tmp_path: Path) -> None:
    text = HFText.load(save(byte_level(), tmp_path, chat_template=None))
    with pytest.raises(BadRequest, match="no chat template"):
        text.encode_chat([Message(role="user", content="hi")])


def test_a_template_that_refuses_is_a_bad_request(tmp_path: Path) -> None:
    text = HFText.load(save(byte_level(), tmp_path, chat_template="{{ raise_exception('roles must alternate') }}"))
    with pytest.raises(BadRequest, match="roles must alternate"):
        text.encode_chat([Message(role="user", content="hi")])


def test_a_template_cannot_leave_its_sandbox(tmp_path: Path) -> None:
    text = HFText.load(save(byte_level(), tmp_path, chat_template="{{ ''.__class__.__mro__ }}"))
    with pytest.raises(BadRequest):
        text.encode_chat([Message(role="user", content="hi")])


@pytest.mark.parametrize("content", [None, "{", '{"model": {}}'])
def test_a_missing_or_broken_tokenizer_is_a_config_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ConfigError, match=str(tmp_path)):
        HFText.load(tmp_path)


def test_the_front_loads_its_tokenizer_without_torch(model_path: Path) -> None:
    script = f"""
import sys, pathlib
import hortator.workers.celery, hortator.workers.pool, hortator.workers.front
from hortator.workers.text import HFText, torch_hidden
with torch_hidden():
    text = HFText.load(pathlib.Path({str(model_path)!r}))
assert text.encode("hello")
assert "torch" not in sys.modules, "torch was imported"
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, timeout=60, capture_output=True, text=True)
    assert done.stderr == ""


def test_a_model_directory_that_is_not_there_is_told_before_its_files_with_the_host(tmp_path: Path) -> None:
    said = f"model_path {tmp_path / 'gone'}: there is no such directory on {gethostname()}: "
    with pytest.raises(ConfigError, match=f"^{re.escape(said)}"):
        HFText.load(tmp_path / "gone")
    with pytest.raises(ConfigError, match=r"no tokenizer\.json"):
        HFText.load(tmp_path)
