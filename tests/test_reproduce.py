"""What `make reproduce` keeps under runs/, and when it may be read again."""

import json

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

import reproduce


def test_what_was_measured_with_the_same_settings_is_read(tmp_path):
    done = tmp_path / "measured.json"
    assert reproduce.remembered(done, {"seed": 0}) is None
    measured = {"settings": {"seed": 0, "pieces": ["hate"]}, "macro_f1": 0.5}
    done.write_text(json.dumps(measured))
    # a tuple is a list in JSON
    assert reproduce.remembered(done, {"seed": 0, "pieces": ("hate",)}) == measured


@pytest.mark.parametrize("before", [{"settings": {"hide": 0.2}}, {}], ids=["other", "none"])
def test_what_was_measured_otherwise_is_refused(tmp_path, before):
    done = tmp_path / "measured.json"
    done.write_text(json.dumps(before))
    with pytest.raises(SystemExit, match=r"same settings.*hide (0.2|None) then, 0.1 now.*delete"):
        reproduce.remembered(done, {"hide": 0.1})


def test_a_fingerprint_tells_weights_apart():
    model = torch.nn.Linear(3, 2)
    first = reproduce.fingerprint(model)
    assert reproduce.fingerprint(model) == first
    with torch.no_grad():
        model.bias[1] += 1e-3
    assert reproduce.fingerprint(model) != first


def test_each_tweet_is_held_out_once(monkeypatch):
    features = Features({"text": Value("string"), "label": ClassLabel(4)})
    texts = [f"post {i}" for i in range(40)]
    rows = Dataset.from_dict(
        {"text": texts, "label": [i % 4 for i in range(40)]}, features=features
    )
    dataset = DatasetDict(train=rows.select(range(30)), validation=rows.select(range(30, 40)))
    monkeypatch.setattr(reproduce, "reported", lambda task: dataset)
    folds = list(reproduce.folds())
    held = [set(fold["validation"]["text"]) for fold in folds]
    for fold, part in zip(folds, held, strict=True):
        assert part | set(fold["train"]["text"]) == set(texts)
        assert not part & set(fold["train"]["text"])
    assert sum(map(len, held)) == 40 and set.union(*held) == set(texts)
