"""A small byte-level BPE tokenizer with the markers of DeepSeek and Kimi, written as a model directory."""

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
SPECIALS = [BOS, EOS, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>", "<|im_system|>", "<|im_user|>",
            "<|im_assistant|>", "<|im_middle|>", "<|im_end|>"]
TEXT = ["the cat sat on the mat and said: hello, hello there! ", "What is 12 + 30? It is 42. ",
        "你好，今天天气不错。喵", "system user assistant User: Assistant: You are a helpful assistant "] * 4


def write(directory: Path, chat_template: str | None = None, specials=tuple(SPECIALS), **settings) -> Path:
    """tokenizer.json and tokenizer_config.json of 400 tokens and the specials."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(TEXT, trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()), show_progress=False))
    bpe.add_special_tokens([AddedToken(text, normalized=False) for text in specials])
    directory.mkdir(parents=True, exist_ok=True)
    bpe.save(str(directory / "tokenizer.json"))
    config = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True, "chat_template": chat_template} | settings
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory
