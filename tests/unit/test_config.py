"""Settings are validated strictly; errors name path, value, what is allowed and the remedy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import ValidationError

from dist_scan.config import ConfigError, dump, override, read_yaml, validate_settings
from dist_scan.methods.base import method_class
from dist_scan.preflight import data_warnings
from dist_scan.run_config import CompleteRunConfig, load_config
from tests.support.launches import ROOT

QUICKSTART = ROOT / "configs" / "quickstart.yaml"
CONFIGS = sorted(
    path for path in (ROOT / "configs").glob("*.yaml") if not path.stem.startswith("compare_")
)


def error_text(*overrides: str) -> str:
    """The error for the quickstart with these overrides."""
    with pytest.raises(ConfigError) as error:
        load_config(QUICKSTART, overrides)
    return str(error.value)


def test_numbers_and_booleans_are_those_of_yaml_1_2() -> None:
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


def test_a_duplicate_key_is_an_error_with_its_line() -> None:
    with pytest.raises(ConfigError, match=r"line 3: the key 'b' is given twice"):
        read_yaml("a: 1\nb: 2\nb: 3")
    with pytest.raises(ConfigError, match="twice"):
        read_yaml("a: {x: 1, x: 2}")


def test_overrides_edit_raw_settings() -> None:
    tree = {"a": {"b": 1, "c": 2}}
    override(tree, ["a.b=3e-2", "a.d.e=[1, 2]", "a.c="])
    assert tree == {"a": {"b": 0.03, "d": {"e": [1, 2]}}}
    with pytest.raises(ConfigError, match="dotted.path=value"):
        override({}, ["nonsense"])
    with pytest.raises(ConfigError, match="a.b is 1, not a block"):
        override({"a": {"b": 1}}, ["a.b.c=2"])


def test_an_override_reaches_the_config() -> None:
    run = load_config(QUICKSTART, ["stages.heads.epochs=5", "seed=7"])
    assert (run.stages["heads"].epochs, run.seed) == (5, 7)


@pytest.mark.parametrize(
    "invalid, parts",
    [
        ("stages.heads.epoch=5", ["stages.heads.epoch: unknown setting (value 5)", "'epochs'?"]),
        ("stages.heads.method.lambda=5", ["stages.heads.method.lambda", "entropy_weight"]),
        ("stages.heads.epochs=ten", ["stages.heads.epochs", "(value 'ten')", "integer"]),
        ("stages.heads.epochs=0", ["stages.heads.epochs", "greater than or equal to 1", "0"]),
        (
            "stages.heads.method.kind=scam",
            ["stages.heads.method: unknown kind 'scam'", "moco", "did you mean 'scan'?"],
        ),
        ("stages.heads.kind=trian", ["stages.heads: unknown kind 'trian'", "'train'?"]),
        ("stages.heads.kind=", ["stages.heads: kind is missing; allowed: assign"]),
        (
            "stages.heads.neighbours=neighbors",
            ["stages.heads.neighbours: 'neighbors' is not an earlier stage", "features"],
        ),
        ("stages.heads.neighbours=", ["stages.heads.neighbours", "needs neighbours"]),
        ("stages.heads.images=train", ["stages.heads", "exactly one of images"]),
        ("stages.bank.recipe=center", ["stages.bank.views", "allowed: 1"]),
        ("stages.pretext.recipes=[digits]", ["stages.pretext.recipes", "1", "2"]),
        (
            "stages.pretext.recipes=[digit, digits]",
            ["stages.pretext.recipes.0: no recipe 'digit'", "did you mean 'digits'?"],
        ),
        (
            "stages.pretext.recipes=[{name: digits, flop: 1}, digits]",
            ["stages.pretext.recipes.0.flop: unknown setting", "did you mean 'flip'?"],
        ),
        ("stages.heads.num_neighbours=21", ["stages.heads.num_neighbours", "21", "20"]),
        ("runtime.device=gpu", ["runtime.device", "'gpu'", "cuda"]),
        ("name=a/b", ["name", "'a/b'"]),
        ("data.train=", ["data.train", "missing"]),
        ("data.mean=[1e400, 0.0, 0.0]", ["data.mean.0", "finite"]),
        ("data.std=[0.2, 0, 0.2]", ["data.std.1: Input should be greater than 0"]),
        ("data.max_side=70000", ["data.max_side", "70000", "65535"]),
        ("seed=99999999999999999999", ["seed: Input should be less than"]),
        ("slurm.sbatch={nod: 3}", ["slurm.sbatch: 'nod' (Slurm reads it as nodes)"]),
    ],
)
def test_an_error_names_path_value_and_remedy(invalid: str, parts: list[str]) -> None:
    text = error_text(invalid)
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in:\n{text}"


@pytest.mark.parametrize(
    "invalid, value",
    [
        ("stages.pretext.recipes=[digit, digits]", "'digit'"),
        ("stages.pretext.network.name=resnet51", "'resnet51'"),
        ("stages.pretrained={kind: pretrained, cluster_head: worst}", "'worst'"),
        ('slurm.partition="a\\nb"', r"'a\nb'"),
        ("stages.heads.epochs=ten", "'ten'"),
    ],
)
def test_an_error_shows_the_value_once(invalid: str, value: str) -> None:
    text = error_text(invalid)
    assert text.count(value) == 1, text


@pytest.mark.parametrize(
    "invalid, message",
    [
        (
            "stages.heads.neighbours=kmeans_features",
            "stages.heads.neighbours: 'kmeans_features' (kind kmeans) publishes no neighbours; "
            "allowed: neighbours",
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
            "stages.evaluate.images=val",
            "stages.evaluate.images: 'val', but data.val is not set; add it",
        ),
        (
            "stages.a b={kind: kmeans, features: pixels, num_clusters: 4}",
            "'a b' cannot be a stage's name",
        ),
        (
            "stages.beton_train={kind: kmeans, features: pixels, num_clusters: 4}",
            "'beton_train' cannot be a stage's name",
        ),
    ],
)
def test_stages_refer_to_earlier_ones_that_publish_what_they_need(
    invalid: str, message: str
) -> None:
    assert message in error_text(invalid)


def test_all_errors_are_listed_at_once() -> None:
    text = error_text("stages.heads.epochs=0", "seed=-1")
    assert "2 errors" in text and "seed" in text and "stages.heads.epochs" in text


def test_a_missing_file_is_answered_with_the_files_beside_it() -> None:
    with pytest.raises(ConfigError, match="does not exist.*quickstart.yaml"):
        load_config(QUICKSTART.with_name("quikstart.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_survive_a_round_trip(path: Path) -> None:
    run = load_config(path)
    assert validate_settings(CompleteRunConfig, read_yaml(dump(run))) == run


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_shipped_configs_have_no_warnings(path: Path) -> None:
    assert data_warnings(load_config(path)) == []


def test_a_warning_names_the_first_stage_that_it_concerns() -> None:
    found = data_warnings(load_config(QUICKSTART, ["data.resolution=256"]))
    stages = [text.partition(":")[0] for text in found]
    assert stages == ["stages.pretext", "stages.pixels", "stages.selflabelling"]
    assert all("2% of a square image" in text for text in found)


def test_settings_are_frozen() -> None:
    run = load_config(QUICKSTART)
    with pytest.raises(ValidationError, match="frozen"):
        run.seed = 3  # type: ignore[misc]  # that is what is tested


def test_reading_a_config_imports_nothing_slow() -> None:
    """torchvision and timm, which take five seconds, are imported to build a network only."""
    code = (
        "import sys; from dist_scan.run_config import load_config; import dist_scan.run; "
        "load_config('configs/quickstart.yaml'); slow = "
        "('torchvision', 'timm', 'torch._dynamo', 'sklearn', 'numba'); "
        "print([name for name in slow if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_methods_check_the_batch_and_the_number_of_ranks() -> None:
    assert "queue_size: 300 is no multiple of the 128 keys" in error_text(
        "stages.pretext.method={kind: moco, queue_size: 300}"
    )
    assert "bn_groups: 3 does not divide global_batch 128" in error_text(
        "stages.pretext.method={kind: moco, queue_size: 1024, bn_groups: 3}"
    )
    run = load_config(
        QUICKSTART,
        [
            "stages.pretext.method={kind: moco, queue_size: 960, bn_groups: 8}",
            "stages.pretext.global_batch=96",
        ],
    )
    pretext = run.stages["pretext"]
    with pytest.raises(
        ValueError, match="stages.pretext: bn_groups: 8 and 3 ranks: one must divide the other"
    ):
        pretext.check_ranks("pretext", 3)
    with pytest.raises(
        ValueError,
        match="global_batch: 96 is not divisible by 5 processes; nearest that are: 95, 100",
    ):
        pretext.check_ranks("pretext", 5)


@pytest.mark.parametrize(
    "data, message",
    [
        (b"name: \xff", "not UTF-8 text"),
        (b"a: \x00", "not valid YAML"),
        (b"[1, 2]: 3", "line 1: the key"),
        (b"3: 4", "is not a string"),
        (b"a: &x {b: 1}\nc: {<<: *x}", "merge keys"),
        (b"[1, 2]", "expected a block of settings, got list"),
    ],
)
def test_a_file_without_settings_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    (tmp_path / "bad.yaml").write_bytes(data)
    with pytest.raises(ConfigError, match=message):
        load_config(tmp_path / "bad.yaml")
    with pytest.raises(ConfigError, match="is a folder; there are: bad.yaml"):
        load_config(tmp_path)


@pytest.mark.parametrize("name, kind", [("unnamed", None), ("misnamed", "other")])
def test_a_method_must_name_its_kind(
    name: str, kind: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else an unknown setting would be answered with an empty list of what is allowed."""
    import dist_scan.methods

    paths = [*dist_scan.methods.__path__, str(tmp_path)]
    monkeypatch.setattr(dist_scan.methods, "__path__", paths)
    line = "" if kind is None else f'    kind: Literal["{kind}"] = "{kind}"\n'
    (tmp_path / f"{name}.py").write_text(
        "from typing import Literal\n"
        "from dist_scan.methods.base import Method, MethodConfig\n\n"
        f"class C(MethodConfig):\n    weight: float = 1.0\n{line}\n"
        "class M(Method):\n    Config = C\n"
    )
    remedy = f'needs a line that names its kind: `kind: Literal\\["{name}"\\] = "{name}"`'
    with pytest.raises(ConfigError, match=remedy):
        method_class(name)
