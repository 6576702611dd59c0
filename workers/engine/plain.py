"""Vocabularies whose tokens are simply pieces of text: those of characters or words."""

from pathlib import Path
from typing import Self

from tokenizers import Tokenizer


class PlainVocabulary:
    """What llguidance.TokenizerWrapper asks of a tokenizer."""

    bos_token_id: int | None = None

    def __init__(self, tokenizer: Tokenizer, tokens: list[bytes], special: list[int], eos_token_id: int) -> None:
        self._tokenizer = tokenizer
        self.tokens = tokens
        self.special_token_ids = special
        self.eos_token_id = eos_token_id

    @classmethod
    def read(cls, path: Path, vocab_size: int, eos_token_id: int) -> Self | None:
        """None if some token's text is not what the vocabulary says: then it stands for something else."""
        try:
            tokenizer: Tokenizer = Tokenizer.from_file(str(path))
        except Exception:  # the library knows no other kind; whatever it is, it is not this
            return None
        special = {token_id for token_id, token in tokenizer.get_added_tokens_decoder().items() if token.special}
        tokens = [b""] * vocab_size
        for text, token_id in tokenizer.get_vocab().items():
            if token_id in special or token_id >= vocab_size:
                continue
            if tokenizer.decode([token_id]) != text:
                return None
            tokens[token_id] = text.encode()
        return cls(tokenizer, tokens, sorted(special), eos_token_id)

    def __call__(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
