"""What is typed is what is run, and what cannot be run is refused in a sentence, in a second."""

import inspect
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

import melens.analysis
from experiments.options import compose_options
from experiments.options.benchmark import benchmark_request
from experiments.options.command_line import check_command, prepare_command
from experiments.options.help import help_text, lines_of
from experiments.options.masks import mask_in_words, masks_in_use
from experiments.options.reading import CONF, OptionError
from experiments.options.schema import Options, options_of
from experiments.options.training import training_request
from experiments.options.unused import unused_options
from experiments.runner.command import run_command
from experiments.runner.jobs import jobs_of
from experiments.runner.merging import merge_jobs
from experiments.runner.registry import EXPERIMENTS
from melens import MelensError

ROOT = Path(__file__).parents[2]


def typed(*arguments):
    """The options that a command line ends up with."""
    return compose_options(*prepare_command(arguments))


# --- What the user gives wins -----------------------------------------------------------------------------------------


def rates(*overrides):
    masks = benchmark_request(typed("exp=benchmark", *overrides)).masks
    (rate,) = [preset.options.rate for preset in masks if preset.name == "paper"]
    return rate


def test_a_rate_that_is_given_wins_over_a_table_also_where_it_is_the_default():
    assert rates("benchmark.table=5") == [0.01, 0.03, 0.1, 0.2]
    assert rates("benchmark.table=5", "wemask.rate=0.1") == 0.1
    assert rates("benchmark.table=7") == [0.1]
    assert rates("benchmark.table=7", "wemask.rate=[0.1,0.3]") == [0.1, 0.3]
    assert rates() == 0.1


def test_a_preset_keeps_what_is_its_own_and_takes_what_is_given():
    (released,) = benchmark_request(typed("exp=benchmark", "benchmark.masks=[released]")).masks
    assert (released.options.start, released.options.positions) == (7, "every_call")
    given = ("wemask.start=me+1", "wemask.positions=first")
    (released,) = benchmark_request(typed("exp=benchmark", "benchmark.masks=[released]", *given)).masks
    assert (released.options.start, released.options.positions) == ("me+1", "first")
    assert released.options.select == "batch_magnitude"
    mask = training_request(typed("exp=sft", "training.mask=released", *given), "sft").mask
    assert (mask.options.start, mask.options.positions) == ("me+1", "first")


def test_no_mask_stays_none_whatever_is_given():
    off, paper = benchmark_request(typed("exp=benchmark", "benchmark.masks=[off,paper]", "wemask.rate=0.3")).masks
    assert (off.options.rate, paper.options.rate) == (0, 0.3)


def test_layers_that_are_given_hold_for_maths_too():
    def layers(*overrides):
        given = ("exp=benchmark", "benchmark.tasks=[gsm8k]", "benchmark.masks=[paper]")
        request = benchmark_request(typed(*given, *overrides))
        return request.layers_of(request.benchmarks[0], request.masks[0])

    assert layers() == "first"
    assert layers("wemask.layers=all") == "all"


def test_a_scale_counts_as_given_and_the_user_wins_over_it():
    assert typed("scale=smoke").given["wemask.start"] == 1
    smoke = ("exp=benchmark", "scale=smoke")
    (mask,) = benchmark_request(typed(*smoke, "benchmark.masks=[released]")).masks
    assert mask.options.start == 1
    (mask,) = benchmark_request(typed(*smoke, "benchmark.masks=[paper]", "wemask.start=me+1")).masks
    assert mask.options.start == "me+1"


def test_a_limit_of_null_that_is_typed_is_no_limit():
    assert training_request(typed("exp=dpo"), "dpo").plan.limit == 3000
    assert training_request(typed("exp=dpo", "training.limit=null"), "dpo").plan.limit is None
    assert training_request(typed("exp=dpo", "training.limit=5"), "dpo").plan.limit == 5
    assert training_request(typed("exp=dpo", "training.lr=null"), "dpo").plan.recipe.lr == 5e-6  # a rate needs a value


@pytest.mark.parametrize("option", ["wemask.select=random", "wemask=random"])
def test_masks_by_name_and_another_choice_of_dims_are_refused_together(option):
    with pytest.raises(OptionError, match=f"The masks are those of benchmark.masks .*, so {option.split('=')[0]}"):
        benchmark_request(typed("exp=benchmark", option))


def test_the_masks_of_a_run_are_told_as_they_are_in_the_end():
    asked = masks_in_use(typed("exp=benchmark", "benchmark.masks=[off,released]", "wemask.start=me+1"))
    assert {name: mask_in_words(mask) for name, mask in asked.items()} == {
        "off": "no mask",
        "released": "rate=0.1 select=batch_magnitude site=attn_in start=me+1 layers=all positions=every_call "
        "strength=1.0 seed=0",
    }
    assert list(masks_in_use(typed("exp=wemask", "wemask=random"))) == ["random"]
    assert masks_in_use(typed("exp=sft", "training.mask=paper"))["paper"].start == "me+1"
    assert masks_in_use(typed("exp=tables", "table=7"))["paper"].rate == [0.1]
    assert masks_in_use(typed("exp=sinks")) == {}
    several = masks_in_use(
        typed("exp=all", "exp.experiments=[wemask,benchmark]", "benchmark.table=5", "benchmark.masks=[paper]")
    )
    assert {name: mask.rate for name, mask in several.items()} == {
        "of wemask: paper": 0.1,
        "of benchmark: paper": [0.01, 0.03, 0.1, 0.2],
    }


# --- A text is a text -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "my prompts [v=2].txt", "a=b.txt", "a(1)%{x}.txt", "it's.txt", "1e5", "0x12", "12", "true", "a, b", "ü.txt",
        "C:\\prompts\\a.txt", 'say "hi"', "[INST] a", " blank", '"Hi," he said. "Bye"', "range(5)", "choice(a,b)",
    ],
)  # fmt: skip
def test_a_text_is_taken_as_it_was_typed(text):
    assert typed(f"model.revision={text}").model.revision == text
    assert typed("exp=generate", f"generate.prompt={text}").generate.prompt == text


def test_lists_quotes_null_and_functions_of_hydra_are_what_they_were():
    assert typed("generate.prompt=['a, b',c]").generate.prompt == ["a, b", "c"]
    assert typed("generate.prompt='12'").generate.prompt == "12"
    assert typed("data.text=null").data.text is None
    assert prepare_command(["-m", "model.revision=step1,100"]) == ["-m", "++model.revision='step1','100'"]
    assert prepare_command(["-m", "model.name=choice(a,b)"]) == ["-m", "++model.name=choice(a,b)"]


def test_a_prompt_is_no_place_for_interpolations():
    assert typed("exp=generate", "generate.prompt=Costs ${price} dollars").generate.prompt == "Costs ${price} dollars"
    assert typed("scale=null").given == {}


@pytest.mark.parametrize("name", ["my prompts [v=2].txt", "a,b (1).txt", "[x].md"])
def test_a_file_of_any_name_is_found_also_in_a_sweep(tmp_path, name):
    path = tmp_path / name
    path.write_text("One.\nTwo.\n")
    assert typed(f"prompts.file={path}").prompts.file == str(path)
    prepared = prepare_command(["-m", f"prompts.file={path}", "seed=0,1"])
    assert compose_options(prepared[1]).prompts.file == str(path)
    assert prepare_command([f"hydra.run.dir={path}"]) == [f"hydra.run.dir='{path}'"]


# --- What is not known is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["exp=sinks", "exp.rank_token=12"], "There is no option exp.rank_token; did you mean exp.rank_tokens"),
        (["exp=sinks", "+exp.rank_token=12"], "There is no option exp.rank_token; did you mean exp.rank_tokens"),
        (["exp=sinks", "++exp.rank_token=12"], "There is no option exp.rank_token; did you mean exp.rank_tokens"),
        (["exp.loq_scale=true"], "There is no option exp.loq_scale; did you mean exp.log_scale?"),
        (["exp=ffn", "exp.top_dims=3"], "There is no option exp.top_dims; allowed are exp.keep."),
        (["exp=all", "exp.top_dims=3"], "did you mean exp.emergence.top_dims?"),
        (["exp=all", "exp.sinks.rank_token=3"], "did you mean exp.sinks.rank_tokens"),
        (["rate=0.1"], "There is no option rate; did you mean wemask.rate?"),
        (["models=qwen3-4b"], "There is no option models; did you mean model?"),
        (["wemask.frequency=3"], "allowed are wemask.rate, wemask.select, wemask.site"),
        (["benchmark.needle.length=[64]"], "did you mean benchmark.needle.lengths?"),
        (["model.model_type=qwen3"], "There is no option model.model_type"),
        (["exp=nope"], "There is no exp=nope; allowed are ablation, all, benchmark"),
        (["model=qwen3-4"], "There is no model=qwen3-4; did you mean qwen3-4b"),
        (["model=/tmp/mine"], "tiny. For a hub id or a folder: model=hub model.name=..."),
        (["exp=ffn,sinks"], "exp=ffn,sinks: several values need -m, a run for each, or in one run exp=all"),
        (["wemask.rate=0.1,0.2"], "wemask.rate=0.1,0.2: several values need -m, a run for each."),
        (["-m", "exp=emergence,sink"], "There is no exp=sink; did you mean sinks"),
        (["-m", "wemask.rate=0.1,7"], "wemask.rate is 7; it must be a number from 0 (no mask) to 1, or a list of"),
        (["model.name=Qwen/Qwen3-8B"], "model.name is for model=hub: give model=hub model.name=Qwen/Qwen3-8B."),
        (["model=tiny", "model.name=qwen3-4b"], "model.name is for model=hub"),
        (["model=hub", "model.name=smollm2-135m"], "smollm2-135m has a file in conf/model, with options of its own"),
        (["model.source=hub"], "model.source is set by the choice of a file: change it with model=..."),
        (["exp.name=sinks"], "exp.name is set by the choice of a file: change it with exp=..."),
        (["given.x=3"], "There is no option given"),
        (["exp=[ffn,predict]"], "exp is ['ffn', 'predict']; it takes one name, as exp=ablation; several in one run"),
        (["wemask={rate:0.3}"], "wemask is {'rate': 0.3}; it takes one name, as wemask=grid."),
        (["exp=null"], "exp is null; it takes one name"),
        (["scale=5"], "There is no scale=5; allowed are paper, small, smoke."),
        (["-m", "scale=null,smoke"], "scale is null; it takes one name"),
        (["exp=tables", "table=1", "benchmark.masks=[random]"], "A table has its own trainings, masks and gates"),
        (["exp=tables", "table=1", "wemask=random"], "A table has its own trainings, masks and gates"),
        (["exp=emergence", "exp.n_prompts=2"], "There is no option exp.n_prompts; allowed are exp.keep, exp.log_scale"),
        (["foo"], "'foo' is no option; options are written as name=value"),
        (["~exp"], "an option cannot be removed"),
        (["max_batch_tokens=lots"], "max_batch_tokens is 'lots'; it must be a whole number of at least 1."),
        (["max_batch_tokens=0"], "max_batch_tokens is 0; it must be a whole number of at least 1."),
        (["seed=null"], "seed is null; it must be a whole number from 0 to 4294967295."),
        (["seed=4294967296"], "seed is 4294967296; it must be a whole number from 0 to 4294967295."),
        (["generate.seeds={a:1}"], "generate.seeds={a:1}: the default is of another form"),
        (["training.trainer=[]"], "training.trainer=[]: the default is of another form"),
        (["figures=eps"], "figures is 'eps'; it must be svg, pdf, png or null."),
        (["model=hub"], "model=hub needs model.name: a hub id (org/model) or a local transformers folder."),
        (["model=hub", "model.name=qwen3-4bb"], "There is no model 'qwen3-4bb'; the nearest known are qwen3-4b"),
        (["model=random", "model.quantize=4bit"], "A random model is made on one device and not quantised"),
        (["model.quantize=2bit"], "model.quantize is '2bit'; it must be 8bit, 4bit or null."),
        (["model.dtype=float3"], "model.dtype is 'float3'; it must be auto, float32, bfloat16 or float16."),
        (["model.device=gpu"], "model.device is 'gpu'; it must be auto, cpu, mps, cuda or cuda:1."),
        (["prompts.bos=maybe"], "prompts.bos is 'maybe'; it must be auto, true or false."),
        (["prompts.file=/nonexistent.txt"], "There is no prompt file /nonexistent.txt."),
        (["wemask.rate=-1"], "wemask.rate is -1; it must be a number from 0 (no mask) to 1, or a list of them."),
        (["wemask.start=you"], "wemask.start is 'you'; it must be a block, me, me+1, me-2 and the like"),
        (["criterion.min_abs=lots"], "criterion.min_abs is 'lots'; it must be a number of at least 0."),
        (["exp.top_dims=0"], "exp.top_dims is 0; it must be a whole number of at least 1."),
        (["exp=all", "exp.sinks.rank_tokens=none"], "exp.sinks.rank_tokens is 'none'; it must be a whole number"),
        (["exp=rmsnorm", "exp.top_share=1.5"], "a share of the width, over 0 and at most 1"),
        (["exp=rmsnorm", "exp.other_shares=0.1"], "must be a list of shares"),
        (["exp=stability", "exp.length_bins=[5,3]"], "must be a list of rising whole numbers"),
        (["exp=all", "exp.experiments=[sink]"], "exp.experiments is ['sink']; it must be a list of at least one of"),
        (["exp=all", "exp.experiments=[]"], "it must be a list of at least one of"),
        (["exp=wemask", "exp.patterns=few"], "exp.patterns is 'few'; it must be drawn, all or none."),
        (["data.n_tokens=2"], "data.n_tokens is 2; it must be a whole number of at least 3."),
        (["exp=benchmark", "benchmark.table=3"], "benchmark.table is 3; it must be 1, 2, 5, 6, 7 or null."),
        (["exp=benchmark", "benchmark.tasks=[piqua]"], "There is no benchmark 'piqua'; the nearest are piqa"),
        (["exp=tables"], "table is null; exp=tables needs one of 1, 2, 3, 4, 6, 7"),
        (["exp=sft", "training.batch_size=7"], "training.batch_size"),
        (["exp=sft", "training.dataset=/nowhere.jsonl"], "There is no file /nowhere.jsonl."),
        (["exp=sft", "training.dataset=gsm9k"], "There is no dataset 'gsm9k'; the nearest known are gsm8k"),
        (["exp=dpo", "training.dataset=gsm8k"], "training.dataset=gsm8k has no rows for dpo."),
        (["exp=sft", "model.max_memory={cpu:1GB}"], "spreads over devices cannot be trained"),
        (["exp=generate", "wemask.rate=0"], "wemask.rate is 0, which masks nothing, but exp=generate takes a mask."),
        (["exp=generate", "wemask.rate=[0.1,0.2]"], "wemask.rate is [0.1, 0.2], but exp=generate takes one mask."),
        (["exp=generate", "wemask.start=all_blocks"], "but exp=generate takes one mask."),
        (["exp=wemask", "wemask=saved"], "There is no mask file smollm2-135m/wemask.json."),
        (["exp=wemask", "wemask.select=[weight,saved]"], "There is no mask file smollm2-135m/wemask.json."),
        (["benchmark.judge=smollm3"], "benchmark.judge: There is no model 'smollm3'; the nearest known are smollm"),
        (["benchmark.judge=./nowhere"], "benchmark.judge: There is no folder nowhere."),
        (["data.text=my/own/text"], "data.text is 'my/own/text'; it must be an existing file or a dataset of the hub"),
        (["model.max_memory={gpu:1GB}"], "model.max_memory is {'gpu': '1GB'}; it must be like {0: 40GB, cpu: 90GB}"),
        (["model.max_memory={cpu:much}"], "model.max_memory is {'cpu': 'much'}; it must be like {0: 40GB, cpu: 90GB}"),
        (["-m", "hydra/launcher=joblib"], "hydra/launcher=joblib needs hydra_joblib_launcher, which is not installed"),
        (["training=sft"], "training is a group of options, as training.<name>=..."),
        (["seed=[0"], "The value of seed=[0 cannot be read"),
    ],
)  # fmt: skip
def test_a_wrong_option_gets_a_sentence_without_a_plus(arguments, message):
    with pytest.raises(OptionError, match=re.escape(message)) as refused:
        check_command(prepare_command(arguments))
    assert " +" not in str(refused.value)


def test_all_wrong_options_are_told_at_once():
    with pytest.raises(OptionError) as refused:
        typed("exp.top_dims=0", "exp.nope=1", "seed=x")
    assert len(str(refused.value).splitlines()) == 3


def test_options_that_a_library_names_need_no_plus():
    assert typed("model=random", "model.config.head_dim=8").model.config["head_dim"] == 8
    assert typed("training.trainer.max_grad_norm=1.0").training.trainer == {"max_grad_norm": 1.0}
    assert typed("training.columns.prompt=question").training.columns == {"prompt": "question"}


@pytest.mark.parametrize("hydras", ["hydra.foo=3", "hydra/foo=3"])
def test_hydras_own_options_are_refused_without_a_plus_too(capsys, monkeypatch, tmp_path, hydras):
    monkeypatch.setattr(sys, "argv", ["run.py", hydras, f"hydra.run.dir={tmp_path}/run"])
    assert run_command() == 2
    told = capsys.readouterr().err
    assert "hydra" in told
    assert "+" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "mistake", [["wemask.rate=7"], ["model=hub", "model.name=/no/model"], ["prompts.tasks=[cooking]"]]
)
def test_a_mistake_is_told_before_anything_slow_is_imported_and_leaves_no_folder(tmp_path, mistake):
    folder = tmp_path / "run"
    wrong = ("experiments/run.py", *mistake, f"hydra.run.dir={folder}")
    done = subprocess.run([sys.executable, "-X", "importtime", *wrong], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    imported = re.findall(r"\| +(\w+)", done.stderr)
    assert "pydantic" in imported
    assert not {"torch", "transformers", "transformer_lens", "pandas", "plotly", "scipy"} & set(imported)
    assert not folder.exists()


def test_a_device_that_is_not_there_is_told_before_a_run_begins_but_not_of_the_jobs_of_a_sweep(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(OptionError, match=r"model\.device is 'cuda:1', but this machine has only"):
        check_command(prepare_command(["model.device=cuda:1"]))
    check_command(prepare_command(["-m", "model.device=cuda:1"]))
    check_command(prepare_command(["model.device=cpu"]))


def test_importing_melens_imports_nothing_slow():
    code = "import sys, melens; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "melens" in done.stdout.split()
    assert not {"torch", "transformers", "pandas", "plotly"} & set(done.stdout.split())


@pytest.mark.parametrize(
    ("package", "extra", "arguments"),
    [
        ("kaleido", "figures", ["figures=pdf"]),
        ("lm_eval", "benchmark", ["exp=benchmark", "benchmark.tasks=[piqa]"]),
        ("trl", "train", ["exp=sft"]),
    ],
)
def test_a_package_that_is_missing_is_told_with_the_command_that_installs_it(monkeypatch, package, extra, arguments):
    monkeypatch.setattr("melens.environment.extras.find_spec", lambda name: None if name == package else True)
    message = f"needs {package}, which is not installed: pip install -c .ci/constraints.txt -e '.[{extra}]'"
    with pytest.raises(MelensError, match=re.escape(message)):
        check_command(prepare_command(arguments))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["exp=sinks", "wemask.rate=0.3"], ["wemask.rate is given, but exp=sinks does not use it."]),
        (["exp=all", "exp.experiments=[sinks,wemask]", "wemask.rate=0.3"], []),
        (["exp=sft", "wemask.rate=0.3"], ["wemask.rate is given but changes nothing: this run has no mask."]),
        (["exp=sft", "wemask.rate=0.3", "training.mask=paper"], []),
        (["exp=wemask", "wemask.seed=3"], ["wemask.seed is given but changes nothing: it is of random dims"]),
        (["exp=wemask", "wemask.seed=3", "wemask.select=[weight,random]"], []),
        (["exp=wemask", "data.split=train"], ["data.split is given but changes nothing: it is of a dataset"]),
        (["exp=wemask", "data.split=train", "data.text=org/name"], []),
        (["exp=wemask", "data.column=body"], ["data.column is given but changes nothing"]),
        (["exp=generate", "generate.top_p=0.5"], ["generate.top_p is given but changes nothing: generate.sample is"]),
        (["exp=generate", "generate.top_p=0.5", "generate.sample=true"], []),
        (["exp=sft", "training.rollouts=8", "training.lora.rank=2"], ["training.rollouts", "training.lora.rank"]),
        (["exp=sft", "training.dataset=sums", "training.split=test"], ["training.split"]),
        (["exp=sft", "training.split=test"], []),
        (["exp=benchmark", "benchmark.temperature=0.5"], ["benchmark.temperature is given but changes nothing"]),
        (["exp=benchmark", "benchmark.table=5", "benchmark.temperature=0.5"], []),
        (["exp=benchmark", "benchmark.tasks=[copy]", "benchmark.needle.lengths=[64]"], ["benchmark.needle.lengths"]),
        (["exp=benchmark", "scale=smoke"], []),
        (["exp=sft", "wemask=random"], ["wemask is given but changes nothing: this run has no mask."]),
        (["exp=sinks", "wemask=grid"], ["wemask is given, but exp=sinks does not use it."]),
        (["exp=generate", "wemask=off", "wemask.start=3"], []),
        (["exp=benchmark", "benchmark.masks=[off]", "wemask.rate=0.3"], ["wemask.rate is given but changes nothing"]),
        (["exp=benchmark", "benchmark.tasks=[copy]", "benchmark.chat=true"], ["benchmark.chat is given"]),
        (["exp=all", "exp.wemask.patterns=all"], ["exp.wemask.patterns is given, but exp.experiments does not name"]),
        (["exp=all", "exp.rmsnorm.top_share=0.5"], []),
        (["exp=sft", "training.steps=5", "training.epochs=3"], ["training.epochs is given but changes nothing"]),
        (["exp=tables", "table=1", "training.rollouts=4"], ["training.rollouts is given but changes nothing"]),
        (["exp=tables", "table=4", "training.rollouts=4"], []),
        (["exp=tables", "table=1", "training.batch_size=8", "benchmark.judge=smollm2-135m"], []),
    ],
)
def test_what_is_typed_and_changes_nothing_is_told(arguments, told):
    prepared = prepare_command(arguments)
    found = list(unused_options(compose_options(*prepared)))
    assert len(found) == len(told)
    assert all(sentence.startswith(begin) for sentence, begin in zip(found, told, strict=True))


# --- Help -------------------------------------------------------------------------------------------------------------


def test_help_shows_every_option_with_a_comment():
    text = help_text()
    for key, _ in options_of():
        if key.startswith("exp.") and key.count(".") == 2:  # of exp=all, whose parts have theirs
            continue
        if key.endswith((".name", ".source")) or key.startswith("model.config"):
            continue
        assert re.search(rf"^ +{re.escape(key)}=", text, re.MULTILINE), key
    lines = [line for path in sorted(CONF.glob("exp/*.yaml")) for line in lines_of(path)[1]]
    lines += [
        line for path in ("config", "prompts/default", "wemask/paper") for line in lines_of(CONF / f"{path}.yaml")[1]
    ]
    own = ("defaults", "hydra", "name")
    uncommented = [line.key for line in lines if not line.comment and line.key.split(".")[0] not in own]
    assert uncommented == []


def test_every_file_of_conf_says_what_it_is():
    for path in sorted(CONF.glob("*/*.yaml")):
        assert lines_of(path)[0], path


def test_the_schema_has_the_options_of_conf_and_no_others():
    for name in sorted(path.stem for path in CONF.glob("exp/*.yaml")):
        assert compose_options(f"exp={name}").exp.name == name
    for group in ("model", "prompts", "wemask", "dynamics", "scale"):
        for path in sorted(CONF.glob(f"{group}/*.yaml")):
            if path.stem != "hub":
                compose_options(f"{group}={path.stem}")
    declared = {key.split(".")[0] for key, _ in options_of()}
    assert declared == set(yaml.safe_load((CONF / "config.yaml").read_text())) - {"defaults", "hydra"} | {
        "exp", "prompts", "wemask", "dynamics",
    }  # fmt: skip
    assert set(Options.model_fields) == declared | {"given", "typed"}


# --- Analyses ---------------------------------------------------------------------------------------------------------

FUNCTIONS = {"rmsnorm": "normalization", "predict": "prediction", "weights": "carriers", "wemask": "mask_grid"}
"""Of `melens.analysis`, where its name is not that of the experiment."""


@pytest.mark.parametrize("name", sorted({name for name, own in EXPERIMENTS.items() if own.in_all} - {"benchmark"}))
def test_an_analysis_has_the_defaults_of_its_file_in_conf(name):
    in_conf = compose_options(f"exp={name}").exp.own
    arguments = inspect.signature(getattr(melens.analysis, FUNCTIONS.get(name, name))).parameters
    defaults = {option: arguments[option].default for option in in_conf}
    assert in_conf == {key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()}


# --- Sweeps -----------------------------------------------------------------------------------------------------------


def results_of(tmp_path, *commands):
    return {
        tmp_path / str(number): {
            "experiment": "rmsnorm",
            "status": "ok",
            "model": {"name": "smollm2-135m"},
            "metrics": {"me_layer": 11},
            "config": typed(*command).plain(),
        }
        for number, command in enumerate(commands)
    }


def test_a_swept_scale_tells_the_jobs_apart_by_its_name_alone(tmp_path):
    jobs = jobs_of(results_of(tmp_path, ["scale=smoke", "model=tiny"], ["scale=small", "model=tiny"]))
    assert [job.name for job in jobs] == ["scale=smoke", "scale=small"]


def test_a_job_that_lacks_a_swept_option_has_its_value(tmp_path):
    jobs = jobs_of(results_of(tmp_path, ["exp=wemask", "wemask.rate=0.3"], ["exp=wemask"]))
    assert [job.swept for job in jobs] == [{"wemask.rate": 0.3}, {"wemask.rate": 0.1}]
    assert jobs_of(results_of(tmp_path, ["data.split=it's"], ["data.split=b"]))[0].name == "data.split=it's"


def test_every_swept_option_tells_the_jobs_apart(tmp_path):
    sweep = [
        (f"exp.top_share={share}", f"model.dtype={dtype}")
        for share in (0.01, 0.05)
        for dtype in ("float32", "bfloat16")
    ]
    jobs = jobs_of(results_of(tmp_path, *[("exp=rmsnorm", *options) for options in sweep]))
    assert [job.swept for job in jobs] == [
        {"exp.top_share": share, "model.dtype": dtype} for share in (0.01, 0.05) for dtype in ("float32", "bfloat16")
    ]
    assert jobs[0].name == "exp.top_share=0.01, model.dtype=float32"
    assert len({job.name for job in jobs}) == 4


def test_models_and_revisions_name_the_jobs(tmp_path):
    jobs = jobs_of(results_of(tmp_path, ["model=qwen3-4b"], ["model=qwen3-8b"]))
    assert [job.name for job in jobs] == ["qwen3-4b", "qwen3-8b"]
    jobs = jobs_of(results_of(tmp_path, *[["model=qwen3-4b", f"model.revision={step}"] for step in ("step1", "2")]))
    assert [job.name for job in jobs] == ["model.revision=step1", "model.revision=2"]
    jobs = jobs_of(results_of(tmp_path, ["seed=0"], ["seed=0"]))
    assert [job.name for job in jobs] == ["job 0", "job 1"]


def test_the_merged_table_has_a_column_for_every_swept_option(tmp_path):
    import json

    results = results_of(
        tmp_path,
        *[
            ("exp=rmsnorm", f"exp.other_shares={shares}", f"seed={seed}")
            for shares in ("[0.1]", "[0.2]")
            for seed in (0, 1)
        ],
    )
    for folder, result in results.items():
        folder.mkdir()
        (folder / "result.json").write_text(json.dumps(result))
    merge_jobs(tmp_path)
    sweep = pd.read_parquet(tmp_path / "sweep.parquet")
    assert sweep["exp.other_shares"].tolist() == ["[0.1]", "[0.1]", "[0.2]", "[0.2]"]
    assert sweep["seed"].tolist() == [0, 1, 0, 1]
    assert pd.read_parquet(tmp_path / "claims.parquet")["model"].nunique() >= 4


def test_a_sweep_ends_with_the_jobs_that_failed_and_why(tmp_path, capsys):
    import json

    results = results_of(tmp_path, *[["exp=rmsnorm", f"seed={seed}"] for seed in range(3)])
    for number, (folder, result) in enumerate(results.items()):
        folder.mkdir()
        failure = {"status": "failed", "error": "It has no [norm]."} if number == 1 else {}
        (folder / "result.json").write_text(json.dumps(result | failure))
    merge_jobs(tmp_path)
    *_, said, why, page, folder = capsys.readouterr().out.splitlines()
    assert (said, why) == ("1 of 3 jobs failed:", "  seed=1: It has no [norm].")
    assert (page.split(":")[0], folder.split(":")[0]) == ("Page", "Folder")
