from kspec_guidance.evaluation.scores import ScoreRecord


def test_score_record_as_dict_keeps_interval():
    record = ScoreRecord("Vendi", 3.2, 10, "CosineKernel()", 1.0, interval=(3.0, 3.4))
    assert record.as_dict()["interval"] == (3.0, 3.4)
