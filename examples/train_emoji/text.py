"""A CLIP tokenizer trained on the captions, and a small CLIP text model."""

from pathlib import Path

from captions import Entry
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

LENGTH = 16  # tokens, including start and end
WIDTH = 160


def build_tokenizer(entries: list[Entry], vocab_size: int = 5000) -> CLIPTokenizer:
    """Train byte-pair merges on the captions: known words become one token, unknown ones several."""
    blank = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    texts = [text for e in entries for text in (e.full_caption(), *e.families)]
    trained = blank.train_new_from_iterator(texts, vocab_size=vocab_size, show_progress=False)
    trained.model_max_length = LENGTH
    return trained


def cached_tokenizer(folder: Path, entries: list[Entry], pipeline: Path | None = None) -> CLIPTokenizer:
    """Load the tokenizer of a run from ``folder``; on the first call build it, or copy that of ``pipeline``, and save it.

    It must not be built twice: ties between merges are broken differently in every process, and token ids with them.
    """
    if not folder.exists():
        new = build_tokenizer(entries) if pipeline is None else CLIPTokenizer.from_pretrained(pipeline / "tokenizer")
        new.save_pretrained(folder)
    return CLIPTokenizer.from_pretrained(folder)


def build_text_model(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """Make a text model of three layers with random weights."""
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
    """Return token ids ``[n, 16]``, padded as in Stable Diffusion."""
    return tokenizer(captions, padding="max_length", max_length=LENGTH, truncation=True, return_tensors="pt").input_ids
