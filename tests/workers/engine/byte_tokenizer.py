"""A tokenizer.json for the tiny checkpoints: 0 ends an output, 1 begins a prompt, and every other token is a byte."""

from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from tests.workers.engine.checkpoints import EOS, VOCAB

_FIRST_BYTE = 2  # the two bytes for which no id is left are in no UTF-8


def _letters() -> dict[int, str]:
    """The printable letter with which byte-level BPE writes each byte (Radford et al., 2019, GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(0x100 + at) for at, byte in enumerate(others)}


def write_tokenizer(directory: Path) -> Tokenizer:
    vocabulary = {letter: byte + _FIRST_BYTE for byte, letter in _letters().items() if byte + _FIRST_BYTE < VOCAB}
    tokenizer = Tokenizer(models.BPE(vocab={"<eos>": EOS, "<bos>": 1, **vocabulary}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True), AddedToken("<bos>", special=True)])
    tokenizer.save(str(directory / "tokenizer.json"))
    return tokenizer
