"""The configuration: what is wrong is refused by name before anything loads; the rest round-trips."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from listen_dist import config as configuration
from listen_dist.schema import Config, ConfigError
from tests import tiny
from tests.launching import ROOT

pytestmark = pytest.mark.timeout(300)

BASE = {"run_dir": "r", "model": {"llm": "a/b", "speech_encoder": "c/d"}, "data": {"train": [{"path": "x"}]}}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write(tmp_path, BASE)


def write(folder: Path, tree: object) -> Path:
    path = folder / "config.yaml"
    path.write_text(tree if isinstance(tree, str) else yaml.safe_dump(tree))
    return path


REFUSED_WORDS = [
    (["train.learning_rat=1"], r"unknown key 'train\.learning_rat'.* 'train\.learning_rate'"),
    (["learning_rate=1"], r"unknown key 'learning_rate'.* 'train\.learning_rate'"),
    (["trian.max_steps=1"], r"unknown key 'trian\.max_steps'.* 'train\.max_steps'"),
    (["data.train[0].wieght=1"], r"'data\.train\[0\]\.wieght'.* 'data\.train\[0\]\.weight'"),
    (["data.train=[{path: x, wheight: 2}]"], r"'data\.train\[0\]\.wheight'.* 'data\.train\[0\]\.weight'"),
    (["train.max_steps"], r"'train\.max_steps': an override has the form key=value"),
    (["train.max_steps=many"], r"train\.max_steps.*many"),
    (["train.learning_rate=fast"], r"train\.learning_rate.*fast"),
    (["train.schedule=cosin"], r"train\.schedule.*cosin"),
    (["pool.stochastic_k=perhaps"], r"pool\.stochastic_k.*perhaps"),
    (["train=5"], r"train"),
    (["data.train[7].path=x"], r"data\.train\[7\]"),
    (["data.train=x"], r"data\.train"),
    (["model.llm=''"], r"model\.llm = '': must be set"),
    (["model.llm="], r"command line: model\.llm"),
    (["pool.top_k=51"], r"pool\.top_k = 51: must be 1 … pool\.prompts = 50"),
    (["pool.top_k=0"], r"pool\.top_k = 0"),
    (["pool.train_k_max=60"], r"pool\.train_k_max = 60"),
    (["pool.prompts=0"], r"pool\.prompts = 0"),
    (["projector.freeze=true"], r"projector\.freeze = True: needs projector\.init_from"),
    (["model.init_from=x", "model.init_projector=false", "projector.freeze=true"], r"projector\.freeze = True"),
    (["model.init_from=x", "projector.start=least_squares"], r"projector\.start = 'least_squares': would overwrite"),
    (["model.init_from=x", "projector.init_from=y"], r"projector\.init_from = 'y': model\.init_from brings"),
    (["projector.hidden=100"], r"projector\.hidden = 100: must be a multiple of projector\.heads = 12"),
    (["projector.heads=0"], r"projector\.heads = 0"),
    (["projector.layers=0"], r"projector\.layers = 0"),
    (["projector.window=0.001"], r"projector\.window = 0\.001"),
    (["model.after_audio=hello"], r"model\.after_audio = 'hello': must hold \{instruction\}"),
    (["train.min_learning_rate=1"], r"train\.min_learning_rate = 1\.0: is above train\.learning_rate"),
    (["train.max_steps=0"], r"train\.max_steps = 0"),
    (["train.keep=0"], r"train\.keep = 0"),
    (["train.batches_per_step=-1"], r"train\.batches_per_step = -1"),
    (["train.task_weights.asr=0"], r"train\.task_weights\.asr = 0\.0: must be positive"),
    (["train.task_weights.asrr=2"], r"unknown key 'train\.task_weights\.asrr'.* 'train\.task_weights\.asr'"),
    (["train.task_weights={asrr: 2}"], r"train\.task_weights: unknown task 'asrr': did you mean 'asr'"),
    (["train.clip_norm=-1"], r"train\.clip_norm = -1"),
    (["train.beta2=1"], r"train\.beta2 = 1\.0"),
    (["data.batch_tokens=1"], r"data\.batch_tokens = 1"),
    (["data.window=0"], r"data\.window = 0"),
    (["data.workers=-1"], r"data\.workers = -1"),
    (["data.max_target_tokens=0"], r"data\.max_target_tokens = 0"),
    (["data.max_seconds=31"], r"data\.max_seconds = 31\.0: must be within the encoder's window"),
    (["data.train[0].weight=0"], r"data\.train\[0\]\.weight = 0\.0"),
    (["data.train[0].path=pipe:id"], r"data\.train\[0\]\.path = 'pipe:id': 'pipe:' is no source; give a folder"),
    (["data.cache_gib=0"], r"data\.cache_gib = 0\.0"),
    (["data.retries=-1"], r"data\.retries = -1"),
    (["data.timeout_seconds=0"], r"data\.timeout_seconds = 0\.0"),
    (["data.train[0].path=''"], r"data\.train\[0\]\.path = '': must be set"),
    (["eval.beams=0"], r"eval\.beams = 0"),
    (["eval.batch_tokens=0"], r"eval\.batch_tokens = 0"),
    (["eval.limit=-1"], r"eval\.limit = -1"),
    (["eval.no_repeat_ngram_size=-1"], r"eval\.no_repeat_ngram_size = -1"),
    (["train.lr=1e-3"], r"unknown key 'train\.lr'.* 'train\.learning_rate'"),
    (["lr=1e-3"], r"unknown key 'lr'.* 'train\.learning_rate'"),
    (["train.wd=0"], r"unknown key 'train\.wd'.* 'train\.weight_decay'"),
    (["output_dir=x"], r"unknown key 'output_dir'.* 'run_dir'"),
    (["model.before_audio=user: hi"], r"command line: model\.before_audio: expected text.* needs quotes"),
    (["model.before_audio=[x]"], r"command line: model\.before_audio: expected text.* needs quotes"),
    (["model.before_audio=a: b: c"], r"command line: model\.before_audio: not readable as YAML.* needs quotes"),
    (["data.train=[{path: x"], r"command line: data\.train: not readable as YAML"),
    (["train.task_weights={asr: 1, asr: 2}"], r"command line: train\.task_weights: not readable as YAML.*asr"),
    (["run_dir=$LISTEN_NOWHERE/x"], r"run_dir = '\$LISTEN_NOWHERE/x': the environment variable LISTEN_NOWHERE is not"),
    (["data.train=[{path: '${LISTEN_NOWHERE}/x'}]"], r"\[0\]\.path = '\$\{LISTEN_NOWHERE\}/x': the environment"),
    (["run_dir=~listen_nobody/x"], r"run_dir = '~listen_nobody/x': no such home folder"),
    (["data.augment.speed=0.1"], r"data\.augment\.speed = 0\.1: works on audio"),
    (["data.augment.mel_masks=2", "data.augment.noise=y"], r"data\.augment\.noise = 'y': works on audio"),
    (["parallel.timeout_minutes=0"], r"parallel\.timeout_minutes = 0"),
]


@pytest.mark.parametrize("words, message", REFUSED_WORDS, ids=[words[0] for words, _ in REFUSED_WORDS])
def test_a_wrong_override_is_refused_by_name(base: Path, words: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        configuration.load(base, words)
    assert "\n" not in str(caught.value)


REFUSED_FILES = [
    ("train: {max_step: 3}", r"config\.yaml: unknown key 'train\.max_step'.* 'train\.max_steps'"),
    ("data: {test: [{pth: x}]}", r"'data\.test\[0\]\.pth'.* 'data\.test\[0\]\.path'|'data\.train\[0\]\.path'"),
    ("train: {max_steps: soon}", r"config\.yaml: .*max_steps.*soon"),
    ("train: [1, 2]", r"config\.yaml: train: expected `key: value` lines below it"),
    ("- a list", r"config\.yaml: expected `key: value` lines"),
    ("train: {max_steps: [", r"config\.yaml: not readable as YAML"),
    ("just text", r"config\.yaml"),
    ("run_dir: r\ntrain:\n  max_steps: [", r"config\.yaml line 3 \(max_steps: \[\): not readable as YAML"),
    ("run_dir: r\nmodel:\n  before_audio: a: b\n", r"config\.yaml line 3 \(before_audio: a: b\).* needs quotes"),
    ("run_dir: r\nmodel:\n  before_audio: {a: b}\n", r"config\.yaml: model\.before_audio: expected text"),
    ("run_dir: a\nrun_dir: b", r"config\.yaml line 2 .*: not readable as YAML: .*run_dir"),
]


@pytest.mark.parametrize("text, message", REFUSED_FILES, ids=[text for text, _ in REFUSED_FILES])
def test_a_wrong_file_is_refused_with_its_name(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        configuration.load(write(tmp_path, text))


def test_a_missing_file_is_refused_with_its_name() -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml: no such config file"):
        configuration.load("nowhere.yaml")


def test_an_empty_file_and_overrides_are_enough(tmp_path: Path) -> None:
    config = configuration.load(write(tmp_path, ""), ["run_dir=r", "model.llm=a/b", "model.speech_encoder=c/d"])
    assert config.pool.k == 20 and config.pool.k_max == 20


def test_overrides_of_every_kind(base: Path) -> None:
    config = configuration.load(base, [
        "train.max_steps=50", "train.learning_rate=2e-3", "pool.top_k=4", "pool.stochastic_k=false",
        "data.train[0].weight=3", "data.train.0.path=a=b", "data.test=[{path: t}, {path: u, weight: 2}]",
        "model.before_audio='<|im_start|>user: [x]'", "projector.init_from=null",
        "train.task_weights={asr: 2, caption: 3}", "train.task_weights.asr=4"])
    assert (config.train.max_steps, config.train.learning_rate) == (50, 2e-3)
    assert (config.pool.k, config.pool.k_max, config.pool.stochastic_k) == (4, 4, False)
    assert (config.data.train[0].weight, config.data.train[0].path) == (3.0, "a=b")
    assert [(entry.path, entry.weight) for entry in config.data.test] == [("t", 1.0), ("u", 2.0)]
    assert config.model.before_audio == "<|im_start|>user: [x]"
    assert config.projector.init_from is None
    assert config.train.task_weights == {"asr": 4.0, "caption": 3.0}


TEXTS = ["2026_11_28", "001", "no", "1e3", "true", "0x10", "12:30", "yes", "3.10", "2026-11-28", "é"]


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_text(tmp_path: Path, base: Path, text: str) -> None:
    """Where a key holds text, from the command line, from a file, and from the file that a run writes."""
    said = configuration.load(base, [f"run_dir={text}", f"tracking.experiment={text}", f"pool.tasks=[{text}, b]",
                                     f"data.train=[{{path: {text}}}]", f"projector.init_from={text}"])
    tree = {"model": BASE["model"]}
    rest = (f"run_dir: {text}\ntracking: {{experiment: {text}}}\npool:\n  tasks: [{text}, b]\n"
            f"data: {{train: [{{path: {text}}}]}}\nprojector: {{init_from: {text}}}\n")
    written = configuration.load(write(tmp_path, yaml.safe_dump(tree) + rest))
    for config in (said, written):
        assert (config.run_dir, config.tracking.experiment, config.pool.tasks) == (text, text, [text, "b"])
        assert (config.data.train[0].path, config.projector.init_from) == (text, text)
    assert configuration.load(write(tmp_path, configuration.to_yaml(said))) == said == written


def test_numbers_keep_their_forms(base: Path) -> None:
    config = configuration.load(base, ["train.max_steps=0x10", "train.warmup_steps=1_000", "train.learning_rate=.5",
                                       "train.min_learning_rate=+1E-3", "train.decay_pool=yes", "train.seed='7'",
                                       "data.temperature=.inf", "train.task_weights.asr=2"])
    assert (config.train.max_steps, config.train.warmup_steps, config.train.seed) == (16, 1000, 7)
    assert (config.train.learning_rate, config.train.min_learning_rate) == (0.5, 1e-3)
    assert config.train.decay_pool and config.data.temperature == float("inf")


def test_paths_are_expanded(tmp_path: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Home folders, variables and slashes at the end, wherever the schema has a path and nowhere else."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("LISTEN_DISK", "/disk")
    words = ["run_dir=~/x", "model.llm=$LISTEN_DISK/llm/", "model.speech_encoder=${LISTEN_DISK}/speech",
             "model.audio_encoder=~/b.pt", "projector.init_from=$LISTEN_DISK", "data.cache_dir=${run_dir}/cache",
             "data.train=[{path: '$LISTEN_DISK/{a,b}/'}, {path: s3://b/$LISTEN_DISK}]", "data.stored_features=false",
             "data.augment.reverb=~/r", "tracking.uri=sqlite:///$LISTEN_DISK/m.db",
             "model.before_audio='~/ $LISTEN_DISK/'"]
    config = configuration.load(base, words)
    assert (config.run_dir, config.data.augment.reverb) == ("/home/me/x", "/home/me/r")
    assert (config.model.llm, config.model.speech_encoder) == ("/disk/llm", "/disk/speech")
    assert (config.model.audio_encoder, config.projector.init_from) == ("/home/me/b.pt", "/disk")
    assert [entry.path for entry in config.data.train] == ["/disk/{a,b}", "s3://b//disk"]
    assert (config.data.cache_dir, config.tracking.uri) == ("/home/me/x/cache", "sqlite:////disk/m.db")
    assert config.model.before_audio == "~/ $LISTEN_DISK/"
    write(tmp_path, {"run_dir": "~/y/"})
    (tmp_path / "above.yaml").write_text(f"base: ${{LISTEN_BASE}}/config.yaml\nmodel: {BASE['model']}\n")
    monkeypatch.setenv("LISTEN_BASE", str(tmp_path))
    assert configuration.load(tmp_path / "above.yaml").run_dir == "/home/me/y"


def test_every_key_of_a_file_or_folder_is_a_path() -> None:
    """A key whose text says folder, checkpoint or file is of the type that is expanded."""
    source = (ROOT / "listen_dist/schema.py").read_text(encoding="utf-8")
    found = re.findall(r"^    (\w+): str\b.*\n    \"\"\"(?:An? )?(?:Folder|Where|File)", source, re.M)
    assert not found, found


def test_a_later_override_wins(base: Path) -> None:
    assert configuration.load(base, ["train.seed=1", "train.seed=2"]).train.seed == 2


def test_it_is_frozen_all_the_way_down(base: Path) -> None:
    config = configuration.load(base)
    for node in (config, config.train, config.data, config.data.train[0]):
        assert dataclasses.is_dataclass(node)
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(node, dataclasses.fields(node)[0].name, None)


def test_yaml_round_trip(base: Path, tmp_path: Path, tiny_world: tiny.Tiny) -> None:
    unusual = ["model.before_audio=\"a\\n: 'b' #c\"", "train.min_learning_rate=1e-7",
               "model.after_audio='é {instruction}'"]
    for config in (configuration.load(base, unusual), tiny_world.config()):
        copy = tmp_path / "copy.yaml"
        copy.write_text(configuration.to_yaml(config))
        assert configuration.load(copy) == config
        assert configuration.differences(config, configuration.load(copy)) == []


def test_differences_name_the_keys(base: Path) -> None:
    a, b = configuration.load(base), configuration.load(base, ["train.seed=3", "data.train[0].weight=2"])
    assert configuration.differences(a, b) == ["data.train", "train.seed"]
    c = configuration.load(base, ["train.task_weights={asr: 2, caption: 3}"])
    assert configuration.differences(a, c) == ["train.task_weights.asr", "train.task_weights.caption"]
    assert configuration.differences(c, a) == configuration.differences(a, c)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.name)
def test_every_shipped_config_loads(path: Path) -> None:
    config = configuration.load(path)
    assert isinstance(config, Config) and config.data.train and config.data.test


@pytest.mark.parametrize("text", [
    "a0: &a0 [x, x]\n" + "".join(f"a{n + 1}: &a{n + 1} [{', '.join([f'*a{n}'] * 9)}]\n" for n in range(9)),
    "run_dir: &a [*a]\n"])
def test_aliases_of_aliases_are_counted_before_they_are_written_out(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=r"c\.yaml: its aliases .* stand for more than 100,000 values"):
        configuration.load(tmp_path / "c.yaml")


@pytest.mark.parametrize("weight", [[1e-9], None, 0, ".inf"])
def test_task_weights_are_positive_numbers(tmp_path: Path, weight: object) -> None:
    path = write(tmp_path, {**tiny.config_tree(tiny.Tiny(tmp_path)), "train": {"task_weights": {"asr": weight}}})
    with pytest.raises(ConfigError, match=r"train\.task_weights\.asr"):
        configuration.load(path)
