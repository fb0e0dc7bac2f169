"""navit.config: overrides by key, JSON both ways, and the checks of each field."""

import itertools
import json
import re
from pathlib import Path

import numpy as np
import pytest

from navit import config
from navit.config import (
    ArrayRecords,
    Classification,
    Config,
    Folder,
    Mixture,
    ParquetImages,
    PositionConfig,
    Sigmoid,
    Softmax,
    Synthetic,
    TarShards,
    Tfds,
    TfRecords,
)

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))


def overridden(*assignments: str) -> Config:
    return config.override(Config(), assignments)


def error_of(*assignments: str) -> str:
    with pytest.raises(ValueError) as caught:
        overridden(*assignments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("assignment", "value"),
    [
        ("optim.lr=3e-4", 3e-4),
        ("optim.lr=1", 1.0),
        ("data.max_upscale=2", 2.0),
        ("data.max_upscale=none", None),
        ("data.budgets=256,729", (256, 729)),
        ("data.budgets=256", (256,)),
        ("data.budgets=(256,)", (256,)),
        ("data.eval=None", None),
        ("data.train.size=7", 7),
        ("model.vision.position.size=20", 20),
        ("model.vision.position.kind=learned_2d", "learned_2d"),
        ("model.vision.qk_norm=true", True),
        ("model.vision.use_bias=False", False),
        ("model.vision.embed_dim=64", 64),
        ("model.dtype=bfloat16", "bfloat16"),
        ("eval.max_images=None", None),
        ("eval.prompts=a photo of a {}", ("a photo of a {}",)),
        ("eval.prompts='a {}','the {}'", ("a {}", "the {}")),
    ],
)
def test_override_sets_the_value_with_the_type_of_the_field(assignment, value):
    result = overridden(assignment)
    node = result
    for key in assignment.partition("=")[0].split("."):
        node = getattr(node, key)
    assert node == value
    assert type(node) is type(value)
    # Nothing else changed.
    for change in config.differences(Config(), result):
        assert change.startswith(f"{assignment.partition('=')[0]}: ")


def test_the_word_none_is_a_value_where_the_field_lists_it():
    assert overridden("model.remat=full", "model.remat=none").model.remat == "none"
    assert config.override(config.VisionConfig(), ["pool=none"]).pool == "none"


def test_the_default_prompt_can_be_written_on_the_command_line():
    assert overridden("eval.prompts={}").eval.prompts == ("{}",)


@pytest.mark.parametrize(
    ("assignments", "source"),
    [
        (["=tars:~/x/{0..9}.tar"], TarShards("~/x/{0..9}.tar")),
        (["=TarShards", ".path=~/x.tar"], TarShards("~/x.tar")),
        (["=tars:x.tar", ".caption=json.title"], TarShards("x.tar", "json.title")),
        (["=folder:gs://x/y", ".missing=0.01"], Folder("gs://x/y", missing=0.01)),
        (
            ["=tfds:imagenet2012:5.1.0", ".split=test"],
            Tfds("imagenet2012:5.1.0", "test"),
        ),
        (["=array_record:x"], ArrayRecords("x")),
        (["=parquet:x", ".image=jpg"], ParquetImages("x", "jpg")),
        (["=synthetic"], Synthetic()),
        (["=synthetic:7", ".seed=1"], Synthetic(7, 1)),
    ],
)
def test_a_source_is_chosen_by_name_with_its_fields_in_any_order(assignments, source):
    base = Config(data=config.DataConfig(train=Folder("a", split="train")))
    for order in itertools.permutations(assignments):
        for key in ("train", "eval"):
            changed = config.override(base, [f"data.{key}{x}" for x in order])
            assert getattr(changed.data, key) == source


def test_a_config_that_names_a_stream_is_told_what_replaces_it(tmp_path):
    remedy = "`navit reshard tars:PATH OUT`"
    for key in ("train", "eval"):
        message = error_of(f"data.{key}=stream:x")
        assert message.startswith(f"data.{key}=stream:x was removed")
        assert remedy in message
    cache = config.override(Config(), ["data.cache=stream"]).data.cache
    assert cache == "stream"
    path = tmp_path / "old.py"
    path.write_text("from navit.config import Stream\n")
    with pytest.raises(ValueError, match="Stream was removed: .*" + remedy):
        config.load(path)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("a/*.tar.gz", TarShards("a/*.tar.gz", missing=0.5)),
        ("a.tfrecord-00001", TfRecords("a.tfrecord-00001", "jpg", missing=0.5)),
    ],
)
def test_a_run_that_was_trained_on_a_stream_still_opens(path, source):
    data = config.to_json(Config())
    stream = {"path": path, "image": "jpg", "caption": "", "window": 9, "missing": 0.5}
    data["data"]["train"] = {"type": "Stream", **stream}
    assert config.from_json(data).data.train == source


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["data.train=tar:x"], ["data.train", "did you mean 'tars'", "parquet"]),
        (["data.train=photos"], ["folder", "tars", "tfds", "'photos'"]),
        (["data.train=tars:x", "data.train.captoin=y"], ["did you mean 'caption'"]),
        (["data.train=tars:x", "data.train.path=y"], ["set twice", "'x'", "'y'"]),
        (["data.train=tars:x", "data.train=tars:y"], ["set twice", "'tars:y'"]),
        (["data.train.path=x/0", "data.train.path=x/1"], ["set twice", "'x/1'"]),
        (["data.train=synthetic:many"], ["data.train.size", "int", "many"]),
    ],
)
def test_a_source_that_is_named_wrongly_is_refused(assignments, words):
    message = error_of(*assignments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    ("assignments", "losses"),
    [
        (["=softmax"], (Softmax(),)),
        (["=Softmax:0.5"], (Softmax(0.5),)),
        ([".sigmoid.weight=2"], (Sigmoid(2.0),)),
        (["=sigmoid:2", ".sigmoid.implementation=ring"], (Sigmoid(2.0, "ring"),)),
        (
            ["=classification,sigmoid", ".classification.weight=0.5"],
            (Classification(0.5), Sigmoid()),
        ),
    ],
)
def test_losses_are_chosen_by_name_with_their_fields_in_any_order(assignments, losses):
    base = overridden("model.vision.num_classes=3")
    for order in itertools.permutations(assignments):
        changed = config.override(base, [f"train.losses{x}" for x in order])
        assert changed.train.losses == losses
        data = json.loads(json.dumps(config.to_json(changed)))
        assert config.from_json(data) == changed


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["=sigmoid,sofmax"], ["did you mean 'softmax'", "'sofmax'"]),
        (["=none"], ["sigmoid, softmax, classification", "'none'"]),
        (["="], ["sigmoid, softmax, classification", "''"]),
        ([".sigmiod.weight=2"], ["train.losses.sigmiod", "did you mean 'sigmoid'"]),
        ([".softmax.weight=2"], ["train.losses.softmax", "it has sigmoid"]),
        ([".sigmoid.wieght=2"], ["did you mean 'weight'"]),
        ([".sigmoid=2"], ["set train.losses.sigmoid.weight=2"]),
        (["=sigmoid,softmax", ".softmax=2"], ["set train.losses.softmax.weight=2"]),
        (["=sigmoid:2", ".sigmoid.weight=3"], ["set twice", "'2'", "'3'"]),
    ],
)
def test_losses_that_are_named_wrongly_are_refused(assignments, words):
    message = error_of(*[f"train.losses{x}" for x in assignments])
    for word in words:
        assert word in message


def test_a_former_key_names_the_new_one():
    message = error_of("train.loss=softmax")
    assert "train.loss is now train.losses" in message
    assert "train.losses=softmax" in message
    message = error_of("train.loss_implementation=ring")
    assert "train.losses.sigmoid.implementation=ring" in message


def test_a_change_of_one_loss_names_only_its_field():
    base = overridden("model.vision.num_classes=3", "train.losses=sigmoid,softmax")
    changed = config.override(base, ["train.losses.softmax.weight=2"])
    assert config.differences(base, changed) == [
        "train.losses.softmax.weight: 1.0 -> 2.0"
    ]


def test_items_whose_names_repeat_are_named_by_their_place():
    sources = Folder("a"), Synthetic(5), Folder("b")
    base = Config(data=config.DataConfig(train=Mixture(sources)))
    place = "data.train.sources"
    changed = config.override(
        base, [f"{place}.2.holdout=.5", f"{place}.synthetic.seed=1"]
    )
    assert config.differences(base, changed) == [
        "data.train.sources.synthetic.seed: 0 -> 1",
        "data.train.sources.2.holdout: 0.1 -> 0.5",
    ]
    for key in ("folder", "1", "3", "-1"):
        with pytest.raises(
            ValueError, match=rf"sources\.{key}: .*it has 0, synthetic, 2"
        ):
            config.override(base, [f"{place}.{key}.seed=1"])
    with pytest.raises(ValueError, match=r"set data\.train\.sources\.0\.path=c"):
        config.override(base, [f"{place}.0=c"])


def test_a_folder_named_by_digits_is_still_a_string():
    folder = config.override(Folder(), ["path=2024"])
    assert folder.path == "2024"


@pytest.mark.parametrize(
    ("assignment", "typo", "near"),
    [
        ("optim.lrr=1", "optim.lrr", "lr"),
        ("optm.lr=1", "optm", "optim"),
        ("model.vision.positon.size=4", "model.vision.positon", "position"),
        ("data.budget=256", "data.budget", "budgets"),
        ("data.train.sise=4", "data.train.sise", "size"),
    ],
)
def test_a_typo_gets_the_nearest_name_in_one_line(assignment, typo, near):
    message = error_of(assignment)
    assert typo in message
    assert f"did you mean {near!r}" in message


def test_a_key_like_no_other_gets_the_list_of_names():
    message = error_of("mesh.zzzzzz=1")
    assert "data" in message and "fsdp" in message


@pytest.mark.parametrize(
    "assignment",
    [
        "optim.lr=fast",
        "optim.lr=True",
        "optim.lr={[]: 1}",
        "optim.warmup_steps=1.5",
        "data.budgets=256,x",
        "data.budgets=256.0",
        "data.budgets=True",
        "model.vision.qk_norm=1",
        "model.vision.pool=avg",
        "model.dtype=float16",
        "data.train.size=None",
        # A whole part of the config cannot be written on a command line.
        "model.vision={}",
        "model.vision=None",
        "data.train=photos",
        "optim=adamw",
    ],
)
def test_a_value_of_the_wrong_type_names_the_key_and_the_value(assignment):
    key, _, text = assignment.partition("=")
    message = error_of(assignment)
    assert message.startswith(key)
    assert text in message


def test_a_word_in_place_of_a_part_gets_its_first_field():
    message = error_of("model.vision.position=learned")
    assert ".kind" in message and "factorized" in message and "'learned'" in message


def test_a_part_set_as_a_whole_is_answered_with_its_first_field():
    message = error_of("model.vision.rotary=qwen")
    assert message.endswith("has fields: set model.vision.rotary.kind=qwen")
    message = error_of("model.vision.rotary=3d")
    assert "expected none, or a field of RotaryConfig, such as .kind (one" in message


@pytest.mark.parametrize("assignment", ["optim.lr", "", "optim.lr.x=1", "=3"])
def test_text_that_is_not_an_assignment_is_refused(assignment):
    error_of(assignment)


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["data.budgets=2048"], ["2048", "1024"]),
        (["data.row_tokens=200"], ["256", "200"]),
        (["data.budgets=0,5"], ["0"]),
        (["data.budgets=()"], ["budgets"]),
        (["data.rows=0"], ["rows", "0"]),
        (["model.vision.width=100"], ["100", "12"]),
        (["model.text.num_heads=5"], ["768", "5"]),
        (["model.text.num_heads=0"], ["num_heads", "0"]),
        (["model.vision.num_heads=0"], ["num_heads", "0"]),
        (["model.text.vocab_size=100"], ["258", "100"]),
        (["data.caption_rows=3"], ["8", "3"]),
        (["data.captions=3"], ["captions=3", "caption_rows"]),
        (["train.losses=sigmoid,sigmoid"], ["sigmoid,sigmoid", "once", "sigmoid:2"]),
        (["train.losses.sigmoid.weight=0"], ["train.losses.sigmoid", "weight", "0"]),
        (["train.losses=softmax:-1"], ["train.losses.softmax", "weight", "-1"]),
        (["model.vision.position.size=-1"], ["size", "-1"]),
        (["model.vision.pool=mean", "model.text=None"], ["sigmoid", "text"]),
        (["train.losses=classification"], ["num_classes", "navit index"]),
        (["train.steps=0"], ["steps", "0"]),
        (["init="], ["init=PATH", "init=none"]),
    ],
)
def test_a_config_that_contradicts_itself_names_both_values(assignments, words):
    message = error_of(*assignments)
    for word in words:
        assert word in message


@pytest.mark.parametrize(
    "assignments",
    [
        ["model.vision.width=100", "model.vision.num_heads=5"],
        ["data.budgets=2048", "data.row_tokens=4096"],
        ["train.losses=classification", "model.vision.num_classes=3"],
    ],
)
def test_overrides_that_agree_together_need_no_order(assignments):
    # Only the whole command is a config; states in between need not be valid.
    one, other = overridden(*assignments), overridden(*assignments[::-1])
    assert one == other
    assert len(config.differences(Config(), one)) == len(assignments)


def test_a_part_set_both_whole_and_within_is_refused_in_either_order():
    base = Config(data=config.DataConfig(eval=config.Synthetic(5)))
    for assignments in itertools.permutations(["data.eval.size=3", "data.eval=None"]):
        with pytest.raises(ValueError, match=r"data\.eval"):
            config.override(base, assignments)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_survives_json(path):
    original = config.load(path)
    data = json.loads(json.dumps(config.to_json(original)))
    assert config.from_json(data) == original


def test_json_keeps_the_kind_of_source_and_no_text_tower():
    folder = Folder(path="/photos", split="eval", holdout=0.25)
    original = Config(
        model=config.ModelConfig(
            vision=config.VisionConfig(num_classes=3, embed_dim=None), text=None
        ),
        data=config.DataConfig(train=folder, eval=config.Synthetic(5), budgets=(1, 2)),
        train=config.TrainConfig(losses=(Classification(),)),
    )
    back = config.from_json(json.loads(json.dumps(config.to_json(original))))
    assert back == original
    assert type(back.data.train) is Folder
    assert back.model.text is None
    assert type(back.data.budgets) is tuple


@pytest.mark.parametrize(
    "train",
    [
        Folder("a"),
        Folder(table="t.csv"),
        TarShards("a"),
        ArrayRecords("a", caption="text", label=""),
        ParquetImages("a", caption="text", label=""),
        Tfds("a", caption="text", label=""),
        Mixture((TarShards("a"),)),
    ],
)
def test_json_of_earlier_versions_has_empty_text_for_none(train):
    original = Config(data=config.DataConfig(train=train))
    original = config.override(original, ["model.text.tokenizer=none"])
    # `label` keeps its own meaning of an empty text.
    data = config.to_json(config.override(original, ["data.eval=tfds:a"]))
    data["data"]["eval"]["label"] = ""
    data |= {"init": ""}
    data["train"]["profile_steps"] = data["model"]["text"]["tokenizer"] = ""
    for part in data["data"]["train"].get("sources", [data["data"]["train"]]):
        part |= {key: "" for key, value in part.items() if value is None}
    back = config.from_json(data)
    assert back.data.eval == Tfds("a", label="")
    assert config.override(back, ["data.eval=none"]) == original


def test_json_with_an_unknown_key_or_type_is_refused_by_name():
    data = config.to_json(Config())
    with pytest.raises(ValueError, match="momentum"):
        config.from_json(data | {"optim": data["optim"] | {"momentum": 0.9}})
    with pytest.raises(ValueError, match="Tarball"):
        train = data["data"]["train"] | {"type": "Tarball"}
        config.from_json(data | {"data": data["data"] | {"train": train}})
    with pytest.raises(ValueError, match="type"):
        config.from_json({})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("optim.lr", "fast"),
        ("optim.lr", None),
        ("optim.warmup_steps", 1.5),
        ("optim.warmup_steps", True),
        ("optim.b1", [0.9]),
        ("data.budgets", 256),
        ("data.budgets", [256, "729"]),
        ("data.train", 3),
        ("data.train.size", {}),
        ("model", None),
        ("model.vision", []),
        ("model.vision.position.kind", "polar"),
        ("model.fused", 1),
    ],
)
def test_json_of_another_type_is_refused_by_name(key, value):
    data = json.loads(json.dumps(config.to_json(Config())))
    node = data
    *parents, last = key.split(".")
    for parent in parents:
        node = node[parent]
    node[last] = value
    with pytest.raises(ValueError, match=re.escape(key)):
        config.from_json(data)


@pytest.mark.parametrize("data", [None, 3, "config", [], [1], {"type": 1}, {}])
def test_json_that_is_not_a_config_is_refused(data):
    with pytest.raises(ValueError, match="config"):
        config.from_json(data)


def test_a_whole_number_in_json_is_a_float_where_the_field_is():
    data = config.to_json(Config())
    lr = config.from_json(data | {"optim": data["optim"] | {"lr": 1}}).optim.lr
    assert lr == 1.0 and type(lr) is float


def test_differences_names_the_leaves_that_changed():
    a = Config()
    b = config.override(a, ["model.vision.position.size=20", "data.budgets=64"])
    assert config.differences(a, a) == []
    assert config.differences(a, b) == [
        "model.vision.position.size: 16 -> 20",
        "data.budgets: (256,) -> (64,)",
    ]
    (other,) = config.differences(config.Synthetic(), Folder())
    assert "Synthetic" in other and "Folder" in other


def test_load_applies_overrides_to_the_config_of_the_file():
    plain, changed = (config.load(CONFIGS[0], o) for o in ([], ["optim.lr=0.5"]))
    assert config.differences(plain, changed) == [
        f"optim.lr: {plain.optim.lr!r} -> 0.5"
    ]


def test_load_of_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "photos.py").write_text("")
    with pytest.raises(FileNotFoundError, match=r"fotos\.py.*did you mean.*photos\.py"):
        config.load(tmp_path / "fotos.py")
    with pytest.raises(FileNotFoundError, match=r"nowhere.x\.py"):
        config.load(tmp_path / "nowhere" / "x.py")


def test_load_of_a_file_without_get_config_says_so(tmp_path):
    path = tmp_path / "empty.py"
    path.write_text("config = 3\n")
    with pytest.raises(ValueError, match=r"empty\.py.*get_config"):
        config.load(path)


def test_load_of_a_get_config_that_returns_no_config_says_so(tmp_path):
    path = tmp_path / "forgot.py"
    path.write_text("def get_config():\n    pass\n")
    with pytest.raises(ValueError, match=r"forgot\.py.*get_config"):
        config.load(path)


FACTORIZED = {"kind": "factorized", "size": 8, "encoding": "learned"}


@pytest.mark.parametrize(
    ("position", "fits", "too_large"),
    [
        ({"kind": "learned_1d", "size": 60}, (6, 10), (61, 1)),
        ({"kind": "learned_1d", "size": 60}, (1, 60), (8, 8)),
        ({"kind": "learned_2d", "size": 8}, (8, 8), (2, 9)),
        (FACTORIZED | {"coordinates": "absolute"}, (8, 1), (9, 1)),
    ],
)
def test_a_learned_table_refuses_the_grids_beyond_it(position, fits, too_large):
    position = PositionConfig(**position)
    position.check(np.array([fits, (1, 1)]))
    with pytest.raises(ValueError, match="{}x{}".format(*too_large)) as caught:
        position.check(np.array([fits, too_large, (1, 1)]))
    assert str(position.size) in str(caught.value)


@pytest.mark.parametrize(
    "position",
    [
        {"kind": "siglip2"},
        FACTORIZED | {"coordinates": "fractional"},
        FACTORIZED | {"coordinates": "fractional_aspect"},
        FACTORIZED | {"coordinates": "absolute", "encoding": "sinusoidal"},
        FACTORIZED | {"coordinates": "absolute", "encoding": "fourier"},
    ],
)
def test_the_other_positions_have_no_limit(position):
    # A wrong refusal raises, and so does a missing method.
    assert PositionConfig(**position).check(np.array([[5000, 3000]])) is None


def test_evaluations_are_made_by_name_and_kind():
    made = overridden(
        "eval.tasks=pets:knn,retrieval",
        "eval.tasks.pets.source=folder:~/pets",
        "eval.tasks.pets.k=3",
    )
    pets, retrieval = made.eval.tasks
    assert (pets.name, pets.kind, pets.k) == ("pets", "knn", 3)
    assert pets.source == Folder("~/pets")
    assert retrieval == config.EvalTask("retrieval", "retrieval")
    assert config.from_json(json.loads(json.dumps(config.to_json(made)))) == made
    other = config.override(made, ["eval.tasks.pets.k=4"])
    assert config.differences(made, other) == ["eval.tasks.pets.k: 3 -> 4"]
    assert config.override(made, ["eval.tasks=()"]).eval.tasks == ()


@pytest.mark.parametrize(
    ("assignments", "words"),
    [
        (["eval.tasks=pets"], ["'pets'", "needs a kind", "retrieval"]),
        (["eval.tasks=knnn"], ["'knnn'", "did you mean 'knn'?", "knnn:KIND"]),
        (["eval.tasks=retreival"], ["did you mean 'retrieval'?"]),
        (["eval.tasks.retrieval.k=3"], ["eval.tasks is empty: add eval.tasks=retr"]),
        (["eval.tasks=pets:kn"], ["eval.tasks.pets.kind", "did you mean 'knn'"]),
        (["eval.tasks=a b:knn"], ["'a b'", "letters"]),
        (["eval.tasks=knn,knn"], ["knn,knn", "names"]),
        (["eval.tasks=knn", "eval.tasks.kn.k=2"], ["eval.tasks.kn", "'knn'"]),
        (["eval.tasks=knn", "eval.tasks.knn.prompts=f"], ["prompts", "zero_shot"]),
        (["eval.tasks=knn", "eval.tasks.knn.per_class=true"], ["per_class", "knn"]),
        (["eval.tasks=knn", "eval.tasks.knn.k=0"], ["eval.tasks.knn", "k", "0"]),
        (["eval.every=-1"], ["eval.every", "-1"]),
    ],
)
def test_an_evaluation_that_cannot_be_is_refused(assignments, words):
    message = error_of(*assignments)
    for word in words:
        assert word in message
