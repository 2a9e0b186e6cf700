"""What every public name does with plausible wrong arguments: it works, or raises one sentence."""

import re

import numpy as np
import pandas as pd
import planted
import pytest
import torch

import melens
from melens import MelensError, Norms, WeMask
from melens.analysis.sink_mass import find_sink_onset
from melens.data.prompts import byte_tokenizer
from melens.tracing.interventions import ablation

IDS = [[1, 2, 3], [4, 5]]
NORMS = Norms("hook_resid_post")
AB, BA = byte_tokenizer()(["ab", "ba"])["input_ids"]


@pytest.fixture(scope="module")
def model():
    bridge = planted.bridge(planted.plain_model("llama"))
    bridge.tokenizer = byte_tokenizer()  # of which some ids are beyond this model's vocabulary
    return bridge


@pytest.fixture(scope="module")
def trace(model):
    return melens.trace(model, IDS)


@pytest.fixture(scope="module")
def runs(model):
    return melens.MassiveTokenRuns(model, IDS, [0, 1])


# --- What works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "same_as"),
    [
        (IDS, IDS),
        (([1, 2, 3], (4, 5)), IDS),
        ([np.array([1, 2, 3]), np.array([4, 5], dtype=np.uint16)], IDS),
        ([torch.tensor([1, 2, 3]), torch.tensor([4, 5], dtype=torch.int32)], IDS),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (torch.tensor([1, 2, 3]), [[1, 2, 3]]),
        ([1, 2, 3], [[1, 2, 3]]),
        ("ab", [AB]),
        (["ab", "ba"], [AB, BA]),
        (melens.Prompt("ab"), [AB]),
        (["ab", melens.Prompt("ba")], [AB, BA]),
        (pd.Series(["ab", "ba"]), [AB, BA]),
        (np.array(["ab", "ba"]), [AB, BA]),
        ((text for text in ("ab", "ba")), [AB, BA]),
    ],
)
def test_a_trace_takes_prompts_in_whatever_they_come(model, prompts, same_as):
    found = melens.trace(model, prompts, NORMS)
    expected = melens.trace(model, [torch.tensor(ids) for ids in same_as], [NORMS])
    assert found.prompts["n_tokens"].tolist() == [len(ids) for ids in same_as]
    pd.testing.assert_frame_equal(found["norm"], expected["norm"])


@pytest.mark.parametrize("bos", [True, False, "true", "false"])
def test_whether_bos_is_prepended_may_be_told_by_a_truth_value(model, bos):
    if str(bos).lower() == "true":
        with pytest.raises(MelensError, match="no BOS token"):
            melens.trace(model, "ab", bos=bos)
    else:
        assert melens.trace(model, "ab", [NORMS], bos=bos).prompts["n_tokens"].tolist() == [2]


def test_one_may_be_given_where_several_are_taken(model, trace):
    assert Norms("hook_resid_post").sites == ("hook_resid_post",)
    assert list(Norms(layers=2).layers) == [2]
    assert list(Norms(layers=np.array([0, 2])).layers) == [0, 2]
    assert melens.TokenVectors(-1).positions == (-1,)
    assert melens.SinkMass(np.int64(2)).keys == (2,)
    assert set(melens.trace(model, [1, 2, 3], melens.AttentionMaps(1).named("maps")).tensors) == {"maps"}
    assert set(melens.verify(model, "hook_resid_post").errors["site"]) == {"hook_resid_post"}
    assert melens.read_normalization(model, np.int64(1), "ln2").kind == "RMSNorm"
    assert melens.MassiveTokenRuns(model, [1, 2, 3], 0).intact.shape == (1, 4)
    of_metrics = {
        "experiment": "emergence",
        "model": {"name": "tiny"},
        "metrics": melens.find_me_layer(trace).metrics(),
    }
    assert melens.judge(of_metrics).equals(melens.judge([of_metrics]))


def test_arguments_too_few_or_too_many_are_pythons_own_error(model):
    with pytest.raises(TypeError, match="'prompts'"):
        melens.trace(model)
    with pytest.raises(TypeError, match="'promts'"):
        melens.trace(model, IDS, promts=3)


# --- What does not ----------------------------------------------------------------------------------------------------

A_BRIDGE = "must be a TransformerBridge"
PROMPTS = {
    "no list": (5, "prompts is 5; it must be texts, or token ids of each prompt."),
    "nothing": (None, "prompts is None"),
    "an empty list": ([], "at least one prompt"),
    "what a tokenizer returns": ({"input_ids": IDS}, "prompts is {'input_ids'"),
    "bytes": (b"ab", "prompts is b'ab'"),
    "floats": ([[1.0, 2.0]], "Prompt number 0 is [1.0, 2.0]; it must be a list of token ids: whole numbers."),
    "a float tensor": (torch.rand(2, 3), "Prompt number 0 is a Tensor of torch.float32 and shape [3]"),
    "truth values": ([[True, False]], "whole numbers"),
    "texts in lists": ([["a", "b"]], "Prompt number 0 is ['a', 'b']"),
    "a text among ids": ([[1, 2], "ab"], "Prompt number 1 is 'ab'"),
    "ids among texts": (["ab", [1, 2]], "Prompt number 1 is [1, 2]; it must be a text"),
    "three dimensions": (np.zeros((2, 2, 2), dtype=int), "shape [2, 2]"),
    "none": (torch.tensor(5), "shape []"),
    "an empty prompt": ([[]], "Prompt number 0 has 0 token(s)"),
    "an id too large": ([[1, 200]], "Prompt number 0 has token ids outside the vocabulary of 200."),
    "a negative id": ([[1, 2], [1, -1]], "Prompt number 1 has token ids outside the vocabulary"),
    "more than 64 bits": ([[1, 2**70]], "whole numbers"),
}


@pytest.mark.parametrize(("prompts", "sentence"), PROMPTS.values(), ids=PROMPTS)
def test_prompts_that_are_none_are_told(model, prompts, sentence):
    with pytest.raises(MelensError, match=re.escape(sentence)):
        melens.trace(model, prompts, [NORMS])


class _Kurtosis(melens.Probe):
    name = "kurtosis"
    sites = ("hook_resid_post",)
    index = ("pos",)

    def reduce(self, activation, batch):
        return {"kurtosis": activation.float().pow(4).mean(-1)}


def _like_kurtosis(**fields):
    """An instance of a probe's class that somebody wrote otherwise."""
    return type("Written", (_Kurtosis,), fields)()


def _returns(reduced, **fields):
    return _like_kurtosis(reduce_at=lambda self, site, layer, activation, batch: reduced, **fields)


PROBES = {
    "a class": ([_Kurtosis], "probes[0] is the class _Kurtosis; it must be a probe: _Kurtosis() makes one."),
    "a class alone": (_Kurtosis, "_Kurtosis() makes one"),
    "another object": ([_Kurtosis(), torch.nn.Linear(1, 1)], "probes[1] is of type Linear; it must be a probe"),
    "a name": (["norm"], "probes[0] is 'norm'"),
    "a number": (5, "probes[0] is 5"),
    "an empty list": ([], "at least one probe"),
    "one site as a text": ([_like_kurtosis(sites="hook_resid_post")], "whose sites is a tuple, not 'hook_resid_post'"),
    "no site": ([_like_kurtosis(sites=())], "at least one site"),
    "no name": ([_like_kurtosis(name=None)], "whose name is a text, not None"),
    "an index as a text": ([_like_kurtosis(index="pos")], "whose index is a tuple, not 'pos'"),
    "another kind": ([_like_kurtosis(kind="array")], "whose kind is table or tensor, not 'array'"),
    "an unknown site": ([Norms("hook_resid")], "measures at 'hook_resid', which no block"),
    "a block beyond": ([Norms(layers=9)], "the model has 0 to 3"),
    "a tensor": ([_returns(torch.ones(2))], "returns a Tensor of torch.float32"),
    "numbers": ([_returns({"x": 1.0})], "must return a dict of tensors"),
    "nothing returned": ([_returns(None)], "returns None"),
    "two tensors": (
        [_returns({"x": torch.ones(2), "y": torch.ones(2)}, kind="tensor", index=())],
        "returns x, y; it must return one tensor",
    ),
    "gains of another model": ([melens.GainAlignment({("ln2", 0): torch.ones(3)})], "has 3 dims, its output 64"),
}


@pytest.mark.parametrize(("probes", "sentence"), PROBES.values(), ids=PROBES)
def test_probes_that_are_none_are_told(model, probes, sentence):
    with pytest.raises(MelensError, match=re.escape(sentence)):
        melens.trace(model, IDS, probes)


MODELS = {
    "trace": lambda model: melens.trace(model, IDS),
    "default_probes": melens.default_probes,
    "score_blocks": melens.score_blocks,
    "verify": melens.verify,
    "read_normalization": lambda model: melens.read_normalization(model, 0, "ln2"),
    "ablated": lambda model: melens.ablated(model, (0, "ffn")),
    "MassiveTokenRuns": lambda model: melens.MassiveTokenRuns(model, IDS, [0, 0]),
}


@pytest.mark.parametrize("call", MODELS.values(), ids=MODELS)
def test_what_is_no_bridge_is_told_with_the_way_to_one(call, model):
    with pytest.raises(MelensError, match=f"model is 'smollm2-135m'; it {A_BRIDGE}: melens.load_model"):
        call("smollm2-135m")
    with pytest.raises(MelensError, match=f"LlamaForCausalLM; it {A_BRIDGE}: TransformerBridge.boot_transformers"):
        call(planted.plain_model("llama"))
    with pytest.raises(MelensError, match=f"of type Tokenizer; it {A_BRIDGE}"):
        call(model.tokenizer.backend_tokenizer)


PLANTED = {"experiment": "emergence", "model": {"name": "m"}, "metrics": {}}
HOOK = ("blocks.1.hook_mlp_out", lambda activation, hook: None)
CALLS = {
    "trace max_batch_tokens 0": (lambda m, t, r: melens.trace(m, IDS, max_batch_tokens=0), "at least 1"),
    "trace max_batch_tokens 1.5": (lambda m, t, r: melens.trace(m, IDS, max_batch_tokens=1.5), "is 1.5; it must be"),
    "trace bos": (lambda m, t, r: melens.trace(m, "ab", bos="yes"), "it must be auto, true or false"),
    "trace progress": (lambda m, t, r: melens.trace(m, IDS, progress=3), "should be callable"),
    "default_probes": (lambda m, t, r: melens.default_probes(m, min_abs="100"), "a number of at least 0"),
    "Trace[class]": (lambda m, t, r: t[Norms], "no table the class Norms; it has abs_median, largest"),
    "Trace[tensor]": (lambda m, t, r: t["token_vectors"], "trace.tensors['token_vectors']"),
    "Norms sites": (lambda m, t, r: Norms(3), "sites is 3; it must be hook names"),
    "Norms no sites": (lambda m, t, r: Norms([]), "sites is []"),
    "Norms layers": (lambda m, t, r: Norms(layers=[-1]), "layers is [-1]; it must be blocks, counted from 0"),
    "Norms layers 1.5": (lambda m, t, r: Norms(layers=[1.5]), "layers is [1.5]"),
    "AttentionMaps": (lambda m, t, r: melens.AttentionMaps("all"), "layers is 'all'"),
    "SinkMass text": (lambda m, t, r: melens.SinkMass("0"), "SinkMass: key is '0'; it must be a position"),
    "SinkMass negative": (lambda m, t, r: melens.SinkMass(-1), "at least 0"),
    "SinkByQuery float": (lambda m, t, r: melens.SinkByQuery(1.0), "key is 1.0"),
    "TokenVectors": (lambda m, t, r: melens.TokenVectors("first"), "positions is 'first'"),
    "LargestActivations": (lambda m, t, r: melens.LargestActivations(0), "n_tokens is 0"),
    "Concentration": (lambda m, t, r: melens.Concentration(None), "sites is None"),
    "GainAlignment empty": (lambda m, t, r: melens.GainAlignment({}), "a dict of gains by (site, layer)"),
    "GainAlignment keys": (lambda m, t, r: melens.GainAlignment({"ln2": torch.ones(64)}), "a dict of gains"),
    "GainAlignment shares": (lambda m, t, r: melens.GainAlignment({("ln2", 0): torch.ones(64)}, 5), "shares is 5"),
    "named": (lambda m, t, r: NORMS.named(5), "Probe.named: name is 5; it must be a text"),
    "find_me_layer model": (lambda m, t, r: melens.find_me_layer(m), "must be a Trace: melens.trace(model, prompts)"),
    "find_me_layer criterion": (lambda m, t, r: melens.find_me_layer(t, 100), "must be a Criterion"),
    "massive_activations": (lambda m, t, r: melens.massive_activations("x"), "must be a Trace"),
    "find_me_layer other probes": (
        lambda m, t, r: melens.find_me_layer(melens.trace(m, IDS, [NORMS])),
        "has no table 'largest'; it has norm.",
    ),
    "find_sink_onset": (lambda m, t, r: find_sink_onset(m), "must be a Trace"),
    "find_sink_onset threshold": (lambda m, t, r: find_sink_onset(t, threshold=30), "a number from 0 to 1"),
    "ablation": (lambda m, t, r: ablation("smollm2-135m", 1, "ffn"), "must be a TransformerBridge"),
    "ablation part": (lambda m, t, r: ablation(m, 1, "mlp"), "part is 'mlp'; it must be ffn, attention"),
    "Criterion share": (lambda m, t, r: melens.Criterion(min_prompts=5), "is 5; it must be a number from 0 to 1"),
    "Criterion blocks": (lambda m, t, r: melens.Criterion(few_blocks=-1), "is -1; it must be a whole number"),
    "Trace.load": (lambda m, t, r: melens.Trace.load(5), "Trace.load: folder is 5; it must be the path of a folder"),
    "Trace.save": (lambda m, t, r: t.save(None), "Trace.save: folder is None"),
    "a key beyond": (lambda m, t, r: melens.trace(m, IDS, melens.SinkMass(9)), "the longest prompt has 3 tokens"),
    "maps of two lengths": (lambda m, t, r: melens.trace(m, IDS, melens.AttentionMaps(1)), "prompts of one length"),
    "maps of far lengths": (
        lambda m, t, r: melens.trace(m, [IDS[0], [1] * 20], melens.AttentionMaps(1)),
        "prompts of one length",
    ),
    "ablated no pair": (lambda m, t, r: melens.ablated(m, 11, "ffn"), "parts[0] is 11; it must be a pair (layer, part"),
    "ablated part": (lambda m, t, r: melens.ablated(m, (1, "fnn")), "parts[0][1] is 'fnn'; it must be ffn, attention,"),
    "ablated order": (lambda m, t, r: melens.ablated(m, ("ffn", 1)), "parts[0][0] is 'ffn'; it must be a block"),
    "ablated beyond": (lambda m, t, r: melens.ablated(m, (9, "ffn")).__enter__(), "its blocks are 0 to 3"),
    "normalization beyond": (lambda m, t, r: melens.read_normalization(m, 99, "ln2"), "no block 99: its"),
    "normalization negative": (lambda m, t, r: melens.read_normalization(m, -1, "ln2"), "layer is -1"),
    "normalization site": (lambda m, t, r: melens.read_normalization(m, 1, "ln3"), "it must be ln1 or ln2"),
    "normalization attention": (lambda m, t, r: melens.read_normalization(m, 1, "attn"), "it must be ln1 or ln2"),
    "verify sites": (lambda m, t, r: melens.verify(m, ["nonsense"]), "has the site 'nonsense'"),
    "runs positions": (lambda m, t, r: melens.MassiveTokenRuns(m, IDS, [0]), "2 prompts need as many positions"),
    "runs position": (lambda m, t, r: melens.MassiveTokenRuns(m, IDS, [0, -1]), "position -1 is beyond its prompt"),
    "runs texts": (lambda m, t, r: melens.MassiveTokenRuns(m, ["ab"], [0]), "token ids of each prompt, not texts"),
    "runs ids": (lambda m, t, r: melens.MassiveTokenRuns(m, [[1, 999]], [0]), "outside the vocabulary"),
    "runs norms": (lambda m, t, r: melens.MassiveTokenRuns(m, IDS, [0, 0], torch.ones(3, 4)), "of 3 prompts and 4"),
    "run no list": (lambda m, t, r: r.run(HOOK), "it must be a list of (name of a hook point, function"),
    "run name": (lambda m, t, r: r.run([("blocks.1.mlp", HOOK[1])]), "no hook point 'blocks.1.mlp'"),
    "run start": (lambda m, t, r: r.run([HOOK], 99), "its blocks are 0 to 3"),
    "patch shape": (lambda m, t, r: r.patch_ffn(1, torch.ones(3, 64)), "here are 2 prompts of width 64"),
    "patch number": (lambda m, t, r: r.patch_ffn(1, 0), "values is 0; it must be a float tensor [prompt, d]"),
    "judge empty": (lambda m, t, r: melens.judge({}), "results[0] is {}; it must be a result"),
    "judge path": (lambda m, t, r: melens.judge("outputs/result.json"), "what json.loads reads"),
    "judge trace": (lambda m, t, r: melens.judge([t]), "results[0] is of type Trace"),
    "judge experiment": (lambda m, t, r: melens.judge(PLANTED | {"experiment": []}), "field 'experiment'"),
    "judge name": (lambda m, t, r: melens.judge(PLANTED | {"model": {"name": []}}), "'model.name'"),
    "judge no name": (lambda m, t, r: melens.judge(PLANTED | {"model": {}}), "'model.name'"),
    "judge metrics": (lambda m, t, r: melens.judge([PLANTED, PLANTED | {"metrics": 5}]), "results[1] is"),
    "at a trace": (lambda m, t, r: WeMask().at(t), "must be what melens.find_me_layer(trace) found"),
    "at a float": (lambda m, t, r: WeMask().at(2.0), "me is 2.0"),
    "at before": (lambda m, t, r: WeMask().at(-1), "me is -1"),
    "on a name": (lambda m, t, r: WeMask(start=1).on("smollm2-135m"), "a TransformerBridge and a transformers model"),
    "applied to a trace": (lambda m, t, r: WeMask(start=1).applied(t).__enter__(), "A Trace cannot be masked"),
    "install refresh": (lambda m, t, r: WeMask(start=1).install(m, refresh="yes"), "it must be true or false"),
    "moved_to": (lambda m, t, r: WeMask(start=1).moved_to(m), "call mask.on(model) first"),
    "save": (lambda m, t, r: WeMask(start=1).save(5), "folder is 5; it must be the path of a folder"),
    "load": (lambda m, t, r: WeMask.load(None), "folder is None"),
    "massive dims": (
        lambda m, t, r: WeMask(start=1, select="massive", massive_dims=(-1,)).dims(m),
        "massive_dims is [-1]; it must be dims, counted from 0",
    ),
    "judge parts": (
        lambda m, t, r: melens.judge(PLANTED | {"experiment": "all", "metrics": {"sinks": 4}}),
        "'metrics.sinks'",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("call", "sentence"), CALLS.values(), ids=CALLS)
def test_wrong_arguments_are_told_in_one_sentence(call, sentence, model, trace, runs):
    with pytest.raises(MelensError, match=re.escape(sentence)) as raised:
        call(model, trace, runs)
    assert "\n" not in str(raised.value)


def test_no_results_give_an_empty_table_of_the_same_columns():
    assert list(melens.judge([]).columns) == list(melens.judge([PLANTED]).columns)


def test_a_checked_function_keeps_its_name_and_its_signature():
    assert melens.trace.__doc__.startswith("Run the prompts")
    assert "max_batch_tokens" in melens.trace.__wrapped__.__annotations__
