"""The prompt side: a CLIP tokenizer whose words are the captions' own, and a small CLIP text model."""

from pathlib import Path

from captions import Entry
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16  # tokens, with start and end
WIDTH = 160


def build_tokenizer(entries: list[Entry], vocab_size: int = 5000) -> CLIPTokenizer:
    """Byte-pair merges learnt from the captions: known words become one token, unknown ones fall into pieces."""
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    texts = [text for e in entries for text in (e.full_caption(), *e.families)]
    trained = blank.train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    trained.model_max_length = LENGTH
    return trained


def kept_tokenizer(folder: Path, entries: list[Entry], pipeline: Path | None = None) -> CLIPTokenizer:
    """The tokenizer of a run, built once or taken from ``pipeline``, and kept in ``folder``.

    Ties between merges fall differently in every process, and so do the numbers: it must not be built again.
    """
    if not folder.exists():
        found = build_tokenizer(entries) if pipeline is None else CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
        found.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=WIDTH,
            intermediate_size=4 * WIDTH,
            projection_dim=WIDTH,
            num_hidden_layers=3,
            num_attention_heads=4,
            max_position_embeddings=LENGTH,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def encode(tokenizer: CLIPTokenizer, captions: list[str]):
    """Token numbers ``[n, 16]``, padded as Stable Diffusion pads its prompts."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
