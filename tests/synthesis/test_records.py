import torch

from kspec_guidance.synthesis.records import Record, pack_tensors, unpack_tensors


def test_packed_tensors_are_restored(g):
    x, prompts, features = torch.randn(3, 2, 4, generator=g), torch.randn(3, 5, generator=g), torch.randn(3, 6)
    for t, stored in ((prompts, 3), (prompts[:1].expand(3, -1), 1)):
        tensors = pack_tensors(x, t, features)
        assert len(tensors["prompts"]) == stored
        for restored, original in zip(unpack_tensors(tensors), (x, t, features), strict=True):
            assert torch.equal(restored, original)
    restored = unpack_tensors(pack_tensors(x, None, None))
    assert restored.prompt_features is None
    assert torch.equal(restored.features, x.flatten(1))


def test_lost_images_count_as_rejected():
    rows = [{"file_name": f"{k}.png", "prompt": "heart", "attempt": k} for k in range(2)]
    record = Record(0, 0, 7, rows, [], {"x": torch.eye(2)}).without({"0.png": "lost"})
    assert (record.batch_index, record.rows) == (7, rows[1:])
    assert record.rejected == [{"prompt": "heart", "attempt": 0, "reason": "lost"}]
    assert torch.equal(record.tensors["x"], torch.eye(2)[1:])
