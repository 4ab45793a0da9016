"""The code of docs/serving.md runs as printed, on an adapter that `badge-peft train` made."""

from __future__ import annotations

from tests.export.cuts import one_cut
from tests.pages import ROOT, run
from tests.texts import make_tokenizer


def test_the_page_runs_as_printed(trained, one_translation, tmp_path, monkeypatch):
    (tmp_path / "my-adapter").symlink_to(trained)
    monkeypatch.chdir(tmp_path)
    texts = ["the film was good", "a very dull plot"]
    tokenizer = make_tokenizer()
    encoded = tokenizer(texts, padding=True, return_tensors="pt")
    space: dict[str, object] = {
        "tokenizer": tokenizer,
        "texts": texts,
        "batch": {name: encoded[name] for name in ("input_ids", "attention_mask")},
        "validation_rows": [{"input_ids": tokenizer(text)["input_ids"]} for text in texts],
    }
    with one_cut("trained"):
        space = run(ROOT / "docs" / "serving.md", space)
    for queue in (1, 50, 500):
        answers = space["answer"](texts, queue)
        assert [set(a) for a in answers] == [{"label", "score", "exit_layer"}] * 2
    careful, hurried = space["careful"], space["hurried"]
    assert careful.policy == hurried.policy == "max_prob"
    assert careful.calibration["mean_exit"] >= hurried.calibration["mean_exit"]
    controller = space["controller"]
    assert (
        space["each_second"]([0.2, 0.3])
        == controller.config
        == controller.points[min(1, len(controller.points) - 1)].config
    )
    assert space["shadow"](space["batch"]) == space["config"]
    assert space["monitor"].rows == 2
