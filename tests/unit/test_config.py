"""Settings: strict, with errors that name path, value, what is allowed and the way out."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_scan.config import ConfigError, dump, override, read_yaml, validate_settings
from dist_scan.run_config import CompleteRunConfig, load_config

CONFIGS = sorted(
    p
    for p in (Path(__file__).resolve().parents[2] / "configs").glob("*.yaml")
    if not p.stem.startswith("compare_")
)
QUICK = Path(__file__).resolve().parents[2] / "configs" / "quickstart.yaml"


def message(*overrides: str) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(QUICK, list(overrides))
    return str(error.value)


def test_yaml_reads_numbers_and_words_as_yaml_1_2_does() -> None:
    tree = read_yaml("a: 3e-2\nb: no\nc: true\nd: 010\ne: 1.\nf: 2024-01-02\ng: [1e5, -3]\nh: null")
    assert tree == {
        "a": 0.03,
        "b": "no",
        "c": True,
        "d": 10,
        "e": 1.0,
        "f": "2024-01-02",
        "g": [1e5, -3],
        "h": None,
    }


def test_a_key_given_twice_is_refused_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"line 3: the key 'b' is given twice"):
        read_yaml("a: 1\nb: 2\nb: 3")
    with pytest.raises(ConfigError, match="twice"):
        read_yaml("a: {x: 1, x: 2}")


def test_overrides_edit_the_raw_tree() -> None:
    tree = {"a": {"b": 1, "c": 2}}
    override(tree, ["a.b=3e-2", "a.d.e=[1, 2]", "a.c="])
    assert tree == {"a": {"b": 0.03, "d": {"e": [1, 2]}}}
    with pytest.raises(ConfigError, match="dotted.path=value"):
        override({}, ["nonsense"])
    with pytest.raises(ConfigError, match="a.b is 1, not a block"):
        override({"a": {"b": 1}}, ["a.b.c=2"])


def test_an_override_reaches_the_config() -> None:
    assert load_config(QUICK, ["stages.heads.epochs=5", "seed=7"]).stages["heads"].epochs == 5


@pytest.mark.parametrize(
    "overrides, words",
    [
        (["stages.heads.epoch=5"], ["stages.heads.epoch", "unknown setting", "5", "epochs"]),
        (["stages.heads.method.lambda=5"], ["stages.heads.method.lambda", "entropy_weight"]),
        (["stages.heads.epochs=ten"], ["stages.heads.epochs", "'ten'", "integer"]),
        (["stages.heads.epochs=0"], ["stages.heads.epochs", "greater than or equal to 1", "0"]),
        (
            ["stages.heads.method.kind=scam"],
            ["stages.heads.method", "'scam'", "moco", "did you mean 'scan'"],
        ),
        (["stages.heads.kind=trian"], ["stages.heads", "'trian'", "did you mean 'train'"]),
        (
            ["stages.heads.neighbours=neighbors"],
            ["stages.heads.neighbours", "'neighbors' is not an earlier stage", "features"],
        ),
        (["stages.heads.neighbours="], ["stages.heads.neighbours", "needs neighbours"]),
        (["stages.heads.images=train"], ["stages.heads", "exactly one of images"]),
        (["stages.bank.recipe=center"], ["stages.bank.views", "allowed: 1"]),
        (["stages.pretext.recipes=[digits]"], ["stages.pretext.recipes", "1 given", "wants 2"]),
        (["stages.pretext.recipes=[digit, digits]"], ["recipes", "digit"]),
        (["stages.heads.num_neighbours=21"], ["stages.heads.num_neighbours", "21", "20"]),
        (["runtime.device=gpu"], ["runtime.device", "'gpu'", "cuda"]),
        (["name=a/b"], ["name", "'a/b'"]),
        (["data.train="], ["data.train", "missing"]),
    ],
)
def test_mistakes_are_named(overrides, words) -> None:
    text = message(*overrides)
    missing = [w for w in words if w not in text]
    assert not missing, f"{missing} not in:\n{text}"


@pytest.mark.parametrize(
    "override, words",
    [
        (
            "stages.heads.neighbours=kmeans_features",
            "stages.heads.neighbours: 'kmeans_features' (kind kmeans) publishes no neighbours; allowed: neighbours",
        ),
        (
            "stages.heads.features=neighbours",
            "publishes no features; allowed: pixels, features, bank",
        ),
        ("stages.scan.model=pretext", "publishes no model; allowed: heads"),
        (
            "stages.evaluate.subjects={mine: pretext}",
            "stages.evaluate.subjects.mine: 'pretext' (kind train) publishes no clusters",
        ),
        (
            "stages.a b={kind: kmeans, features: pixels, num_clusters: 4}",
            "'a b' cannot be a stage's name",
        ),
        (
            "stages.beton_train={kind: kmeans, features: pixels, num_clusters: 4}",
            "'beton_train' cannot be a stage's name",
        ),
        ("seed=99999999999999999999", "seed: Input should be less than"),
        ("data.std=[0.2, 0, 0.2]", "data.std.1: Input should be greater than 0"),
    ],
)
def test_a_reference_to_the_wrong_kind_is_refused_at_the_door(override, words) -> None:
    with pytest.raises(ConfigError) as told:
        load_config(CONFIGS[[p.stem for p in CONFIGS].index("quickstart")], [override])
    assert words in str(told.value)


def test_every_mistake_is_listed_at_once() -> None:
    text = message("stages.heads.epochs=0", "seed=-1")
    assert "2 errors" in text and "seed" in text and "stages.heads.epochs" in text


def test_a_missing_file_names_those_there_are() -> None:
    with pytest.raises(ConfigError, match="does not exist.*quickstart.yaml"):
        load_config(QUICK.with_name("quikstart.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_load_and_survive_a_round_trip(path) -> None:
    run = load_config(path)
    assert validate_settings(CompleteRunConfig, read_yaml(dump(run))) == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_shipped_configs_look_at_whole_images(path) -> None:
    from dist_scan.preflight import warnings

    assert warnings(load_config(path)) == []


def test_a_size_that_does_not_fit_is_said_once_by_the_first_stage_that_meets_it() -> None:
    from dist_scan.preflight import warnings

    found = warnings(load_config(QUICK, ["data.resolution=256"]))
    assert [text.split(":")[0] for text in found] == [
        "stages.pretext",
        "stages.pixels",
        "stages.selflabelling",
    ] and all("2% of a square image" in text for text in found)


def test_settings_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        load_config(QUICK).seed = 3


def test_reading_a_config_imports_nothing_slow() -> None:
    """torchvision, timm and the compiler behind them cost five seconds at every start; only building a network needs them."""
    code = (
        "import sys; from dist_scan.run_config import load_config; load_config('configs/quickstart.yaml'); import dist_scan.run; "
        "print([m for m in ('torchvision', 'timm', 'torch._dynamo', 'sklearn', 'numba') if m in sys.modules])"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS[0].parents[1], capture_output=True, text=True
    )
    assert out.stdout.strip() == "[]", out.stdout + out.stderr


def test_what_a_batch_allows_is_said_at_the_door() -> None:
    assert "queue_size: 300 is no multiple of the 128 keys" in message(
        "stages.pretext.method={kind: moco, queue_size: 300}"
    )
    assert "bn_groups: 3 does not divide global_batch 128" in message(
        "stages.pretext.method={kind: moco, queue_size: 1024, bn_groups: 3}"
    )
    run = load_config(
        QUICK,
        [
            "stages.pretext.method={kind: moco, queue_size: 1024, bn_groups: 8}",
            "stages.pretext.global_batch=96",
            "stages.pretext.method.queue_size=960",
        ],
    )
    with pytest.raises(
        ValueError, match="stages.pretext: bn_groups: 8 and 3 ranks: one must divide the other"
    ):
        run.stages["pretext"].check_ranks("pretext", 3)
    with pytest.raises(
        ValueError,
        match="global_batch: 96 is not divisible by 5 processes; nearest that are: 95, 100",
    ):
        run.stages["pretext"].check_ranks("pretext", 5)


@pytest.mark.parametrize(
    "data, words",
    [
        (b"name: \xff", "not UTF-8 text"),
        (b"a: \x00", "not valid YAML"),
        (b"[1, 2]: 3", "line 1: the key"),
        (b"3: 4", "is not a string"),
        (b"a: &x {b: 1}\nc: {<<: *x}", "merge keys"),
    ],
)
def test_files_that_are_no_settings(tmp_path: Path, data, words) -> None:
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=words):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="is a folder; there are: bad.yaml"):
        load_config(tmp_path)


def test_a_method_that_does_not_name_its_kind_is_told_the_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it a mistyped setting was answered with an empty list of what is allowed."""
    import dist_scan.methods
    from dist_scan.methods.base import method_class

    monkeypatch.setattr(dist_scan.methods, "__path__", [*dist_scan.methods.__path__, str(tmp_path)])
    for name, line in (("unnamed", ""), ("misnamed", '    kind: Literal["other"] = "other"\n')):
        (tmp_path / f"{name}.py").write_text(
            f"from typing import Literal\nfrom dist_scan.methods.base import Method, MethodConfig\n\nclass C(MethodConfig):\n    weight: float = 1.0\n{line}\n"
            "class M(Method):\n    Config = C\n"
        )
        with pytest.raises(
            ConfigError,
            match=f'needs a line that names its kind: `kind: Literal\\["{name}"\\] = "{name}"`',
        ):
            method_class(name)
